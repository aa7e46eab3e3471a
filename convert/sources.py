"""What a model's name means: an alias, a path, or an id on the Hugging Face Hub."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.artefacts import SMOLLM2_135M_INSTRUCT, fetch
from lserve_jax.checks import check_path

_ADAPTERS = Path(__file__).parent / "adapters"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_HUB_FILES = ("*.json", "*.jinja", "model*.safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a model's files are, and what to change while loading them."""

    name: str  # as the user gave it
    path: Path  # a checkpoint directory or a .gguf file
    adapter: Path | None = None  # a PEFT LoRA adapter to merge
    overrides: Mapping[str, Any] = field(default_factory=dict)  # attributes of config.json


@dataclass(frozen=True, kw_only=True)
class _Alias:
    adapter: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


_ALIASES = {
    "smollm2-135m-instruct": _Alias(),
    "smollm2-135m-instruct-32k": _Alias(
        adapter=_ADAPTERS / "smollm2-135m-instruct-32k",
        overrides={"rope_theta": 2e6, "max_position_embeddings": 32768},
    ),
}


def resolve(model: str | os.PathLike[str], *, progress: bool = False) -> ModelSource:
    """Finds ``model``, fetching it first if need be.

    In this order: an alias (``smollm2-135m-instruct``, ``smollm2-135m-instruct-32k``), a path
    that exists (Hugging Face or Orbax directory, ``.gguf`` file), a Hugging Face id such as
    ``owner/name``. Downloads show their progress on stderr if ``progress``.

    Raises ``ValueError`` if there is no such model or it cannot be fetched, ``TypeError`` for what
    is neither text nor a path.
    """
    check_path("model", model)
    name = os.fspath(model)
    if name in _ALIASES:
        alias = _ALIASES[name]
        return ModelSource(
            name=name,
            path=fetch(SMOLLM2_135M_INSTRUCT, progress=progress),
            adapter=alias.adapter,
            overrides=alias.overrides,
        )
    if Path(name).exists():
        return ModelSource(name=name, path=Path(name))
    if _HUB_ID.fullmatch(name) and not name.endswith((".gguf", ".safetensors")):
        return ModelSource(name=name, path=_from_hub(name, progress=progress))
    raise ValueError(
        f"model {name!r} is neither a path that exists, nor a Hugging Face id (owner/name), nor "
        f"one of the aliases {', '.join(_ALIASES)}"
    )


def _from_hub(model_id: str, *, progress: bool) -> Path:
    """Snapshot of a repository, from the hub's own cache where that has it."""
    try:
        # Here and not above: an optional dependency.
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    except ImportError as error:
        raise ValueError(
            f"model {model_id!r} is not a path that exists; to fetch it from the Hugging Face Hub "
            "install the extra 'hub': pip install 'lserve-jax[hub]'"
        ) from error
    (enable_progress_bars if progress else disable_progress_bars)()
    try:
        return Path(snapshot_download(model_id, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError) as error:  # the library's errors derive from these
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model {model_id!r} is not a path that exists and could not be fetched from the "
            f"Hugging Face Hub: {reason}"
        ) from error
