"""Every op under shard_map over KV heads, on two CPU devices, equals the op on one device.

A script, run by test_ops_contract.py: the number of devices is set before JAX starts.
"""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec
from numpy.testing import assert_allclose

from pallas_kernels import api
from pallas_kernels.api import BlockList, KVPages, PageList

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

TOKENS = Spec(None, "heads")  # tokens, queries and lists have heads on their second axis,
POOL = Spec("heads")  # pools and statistics on their first
ALL = Spec()

B, T, D, N, P = 2, 24, 8, 6, 16
# Two retrieval and two streaming KV heads, two query heads each. A shard orders its own heads
# retrieval first, so the shards one after the other hold these heads:
KV_HEADS = np.array([0, 2, 1, 3])
QUERY_HEADS = np.array([0, 1, 4, 5, 2, 3, 6, 7])

rng = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def kv(x: np.ndarray) -> np.ndarray:
    return np.asarray(x)[:, KV_HEADS]


def queries(x: np.ndarray) -> np.ndarray:
    return np.asarray(x)[:, QUERY_HEADS]


def sharded(op: Callable, in_specs: tuple, out_specs: object) -> Callable:
    mesh = Mesh(np.array(jax.devices()), ("heads",))
    return jax.jit(jax.shard_map(op, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


same = partial(jax.tree.map, partial(assert_allclose, atol=1e-6, rtol=0))

retrieval, streaming = (KVPages(normal(2, N, P, D), normal(2, N, P, D)) for _ in range(2))
stats = -np.sort(-normal(2, N, 2, 2, D), axis=3)  # kmax above kmin


def of_codes(pool: KVPages) -> KVPages:
    (k, k_scale), (v, v_scale) = (api.quantize_kv(x, "int4") for x in pool[:2])
    return KVPages(k, v, k_scale, v_scale)


POOLS = [(retrieval, streaming), (of_codes(retrieval), of_codes(streaming))]


def paged_attention() -> None:
    q = normal(B, 8, D)
    ids, start = (rng.integers(0, N, (B, 2, 3)), rng.integers(0, 20, (B, 2)))
    own = PageList(*(x.astype(np.int32) for x in (ids, start, start + 15)))
    shared = PageList(*(x[:, :1] for x in own))
    op = sharded(api.paged_attention, (TOKENS, POOL, POOL, TOKENS, ALL), TOKENS)
    for pools in POOLS:
        args = *pools, own, shared
        out = op(queries(q), *args)
        alone = jax.jit(api.paged_attention)(q, *args)
        same(out, tuple(map(queries, alone)))


def verify_attention() -> None:
    """One pool: no order to mind."""
    of_tokens = Spec(None, None, "heads")
    args = normal(B, 3, 4, D), retrieval, np.array([[4, 1], [2, 5]], np.int32), integers(20, -1)
    op = sharded(api.verify_attention, (of_tokens, POOL, ALL, ALL), of_tokens)
    same(op(*args), jax.jit(api.verify_attention)(*args))


def causal_attention() -> None:
    of_tokens = Spec(None, None, "heads")
    args = normal(B, T, 4, D), normal(B, T, 2, D), normal(B, T, 2, D), rng.integers(0, 3, (B, T))
    args = *args[:3], args[3].astype(np.int32)
    op = sharded(api.causal_attention, (of_tokens,) * 3 + (ALL,), of_tokens)
    same(op(*args), jax.jit(api.causal_attention)(*args))


def prefill_attention() -> None:
    q, k, v = normal(T, 8, D), normal(T, 4, D), normal(T, 4, D)
    where = (integers(4, 1, 0), integers(2, 5, 2), np.int32(20), np.int32(T))
    blocks = BlockList(np.array([[[0, 1]], [[1, 9]]], np.int32), np.array([[2], [1]], np.int32))

    def prefill(*args):
        return api.prefill_attention(*args[:-1], sink=4, local=9, blocks=args[-1])

    op = sharded(prefill, (TOKENS, TOKENS, TOKENS, POOL, POOL, ALL, ALL, ALL, ALL, POOL), TOKENS)
    out = op(queries(q), kv(k), kv(v), retrieval, streaming, *where, blocks)
    alone = jax.jit(prefill)(q, k, v, retrieval, streaming, *where, blocks)
    same(out, tuple(map(queries, alone)))


def choose_blocks() -> None:
    """Retrieval heads only: no order to mind."""
    where = (integers(4, 1, 0, 2), np.int32(50), np.int32(300))
    args = normal(300, 4, D), normal(300, 2, D), retrieval, *where
    choose = partial(api.choose_blocks, threshold=0.6)
    op = sharded(choose, (TOKENS, TOKENS, POOL, ALL, ALL, ALL), POOL)
    same(op(*args), jax.jit(choose)(*args))


def append_kv_chunk() -> None:
    k, v = normal(T, 4, D), normal(T, 4, D)
    ring_pages = np.where(np.arange(T) < 8, -1, 3).astype(np.int32)
    where = (integers(4, 1, 0), ring_pages, np.int32(20), np.int32(19))
    specs = (TOKENS, TOKENS, POOL, POOL, POOL, ALL, ALL, ALL, ALL)
    op = sharded(api.append_kv_chunk, specs, POOL)
    out = op(kv(k), kv(v), retrieval, streaming, stats, *where)
    same(out, jax.jit(api.append_kv_chunk)(k, v, retrieval, streaming, stats, *where))


def append_kv() -> None:
    q, k, v, angle = normal(B, 8, D), normal(B, 4, D), normal(B, 4, D), normal(B, D // 2)
    where = (integers(1, 4), integers(5, 0), integers(0, 9))
    specs = (TOKENS, TOKENS, TOKENS, ALL, ALL, POOL, POOL, POOL, ALL, ALL, ALL)
    op = sharded(api.append_kv, specs, (TOKENS, POOL, POOL, POOL))
    for pools in POOLS:
        before = (np.cos(angle), np.sin(angle), *pools, stats)
        rotated, *caches = op(queries(q), kv(k), kv(v), *before, *where)
        true_rotated, *true_caches = jax.jit(api.append_kv)(q, k, v, *before, *where)
        same([rotated, *caches], [queries(true_rotated), *true_caches])


def page_scores_and_select_pages() -> None:
    """Retrieval heads only: no order to mind."""
    scores = partial(api.page_scores, page_size=P, selected_page_size=P)
    tables = np.array([[4, 1, 0], [2, 3, 5]], np.int32)
    arguments = (normal(B, 4, D), stats, tables, integers(40, 17))
    alone = np.asarray(jax.jit(scores)(*arguments))
    same(sharded(scores, (TOKENS, POOL, ALL, ALL), TOKENS)(*arguments), alone)
    select = partial(api.select_pages, num_pages=2, sink_pages=1)
    arguments = (alone, integers(3, 2), np.array([[1, 2], [2, 2]], np.int32))
    same(sharded(select, (TOKENS, ALL, TOKENS), TOKENS)(*arguments), jax.jit(select)(*arguments))


def merge_attention() -> None:
    parts = (normal(3, B, 8, D), normal(3, B, 8))
    op = sharded(api.merge_attention, (Spec(None, None, "heads"),) * 2, TOKENS)
    same(op(*parts), jax.jit(api.merge_attention)(*parts))


if __name__ == "__main__":
    assert jax.device_count() == 2
    paged_attention()
    verify_attention()
    causal_attention()
    prefill_attention()
    choose_blocks()
    append_kv_chunk()
    append_kv()
    page_scores_and_select_pages()
    merge_attention()
