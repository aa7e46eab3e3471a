"""The page selection kernels, interpreted on a CPU, against their reference.

Statistics of logical pages without tokens and of pages in no table hold NaN, and so do scores of
pages that are no candidates.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import reference
from pallas_kernels.device import MOST_SELECTED_PAGES
from pallas_kernels.hopper import page_selection
from pallas_kernels.hopper.page_scores import Config, choose_config, page_scores
from pallas_kernels.hopper.page_selection import select_pages

# Products of bf16 are exact in float32; their sum of at most 256 terms below 16 is not.
TOLERANCE = 5e-5


def problem(rows, heads, group, head_dim, logical_pages, page_size, width, *, seed=0):
    """Rows of every kind of length: all pages, a part, none."""
    rng = np.random.default_rng(seed)
    N = rows * width + 1
    table = rng.permutation(N)[: rows * width].reshape(rows, width).astype(np.int32)
    length = rng.integers(1, width * page_size, rows).astype(np.int32)
    length[0] = width * page_size
    if rows > 2:
        length[2] = 0
    first_token = np.arange(width)[:, None] * page_size + np.arange(logical_pages) * (
        page_size // logical_pages
    )
    used = np.zeros((N, logical_pages), bool)
    for row in range(rows):
        used[table[row]] = first_token < length[row]
    keys = rng.normal(size=(2, heads, N, logical_pages, head_dim))
    stats = np.where(used[:, :, None, None], np.stack([keys.max(0), keys.min(0)], 3), np.nan)
    q = jnp.asarray(rng.normal(size=(rows, heads * group, head_dim)), jnp.bfloat16)
    return q, jnp.asarray(stats, jnp.bfloat16), jnp.asarray(table), jnp.asarray(length)


def check_scores(
    args,
    page_size: int,
    config: Config | None = None,
    weight: float = 0.5,
    together: int = 1,
    most_heads: int | None = None,
) -> np.ndarray:
    """The scores; ``together`` logical pages have one."""
    how = {
        "most_heads": most_heads,
        "page_size": page_size,
        "selected_page_size": together * (page_size // args[1].shape[2]),
        "lower_bound_weight": weight,
    }
    scores = np.asarray(jax.jit(lambda *xs: page_scores(*xs, **how, config=config))(*args))
    expected = np.asarray(reference.page_scores(*args, **how))
    assert_array_equal(np.isneginf(scores), np.isneginf(expected))
    finite = np.isfinite(expected)
    assert finite.any() and scores.shape == expected.shape
    assert_allclose(scores[finite], expected[finite], atol=TOLERANCE, rtol=0)
    return scores


@pytest.mark.parametrize(
    ("rows", "heads", "group", "head_dim", "logical_pages", "together", "page_size", "width"),
    [
        (3, 1, 4, 128, 4, 4, 64, 20),  # several pages a tile, two chunks, an empty row
        (3, 1, 4, 128, 4, 1, 64, 20),
        (1, 2, 3, 64, 1, 1, 16, 10),  # a logical page a page; fewer query rows than columns
        (1, 1, 16, 64, 4, 1, 64, 19),  # two blocks of columns
        (1, 1, 9, 128, 8, 2, 128, 9),  # eight pages a tile
        (2, 1, 1, 64, 8, 8, 128, 5),
        (1, 1, 2, 128, 2, 2, 32, 12),
    ],
)
def test_scores(rows, heads, group, head_dim, logical_pages, together, page_size, width) -> None:
    args = problem(rows, heads, group, head_dim, logical_pages, page_size, width)
    check_scores(args, page_size, Config(tiles=1), together=together)


@pytest.mark.parametrize(("tiles", "stages", "together"), [(4, 2, 1), (5, 1, 8)])
def test_any_number_of_tiles(tiles: int, stages: int, together: int) -> None:
    """More tiles than stages refill them; a chunk may reach past the table."""
    args = problem(1, 1, 4, 128, 8, 128, 35, seed=1)
    check_scores(args, 128, Config(tiles=tiles, stages=stages), together=together)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_weights_of_the_lower_bound(weight: float) -> None:
    """The ends, which lose nothing in bf16, against the reference and the oracle; all other scores
    here are with 0.5."""
    args = problem(1, 1, 2, 64, 2, 32, 6, seed=2)
    scores = check_scores(args, 32, Config(tiles=1), weight, together=2)
    q, stats, table, length = args
    q, stats = np.asarray(q, np.float64), np.asarray(stats, np.float64)
    assert length[0] == 6 * 32  # every page is in use
    truth = [oracle.page_score(q[0], list(stats[0, page]), weight) for page in table[0]]
    assert_allclose(scores[0, 0], truth, atol=TOLERANCE, rtol=0)


def test_any_other_weight_is_rounded_to_bf16() -> None:
    args = problem(1, 1, 2, 64, 2, 32, 6, seed=2)
    how = {"page_size": 32, "selected_page_size": 32, "lower_bound_weight": 0.3}
    expected = reference.page_scores(*args, **how)
    # The weight and its product with q are off by 2^-9 of themselves each. 64 products in the lower
    # bound, of mean size 0.3: 64 * 0.3 * 2^-8 were all errors to add up.
    assert_allclose(page_scores(*args, **how), expected, atol=0.08, rtol=0)


def test_choice_of_config() -> None:
    assert choose_config(1, 4, 128) == Config(tiles=2, stages=2)  # two CTAs an SM
    assert choose_config(1, 4, 16).tiles == 1  # fewer tiles than SMs
    assert choose_config(8, 8, 2048).tiles == 8  # several waves


def test_scores_of_fewer_heads_than_other_layers_have() -> None:
    check_scores(problem(2, 3, 2, 64, 4, 64, 9), 64, most_heads=5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_dim": 32}, "head_dim must be 64 or 128, got 32"),
        ({"logical_pages": 16}, "a page must hold 1, 2, 4 or 8 logical pages, got 16"),
        ({"group": 17}, "at most 16 query heads a KV head, got 17"),
    ],
)
def test_scores_refuses_by_name(change: dict, reason: str) -> None:
    shape = {"group": 1, "head_dim": 64, "logical_pages": 4} | change
    args = problem(1, 1, page_size=64, width=2, **shape)
    with pytest.raises(NotImplementedError, match=reason):
        page_scores(*args, page_size=64, selected_page_size=64)


def test_scores_refuses_float32() -> None:
    q, stats, *rest = problem(1, 1, 1, 64, 1, 16, 2)
    with pytest.raises(NotImplementedError, match="queries must be bfloat16, got float32"):
        page_scores(q.astype(jnp.float32), stats, *rest, page_size=16, selected_page_size=16)
    with pytest.raises(NotImplementedError, match="key statistics must be bfloat16, got float32"):
        page_scores(q, stats.astype(jnp.float32), *rest, page_size=16, selected_page_size=16)


def test_config_checks_itself() -> None:
    with pytest.raises(ValueError, match="tiles must be at least 1, got 0"):
        Config(tiles=0)


# ----------------------------------------------------------------------------------------- select


@pytest.fixture(autouse=True)
def few_sms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer CTAs to interpret; rows still have two each."""
    monkeypatch.setattr(page_selection, "SM_COUNT", 8)


