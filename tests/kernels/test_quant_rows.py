"""Products of packed weights with more than a few rows, interpreted on a CPU, against float64.

Plain arithmetic stands in for what threads do in PTX, and for products from registers, as in
``test_quant_linear.py``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from packed_cases import (
    KINDS,
    matrix,
    normal,
    numbers,
    random_weight,
    split_pairs,
    store_transposed,
)

from pallas_kernels import api, linear_ops, reference
from pallas_kernels.hopper import quant_operands
from pallas_kernels.hopper.quant_rows import Config, packed_rows, packed_rows_linear
from pallas_kernels.packed import pack_weight


@pytest.fixture(autouse=True)
def plain_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    """What threads do to codes and sums in PTX the interpreter cannot run."""

    if jax.default_backend() == "cpu":
        for stand_in in (matrix, split_pairs, store_transposed):
            monkeypatch.setattr(quant_operands, stand_in.__name__, stand_in)
        for name in ("griddepcontrol_wait", "griddepcontrol_launch_dependents"):
            monkeypatch.setattr(plgpu, name, lambda: None)


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
@pytest.mark.parametrize("kind", ["int4, group 64", "int4, group 128"])
def test_tiles_of_rows(kind: str, rows: int) -> None:
    check(kind, rows)


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


@pytest.mark.parametrize(("gated", "biased"), [(False, True), (True, True), (True, False)], ids=str)
def test_a_layer_is_the_reference_around_the_product(gated: bool, biased: bool) -> None:
    """A gate is in the kernel where there is no bias."""
    x, weight = normal(0, 12, 256), random_weight("int4, group 128", 256, 256)
    bias = normal(5, 256) if biased else None
    around = bias, normal(3, 256), None, None if gated else normal(2, 12, 256)
    how = {"gated": gated, "epsilon": 1e-5}
    out, sums = packed_rows_linear(x, pack_weight(weight, paired=gated), *around, **how)
    wanted, _ = reference.fused_linear(x, weight, *around, **how)
    assert sums is None and out.dtype == jnp.bfloat16 and out.shape == wanted.shape
    out, wanted = (np.asarray(y, np.float32) for y in (out, wanted))
    # A sum in another order may round to bf16 the other way; gate and residual multiply that.
    np.testing.assert_allclose(out, wanted, rtol=2**-7, atol=2**-7 * np.abs(wanted).max())
    # XLA rounds within SiLU, too; the kernel does not.
    assert (gated and not biased) or np.mean(out == wanted) > 0.9


@pytest.mark.parametrize("rows", [12, 40, 130])
@pytest.mark.parametrize("kind", ["int8", "int4, group 128, zeros in bytes"])
def test_a_gate_in_the_kernel(kind: str, rows: int) -> None:
    """Tiles of rows, one cut short; several blocks a CTA."""
    x, weight = normal(0, rows, 256), random_weight(kind, 256, 512)
    packed = pack_weight(weight, paired=True)
    how = config(warpgroups=2)
    got = packed_rows(x, packed, dtype=jnp.bfloat16, gated=True, config=how)
    gate, up = np.split(np.asarray(x, np.float64) @ numbers(weight), 2, axis=1)
    wanted = gate / (1 + np.exp(-gate)) * up
    # Gate and up are rounded to bf16, by 2^-9, and what they make, too; SiLU of a gate of -4 makes
    # five times as much of that.
    np.testing.assert_allclose(got.astype(jnp.float32), wanted, rtol=2**-5, atol=1e-4)


@pytest.mark.parametrize(("paired", "splits"), [(False, 1), (True, 2)])
def test_a_gate_that_no_thread_has_is_refused(paired: bool, splits: int) -> None:
    packed = pack_weight(random_weight("int8", 256, 128), paired=paired)
    with pytest.raises(ValueError, match=rf"no gate with packed.paired={paired} and splits="):
        how = config(splits=splits)
        packed_rows(normal(0, 9, 256), packed, dtype=jnp.bfloat16, gated=True, config=how)


@pytest.mark.parametrize(("rows", "spoiled"), [(9, 1), (130, 129)])
def test_rows_do_not_mix(rows: int, spoiled: int) -> None:
    """A row of NaN stays alone, in the product and in the zero points' sums."""
    x, weight = normal(0, rows, 256), pack_weight(random_weight("int4, group 128", 256, 64))
    clean = packed_rows(x, weight, dtype=jnp.float32)
    out = packed_rows(x.at[spoiled].set(jnp.nan), weight, dtype=jnp.float32)
    assert np.isnan(np.asarray(out[spoiled])).all()
    np.testing.assert_array_equal(*(np.delete(y, spoiled, axis=0) for y in (out, clean)))


