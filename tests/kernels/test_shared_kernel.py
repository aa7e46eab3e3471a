"""Layers that split their heads differently run the same kernels, lowered without a GPU."""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from compile_offline import append_arguments, decode_arguments, prefill, prefill_arguments

from pallas_kernels.hopper.decode_attention import paged_attention
from pallas_kernels.hopper.kv_append_chunk import append_kv_chunk
from pallas_kernels.hopper.kv_append_token import append_kv
from pallas_kernels.hopper.page_scores import page_scores
from pallas_kernels.hopper.page_selection import select_pages
from pallas_kernels.hopper.shared_kernel import call_shared


@pytest.fixture(autouse=True)
def interpreter() -> None:
    """Nothing runs here."""


@pytest.fixture(autouse=True)
def arrays_as_long_as_they_are() -> None:
    """Kernels are lowered as they are for a GPU."""


@pytest.fixture(autouse=True)
def wgmma_from_registers() -> None:
    """They are."""


def attend(retrieval: int) -> tuple[Callable, tuple]:
    most_tokens = (4096,) * retrieval + (320,) * (8 - retrieval)
    arguments = decode_arguments(rows=2, retrieval=retrieval, streaming=8 - retrieval)
    return partial(paged_attention, most_tokens=most_tokens), arguments


def append_token(retrieval: int) -> tuple[Callable, tuple]:
    case = {"retrieval": retrieval, "streaming": 8 - retrieval, "ranked": (retrieval + 1) // 2}
    caches, tokens, places, _ = append_arguments(**case)
    return append_kv, (*tokens, *caches, *places)


def append_chunk(retrieval: int) -> tuple[Callable, tuple]:
    case = {"retrieval": retrieval, "streaming": 8 - retrieval, "ranked": (retrieval + 1) // 2}
    caches, tokens, places = append_arguments(tokens=128, **case)
    return append_kv_chunk, (*tokens, *caches, *places)


def attend_chunk(retrieval: int, **case) -> tuple[Callable, tuple]:
    return prefill, prefill_arguments(256, retrieval=retrieval, streaming=8 - retrieval, **case)


def attend_chunk_of_small_pages(retrieval: int) -> tuple[Callable, tuple]:
    return attend_chunk(retrieval, page_size=16, head_dim=64)


def attend_listed_blocks(retrieval: int) -> tuple[Callable, tuple]:
    return attend_chunk(retrieval, listed=9)


def score(heads: int) -> tuple[Callable, tuple]:
    array = jax.ShapeDtypeStruct
    how = {"page_size": 64, "selected_page_size": 16, "lower_bound_weight": 0.5, "most_heads": 8}
    q, stats = (
        array(shape, jnp.bfloat16) for shape in ((2, 4 * heads, 128), (heads, 99, 4, 2, 128))
    )
    return partial(page_scores, **how), (q, stats, array((2, 70), "int32"), array((2,), "int32"))


def select(heads: int) -> tuple[Callable, tuple]:
    array = jax.ShapeDtypeStruct
    scores, wanted = array((2, heads, 300), jnp.float32), array((2, heads), jnp.int32)
    how = {"num_pages": 63, "sink_pages": 1, "most_heads": 8}
    return partial(select_pages, **how), (scores, array((2,), "int32"), wanted)


def kernels(op: Callable, arguments: tuple) -> list[str]:
    text = jax.jit(op).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r'kernel_hash = "(.*?)", module', text)


@pytest.mark.parametrize(
    ("of_heads", "count"),
    [
        (attend, 2),
        (append_token, 1),
        (append_chunk, 1),
        (attend_chunk, 1),
        (attend_chunk_of_small_pages, 1),
        (attend_listed_blocks, 1),
        (score, 1),
        (select, 1),
    ],
)
def test_the_kernel_is_the_same(of_heads: Callable, count: int) -> None:
    few, many = (kernels(*of_heads(heads)) for heads in (1, 5))
    assert few == many and len(few) == count


def test_a_shape_that_is_no_first_axis_is_another_kernel() -> None:
    op, (scores, *rest) = select(3)
    wider = jax.ShapeDtypeStruct((2, 3, 500), scores.dtype)
    assert kernels(op, (scores, *rest)) != kernels(op, (wider, *rest))


def test_more_than_one_kernel_is_refused() -> None:
    def make(settings, results):
        return lambda x: jnp.sin(x)

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    how = {"longest": (8,), "longest_results": (8,)}
    with pytest.raises(AssertionError, match="must call one kernel and do nothing else"):
        kernels(lambda x: call_shared(make, None, (x,), (shape,), **how), (shape,))


def test_a_call_outside_of_jit_is_compiled() -> None:
    """As under ``jax.disable_jit``: it gets as far as to a device that has no such kernel."""
    scores = jnp.zeros((2, 3, 128))
    with jax.disable_jit(), pytest.raises(NotImplementedError, match="found for platform cpu"):
        select_pages(
            scores, jnp.array([9, 9]), jnp.full((2, 3), 4), num_pages=4, sink_pages=1, most_heads=8
        )


def test_a_derivative_is_refused_by_name() -> None:
    attend_pages, (q, *others) = attend(4)
    with pytest.raises(NotImplementedError, match=r"^decode_\w+ is a kernel, .*='reference'"):
        jax.eval_shape(
            lambda q, *others: jax.jvp(lambda q: attend_pages(q, *others)[0], (q,), (q,)),
            q,
            *others,
        )
