"""Products of packed weights with many rows, under the interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from packed_cases import KINDS, normal, numbers, packed_codes, random_weight

from pallas_kernels.hopper import quant_operands, quant_rows
from pallas_kernels.hopper.quant_rows import Config, packed_rows
from pallas_kernels.packed import pack_weight


@pytest.fixture(autouse=True)
def plain_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What threads do to codes and sums in PTX the interpreter cannot run."""

    def matrix(words, *, codes, part, parts):
        # Of each 32 inputs from (t, s, b, e) to (s, b, t, e), as packed.py has it for an operand.
        y = packed_codes(words, codes).reshape(64, 4, 4, 2, 2, 2).transpose(0, 1, 3, 4, 2, 5)
        own = slice(part * 128 // parts, (part + 1) * 128 // parts)
        return y.reshape(64, 128)[:, own].astype(jnp.bfloat16)

    def add_product(acc, a, b, meanwhile):
        total = acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # a kernel lets its warps meet before a copy into what they read
        return total

    def store_transposed(ref, y):
        ref[...] = y.T

    if jax.default_backend() == "cpu":
        monkeypatch.setattr(quant_operands, "matrix", matrix)
        monkeypatch.setattr(quant_operands, "store_transposed", store_transposed)
        monkeypatch.setattr(quant_rows, "add_product", add_product)


def config(warpgroups=1, splits=1, stages=2, blocks=1) -> Config:
    return Config(warpgroups=warpgroups, splits=splits, stages=stages, blocks=blocks)


def check(kind: str, rows: int, K: int = 256, out: int = 128, how: Config | None = None) -> None:
    x, weight = normal(0, rows, K), random_weight(kind, K, out)
    got = packed_rows(x, pack_weight(weight), dtype=jnp.float32, config=how)
    assert got.shape == (rows, out) and got.dtype == jnp.float32
    wanted = np.asarray(x, np.float64) @ numbers(weight)
    # Sums in float32 of products that are exact; the zero points' part is a difference of two.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str) -> None:
    check(kind, 9)


@pytest.mark.parametrize("rows", [16, 40, 128, 130])
def test_tiles_of_rows(rows: int) -> None:
    check("int4, group 64", rows)


@pytest.mark.parametrize(
    "how",
    [
        config(warpgroups=2, stages=3),
        config(splits=2, blocks=2),
        config(warpgroups=2, splits=4),
        config(warpgroups=4, stages=2),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int4, group 32, zeros in bytes"])
def test_configurations(kind: str, how: Config) -> None:
    check(kind, 10, 1024, 256, how)
