#!/usr/bin/env bash
# On a CPU, an executable that JAX took from its persistent compilation cache serialises without its functions.
#
# Seen 2026-11-28 with jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5.
#
# jax.experimental.serialize_executable writes a compiled program for a later process. Where the program was compiled
# in this process that works. Where it came out of the cache of jax_compilation_cache_dir, serialize returns without an
# error, but with fewer bytes; deserialize_and_load takes them; and the first call fails. A process that compiles anew
# gets the same broken bytes: lower(...).compile() returns what jit already has in memory, from the cache, and
# reset_cache() with the cache disabled changes nothing about that. Seen:
#   compiled in this process       15826 bytes, runs
#   from the persistent cache       9221 bytes, NOT_FOUND: Function tanh_reduce_fusion not found (type id: 1)
#
# Why it matters: keeping executables and turning on the persistent cache are each documented ways to a quick start. With
# both, which of two processes comes first decides whether every later one fails. Compile with the cache disabled and with
# an explicit compiler option, which keeps JAX from looking in memory.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5

cat >"$tmp/program.py" <<'PY'
import sys

import jax
import jax.numpy as jnp
from jax.experimental import serialize_executable

jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
x, i = jnp.ones((64, 64)), jnp.arange(7)
program = jax.jit(lambda x, i: jnp.tanh(x[i] * 2 + 1).sum(0) @ x.T)
kept = serialize_executable.serialize(program.lower(x, i).compile())
loaded = serialize_executable.deserialize_and_load(*kept)
try:
    loaded(x, i).block_until_ready()
    print(len(kept[0]), "bytes, runs")
except jax.errors.JaxRuntimeError as error:
    print(len(kept[0]), "bytes,", str(error)[:80])
PY

run <<'PY'
import subprocess
import sys
import tempfile

with tempfile.TemporaryDirectory() as cache:
    said = [
        subprocess.run(
            [sys.executable, "-I", "program.py", cache], capture_output=True, text=True, check=True
        ).stdout.strip()
        for _ in range(2)
    ]
print("compiled in this process:  ", said[0])
print("from the persistent cache: ", said[1])
if not said[0].endswith("runs"):
    sys.exit("Changed: a program compiled in this process no longer runs once it is read back.")
if "not found" not in said[1]:
    sys.exit("Changed: a program from the persistent cache can be serialised.")
PY
