"""Random quantised matrices of every kind that packs, and what they stand for in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.hopper import quant_operands
from pallas_kernels.packed import unpack_weight
from pallas_kernels.types import PackedWeight, Weight

# Codes, inputs of a group (None: one scale a channel), and zero points: "byte" are multiples of an
# eighth beside scales that were float16, "word" any.
KINDS = {
    "int8": ("int8", None, None),
    "fp8": ("float8_e4m3fn", None, None),
    "int4, group 32": ("uint4", 32, "word"),
    "int4, group 64": ("uint4", 64, "word"),
    "int4, group 128": ("uint4", 128, "word"),
    "int4, group 32, zeros in bytes": ("uint4", 32, "byte"),
    "int4, group 128, zeros in bytes": ("uint4", 128, "byte"),
    "int8, group 32": ("int8", 32, None),  # as GGUF's Q8_0
    "int8, group 128": ("int8", 128, "word"),  # as GPTQ's of 8 bits
    "fp8, blocks of 128": ("float8_e4m3fn", 128, None),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def random_weight(kind: str, K: int, out: int, seed: int = 0) -> Weight:
    """Every code there is but e4m3's NaN; products of size 1 with normal x."""
    codes, group, zeros = KINDS[kind]
    rng = np.random.default_rng(seed)
    shape = 1 if group is None else K // group, out
    size = {"int8": 74.0, "uint4": 4.6, "float8_e4m3fn": 100.0}[codes] * K**0.5
    scale = rng.uniform(0.5, 1.5, shape) / size
    zero = None
    if codes == "uint4":
        values = jnp.asarray(rng.integers(0, 16, (K, out)), jnp.uint4)
        zero = rng.integers(0, 129, shape) / 8 if zeros == "byte" else rng.uniform(-1, 16, shape)
        zero = jnp.asarray(zero, jnp.float32)
    elif codes == "int8":
        values = jnp.asarray(rng.integers(-128, 128, (K, out)), jnp.int8)
        if zeros is not None:
            zero = jnp.asarray(rng.uniform(-128, 128, shape), jnp.float32)
    else:
        bits = rng.integers(0, 127, (K, out)) + 128 * rng.integers(0, 2, (K, out))
        values = lax.bitcast_convert_type(jnp.asarray(bits, jnp.uint8), jnp.float8_e4m3fn)
    scale = scale.astype(np.float16) if zeros == "byte" else scale
    return Weight(values, jnp.asarray(scale, jnp.float32), zero)


def numbers(weight: Weight) -> np.ndarray:
    """What a weight stands for, in float64, by its definition."""
    codes, scale = (np.asarray(x).astype(np.float64) for x in (weight.codes, weight.scale))
    each = len(codes) // len(scale)
    zero = 0.0 if weight.zero is None else np.repeat(np.asarray(weight.zero, float), each, axis=0)
    return (codes - zero) * np.repeat(scale, each, axis=0)


def packed_codes(words: jax.Array, codes: str, offsets: jax.Array | None) -> jax.Array:
    """[64, 128] float32, of the words [rows, 64] of a block, less ``offsets`` int32 [64]."""
    packed = PackedWeight(
        words=words[None, None],
        channel_scale=jnp.ones((1, 64)),
        codes=codes,
        groups=1,
        zeros="none",
        paired=False,
    )
    less = quant_operands.CODE_OFFSET if codes == "uint4" else 0
    if offsets is not None:
        pairs = lax.bitcast_convert_type(offsets, jnp.bfloat16)  # [64, 2], of both 16 + zero
        less = pairs[:, :1].astype(jnp.float32) - 16
    return unpack_weight(packed).codes.astype(jnp.float32).T - less


# In place of what threads do in PTX.


def matrix(words, offsets, *, codes: str, part: int, parts: int) -> jax.Array:
    own = slice(part * 128 // parts, (part + 1) * 128 // parts)
    return packed_codes(words, codes, offsets)[:, own].astype(jnp.bfloat16)


def code_bytes(words: jax.Array) -> jax.Array:
    """[64, 128] int8; codes of e4m3 are bits, too."""
    return packed_codes(words, "int8", None).astype(jnp.int8)


def split_pairs(y: jax.Array) -> tuple[jax.Array, ...]:
    """[64, N] as [32, N] twice: 8 rows of gate, 8 of up by turns."""
    pairs = y.reshape(4, 2, 8, -1)
    return tuple(pairs[:, half].reshape(32, -1) for half in range(2))


def store_transposed(ref, y: jax.Array) -> None:
    ref[...] = y.T


def store_planes(ref, x: jax.Array) -> None:
    """``x`` [n] into ``ref`` [4, n / 4]."""
    ref[...] = x.reshape(-1, 4, 2).swapaxes(0, 1).reshape(4, -1)


def load_planes(ref) -> jax.Array:
    return ref[...]
