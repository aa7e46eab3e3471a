#!/usr/bin/env bash
# On a CPU, jnp.max and jnp.min of 4096 numbers or more leave NaN out; of fewer they return it, as NumPy does.
#
# Seen 2026-11-29 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5; jax 0.11.2 does the same.
#
# From 4096 elements of input on, XLA's CPU backend hands a reduction to YNNPACK (__ynn_fusion in the compiled program),
# whose maximum takes the other operand where one is NaN: the result is the largest of the other numbers, or -inf where
# there is none. Jitted or not, over rows, columns or everything, also behind jnp.abs: only the number of elements counts.
# float32 loses NaN in max and min, bfloat16 and float16 in min alone. sum, argmax and jnp.maximum of two
# arrays keep it. With XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (nothing behind the sign) all sizes keep it.
# Seen, for the maximum of each row of ones with a NaN, and of a row of NaN alone:
#   127 rows of 32: nan nan     128 rows of 32: 1.0 -inf     128 rows of 32, without YNNPACK: nan nan
#   min: 128 rows of 32: 1.0 inf     bfloat16: max nan nan, min 1.0 inf
#
# Why it matters: a maximum is how code looks whether all numbers are finite, and how quantisation finds its scale. Codes
# of integers have no NaN, so that a model whose activations are NaN goes on with numbers that look like any other. A
# test with a small array does not see it. Ask jnp.isnan(x).any() as well. A report for arrays of two elements is older:
# openxla/xla issue 21461.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5

cat > "$tmp/seen.py" <<'PY'

import jax
import jax.numpy as jnp
import numpy as np


def extremes(name, rows, dtype="float32", jit=True, axis=1):
    """Of a row (or column) of ones with a NaN, and of one of NaN alone."""
    x = np.ones((rows, 32), np.float32)
    x[:, 3], x[1] = np.nan, np.nan
    reduce = lambda x: getattr(jnp, name)(x, axis=axis)
    x = jnp.asarray(x if axis == 1 else x.T, dtype)
    found = (jax.jit(reduce) if jit else reduce)(x)
    return [float(y) for y in found[:2]]


print(extremes("max", 127), extremes("max", 128), extremes("min", 128))
print([extremes("max", 128, dtype) for dtype in ("bfloat16", "float16")])
print([extremes("min", 128, dtype) for dtype in ("bfloat16", "float16")])
print(extremes("max", 128, jit=False), extremes("max", 128, axis=0))
print(extremes("sum", 128), np.max([1, np.nan]))
PY

cat > "$tmp/wanted" <<'SEEN'
[nan, nan] [1.0, -inf] [1.0, inf]
[[nan, nan], [nan, nan]]
[[1.0, inf], [1.0, inf]]
[1.0, -inf] [1.0, -inf]
[nan, nan] nan
SEEN

run < "$tmp/seen.py" > "$tmp/found"
cat "$tmp/found"
if ! diff "$tmp/wanted" "$tmp/found" >/dev/null; then
    echo "Changed: other maxima are NaN than those described."
    exit 1
fi
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= run < "$tmp/seen.py" > "$tmp/plain"
if grep -q -e 1.0 -e inf "$tmp/plain"; then
    cat "$tmp/plain"
    echo "Changed: without YNNPACK a maximum loses NaN, too."
    exit 1
fi
echo "Without YNNPACK every maximum and minimum is NaN."
