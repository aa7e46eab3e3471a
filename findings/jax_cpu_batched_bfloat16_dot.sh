#!/usr/bin/env bash
# JAX on a CPU compiles a product of bfloat16 whose batch axis is not the first, and fails when it runs.
#
# Seen 2026-11-28 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5, ml_dtypes 0.5.4.
#
# preferred_element_type=float32 is how products of bfloat16 keep their sums: attention and every grouped product use
# it. With the batch axis first the CPU backend runs it. With the batch axis in the middle of one operand, as when
# groups of a row are multiplied with matrices of their own, and two rows or more, the program compiles and its call ends
# in an error. Arrays that are constants of the program work, since they are multiplied while compiling: a test that
# closes over its arrays sees nothing. Seen, for a of [rows, groups, 64] or [groups, rows, 64] and b of [groups, 64, 40]:
#   grk,gko->gro  bfloat16, 2 rows                  runs
#   rgk,gko->rgo  bfloat16, 1 row                   runs
#   rgk,gko->rgo  bfloat16, 2 rows                  UNIMPLEMENTED: Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32
#   rgk,gko->rgo  bfloat16, 2 rows, constants       runs
#   rgk,gko->rgo  float16 or float32, 2 rows        runs
#
# Why it matters: code for GPUs that is tried with bfloat16 on a CPU fails in one shape and passes in another, and the
# message names neither the operation nor a way out. Put the batch axis first, or multiply float32 copies.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5 ml_dtypes==0.5.4

run <<'PY'
import sys

import jax
import jax.numpy as jnp


def outcome(equation, dtype, rows, constants=False):
    shape = (rows, 3, 64) if equation.startswith("rg") else (3, rows, 64)
    a, b = jnp.ones(shape, dtype), jnp.ones((3, 64, 40), dtype)

    def product(a, b):
        return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)

    program = jax.jit((lambda: product(a, b)) if constants else product)
    arguments = () if constants else (a, b)
    compiled = program.lower(*arguments).compile()  # no error in any case
    try:
        jax.block_until_ready(compiled(*arguments))
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return "runs"


first, middle = "grk,gko->gro", "rgk,gko->rgo"
failing = (middle, jnp.bfloat16, 2)
others = [
    (first, jnp.bfloat16, 2),
    (middle, jnp.bfloat16, 1),
    (middle, jnp.bfloat16, 2, True),
    (middle, jnp.float16, 2),
    (middle, jnp.float32, 2),
]
seen = {case: outcome(*case) for case in (failing, *others)}
for (equation, dtype, rows, *constants), came in seen.items():
    print(f"{equation}  {dtype.__name__:8} {rows} row(s) {'constants' if constants else '         '}  {came}")
if "DotThunk" not in seen[failing]:
    sys.exit("Changed: the product with the batch axis in the middle no longer fails in this way.")
if {seen[case] for case in others} != {"runs"}:
    sys.exit("Changed: one of the others no longer runs.")
PY
