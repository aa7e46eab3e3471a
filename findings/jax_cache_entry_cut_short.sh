#!/usr/bin/env bash
# An entry of JAX's persistent compilation cache that was cut short stays: every later process warns and compiles again.
#
# Seen 2026-11-28 with jax and jaxlib 0.12.0.1 on a CPU.
#
# An entry is written in place, without a lock unless jax_compilation_cache_max_size is set, and what is there is never written
# again. A process that reads while another one writes is told that the entry ends too early; so is every process after one
# that was killed, or whose disk was full, while it wrote. This script cuts a good entry in half between two processes. Seen
# (the entry's bytes, whether there was a warning):
#   first: whole, no warning
#   second: half, warning
#   third: half, warning
#   fourth, after the entry was removed: whole, no warning
#
# Why it matters: tests that share a cache between processes and turn warnings into errors fail now and then; and a service
# compiles its largest program anew at every start, for ever, with one line in a log to say so.

set -euo pipefail
source "$(dirname "$0")/common.sh"

packages jax==0.12.0.1 jaxlib==0.12.0.1
output=$(
    run <<'PY'
import pathlib
import subprocess
import sys
import tempfile

PROGRAM = """
import sys, warnings, jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))
print(any("Error reading persistent compilation cache entry" in str(w.message) for w in seen))
"""

with tempfile.TemporaryDirectory() as directory:
    cache = pathlib.Path(directory)

    def start(name: str) -> None:
        command = [sys.executable, "-c", PROGRAM, directory]
        told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
        size = "whole" if entry().stat().st_size == whole or not whole else "half"
        print(f"{name}: {size}, {'warning' if told == 'True' else 'no warning'}")

    def entry() -> pathlib.Path:
        return next(path for path in cache.iterdir() if "lambda" in path.name and "atime" not in path.name)

    whole = 0
    start("first")
    whole = entry().stat().st_size
    entry().write_bytes(entry().read_bytes()[: whole // 2])
    start("second")
    start("third")
    entry().unlink()
    start("fourth, after the entry was removed")
PY
)
echo "$output"
if [ "$output" != "first: whole, no warning
second: half, warning
third: half, warning
fourth, after the entry was removed: whole, no warning" ]; then
    echo "Changed: an entry that was cut short is replaced, or read in another way."
    exit 1
fi
