"""Linear layers with packed weights on a Hopper GPU, at Llama-3-8B's shapes.

    python -m pytest -m gpu tests/kernels/test_gpu_quant_linear.py

Products against float32 ones of the dequantised matrix; whole layers against unfused ones.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from packed_cases import KINDS, numbers
from packed_cases import random_weight as random_codes
from shapes.linear import LINEAR, Kind, LinearShape, random_weight
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from pallas_kernels import api, reference
from pallas_kernels.hopper.quant_linear import packed_linear
from pallas_kernels.hopper.quant_plan import Config
from pallas_kernels.hopper.quant_rows import Config as RowsConfig
from pallas_kernels.hopper.quant_rows import packed_rows
from pallas_kernels.hopper.quant_unpack import packed_numbers

pytestmark = pytest.mark.gpu

SHAPES = {shape.name: shape for shape in LINEAR}
FORMS: dict[str, tuple[Kind, int]] = {
    "int8": ("int8", 128),
    "fp8": ("fp8", 128),
    "int4, groups of 32": ("int4", 32),
    "int4, groups of 64": ("int4", 64),
    "int4, groups of 128": ("int4", 128),
}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def weight_of(shape: LinearShape, form: str, seed: int = 0) -> api.Weight:
    kind, group = FORMS[form]
    weight = random_weight(shape, kind, seed, group)
    assert isinstance(weight, api.Weight)
    return weight


@pytest.mark.parametrize("rows", [1, 11, 32, 33, 100, 300])
@pytest.mark.parametrize("form", FORMS)
def test_products(form: str, rows: int, name: str = "down") -> None:
    shape = SHAPES[name]
    x, weight = normal(1, rows, shape.K), weight_of(shape, form)
    got = jax.jit(api.product)(x, api.pack_weight(weight))
    with jax.default_matmul_precision("highest"):
        wanted = x.astype(jnp.float32) @ api.dequantize_weight(weight)
    # Both are float32 sums of up to 14,336 products, of size 1, in different orders: each addition
    # rounds by 2^-24 of the sum so far, which makes less than 1e-5 of it for 5 standard deviations.
    # With zero points a sum is the difference of two of about its size.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rows", [3, 11, 40, 100])
def test_odd_numbers_of_blocks(kind: str, rows: int) -> None:
    """A step of one block: sums of x for zero points are 64 bytes of 16 rows."""
    x, weight = normal(1, rows, 896), random_codes(kind, 896, 320)
    got = jax.jit(api.product)(x, api.pack_weight(weight))
    np.testing.assert_allclose(got, np.asarray(x, np.float64) @ numbers(weight), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("form", ["int8", "int4, groups of 128"])
def test_output_layer(form: str, rows: int) -> None:
    test_products(form, rows, "lm_head")


@pytest.mark.parametrize("rows", [1, 8, 32, 48, 64, 128])
@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down"])
@pytest.mark.parametrize("form", ["int8", "int4, groups of 128"])
def test_layers(form: str, name: str, rows: int) -> None:
    """With the norm in front, gate or residual that they have in the model."""
    shape = SHAPES[name]
    x, weight = normal(1, rows, shape.K), weight_of(shape, form)
    how: dict = {"epsilon": 1e-5, "gated": shape.gated}
    if shape.around == "residual":
        how["residual"] = normal(2, rows, shape.out)
    else:
        how["norm_scale"] = normal(3, shape.K)
    got, sums = api.fused_linear(x, api.pack_weight(weight, paired=shape.gated), **how)
    # By 32 rows: with more the reference rounds numbers of 4 bits to bf16 before it multiplies.
    residual = how.pop("residual", jnp.zeros((rows, 0)))
    wanted = []
    for some in (slice(first, first + 32) for first in range(0, rows, 32)):
        own = {"residual": residual[some]} if shape.around == "residual" else {}
        y, _ = api.fused_linear(x[some], weight, backend="reference", **how, **own)
        wanted.append(np.asarray(y, np.float32))
    got, wanted = np.asarray(got, np.float32), np.concatenate(wanted)
    # Both round to bf16 at the same places; a sum in another order may move one rounding, by 2^-8
    # of the value, and a residual or a gate multiplies the difference.
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=2**-7 * np.abs(wanted).max())
    assert shape.gated or np.mean(got == wanted) > 0.9
    assert (sums is not None) == (shape.around == "residual" and rows <= 8)
    if sums is not None:
        counted = np.asarray(sums)[: shape.out // 64, :rows].sum(axis=0)
        np.testing.assert_allclose(counted, (got.astype(np.float64) ** 2).sum(axis=1), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 8])
@pytest.mark.parametrize(("warpgroups", "splits"), [(1, 8), (2, 4), (3, 2)])
@pytest.mark.parametrize("form", ["int8", "int4, groups of 32", "int4, groups of 128"])
def test_clusters_add_as_a_second_kernel_does(
    form: str, warpgroups: int, splits: int, rows: int
) -> None:
    """Bit by bit, whatever follows on the sums."""
    shape = LinearShape(name="small", K=2048, out=1536, around="norm")
    weight = weight_of(shape, form)
    around = {"bias": normal(2, 1536), "norm_scale": normal(3, 2048), "square_sums": None}
    for gated, residual in ((False, normal(4, rows, 1536)), (False, None), (True, None)):
        packed = api.pack_weight(weight, paired=gated)
        (got, sums), (wanted, wanted_sums) = (
            packed_linear(
                normal(1, rows, 2048),
                packed,
                **around,
                residual=residual,
                gated=gated,
                epsilon=1e-5,
                config=Config(
                    warpgroups=warpgroups, splits=splits, stages=2, blocks=1, cluster=cluster
                ),
            )
            for cluster in (True, False)
        )
        np.testing.assert_array_equal(got, wanted)
        if residual is not None:  # squares of 64 channels, added up in another order
            own = np.s_[: 1536 // 64, :rows]
            np.testing.assert_allclose(sums[own], wanted_sums[own], rtol=64 * 2.0**-24)


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_chains_of_layers_are_as_their_calls(rows: int) -> None:
    """A kernel begins before the one ahead has ended: results must be those of one at a time.

    With more rows XLA rounds what is between kernels otherwise in one program than in many.
    """
    forms = {"qkv": "int8", "o": "int4, groups of 128", "gate_up": "int8", "down": "fp8"}
    packed = {
        name: api.pack_weight(weight_of(SHAPES[name], form), paired=name == "gate_up")
        for name, form in forms.items()
    }
    scale = normal(3, 4096)

    def layers(x, wait=lambda y: y):
        norm = {"norm_scale": scale, "epsilon": 1e-5}
        y, _ = wait(api.fused_linear(x, packed["qkv"], **norm))
        y, sums = wait(api.fused_linear(y[:, :4096], packed["o"], residual=x))
        z, _ = wait(api.fused_linear(y, packed["gate_up"], gated=True, square_sums=sums, **norm))
        return wait(api.fused_linear(z, packed["down"], residual=y))[0] * jnp.bfloat16(0.5)

    x = normal(1, rows, 4096)
    together = jax.jit(lambda x: lax.fori_loop(0, 20, lambda _, x: layers(x), x))(x)
    alone = x
    for _ in range(20):
        alone = layers(alone, jax.block_until_ready)
    assert np.isfinite(np.asarray(alone, np.float32)).all()
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("rows", [16, 40])
@pytest.mark.parametrize("form", ["int8", "int4, groups of 128"])
def test_a_product_right_behind_another(form: str, rows: int) -> None:
    """With more rows, too: gate and up, then down, between which XLA has nothing to do."""
    wide, narrow = (
        api.pack_weight(weight_of(SHAPES[name], form), paired=SHAPES[name].gated)
        for name in ("gate_up", "down")
    )
    one = RowsConfig(warpgroups=2, splits=1, stages=3, blocks=1)

    def layers(x, wait=lambda y: y):
        y = wait(packed_rows(x, wide, dtype=jnp.bfloat16, gated=True, config=one))
        return wait(packed_rows(y, narrow, dtype=jnp.bfloat16, config=one))

    xs = normal(1, 20, rows, 4096)
    together = jax.jit(lambda xs: lax.map(layers, xs))(xs)
    alone = [layers(x, jax.block_until_ready) for x in xs]
    np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("form", FORMS)
def test_numbers(form: str, name: str) -> None:
    """Every one, bit by bit; a gated layer's channels in their order again."""
    weight = weight_of(SHAPES[name], form)
    got = packed_numbers(api.pack_weight(weight, paired=SHAPES[name].gated))
    np.testing.assert_array_equal(got, api.dequantize_weight(weight).astype(jnp.bfloat16).T)


