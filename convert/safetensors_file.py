"""One safetensors file: shapes at once, values row by row."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from convert.files import is_file
from convert.mapped_file import FileState

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class SafetensorsFile:
    """Header of a safetensors file, and its rows on demand.

    Raises ``ValueError`` when the file is missing, truncated or holds other than F32, F16 and
    BF16 tensors.
    """

    def __init__(self, path: Path):
        if not is_file(path):
            raise ValueError(f"{path} does not exist")
        self._state = FileState(path)
        try:
            self._file = safe_open(path, framework="numpy")
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in self._file.keys():  # noqa: SIM118 (not a dict: it cannot be iterated)
            header = self._file.get_slice(name)
            if header.get_dtype() not in _DTYPES:
                raise NotImplementedError(
                    f"{path}: {name} is stored as {header.get_dtype()}; "
                    f"supported: {', '.join(_DTYPES)} (quantised checkpoints are not)"
                )
            self.shapes[name] = tuple(header.get_shape())
            self.dtypes[name] = _DTYPES[header.get_dtype()]

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of tensor ``name``, in the dtype it is stored in.

        Raises ``ValueError`` if the file has changed since it was opened.
        """
        self._state.check()
        return self._file.get_slice(name)[start:stop]
