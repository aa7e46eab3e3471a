"""The engine's decode steps on the kernels, interpreted on a CPU, against the reference ops.

Prompts are prefilled on the reference ops in both cases: the threads that stand for the warpgroups
of the prefill kernel starve when a large program that waits for them holds the CPU's threads.
Decode goes past a page and past selections, in bf16. Both round at the same places but not in the
same order, so log-probabilities agree to what bf16 leaves of them.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budgets import budgets_of
from numpy.testing import assert_allclose

from lserve_jax import ModelConfig, SamplingParams, SparsityConfig
from lserve_jax.attention.cache import make_spec
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.state import Sample
from lserve_jax.engine.weights import EngineParams
from lserve_jax.model.llama import init_params
from pallas_kernels.api import Backend
from pallas_kernels.hopper import decode_attention, page_scores, page_selection

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
)
# Layer 0 has a head of each class, layer 1 two retrieval heads; 63 of 150 tokens are selected.
LSERVE = SparsityConfig(
    page_size=32,
    token_budget=64,
    reuse_interval=2,
    decode_sink=32,
    decode_local=32,
    prefill_sink=32,
    prefill_local=64,
)


class ReferencePrefill(ModelRunner):
    """Decodes with ``backend``, prefills on the reference ops."""

    def prefill(self, chunks: Sequence[Chunk], rows: int = 1) -> tuple[jax.Array, Sample | None]:
        on_kernels = self._program
        self._program = dataclasses.replace(on_kernels, backend="reference")
        made = super().prefill(chunks, rows)
        self._program = on_kernels
        return made


def make_engine(backend: Backend, sparsity: SparsityConfig, max_model_len: int) -> Engine:
    spec = make_spec(
        CONFIG,
        sparsity=sparsity,
        heads=budgets_of((1, 2), sparsity),
        max_model_len=max_model_len,
        max_num_seqs=2,
        num_pages=24,
        max_prefixes=0,
        kv_dtype="int8",
    )
    made = init_params(CONFIG, dtype=jnp.bfloat16)
    params = EngineParams(decode=made, prefill=made, draft=made)
    runner = ReferencePrefill(
        CONFIG,
        params,
        spec,
        dtype=jnp.bfloat16,
        backend=backend,
        chunk_size=128,
    )
    runner.begin(params)
    return Engine(runner, max_model_len=max_model_len, eos_token_ids=(), burst_steps=4)


def generate(backend: Backend) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and their log-probabilities [requests, tokens]."""
    engine = make_engine(backend, LSERVE, 192)
    # No page is chosen or left by less than 0.4; rounding in bf16 moves scores by 0.2.
    rng = np.random.default_rng(6)
    sampling = SamplingParams(temperature=0, max_tokens=6)
    tokens, logprobs = {}, {}
    for name, length in (("long", 158), ("short", 20)):
        engine.add_request(name, rng.integers(0, 64, length), sampling, seed=0)
    for output in engine.stream():
        tokens.setdefault(output.request_id, []).extend(output.token_ids)
        logprobs.setdefault(output.request_id, []).extend(output.logprobs)
    return np.array(list(tokens.values())), np.array(list(logprobs.values()))


@pytest.mark.slow
def test_kernels_give_the_reference_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode_attention, page_scores, page_selection):
        monkeypatch.setattr(module, "SM_COUNT", 4)  # fewer CTAs to interpret
    expected_tokens, expected = generate("reference")
    tokens, logprobs = generate("mosaic")
    np.testing.assert_array_equal(tokens, expected_tokens)
    # Logits of size 3 made of bf16 activations: a few units of 2^-8.
    assert_allclose(logprobs, expected, atol=0.05)


def test_a_budget_that_the_kernel_cannot_select_is_refused_at_once() -> None:
    budget = 16 * 4098  # a page of them is not selected but the newest
    sparsity = SparsityConfig(token_budget=budget)
    with pytest.raises(NotImplementedError, match=f"token_budget={budget} is more than 4096 pages"):
        make_engine("mosaic", sparsity, 70_000)
    make_engine("mosaic", SparsityConfig(token_budget=budget - 16), 70_000)
