"""Rotary position embedding: angles for positions, in every scaling Llama-family models use.

Trigonometry and frequencies are float32 whatever the model's dtype. The rotation itself
(``apply_rotary``) is an op of ``pallas_kernels``, because the decode kernel fuses it.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lserve_jax.model.config import ModelConfig, RopeConfig


def _llama3_frequencies(rope: RopeConfig, inv_freq: np.ndarray, original: int) -> np.ndarray:
    """Llama 3.1: long wavelengths are stretched by ``factor``, short ones kept, blended between."""
    turns = original * inv_freq / (2 * math.pi)  # rotations within the original context
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * inv_freq + (1.0 - keep) * inv_freq / rope.factor


def _yarn_frequencies(rope: RopeConfig, inv_freq: np.ndarray, original: int) -> np.ndarray:
    """YaRN (arXiv 2309.00071, section 3.2): interpolate slow dimensions, keep fast ones."""
    D = 2 * len(inv_freq)

    def dimension_of(rotations: float) -> float:
        return D * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    ramp = np.clip((np.arange(D // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return ramp * inv_freq / rope.factor + (1.0 - ramp) * inv_freq


def _yarn_magnitude(rope: RopeConfig) -> float:
    """Factor on cos and sin by which YaRN sharpens attention (section 3.4)."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _longrope_magnitude(rope: RopeConfig, original: int) -> float:
    """Factor on cos and sin (LongRoPE, arXiv 2402.13753, section 3.2)."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(original))


def rotary_angles(
    config: ModelConfig, positions: Int[Array, "B T"], lengths: Int[Array, " B *T"]
) -> tuple[Float[Array, "B T D/2"], Float[Array, "B T D/2"]]:
    """Cosines and sines (float32) for absolute ``positions``.

    ``lengths`` is the whole length of each row's sequence, prompt included, or ``[B, T]``, that of
    each token's where rows hold several. Dynamic NTK uses it: its base
    grows once a sequence is longer than the model's original context. So does LongRoPE, to choose
    between its two sets of frequencies. Taking it from the sequence and not from the call keeps
    results independent of chunking and neighbours.
    """
    rope, D = config.rope, config.head_dim
    lengths = lengths.reshape(lengths.shape[0], -1, 1)  # [B, 1 or T, 1]
    original = rope.original_max_position_embeddings or config.max_position_embeddings
    exponents = np.arange(0, D, 2) / D
    magnitude = 1.0
    if rope.rope_type == "dynamic":
        stretch = jnp.maximum(lengths, original).astype(jnp.float32) / original
        base = rope.rope_theta * (rope.factor * stretch - (rope.factor - 1)) ** (D / (D - 2))
        inv_freq = base ** jnp.asarray(-exponents, jnp.float32)[None, None]  # [B, 1 or T, D/2]
    elif rope.rope_type == "longrope":
        short, long = (
            jnp.asarray(rope.rope_theta**-exponents / np.array(factors), jnp.float32)
            for factors in (rope.short_factor, rope.long_factor)
        )
        inv_freq = jnp.where(lengths > original, long[None, None], short[None, None])
        magnitude = _longrope_magnitude(rope, original)
    else:
        frequencies = rope.rope_theta**-exponents
        if rope.rope_type == "linear":
            frequencies = frequencies / rope.factor
        elif rope.rope_type == "llama3":
            frequencies = _llama3_frequencies(rope, frequencies, original)
        elif rope.rope_type == "yarn":
            frequencies = _yarn_frequencies(rope, frequencies, original)
            magnitude = _yarn_magnitude(rope)
        inv_freq = jnp.asarray(frequencies, jnp.float32)[None, None]  # [1, 1, D/2]
    angles = positions.astype(jnp.float32)[:, :, None] * inv_freq  # [B, T, D/2]
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def layer_angles(
    config: ModelConfig, layer: int, cos: Float[Array, "..."], sin: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What ``layer`` rotates by: the angles given, or none in a layer without rotary embedding."""
    if layer in config.nope_layers:
        return jnp.ones_like(cos), jnp.zeros_like(sin)
    return cos, sin
