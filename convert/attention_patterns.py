"""Head patterns on disk, in DuoAttention's format (arXiv 2410.10819); ``model/heads.py`` uses them.

A pattern is two files: ``full_attention_heads.tsv``, a gate for every layer and KV head, and
``config.json`` with the sizes that a streaming head had in training.
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

_GATES_FILE = "full_attention_heads.tsv"
_CONFIG_FILE = "config.json"


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
    """
    directory = Path(directory)
    np.savetxt(directory / _GATES_FILE, gates, fmt="%.9g", delimiter="\t")
    (directory / _CONFIG_FILE).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_pattern(name_or_dir: str | os.PathLike[str]) -> HeadPattern:
    """Reads a DuoAttention pattern: ``full_attention_heads.tsv`` and ``config.json``.

    Args:
      name_or_dir: a directory that holds the two files, itself or in its only subdirectory that
        does (DuoAttention's ``<model>/lr=…/``); else the name of a shipped pattern, in any case
        and with or without the organisation: ``meta-llama/Llama-3.1-8B-Instruct``.

    Raises ``ValueError`` for an unknown name, a missing file, ragged rows, and gates that are not
    finite numbers.
    """
    check_path("name_or_dir", name_or_dir)
    directory = Path(name_or_dir)
    if directory.is_dir():
        found = [
            d for d in (directory, *sorted(directory.iterdir())) if (d / _GATES_FILE).is_file()
        ]
        # OmniServe links the files one level up: then the upper ones are meant.
        if found and (found[0] == directory or len(found) == 1):
            return _read_pattern(found[0], name=directory.resolve().name)
        if found:
            names = ", ".join(d.name for d in found)
            raise ValueError(f"{directory} holds several patterns, choose one of: {names}")

    wanted = _plain_name(os.fspath(name_or_dir))
    for shipped in shipped_patterns():
        if wanted == _plain_name(shipped):
            return _read_pattern(_shipped() / shipped, name=shipped)
    if directory.is_dir():
        raise ValueError(f"{directory} holds no {_GATES_FILE}, nor does a folder directly in it")
    raise ValueError(
        f"pattern {os.fspath(name_or_dir)!r} is neither a directory nor a shipped pattern; "
        f"shipped: {', '.join(shipped_patterns())}"
    )


def _shipped() -> Traversable:
    return importlib.resources.files("convert") / "patterns"


def _plain_name(name: str) -> str | None:
    """``org/Model-Name`` or ``Model-Name`` in the form compared; None for any other path."""
    match = re.fullmatch(r"(?:\w[\w.-]*/)?([\w.-]+)", name)
    # Llama 3.1 lost its "Meta-" on the Hub after the pattern had been published.
    return match and match[1].lower().removeprefix("meta-")


def _read_pattern(directory: Traversable, *, name: str) -> HeadPattern:
    for needed in (_GATES_FILE, _CONFIG_FILE):
        if not (directory / needed).is_file():
            raise ValueError(f"{directory} holds no {needed}; a pattern is two files")
    gates = _parse_gates((directory / _GATES_FILE).read_bytes(), f"{directory / _GATES_FILE}")
    try:
        training = json.loads((directory / _CONFIG_FILE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{directory / _CONFIG_FILE} is not JSON: {error}") from error
    for key in ("sink_size", "recent_size"):
        if not isinstance(training, dict) or key not in training:
            raise ValueError(f"{directory / _CONFIG_FILE} must be a JSON object that has {key!r}")
    return HeadPattern(
        gates=gates,
        name=name,
        sink_size=training["sink_size"],
        recent_size=training["recent_size"],
    )


def _parse_gates(data: bytes, source: str) -> Float64[np.ndarray, "L Hk"]:
    # Undecodable bytes become a cell that is not a number, which is then named.
    rows = [line.split("\t") for line in data.decode(errors="replace").rstrip().splitlines()]
    if not rows:
        raise ValueError(f"{source} must have a row for every layer, it is empty")
    gates = np.empty((len(rows), len(rows[0])))
    for layer, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{source} must have as many gates in every layer, "
                f"got {len(rows[0])} in layer 0 and {len(row)} in layer {layer}"
            )
        for head, cell in enumerate(row):
            try:
                gates[layer, head] = float(cell)
            except ValueError:
                raise ValueError(
                    f"{source} must hold numbers, got {cell!r} at layer {layer}, head {head}"
                ) from None
    return gates
