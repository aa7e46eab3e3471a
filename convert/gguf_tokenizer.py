"""The tokenizer that a GGUF file describes, rebuilt as a ``tokenizers.Tokenizer``.

GGUF stores a vocabulary and, by name, how text is cut before it is merged; the same names mean
the same rules here. Two kinds exist among Llama-family files: byte-level BPE
(``tokenizer.ggml.model = "gpt2"``: tokens, merges, and the name of a splitting rule) and
SentencePiece BPE (``"llama"``: tokens with scores, no merges).
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from convert.gguf_metadata import GGUFMetadata

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

# Texts that end a completion in llama.cpp, whatever else a file says of them. Published files
# often name one end token only, and not that which closes a turn.
_END_TEXTS = frozenset(
    (
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]"),
        *("<end_of_utterance>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>"),
        *("<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
    )
)
# Likewise of a code model that would go on with padding, another repository or another file.
_FILL_IN_TEXTS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Texts that end nothing in a vocabulary that has all of the others: there they end a part.
_NO_ENDS = {
    "<|end|>": (
        {"<|return|>", "<|call|>"},
        {"<|flush|>", "<|call|>"},
        {"<|flush|>", "<|calls|>"},
        {"<|return|>", "<|calls|>"},
    ),
    "</s>": ({"<|tool_response>"},),
}


def end_token_ids(metadata: GGUFMetadata) -> tuple[int, ...]:
    """Ids of all tokens that end a completion, as llama.cpp takes them; ``eos_token_id`` first.

    These are the end tokens that the metadata name (EOS, end of turn, end of message, and those
    of fill-in-the-middle) and the tokens of well-known texts. Raises ``ValueError`` for metadata
    of a wrong type. Source: llama.cpp, ``llama-vocab.cpp``, its list of end-of-generation tokens.
    """
    tokens = metadata.get_list("tokenizer.ggml.tokens", str) or []
    found = {token: number for number, token in enumerate(tokens) if token in _END_TEXTS}
    for text, conditions in _NO_ENDS.items():
        if any(condition <= found.keys() for condition in conditions):
            found.pop(text, None)
    ids = [metadata.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot", "eom")]
    ids += found.values()
    for name, texts in _FILL_IN_TEXTS.items():
        token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", int)
        named = [number for number, token in enumerate(tokens) if token in texts]
        ids += named[:1] if token_id is None else [token_id]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def build_gguf_tokenizer(values: Mapping[str, Any], *, where: str = "GGUF") -> Tokenizer:
    """A ``tokenizers.Tokenizer`` that splits, merges and decodes as the metadata ``values`` say.

    ``values`` are those of ``convert.gguf_file``; ``where`` names their file in messages. BOS and
    EOS are added by ``encode(..., add_special_tokens=True)`` where ``add_bos_token`` /
    ``add_eos_token`` ask for it; without these keys SentencePiece and Llama 3 vocabularies begin
    with BOS, others do not.

    Raises ``ValueError`` for contradictory metadata and ``NotImplementedError`` for a tokenizer
    model, splitting rule or normalisation that would not be reproduced exactly.
    """
    metadata = GGUFMetadata(values, where=where)
    model = metadata.get("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise NotImplementedError(
            f"{where}: tokenizer.ggml.model={model!r} is not supported; gpt2 (byte-level BPE) and "
            "llama (SentencePiece BPE) are"
        )
    tokens, types = _vocabulary(metadata)
    if model == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
        adds_bos = metadata.get("tokenizer.ggml.pre", str) in _LLAMA3_NAMES
    else:
        tokenizer = _sentencepiece_bpe(metadata, tokens, types)
        adds_bos = True
    bos = _marker(metadata, tokens, "bos", default=adds_bos)
    eos = _marker(metadata, tokens, "eos", default=False)
    for kind, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, its_kind in zip(tokens, types, strict=True)
                if its_kind == kind
            ]
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*(f"{token}:0" for token, _ in bos), "$A:0", *(f"{token}:0" for token, _ in eos)],
        special_tokens=bos + eos,
    )
    return tokenizer


def _vocabulary(metadata: GGUFMetadata) -> tuple[list[str], list[int]]:
    """Tokens and their types; every end token is a control token, whatever the file calls it."""
    tokens = metadata.get_list("tokenizer.ggml.tokens", str)
    if not tokens:
        raise ValueError(f"{metadata.where}: tokenizer.ggml.tokens is missing or empty")
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{metadata.where}: tokenizer.ggml.tokens repeats {len(tokens) - len(set(tokens))} of "
            f"its {len(tokens)} tokens; every token must be unique"
        )
    for key in metadata.values:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            token_id = metadata.get(key, int)
            if token_id is not None and not 0 <= token_id < len(tokens):
                raise metadata.wrong(key, f"must lie in [0, {len(tokens)})")
    types = metadata.get_list("tokenizer.ggml.token_type", int)
    if types is None:
        types = [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(
            f"{metadata.where}: tokenizer.ggml.token_type has {len(types)} entries, "
            f"tokenizer.ggml.tokens has {len(tokens)}; they must agree"
        )
    ends = set(end_token_ids(metadata))
    return tokens, [_CONTROL if i in ends else kind for i, kind in enumerate(types)]


def _marker(
    metadata: GGUFMetadata, tokens: Sequence[str], name: str, *, default: bool
) -> list[tuple[str, int]]:
    """The BOS or EOS token with its id if encoding adds it, else nothing."""
    if not metadata.get(f"tokenizer.ggml.add_{name}_token", bool, default):
        return []
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", int)
    if token_id is None:
        raise ValueError(
            f"{metadata.where}: the tokenizer adds {name.upper()} but "
            f"tokenizer.ggml.{name}_token_id is missing"
        )
    return [(tokens[token_id], token_id)]


# --- byte-level BPE ---------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")


def _split_like_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split_by(numbers: str) -> pre_tokenizers.PreTokenizer:
    """The rule of Llama 3 and Qwen 2, which differ in how many digits stay together."""
    pattern = "|".join((_CONTRACTIONS, _WORDS, numbers, _PUNCTUATION, _SPACES))
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level_bpe(metadata: GGUFMetadata, tokens: Sequence[str]) -> Tokenizer:
    # Files older than the key, and those that say "default", name no rule: "gpt2" is then all
    # that is known of the tokenizer, so it is GPT-2's.
    rule = metadata.get("tokenizer.ggml.pre", str, "default")
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    merges = _merges(metadata, vocabulary)
    # Llama 3 keeps a word that is a token whole even where its merges would not reach it.
    whole_words = rule in _LLAMA3_NAMES
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    tokenizer.decoder = decoders.ByteLevel()
    if rule in ("gpt-2", "default"):
        tokenizer.pre_tokenizer = _split_like_gpt2()
    elif rule == "smollm":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), _split_like_gpt2()]
        )
    elif rule in _LLAMA3_NAMES:
        tokenizer.pre_tokenizer = _split_by(numbers=r"\p{N}{1,3}")
    elif rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _split_by(numbers=r"\p{N}")
    else:
        known = ("gpt-2", "default", "smollm", *_LLAMA3_NAMES, "qwen2")
        raise NotImplementedError(
            f"{metadata.where}: tokenizer.ggml.pre={rule!r} is not supported (supported: "
            f"{', '.join(known)}); use a checkpoint directory with tokenizer.json instead"
        )
    return tokenizer


def _merges(metadata: GGUFMetadata, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    lines = metadata.get_list("tokenizer.ggml.merges", str)
    if lines is None:
        raise ValueError(
            f"{metadata.where}: tokenizer.ggml.merges is missing; a gpt2 tokenizer needs it"
        )
    merges = []
    for number, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(
                f"{metadata.where}: tokenizer.ggml.merges[{number}]={reprlib.repr(line)} must be "
                "two tokens of the vocabulary, parted by a space, that join to a third"
            )
        merges.append((left, right))
    return merges


# --- SentencePiece BPE ------------------------------------------------------------------------


def _sentencepiece_bpe(
    metadata: GGUFMetadata, tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if metadata.values.get(f"tokenizer.ggml.{key}") not in (None, False, [], ""):
            raise NotImplementedError(
                f"{metadata.where}: tokenizer.ggml.{key} is set: this SentencePiece normalisation "
                "is not supported"
            )
    scores = metadata.get_list("tokenizer.ggml.scores", float)
    if scores is None or len(scores) != len(tokens) or any(map(math.isnan, scores)):
        raise ValueError(
            f"{metadata.where}: tokenizer.ggml.scores must have one score for each of the "
            f"{len(tokens)} tokens, none of them NaN; got {reprlib.repr(scores)}"
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", int, 0)
    tokenizer = Tokenizer(
        models.BPE(
            {token: token_id for token_id, token in enumerate(tokens)},
            _merges_from_scores(tokens, types, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.normalizer = normalizers.Sequence(
        ([normalizers.Prepend("▁")] if prefix else []) + [normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return tokenizer


def _merges_from_scores(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best: a merge list in score order.

    A token that can be cut in two in several ways gives a merge for each; equal scores go by id.
    """
    ordinary = {
        token: score
        for token, kind, score in zip(tokens, types, scores, strict=True)
        if kind == _NORMAL
    }
    # Cutting a long token everywhere would cost its length squared.
    lengths = {len(token) for token in ordinary}
    return [
        (token[:i], token[i:])
        for token in sorted(ordinary, key=lambda token: -ordinary[token])
        for i in range(1, len(token))
        if i in lengths and len(token) - i in lengths
        if token[:i] in ordinary and token[i:] in ordinary
    ]