KINDS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    # Few values, both zeros equal and infinities, so that ties are common at the threshold.
    "tied": lambda rng, shape: rng.choice([-np.inf, -2, -0.0, 0.0, 3, np.inf], size=shape),
    "equal": lambda rng, shape: np.full(shape, -5.0),
    # From the smallest to the largest float32: the search has all of the keys to narrow.
    "wide": lambda rng, shape: np.sign(rng.normal(size=shape)) * 10 ** rng.uniform(-38, 38, shape),
}


@pytest.mark.parametrize(
    ("width", "num_pages", "sink_pages", "kind"),
    [
        (300, 63, 2, "tied"),
        (100, 100, 0, "normal"),  # everything, two tiles of entries
        (64, 1, 0, "equal"),
        (512, 3, 3, "wide"),  # sinks only
        (512, 20, 1, "wide"),
        (4200, 70, 1, "tied"),  # two blocks of strips
        (8200, 70, 0, "tied"),  # two parts, and fewer in the second than are selected
        (16400, 20, 2, "tied"),  # three
        (8200, 600, 1, "normal"),  # more than a block of strips of the best
    ],
)
def test_selection(width: int, num_pages: int, sink_pages: int, kind: str) -> None:
    """In order; rows with all, some, fewer than ``num_pages`` and no candidates."""
    rng = np.random.default_rng(width)
    candidates = np.array([width, width // 2 + 1, min(num_pages, width) - 1, 0], np.int32)
    scores = KINDS[kind](rng, (4, 1, width)).astype(np.float32)
    for row, count in enumerate(candidates):
        scores[row, :, count:] = np.nan
    wanted = jnp.full((4, 1), num_pages)
    args = jnp.asarray(scores), jnp.asarray(candidates), wanted
    how = {"num_pages": num_pages, "sink_pages": sink_pages}
    selected = jax.jit(lambda *xs: select_pages(*xs, **how))(*args)
    expected = reference.select_pages(*args, **how)
    assert selected.dtype == expected.dtype
    assert_array_equal(selected, expected)


@pytest.mark.parametrize(
    ("width", "num_pages", "kind"),
    [
        (512, 130, "tied"),  # heads without entries in the second and third tile
        (9000, 300, "tied"),  # two parts, each of which gives as many as any head wants
    ],
)
def test_heads_want_different_numbers_of_pages(width: int, num_pages: int, kind: str) -> None:
    """All, some, fewer than there are sinks, none; more than there are candidates."""
    scores = KINDS[kind](np.random.default_rng(7), (2, 4, width)).astype(np.float32)
    wanted = jnp.array([[num_pages, 65, 1, 0], [3, 64, num_pages, 7]])
    args = jnp.asarray(scores), jnp.array([width, 50]), wanted
    how = {"num_pages": num_pages, "sink_pages": 2}
    selected = select_pages(*args, **how)
    assert_array_equal((selected >= 0).sum(axis=2), [[num_pages, 65, 1, 0], [3, 50, 50, 7]])
    assert_array_equal(selected, reference.select_pages(*args, **how))


def test_as_many_pages_as_there_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of three parts are two parts, and the best of those fill one."""
    monkeypatch.setattr(page_selection, "SM_COUNT", 1)  # fewer CTAs to interpret
    scores = KINDS["tied"](np.random.default_rng(3), (1, 1, 16500)).astype(np.float32)
    args = jnp.asarray(scores), jnp.array([16499]), jnp.array([[MOST_SELECTED_PAGES]])
    how = {"num_pages": MOST_SELECTED_PAGES, "sink_pages": 2}
    assert_array_equal(select_pages(*args, **how), reference.select_pages(*args, **how))


def test_one_cta_fills_all_entries_if_sms_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_selection, "SM_COUNT", 1)
    scores = jax.random.normal(jax.random.key(0), (1, 1, 333))
    args = scores, jnp.array([330]), jnp.array([[130]])
    how = {"num_pages": 130, "sink_pages": 1}
    assert_array_equal(select_pages(*args, **how), reference.select_pages(*args, **how))


@pytest.mark.parametrize(
    ("width", "num_pages", "dtype", "reason"),
    [
        (8, 0, jnp.float32, "1 to 4096 pages can be selected, got 0"),
        (4200, 4097, jnp.float32, "1 to 4096 pages can be selected, got 4097"),
        (8, 2, jnp.bfloat16, "scores must be float32, got bfloat16"),
    ],
)
def test_selection_refuses_by_name(width: int, num_pages: int, dtype: str, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        select_pages(
            jnp.zeros((1, 1, width), dtype),
            jnp.array([1]),
            jnp.array([[1]]),
            num_pages=num_pages,
            sink_pages=0,
        )


def test_selection_of_fewer_heads_than_other_layers_have() -> None:
    rng = np.random.default_rng(0)
    args = rng.normal(size=(2, 3, 300)).astype(np.float32), np.array([300, 90], np.int32)
    args = *args, rng.integers(1, 70, (2, 3)).astype(np.int32)
    how = {"num_pages": 70, "sink_pages": 1}
    selected = jax.jit(lambda *xs: select_pages(*xs, **how, most_heads=5))(*args)
    assert_array_equal(selected, reference.select_pages(*args, **how))
