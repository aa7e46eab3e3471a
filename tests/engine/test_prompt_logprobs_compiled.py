"""Log probabilities of a prompt's tokens: the programs that are compiled, and their memory."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from tiny_llm import random_prompts, tiny_config, tiny_params

import lserve_jax.engine.runner as runner_module
from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.attention.attend import ChunkRows, alike_layers, prefill_attend
from lserve_jax.engine.prompt_logprobs import judge_tokens
from lserve_jax.engine.state import Caches, Program
from lserve_jax.engine.steps import prefill_chunks
from lserve_jax.model.bound import bind
from lserve_jax.model.params import Params

CONFIG = tiny_config(layers=1, kv_heads=2)
JUDGE = SamplingParams(prompt_logprobs=2, max_tokens=0)


def test_a_program_for_each_power_of_two() -> None:
    llm = LLM((CONFIG, tiny_params(CONFIG)))
    [prompt] = random_prompts(18, [40])

    def compilations(**settings: Any) -> int:
        before = llm.engine.metrics().compilations
        llm.generate({"prompt_token_ids": prompt}, SamplingParams(**settings))
        return llm.engine.metrics().compilations - before

    assert compilations(max_tokens=4) == 3  # a chunk, an insert, a burst
    assert compilations(max_tokens=0, prompt_logprobs=3) == 1
    assert compilations(max_tokens=4, prompt_logprobs=4) == 0
    assert compilations(max_tokens=0, prompt_logprobs=0) == 1
    assert compilations(max_tokens=0, prompt_logprobs=5) == 1
    assert compilations(max_tokens=4) == 0


def test_who_does_not_ask_runs_what_ran_before(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same program to the letter as a chunk that knows nothing of it."""
    lowered: list[str] = []

    def plain_chunk(
        program: Program, params: Params, caches: Caches, tokens: jax.Array, rows: ChunkRows
    ) -> tuple:
        model = bind(program.config, params)
        attend = prefill_attend(
            program.config, program.spec, rows, tokens.shape[1], backend=program.backend
        )
        alike = alike_layers(program.config, program.spec)
        hidden, caches = model(tokens, attend, caches, alike=alike)
        last = hidden[jnp.arange(tokens.shape[0]), jnp.maximum(rows.length - 1, 0)]
        return model.unembed(last), caches

    plain_chunk.__name__ = "prefill_chunks"  # a program is called after its function
    jitted = jax.jit(plain_chunk, static_argnames="program", donate_argnames="caches")

    def record(*args: Any, **settings: Any) -> Any:
        lowered.append(prefill_chunks.lower(*args, **settings).as_text())
        *before, following = args
        if following is None:
            assert lowered[-1] == jitted.lower(*before).as_text()
        return prefill_chunks(*args, **settings)

    monkeypatch.setattr(runner_module, "prefill_chunks", record)
    sparsity = SparsityConfig(pattern=pattern)
    llm = LLM((CONFIG, tiny_params(CONFIG)), attention="lserve", sparsity=sparsity)
    [prompt] = random_prompts(19, [50])
    for sampling in (SamplingParams(max_tokens=1), JUDGE, SamplingParams(max_tokens=1)):
        llm.generate({"prompt_token_ids": prompt}, sampling)
    assert lowered[0] == lowered[2] != lowered[1]


def test_logits_exist_for_a_block_at_a_time() -> None:
    """8192 positions of 49,152 logits are 1.6 GB."""
    T, E, V = 8192, 16, 49_152
    kernel = jax.ShapeDtypeStruct((E, V), jnp.float32)

    def run(kernel: jax.Array, hidden: jax.Array, following: jax.Array) -> Any:
        return judge_tokens(lambda x: x @ kernel, hidden, following, 4, V)

    shapes = jax.ShapeDtypeStruct((T, E), jnp.float32), jax.ShapeDtypeStruct((T,), jnp.int32)
    memory = jax.jit(run).lower(kernel, *shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 200e6


@pytest.mark.parametrize("vocab", [5, 1 << 19, 1 << 25])
def test_blocks_of_any_vocabulary(vocab: int) -> None:
    """One block, several, and one for each position; ``unembed`` says which position it is."""
    T = 64
    hidden = jnp.arange(T, dtype=jnp.float32)[:, None]
    calls: list[int] = []

    def unembed(x: jax.Array) -> jax.Array:
        calls.append(len(x))
        return jnp.concatenate([x, jnp.zeros((len(x), 1))], axis=1)

    run: Callable = jax.jit(functools.partial(judge_tokens, unembed, top=1, vocab_size=vocab))
    found = run(hidden, jnp.arange(T) % 2)
    position = np.arange(T)
    expected = np.where(position % 2, 0, position) - np.logaddexp(position, 0)
    assert_allclose(found.logprob, expected, rtol=1e-6, atol=1e-6)
    assert_array_equal(found.token, position % 2)
    assert_array_equal(found.top_ids, np.zeros((T, 1)))
    assert set(calls) == {min(T, max((1 << 26) // (4 * vocab), 1))} if vocab > 5 else {T}
