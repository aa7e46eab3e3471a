"""Products of 8 bits on both sides: against float64, row by row, and what they are made of."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels import api

K, OUT = 192, 40
TYPES = {"int8": (np.int8, 127.0), "fp8": (ml_dtypes.float8_e4m3fn, 448.0)}


def rounded(x: np.ndarray, kind: str, axis: int, bias: float = 0.0) -> np.ndarray:
    """The numbers, in float64, that the codes of x stand for; scales are shared along ``axis``.

    ``bias``: the share of itself by which a quotient is larger before it is rounded.
    """
    dtype, largest = TYPES[kind]
    scale = np.maximum(np.abs(x).max(axis=axis, keepdims=True), 1e-30).astype(np.float64) / largest
    codes = np.clip(x / scale * (1 + bias), -largest, largest)
    codes = np.round(codes) if kind == "int8" else codes
    return codes.astype(dtype).astype(np.float64) * scale


def half_steps(x: np.ndarray, kind: str, axis: int) -> np.ndarray:
    """How far a number may be from its code's.

    There are 127 steps to the largest. e4m3 has 3 bits of mantissa, so that half a step is a 16th
    of a number; below 2^-6 numbers are 2^-9 apart.
    """
    largest = np.abs(x).max(axis=axis, keepdims=True).astype(np.float64)
    if kind == "int8":
        return np.broadcast_to(largest / 254, x.shape)
    return np.maximum(np.abs(x) / 16, largest / 448 * 2**-10)


def rows_of(count: int, dtype: str) -> jax.Array:
    """Rows of very different size, one of zeros, one with a number far from the others."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((count, K)) * 10 ** rng.uniform(-3, 2, (count, 1))
    x[1 % count] = 0
    x[2 % count, 7] *= 100
    return jnp.asarray(x, dtype)


def matrix() -> np.ndarray:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((K, OUT)) * 10 ** rng.uniform(-3, 1, OUT)
    w[:, 3] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_product(kind: str, dtype: str) -> None:
    x, w = rows_of(33, dtype), matrix()
    weight = api.w8a8_weight(jnp.asarray(w), kind=kind)
    assert (weight.shape, weight.codes.shape) == ((K, OUT), (OUT, K))
    got = np.asarray(jax.jit(api.product)(x[None], weight)[0], np.float64)
    x64 = np.asarray(x, np.float64)
    exact, inputs = x64 @ w.astype(np.float64), rounded(x64, kind, axis=1)
    outputs = rounded(w, kind, axis=0)
    wanted, size = inputs @ outputs, np.abs(inputs) @ np.abs(outputs)
    # Sums of int8 are exact and then scaled; of fp8 they are float32, or rounded to bfloat16.
    allowed = 2**-8 if (kind, dtype) == ("fp8", "bfloat16") else 2e-6
    # Quotients that lie between two codes, as many of bfloat16 do, may go to either.
    apart = rounded(x64, kind, axis=1, bias=1e-6) - rounded(x64, kind, axis=1, bias=-1e-6)
    ties = np.abs(apart) @ np.abs(outputs)
    assert (np.abs(got - wanted) <= allowed * size + ties).all()
    assert (ties == 0).mean() > 0.5
    rows, columns = half_steps(x64, kind, axis=1), half_steps(w, kind, axis=0)
    near = rows @ np.abs(w) + np.abs(x64) @ columns + rows @ columns
    assert (np.abs(got - exact) <= near * (1 + 1e-5) + allowed * size).all()
    assert (got[1] == 0).all() and (got[:, 3] == 0).all()
    assert api.product(x[None, :0], weight).shape == (1, 0, OUT)


@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_a_row_does_not_depend_on_others(kind: str) -> None:
    x, weight = rows_of(8, "float32"), api.w8a8_weight(jnp.asarray(matrix()), kind=kind)
    product, changed = jax.jit(api.product), np.array(x)
    changed[5] *= 1e3
    changed[6] = np.nan
    before, after = (np.asarray(product(rows, weight)) for rows in (x, changed))
    assert_array_equal(after[:5], before[:5])
    assert_array_equal(after[7], before[7])
    assert np.isnan(after[6]).all() and not np.allclose(after[5], before[5])


