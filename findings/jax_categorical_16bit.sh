#!/usr/bin/env bash
# jax.random.categorical favours low ids when the logits are bfloat16 or float16.
#
# Seen 2026-11-27 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5, on the CPU.
#
# The function draws Gumbel noise in the dtype of the logits and takes the argmax. In bfloat16 the noise has only
# 128 values, the largest 4.84, so among many tokens the top value is shared and the lowest id wins the tie. The
# documentation speaks of a bias only below a probability of 1e-7, in float32.
# Seen, for 32000 equal logits (each id should be drawn equally often) and 2000 draws:
#   float32    largest id drawn 31999    ids below 1000:   2.9 %   (3.1 % is right)
#   float16    largest id drawn  8955    ids below 1000:  61.5 %
#   bfloat16   largest id drawn  1013    ids below 1000: 99.95 %
# and for one logit of 5 among 999 of 0, where the first token has probability 0.129:
#   float32 0.129    float16 0.196    bfloat16 0.691
# mode="high" helps and does not cure: bfloat16 then gives 7.3 % instead of 3.1 %.
#
# Why it matters: a server that samples from the bfloat16 logits of its model draws from another distribution than
# softmax(logits / temperature), while the log-probabilities it computes beside look right. Cast to float32 first.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5

run <<'PY'
import sys
import jax, jax.numpy as jnp

right, low_ids, first = 0.129, {}, {}
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    name = dtype.__name__
    flat = jax.random.categorical(jax.random.key(2), jnp.zeros(32000, dtype), shape=(2000,))
    peak = jnp.zeros(1000, dtype).at[0].set(5)
    peaked = jax.random.categorical(jax.random.key(0), peak, shape=(10000,))
    low_ids[name], first[name] = float((flat < 1000).mean()), float((peaked == 0).mean())
    print(f"{name:9} largest id drawn {int(flat.max()):5}   ids below 1000: {low_ids[name]:7.2%}   "
          f"token of probability {right}: {first[name]:.3f}")

if not (low_ids["float32"] < 0.05 and abs(first["float32"] - right) < 0.02):
    sys.exit("Changed: float32 logits are no longer sampled as softmax says.")
if not (low_ids["bfloat16"] > 0.9 and first["bfloat16"] > 0.5):
    sys.exit("Changed: bfloat16 logits are no longer sampled with a large bias towards low ids.")
if not (low_ids["float16"] > 0.2 and first["float16"] > 0.16):
    sys.exit("Changed: float16 logits are no longer sampled with a bias towards low ids.")
PY
