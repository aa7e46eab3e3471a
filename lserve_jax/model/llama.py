"""The Llama-family decoder in Flax NNX: parameters and one forward pass.

The model knows nothing of caches, pages or sparsity. Attention is a function passed in:

    attend(layer, q, k, v, cache) -> (o, cache)

    layer  int                which layer, from 0
    q      [B, T, H, D]       queries, before rotary embedding
    k, v   [B, T, Hk, D]      keys (before rotary embedding) and values
    cache  any pytree         whatever that attention function keeps per layer
    o      [B, T, H, D]       attention output

Rotary embedding belongs to ``attend`` because that is where positions are known, and because the
decode kernel rotates a key while it writes it to its page.

Covered: Llama 1-3.2 and its relatives, Mistral, Phi-3, Qwen2 (bias on q, k, v), Qwen3 (RMSNorm on
q, k), SmolLM3 (layers without rotary embedding).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lserve_jax.model.config import ModelConfig
from lserve_jax.model.linear import Linear, RMSNorm, Stream, add_linear, normed_linear
from lserve_jax.model.params import Attend, Params
from pallas_kernels import api
from pallas_kernels.api import Backend


class Attention(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        H, Hk, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads = (H, Hk, D)
        self.qkv_proj = Linear(
            config.hidden_size, (H + 2 * Hk) * D, bias=config.attention_bias, dtype=dtype, rngs=rngs
        )
        self.o_proj = Linear(
            H * D, config.hidden_size, bias=config.attention_out_bias, dtype=dtype, rngs=rngs
        )
        norm = functools.partial(RMSNorm, D, epsilon=config.rms_norm_eps, dtype=dtype)
        self.q_norm = norm() if config.qk_norm else None
        self.k_norm = norm() if config.qk_norm else None

    def __call__(
        self, layer: int, x: Stream, norm: RMSNorm, attend: Attend, cache: Any, backend: Backend
    ) -> tuple[Stream, Any]:
        (B, T), (H, Hk, D) = x.value.shape[:2], self.heads
        qkv = normed_linear(x, norm, self.qkv_proj, backend=backend).reshape(B, T, H + 2 * Hk, D)
        q, k, v = jnp.split(qkv, [H, H + Hk], axis=2)  # [B, T, H, D], [B, T, Hk, D] twice
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        o, cache = _attended(attend(layer, q, k, v, cache), q.shape)
        return add_linear(x, o.reshape(B, T, H * D), self.o_proj, backend=backend), cache


def _attended(result: Any, shape: tuple[int, ...]) -> tuple[Array, Any]:
    """What an ``attend`` returned; raises ``ValueError`` unless it is (o of that shape, cache)."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"attend must return (o, cache), got {type(result).__name__}")
    o, cache = result
    if jnp.shape(o) != shape:
        raise ValueError(f"attend returned o of shape {jnp.shape(o)}, expected {shape}: q's")
    return o, cache


class Mlp(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        E, F, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_up_proj = Linear(E, 2 * F, bias=bias, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(F, E, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Stream, norm: RMSNorm, backend: Backend) -> Stream:
        hidden = normed_linear(x, norm, self.gate_up_proj, gated=True, backend=backend)  # [B, T, F]
        return add_linear(x, hidden, self.down_proj, backend=backend)


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        norm = functools.partial(
            RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype
        )
        self.input_layernorm = norm()
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.post_attention_layernorm = norm()
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, layer: int, x: Stream, attend: Attend, cache: Any, backend: Backend
    ) -> tuple[Stream, Any]:
        x, cache = self.self_attn(layer, x, self.input_layernorm, attend, cache, backend)
        return self.mlp(x, self.post_attention_layernorm, backend), cache


class Embedding(nnx.Module):
    def __init__(self, config: ModelConfig, *, dtype, rngs: nnx.Rngs):
        shape = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape).astype(dtype))

    def __call__(self, tokens: Int[Array, "B T"], dtype: DTypeLike) -> Float[Array, "B T E"]:
        """Rows of a quantised table in ``dtype``, of one of floats as they are."""
        table = self.embedding.get_value()
        return api.look_up(table, tokens, dtype) if isinstance(table, api.Weight) else table[tokens]


class Llama(nnx.Module):
    """The whole decoder. Calling it gives hidden states; ``unembed`` turns those into logits."""

    def __init__(self, config: ModelConfig, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List(
            [DecoderLayer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, dtype=dtype)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)
        )

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        attend: Attend,
        caches: Sequence[Any],
        *,
        backend: Backend = "reference",
        remat: bool = False,
        alike: Sequence[int] | None = None,
    ) -> tuple[Float[Array, "B T E"], list[Any]]:
        """``backend`` is that of the linear layers: "mosaic" for few tokens, as in decode.

        With ``remat`` a derivative keeps of each layer its input and what ``attend`` returned, and
        computes the rest again. ``alike`` names for each layer one that ``attend`` treats like it,
        if the caches are of the same shapes: such layers are traced once, and are one function.
        """
        x = Stream(self.embed(tokens))
        new_caches = []
        attend = _kept(attend) if remat else attend

        @functools.partial(jax.jit, static_argnums=(0, 1))
        def run_alike(like: int, graph: nnx.GraphDef, parameters: Any, x: Stream, cache: Any):
            return nnx.merge(graph, parameters)(like, x, attend, cache, backend)

        for i, (layer, cache) in enumerate(zip(self.layers, caches, strict=True)):
            if alike is None:
                run = functools.partial(layer, i, attend=attend, backend=backend)
            else:
                run = functools.partial(run_alike, alike[i], *nnx.split(layer))
            if remat:
                policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
                run = jax.checkpoint(run, policy=policy)
            x, cache = run(x, cache=cache)
            new_caches.append(cache)
        return self.norm(x.value), new_caches

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """What the first layer reads."""
        return self.embed_tokens(tokens, self.norm.scale[...].dtype)

    def unembed(
        self, hidden: Float[Array, "... E"], *, backend: Backend = "auto"
    ) -> Float[Array, "... V"]:
        """Logits in float32: bf16 weights are multiplied exactly and summed in float32."""
        if self.lm_head is None:
            kernel = self.embed_tokens.embedding[...].T
        else:
            kernel = self.lm_head.kernel.get_value()
        return api.product(hidden, kernel, backend=backend)


_KEPT = "attention"


def _kept(attend: Attend) -> Attend:
    """``attend`` whose output is kept for a derivative: with T tokens it costs the most, O(T^2)."""

    def named(layer: int, q: Array, k: Array, v: Array, cache: Any) -> tuple[Array, Any]:
        o, cache = attend(layer, q, k, v, cache)
        return checkpoint_name(o, _KEPT), cache

    return named


def init_params(config: ModelConfig, seed: int = 0, dtype=jnp.float32) -> Params:
    """Random parameters, made on the default device. Same tree as ``convert.load`` returns."""

    def init():
        return nnx.to_pure_dict(nnx.split(Llama(config, dtype=dtype, rngs=nnx.Rngs(seed)))[1])

    return jax.jit(init)()
