"""LoRA adapters in PEFT's format (arXiv 2106.09685): low-rank terms added to weights at load."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from convert.config_json import read_json, refuse_unknown
from convert.safetensors_file import SafetensorsFile

_HANDLED = ("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
_HANDLED_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "lora_ga")
# Which modules were trained and how; the tensors themselves say all that matters at load.
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "target_modules", "task_type"),
)
_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")


@dataclass(frozen=True, kw_only=True, eq=False)
class Delta:
    """``scale * b @ a``, to be added to a weight stored as [out, in]."""

    a: Float32[np.ndarray, "r I"]
    b: Float32[np.ndarray, "O r"]
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return (self.b.shape[0], self.a.shape[1])

    def rows(self, start: int, stop: int) -> Float32[np.ndarray, "rows I"]:
        return (np.float32(self.scale) * self.b[start:stop]) @ self.a


def load_adapter(directory: str | os.PathLike[str]) -> dict[str, Delta]:
    """The deltas of a PEFT LoRA adapter, keyed by the Hugging Face name of the weight.

    ``directory`` holds ``adapter_config.json`` and ``adapter_model.safetensors``. Raises
    ``ValueError`` where a file is missing or malformed, ``NotImplementedError`` naming a setting
    (DoRA, biases, extra modules …) that is more than ``scale * b @ a``.
    """
    directory = Path(directory)
    config_path, weights_path = (
        directory / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(f"adapter {directory} has no {path.name}")
    config = read_json(config_path)
    _refuse_variants(config, str(config_path))
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), int | float) or config[name] <= 0:
            raise ValueError(
                f"{config_path}: {name} must be a positive number, got {config.get(name)!r}"
            )

    weights = SafetensorsFile(weights_path)
    sides: dict[str, dict[str, np.ndarray]] = {}
    strange = []
    for name, shape in weights.shapes.items():
        match = _TENSOR.fullmatch(name)
        if match is None or len(shape) != 2:
            strange.append(f"{name} {shape}")
        else:
            values = weights.rows(name, 0, shape[0]).astype(np.float32)
            sides.setdefault(match["module"], {})[match["side"]] = values
    if strange:
        raise ValueError(
            f"{weights_path} holds tensors that are not LoRA matrices of a linear layer: "
            f"{', '.join(strange)}"
        )
    return {
        f"{module}.weight": _delta(module, pair, config, str(weights_path))
        for module, pair in sides.items()
    }


def _refuse_variants(config: Mapping[str, Any], where: str) -> None:
    if config.get("peft_type") != "LORA":
        raise NotImplementedError(
            f"{where}: peft_type {config.get('peft_type')!r} is not supported; only 'LORA' is"
        )
    if config.get("bias", "none") != "none":
        raise NotImplementedError(f"{where}: bias={config['bias']!r} is not supported")
    # PiSSA, OLoRA, LoftQ and the like also change the base weights.
    if config.get("init_lora_weights") not in _HANDLED_INIT:
        raise NotImplementedError(
            f"{where}: init_lora_weights={config['init_lora_weights']!r} is not supported: "
            "it changes the base weights too"
        )
    refuse_unknown(config, {*_HANDLED, *_HARMLESS, "bias"}, where=where)


def _delta(
    module: str, pair: Mapping[str, np.ndarray], config: Mapping[str, Any], where: str
) -> Delta:
    for side in ("A", "B"):
        if side not in pair:
            raise ValueError(f"{where}: {module} has no lora_{side}")
    rank = _for_module(module, config.get("rank_pattern"), config["r"])
    alpha = _for_module(module, config.get("alpha_pattern"), config["lora_alpha"])
    a, b = pair["A"], pair["B"]
    if a.shape[0] != rank or b.shape[1] != rank:
        raise ValueError(
            f"{where}: {module} has matrices {a.shape} and {b.shape}, but its rank is {rank}"
        )
    return Delta(a=a, b=b, scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _for_module(module: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """PEFT's rule: the first pattern that matches the module's name or a dotted tail of it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
