"""Linear layers of decode: ``fused_linear`` and ``product``, in bf16 or with packed weights."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels import api
from pallas_kernels.api import PackedWeight, Weight

Kind = Literal["bf16", "int8", "int4", "fp8"]


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """A matrix [K, out] and what is around it."""

    name: str
    K: int
    out: int
    around: Literal["norm", "gated", "residual", "logits"]  # gated: with a norm in front, too
    layers: int = 32  # of it in the model

    @property
    def gated(self) -> bool:
        return self.around == "gated"


# Llama-3-8B's.
LINEAR = (
    LinearShape(name="qkv", K=4096, out=6144, around="norm"),
    LinearShape(name="o", K=4096, out=4096, around="residual"),
    LinearShape(name="gate_up", K=4096, out=28672, around="gated"),
    LinearShape(name="down", K=14336, out=4096, around="residual"),
    LinearShape(name="lm_head", K=4096, out=128256, around="logits", layers=1),
)


@partial(jax.jit, static_argnames=("K", "out"))
def random_matrix(seed: jax.Array, *, K: int, out: int) -> jax.Array:
    """bf16, of a size that leaves that of activations as it is."""
    return jax.random.normal(jax.random.key(seed), (K, out), jnp.bfloat16) * jnp.bfloat16(K**-0.5)


def random_weight(
    shape: LinearShape, kind: Kind, seed: int, group: int = 128
) -> jax.Array | Weight:
    matrix = random_matrix(jnp.int32(seed), K=shape.K, out=shape.out)
    return matrix if kind == "bf16" else api.quantize_weight(matrix, kind=kind, group=group)


def kernel_weight(shape: LinearShape, kind: Kind, seed: int) -> jax.Array | PackedWeight:
    weight = random_weight(shape, kind, seed)
    return api.pack_weight(weight, paired=shape.gated) if isinstance(weight, Weight) else weight


def linear_layer(
    shape: LinearShape,
    x: jax.Array,
    weight: jax.Array | PackedWeight,
    residual: jax.Array,
) -> jax.Array:
    """The layer with a norm whose scale is 1; ``residual`` [rows, out] where it has one."""
    if shape.around == "logits":
        return api.product(x, weight)
    norm = jnp.ones((shape.K,), x.dtype) if shape.around in ("norm", "gated") else None
    out, _ = api.fused_linear(
        x,
        weight,
        norm_scale=norm,
        epsilon=1e-5,
        residual=residual if shape.around == "residual" else None,
        gated=shape.gated,
    )
    return out
