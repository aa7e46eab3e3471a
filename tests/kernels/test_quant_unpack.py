"""Packed weights in rows of a channel, by a kernel under the interpreter, against plain JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import KINDS, code_bytes, matrix, normal, numbers, random_weight

from pallas_kernels import api
from pallas_kernels.hopper import quant_operands
from pallas_kernels.hopper.quant_unpack import packed_numbers
from pallas_kernels.packed import pack_weight


@pytest.fixture(autouse=True)
def plain_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    if jax.default_backend() == "cpu":
        monkeypatch.setattr(quant_operands, "matrix", matrix)
        monkeypatch.setattr(quant_operands, "code_bytes", code_bytes)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind(kind: str, paired: bool, K: int = 1280) -> None:
    """Two stretches of five blocks of inputs, so that rings come round; gate and up apart again."""
    weight = random_weight(kind, K, 256)
    got = packed_numbers(pack_weight(weight, paired=paired))
    wanted = api.dequantize_weight(weight).astype(jnp.bfloat16).T
    assert got.shape == (256, K) and got.dtype == jnp.bfloat16
    got, wanted = (np.asarray(x, np.float32) for x in (got, wanted))
    if KINDS[kind][2] == "word":  # two differences in float32: a rounding may go the other way
        np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-6)
        assert np.mean(got == wanted) > 0.999
    else:
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_codes(kind: api.W8A8Kind, paired: bool, K: int = 1280) -> None:
    """As plain JAX takes them, bit by bit, with their scales."""
    packed = pack_weight(random_weight(kind, K, 256), paired=paired)
    got, wanted = (
        api.w8a8_weight(packed, kind=kind, backend=backend) for backend in ("mosaic", "reference")
    )
    assert got.codes.dtype == wanted.codes.dtype
    for x, y in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


def test_more_rows_than_there_are_products_for(rows: int = api.MOST_PACKED_ROWS + 1) -> None:
    x, weight = normal(0, rows, 128), random_weight("int8", 128, 64)
    packed = pack_weight(weight)
    wanted = np.asarray(x, np.float64) @ numbers(weight)
    got = api.product(x, packed, backend="mosaic")
    # Weights are rounded to bf16: by 2^-9 of products that make sums of size 1.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=0.02)
    out, _ = api.fused_linear(x, packed, backend="mosaic")
    np.testing.assert_allclose(out.astype(jnp.float32), got, rtol=2**-8, atol=1e-5)
