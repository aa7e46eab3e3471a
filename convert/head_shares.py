"""Head shares on disk: what each KV head is worth, and how much of the context it reads.

They lie beside a head pattern, or alone in a folder of the same kind (``attention_patterns.py``):
``head_sensitivity.tsv``, a row for every KV head; ``head_shares.tsv``, a row for every layer; and
the object ``"head_shares"`` in ``config.json``, how both came about.
"""

import os
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64

from convert.attention_patterns import (
    CONFIG_FILE,
    HEAD_SHARES,
    find_folder,
    read_config,
    read_matrix,
    shipped_patterns,
    write_config,
)
from convert.json_values import json_object, positive_int
from lserve_jax.model.head_shares import MISSED_AT, HeadSensitivity

SENSITIVITY_FILE = "head_sensitivity.tsv"
SHARES_FILE = "head_shares.tsv"
# Shares are powers of two, or three times one: a decimal fraction is exact.
_HEADER = ("layer", "head", "streaming", "selecting", *(f"missed_{share}" for share in MISSED_AT))


def save_head_shares(
    directory: str | os.PathLike[str],
    sensitivity: HeadSensitivity,
    shares: Float[np.ndarray, "L Hk"],
    settings: Mapping[str, Any],
) -> None:
    """Writes what ``load_head_shares`` reads into an existing directory.

    ``settings`` become the ``"head_shares"`` of ``config.json``, with the sensitivity's context;
    everything else that is there stays.

    Raises ``ValueError`` for a ``config.json`` that is no JSON object, before anything is written.
    """
    directory = Path(directory)
    config = read_config(directory) if (directory / CONFIG_FILE).is_file() else {}
    columns = (sensitivity.streaming, sensitivity.selecting, *sensitivity.missed)
    lines = ["\t".join(_HEADER)]
    for layer, head in np.ndindex(sensitivity.streaming.shape):
        numbers = (f"{column[layer, head]:.9g}" for column in columns)
        lines.append("\t".join((str(layer), str(head), *numbers)))
    (directory / SENSITIVITY_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    np.savetxt(directory / SHARES_FILE, shares, fmt="%.9g", delimiter="\t")
    record = {**settings, "context": sensitivity.context}
    write_config(directory, {**config, HEAD_SHARES: record})


def has_head_shares(name_or_dir: str | os.PathLike[str]) -> bool:
    """Whether there are head shares under a name or in a directory.

    Raises ``ValueError`` where ``load_head_shares`` does for the name.
    """
    return find_folder(name_or_dir, SHARES_FILE) is not None


def shipped_for(model: str) -> str | None:
    """The shipped pattern with head shares that was measured on a model of this name.

    An alias or a Hugging Face id, in any case; None if there is none.
    """
    try:
        found = find_folder(model, SHARES_FILE)
    except ValueError:  # no pattern of this name
        return None
    return None if found is None or found[1] not in shipped_patterns() else found[1]


def load_head_shares(
    name_or_dir: str | os.PathLike[str],
) -> tuple[HeadSensitivity | None, Float64[np.ndarray, "L Hk"]]:
    """Sensitivity and shares, in checkpoint order; no sensitivity where only shares were written.

    ``name_or_dir`` is a directory or the name of a shipped pattern, as in ``load_pattern``.

    Raises ``ValueError`` for an unknown name, a missing file, what is not as ``save_head_shares``
    writes it, shares outside (0, 1], and files of different shapes.
    """
    found = find_folder(name_or_dir, SHARES_FILE)
    if found is None:
        raise ValueError(
            f"{os.fspath(name_or_dir)} holds no {SHARES_FILE}; "
            "python -m lserve_jax.calibrate --head-shares measures a model"
        )
    directory, name = found
    shares = read_matrix(directory / SHARES_FILE, "shares")
    bad = np.argwhere(~((shares > 0.0) & (shares <= 1.0)))  # NaN too
    if len(bad):
        layer, head = bad[0].tolist()
        raise ValueError(
            f"{directory / SHARES_FILE} must hold shares in (0, 1], "
            f"got {shares[layer, head]} at layer {layer}, head {head}"
        )
    if not (directory / SENSITIVITY_FILE).is_file():
        return None, shares
    config, where = read_config(directory), str(directory / CONFIG_FILE)
    if HEAD_SHARES not in config:
        raise ValueError(f"{where} must have {HEAD_SHARES!r}, the settings of {SHARES_FILE}")
    settings = json_object(HEAD_SHARES, config[HEAD_SHARES], where)
    context = positive_int("head_shares.context", settings.get("context"), where)
    sensitivity = _read_sensitivity(directory / SENSITIVITY_FILE, name, context)
    if shares.shape != sensitivity.streaming.shape:
        raise ValueError(
            f"{directory / SHARES_FILE} is of {shares.shape} (layers, KV heads), "
            f"{SENSITIVITY_FILE} of {sensitivity.streaming.shape}"
        )
    return sensitivity, shares


def _read_sensitivity(path: Traversable, name: str, context: int) -> HeadSensitivity:
    # Undecodable bytes become a cell that is not a number, which is then named.
    lines = path.read_bytes().decode(errors="replace").rstrip().splitlines()
    if not lines or tuple(lines[0].split("\t")) != _HEADER:
        raise ValueError(f"{path} must begin with the columns {', '.join(_HEADER)}")
    heads = len([line for line in lines[1:] if line.split("\t")[0] == "0"])  # of layer 0
    if heads == 0 or len(lines[1:]) % heads:
        raise ValueError(
            f"{path} must have a row for every KV head, as many in every layer; "
            f"got {heads} of layer 0 and {len(lines[1:])} in all"
        )
    values = np.empty((len(lines) - 1, len(_HEADER)))
    for i, line in enumerate(lines[1:]):
        cells, number_of_line = line.split("\t"), i + 2
        if len(cells) != len(_HEADER):
            raise ValueError(
                f"{path} must have {len(_HEADER)} columns, got {len(cells)} "
                f"in line {number_of_line}"
            )
        for column, cell in enumerate(cells):
            try:
                values[i, column] = float(cell)
            except ValueError:
                raise ValueError(
                    f"{path} must hold numbers, got {cell!r} as {_HEADER[column]} "
                    f"in line {number_of_line}"
                ) from None
        if (values[i, 0], values[i, 1]) != divmod(i, heads):
            layer, head = divmod(i, heads)
            raise ValueError(
                f"{path} must have layer {layer}, head {head} in line {number_of_line}, "
                f"got {cells[0]}, {cells[1]}"
            )
    columns = values[:, 2:].T.reshape(len(_HEADER) - 2, -1, heads)
    try:
        return HeadSensitivity(
            streaming=columns[0],
            selecting=columns[1],
            missed=columns[2:],
            name=name,
            context=context,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
