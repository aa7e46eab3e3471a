"""Decode attention on a Hopper GPU, at the shapes of the benchmarks.

    python -m pytest -m gpu tests/kernels

Tokens that are not attended are NaN. A kernel may be at most twice as far from float32
arithmetic as the same maths done in bf16.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shapes.decode import DECODE, DecodeShape, decode_inputs

from pallas_kernels import reference
from pallas_kernels.hopper.decode_attention import paged_attention
from pallas_kernels.kv_codes import values
from pallas_kernels.types import KVPages, PageList

pytestmark = pytest.mark.gpu


def bf16_attention(
    q: jax.Array,
    retrieval: KVPages,
    streaming: KVPages,
    retrieval_list: PageList,
    streaming_list: PageList,
) -> jax.Array:
    """Plain attention over the listed pages with bf16 operands and float32 sums."""
    B, H, D = q.shape
    split = retrieval.k.shape[0]
    K = split + streaming.k.shape[0]
    outs = []
    for pool, lists, part in (
        (retrieval, retrieval_list, slice(0, split)),
        (streaming, streaming_list, slice(split, K)),
    ):
        if pool.k.shape[0] == 0:
            continue
        heads = jnp.arange(pool.k.shape[0])[None, :, None]
        token = jnp.arange(lists.page_ids.shape[2] * pool.k.shape[2])[None, None]
        seen = (token >= lists.start[..., None]) & (token < lists.stop[..., None])

        def read(x, scale, heads=heads, pages=lists.page_ids, seen=seen):
            tokens = values(*jax.tree.map(lambda x: x[heads, pages], (x, scale)))
            tokens = tokens.astype(jnp.bfloat16).reshape(*seen.shape, D)
            return jnp.where(seen[..., None], tokens, jnp.bfloat16(0))

        k, v = read(pool.k, pool.k_scale), read(pool.v, pool.v_scale)
        grouped = q.reshape(B, K, H // K, D)[:, part]
        scores = jnp.einsum("bkgd,bktd->bkgt", grouped, k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, :, None], scores * D**-0.5, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(jnp.bfloat16)
        outs.append(jnp.einsum("bkgt,bktd->bkgd", weights, v, preferred_element_type=jnp.float32))
    return jnp.concatenate(outs, axis=1).reshape(B, H, D).astype(jnp.bfloat16)


def distance(x: jax.Array, truth: jax.Array) -> float:
    difference = np.asarray(x, np.float32) - np.asarray(truth, np.float32)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(truth, np.float32)))


@pytest.mark.parametrize("shape", DECODE, ids=lambda shape: shape.name)
def test_decode_attention(shape: DecodeShape) -> None:
    q, retrieval, streaming, (lists,) = decode_inputs(shape)
    args = retrieval, streaming, *lists
    truth, true_lse = reference.paged_attention(q.astype(jnp.float32), *args)
    out, lse = paged_attention(q, *args, most_tokens=shape.most_tokens)
    allowed = 2 * distance(jax.jit(bf16_attention)(q, *args), truth)
    assert distance(out, truth) <= allowed
    # Float32 sums of up to 512K terms, exp2 approximate. Products of fp8 are added with some 13
    # digits: scores of size 10 to 2^-10.
    assert distance(lse, true_lse) <= (1e-4 if shape.kind == "fp8" else 1e-5)
