"""The linear layer with packed weights, interpreted on a CPU, against float64.

The interpreter cannot run the products, which are PTX: plain arithmetic stands in for them, on the
same words and tiles. What it says of bits: a word as the packed order has it, so that a wrong place
of a scale, a zero point or a piece of x is seen.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from packed_cases import (
    KINDS,
    load_planes,
    normal,
    numbers,
    packed_codes,
    random_weight,
    split_pairs,
    store_planes,
)

from pallas_kernels import reference
from pallas_kernels.hopper import quant_operands
from pallas_kernels.hopper.quant_linear import packed_linear, packed_product
from pallas_kernels.hopper.quant_plan import Config
from pallas_kernels.packed import pack_weight
from pallas_kernels.types import Weight

PLAIN = {"bias": None, "norm_scale": None, "square_sums": None, "residual": None}


def rows_of(x: jax.Array) -> jax.Array:
    """[N, 128] float32 of the tile [N, 4, 32]: pairs of inputs by turns."""
    pairs = x.astype(jnp.float32).reshape(-1, 4, 16, 2)
    return pairs.swapaxes(1, 2).reshape(-1, 128)


@pytest.fixture(autouse=True)
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(words, x, offsets, *, codes, part, parts):
        own = slice(part * 128 // parts, (part + 1) * 128 // parts)
        products = packed_codes(words, codes, offsets)[:, own] @ rows_of(x)[:, own].T
        return products.astype(jnp.float32)

    def row_totals(x, *, part, parts):
        own = slice(part * 128 // parts, (part + 1) * 128 // parts)
        return rows_of(x)[:, own].sum(axis=1)

    if jax.default_backend() == "cpu":
        for stand_in in (multiply, row_totals, split_pairs, store_planes, load_planes):
            monkeypatch.setattr(quant_operands, stand_in.__name__, stand_in)
        for name in ("griddepcontrol_wait", "griddepcontrol_launch_dependents"):
            monkeypatch.setattr(plgpu, name, lambda: None)


def compare(
    x: jax.Array, weight: Weight, config: Config | None = None, *, gated: bool = False, **changes
):
    """Against unfused layers in bf16, the specification; returns out and square sums."""
    operands = PLAIN | changes
    packed = pack_weight(weight, paired=gated)
    out, sums = packed_linear(x, packed, **operands, gated=gated, epsilon=1e-5, config=config)
    wanted, _ = reference.fused_linear(x, weight, **operands, gated=gated, epsilon=1e-5)
    assert out.dtype == jnp.bfloat16 and out.shape == wanted.shape
    out, wanted = (np.asarray(y, np.float32) for y in (out, wanted))
    # One rounding to bf16 may go the other way, and a gate or residual multiplies the difference.
    np.testing.assert_allclose(out, wanted, rtol=2**-7, atol=2**-7 * np.abs(wanted).max())
    return out, sums


def config(warpgroups=1, splits=1, stages=2, blocks=1) -> Config:
    return Config(warpgroups=warpgroups, splits=splits, stages=stages, blocks=blocks)


def check_product(kind: str, rows: int) -> None:
    x, weight = normal(0, rows, 256), random_weight(kind, 256, 128)
    got = packed_product(x, pack_weight(weight), config=config(warpgroups=2))
    wanted = np.asarray(x, np.float64) @ numbers(weight)
    # Sums in float32 of products that are exact; the zero points' part is a difference of two.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_product_of_every_kind(kind: str) -> None:
    check_product(kind, 3)


@pytest.mark.parametrize(
    "how",
    [
        config(warpgroups=2, stages=4),
        config(splits=2, blocks=2),
        config(warpgroups=2, splits=4),
        config(stages=1, blocks=4),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int4, group 64"])
def test_configurations(kind: str, how: Config) -> None:
    compare(normal(0, 2, 512), random_weight(kind, 512, 256), how)


# Finished by the first kernel, and by that which adds splits.
@pytest.mark.parametrize(("rows", "warpgroups", "splits"), [(1, 2, 1), (7, 2, 2), (8, 1, 1)])
def test_with_everything(rows: int, warpgroups: int, splits: int) -> None:
    """Two layers, the second with a norm of what the first one made."""
    how = config(warpgroups=warpgroups, splits=splits)
    residual = normal(2, rows, 256)
    x, sums = compare(normal(0, rows, 256), random_weight("fp8", 256, 256), how, residual=residual)
    counted = np.asarray(sums)[: 256 // 64, :rows].sum(axis=0)
    np.testing.assert_allclose(counted, (x.astype(np.float64) ** 2).sum(axis=1), rtol=1e-6)

    # Never written, and columns that stand for no row.
    sums = sums.at[256 // 64 :].set(jnp.nan).at[:, rows:].set(jnp.nan)
    x = jnp.asarray(x, jnp.bfloat16)
    norm = {"norm_scale": normal(3, 256), "square_sums": sums}
    weight = random_weight("int4, group 32", 256, 128)
    compare(x, weight, how, bias=normal(5, 128), **norm)
    compare(x, weight, how, gated=True, **norm)
    compare(x, weight, how, gated=True, bias=normal(5, 128), **norm)


def test_norm_of_what_no_layer_made() -> None:
    compare(normal(0, 2, 128), random_weight("int8", 128, 64), norm_scale=normal(2, 128))


def test_rows_do_not_mix(spoiled: int = 1) -> None:
    """A row of NaN stays alone, in the product, in the zero points' sums and in the norm."""
    x, weight = normal(0, 3, 256), pack_weight(random_weight("int4, group 128", 256, 64))
    arguments = (None, normal(2, 256), None, normal(3, 3, 64))
    clean, _ = packed_linear(x, weight, *arguments, gated=False, epsilon=1e-5)
    x = x.at[spoiled].set(jnp.nan)
    out, _ = packed_linear(x, weight, *arguments, gated=False, epsilon=1e-5)
    assert np.isnan(np.asarray(out[spoiled], np.float32)).all()
    np.testing.assert_array_equal(*(np.delete(y, spoiled, axis=0) for y in (out, clean)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "x must be bfloat16, got float32"),
        ({"gated": True}, "a gated layer needs weights packed with paired=True"),
        ({"rows": 9}, "at most 8 rows, got 9"),
    ],
)
def test_refuses_by_name(changes, reason: str) -> None:
    how = {"dtype": jnp.bfloat16, "gated": False, "rows": 1} | changes
    x = normal(0, how["rows"], 128).astype(how["dtype"])
    packed = pack_weight(random_weight("int8", 128, 64))
    with pytest.raises(NotImplementedError, match=reason):
        packed_linear(x, packed, **PLAIN, gated=how["gated"], epsilon=1e-5)
