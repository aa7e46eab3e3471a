#!/usr/bin/env bash
# safetensors describes a float8 tensor to NumPy users, and cannot give them its values.
#
# Seen 2026-11-28 with safetensors 0.8.0, numpy 2.5.5, ml_dtypes 0.5.4.
#
# A file with an F8_E4M3 tensor opens with framework="numpy": the name, the shape and the dtype are there. Reading
# it, whole or in part, ends in an AttributeError of NumPy, which has no float8. BF16, which NumPy does not have
# either, is read: as ml_dtypes.bfloat16. Importing ml_dtypes, which has the float8 types too, changes nothing.
# Seen:
#   BF16     read as bfloat16
#   F8_E4M3  shape [4, 8]; values: AttributeError: module 'numpy' has no attribute 'float8_e4m3fn'
#
# Why it matters: checkpoints of fp8 weights are common, and a loader that asks the library for dtype and shape first
# believes that it can read them. The bytes have to be mapped by oneself: 8 bytes of header length, the header's
# data_offsets, and ml_dtypes.float8_e4m3fn over them, which gives the right numbers.

set -euo pipefail
source "$(dirname "$0")/common.sh"
packages safetensors==0.8.0 numpy==2.5.5 ml_dtypes==0.5.4

run <<'PY'
import json
import struct
import sys

import ml_dtypes
import numpy as np
from safetensors import safe_open

values = np.linspace(-2, 2, 32).reshape(4, 8)
eight, sixteen = values.astype(ml_dtypes.float8_e4m3fn), values.astype(ml_dtypes.bfloat16)
header = json.dumps({
    "eight": {"dtype": "F8_E4M3", "shape": [4, 8], "data_offsets": [0, 32]},
    "sixteen": {"dtype": "BF16", "shape": [4, 8], "data_offsets": [32, 96]},
}).encode()
with open("both.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(header)) + header + eight.tobytes() + sixteen.tobytes())

with safe_open("both.safetensors", framework="numpy") as file:
    read = file.get_tensor("sixteen")
    print(f"BF16     read as {read.dtype}")
    if read.dtype != ml_dtypes.bfloat16 or not np.array_equal(read, sixteen):
        sys.exit("Changed: BF16 is no longer read as ml_dtypes.bfloat16.")
    part = file.get_slice("eight")
    if part.get_dtype() != "F8_E4M3" or list(part.get_shape()) != [4, 8]:
        sys.exit("Changed: the float8 tensor is no longer described.")
    for what, read_it in (("whole", lambda: file.get_tensor("eight")), ("in part", lambda: part[0:2])):
        try:
            read_it()
        except AttributeError as error:
            print(f"F8_E4M3  shape {part.get_shape()}; {what}: AttributeError: {error}")
        else:
            sys.exit(f"Changed: a float8 tensor is read {what}.")

data = open("both.safetensors", "rb").read()
size = int.from_bytes(data[:8], "little")
mapped = np.frombuffer(data, np.uint8, 32, 8 + size).view(ml_dtypes.float8_e4m3fn).reshape(4, 8)
if not np.array_equal(mapped.astype(np.float32), eight.astype(np.float32)):
    sys.exit("Changed: the mapped bytes are not the numbers.")
PY
