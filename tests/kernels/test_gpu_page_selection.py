"""Page selection on a Hopper GPU at the shapes of the benchmarks: ``pytest -m gpu tests/kernels``.

Statistics of logical pages without tokens hold NaN.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from shapes.selection import SELECTION, SelectionShape, selection_inputs

from pallas_kernels import reference
from pallas_kernels.hopper.page_scores import page_scores
from pallas_kernels.hopper.page_selection import select_pages

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("shape", SELECTION, ids=lambda shape: shape.name)
def test_page_scores(shape: SelectionShape, weight: float) -> None:
    """Products of bf16 are exact and sums float32: far closer than twice bf16 arithmetic."""
    q, stats, tables, length = selection_inputs(shape)
    args = q, stats, tables[0], length
    how = {
        "page_size": shape.page_size,
        "selected_page_size": shape.selected_page_size,
        "lower_bound_weight": weight,
        "most_heads": shape.most_heads,
    }
    scores = np.asarray(jax.jit(partial(page_scores, **how))(*args))
    truth = np.asarray(reference.page_scores(*args, **how))
    empty = np.isneginf(truth)  # at most the last logical page of a row
    assert empty.mean() < 0.01
    assert_array_equal(np.isneginf(scores), empty)
    np.testing.assert_allclose(scores[~empty], truth[~empty], atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", ["scores", "tied"])
@pytest.mark.parametrize("shape", SELECTION, ids=lambda shape: shape.name)
def test_select_pages(shape: SelectionShape, kind: str) -> None:
    """Every head wants a number of its own."""
    rng = np.random.default_rng(0)
    size = shape.rows, shape.retrieval_heads, shape.candidates
    scores = rng.normal(size=size) if kind == "scores" else rng.choice([-1, -0.0, 0, 2], size=size)
    candidates = np.full(shape.rows, shape.candidates - 1, np.int32)
    candidates[-1] -= shape.candidates // 3
    scores[-1, :, candidates[-1] :] = np.nan
    wanted = rng.integers(0, shape.selected + 1, size[:2])
    wanted[0, 0] = shape.selected
    args = jnp.asarray(scores, jnp.float32), jnp.asarray(candidates), jnp.asarray(wanted, jnp.int32)
    how = {"num_pages": shape.selected, "sink_pages": 1, "most_heads": shape.most_heads}
    assert_array_equal(
        jax.jit(partial(select_pages, **how))(*args), reference.select_pages(*args, **how)
    )
