"""The fused linear layer, interpreted on a CPU, against its reference in bf16.

Both round to bf16 at the same places; sums of products run in another order in float32, which may
move a rounding. So results may differ by a unit in the last place of bf16: 2^-8 of the value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from pallas_kernels import api, reference
from pallas_kernels.hopper.fused_linear import choose_config, fused_linear

PLAIN = {"bias": None, "norm_scale": None, "square_sums": None, "residual": None}


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def both(x, kernel, *, gated=False, **changes):
    operands = PLAIN | changes
    out, sums = fused_linear(x, kernel, gated=gated, epsilon=1e-5, **operands)
    expected, _ = reference.fused_linear(x, kernel, gated=gated, epsilon=1e-5, **operands)
    assert out.dtype == expected.dtype == jnp.bfloat16
    out, expected = (np.asarray(y, np.float32) for y in (out, expected))
    # A residual or a gate multiplies a difference of the product: its size bounds what is left.
    assert_allclose(out, expected, rtol=2**-7, atol=2**-7 * np.abs(expected).max())
    # On the whole nearly all of it is equal to the bit. SiLU: the kernel's is not rounded between.
    assert gated or np.mean(out == expected) > 0.9
    return out, sums


@pytest.mark.parametrize(("rows", "K", "width"), [(1, 256, 192), (3, 320, 64), (9, 64, 128)])
def test_plain(rows: int, K: int, width: int) -> None:
    both(normal(0, rows, K), normal(1, K, width) / 16)


@pytest.mark.parametrize("rows", [1, 4])
def test_with_everything(rows: int) -> None:
    """Two layers, the second with a norm of what the first one made."""
    residual = normal(2, rows, 192)
    x, sums = both(normal(0, rows, 256), normal(1, 256, 192) / 16, residual=residual)
    counted = np.asarray(sums)[: 192 // 64, :rows].sum(axis=0)
    assert_allclose(counted, (x.astype(np.float64) ** 2).sum(axis=1), rtol=1e-6)

    x, sums = jnp.asarray(x, jnp.bfloat16), sums.at[192 // 64 :].set(jnp.nan)  # never written
    norm = {"norm_scale": normal(3, 192), "square_sums": sums}
    both(x, normal(4, 192, 128) / 16, bias=normal(5, 128), **norm)
    both(x, normal(4, 192, 256) / 16, gated=True, **norm)


def test_norm_of_what_no_layer_made() -> None:
    both(normal(0, 2, 128), normal(1, 128, 64) / 16, norm_scale=normal(2, 128))


def test_rows_do_not_mix() -> None:
    """A row of NaN stays alone, in the product and in the norm."""
    x, kernel, scale = normal(0, 3, 128), normal(1, 128, 64) / 16, normal(2, 128)
    arguments = (None, scale, None, normal(3, 3, 64))
    clean, _ = fused_linear(x, kernel, *arguments, gated=False, epsilon=1e-5)
    spoiled = x.at[1].set(jnp.nan)
    out, _ = fused_linear(spoiled, kernel, *arguments, gated=False, epsilon=1e-5)
    assert np.isnan(np.asarray(out[1], np.float32)).all()
    np.testing.assert_array_equal(out[::2], clean[::2])


def test_choice_of_config() -> None:
    assert choose_config(1, 4096, 96, False).tile == 256
    assert choose_config(1, 4096, 224, True).tile == 128
    assert choose_config(1, 576, 9, False).tile == 192
    for rows in (1, 4, 16):  # it fits the 227 KB of an SM
        config = choose_config(rows, 14336, 64, False)
        assert config.stages * config.tile * 2 * (64 + rows) <= 200 << 10
        assert config.stages >= 2


@pytest.mark.parametrize(
    ("rows", "K", "width", "gated", "reason"),
    [
        (17, 64, 64, False, "at most 16 rows, got 17"),
        (1, 96, 64, False, "multiples of 64 and 64, got \\(96, 64\\)"),
        (1, 64, 64, True, "multiples of 64 and 128, got \\(64, 64\\)"),
    ],
)
def test_refuses_by_name(rows: int, K: int, width: int, gated: bool, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        fused_linear(normal(0, rows, K), normal(1, K, width), **PLAIN, gated=gated, epsilon=1e-5)


def test_refuses_float32() -> None:
    x = jnp.zeros((1, 64), jnp.float32)
    with pytest.raises(NotImplementedError, match="x must be bfloat16, got float32"):
        fused_linear(x, normal(1, 64, 64), **PLAIN, gated=False, epsilon=1e-5)


@pytest.mark.parametrize("rows", [api.MOST_LINEAR_ROWS, api.MOST_LINEAR_ROWS + 1])
def test_op_leaves_many_rows_to_xla(rows: int) -> None:
    """Whatever the backend; only the kernel makes sums for the next norm."""
    x, kernel, residual = normal(0, rows, 64), normal(1, 64, 64) / 8, normal(2, rows, 64)
    out, sums = api.fused_linear(x, kernel, residual=residual, backend="mosaic")
    assert (sums is None) == (rows > api.MOST_LINEAR_ROWS)
    expected, _ = api.fused_linear(x, kernel, residual=residual, backend="reference")
    assert_allclose(np.asarray(out, np.float32), np.asarray(expected, np.float32), rtol=2**-6)


def test_op_refuses_an_unknown_backend_for_any_number_of_rows() -> None:
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        api.fused_linear(normal(0, 32, 64), normal(1, 64, 64), backend="cuda")