@pytest.mark.parametrize("name", ["gate_up", "down"])
@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_codes(kind: api.W8A8Kind, name: str) -> None:
    packed = api.pack_weight(weight_of(SHAPES[name], kind), paired=SHAPES[name].gated)
    got, wanted = (
        api.w8a8_weight(packed, kind=kind, backend=backend) for backend in ("mosaic", "reference")
    )
    for x, y in zip(got, wanted, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("kind", [kind for kind, (*_, zeros) in KINDS.items() if zeros == "word"])
def test_numbers_with_any_zero_points(kind: str) -> None:
    weight = random_codes(kind, 896, 320)
    got = np.asarray(packed_numbers(api.pack_weight(weight)), np.float32)
    wanted = np.asarray(api.dequantize_weight(weight).astype(jnp.bfloat16), np.float32).T
    # Two differences in float32 in place of one: a rounding to bf16 may go the other way.
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=1e-6)
    assert np.mean(got == wanted) > 0.999


@pytest.mark.parametrize("name", ["o", "gate_up"])
def test_unpacked_for_many_rows(name: str) -> None:
    """The way of prompts."""
    shape, rows = SHAPES[name], api.MOST_PACKED_ROWS + 1
    x, weight = normal(1, rows, shape.K), weight_of(shape, "int4, groups of 128")
    around, how = (None,) * 4, {"gated": shape.gated, "epsilon": 0.0}
    got, _ = jax.jit(partial(api.fused_linear, gated=shape.gated))(
        x, api.pack_weight(weight, paired=shape.gated)
    )
    numbers = api.dequantize_weight(weight).astype(jnp.bfloat16)
    wanted, _ = jax.jit(partial(reference.fused_linear, **how))(x, numbers, *around)
    got, wanted = (np.asarray(y, np.float32) for y in (got, wanted))
    # The same numbers: sums in other orders, each rounded to bf16; a gate multiplies that.
    np.testing.assert_allclose(got, wanted, rtol=2**-7, atol=2**-7 * np.abs(wanted).max())


