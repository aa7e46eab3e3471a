#!/usr/bin/env bash
# On a GPU, asking XLA for the layout in which cuBLAS multiplies int8 fast makes it use the other one.
#
# Seen 2026-11-28 with jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt 0.12.0.1; with 0.11.2 too. Compiled for an H200,
# on a machine without a GPU, with Triton's products switched off, so that cuBLAS multiplies.
#
# A matrix of int8 codes lies as [K, out]; cuBLAS is much faster where K is the last axis (on an H200, M = 8192: 1550
# TOP/s beside 951). Left alone, XLA transposes the codes before the product. with_layout_constraint on the transposed
# matrix, which should do just that, is taken as a view of what is there, and the product reads [K, out] as it lies:
#   no constraint:             transposed first
#   with_layout_constraint:    read as it lies
#   and an optimization_barrier behind it: transposed first
#
# Why it matters: the constraint is there to force a layout, results are the same, and nothing but a
# profile shows that the product became slower. On a CPU the constraint does what it says.

set -euo pipefail
source "$(dirname "$0")/common.sh"
export JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1

packages jax==0.12.0.1 jaxlib==0.12.0.1 jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1

run <<'PY'
import os
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

topology = topologies.get_topology_desc(platform="cuda", target_config=os.environ["H200_TARGET"], topology="1x1x1")
mesh = topologies.make_mesh(topology, (1,), ("x",))


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int8, sharding=NamedSharding(mesh, PartitionSpec()))


def forced(codes):
    return with_layout_constraint(codes, Layout((0, 1)))


def how(force):
    def product(x, codes):
        last = (((1,), (1,)), ((), ()))
        return lax.dot_general(x, force(codes.T), last, preferred_element_type=jnp.int32)

    lowered = jax.jit(product).lower(array(8192, 4096), array(4096, 6144))
    program = lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False}).as_text()
    if "__cublas" not in program:
        raise SystemExit("Changed: cuBLAS does not multiply.")
    transposed = re.search(r"= s8\[6144,4096\]\{1,0\}", program)
    return "transposed first" if transposed else "read as it lies"


seen = {
    "no constraint": how(lambda codes: codes),
    "with_layout_constraint": how(forced),
    "and an optimization_barrier": how(lambda codes: lax.optimization_barrier(forced(codes))),
}
for name, found in seen.items():
    print(f"{name}: {found}")
if list(seen.values()) != ["transposed first", "read as it lies", "transposed first"]:
    raise SystemExit("Changed: the constraint decides about the layout in another way.")
PY
