#!/usr/bin/env bash
# nbytes of an int4 array in JAX is twice what the array takes on its device, of an int2 array four times.
#
# Seen 2026-11-28 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5, ml_dtypes 0.5.4, on the CPU.
#
# jax.Array keeps two int4 numbers in a byte and four int2 numbers, while nbytes and itemsize count a byte for each.
# NumPy's copy of the array does take a byte for each. Seen, for 2^20 numbers:
#   dtype    nbytes    itemsize   on_device_size_in_bytes()   nbytes of np.asarray
#   int8     1048576   1          1048576                     1048576
#   int4     1048576   1           524288                     1048576
#   uint4    1048576   1           524288                     1048576
#   int2     1048576   1           262144                     1048576
#
# Why it matters: whoever plans memory by nbytes, as sum(x.nbytes for x in jax.tree.leaves(params)) does, thinks that a
# model of 4-bit weights is as large as one of 8-bit weights, and fetching it to the host really doubles it.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.5.4

run <<'PY'
import sys

import jax.numpy as jnp
import numpy as np

count, per_byte = 1 << 20, {"int8": 1, "int4": 2, "uint4": 2, "int2": 4}
print("dtype    nbytes    itemsize   on_device_size_in_bytes()   nbytes of np.asarray")
for name, several in per_byte.items():
    x = jnp.zeros((count,), name)
    taken, fetched = x.on_device_size_in_bytes(), np.asarray(x).nbytes
    print(f"{name:8} {x.nbytes:8}  {x.itemsize}          {taken:8}                    {fetched:8}")
    if taken != count // several:
        sys.exit(f"Changed: {count} numbers of {name} take {taken} bytes on the device.")
    if x.nbytes != count or fetched != count:
        sys.exit(f"Changed: nbytes of {name} is no longer a byte a number.")
PY
