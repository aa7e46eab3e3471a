#!/usr/bin/env bash
# A process can load a serialised JAX executable with Mosaic GPU kernels only after it has imported Mosaic GPU.
#
# Seen 2026-11-28 with jax, jaxlib, jax-cuda13-plugin and jax-cuda13-pjrt 0.12.0.1, and with 0.11.2.
#
# The host code of a Mosaic GPU kernel calls functions of libmosaic_gpu_runtime.so, which lies in the plugin's package. XLA
# finds that library by an environment variable of the process, MOSAIC_GPU_RUNTIME_LIB_PATH, and what sets it is the import of
# jax.experimental.mosaic.gpu (or of Pallas's mosaic_gpu). jax.experimental.serialize_executable, made so that a process need
# not trace anything, imports neither. On an H200 with 0.11.2 deserialize_and_load then raised INTERNAL: Failed to lookup host
# symbol: Failed to materialize symbols, after a line "JIT session error: Symbols not found: [ mosaic_gpu_init_tma_desc,
# mosaic_gpu_launch_kernel ]"; with jax.experimental.mosaic.gpu imported before the same files loaded. This script shows the
# cause, which needs no GPU. Seen:
#   jax, serialize_executable: not set
#   jax.experimental.mosaic.gpu: libmosaic_gpu_runtime.so
#
# Why it matters: a cache of executables seems to be broken, or of another version, in just those processes that have nothing
# to compile; in the one that wrote it, and in tests that compile something first, it works.

set -euo pipefail
source "$(dirname "$0")/common.sh"

packages jax==0.12.0.1 jaxlib==0.12.0.1 jax-cuda13-plugin==0.12.0.1 jax-cuda13-pjrt==0.12.0.1
output=$(
    run <<'PY'
import os
import pathlib

import jax
from jax.experimental import serialize_executable

NAME = "MOSAIC_GPU_RUNTIME_LIB_PATH"


def named() -> str:
    return pathlib.Path(os.environ.get(NAME, "not set")).name


compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
serialize_executable.deserialize_and_load(*serialize_executable.serialize(compiled))
print("jax, serialize_executable:", named())

import jax.experimental.mosaic.gpu

print("jax.experimental.mosaic.gpu:", named())
PY
)
echo "$output"
if [ "$output" != "jax, serialize_executable: not set
jax.experimental.mosaic.gpu: libmosaic_gpu_runtime.so" ]; then
    echo "Changed: the library is named at another time."
    exit 1
fi
