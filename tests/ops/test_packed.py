"""Packed matrices: the way back gives every bit again, and what does not pack is said."""

import jax.numpy as jnp
import numpy as np
import pytest
from packed_cases import KINDS, numbers, random_weight

from lserve_jax.model.quantise import pack_params
from pallas_kernels import api
from pallas_kernels.packed import group_size


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_comes_back(kind: str, paired: bool) -> None:
    weight = random_weight(kind, 384, 192)
    packed = api.pack_weight(weight, paired=paired)
    assert packed.shape == weight.shape and packed.paired == paired
    _, group, zeros = KINDS[kind]
    assert (group_size(packed), packed.zeros) == (group, zeros or "none")
    for got, wanted in zip(api.unpack_weight(packed), weight, strict=True):
        if wanted is None:
            assert got is None
        else:
            assert got.dtype == wanted.dtype
            as_bytes = (np.asarray(x).view(np.uint8) for x in (got, wanted))
            np.testing.assert_array_equal(*as_bytes)


def test_groups_of_several_blocks() -> None:
    """Their scales are repeated, block by block."""
    weight = random_weight("int4, group 128", 512, 64)
    weight = weight._replace(scale=weight.scale[::2], zero=weight.zero[::2])
    again = api.unpack_weight(api.pack_weight(weight))
    for got, wanted in zip(again, weight, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_zero_points_that_no_byte_holds() -> None:
    """Or that are to have words of their own, so that all numbers are packed alike."""
    weight = random_weight("int4, group 32, zeros in bytes", 128, 64)
    assert api.pack_weight(weight).zeros == "byte"
    assert api.pack_weight(weight, in_words=True).zeros == "word"
    assert weight.zero is not None
    largest = weight._replace(zero=weight.zero.at[1, 7].set(16.0))
    assert api.pack_weight(largest).zeros == "byte"
    for other in (-0.0, -0.125, 0.0625, 16.125, 1e-40, jnp.nan):
        changed = weight._replace(zero=weight.zero.at[1, 7].set(other))
        packed = api.pack_weight(changed)
        assert packed.zeros == "word"
        for got, wanted in zip(api.unpack_weight(packed), changed, strict=True):
            as_bytes = (np.asarray(x).view(np.uint8) for x in (got, wanted))
            np.testing.assert_array_equal(*as_bytes)


def test_codes_that_are_nan_are_refused() -> None:
    """A kernel would take them for numbers."""
    weight = random_weight("fp8", 128, 64)
    weight = weight._replace(codes=weight.codes.at[3, 5].set(jnp.nan))
    with pytest.raises(ValueError, match="cannot be packed: codes of e4m3 are NaN"):
        api.pack_weight(weight)
    params = {"layers": [{"mlp": {"down_proj": {"kernel": weight}}}]}
    with pytest.raises(ValueError, match=r"^mlp\.down_proj\.kernel: the matrix cannot be packed"):
        pack_params(params["layers"][0], set())


def test_rounded_ones_fit_into_bytes() -> None:
    """Also of groups that have one sign, or a number once or everywhere; and they are near."""
    w = np.random.default_rng(0).standard_normal((192, 64, 64)).astype(np.float32)
    w[:2], w[2:4], w[4:6], w[6:8], w[8:10] = abs(w[:2]) + 2, -abs(w[2:4]) - 2, 0, -0.3, 1e-30
    w[10, 1:], w[11] = 0, 1e-37
    for group in api.WEIGHT_GROUPS:
        weight = api.quantize_weight(w.reshape(-1, 64), kind="int4", group=group)
        assert api.pack_weight(weight).zeros == "byte"
        groups = w.reshape(-1, group, 64)
        step = (groups.max(1).clip(min=0) - groups.min(1).clip(max=0)) / 15
        error = np.abs(numbers(weight).reshape(groups.shape) - groups).max(1)
        # Half a step, half of one of zero points, and scales have 24 bits. No step is below 1e-30.
        assert (error <= np.maximum(step, 1e-30) * (9 / 16 + 1e-3)).all()


@pytest.mark.parametrize(
    ("sizes", "kind", "reason"),
    [
        ((192, 64), "int8", "K=192 and out=64 must be multiples of 128 and 64, and not 0"),
        ((128, 96), "int8", "K=128 and out=96 must be multiples of 128 and 64, and not 0"),
        ((128, 64), "int4", "codes of 4 bits need zero points"),
        ((128, 64), "int8 in groups of 16", "groups of 16 inputs must be multiples of 32"),
    ],
)
def test_what_does_not_pack(sizes: tuple[int, int], kind: str, reason: str) -> None:
    weight = api.quantize_weight(jnp.ones(sizes), kind="int4" if kind == "int4" else "int8")
    if kind == "int4":
        weight = weight._replace(zero=None)
    if "groups" in kind:
        weight = weight._replace(scale=jnp.ones((8, 64)))
    assert api.cannot_pack(weight) == reason
    with pytest.raises(ValueError, match=f"the matrix cannot be packed: {reason}"):
        api.pack_weight(weight)


@pytest.mark.parametrize("sizes", [(0, 64), (128, 0)])
def test_an_empty_matrix_does_not_pack(sizes: tuple[int, int]) -> None:
    weight = api.Weight(jnp.zeros(sizes, jnp.int8), jnp.ones((1, sizes[1])))
    with pytest.raises(ValueError, match=r"K=\d+ and out=\d+ must be multiples .* and not 0"):
        api.pack_weight(weight)
