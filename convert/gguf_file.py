"""The GGUF container: metadata and tensor directory, parsed without touching the weights.

Written here because the ``gguf`` library's reader makes an array object of every vocabulary
entry: 4 s for a 49k vocabulary, where this takes a tenth of a second. Dequantisation is the
library's. Format: ggml's ``docs/gguf.md``, versions 2 and 3, little-endian; the layout must be
what llama.cpp requires (see ``docs/formats.md``).
"""

import itertools
import math
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from convert.files import is_file
from convert.gguf_metadata import GGUFMetadata
from convert.mapped_file import FileState

_MAGIC = b"GGUF"
_ALIGNMENT = 32  # unless general.alignment says otherwise
_MAX_DIMS = 4
_MAX_NAME = 64  # bytes, of a tensor's name
_STRING, _ARRAY = 8, 9
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i"},
    **{6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"},
}
_FLOATS = {
    GGMLQuantizationType.F32: np.float32,
    GGMLQuantizationType.F16: np.float16,
    GGMLQuantizationType.BF16: jnp.bfloat16,
}


@dataclass(frozen=True, kw_only=True)
class GGUFTensor:
    """One entry of the tensor directory. ``shape`` is row-major, as NumPy has it."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    raw: np.ndarray  # uint8 [rows, bytes of a row], mapped from the file
    state: FileState  # of the file when it was mapped

    @property
    def is_quantised(self) -> bool:
        return self.kind not in _FLOATS

    def rows(self, index: slice | np.ndarray) -> np.ndarray:
        """The selected rows (elements of a vector): float32 if quantised, else as stored.

        Raises ``NotImplementedError`` for a quantisation that the ``gguf`` library cannot undo,
        ``ValueError`` if the file has changed since it was opened.
        """
        self.state.check()
        if len(self.shape) == 1:
            return self._values(self.raw)[0, index]
        return self._values(self.raw[index])

    def blocks(self, index: slice | np.ndarray) -> np.ndarray:
        """The bytes of the selected rows of a matrix, uint8 [rows, bytes of a row].

        Raises ``ValueError`` if the file has changed since it was opened.
        """
        self.state.check()
        return self.raw[index]

    def _values(self, raw: np.ndarray) -> np.ndarray:
        if not self.is_quantised:
            return raw.view(_FLOATS[self.kind])
        try:
            # As one long row: the library works through 16 rows at a time, which for short rows
            # is mostly overhead. Blocks do not span rows, so the values are the same.
            return dequantize(raw.reshape(1, -1), self.kind).reshape(len(raw), -1)
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{self.state.path}: {self.name} is stored as {self.kind.name}, which cannot be "
                "dequantised"
            ) from error


@dataclass(frozen=True, kw_only=True)
class GGUFFile:
    """``metadata`` maps keys to str, int, float, bool or lists of these."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]  # in file order

    @property
    def typed(self) -> GGUFMetadata:
        """``metadata``, each value checked for its type when it is asked for."""
        return GGUFMetadata(self.metadata, where=str(self.path))


def read_gguf_file(path: Path) -> GGUFFile:
    """Parses the header of a GGUF file and maps its tensors.

    Raises ``ValueError`` if the file is missing, truncated, not GGUF of a known version, or laid
    out otherwise than llama.cpp requires: names and keys once, an alignment that is a power of
    two, every tensor where the one before it ends.
    """
    if not is_file(path):
        raise ValueError(f"{path} does not exist")
    state = FileState(path)
    if path.stat().st_size < 24:
        raise ValueError(f"{path} is not a GGUF file: it has only {path.stat().st_size} bytes")
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    header = _Header(memoryview(data), path)
    if header.take(4) != _MAGIC:
        raise ValueError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()!r}")
    version = header.scalar("<I")
    if version not in (2, 3):
        raise ValueError(f"{path} has GGUF version {version}; versions 2 and 3 can be read")
    try:
        tensor_count, metadata_count = header.scalar("<Q"), header.scalar("<Q")
        metadata = header.metadata(metadata_count)
        directory = [header.entry() for _ in range(tensor_count)]
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is truncated or damaged: its header cannot be read at byte {header.offset}, "
            f"in {header.field}"
        ) from error
    _refuse_repeated(directory, path)
    alignment = _alignment(GGUFMetadata(metadata, where=str(path)))
    tensors = {}
    end = offset = start = _pad(header.offset, alignment)
    for entry in directory:
        if entry.offset != offset - start:
            raise ValueError(
                f"{path}: {entry.name} lies at byte {entry.offset} of the data, but tensors must "
                f"follow each other, so it must lie at {offset - start}"
            )
        end = offset + entry.rows * entry.row_bytes
        if end > len(data):
            raise ValueError(
                f"{path} is truncated: {entry.name} ends at byte {end}, the file has {len(data)}"
            )
        tensors[entry.name] = GGUFTensor(
            name=entry.name,
            shape=entry.shape,
            kind=entry.kind,
            raw=data[offset:end].reshape(entry.rows, entry.row_bytes),
            state=state,
        )
        offset = _pad(end, alignment)
    # A smaller type of the last tensor shows here only.
    if len(data) > offset:
        raise ValueError(
            f"{path}: its tensors end at byte {end}, but the file has {len(data)}; bytes after the "
            "last tensor mean that a tensor is missing or smaller than it was"
        )
    return GGUFFile(path=path, metadata=metadata, tensors=tensors)


