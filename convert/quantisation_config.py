"""What config.json says of quantised weights: checked before a tensor is looked at."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from convert.json_values import json_object

QUANTISED_KEYS = ("quantization_config", "compression_config")
_COMPRESSED = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """How a checkpoint says that it is quantised."""

    method: str
    settings: Mapping[str, Any]
    where: str  # names the file that says so

    @property
    def _schemes(self) -> Mapping[str, Mapping[str, Any]]:
        """Those of compressed-tensors, by name."""
        if self.method != "compressed-tensors":
            return {}
        groups = self.settings.get("config_groups") or {}
        return {name: scheme or {} for name, scheme in groups.items()}

    def check_groups(self, scales: str, count: int, inputs: int) -> None:
        """Raises ``ValueError`` where ``count`` groups of a tensor are of no size that is said."""
        if self.method == "compressed-tensors":
            weights = [scheme.get("weights") or {} for scheme in self._schemes.values()]
            sizes = [x.get("group_size") for x in weights if x.get("strategy") != "block"]
        else:
            sizes = [self.settings.get("group_size")]
            if sizes == [None] or self.settings.get("dynamic"):  # GPTQ: other sizes for some
                return
        if sizes and all(count != -(-inputs // _inputs_of_group(n, inputs)) for n in sizes):
            raise ValueError(
                f"{scales} has {count} groups for {inputs} inputs, and {self.where} says "
                f"group_size={' or '.join(str(n) for n in sizes)}"
            )

    def check_bits(self, codes: str, bits: int) -> None:
        """The same for the bits of a tensor of compressed-tensors."""
        said = [(scheme.get("weights") or {}).get("num_bits") for scheme in self._schemes.values()]
        if said and bits not in said:
            raise ValueError(
                f"{codes} holds codes of {bits} bits, and {self.where} says num_bits="
                f"{' or '.join(str(n) for n in said)}"
            )

    def check_targets(self, modules: Iterable[str]) -> None:
        """Raises ``ValueError`` for a scheme of compressed-tensors whose modules are not there.

        A module that is named must be there, and of a scheme's patterns one must match. Names of
        classes, such as "Linear", are not looked for.
        """
        modules = list(modules)
        for scheme, settings in self._schemes.items():
            targets = settings.get("targets") or []
            patterns = [x.removeprefix("re:") for x in targets if x.startswith("re:")]
            names = [x for x in targets if not x.startswith("re:") and not x[:1].isupper()]
            missing = [name for name in names if name not in modules]
            matched = any(re.match(x, module) for x in patterns for module in modules)
            if len(patterns) == len(targets) and not matched:
                missing += patterns
            if missing:
                raise ValueError(
                    f"{self.where}: config_groups.{scheme} is for {missing[0]!r}, a layer that the "
                    "checkpoint does not have"
                )

    def block_sizes(self) -> list[tuple[int, int]]:
        """Outputs and inputs of a block, wherever it is said; 128 and 128 if it is not."""
        weights = [scheme.get("weights") or {} for scheme in self._schemes.values()]
        said = [
            self.settings.get("weight_block_size"),
            *(x.get("block_structure") for x in weights),
        ]
        return [(block[0], block[1]) for block in [*said, [128, 128]] if _is_block(block)]


def _inputs_of_group(size: int | None, inputs: int) -> int:
    return inputs if size is None or size == -1 else size


def _is_block(block: object) -> TypeGuard[list[int]]:
    return (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    )


def quantisation(config: Mapping[str, Any], where: str) -> Quantisation | None:
    """What ``config`` says of quantised weights; None if they are not.

    Raises ``NotImplementedError`` naming a method or setting that is not read, ``ValueError`` for
    what cannot be meant.
    """
    for key in QUANTISED_KEYS:
        settings = json_object(key, config.get(key), where)
        if settings:
            break
    else:
        return None
    method = settings.get("quant_method") or "a method that it does not name"
    checks = {
        "compressed-tensors": _check_compressed,
        "awq": _check_awq,
        "gptq": _check_gptq,
        "fp8": _check_fp8,
    }
    if method not in checks:
        raise NotImplementedError(
            f"{where}: the checkpoint is quantised by {method} ({key}), which is not supported; "
            f"supported: {', '.join(checks)}, GGUF files, and float32, bfloat16 or float16"
        )
    checks[method](settings, where)
    return Quantisation(method=method, settings=settings, where=where)


def _check_group_size(size: object, where: str) -> None:
    if size is not None and (type(size) is not int or (size < 1 and size != -1)):
        raise ValueError(f"{where}: group_size must be a positive integer or -1, got {size!r}")


def _check_compressed(settings: Mapping[str, Any], where: str) -> None:
    groups = json_object("config_groups", settings.get("config_groups"), where)
    schemes = {name: json_object(f"config_groups.{name}", x, where) for name, x in groups.items()}
    for kind in [settings.get("format"), *(scheme.get("format") for scheme in schemes.values())]:
        if kind is not None and kind not in (*_COMPRESSED, "mixed-precision"):
            raise NotImplementedError(
                f"{where}: format {kind!r} of compressed-tensors is not supported; supported: "
                f"{', '.join(_COMPRESSED)}"
            )
    for name, scheme in schemes.items():
        weights = json_object("weights", scheme.get("weights"), where)
        bits, kind = weights.get("num_bits"), weights.get("type", "int")
        if weights and (bits, kind) not in ((4, "int"), (8, "int"), (8, "float")):
            raise NotImplementedError(
                f"{where}: weights of {bits} bits of type {kind} are not supported; supported: "
                "int of 4 or 8, float of 8"
            )
        _check_group_size(weights.get("group_size"), where)
        targets = scheme.get("targets") or []
        if not isinstance(targets, list) or not all(isinstance(x, str) for x in targets):
            raise ValueError(
                f"{where}: config_groups.{name}.targets must be a list of names, got {targets!r}"
            )
        for target in targets:
            try:
                re.compile(target.removeprefix("re:") if target.startswith("re:") else "")
            except re.error as error:
                raise ValueError(
                    f"{where}: config_groups.{name}.targets has {target!r}, which is no regular "
                    f"expression: {error}"
                ) from None
    if settings.get("sparsity_config") not in (None, {}) and (
        json_object("sparsity_config", settings["sparsity_config"], where).get("format")
        not in (None, "dense")
    ):
        raise NotImplementedError(
            f"{where}: sparse checkpoints (sparsity_config) are not supported"
        )


def _check_fp8(settings: Mapping[str, Any], where: str) -> None:
    block = settings.get("weight_block_size")
    if block is not None and not _is_block(block):
        raise ValueError(f"{where}: weight_block_size must be two positive integers, got {block!r}")
    kind = settings.get("fmt")
    if kind not in (None, "e4m3"):
        raise NotImplementedError(f"{where}: fmt {kind!r} of fp8 is not supported; only 'e4m3' is")


def _check_awq(settings: Mapping[str, Any], where: str) -> None:
    bits, version = settings.get("bits"), settings.get("version") or "gemm"
    if bits != 4:
        raise NotImplementedError(f"{where}: AWQ of {bits} bits is not supported; only 4 is")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise NotImplementedError(
            f"{where}: version {version!r} of AWQ is not supported; only 'gemm' is"
        )
    _check_group_size(settings.get("group_size"), where)


def _check_gptq(settings: Mapping[str, Any], where: str) -> None:
    bits = settings.get("bits")
    if bits not in (4, 8):
        raise NotImplementedError(f"{where}: GPTQ of {bits} bits is not supported; 4 and 8 are")
    kind = settings.get("checkpoint_format") or "gptq"
    if kind not in ("gptq", "gptq_v2"):
        raise NotImplementedError(
            f"{where}: checkpoint_format {kind!r} of GPTQ is not supported; 'gptq' and 'gptq_v2' "
            "are"
        )
    _check_group_size(settings.get("group_size"), where)
    for name, changes in json_object("dynamic", settings.get("dynamic"), where).items():
        other = changes.get("bits", bits) if isinstance(changes, Mapping) else bits
        if other != bits:
            raise NotImplementedError(
                f"{where}: dynamic {name!r} of GPTQ has {other} bits where others have {bits}, "
                "which is not supported"
            )
