"""Quantised matrices: their products against float64, how near they are, what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from pallas_kernels import api
from pallas_kernels.api import Weight

K, OUT = 192, 40


def matrix(seed: int = 0) -> np.ndarray:
    """Channels of very different size, one of zeros, one of one sign."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((K, OUT)) * 10 ** rng.uniform(-3, 1, OUT)
    w[:, 3] = 0
    w[:, 5] = np.abs(w[:, 5])
    return w.astype(np.float32)


def numbers(weight: Weight) -> np.ndarray:
    """What a weight stands for, in float64, by its definition."""
    codes, scale = (np.asarray(x).astype(np.float64) for x in (weight.codes, weight.scale))
    each = K // len(scale)
    zero = 0.0 if weight.zero is None else np.repeat(np.asarray(weight.zero, float), each, axis=0)
    return (codes - zero) * np.repeat(scale, each, axis=0)


@pytest.mark.parametrize("kind", api.WEIGHT_KINDS)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_product(kind, rows: int, dtype: str) -> None:
    weight = api.quantize_weight(jnp.asarray(matrix()), kind=kind)
    x = np.random.default_rng(1).standard_normal((rows, K))
    x = jnp.asarray(x, dtype)
    wanted = np.asarray(x, np.float64) @ numbers(weight)
    got = jax.jit(api.product)(x, weight)
    assert got.dtype == jnp.float32
    # float32 sums of K products. A matrix of 4 bits for many rows is rounded to x's dtype first.
    allowed = 2**-8 if (kind, dtype) == ("int4", "bfloat16") and rows > 32 else 1e-5
    size = np.abs(np.asarray(x, np.float64)) @ np.abs(numbers(weight))
    assert (np.abs(got - wanted) <= allowed * size + 1e-12).all()
    assert_allclose(api.dequantize_weight(weight), numbers(weight), rtol=3e-7, atol=0)


