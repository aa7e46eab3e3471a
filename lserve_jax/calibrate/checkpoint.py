"""A run's state in a file: arrays, and the settings that they belong to."""

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def write_checkpoint(
    path: Path, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
    """Replaces the file at ``path`` at once: what lies there is whole at any time."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, settings=np.array(json.dumps(settings)), **arrays)
    os.replace(temporary, path)


def read_checkpoint(
    path: Path, settings: Mapping[str, Any], names: Sequence[str]
) -> list[np.ndarray]:
    """The arrays of these names that ``write_checkpoint`` wrote.

    Raises ``ValueError`` if the file is none of ours or was written with other settings; the
    message names each that differs.
    """
    try:
        with path.open("rb") as file, np.load(file) as contents:
            saved = json.loads(str(contents["settings"]))
            arrays = [contents[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a checkpoint of this program: {error}") from error
    differing = [
        f"{name} was {saved.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {'; '.join(differing)}; "
            "give those it began with, or another output directory"
        )
    return arrays
