#!/usr/bin/env bash
# In JAX 0.11 a Mosaic GPU kernel lowered twice in a process is not the same kernel: its code has a running number in it.
#
# Seen 2026-11-28 with jax and jaxlib 0.11.2. In 0.12.0.1 both are the same. No GPU is needed: the function below is lowered
# for CUDA on a CPU.
#
# The number is part of a name under which a kernel's code can be dumped (mosaic_gpu.dump_basename). It counts all kernels
# that the process has lowered, so what a program is lowered to depends on which programs were lowered before. Seen:
#   jax 0.11.2: the kernel's hash is another one the second time
#   jax 0.12.0.1: the kernel's hash is the same
#
# Why it matters: the persistent compilation cache is keyed by what a program is lowered to. A service that compiles its
# programs in another order than last time, or one of them more, finds none of those that follow, and a kernel lowered by
# one process cannot be compared with that of another one by its hash.

set -euo pipefail
source "$(dirname "$0")/common.sh"

hashes() { # those of a kernel lowered twice
    run <<'PY'
import hashlib
import re

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def lowered():
    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] + x_ref[...]

    array = jax.ShapeDtypeStruct((128,), jnp.float32)
    kernel = jax.jit(plgpu.kernel(double, out_type=array))
    text = kernel.trace(array).lower(lowering_platforms=("cuda",)).as_text()
    [code] = re.findall(r'kernel_hash = "(.*?)", module', text)
    return hashlib.sha256(code.encode()).hexdigest()[:8]


first, second = lowered(), lowered()
print("the same" if first == second else "another one the second time")
PY
}

seen() { # VERSION, EXPECTED
    packages "jax==$1" "jaxlib==$1"
    found=$(hashes)
    echo "jax $1: the kernel's hash is $found"
    [ "$found" = "$2" ] || { echo "Changed: it was $2."; exit 1; }
}

seen 0.11.2 "another one the second time"
seen 0.12.0.1 "the same"
