"""Compiles kernels for an H200 on a machine without a GPU; prints ptxas's report of each.

A program of its own, because the choice of platform is fixed when JAX starts and ptxas reports to
standard output:  JAX_PLATFORMS=cpu MOSAIC_GPU_DUMP_PTXAS=1 python compile_offline.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.decode_attention import paged_attention
from pallas_kernels.reference import KVPages, PageList


def decode_arguments(
    rows=1, retrieval=1, streaming=1, group=4, head_dim=128, page_size=64, width=64, int8=False
):
    heads = retrieval + streaming
    array = jax.ShapeDtypeStruct

    def pool(heads: int) -> KVPages:
        tokens = array((heads, 256, page_size, head_dim), jnp.int8 if int8 else jnp.bfloat16)
        scale = array((heads, 256, page_size), jnp.float32) if int8 else None
        return KVPages(tokens, tokens, scale, scale)

    bounds = array((rows, 1), jnp.int32)
    selected = PageList(array((rows, max(retrieval, 1), width), jnp.int32), bounds, bounds)
    ring = PageList(array((rows, 1, 7), jnp.int32), bounds, bounds)
    q = array((rows, heads * group, head_dim), jnp.bfloat16)
    return q, pool(retrieval), pool(streaming), selected, ring


CASES = {
    "bf16": {},
    "bf16, small pages, D 64": {"page_size": 16, "head_dim": 64, "group": 3, "streaming": 0},
    "bf16, group 16, pages of 128": {"page_size": 128, "group": 16},
    "int8": {"int8": True, "width": 2048},
    "int8, D 64, pages of 32": {"int8": True, "page_size": 32, "head_dim": 64},
    "int8, group 16, pages of 16": {"int8": True, "page_size": 16, "group": 16},
}


def main() -> None:
    target = Path(__file__).with_name("h200_target.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    mesh = topologies.make_mesh(topology, (1,), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec())
    for name, case in CASES.items():
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            decode_arguments(**case),
        )
        print(f"CASE {name}", flush=True)
        jax.jit(paged_attention).lower(*arguments).compile()


if __name__ == "__main__":
    main()
