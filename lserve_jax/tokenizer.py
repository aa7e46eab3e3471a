"""Text to token ids and back, and chat templates; no model and no JAX here."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from lserve_jax.chat_template import ChatTemplate
from lserve_jax.checks import check_bool, check_path, is_integer, is_listing
from lserve_jax.control_text import ControlText

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# The shape of tokens that structure a conversation; not every checkpoint declares them special.
_CONTROL = re.compile(
    r"<[|\N{FULLWIDTH VERTICAL LINE}].*[|\N{FULLWIDTH VERTICAL LINE}]>", re.DOTALL
)
# Marks where the message to be continued ends. Its last space shows whether a template strips it.
_END_OF_FINAL = "END_OF_THE_MESSAGE_TO_CONTINUE "


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A vocabulary with its chat template; made by ``convert.load_tokenizer``.

    ``encode`` and ``decode`` are those of the ``tokenizers`` library; spaces before punctuation
    stay as the model wrote them.
    """

    backend: tokenizers.Tokenizer
    markers: Mapping[str, str]  # text of bos_token, eos_token, unk_token, pad_token if they exist
    eos_token_ids: tuple[int, ...]  # every id that ends a completion; may be empty
    chat_template: str | None  # Jinja source
    tool_template: str | None = None  # takes its place where tools are given

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, or None if there is none."""
        bos = self.markers.get("bos_token")
        return None if bos is None else self.backend.token_to_id(bos)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id; the model's vocabulary may be padded beyond it."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """Ids, by their text, of the tokens that structure a text rather than being part of it.

        These are the special tokens, those that end a completion, and whatever looks like
        ``<|user|>``. Words that a model writes itself, as ``</think>``, may be tokens but are none
        of these.
        """
        added = self.backend.get_added_tokens_decoder()
        return {
            token.content: token_id
            for token_id, token in added.items()
            if token.special or token_id in self.eos_token_ids or _CONTROL.fullmatch(token.content)
        }

    @property
    def has_chat_template(self) -> bool:
        return self.chat_template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. A special token written out in the text becomes its id.

        ``add_special_tokens`` adds BOS or EOS where this tokenizer's files ask for it; pass False
        for the result of ``apply_chat_template``, which has written them already.

        Raises ``ValueError`` for what is no Unicode text, and for a text that the vocabulary cannot
        express.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a str, got {type(text).__name__}")
        check_bool("add_special_tokens", add_special_tokens)
        return _encoded(
            text, lambda text: self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        )

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Raises ``ValueError`` for what is no list of integers, and an id outside the vocabulary.
        """
        check_bool("skip_special_tokens", skip_special_tokens)
        if not is_listing(ids):
            raise ValueError(f"ids={ids!r} must be a list of token ids")
        checked = [self._checked_id(token_id) for token_id in ids]
        return self.backend.decode(checked, skip_special_tokens=skip_special_tokens)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        """A new incremental detokeniser."""
        check_bool("skip_special_tokens", skip_special_tokens)
        return TextStream(self, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, to be encoded with ``add_special_tokens=False``.

        ``messages`` have the strings ``role`` and ``content``; whatever else they hold reaches
        the template too. A message with ``tool_calls`` may have a ``content`` of None or none at
        all. ``add_generation_prompt`` appends what opens the model's answer.
        ``continue_final_message`` ends the text where the last message's content ends, so that the
        model goes on with it. ``tools`` are JSON schemas of functions that the model may call, for
        templates that show them. ``values`` are what else a template asks for by name, such as
        Qwen3's ``enable_thinking``.

        Raises ``ValueError`` if there is no template, a message or tool is malformed, the template
        fails on the conversation (the message then names the template's line) or does not show
        the message to be continued exactly once, and if both options are set.
        """
        check_bool("add_generation_prompt", add_generation_prompt)
        check_bool("continue_final_message", continue_final_message)
        template = self._compiled_chat_template
        if tools is not None:
            _check_tools(tools)
            template = self._compiled_tool_template or template
        if template is None:
            raise ValueError("this tokenizer has no chat template: give the prompt as text")
        _check_messages(messages)
        if continue_final_message:
            messages = _with_marked_end(messages, add_generation_prompt)
        text = template.render(
            {
                **(values or {}),
                "messages": [dict(message) for message in messages],
                "add_generation_prompt": add_generation_prompt,
                "tools": None if tools is None else [dict(tool) for tool in tools],
                "documents": None,
                **self.markers,
            }
        )
        return _cut_at_mark(text, messages) if continue_final_message else text

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> "ChatPrompt":
        """A conversation in which only the template writes control tokens.

        Where the arguments spell one out, it stays text. Of a conversation that spells out none,
        these are the text and the ids of ``apply_chat_template``.

        Raises ``ValueError`` as ``apply_chat_template`` does, and where messages or tools are more
        than 200 lists deep.
        """
        control = self._control_text
        hides = control.is_in([messages, tools, values])
        if hides:
            messages, tools, values = control.hide([messages, tools, values])
        text = self.apply_chat_template(
            messages, add_generation_prompt, continue_final_message, tools=tools, values=values
        )
        if hides:
            return ChatPrompt(control.spell_out(text), lambda: _encoded(text, control.encode))
        return ChatPrompt(text, lambda: self.encode(text, add_special_tokens=False))

    @property
    def plain_backend(self) -> tokenizers.Tokenizer:
        """A copy of the tokenizer that takes the spelling of a control token for text; each has a
        private character for its name."""
        return self._control_text.renamed

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes Hugging Face tokenizer files; ``convert.load_tokenizer`` reads them back.

        These are ``tokenizer.json`` and ``tokenizer_config.json``, and with several end-of-text
        ids ``generation_config.json``, the standard place for a list of them.
        """
        check_path("directory", directory)
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.markers,
        }
        templates = {"default": self.chat_template, "tool_use": self.tool_template}
        if self.tool_template is not None:
            config["chat_template"] = [
                {"name": name, "template": text} for name, text in templates.items() if text
            ]
        elif self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(directory / "tokenizer_config.json", config)
        if len(self.eos_token_ids) > 1:
            generation = {"eos_token_id": list(self.eos_token_ids)}
            _write_json(directory / "generation_config.json", generation)

    @cached_property
    def _compiled_chat_template(self) -> ChatTemplate | None:
        return None if self.chat_template is None else ChatTemplate(self.chat_template)

    @cached_property
    def _compiled_tool_template(self) -> ChatTemplate | None:
        return None if self.tool_template is None else ChatTemplate(self.tool_template)

    @cached_property
    def _control_text(self) -> ControlText:
        return ControlText(self.backend, [*self.control_tokens])

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def _byte_ids(self) -> frozenset[int]:
        """Ids of the byte tokens ``<0x00>`` ... ``<0xFF>`` of SentencePiece, if it has them."""
        ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        letter = ids[ord("A")]
        if letter is None or self.backend.decode([letter]) != "A":
            return frozenset()
        return frozenset(token_id for token_id in ids if token_id is not None)

    def _checked_id(self, token_id: int) -> int:
        if not is_integer(token_id):
            raise ValueError(f"token id {token_id!r} must be an integer")
        if not 0 <= token_id < self.vocab_size:
            raise ValueError(f"token id {token_id} must lie in [0, {self.vocab_size})")
        return int(token_id)


@dataclass(frozen=True)
class ChatPrompt:
    """What a chat template made of a conversation.

    text: as a model's reader would see it.
    encode: gives its token ids. They can differ from those of ``text``, which does not tell who
        wrote a control token. Raises ``ValueError`` as ``Tokenizer.encode`` does.
    """

    text: str
    encode: Callable[[], list[int]]


class TextStream:
    """Turns token ids into text as they are made.

    The texts of all ``step`` calls and the final ``flush``, joined, equal ``decode`` of all ids.
    Text that later tokens could still change is held back.
    """

    # A token's text can depend on its left neighbour (SentencePiece drops the very first space)
    # and a character can take several tokens. So the tokens emitted last are decoded again
    # together with the pending ones; what the pending ones add is the new text.

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skipped_ids = tokenizer._special_ids if skip_special_tokens else frozenset()
        self._emitted: list[int] = []  # tokens of the text given out last
        self._pending: list[int] = []  # tokens whose text is not given out yet

    def step(self, token_id: int) -> str:
        """The text that ``token_id`` completes; empty while a character is incomplete.

        Raises ``ValueError`` for what is no integer or outside the vocabulary.
        """
        token_id = self._tokenizer._checked_id(token_id)
        if token_id in self._skipped_ids:
            return ""
        self._pending.append(token_id)
        # A run of SentencePiece byte tokens is decoded as a whole, and one bad byte spoils all
        # of it: its text is known only when another token has ended the run.
        if token_id in self._tokenizer._byte_ids:
            return ""
        text = self._pending_text()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._emitted, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """At the end: what was held back, with U+FFFD for bytes that are no character."""
        text = self._pending_text()
        self._emitted, self._pending = self._emitted + self._pending, []
        return text

    def _pending_text(self) -> str:
        known = self._decode(self._emitted)
        return self._decode(self._emitted + self._pending)[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.backend.decode(ids, skip_special_tokens=False)


Text = str | Sequence[int] | Int[np.ndarray, " n"]


def text_ids(tokenizer: Tokenizer, text: Text) -> Int32[np.ndarray, " n"]:
    """The tokens of a text, no special ones among them; of a text that is token ids, these."""
    ids = tokenizer.encode(text, add_special_tokens=False) if isinstance(text, str) else text
    return np.asarray(ids, np.int32)


def _encoded(text: str, encode: Callable[[str], list[int]]) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON can hold
        raise ValueError(f"text is no valid Unicode: {error}") from None
    try:
        return encode(text)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"the tokenizer cannot encode this text: {error}") from error


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not _is_list(messages) or len(messages) == 0:
        raise ValueError('messages must be a non-empty list of {"role": ..., "content": ...}')
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'messages[{number}]={message!r} must be a mapping with the strings "role" and '
                '"content"'
            )
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(
                f'messages[{number}]={message!r} must have the strings "role" and "content"; only '
                "with tool_calls may it have no content"
            )


