#!/usr/bin/env bash
# safetensors.numpy.save_file writes the wrong numbers for a transposed array, without a word.
#
# Seen 2026-11-27 with safetensors 0.8.0, numpy 2.5.5.
#
# The writer takes the shape of the array and then the memory behind it, in the order in which it lies there; strides
# are not looked at. A transposed view therefore gets the new shape and the old order. The docstring asks for
# contiguous tensors, but nothing checks it, and the file loads.
# Seen, for w = [[0, 1, 2], [3, 4, 5]]:
#   saved w.T                      loaded [[0, 1], [2, 3], [4, 5]]   instead of [[0, 3], [1, 4], [2, 5]]
#   saved w in Fortran order       loaded [[0, 3, 1], [4, 2, 5]]     instead of w
#   saved ascontiguousarray(w.T)   loaded [[0, 3], [1, 4], [2, 5]]   as it should be
#
# Why it matters: kernels of Flax are [in, out], those of Hugging Face checkpoints [out, in], and the obvious exporter
# saves np.asarray(kernel).T. Every shape in the file is right and every matrix is scrambled; a query projection is
# often square, so that not even its shape tells. Wrap each array in np.ascontiguousarray.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages safetensors==0.8.0 numpy==2.5.5

run <<'PY'
import sys
import numpy as np
from safetensors.numpy import load_file, save_file


def trip(array):
    save_file({"w": array}, "w.safetensors")
    return load_file("w.safetensors")["w"]


w = np.arange(6, dtype=np.float32).reshape(2, 3)
try:
    transposed, fortran = trip(w.T), trip(np.asfortranarray(w))
except Exception as error:
    sys.exit(f"Changed: an array that is not contiguous is now refused ({type(error).__name__}: {error}).")
contiguous = trip(np.ascontiguousarray(w.T))
print("w.T, saved and loaded:            ", transposed.tolist())
print("w in Fortran order:               ", fortran.tolist())
print("ascontiguousarray(w.T):           ", contiguous.tolist())

if not np.array_equal(contiguous, w.T):
    sys.exit("Changed: even a contiguous array does not come back as it was saved.")
if transposed.tolist() != [[0, 1], [2, 3], [4, 5]] or fortran.tolist() != [[0, 3, 1], [4, 2, 5]]:
    sys.exit("Changed: arrays that are not contiguous are no longer written in memory order.")
PY