@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_codes_of_the_kind_are_taken(kind: str) -> None:
    """As they are, packed or not; what is rounded otherwise becomes the nearest of its numbers."""
    rng = np.random.default_rng(2)
    numbers = jnp.asarray(rng.standard_normal((256, 128)), jnp.float32)
    weight = api.quantize_weight(numbers, kind=kind)
    # A channel without its largest code would get another scale if it were rounded again.
    weight = weight._replace(codes=weight.codes.at[:, 0].set(jnp.ones((), weight.codes.dtype)))
    for paired in (False, True):
        for form in (weight, api.pack_weight(weight, paired=paired)):
            assert api.has_w8a8_codes(form, kind)
            got = api.w8a8_weight(form, kind=kind)
            codes, wanted = (np.asarray(x).astype(np.float32) for x in (got.codes, weight.codes))
            assert_array_equal(codes, wanted.T)
            assert_array_equal(got.scale, np.asarray(weight.scale)[0])
    dequantize = jax.jit(api.dequantize_weight)
    others = [api.quantize_weight(numbers, kind=other) for other in api.WEIGHT_KINDS]
    others = [x for x in others if x.codes.dtype != weight.codes.dtype]
    for form in (numbers, *others, *map(api.pack_weight, others)):
        assert not api.has_w8a8_codes(form, kind)
        got = api.w8a8_weight(form, kind=kind)
        if isinstance(form, api.PackedWeight):
            form = api.unpack_weight(form)
        plain = np.asarray(form if form is numbers else dequantize(form))
        codes = np.asarray(got.codes).T.astype(np.float64) * np.asarray(got.scale)
        assert (np.abs(codes - plain) <= half_steps(plain, kind, axis=0) * (1 + 1e-5)).all()


def test_a_layer_takes_them() -> None:
    """Rows are rounded after the norm; gate, bias and residual are outside of the product."""
    rng = np.random.default_rng(3)
    x = rows_of(5, "float32")
    weight = api.w8a8_weight(jnp.asarray(matrix()), kind="int8")
    norm, bias = (jnp.asarray(rng.standard_normal(n), jnp.float32) for n in (K, OUT))
    residual = jnp.asarray(rng.standard_normal((5, OUT // 2)), jnp.float32)
    got, sums = api.fused_linear(
        x,
        weight,
        **{"bias": bias, "norm_scale": norm, "epsilon": 1e-5, "gated": True, "residual": residual},
        backend="mosaic",  # it has no kernel: XLA multiplies
    )
    normed = x * jax.lax.rsqrt((x**2).mean(axis=1, keepdims=True) + 1e-5) * norm[None]
    gate, up = jnp.split(api.product(normed, weight) + bias[None], 2, axis=1)
    assert sums is None
    # A row that is normed elsewhere by another rounding may move a code by one.
    assert_allclose(got, residual + jax.nn.silu(gate) * up, rtol=0.02, atol=0.02)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kind='int4' is unknown; known: int8, fp8"):
        api.w8a8_weight(jnp.ones((64, 4)), kind="int4")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        api.w8a8_weight(jnp.ones((64, 4)), kind="int8", backend="cuda")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        api.product(jnp.ones((1, 64)), jnp.ones((64, 4)), backend="cuda")
    packed = api.pack_weight(api.quantize_weight(jnp.ones((128, 64)), kind="int8"))
    with pytest.raises(ValueError, match="kind='int4' is unknown; known: int8, fp8"):
        api.w8a8_weight(packed, kind="int4")
    weight = api.w8a8_weight(jnp.ones((64, 4)), kind="int8")
    for call in (api.product, api.fused_linear):
        with pytest.raises(
            ValueError, match=r"kernel.codes has shape \(4, 64\), expected \[any, 8"
        ):
            call(jnp.ones((2, 8)), weight)