def _with_marked_end(
    messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool
) -> list[Mapping[str, Any]]:
    """For a last message that is to be continued, as transformers does it: mark, render, cut."""
    if add_generation_prompt:
        raise ValueError(
            "continue_final_message=True needs add_generation_prompt=False: the model either goes "
            "on with the last message or begins a new one"
        )
    *before, last = messages
    content = last.get("content")
    if not isinstance(content, str):
        raise ValueError(f"the last message has no text to be continued: content={content!r}")
    return [*before, {**last, "content": content + _END_OF_FINAL}]


def _cut_at_mark(text: str, messages: Sequence[Mapping[str, Any]]) -> str:
    content = messages[-1]["content"].removesuffix(_END_OF_FINAL)
    mark = _END_OF_FINAL.strip()
    end, shown = text.find(mark), text.count(mark)
    if shown > 1:
        raise ValueError(
            f"the chat template shows the last message {shown} times, so it cannot be continued: "
            f"{content[:60]!r}"
        )
    if not shown or content.strip() not in text:
        raise ValueError(
            "the chat template does not show the last message as it is, so it cannot be continued: "
            f"{content[:60]!r}"
        )
    # A template that strips contents would have stripped the end of this one.
    return text[:end] if text.startswith(_END_OF_FINAL, end) else text[:end].rstrip()


def _check_tools(tools: Sequence[Mapping[str, Any]]) -> None:
    if not _is_list(tools) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools must be a list of mappings (JSON schemas), got {tools!r:.200}")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
