"""One safetensors file: shapes at once, values row by row."""

import functools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from convert.files import is_file
from convert.mapped_file import FileState

# What a weight or scale may be stored as.
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What codes of quantised weights may be stored as, beside.
CODES = {"I32": "int32", "I64": "int64", "I8": "int8", "U8": "uint8", "F8_E4M3": "float8_e4m3fn"}


class SafetensorsFile:
    """Header of a safetensors file, and its rows on demand.

    Raises ``ValueError`` when the file is missing, truncated or holds a tensor of a type that is
    not read: F32, F16 and BF16, and where ``codes`` are allowed those of quantised weights.
    """

    def __init__(self, path: Path, *, codes: bool = False):
        if not is_file(path):
            raise ValueError(f"{path} does not exist")
        self._state = FileState(path)
        known = FLOATS | CODES if codes else FLOATS
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in self._file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
            header = self._file.get_slice(name)
            if header.get_dtype() not in known:
                raise NotImplementedError(
                    f"{path}: {name} is stored as {header.get_dtype()}; supported: "
                    f"{', '.join(known)}"
                    + ("" if codes else " (others in checkpoints that say how they are quantised)")
                )
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = known[header.get_dtype()]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of tensor ``name``, in the dtype it is stored in.

        Raises ``ValueError`` if the file has changed since it was opened.
        """
        return self.part(name, start, stop)

    def part(self, name: str, *bounds: int) -> np.ndarray:
        """Rows [start, stop), and columns where two more bounds are given; () of a scalar."""
        self._state.check()
        if not self.shapes[name]:
            return self._file.get_tensor(name)
        rows, columns = slice(*bounds[:2]), slice(*bounds[2:]) if bounds[2:] else slice(None)
        if self.dtypes[name] == "float8_e4m3fn":  # which the library gives to NumPy in no way
            whole = self._mapped_bytes(name).view(jnp.float8_e4m3fn)
            return whole[rows, columns] if bounds[2:] else whole[rows]
        found = self._file.get_slice(name)
        return found[rows, columns] if bounds[2:] else found[rows]

    def _mapped_bytes(self, name: str) -> np.ndarray:
        """A tensor's bytes, one an element, where they lie in the file."""
        size, header = self._header
        begin, _ = header[name]["data_offsets"]
        shape, offset = self.shapes[name], 8 + size + begin
        return np.memmap(self.path, np.uint8, mode="r", offset=offset, shape=shape)

    @functools.cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Its length and content, which the library has checked."""
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return size, json.loads(file.read(size))
