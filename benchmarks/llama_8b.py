"""The engine with Llama-3-8B's geometry and random weights: what speed needs of a model."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from convert.attention_patterns import load_pattern
from lserve_jax.attention.cache import LayerCache, cache_bytes, make_spec
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.engine import Engine
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.heads import partition_heads
from lserve_jax.model.llama import Params, abstract_params
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
# Half the heads stream, 4096 tokens of budget, a selection every fourth step: the defaults.
LSERVE = SparsityConfig(pattern=PATTERN)


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


def make_engine(
    params: Params,
    sparsity: SparsityConfig | None,
    *,
    rows: int,
    max_model_len: int,
    kv_cache_bytes: int | None = None,
    max_prefixes: int = 0,
    burst_steps: int = 64,
    prefill_chunk_size: int = 8192,
    config: ModelConfig = CONFIG,
) -> Engine:
    """An engine for ``rows`` requests.

    Its cache holds as many of ``max_model_len`` tokens, or what fits into ``kv_cache_bytes``.
    """
    pattern = None if sparsity is None else sparsity.pattern
    partition = partition_heads(
        None if pattern is None else load_pattern(pattern),
        0.0 if sparsity is None else sparsity.resolved_streaming_fraction,
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
    )
    spec = make_spec(
        config,
        sparsity=sparsity,
        num_retrieval_heads=partition.num_retrieval,
        max_model_len=max_model_len,
        max_num_seqs=rows,
        num_pages=1,
        max_prefixes=max_prefixes,
        kv_dtype="auto",
    )
    num_pages = rows * spec.pages_per_sequence
    if kv_cache_bytes is not None:
        sizes = cache_bytes(config, spec, jnp.bfloat16)
        num_pages = kv_cache_bytes // (sizes["retrieval"] + sizes["key_stats"])
    spec = dataclasses.replace(spec, num_pages=num_pages)
    return Engine(
        config,
        params,
        spec,
        dtype=jnp.bfloat16,
        max_model_len=max_model_len,
        eos_token_ids=(),
        prefill_chunk_size=prefill_chunk_size,
        burst_steps=burst_steps,
    )


def fill_caches(engine: Engine) -> None:
    """Random keys, values and statistics: decode can be timed without a prefill."""
    shapes = jax.eval_shape(lambda: engine.caches)
    engine.caches = []  # the memory of the old ones is needed
    engine.caches = [_random_cache(cache, jnp.int32(i)) for i, cache in enumerate(shapes)]


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


@contextlib.contextmanager
def without_prefill(engine: Engine, tokens: int) -> Iterator[None]:
    """Prompts and prefixes, ``tokens`` together, enter at once: the cache holds random ones."""
    logits = jax.random.normal(jax.random.key(0), (engine.config.vocab_size,))

    def no_prefill(config, spec, params, caches, *rest, **options):
        return logits, caches

    # Twice, as a step's budget counts padding to powers of two.
    budget = max(2 * tokens, engine.prefill_chunk_size)
    with (
        mock.patch("lserve_jax.engine.engine.prefill_chunk", no_prefill),
        mock.patch.object(engine, "prefill_chunk_size", budget),
    ):
        yield


def burst_seconds(engine: Engine, prompts: Sequence[np.ndarray], bursts: int) -> list[float]:
    """Seconds of each of ``bursts`` bursts in which all ``prompts`` decode, after a compiling one.

    A step of the engine returns when the burst before is done, and the device has the next by
    then: between two returns lies one burst, with the host's work hidden behind it. The first and
    the last of these times are left out: one compiles, or finds its code cold, and the other has
    no burst behind it.
    """
    steps = engine.burst_steps
    sampling = SamplingParams(temperature=0, max_tokens=steps * (bursts + 3) + 1, ignore_eos=True)
    for row, prompt in enumerate(prompts):
        engine.add_request(str(row), prompt, sampling, seed=row)
    with without_prefill(engine, sum(map(len, prompts))):
        engine.step()
    ends = []
    while engine.has_unfinished_requests:
        outputs = engine.step()
        if all(len(output.token_ids) == 1 for output in outputs):
            continue  # first tokens, which come by themselves
        ends.append(time.perf_counter())
        assert [len(output.token_ids) for output in outputs] == [steps] * len(prompts)
    return np.diff(ends)[1:-1].tolist()
