"""Prefill and prefix attention on a Hopper GPU at the benchmarks' shapes: ``pytest -m gpu``.

Tokens that no query sees are NaN. A kernel may be at most twice as far from float32
arithmetic as the same maths done in bf16. That maths is tested without a GPU, at a small shape.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from shapes.prefill import PREFILL, PrefillShape, prefill_inputs, random_blocks
from shapes.prefix import PREFIX, PREFIX_CODES, PrefixShape, prefix_inputs

from pallas_kernels import reference
from pallas_kernels.hopper.block_scores import block_scores
from pallas_kernels.hopper.prefill_attention import prefill_attention
from pallas_kernels.hopper.prefix_attention import prefix_attention
from pallas_kernels.kv_codes import float_pages, values
from pallas_kernels.types import BlockList, KVPages, KVScale, OwnAttention

QUERIES = 256  # a tile of the bf16 computation


def distance(x: jax.Array, truth: jax.Array) -> float:
    difference = np.asarray(x, np.float32) - np.asarray(truth, np.float32)
    return float(np.linalg.norm(difference) / np.linalg.norm(np.asarray(truth, np.float32)))


def tokens_of(pages: KVPages, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K and V [K, tokens, D] in bf16, 0 for NaN."""

    taken = jax.tree.map(lambda x: x[:, table], pages)

    def read(codes: jax.Array, scale: KVScale | None) -> jax.Array:
        x = values(codes, scale)
        return jnp.nan_to_num(x.reshape(x.shape[0], -1, x.shape[-1])).astype(jnp.bfloat16)

    return read(taken.k, taken.k_scale), read(taken.v, taken.v_scale)


