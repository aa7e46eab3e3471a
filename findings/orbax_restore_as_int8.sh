#!/usr/bin/env bash
# Orbax restores float weights into an int8 template without a word, as zeros.
#
# Seen 2026-11-27 with orbax-checkpoint 0.12.8, jax 0.12.0.1, jaxlib 0.12.0.1, numpy 2.5.5.
#
# The dtype of the abstract tree is a request to convert. A shape that differs from the stored one is an error; a
# float array asked for as int8 is cut towards zero, and beyond the range of int8 it is not what astype gives.
# Seen, for the stored float32 values [0.02, -0.9, 1.5, 127.6, 300]:
#   orbax (v1 load, and StandardCheckpointer alike)   [0, 0, 1, 127, 44]   (the 44 on x86-64; not checked below)
#   array.astype(int8)                                [0, 0, 1, 127, 127]
#   a template of another shape                       ValueError
# No warning was given.
#
# Why it matters: where a template asks int8 for a leaf that the checkpoint holds in float (the wrong folder, or a
# quantising step that was left out), the load succeeds. Most weights lie within (-1, 1), so the matrix is zero.
# Compare the dtypes in the checkpoint's metadata with those of the template before restoring.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages orbax-checkpoint==0.12.8 jax==0.12.0.1 jaxlib==0.12.0.1 numpy==2.5.5

run <<'PY'
import os, sys, warnings
import jax, jax.numpy as jnp
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as v1

stored = jnp.array([0.02, -0.9, 1.5, 127.6, 300.0], jnp.float32)
folder = os.path.abspath("checkpoint")
v1.save(folder, {"kernel": stored})


def restore(load, shape, dtype):
    return load(folder, {"kernel": jax.ShapeDtypeStruct(shape, dtype, sharding=stored.sharding)})["kernel"]


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        new = restore(v1.load, (5,), jnp.int8)
    except Exception as error:
        sys.exit(f"Changed: a float checkpoint is no longer restored as int8 ({type(error).__name__}: {error}).")
try:
    restore(v1.load, (4,), jnp.float32)
    sys.exit("Changed: a template of another shape is no longer refused.")
except ValueError:
    pass
folder = os.path.abspath("checkpoint_v0")
with v0.StandardCheckpointer() as checkpointer:
    checkpointer.save(folder, {"kernel": stored})
    checkpointer.wait_until_finished()
    old = restore(checkpointer.restore, (5,), jnp.int8)
print("v1:", new.tolist(), " StandardCheckpointer:", old.tolist(), " astype:", stored.astype(jnp.int8).tolist())

if any("int8" in str(w.message) or "dtype" in str(w.message) for w in caught):
    sys.exit("Changed: the conversion to int8 is now warned of.")
if new.tolist()[:4] != [0, 0, 1, 127] or old.tolist() != new.tolist():
    sys.exit("Changed: float values restored as int8 are no longer cut towards zero.")
PY
