"""What only values can tell: reported under checkify if asked for, and else not in the program."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import checkify
from op_examples import ACCEPTED, KR, L, M, N, P, T, example, jitted
from tiny_llm import tiny_config, tiny_params

import lserve_jax.engine.runner
from lserve_jax import LLM, SamplingParams
from pallas_kernels import api


@functools.cache
def checked(op: str):
    """The op, jitted anew, under checkify: for all changes of its arguments one program."""
    return checkify.checkify(jitted.__wrapped__(op))


def run(op: str, **changes):
    """The op of valid arguments but for ``changes``."""
    with api.value_checks():
        return checked(op)(example(op) | changes)[0]


def changed(op: str, name: str, **fields):
    return {name: example(op)[name]._replace(**fields)}


VIOLATIONS = [
    (
        "paged_attention",
        changed("paged_attention", "retrieval_list", page_ids=jnp.full((2, KR, L), N)),
        rf"retrieval_list.page_ids must lie in \[0, {N - 1}\], got {N} to {N}",
    ),
    (
        "paged_attention",
        changed("paged_attention", "streaming_list", stop=jnp.full((2, 1), L * P + 1)),
        rf"streaming_list.stop must lie in \[0, {L * P}\], got {L * P + 1}",
    ),
    (
        "prefill_attention",
        {"start": jnp.int32(M * P + 1)},
        rf"tokens cached through page_table, which holds {M * P}, must lie in",
    ),
    (
        "prefill_attention",
        {"streaming_table": jnp.array([0, -1, 0, 0])},
        rf"streaming_table must lie in \[0, {N - 1}\], got -1 to 0",
    ),
    ("prefill_attention", {"length": jnp.int32(T + 1)}, rf"length must lie in \[0, {T}\]"),
    (
        "prefill_attention",
        changed("prefill_attention", "blocks", counts=jnp.array([[L + 1]])),
        rf"blocks.counts must lie in \[0, {L}\], got {L + 1}",
    ),
    (
        "prefill_attention",
        changed("prefill_attention", "blocks", ids=jnp.array([[[0, 2, 7]]])),
        r"blocks.ids must ascend and lie in \[0, 1\], got 2 after 0",
    ),
    (
        "prefill_attention",
        changed("prefill_attention", "blocks", ids=jnp.array([[[1, 1, 7]]])),
        r"blocks.ids must ascend and lie in \[0, 1\], got 1 after 1",
    ),
    (
        "prefill_attention",
        changed("prefill_attention", "blocks", ids=jnp.array([[[-1, 1, 7]]])),
        r"blocks.ids must ascend and lie in \[0, 1\], got -1 after -1",
    ),
    ("prefix_attention", {"length": jnp.int32(M * P + 1)}, "tokens cached through page_table"),
    (
        "verify_attention",
        {"position": jnp.array([0, M * P - 2])},
        f"tokens cached through page_table, which holds {M * P}, must lie in",
    ),
    ("verify_attention", {"page_table": jnp.full((2, M), N)}, "page_table must lie in"),
    (
        "append_kv",
        {"page": jnp.array([0, N])},
        rf"page must lie in .*, {N - 1}\], got 0 to {N}",
    ),
    ("append_kv", {"offset": jnp.array([0, P])}, rf"offset must lie in \[0, {P - 1}\]"),
    (
        "append_kv_chunk",
        {"start": jnp.int32(M * P - T + 1)},
        "tokens cached through page_table",
    ),
    ("append_kv_chunk", {"streaming_page": jnp.full((T,), N)}, "streaming_page must lie in"),
    ("page_scores", {"length": jnp.array([1, M * P + 1])}, "length must lie in"),
    ("page_scores", {"page_table": jnp.full((2, M), N)}, "page_table must lie in"),
    ("select_pages", {"num_candidates": jnp.array([1, M + 1])}, "num_candidates must lie in"),
    ("select_pages", {"wanted": jnp.array([[3], [1]])}, r"wanted must lie in \[0, 2\], got 1 to 3"),
]
CHECKED = {op for op, _, _ in VIOLATIONS} | {"choose_blocks", "causal_attention"}


@pytest.mark.parametrize("op", sorted(CHECKED))
def test_valid_arguments_pass(op: str) -> None:
    run(op).throw()


@pytest.mark.parametrize(("op", "changes", "words"), VIOLATIONS)
def test_violations_are_reported(op: str, changes: dict, words: str) -> None:
    with pytest.raises(checkify.JaxRuntimeError, match=words):
        run(op, **changes).throw()


def test_entries_that_are_not_used_may_hold_anything() -> None:
    table = jnp.array([3, 0, 4, N])  # 21 tokens are cached: two pages
    run("prefill_attention", page_table=table, streaming_table=table).throw()
    run("append_kv", page=jnp.array([-1, -7])).throw()


@pytest.mark.parametrize("op", sorted(ACCEPTED))
def test_programs_have_no_effects_unless_asked_for(op: str) -> None:
    """With effects JAX calls a program from Python. Of ops without checks there are none even
    then, so that nothing is said of valid arguments either."""

    def effects() -> int:
        return len(jax.make_jaxpr(jitted.__wrapped__(op))(example(op)).effects)

    assert effects() == 0
    with api.value_checks():
        assert (effects() > 0) == (op in CHECKED)


def test_what_was_traced_before_is_traced_anew() -> None:
    check = jax.jit(partial(api.check_range, "x", limit=3))
    check(jnp.array([9]))
    with api.value_checks():
        error, _ = checkify.checkify(check)(jnp.array([9]))
    assert "x must lie in [0, 3], got 9 to 9" in str(error.get())
    check(jnp.array([9]))


def test_checks_reach_a_whole_burst_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it calls is traced anew: a page beyond the pool is reported."""
    config = tiny_config(layers=1, kv_heads=1)
    llm = LLM((config, tiny_params(config)), max_num_seqs=1, max_model_len=64)
    real, errors = lserve_jax.engine.runner.decode_burst, []

    def checked(program, params, caches, state, tables, *rest, **static):
        plain = partial(real.__wrapped__, program, **static)
        for beyond in (0, program.spec.num_pages):
            moved = dataclasses.replace(tables, page_table=tables.page_table + beyond)
            with api.value_checks():
                error, _ = checkify.checkify(plain)(params, caches, state, moved, *rest)
            errors.append(error.get())
        return real(program, params, caches, state, tables, *rest, **static)

    monkeypatch.setattr(lserve_jax.engine.runner, "decode_burst", checked)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=3))
    assert errors[0] is None
    assert "must lie in" in errors[1]
