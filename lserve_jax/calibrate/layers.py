"""A model's layers as calibration runs them: parameters stacked over layers, attention in O(T)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from lserve_jax.model.bound import bind
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Llama
from lserve_jax.model.params import Params
from pallas_kernels import api
from pallas_kernels.api import Backend, KVPages


def refuse_unlike_layers(config: ModelConfig) -> None:
    """Raises ``NotImplementedError`` for a model whose layers differ in more than weights."""
    if config.nope_layers:
        raise NotImplementedError(
            f"calibrating a model with layers without rotary embedding ({config.nope_layers}) is "
            "not supported"
        )


def stack_layers(params: Params) -> Params:
    """The same parameters with every leaf of ``layers`` stacked to ``[L, ...]``: a copy of them.

    What it returned passes as it is.
    """
    if 0 not in params["layers"]:
        return params
    layers = [params["layers"][i] for i in range(len(params["layers"]))]
    return params | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def checked_tokens(config: ModelConfig, tokens: Int[np.ndarray, " T"]) -> Int32[np.ndarray, " T"]:
    """``tokens`` as int32. Raises ``ValueError`` for ids outside the vocabulary, other shapes."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.size == 0 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"a sequence must be integers of shape [T], got {tokens.dtype} {tokens.shape}"
        )
    low, high = tokens.min(), tokens.max()
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"token ids must lie in [0, {config.vocab_size}), got {low if low < 0 else high}"
        )
    return tokens.astype(np.int32)


def one_layer(config: ModelConfig, stacked: Params, weights: Params) -> Llama:
    """The model with a single layer of these ``weights``, for use inside a traced function.

    ``stacked`` gives all but the layers. Raises ``NotImplementedError`` for a model whose layers
    differ in more than weights.
    """
    refuse_unlike_layers(config)
    single = dataclasses.replace(config, num_hidden_layers=1)
    return bind(single, stacked | {"layers": {0: weights}})


def layer_weights(stacked: Params, layer: Int[Array, ""] | int) -> Params:
    """What ``one_layer`` takes, of one layer of ``stack_layers``."""
    return jax.tree.map(lambda leaf: leaf[layer], stacked["layers"])


def no_history(config: ModelConfig, dtype: jnp.dtype) -> KVPages:
    """A page that nobody reads, for every KV head."""
    shape = (config.num_key_value_heads, 1, 16, config.head_dim)
    return KVPages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def full_attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T Hk D"],
    v: Float[Array, "T Hk D"],
    history: KVPages,
    start: int,
    *,
    backend: Backend,
) -> Float[Array, "T H D"]:
    """Causal attention of a chunk, its first token at position ``start``, and what is before it.

    ``history`` ``[Hk, N, P, D]`` holds the positions below ``start`` in order; q and k are rotated.
    Memory is O(T).
    """
    table = jnp.arange(history.k.shape[1])
    no_heads = jax.tree.map(lambda x: x[:0], history)
    out, _ = api.prefill_attention(
        q,
        k,
        v,
        history,
        no_heads,
        table,
        table,
        jnp.int32(start),
        jnp.int32(q.shape[0]),
        sink=0,
        local=1,
        backend=backend,
    )
    return out
