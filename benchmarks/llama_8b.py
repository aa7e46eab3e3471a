"""The engine with Llama-3-8B's geometry and random weights: what speed needs of a model."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.attention_patterns import load_pattern
from convert.head_shares import save_head_shares
from lserve_jax.attention.cache import LayerCache
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.inputs import Chunk
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.runner import ModelRunner
from lserve_jax.engine.state import Sample
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.head_shares import MISSED_AT, HeadSensitivity, fit_shares
from lserve_jax.model.params import Params, abstract_params
from lserve_jax.sampling_params import SamplingParams

PATTERN = "Llama-3-8B-Instruct-Gradient-1048k"
CONFIG = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=1 << 20,
    tie_word_embeddings=False,
)
# LServe's own: half the heads stream, 4096 tokens of budget, a selection every fourth step.
LSERVE = SparsityConfig(pattern=PATTERN, head_shares=None)


def few_heads_matter(directory: Path) -> SparsityConfig:
    """Half the heads stream, three of the 256 read everything, the others 4096 tokens.

    Nobody has measured an 8B model yet, so the sensitivity is made up after SmolLM2's, of whose 90
    heads one carries half and four two thirds. It is written into ``directory``.
    """
    gates = load_pattern(PATTERN).gates
    worth = 1e-6 + 1e-4 * gates
    for layer, head in ((9, 2), (16, 5), (23, 0)):
        worth[layer, head] = 0.1
    missed = np.broadcast_to(np.linspace(0.5, 0.05, len(MISSED_AT))[:, None, None], (10, 32, 8))
    sensitivity = HeadSensitivity(
        streaming=worth, selecting=worth, missed=missed, name="made up", context=16384
    )
    shares = fit_shares(sensitivity, 0.125, sensitivity.least_sensitive(0.0))
    save_head_shares(directory, sensitivity, shares, {"budget_share": 0.125})
    return SparsityConfig(
        head_shares=str(directory), dense_heads=3, token_budget=4096, streaming_fraction=0.5
    )


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(seed: jax.Array, scale: float, *, shape: tuple[int, ...], dtype) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def random_params(config: ModelConfig = CONFIG) -> Params:
    """bf16 weights with the spread of a trained model's, so that activations stay finite."""
    leaves, tree = jax.tree.flatten(abstract_params(config, jnp.bfloat16))
    made = []
    for seed, leaf in enumerate(leaves):
        if len(leaf.shape) == 1:
            made.append(jnp.ones(leaf.shape, leaf.dtype))
        else:
            scale = leaf.shape[0] ** -0.5
            made.append(_normal(jnp.int32(seed), scale, shape=leaf.shape, dtype=leaf.dtype))
    return jax.tree.unflatten(tree, made)


class UncomputedPrompts(ModelRunner):
    """Prompts and prefixes enter at once: decode can be timed without computing them.

    The cache holds random keys, values and statistics. Build the engine with chunks of
    ``NO_CHUNKS`` tokens, so that a step of it takes in as many prompts as there are slots.
    """

    def reset(self) -> None:
        super().reset()
        self.fill_caches(lambda cache, layer: _random_cache(cache, jnp.int32(layer)))
        self._any_logits = jax.random.normal(
            jax.random.key(0), (1, self.config.vocab_size), jnp.float32
        )

    def prefill(
        self, chunks: Sequence[Chunk], rows: int = 1
    ) -> tuple[jax.Array, Sample | None, jax.Array | None]:
        return jnp.repeat(self._any_logits, rows, axis=0), None, None


NO_CHUNKS = 1 << 30  # tokens


@functools.partial(jax.jit, static_argnames=("shapes",))
def _random_cache(shapes: LayerCache, seed: jax.Array) -> LayerCache:
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(x: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
        if x.dtype == jnp.int32:  # page lists: made by the first selection
            return jnp.zeros(x.shape, x.dtype)
        # 64 different pages over and over: random bits for all would take the pool's memory again.
        pages = jax.random.normal(key, (64, *x.shape[2:]), x.dtype)
        return jnp.broadcast_to(pages[jnp.arange(x.shape[1]) % 64][None], x.shape)

    filled = jax.tree.unflatten(tree, [fill(x, key) for x, key in zip(leaves, keys, strict=True)])
    if filled.key_stats is None:
        return filled
    high = jnp.abs(filled.key_stats[:, :, :, :1])
    stats = jnp.concatenate([high, -high], axis=3)
    return dataclasses.replace(filled, key_stats=stats)


def options(sparsity: SparsityConfig | None, **changes: Any) -> EngineOptions:
    """Those of an engine of this geometry, bf16, that computes every prompt.

    ``changes`` are further ``EngineOptions``.
    """
    attention = "dense" if sparsity is None else "lserve"
    changes = {"enable_prefix_caching": False} | changes
    return EngineOptions(dtype="bfloat16", attention=attention, sparsity=sparsity, **changes)


def burst_seconds(engine: Engine, prompts: Sequence[np.ndarray], bursts: int) -> list[float]:
    """Seconds of each of ``bursts`` bursts in which all ``prompts`` decode, after a compiling one.

    ``engine`` has a runner of ``UncomputedPrompts``.

    A step of the engine returns when the burst before is done, and the device has the next by
    then: between two returns lies one burst, with the host's work hidden behind it. The first and
    the last of these times are left out: one compiles, or finds its code cold, and the other has
    no burst behind it.
    """
    steps = engine.burst_steps
    sampling = SamplingParams(temperature=0, max_tokens=steps * (bursts + 3) + 1, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        engine.add_request(str(row), prompt, sampling, seed=row)
    engine.step()
    ends = []
    while engine.has_unfinished_requests:
        outputs = engine.step()
        if all(len(output.token_ids) == 1 for output in outputs):
            continue  # first tokens, which come by themselves
        ends.append(time.perf_counter())
        assert [len(output.token_ids) for output in outputs] == [steps] * len(prompts)
    return np.diff(ends)[1:-1].tolist()