@pytest.mark.parametrize("kind", api.WEIGHT_KINDS)
def test_an_engine_packs_and_answers_as_the_reference_does(kind) -> None:
    """Greedy, up to a tie: where two tokens are as likely but for bf16's rounding, paths part.

    This model's bf16 log probabilities are up to 0.3 from float32's, in plain JAX on a CPU.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    config = tiny_config(layers=2, kv_heads=2, group=2, tie_word_embeddings=False, **sizes)
    params = tiny_params(config)
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(4, [70, 40, 200, 9, 130, 64])]
    sampling = SamplingParams(max_tokens=20, temperature=0.0, logprobs=8)
    runs = []
    for backend in ("mosaic", "reference"):
        llm = LLM((config, params), weights=kind, dtype="bfloat16", backend=backend)
        kernel = llm.engine.params["layers"][0]["mlp"]["down_proj"]["kernel"]
        assert isinstance(kernel, api.PackedWeight) == (backend == "mosaic")
        runs.append([x.outputs[0] for x in llm.generate(prompts, sampling)])
    compared = 0
    for got, wanted in zip(*runs, strict=True):
        for token, other, ours, theirs in zip(
            got.token_ids, wanted.token_ids, got.logprobs, wanted.logprobs, strict=True
        ):
            if token != other:
                assert theirs[other] - theirs.get(token, -np.inf) < 0.3
                break
            assert abs(ours[token] - theirs[token]) < 0.3
            compared += 1
    assert compared > 2 * len(prompts)  # the first token of each is prefill's