def bf16_attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """Queries [K, Q, D] attend keys and values [K, T, D] where ``seen`` [Q, T] or [K, Q, T]."""
    scores = jnp.einsum("kqd,ktd->kqt", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = jnp.where(seen, jax.nn.softmax(scores, axis=-1), 0.0).astype(jnp.bfloat16)
    return jnp.einsum("kqt,ktd->kqd", weights, v, preferred_element_type=jnp.float32)


@partial(jax.jit, static_argnames=("start", "sink", "local"))
def bf16_prefill(
    q, k, v, retrieval, streaming, table, ring, listed, *, start, sink, local
) -> jax.Array:
    """All tokens exist; those that do not, and their outputs, are left to the caller.

    ``listed`` [Kr, tiles, blocks] bool: what tiles of 128 queries see; None: everything.
    """
    T, H, D = q.shape
    K = k.shape[1]
    q, k, v = (jnp.nan_to_num(x) for x in (q, k, v))
    split = retrieval.k.shape[0]
    outs = []
    for pages, ids, part, near, lists in (
        (retrieval, table, slice(0, split), 1 << 30, listed),
        (streaming, ring, slice(split, K), local, None),
    ):
        if pages.k.shape[0] == 0:
            continue
        keys, values = (
            jnp.concatenate([x[:, :start], new[:, part].swapaxes(0, 1)], axis=1)
            for x, new in zip(tokens_of(pages, ids), (k, v), strict=True)
        )
        grouped = q.reshape(T, K, H // K, D)[:, part]
        grouped = jnp.pad(grouped, ((0, -T % QUERIES), (0, 0), (0, 0), (0, 0)))
        tiles = grouped.reshape(-1, QUERIES, *grouped.shape[1:])

        def attend(args, keys=keys, values=values, near=near, lists=lists):
            index, queries = args  # [QUERIES, K, G, D]
            i = start + index * QUERIES + jnp.arange(QUERIES)[:, None]
            j = jnp.arange(keys.shape[1])[None]
            seen = (j <= i) & ((j < sink) | (j > i - near))
            if lists is not None:
                tile = jnp.minimum((i - start) // 128, lists.shape[1] - 1)
                block = jnp.where(j < start, j // 128, -(-start // 128) + (j - start) // 128)
                seen = seen[None] & lists[:, tile, block]
            heads = queries.transpose(2, 1, 0, 3)  # [G, K, QUERIES, D]
            out = lax.map(lambda q: bf16_attention(q, keys, values, seen), heads)
            return out.transpose(2, 1, 0, 3).astype(jnp.bfloat16)

        out = lax.map(attend, (jnp.arange(tiles.shape[0]), tiles))
        outs.append(out.reshape(-1, *out.shape[2:])[:T])
    return jnp.concatenate(outs, axis=1).reshape(T, H, D)


def which_are_listed(blocks: BlockList) -> jax.Array:
    """[Kr, tiles, blocks] bool, for blocks up to the last tile's diagonal."""
    ids, counts = np.asarray(blocks.ids), np.asarray(blocks.counts)
    listed = np.zeros(ids.shape, bool)
    for head, tile in np.ndindex(counts.shape):
        listed[head, tile, ids[head, tile, : counts[head, tile]]] = True
    return jnp.asarray(listed)


def lists_of(
    shape: PrefillShape, density: float | None
) -> tuple[BlockList | None, jax.Array | None]:
    """Lists, of which those of head 0 are empty every other time; the same as booleans."""
    if density is None:
        return None, None
    blocks = random_blocks(shape, density)
    blocks = blocks._replace(counts=blocks.counts.at[0, ::2].set(0))
    return blocks, which_are_listed(blocks)


def assert_near(what: str, x: jax.Array, truth: jax.Array, allowed: float) -> None:
    off = distance(x, truth)
    assert off <= allowed, f"{what} is {off:.3g} off, allowed {allowed:.3g}"


@pytest.mark.parametrize("density", [None, 0.5])
def test_bf16_prefill_agrees_with_the_reference(density: float | None) -> None:
    """What the GPU's kernel is measured by, without a GPU."""
    heads = {"retrieval_heads": 2, "streaming_heads": 1, "group": 2, "head_dim": 64}
    shape = PrefillShape(name="small", tokens=300, start=200, sink=16, local=70, **heads)
    args, window = prefill_inputs(shape)
    blocks, listed = lists_of(shape, density)
    truth, lse = reference.prefill_attention(*args, **window, blocks=blocks)
    plain = bf16_prefill(*args[:7], listed, start=shape.start, **window)
    exists = slice(0, shape.tokens - 1)
    assert bool(jnp.isneginf(lse[exists]).any()) == (density is not None)
    # Weights and either out are rounded to bf16, 2^-9 each, of which few are off by all of that.
    assert_near("out", plain[exists], truth[exists], 2.0**-8)


@pytest.mark.gpu
@pytest.mark.parametrize("density", [None, 0.3])
@pytest.mark.parametrize("shape", PREFILL, ids=lambda shape: shape.name)
def test_prefill_attention(shape: PrefillShape, density: float | None) -> None:
    """Everything, and of lists."""
    args, window = prefill_inputs(shape)
    blocks, listed = lists_of(shape, density)
    exists = slice(0, shape.tokens - 1)
    exact = args[0].astype(jnp.float32), *args[1:]
    truth, true_lse = reference.prefill_attention(*exact, **window, blocks=blocks)
    out, lse = prefill_attention(*args, **window, blocks=blocks)
    plain = bf16_prefill(*args[:7], listed, start=shape.start, **window)
    out, lse, plain, truth, true_lse = (x[exists] for x in (out, lse, plain, truth, true_lse))
    empty = jnp.isneginf(true_lse)
    assert bool(empty.any()) == (density is not None)
    wrong = np.argwhere(np.asarray(jnp.isneginf(lse) != empty))
    assert not len(wrong), f"lse is wrongly finite or infinite at {len(wrong)}, first {wrong[0]}"
    assert_near("out", out, truth, 2 * distance(plain, truth))
    lse, true_lse = (jnp.where(empty, 0.0, x) for x in (lse, true_lse))
    # float32 sums, exp2 approximate; int8 keys are rounded to bf16.
    assert_near("lse", lse, true_lse, 1e-4 if shape.int8 else 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PREFILL, ids=lambda shape: shape.name)
def test_prefill_attention_of_several_prompts(shape: PrefillShape) -> None:
    """One launch gives each prompt the numbers that it has alone, bit for bit."""
    (q, k, v, retrieval, streaming, *bounds), window = prefill_inputs(shape)
    lengths = shape.tokens - 1, 0, shape.tokens // 3
    scaled = [jnp.stack([x, x, 2 * x]) for x in (q, k, v)]
    tables = [jnp.stack([x] * 3) for x in bounds[:3]]
    pools = retrieval, streaming
    out, lse = prefill_attention(*scaled, *pools, *tables, jnp.array(lengths), **window)
    for row, length in enumerate(lengths):
        each = [x[row] for x in scaled]
        alone = prefill_attention(*each, *pools, *bounds[:3], jnp.int32(length), **window)
        for found, expected in zip((out[row], lse[row]), alone, strict=True):
            np.testing.assert_array_equal(found[:length], expected[:length])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PREFIX, ids=lambda shape: shape.name)
def test_prefix_attention(shape: PrefixShape) -> None:
    q, *args = prefix_inputs(shape)
    B, H, D = q.shape
    K = shape.heads
    truth, true_lse = reference.prefix_attention(q.astype(jnp.float32), *args)
    out, lse = prefix_attention(q, *args)
    keys, values = tokens_of(*args[:2])
    grouped = q.reshape(B, K, H // K, D).swapaxes(0, 1).reshape(K, -1, D)
    seen = jnp.arange(keys.shape[1])[None] < shape.tokens
    plain = jax.jit(bf16_attention)(grouped, keys, values, seen).astype(jnp.bfloat16)
    plain = plain.reshape(K, B, H // K, D).swapaxes(0, 1).reshape(B, H, D)
    assert_near("out", out, truth, 2 * distance(plain, truth))
    assert_near("lse", lse, true_lse, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PREFIX_CODES, ids=lambda shape: shape.name)
def test_prefix_attention_of_codes(shape: PrefixShape) -> None:
    """Bit for bit that of the numbers that they stand for."""
    q, pages, table, length = prefix_inputs(shape)
    found = prefix_attention(q, pages, table, length)
    expected = prefix_attention(q, *float_pages(pages, table, jnp.bfloat16), length)
    for x, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(wanted, np.float32))
    truth, true_lse = reference.prefix_attention(q.astype(jnp.float32), pages, table, length)
    # Keys, values, weights and out are rounded to bf16, 2^-9 each.
    assert_near("out", found[0], truth, 4 * 2.0**-9)
    assert_near("lse", found[1], true_lse, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PREFIX, ids=lambda shape: shape.name)
def test_prefix_attention_joined_with_the_rows_own(shape: PrefixShape) -> None:
    """Every third row does not share the prefix."""
    q, *args = prefix_inputs(shape)
    keys = jax.random.split(jax.random.key(1))
    own_out = jax.random.normal(keys[0], q.shape, jnp.bfloat16)
    _, prefix_lse = reference.prefix_attention(q.astype(jnp.float32), *args)
    own_lse = prefix_lse + jax.random.normal(keys[1], prefix_lse.shape)
    shares = jnp.arange(shape.rows) % 3 > 0
    own = OwnAttention(own_out, own_lse, shares)
    exact = own._replace(out=own_out.astype(jnp.float32))
    truth, true_lse = reference.prefix_attention(q.astype(jnp.float32), *args, exact)
    out, lse = prefix_attention(q, *args, own)
    # The prefix's weights, its out and the result are rounded to bf16, 2^-9 each.
    assert_near("out", out, truth, 4 * 2.0**-9)
    assert_near("lse", lse, true_lse, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", PREFILL, ids=lambda x: x.name)
def test_block_scores(shape: PrefillShape) -> None:
    """Of every 64th query, all heads of the retrieval pool, against the plain op in float32."""
    (q, k, _, pool, _, table, _, start, length), _ = prefill_inputs(shape)
    heads, group = pool.k.shape[0], q.shape[1] // k.shape[1]
    pool, table = float_pages(pool, table, jnp.bfloat16)  # the kernel reads codes rounded to that
    last = jnp.arange(63, q.shape[0], 64)
    last = jnp.where(last < length, last, -1)
    queries = q[last, : heads * group].reshape(len(last), heads, group, -1)
    queries = jnp.nan_to_num(queries).transpose(1, 2, 0, 3).reshape(heads, -1, q.shape[2])
    args = jnp.tile(last, group), k[:, :heads], pool, table, start
    found = np.asarray(block_scores(queries, *args, most_heads=heads + 1))
    truth = np.asarray(reference.block_scores(queries.astype(jnp.float32), *args))
    assert (np.isneginf(found) == np.isneginf(truth)).all()
    seen = np.isfinite(truth)
    # Products are exact in float32; exp2 and log2 are approximate.
    np.testing.assert_allclose(found[seen], truth[seen], atol=1e-3, rtol=0)
