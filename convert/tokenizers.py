"""Tokenizer files in, a ``Tokenizer`` out: Hugging Face directories and GGUF files."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from convert.gguf_file import read_gguf_file
from convert.gguf_tokenizer import build_gguf_tokenizer
from lserve_jax.tokenizer import Tokenizer

_MARKERS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(path: str | os.PathLike[str], *, required: bool = False) -> Tokenizer | None:
    """The tokenizer of a checkpoint: a directory with ``tokenizer.json``, or a ``.gguf`` file.

    A directory may also hold ``tokenizer_config.json`` and ``special_tokens_map.json`` (names of
    the special tokens, chat template), ``chat_template.jinja`` (wins over the config's) and
    ``generation_config.json`` (further end-of-text ids). Whether encoding adds BOS is decided by
    ``tokenizer.json``; ``add_bos_token`` of the config counts only where that file is silent.

    Returns None for a directory without a tokenizer, whose model takes token ids only; with
    ``required`` that is a ``FileNotFoundError``. Raises ``FileNotFoundError`` if ``path`` does
    not exist, ``ValueError`` for damaged or contradictory files, ``NotImplementedError`` for a
    kind of tokenizer that is not read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return _from_gguf(path)
    if (path / "tokenizer.json").is_file():
        return _from_directory(path)
    for name in ("tokenizer.model", "vocab.json"):
        if (path / name).is_file():
            raise NotImplementedError(
                f"{path} has {name} but no tokenizer.json: save the tokenizer once in the "
                "tokenizer.json form (a fast tokenizer's save_pretrained writes it)"
            )
    if required:
        raise FileNotFoundError(f"{path} has no tokenizer.json: its model takes token ids only")
    return None


def _from_directory(path: Path) -> Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path / 'tokenizer.json'} is not a valid tokenizer: {error}") from error
    # Limits for training batches, which some checkpoints leave in the file.
    backend.no_truncation()
    backend.no_padding()

    config = _read_json(path / "special_tokens_map.json") | _read_json(
        path / "tokenizer_config.json"
    )
    markers = {name: _token_text(config[name]) for name in _MARKERS if config.get(name)}
    for name in ("bos_token", "eos_token"):
        if name in markers and backend.token_to_id(markers[name]) is None:
            raise ValueError(
                f"{path}: {name}={markers[name]!r} of the configuration must be a token of "
                "tokenizer.json"
            )
    if backend.post_processor is None and config.get("add_bos_token") and "bos_token" in markers:
        bos = markers["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )

    generation = _read_json(path / "generation_config.json").get("eos_token_id")
    eos_ids = [backend.token_to_id(markers["eos_token"])] if "eos_token" in markers else []
    eos_ids += generation if isinstance(generation, list) else [generation]
    return Tokenizer(
        backend=backend,
        markers=markers,
        eos_token_ids=_distinct(eos_ids),
        chat_template=_chat_template(path, config),
    )


def _from_gguf(path: Path) -> Tokenizer:
    metadata = read_gguf_file(path).metadata
    backend = build_gguf_tokenizer(metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    # End of turn and end of message, where a file knows them, end a completion like EOS.
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return Tokenizer(
        backend=backend,
        markers={name: tokens[number] for name, number in ids.items() if number is not None},
        eos_token_ids=_distinct(ends),
        chat_template=metadata.get("tokenizer.chat_template"),
    )


def _distinct(ids: Sequence[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _token_text(token: str | Mapping[str, Any]) -> str:
    """A special token is written as its text or as a mapping that holds it."""
    return token if isinstance(token, str) else token["content"]


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, for different uses, told apart by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value
