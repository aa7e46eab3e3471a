#!/usr/bin/env bash
# With nvJitLink installed, JAX 0.12 compiles Mosaic GPU kernels so that their register budgets are ignored.
#
# Seen 2026-11-28 with jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt 0.12.0.1, nvidia-cuda-nvcc 13.0.88,
# nvidia-nvjitlink 13.5.37 (13.0.88 and 13.2.78 do the same); with 0.11.2 it does not happen. Compiled for an H200, on a
# machine without a GPU.
#
# plgpu.set_max_registers moves registers from a warpgroup that copies to those that compute (PTX's setmaxnreg). Where
# libnvJitLink is found, 0.12 compiles each kernel as a unit to be linked, and ptxas then ignores every setmaxnreg: all
# warpgroups keep what they started with, and a kernel made for more spills to memory. The result is right; one line of
# ptxas's report says so, which nobody sees who did not ask for the report. Seen, for the kernel below:
#   nvJitLink absent: 0 lines with C7504
#   nvJitLink there:  1 line with C7504: 'setmaxnreg' ignored to maintain compatibility across compilation units
#
# Why it matters: jax[cuda13] installs nvJitLink, so this is what users run, while kernels compiled in a lean environment
# (without a GPU, to look at their registers) seem to be in order. MOSAIC_GPU_DUMP_PTXAS=1 shows which of the two it is.

set -euo pipefail
source "$(dirname "$0")/common.sh"
export MOSAIC_GPU_DUMP_PTXAS=1

compile() {
    run <<'PY'
import os
import sysconfig

bin_folder = os.path.join(sysconfig.get_path("platlib"), "nvidia", "cu13", "bin")
os.environ["PATH"] = os.pathsep.join([bin_folder, os.environ["PATH"]])  # ptxas

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import NamedSharding, PartitionSpec



def double(x_ref, out_ref):
    group = jax.lax.axis_index("group")

    def compute():
        plgpu.set_max_registers(232, action="increase")
        x = plgpu.load(x_ref, layout=plgpu.Layout.WGMMA)
        out_ref[...] = x + x

    def copy():
        plgpu.set_max_registers(40, action="decrease")

    jax.lax.cond(group == 0, compute, copy)


topology = topologies.get_topology_desc(platform="cuda", target_config=os.environ["H200_TARGET"], topology="1x1x1")
mesh = topologies.make_mesh(topology, (1,), ("x",))
x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
kernel = plgpu.kernel(
    double,
    out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
    num_threads=2,
    thread_name="group",
)
jax.jit(kernel).lower(x).compile()
PY
}

lines() { # of a report, that say what is looked for
    grep --text --count C7504 "$1" || true
}

packages jax==0.12.0.1 jaxlib==0.12.0.1 jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1 nvidia-cuda-nvcc==13.0.88
compile >"$tmp/absent" 2>&1 || { cat "$tmp/absent"; echo "Changed: the kernel no longer compiles."; exit 1; }
packages nvidia-nvjitlink==13.5.37
compile >"$tmp/there" 2>&1 || { cat "$tmp/there"; echo "Changed: the kernel no longer compiles."; exit 1; }

echo "nvJitLink absent: $(lines "$tmp/absent") lines with C7504"
echo "nvJitLink there:  $(lines "$tmp/there") lines with C7504"
grep --text --quiet "Used .* registers" "$tmp/absent" || { echo "Changed: ptxas made no report."; exit 1; }
if [ "$(lines "$tmp/absent")" != 0 ] || [ "$(lines "$tmp/there")" = 0 ]; then
    echo "Changed: nvJitLink no longer decides whether register budgets are ignored."
    exit 1
fi
