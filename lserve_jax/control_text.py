"""Control tokens that are written out in a conversation stay text.

A chat template and a user write in the same text, and a tokenizer cannot tell who wrote
``<|im_end|>``. So in what the user sent, every text of a control token is replaced by a private
character, its *stand-in*, before the template sees it; nothing else is changed. In the text that
the template makes, the roles are swapped: what the template wrote gets the stand-ins, the user's
words their spelling back. That is encoded by a copy of the tokenizer in which the control tokens
are called by their stand-ins, so that their spelling is text like any other.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

# Stand-ins are the first characters of the last private plane: fonts with icons use other planes.
_FIRST = 0x100000
_MOST = 0xFFFE  # characters of that plane
_MAX_DEPTH = 200  # of lists in lists


class ControlText:
    """The texts of control tokens, and how they are hidden.

    backend: the tokenizer; ``texts`` are added tokens of it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, texts: Sequence[str]):
        if len(texts) > _MOST:
            raise ValueError(f"a tokenizer with {len(texts)} control tokens, more than {_MOST}")
        self._backend = backend
        self._stand_ins = {text: chr(_FIRST + i) for i, text in enumerate(texts)}
        self._swaps = self._stand_ins | {c: text for text, c in self._stand_ins.items()}
        none = r"(?!)"
        self._written = re.compile(_longest_of(texts) or none)
        last = chr(_FIRST + len(texts) - 1)
        self._private = re.compile(f"[{chr(_FIRST)}-{last}]" if texts else none)
        self._either = re.compile(f"{self._written.pattern}|{self._private.pattern}")

    def is_in(self, value: Any) -> bool:
        """Whether a text in ``value``, which may be nested lists and mappings, holds one."""
        return any(self._written.search(text) for text in _texts(value))

    def hide(self, value: Any) -> Any:
        """``value`` with stand-ins in all its texts.

        Raises ``ValueError`` where a text has one of these private characters already.
        """
        for text in _texts(value):
            if found := self._private.search(text):
                raise ValueError(
                    f"U+{ord(found[0]):X} is a private character that stands for a control token, "
                    "so one conversation cannot hold both it and the text of a control token"
                )
        return self._hidden(value)

    def spell_out(self, text: str) -> str:
        """``text`` that a template made of hidden texts, without stand-ins."""
        return self._private.sub(lambda match: self._swaps[match[0]], text)

    def encode(self, text: str) -> list[int]:
        """Token ids of what a template made of hidden texts; BOS and EOS are not added."""
        swapped = self._either.sub(lambda match: self._swaps[match[0]], text)
        return self.renamed.encode(swapped, add_special_tokens=False).ids

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._written.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden(item) for item in value]
        return value

    @cached_property
    def renamed(self) -> tokenizers.Tokenizer:
        """The tokenizer, in which control tokens have their stand-ins for names."""
        names = self._stand_ins
        data = json.loads(self._backend.to_str())
        for token in data["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        # In the model too: it could otherwise make a control token of its letters.
        model = data["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [
                pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))
            ]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        return tokenizers.Tokenizer.from_str(json.dumps(data, ensure_ascii=False))


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """All texts in nested lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        if depth == _MAX_DEPTH:
            raise ValueError(f"messages and tools must not be more than {_MAX_DEPTH} lists deep")
        items = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for item in items:
            yield from _texts(item, depth + 1)


def _longest_of(texts: Sequence[str]) -> str:
    """A pattern of the longest of ``texts`` at a place, with one way to go for each character."""
    following: dict[str, list[str]] = {}
    for text in texts:
        if text:
            following.setdefault(text[0], []).append(text[1:])
    ways = [re.escape(first) + _longest_of(rest) for first, rest in following.items()]
    if not ways:
        return ""
    pattern = ways[0] if len(ways) == 1 and "" not in texts else f"(?:{'|'.join(ways)})"
    return f"{pattern}?" if "" in texts else pattern
