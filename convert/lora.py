"""LoRA adapters in PEFT's format (arXiv 2106.09685), with or without DoRA (arXiv 2402.09353).

An adapter adds low-rank terms to weights, and replaces tensors of the model by those that it
brings whole: biases and modules that were trained, a resized or targeted embedding.
"""

import math
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from convert.config_json import refuse_unknown
from convert.files import is_file
from convert.json_values import flag, json_object, number, positive_int, read_json, shortened
from convert.safetensors_file import SafetensorsFile
from lserve_jax.checks import check_path

_HANDLED = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("bias", "modules_to_save"),  # such tensors are in the file, and replace the model's
)
_HANDLED_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
# Which modules were trained and how; the tensors themselves say all that matters at load.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "target_modules", "task_type"),
)
# Known to change nothing at this value alone.
_NEUTRAL = {
    "ensure_weight_tying": False,
    "fan_in_fan_out": False,
    "layer_replication": [],
    "loftq_config": {},
    "lora_bias": False,
    "target_parameters": [],
    "trainable_token_indices": [],
    "use_bdlora": False,
    "use_qalora": False,
}
_MATRIX = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.weight)?"
)
_WHOLE = re.compile(
    r"base_model\.model\.(?P<module>((?!lora_).)+?)(\.base_layer)?\.(?P<kind>weight|bias)"
)


@dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """``scale * b @ a``, to be added to a weight stored as [out, in]."""

    a: Float32[np.ndarray, "r I"]
    b: Float32[np.ndarray, "O r"]
    scale: float
    magnitude: Float32[np.ndarray, " O"] | None  # DoRA: the norms that the sum's rows get


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What an adapter does to one tensor: it is replaced, a low-rank term is added, or both."""

    whole: np.ndarray | None = None
    low_rank: LowRank | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape that the tensor must have, from each part of the change."""
        shapes: list[tuple[int, ...]] = [] if self.whole is None else [self.whole.shape]
        if self.low_rank is not None:
            shapes.append((self.low_rank.b.shape[0], self.low_rank.a.shape[1]))
        return shapes

    def apply(self, block: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the changed tensor; ``block`` is those of the model's."""
        if self.whole is not None:
            block = self.whole[start:stop]
        if self.low_rank is None:
            return block
        low = self.low_rank
        merged = block.astype(np.float32) + (np.float32(low.scale) * low.b[start:stop]) @ low.a
        if low.magnitude is None:
            return merged
        norms = np.linalg.norm(merged, axis=1)
        return merged * (low.magnitude[start:stop] / norms)[:, None]


def load_adapter(directory: str | os.PathLike[str]) -> dict[str, Change]:
    """The changes of a PEFT LoRA adapter, keyed by the Hugging Face name of the tensor.

    ``directory`` holds ``adapter_config.json`` and ``adapter_model.safetensors``. Raises
    ``ValueError`` where a file is missing or malformed, ``NotImplementedError`` naming a setting
    (other kinds of adapters, biases of the low-rank term …) that is more than ``Change`` says.
    """
    check_path("adapter", directory)
    directory = Path(directory)
    config_path, weights_path = (
        directory / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    for path in (config_path, weights_path):
        if not is_file(path):
            raise ValueError(f"adapter {directory} has no {path.name}")
    config = read_json(config_path)
    _refuse_variants(config, str(config_path))
    parts, wholes = _read_tensors(weights_path)
    changes = {name: Change(whole=whole) for name, whole in wholes.items()}
    for module, found in parts.items():
        name = f"{module}.weight"
        low_rank = _low_rank(module, found, config, directory)
        changes[name] = Change(whole=wholes.get(name), low_rank=low_rank)
    return changes


def refuse_missing(
    directory: str | os.PathLike[str], changes: Mapping[str, Change], tensors: Iterable[str]
) -> None:
    """Raises ``ValueError`` where a module that was trained has no tensor in the adapter's file.

    ``tensors`` are the model's, by Hugging Face name: a list may name modules of other models too.
    PEFT warns of a target without matrices and goes on with the model's own weights.
    """
    path = Path(directory) / "adapter_config.json"
    config = read_json(path)
    for key in ("target_modules", "modules_to_save"):
        names = config.get(key)
        if names is None or isinstance(names, str):  # a pattern: what it should fit is not said
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{path}: {key} must be a list of names, got {reprlib.repr(names)}")
        if key == "target_modules" and (
            config.get("exclude_modules") or config.get("layers_to_transform") is not None
        ):  # of what is named some is left out
            continue
        found = [
            name
            for name, change in changes.items()
            if (change.low_rank if key == "target_modules" else change.whole) is not None
        ]
        for name in names:
            if _has_module(tensors, name) and not _has_module(found, name):
                raise ValueError(
                    f"{path}: {key} names {name!r}, but adapter_model.safetensors holds nothing of "
                    "such a module"
                )


def _has_module(tensors: Iterable[str], name: str) -> bool:
    """Whether one belongs to a module whose dotted path has ``name`` in it."""
    return any(f".{name}." in f".{tensor}" for tensor in tensors)


def _read_tensors(
    path: Path,
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Parts of low-rank terms by module and part, and whole tensors by name."""
    file = SafetensorsFile(path)
    parts: dict[str, dict[str, np.ndarray]] = {}
    wholes: dict[str, np.ndarray] = {}
    strange = []
    for name, shape in file.shapes.items():
        matrix, whole = _MATRIX.fullmatch(name), _WHOLE.fullmatch(name)
        if not shape or (matrix is None and whole is None):
            strange.append(f"{name} {shape}")
            continue
        values = file.rows(name, 0, shape[0])
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
        if matrix is not None:
            group, key = parts.setdefault(matrix["module"], {}), matrix["part"]
            values = values.astype(np.float32)
        else:
            assert whole is not None
            group, key = wholes, f"{whole['module']}.{whole['kind']}"
        if key in group:
            raise ValueError(f"{path} holds a tensor twice, again as {name}")
        group[key] = values
    if strange:
        raise ValueError(
            f"{path} holds tensors that are neither LoRA matrices nor a weight or bias of the "
            f"model: {', '.join(shortened(strange))}"
        )
    if not parts and not wholes:
        raise ValueError(f"{path} holds no tensors")
    return parts, wholes


def _refuse_variants(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(
            f"{where}: peft_type {config.get('peft_type')!r} is not supported; only 'LORA' is"
        )
    # PiSSA, OLoRA, LoftQ and the like also change the base weights.
    if config.get("init_lora_weights") not in _HANDLED_INIT:
        raise NotImplementedError(
            f"{where}: init_lora_weights={config['init_lora_weights']!r} is not supported: "
            "it changes the base weights too"
        )
    refuse_unknown(config, {*_HANDLED, *_HARMLESS}, neutral=_NEUTRAL, where=where)
    if config.get("bias") not in (None, "none", "all", "lora_only"):
        raise ValueError(
            f"{where}: bias must be 'none', 'all' or 'lora_only', got {config['bias']!r}"
        )
    for name in ("use_rslora", "use_dora"):
        flag(name, config.get(name), where)
    positive_int("r", config.get("r"), where)
    number("lora_alpha", config.get("lora_alpha"), where)


def _low_rank(
    module: str, found: Mapping[str, np.ndarray], config: Mapping[str, Any], directory: Path
) -> LowRank:
    where = str(directory / "adapter_model.safetensors")
    dora = flag("use_dora", config.get("use_dora"), where)
    embedding = "lora_embedding_A" in found or "lora_embedding_B" in found
    if embedding and dora:
        raise NotImplementedError(f"{where}: {module}: DoRA of an embedding is not supported")
    kind = "lora_embedding_" if embedding else "lora_"
    wanted = {f"{kind}A", f"{kind}B"} | ({"lora_magnitude_vector"} if dora else set())
    for part in sorted(wanted - found.keys()):
        raise ValueError(f"{where}: {module} has no {part}")
    for part in sorted(found.keys() - wanted):
        raise ValueError(f"{where}: {module} has {part}, which the adapter's config has no use for")
    a, b, magnitude = found[f"{kind}A"], found[f"{kind}B"], found.get("lora_magnitude_vector")
    rank, alpha = (
        _for_module(module, config, name, default, directory)
        for name, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: {module} has matrices {a.shape} and {b.shape}, but its rank is {rank}"
        )
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise ValueError(
            f"{where}: {module} has a lora_magnitude_vector {magnitude.shape} for {b.shape[0]} rows"
        )
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if embedding:  # stored as [V, E], where a weight is [out, in]
        a, b = b.T, a.T
    return LowRank(a=a, b=b, scale=scale, magnitude=magnitude)


def _for_module(
    module: str, config: Mapping[str, Any], name: str, default: str, directory: Path
) -> float:
    """PEFT's rule: the first pattern that matches the module's name or a dotted tail of it."""
    where = str(directory / "adapter_config.json")
    check = positive_int if default == "r" else number
    for pattern, value in json_object(name, config.get(name), where).items():
        value = check(f"{name}[{pattern!r}]", value, where)
        try:
            matches = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise ValueError(
                f"{where}: {name} has {pattern!r}, which is no pattern: {error}"
            ) from error
        if matches:
            return value
    return config[default]