def test_how_near_they_are() -> None:
    w = matrix().astype(np.float64)
    eight = api.quantize_weight(jnp.asarray(w, jnp.float32), kind="int8")
    assert (np.abs(numbers(eight) - w) <= np.abs(w).max(axis=0) / 254 * (1 + 1e-6)).all()
    # e4m3 has 3 bits of mantissa; below 2^-6 of its range numbers are 2^-9 apart.
    float8 = api.quantize_weight(jnp.asarray(w, jnp.float32), kind="fp8")
    scale = np.asarray(float8.scale)
    assert (np.abs(numbers(float8) - w) <= np.maximum(np.abs(w) / 16, scale * 2**-10) * 1.001).all()
    # 4 bits: half a step of 15 between the ends of a group, and half of one of zero points.
    four = api.quantize_weight(jnp.asarray(w, jnp.float32), kind="int4", group=64)
    assert four.codes.dtype == jnp.uint4 and four.scale.shape == (3, OUT)
    groups = w.reshape(3, 64, OUT)
    step = (groups.max(1) - groups.min(1)) / 15
    error = np.abs(numbers(four).reshape(groups.shape) - groups).max(1)
    assert (error <= step * (1 / 2 + 1 / 16) * (1 + 1e-4)).all()
    # What lies on a grid of 16 numbers, as GGUF's Q4_1 does, comes back but for the zero point.
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 16, (K // 32, 32, OUT))
    codes[:, 0], codes[:, 1] = 0, 15  # both ends are there
    steps = rng.uniform(0.01, 1, (K // 32, 1, OUT))
    grid = (codes - rng.uniform(0, 15, (K // 32, 1, OUT))) * steps
    again = api.quantize_weight(jnp.asarray(grid.reshape(K, OUT), jnp.float32), kind="int4")
    error = np.abs(numbers(again).reshape(grid.shape) - grid)
    assert (error <= steps * (1 / 16 + 1e-3)).all()


@pytest.mark.parametrize("kind", api.WEIGHT_KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_a_table(kind, dtype: str) -> None:
    """Quantised as its transpose is, by columns; rows are what its definition says."""
    table = jnp.asarray(matrix().T)  # [OUT, K]
    quantised = api.quantize_weight(table, kind=kind, group=64, axis=1)
    by_columns = api.quantize_weight(table.T, kind=kind, group=64)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.T), quantised, by_columns)
    assert quantised.scale.shape == (OUT, 3 if kind == "int4" else 1)
    ids = np.array([[7, 0, 7], [OUT - 1, 3, 1]])
    got = jax.jit(api.look_up, static_argnums=2)(quantised, ids, dtype)
    assert got.dtype == dtype
    wanted = numbers(by_columns).T[ids]
    assert_allclose(got, wanted, rtol=3e-7 if dtype == "float32" else 2**-8, atol=0)
    assert_allclose(api.dequantize_weight(quantised), numbers(by_columns).T, rtol=3e-7, atol=0)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_no_other_rows_become_numbers(kind) -> None:
    """The program takes room for a few rows, not for a table."""
    table = api.quantize_weight(jnp.ones((4096, 256)), kind=kind, axis=1)
    look_up = jax.jit(lambda table, ids: api.look_up(table, ids, jnp.float32))
    memory = look_up.lower(table, jnp.arange(8)).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 8 * 256 * 4


def test_fused_linear_takes_them() -> None:
    """Norm in front, gate, residual behind: as with the matrix that they stand for."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((3, K)), jnp.float32)
    scale, residual = (
        jnp.ones(K) * 1.5,
        jnp.asarray(rng.standard_normal((3, OUT // 2)), jnp.float32),
    )
    how = {"norm_scale": scale, "epsilon": 1e-5, "residual": residual, "gated": True}
    for kind in api.WEIGHT_KINDS:
        weight = api.quantize_weight(jnp.asarray(matrix()), kind=kind)
        got, sums = api.fused_linear(x, weight, **how)
        wanted, _ = api.fused_linear(x, api.dequantize_weight(weight), backend="reference", **how)
        assert sums is None
        assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit() -> None:
    weight = api.quantize_weight(jnp.asarray(matrix()), kind="int4")
    x = jnp.ones((1, K))
    for changes, words in (
        ({"codes": weight.codes.astype(jnp.int32)}, "codes has dtype int32"),
        ({"codes": weight.codes[1:]}, r"codes has shape \(191, 40\)"),
        ({"scale": weight.scale[:, 1:]}, r"scale has shape \(6, 39\)"),
        ({"scale": jnp.ones((5, OUT))}, "5 groups, which do not divide 192"),
        ({"scale": weight.scale.astype(jnp.bfloat16)}, "scale has dtype bfloat16"),
        ({"zero": weight.zero[1:]}, r"zero has shape \(5, 40\)"),
    ):
        with pytest.raises(ValueError, match=words):
            api.fused_linear(x, weight._replace(**changes))
    for inputs, group in ((100, 32), (96, 64), (64, 16)):
        with pytest.raises(ValueError, match=rf"{group=} must be one of .* divide the {inputs} in"):
            api.quantize_weight(jnp.ones((inputs, 4)), kind="int4", group=group)
    with pytest.raises(ValueError, match="kind='int3' is unknown"):
        api.quantize_weight(jnp.ones((64, 4)), kind="int3")
    with pytest.raises(ValueError, match=r"table.scale has shape \(6, 40\), expected \[192, any\]"):
        api.look_up(weight, jnp.array([0]), jnp.float32)
    table = api.quantize_weight(jnp.ones((128, 64)), kind="int8", axis=1)
    with pytest.raises(ValueError, match=r"scale has shape \(128, 1\)"):
        api.fused_linear(jnp.ones((1, 128)), table)
    with pytest.raises(ValueError, match=r"cannot be packed: its scales, \(128, 1\), are .* rows"):
        api.pack_weight(table)


@pytest.mark.parametrize("backend", ["reference", "mosaic"])
def test_exported_for_any_number_of_rows(backend: api.Backend) -> None:
    """Scales of groups, zero points, packed or not: the way of many rows, whatever the number."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((256, 64)), jnp.float32)
    weight = api.quantize_weight(w, kind="int4", group=64)
    wanted = np.asarray(api.dequantize_weight(weight), np.float64)
    for kernel in (weight, api.pack_weight(weight)):

        def multiply(x: jax.Array, kernel: Weight | api.PackedWeight = kernel) -> jax.Array:
            out, _ = api.fused_linear(x, kernel, backend=backend)
            return out + api.product(x, kernel, backend=backend)

        shape = jax.export.symbolic_shape("rows, 256")
        exported = jax.export.export(jax.jit(multiply))(jax.ShapeDtypeStruct(shape, jnp.float32))
        for rows in (3, 40):
            x = jnp.asarray(rng.standard_normal((rows, 256)), jnp.float32)
            # Float32 sums of 256 products of size 1, twice.
            assert_allclose(exported.call(x), 2 * np.asarray(x) @ wanted, rtol=0, atol=1e-4)
