#!/usr/bin/env bash
# A function that one thread traces while another changes JAX's settings stays a mixture, under the old settings' name.
#
# Seen 2026-11-30 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5.
#
# jit keeps traces by the settings that held when tracing began. Settings that jax.config.update changes are every
# thread's at once, so what is traced after the change follows the new ones. The trace is then found under the old ones:
# when they are back, the function goes on as it never would have been traced. Seen, of a function that makes zeros of
# Python's float, traced in a thread while jax_enable_x64 was switched on, and called after it was off again:
#   a function traced before the change    float32
#   the one traced meanwhile               float64
#   the same after clear_cache()           float32
#
# Why it matters: programs are compiled ahead of time by other threads (a warm-up, a service), and a script sets
# jax_default_matmul_precision or jax_enable_x64 on the line after. The contexts jax.enable_x64() and
# jax.default_matmul_precision() are one thread's own and change nothing here.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5

run <<'PY'
import sys
import threading

import jax
import jax.numpy as jnp

began, go_on = threading.Event(), threading.Event()


def zeros(x):
    return x, jnp.zeros(3, float)


def slow(x):
    began.set()
    go_on.wait()
    return zeros(x)


x, before, meanwhile = jnp.ones(3), jax.jit(zeros), jax.jit(slow)
before(x)
thread = threading.Thread(target=meanwhile, args=(x,))
thread.start()
began.wait()
jax.config.update("jax_enable_x64", True)
go_on.set()
thread.join()
jax.config.update("jax_enable_x64", False)

seen = [str(before(x)[1].dtype), str(meanwhile(x)[1].dtype)]
meanwhile.clear_cache()
seen.append(str(meanwhile(x)[1].dtype))
print("traced before the change:  ", seen[0])
print("traced meanwhile:          ", seen[1])
print("the same, traced again:    ", seen[2])
if seen[0] != "float32" or seen[2] != "float32":
    sys.exit("Changed: with 64 bits off again, Python's float is not float32.")
if seen[1] != "float64":
    sys.exit("Changed: what was traced while settings changed follows those that hold when it is called.")
PY