def _pad(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _alignment(metadata: GGUFMetadata) -> int:
    alignment = metadata.get("general.alignment", int, _ALIGNMENT)
    if alignment < 1 or alignment & (alignment - 1):
        raise metadata.wrong("general.alignment", "must be a power of two")
    return alignment


class _Entry(NamedTuple):
    """One tensor as the directory describes it."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int  # within the data that follow the header
    rows: int
    row_bytes: int


def _refuse_repeated(directory: Sequence[_Entry], path: Path) -> None:
    names = sorted(entry.name for entry in directory)
    for name, following in itertools.pairwise(names):
        if name == following:
            raise ValueError(f"{path} holds tensor {reprlib.repr(name)} twice")


class _Header:
    """Reads the header's fields one after another; ``field`` names what is being read."""

    def __init__(self, data: memoryview, path: Path):
        self._data = data
        self._path = path
        self.offset = 0
        self.field = "the counts"

    def take(self, size: int) -> bytes:
        taken = bytes(self._data[self.offset : self.offset + size])
        if len(taken) < size:
            raise struct.error("end of file")
        self.offset += size
        return taken

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self._data, self.offset)
        self.offset += struct.calcsize(code)
        return value

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode()

    def metadata(self, count: int) -> dict[str, Any]:
        """``count`` keys with their values."""
        values: dict[str, Any] = {}
        for number in range(count):
            self.field = f"the name of metadata key {number}"
            key = self.string()
            self.field = f"metadata key {reprlib.repr(key)}"
            if key in values:
                raise ValueError(f"{self._path} holds {self.field} twice")
            values[key] = self._value()
        return values

    def _value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self._code(kind))
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind == _STRING:
            return [self.string() for _ in range(count)]
        code = self._code(kind)  # there are no arrays of arrays
        packed = self.take(count * struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code[1]}", packed))

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(
                f"{self._path} is truncated or damaged: {self.field} has values of unknown type "
                f"{kind}"
            )
        return _SCALARS[kind]

    def entry(self) -> _Entry:
        """One entry of the tensor directory, whose shape and type agree."""
        self.field = "the name of a tensor"
        name = self.string()
        self.field = f"tensor {reprlib.repr(name)}"
        if not 1 <= len(name.encode()) <= _MAX_NAME:
            raise ValueError(
                f"{self._path} is truncated or damaged: the name of {self.field} must have 1 to "
                f"{_MAX_NAME} bytes"
            )
        dims = self.scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise ValueError(
                f"{self._path}: {self.field} has {dims} dimensions; it must have 1 to {_MAX_DIMS}"
            )
        shape = tuple(reversed([self.scalar("<Q") for _ in range(dims)]))
        number, offset = self.scalar("<I"), self.scalar("<Q")
        if number not in GGML_QUANT_SIZES:
            raise NotImplementedError(
                f"{self._path}: {self.field} is stored as unknown type {number}"
            )
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or not all(shape):
            raise ValueError(
                f"{self._path}: {self.field} of type {kind.name} has shape {shape}, which is not "
                f"whole blocks of {block} values"
            )
        rows, row_bytes = math.prod(shape[:-1]), shape[-1] // block * block_bytes
        return _Entry(name, shape, kind, offset, rows, row_bytes)
