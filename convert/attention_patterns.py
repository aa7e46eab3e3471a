"""Head patterns on disk, in DuoAttention's format (arXiv 2410.10819); ``model/heads.py`` uses them.

A pattern is two files: ``full_attention_heads.tsv``, a gate for every layer and KV head, and
``config.json`` with the sizes that a streaming head had in training. Head shares
(``head_shares.py``) lie beside them, or alone in such a folder.
"""

import importlib.resources
import json
import os
import re
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from lserve_jax.checks import check_path
from lserve_jax.model.heads import HeadPattern

GATES_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
HEAD_SHARES = "head_shares"  # in it, the settings of head shares


def shipped_patterns() -> tuple[str, ...]:
    """Names of the patterns that come with this package, sorted."""
    return tuple(sorted(entry.name for entry in _shipped().iterdir() if entry.is_dir()))


def save_pattern(
    directory: str | os.PathLike[str],
    gates: Float[np.ndarray, "L Hk"],
    settings: Mapping[str, Any],
) -> None:
    """Writes DuoAttention's two files, which ``load_pattern`` reads, into an existing directory.

    ``settings`` go into ``config.json``; ``sink_size`` and ``recent_size`` (tokens) are read back.
    Of a ``config.json`` that is there already, what ``save_head_shares`` wrote stays.

    Raises ``ValueError`` for one that is no JSON object, before anything is written.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    before = read_config(directory) if path.is_file() else {}
    kept = {HEAD_SHARES: before[HEAD_SHARES]} if HEAD_SHARES in before else {}
    np.savetxt(directory / GATES_FILE, gates, fmt="%.9g", delimiter="\t")
    write_config(directory, {**settings, **kept})


def load_pattern(name_or_dir: str | os.PathLike[str]) -> HeadPattern:
    """Reads a DuoAttention pattern: ``full_attention_heads.tsv`` and ``config.json``.

    Args:
      name_or_dir: a directory that holds the two files, itself or in its only subdirectory that
        does (DuoAttention's ``<model>/lr=…/``); else the name of a shipped pattern, in any case
        and with or without the organisation: ``meta-llama/Llama-3.1-8B-Instruct``.

    Raises ``ValueError`` for an unknown name, a missing file, ragged rows, and gates that are not
    finite numbers.
    """
    found = find_folder(name_or_dir, GATES_FILE)
    if found is None:
        raise ValueError(
            f"{os.fspath(name_or_dir)} holds no {GATES_FILE}, nor does a folder directly in it"
        )
    return _read_pattern(*found)


def find_folder(name_or_dir: str | os.PathLike[str], file: str) -> tuple[Traversable, str] | None:
    """The folder with ``file`` that ``name_or_dir`` means, as in ``load_pattern``, and its name.

    None if the directory or the shipped pattern is there and ``file`` is not in it. Raises
    ``ValueError`` if there is neither, and if several folders in the directory hold ``file``.
    """
    check_path("name_or_dir", name_or_dir)
    directory = Path(name_or_dir)
    if directory.is_dir():
        folders = (directory, *sorted(directory.iterdir()))
        found = [folder for folder in folders if (folder / file).is_file()]
        # OmniServe links the files one level up: then the upper ones are meant.
        if found and (found[0] == directory or len(found) == 1):
            return found[0], directory.resolve().name
        if found:
            names = ", ".join(d.name for d in found)
            raise ValueError(f"{directory} holds several patterns, choose one of: {names}")
        if any((folder / GATES_FILE).is_file() for folder in folders):
            return None  # a pattern: a shipped one of the same name is not meant

    wanted = _plain_name(os.fspath(name_or_dir))
    for shipped in shipped_patterns():
        if wanted == _plain_name(shipped):
            folder = _shipped() / shipped
            return (folder, shipped) if (folder / file).is_file() else None
    if directory.is_dir():
        return None
    raise ValueError(
        f"pattern {os.fspath(name_or_dir)!r} is neither a directory nor a shipped pattern; "
        f"shipped: {', '.join(shipped_patterns())}"
    )


def read_config(directory: Traversable) -> dict[str, Any]:
    """The folder's ``config.json``. Raises ``ValueError`` unless it is there and a JSON object."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{directory} holds no {CONFIG_FILE}")
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must be a JSON object")
    return settings


def write_config(directory: Path, settings: Mapping[str, Any]) -> None:
    """Replaces the folder's ``config.json`` at once: two programs keep their settings in it."""
    temporary = directory / f"{CONFIG_FILE}.tmp"
    temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / CONFIG_FILE)


def _shipped() -> Traversable:
    return importlib.resources.files("convert") / "patterns"


def _plain_name(name: str) -> str | None:
    """``org/Model-Name`` or ``Model-Name`` in the form compared; None for any other path."""
    match = re.fullmatch(r"(?:\w[\w.-]*/)?([\w.-]+)", name)
    # Llama 3.1 lost its "Meta-" on the Hub after the pattern had been published.
    return match and match[1].lower().removeprefix("meta-")


def _read_pattern(directory: Traversable, name: str) -> HeadPattern:
    if not (directory / CONFIG_FILE).is_file():
        raise ValueError(f"{directory} holds no {CONFIG_FILE}; a pattern is two files")
    gates = read_matrix(directory / GATES_FILE, "gates")
    training = read_config(directory)
    for key in ("sink_size", "recent_size"):
        if key not in training:
            raise ValueError(f"{directory / CONFIG_FILE} must be a JSON object that has {key!r}")
    return HeadPattern(
        gates=gates,
        name=name,
        sink_size=training["sink_size"],
        recent_size=training["recent_size"],
    )


def read_matrix(path: Traversable, what: str) -> Float64[np.ndarray, "L Hk"]:
    """A row of tab-separated numbers for every layer; an error calls them ``what``.

    Raises ``ValueError`` for an empty file, ragged rows and what is no number.
    """
    # Undecodable bytes become a cell that is not a number, which is then named.
    text = path.read_bytes().decode(errors="replace")
    rows = [line.split("\t") for line in text.rstrip().splitlines()]
    if not rows:
        raise ValueError(f"{path} must have a row for every layer, it is empty")
    matrix = np.empty((len(rows), len(rows[0])))
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{path} must have as many {what} in every layer, "
                f"got {len(rows[0])} in layer 0 and {len(row)} in layer {layer}"
            )
        for head, cell in enumerate(row):
            try:
                matrix[layer, head] = float(cell)
            except ValueError:
                raise ValueError(
                    f"{path} must hold numbers, got {cell!r} at layer {layer}, head {head}"
                ) from None
    return matrix
