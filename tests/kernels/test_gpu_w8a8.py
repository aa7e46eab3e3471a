"""Prefill's products in 8 bits on a GPU, at Llama-3-8B's shapes.

    python -m pytest -m gpu tests/kernels/test_gpu_w8a8.py

XLA multiplies: what is looked at is that it does so in 8 bits and without copies of a matrix.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shapes.linear import LINEAR, random_matrix
from tiny_llm import random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.steps import CHUNK_OPTIONS
from pallas_kernels import api
from pallas_kernels.weights import nearest_codes

pytestmark = pytest.mark.gpu

SHAPES = {shape.name: shape for shape in LINEAR if shape.around != "logits"}


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def distance(got: jax.Array, wanted: jax.Array) -> float:
    """Of the results' size, root mean square."""
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    return float(np.sqrt(((got - wanted) ** 2).mean() / (wanted**2).mean()))


@pytest.mark.parametrize("rows", [16, 100, 2048])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_products(kind, name: str, rows: int) -> None:
    """Rows are of very different size."""
    shape = SHAPES[name]
    x = normal(1, rows, shape.K) * jnp.exp2(normal(2, rows, 1) * 4)
    matrix = random_matrix(jnp.int32(0), K=shape.K, out=shape.out)
    weight = api.w8a8_weight(matrix, kind=kind)
    got = jax.jit(api.product)(x, weight)

    @jax.jit
    def exact(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)

    codes, scale = jax.jit(lambda x: nearest_codes(x, weight.codes.dtype, axis=1))(
        x.astype(jnp.float32)
    )
    rounded = codes.astype(jnp.float32) * scale
    numbers = weight.codes.astype(jnp.float32).T * weight.scale[None]
    unit = jnp.abs(x.astype(jnp.float32)).max(axis=1, keepdims=True)
    # Rows count alike. int8: sums are exact. fp8: tensor cores keep some 13 bits of a sum, which
    # is rounded to bfloat16, by 2^-9 of it. Ties of bfloat16's numbers may go to either code.
    allowed = {"int8": 1e-3, "fp8": 4e-3}[kind]
    assert distance(got / unit, exact(rounded, numbers) / unit) < allowed
    # A number of e4m3 is off by up to 2^-4 of itself, by a third of that on average, on either
    # side. Codes of int8 are 127 to the largest of a row, some four times as large as most.
    away = distance(got / unit, exact(x.astype(jnp.float32), matrix.astype(jnp.float32)) / unit)
    assert away < {"int8": 0.02, "fp8": 0.05}[kind]


@pytest.mark.parametrize("kind", api.W8A8_KINDS)
def test_matrices_are_multiplied_as_they_lie(kind) -> None:
    """By cuBLAS; no array of a matrix's size is written, and none of it in more bits."""
    shape, rows = SHAPES["o"], 1024
    weight = jax.eval_shape(
        lambda x: api.w8a8_weight(x, kind=kind), jnp.zeros((shape.K, shape.out), jnp.bfloat16)
    )
    x = jax.ShapeDtypeStruct((rows, shape.K), jnp.bfloat16)
    product = jax.jit(
        lambda x, weight: api.fused_linear(x, weight)[0], compiler_options=CHUNK_OPTIONS
    )
    text = product.lower(x, weight).compile().as_text()
    assert {"int8": '"__cublas$lt$matmul"', "fp8": '"__cublas$lt$matmul$f8"'}[kind] in text
    entry = text[text.index("\nENTRY") :].splitlines()
    size = f"[{shape.out},{shape.K}]"
    written = [line for line in entry if f"{size}{{" in line.partition("=")[2].partition("(")[0]]
    assert [line for line in written if " parameter(" not in line] == []
    assert f"bf16{size}" not in text and f"f32{size}" not in text


@pytest.mark.parametrize(
    ("weights", "kind"), [(None, "int8"), (None, "fp8"), ("int8", "int8"), ("fp8", "fp8")]
)
def test_an_engine_reads_prompts_as_the_reference_does(weights, kind) -> None:
    """Chunks, short prompts together, and packed codes that are written in rows.

    Where bf16 rounds a number to another code the two part: on a CPU bf16 and float32 are 0.04 nats
    from each other on average in int8, 0.10 in fp8, as far as either is from numbers that are not
    rounded. With one layer's channels out of order they would be 0.8 apart.
    """
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    config = tiny_config(layers=2, kv_heads=2, group=2, tie_word_embeddings=False, **sizes)
    params = tiny_params(config)
    prompts = [{"prompt_token_ids": ids} for ids in random_prompts(4, [700, 40, 30, 9, 130])]
    sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    runs = []
    for backend, prefill_dtype in (("mosaic", kind), ("reference", kind), ("reference", None)):
        llm = LLM(
            (config, params),
            weights=weights,
            prefill_dtype=prefill_dtype,
            dtype="bfloat16",
            backend=backend,
            prefill_chunk_size=256,
        )
        runs.append(
            np.concatenate(
                [
                    [
                        row[token]
                        for token, row in zip(
                            x.prompt_token_ids[1:], x.prompt_logprobs[1:], strict=True
                        )
                    ]
                    for x in llm.generate(prompts, sampling)
                ]
            )
        )
    ours, reference, floats = runs
    most = {"int8": 0.08, "fp8": 0.2}[kind]
    assert np.abs(ours - reference).mean() < most
    assert 0.02 < np.abs(ours - floats).mean() < most
