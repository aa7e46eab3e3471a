"""Tokenizer files in, a ``Tokenizer`` out: Hugging Face directories and GGUF files."""

import os
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import tokenizers

from convert.added_tokens import MARKERS, add_tokens
from convert.files import is_file
from convert.gguf_file import read_gguf_file
from convert.gguf_tokenizer import build_gguf_tokenizer, end_token_ids
from convert.json_values import read_json
from lserve_jax.checks import check_path
from lserve_jax.tokenizer import Tokenizer

_MOST_IDS = 1 << 24  # some sixty times the largest vocabulary of a published model


@overload
def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer | None: ...
@overload
def load_tokenizer(path: str | os.PathLike[str], *, required: Literal[True]) -> Tokenizer: ...
def load_tokenizer(path: str | os.PathLike[str], *, required: bool = False) -> Tokenizer | None:
    """The tokenizer of a checkpoint: a directory with ``tokenizer.json``, or a ``.gguf`` file.

    A directory may also hold ``tokenizer_config.json``, ``special_tokens_map.json`` and
    ``added_tokens.json`` (names of the special tokens, further tokens, chat template),
    ``chat_template.jinja`` (wins over the config's) and ``generation_config.json`` (further
    end-of-text ids). Whether encoding adds BOS is decided by ``tokenizer.json``;
    ``add_bos_token`` of the config counts only where that file is silent.

    Returns None for a directory without a tokenizer, whose model takes token ids only; with
    ``required`` that is a ``ValueError``. Raises ``FileNotFoundError`` if ``path`` does not exist,
    ``ValueError`` for damaged or contradictory files, ``NotImplementedError`` for a kind of
    tokenizer that is not read.
    """
    check_path("path", path)
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        return _from_gguf(path)
    if is_file(path / "tokenizer.json"):
        return _from_directory(path)
    for name in ("tokenizer.model", "vocab.json"):
        if is_file(path / name):
            raise NotImplementedError(
                f"{path} has {name} but no tokenizer.json: save the tokenizer once in the "
                "tokenizer.json form (a fast tokenizer's save_pretrained writes it)"
            )
    if required:
        raise ValueError(f"{path} has no tokenizer.json: its model takes token ids only")
    return None


def _refuse_huge_ids(path: Path) -> None:
    """Raises ``ValueError`` for a token id that no vocabulary has.

    The library makes a table as long as the greatest id: gigabytes for one wrong number.
    """
    model = read_json(path).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict):  # a list: ids are places
        return
    for token, number in vocab.items():
        if isinstance(number, int) and number >= _MOST_IDS:
            raise ValueError(
                f"{path}: token {reprlib.repr(token)} has id {number}, "
                f"ids must be below {_MOST_IDS}"
            )


def _from_directory(path: Path) -> Tokenizer:
    _refuse_huge_ids(path / "tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path / 'tokenizer.json'} is not a valid tokenizer: {error}") from error
    # Limits for training batches, which some checkpoints leave in the file.
    backend.no_truncation()
    backend.no_padding()

    config, numbers = _read_config(path)
    markers = add_tokens(backend, config, numbers, where=path)
    adds_bos = config.get("add_bos_token")
    if adds_bos not in (None, True, False):
        raise ValueError(f"{path}: add_bos_token must be true or false, got {adds_bos!r:.100}")
    if backend.post_processor is None and adds_bos and "bos_token" in markers:
        bos = markers["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    eos = backend.token_to_id(markers["eos_token"]) if "eos_token" in markers else None
    eos_ids = [*([] if eos is None else [eos]), *_generation_ends(path)]
    templates = _chat_templates(path, config)
    return Tokenizer(
        backend=backend,
        markers=markers,
        eos_token_ids=tuple(dict.fromkeys(eos_ids)),
        chat_template=templates.get("default"),
        tool_template=templates.get("tool_use"),
    )


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tokenizer's settings and the ids of added_tokens.json, each from where it counts.

    As in transformers: a config with ``added_tokens_decoder`` stands alone, but for markers that
    it does not name; to an older one ``special_tokens_map.json`` and ``added_tokens.json`` add.
    """
    config = _read_json(path / "tokenizer_config.json")
    special = _read_json(path / "special_tokens_map.json")
    if "added_tokens_decoder" in config:
        return {name: special[name] for name in MARKERS if name in special} | config, {}
    return config | special, _read_json(path / "added_tokens.json")


def _generation_ends(path: Path) -> Sequence[int]:
    """The end tokens that generation_config.json names."""
    value = _read_json(path / "generation_config.json").get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < 2**31:
            raise ValueError(
                f"{path / 'generation_config.json'}: eos_token_id must be a token id or a list of "
                f"them, got {reprlib.repr(value)}"
            )
    return ids


def _from_gguf(path: Path) -> Tokenizer:
    file = read_gguf_file(path)
    metadata = file.typed
    backend = build_gguf_tokenizer(file.metadata, where=str(path))
    tokens = file.metadata["tokenizer.ggml.tokens"]
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id", int) for name, key in names.items()}
    return Tokenizer(
        backend=backend,
        markers={name: tokens[number] for name, number in ids.items() if number is not None},
        eos_token_ids=end_token_ids(metadata),
        chat_template=metadata.get("tokenizer.chat_template", str),
        tool_template=metadata.get("tokenizer.chat_template.tool_use", str),
    )


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The templates by name; one alone is "default"."""
    file = path / "chat_template.jinja"
    if is_file(file):
        return {"default": _read_text(file)}
    given = config.get("chat_template")
    if given is None:
        return {}
    entries = given if isinstance(given, list) else [{"name": "default", "template": given}]
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("template"), str):
            raise ValueError(
                f"{path}: chat_template must be a text or a list of objects with the texts name "
                f"and template, got {reprlib.repr(given)}"
            )
    return {str(entry.get("name")): entry["template"] for entry in entries}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no part of a prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    """The object in ``path``; empty if there is no such file."""
    return read_json(path) if is_file(path) else {}