def test_a_row_is_the_same_in_any_tile() -> None:
    """So that a request's numbers do not depend on the slot that it has."""
    weight = pack_weight(random_weight("int4, group 64", 256, 128))
    out = packed_rows(jnp.tile(normal(0, 1, 256), (256, 1)), weight, dtype=jnp.float32)
    np.testing.assert_array_equal(out, np.tile(out[:1], (256, 1)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": jnp.float32}, "x must be bfloat16, got float32"),
        ({"gated": True}, "a gated layer needs weights packed with paired=True"),
    ],
)
def test_refuses_by_name(changes, reason: str) -> None:
    how = {"dtype": jnp.bfloat16, "gated": False} | changes
    x = normal(0, 16, 128).astype(how["dtype"])
    packed, around = pack_weight(random_weight("int8", 128, 64)), (None,) * 4
    with pytest.raises(NotImplementedError, match=reason):
        packed_rows_linear(x, packed, *around, gated=how["gated"], epsilon=1e-5)


def test_a_norm_in_float32() -> None:
    """Its scale is: what it makes is rounded once more, as with a few rows."""
    x, packed = normal(0, 9, 128), pack_weight(random_weight("int8", 128, 64))
    how = {"gated": False, "epsilon": 1e-5}
    scales = (jnp.full((128,), 1.5, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    with jax.numpy_dtype_promotion("standard"):  # JAX's default
        out, wanted = (
            packed_rows_linear(x, packed, None, scale, None, None, **how)[0] for scale in scales
        )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, wanted)


FEW, MOST = api.MOST_FUSED_PACKED_ROWS, api.MOST_PACKED_ROWS


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (FEW, ["packed_linear", "packed_product"]),
        (FEW + 1, ["packed_rows_linear", "packed_rows_product"]),
        (MOST, ["packed_rows_linear", "packed_rows_product"]),
        (MOST + 1, ["packed_numbers", "fused_linear", "packed_numbers"]),
    ],
)
def test_ops_choose_by_rows(rows: int, wanted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rows than kernels multiply a matrix is unpacked; so it is without kernels."""
    chosen, choose = [], linear_ops.implementation

    def implementation(name: str, backend: api.Backend) -> Callable:
        chosen.append((name, backend))
        return choose(name, "reference" if name == "fused_linear" else backend)

    monkeypatch.setattr(linear_ops, "implementation", implementation)
    x, weight = normal(0, rows, 128), random_weight("int8", 128, 64)
    packed = pack_weight(weight)
    for backend in ("mosaic", "reference"):
        jax.eval_shape(lambda x: api.fused_linear(x, packed, backend=backend)[0], x)  # noqa: B023
        logits = jax.eval_shape(lambda x: api.product(x[None], packed, backend=backend), x)  # noqa: B023
        assert logits.shape == (1, rows, 64) and logits.dtype == jnp.float32
        names = wanted if backend == "mosaic" else ["fused_linear"]
        assert chosen == [
            (name, "reference" if name == "fused_linear" else backend) for name in names
        ]
        chosen.clear()


def test_ops_compute(rows: int = FEW + 1) -> None:
    """With leading axes and in float32, where that is what an op gives."""
    x, weight = normal(0, rows, 128), random_weight("int8", 128, 64)
    packed = pack_weight(weight)
    logits = api.product(x[None], packed, backend="mosaic")
    wanted = np.asarray(x, np.float64) @ numbers(weight)
    assert logits.shape == (1, rows, 64) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[0], wanted, rtol=0, atol=1e-5)
    out, _ = api.fused_linear(x, packed, backend="mosaic")
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-5)


def test_no_rows() -> None:
    packed = pack_weight(random_weight("int8", 128, 64))
    assert api.product(normal(0, 0, 128), packed, backend="mosaic").shape == (0, 64)
    assert api.fused_linear(normal(0, 0, 128), packed, backend="mosaic")[0].shape == (0, 64)


def test_ops_refuse_another_size() -> None:
    packed = pack_weight(random_weight("int8", 128, 64))
    with pytest.raises(
        ValueError, match=r"kernel is packed of shape \(128, 64\), expected \[256, "
    ):
        api.fused_linear(normal(0, 1, 256), packed)
    with pytest.raises(ValueError, match=r"x has shape \(1, 256\), expected \[1, 128\]"):
        api.product(normal(0, 1, 256), packed)
