"""Tokens that a checkpoint declares outside ``tokenizer.json``, as transformers adds them.

There are three places. ``added_tokens_decoder`` of ``tokenizer_config.json`` gives tokens by id;
where it exists, the older places do not count. ``added_tokens.json`` gives ids by text. And what
the config calls a special token (``eos_token``, ``additional_special_tokens``) is one, also where
``tokenizer.json`` does not know the text, or has it as ordinary text.
"""

import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

MARKERS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
_REQUIRED = ("bos_token", "eos_token")  # the others may be new
_MOST_DIGITS = len(str(2**31))  # ids are int32 on the device
_FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


def add_tokens(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    numbers: Mapping[str, Any],
    *,
    where: Path,
) -> dict[str, str]:
    """Adds to ``backend`` what ``config`` and ``numbers`` declare; returns the markers' texts.

    ``config`` is ``tokenizer_config.json``, ``numbers`` is ``added_tokens.json`` (id by text),
    both maybe empty; ``where`` is their directory. Tokens with an id come first, by id, then
    markers and further special tokens in the order of the files; a text that the vocabulary has
    keeps its id. A token that is special anywhere stays special.

    Raises ``ValueError`` for a value of a wrong type, for a declared id that the token does not
    get (another token has it, or ids before it are free), and for a BOS or EOS that is no token.
    """
    markers = {
        name: _parse_token(config[name], f"{where}: {name}", special=True)
        for name in MARKERS
        if config.get(name) not in (None, "")
    }
    extra = _extra_tokens(config, where)
    special = {token.content for token in (*markers.values(), *extra)}
    declared = _declared(config, where) or _numbered(numbers, special, where)
    known = {token.content for token in (*extra, *declared.values())}
    for name in _REQUIRED:
        token = markers.get(name)
        if token and token.content not in known and backend.token_to_id(token.content) is None:
            raise ValueError(
                f"{where}: {name}={token.content!r} of the configuration must be a token of "
                "tokenizer.json"
            )

    present = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    wanted = {declared[token_id].content: declared[token_id] for token_id in sorted(declared)}
    for token in markers.values():
        wanted.setdefault(token.content, present.get(token.content, token)).special = True
    for token in extra:
        if token.content not in present:
            wanted.setdefault(token.content, token)
    for content, token in wanted.items():
        token.special = token.special or (content in present and present[content].special)
    backend.add_tokens(list(wanted.values()))
    for token_id, token in declared.items():
        found = backend.token_to_id(token.content)
        if found != token_id:
            raise ValueError(
                f"{where}: {token.content!r} is declared as token {token_id}, but tokenizer.json "
                f"makes it {found}; ids must follow those of its vocabulary and agree with it"
            )
    return {name: token.content for name, token in markers.items()}


def _parse_token(value: Any, field: str, *, special: bool) -> AddedToken:
    """A token written as its text, or as an object with ``content`` and flags.

    ``special`` counts where the flag is missing. Raises ``ValueError`` naming ``field``.
    """
    flags = {} if isinstance(value, str) else value
    content = value if isinstance(value, str) else None
    if isinstance(value, Mapping):
        content = value.get("content")
        flags = {name: value[name] for name in _FLAGS if value.get(name) is not None}
    if not isinstance(content, str) or not all(isinstance(flag, bool) for flag in flags.values()):
        raise ValueError(
            f"{field} must be a text, or an object whose content is a text and whose flags are "
            f"true or false; got {reprlib.repr(value)}"
        )
    return AddedToken(content, **{"special": special, **flags})


def _extra_tokens(config: Mapping[str, Any], where: Path) -> list[AddedToken]:
    key = "extra_special_tokens"  # version 5's name, which wins
    if config.get(key) is None:
        key = "additional_special_tokens"
    values = config.get(key) or []
    if isinstance(values, Mapping):  # by a name of the model's own
        values = list(values.values())
    if not isinstance(values, list):
        raise ValueError(f"{where}: {key} must be a list of tokens, got {reprlib.repr(values)}")
    tokens = [_parse_token(value, f"{where}: {key}", special=True) for value in values]
    for token in tokens:
        token.special = True
    return tokens


def _declared(config: Mapping[str, Any], where: Path) -> dict[int, AddedToken]:
    key = "added_tokens_decoder"
    values = config.get(key) or {}
    # Of so many digits Python makes no integer.
    if not isinstance(values, Mapping) or not all(
        token_id.isdecimal() and len(token_id) <= _MOST_DIGITS for token_id in values
    ):
        raise ValueError(f"{where}: {key} must map token ids to tokens, got {reprlib.repr(values)}")
    return {
        int(token_id): _parse_token(value, f"{where}: {key}[{token_id}]", special=False)
        for token_id, value in values.items()
    }


def _numbered(
    numbers: Mapping[str, Any], special: Iterable[str], where: Path
) -> dict[int, AddedToken]:
    if not all(type(token_id) is int for token_id in numbers.values()):
        raise ValueError(
            f"{where}: added_tokens.json must map texts to token ids, got {reprlib.repr(numbers)}"
        )
    return {
        token_id: AddedToken(text, special=text in special, normalized=text not in special)
        for text, token_id in numbers.items()
    }
