"""The attention settings that one run compares, and how they are written.

    dense
    lserve
    lserve:budget=1024,page=64,logical=16,selected=16,lower=0.5,interval=4
    lserve:pattern=NAME,fraction=0.5
    lserve:pattern=NAME,share=0.125,dense_heads=4
    lserve:pattern=NAME,prefill=block_sparse,prefill_threshold=0.9
    lserve:pattern=NAME,shares=none,control=inverted

What is not given has ``SparsityConfig``'s default. A *control* asks what a pattern's choice of
heads is worth: as many heads stream, but others. ``inverted`` negates the gates, so that the heads
that need their context most stream first; ``random`` shuffles them over the whole model. Both are
about gates, so that head shares, which overrule gates, must be switched off with ``shares=none``.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np

from convert.attention_patterns import load_pattern, save_pattern
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.model.heads import HeadPattern

Control = Literal["inverted", "random"]

# What a key sets, and how its value is read.
_FIELDS = {
    "budget": ("token_budget", int),
    "page": ("page_size", int),
    "logical": ("logical_page_size", int),
    "selected": ("selected_page_size", int),
    "lower": ("lower_bound_weight", float),
    "interval": ("reuse_interval", int),
    "pattern": ("pattern", str),
    "fraction": ("streaming_fraction", float),
    "shares": ("head_shares", str),
    "share": ("budget_share", float),
    "dense_heads": ("dense_heads", int),
    "prefill": ("prefill", str),
    "prefill_threshold": ("prefill_threshold", float),
    "prefill_density": ("prefill_density", float),
    "prefill_min_tokens": ("prefill_min_tokens", int),
    "prefill_sink": ("prefill_sink", int),
    "prefill_local": ("prefill_local", int),
    "decode_sink": ("decode_sink", int),
    "decode_local": ("decode_local", int),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to attend, under the name by which results mention it."""

    name: str
    sparsity: SparsityConfig | None  # None: dense
    control: Control | None = None  # what is done to the gates of ``sparsity.pattern``


def parse_settings(texts: Sequence[str]) -> list[Setting]:
    """Reads settings in the form above; their names are the texts.

    Raises ``ValueError`` for no setting, one given twice, an unknown key and a value that does not
    fit.
    """
    if not texts:
        raise ValueError("there must be at least one setting to run, such as dense")
    for text in texts:
        if texts.count(text) > 1:
            raise ValueError(f"setting {text!r} is given twice")
    return [_parse_setting(text) for text in texts]


def _parse_setting(text: str) -> Setting:
    kind, colon, rest = text.partition(":")
    if kind == "dense" and not colon:
        return Setting(name=text, sparsity=None)
    if kind != "lserve":
        raise ValueError(f"setting {text!r} must be dense, lserve or lserve:key=value,...")
    values, control = {}, None
    for entry in rest.split(",") if colon else ():
        key, equals, value = entry.partition("=")
        if not equals or not value:
            raise ValueError(f"{entry!r} in setting {text!r} must be key=value")
        if key in values or (key == "control" and control is not None):
            raise ValueError(f"{key} is given twice in setting {text!r}")
        if key == "control":
            if value not in get_args(Control):
                known = " or ".join(get_args(Control))
                raise ValueError(f"control={value} in setting {text!r} must be {known}")
            control = cast(Control, value)
            continue
        if key not in _FIELDS:
            known = ", ".join((*_FIELDS, "control"))
            raise ValueError(f"unknown key {key!r} in setting {text!r}; known: {known}")
        read = _FIELDS[key][1]
        try:
            values[key] = read(value)
        except ValueError:
            raise ValueError(
                f"{key}={value} in setting {text!r} must be of type {read.__name__}"
            ) from None
    if control is not None and ("pattern" not in values or values.get("shares") != "none"):
        raise ValueError(
            f"control={control} in setting {text!r} needs a pattern to change and shares=none: "
            "head shares overrule gates"
        )
    try:
        sparsity = SparsityConfig(**{_FIELDS[key][0]: value for key, value in values.items()})
        if sparsity.pattern is not None:
            load_pattern(sparsity.pattern)
    except ValueError as error:
        raise ValueError(f"setting {text!r}: {error}") from None
    return Setting(name=text, sparsity=sparsity, control=control)


def control_pattern(pattern: HeadPattern, control: Control, seed: int) -> HeadPattern:
    """The pattern with other heads at the end that streams; the gates are the same numbers.

    ``seed`` decides the shuffle of ``random``.
    """
    if control == "inverted":
        gates = 1.0 - pattern.gates
    else:
        gates = np.random.default_rng(seed).permuted(pattern.gates.ravel())
        gates = gates.reshape(pattern.gates.shape)
    return dataclasses.replace(pattern, gates=gates, name=f"{pattern.name}-{control}")


def resolve_sparsity(setting: Setting, directory: Path, seed: int) -> SparsityConfig | None:
    """What to give ``LLM``. A control's gates are written below ``directory``, and kept."""
    sparsity = setting.sparsity
    if sparsity is None or sparsity.pattern is None or setting.control is None:
        return sparsity
    pattern = control_pattern(load_pattern(sparsity.pattern), setting.control, seed)
    directory = directory / pattern.name
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {"sink_size": pattern.sink_size, "recent_size": pattern.recent_size}
    save_pattern(directory, pattern.gates, sizes)
    return dataclasses.replace(sparsity, pattern=str(directory))
