"""The attention settings that one run compares, and how they are written.

    dense
    lserve
    lserve:budget=1024,page=64,logical=16,selected=16,lower=0.5,interval=4
    lserve:pattern=NAME,fraction=0.5
    lserve:pattern=NAME,share=0.125,dense_heads=4
    lserve:pattern=NAME,prefill=block_sparse,prefill_threshold=0.9
    lserve:pattern=NAME,shares=none,control=inverted
    lserve:pattern=NAME,exact=sparse
    dense:prefill_dtype=fp8

What is not given has ``SparsityConfig``'s default. A *control* asks what a pattern's choice of
heads is worth: as many heads stream, but others. ``inverted`` negates the gates, so that the heads
that need their context most stream first; ``random`` shuffles them over the whole model. Both are
about gates, so that head shares, which overrule gates, must be switched off with ``shares=none``.

``exact`` names the source of the drafts that dense attention verifies: ``sparse`` steps, by the
keys beside it, or ``ngram``, which has no other keys but ``prefill_dtype``. That goes with dense
attention too.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from convert.attention_patterns import load_pattern, save_pattern
from lserve_jax.attention.cache import DraftSource
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.engine.options import EngineOptions
from lserve_jax.model.heads import HeadPattern
from pallas_kernels.api import W8A8_KINDS, W8A8Kind

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
    sparsity: SparsityConfig | None  # None: dense, or drafts that are looked up
    control: Control | None = None  # what is done to the gates of ``sparsity.pattern``
    prefill_dtype: W8A8Kind | None = None
    exact: DraftSource | None = None  # whose drafts dense attention verifies; None: no exact mode

    @property
    def options(self) -> dict[str, Any]:
        """What ``LLM`` is given of it beside ``sparsity``."""
        dense = self.sparsity is None and self.exact is None
        exact = {} if self.exact is None else {"exact": True, "draft": self.exact}
        attention = "dense" if dense else "lserve"
        return {"attention": attention, "prefill_dtype": self.prefill_dtype, **exact}


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
    if kind not in ("dense", "lserve"):
        raise ValueError(f"setting {text!r} must be dense, lserve or lserve:key=value,...")
    given = _entries(text, rest) if colon else {}
    control = cast(Control | None, _chosen(text, given, "control", get_args(Control)))
    prefill_dtype = cast(W8A8Kind | None, _chosen(text, given, "prefill_dtype", W8A8_KINDS))
    exact = cast(DraftSource | None, _chosen(text, given, "exact", get_args(DraftSource)))
    unknown = next((key for key in given if key not in _FIELDS), None)
    if unknown is not None:
        known = ", ".join((*_FIELDS, "control", "exact", "prefill_dtype"))
        raise ValueError(f"unknown key {unknown!r} in setting {text!r}; known: {known}")
    if kind == "dense":
        others = [*given, *(["control"] if control else []), *(["exact"] if exact else [])]
        if others:
            raise ValueError(f"{others[0]} in setting {text!r} is for lserve, dense has none")
        return Setting(name=text, sparsity=None, prefill_dtype=prefill_dtype)
    values: dict[str, Any] = {}
    for key, value in given.items():
        name, read = _FIELDS[key]
        try:
            values[name] = read(value)
        except ValueError:
            raise ValueError(
                f"{key}={value} in setting {text!r} must be of type {read.__name__}"
            ) from None
    if control is not None and ("pattern" not in given or given.get("shares") != "none"):
        raise ValueError(
            f"control={control} in setting {text!r} needs a pattern to change and shares=none: "
            "head shares overrule gates"
        )
    if exact == "ngram" and (given or control):
        raise ValueError(
            f"exact=ngram in setting {text!r} has no sparse steps, so that it takes no "
            f"{next(iter(given), 'control')}"
        )
    try:
        sparsity = None if exact == "ngram" else SparsityConfig(**values)
        setting = Setting(
            name=text,
            sparsity=sparsity,
            control=control,
            prefill_dtype=prefill_dtype,
            exact=exact,
        )
        EngineOptions(sparsity=sparsity, **setting.options)
        if sparsity is not None and sparsity.pattern is not None:
            load_pattern(sparsity.pattern)
    except ValueError as error:
        raise ValueError(f"setting {text!r}: {error}") from None
    return setting


def _entries(text: str, rest: str) -> dict[str, str]:
    """What ``rest`` of a setting gives, by key."""
    given: dict[str, str] = {}
    for entry in rest.split(","):
        key, equals, value = entry.partition("=")
        if not equals or not value:
            raise ValueError(f"{entry!r} in setting {text!r} must be key=value")
        if key in given:
            raise ValueError(f"{key} is given twice in setting {text!r}")
        given[key] = value
    return given


def _chosen(text: str, given: dict[str, str], key: str, choices: Sequence[str]) -> str | None:
    """Takes a key out of ``given``; None if it is not there."""
    value = given.pop(key, None)
    if value is not None and value not in choices:
        known = " or ".join(choices)
        raise ValueError(f"{key}={value} in setting {text!r} must be {known}")
    return value


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
