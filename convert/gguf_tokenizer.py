"""The tokenizer that a GGUF file describes, rebuilt as a ``tokenizers.Tokenizer``.

GGUF stores a vocabulary and, by name, how text is cut before it is merged; the same names mean
the same rules here. Two kinds exist among Llama-family files: byte-level BPE
(``tokenizer.ggml.model = "gpt2"``: tokens, merges, and the name of a splitting rule) and
SentencePiece BPE (``"llama"``: tokens with scores, no merges).
"""

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

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def build_gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """A ``tokenizers.Tokenizer`` that splits, merges and decodes as ``metadata`` says.

    ``metadata`` is that of ``convert.gguf_file``. BOS and EOS are added by
    ``encode(..., add_special_tokens=True)`` where ``add_bos_token`` / ``add_eos_token`` ask for
    it; without these keys SentencePiece and Llama 3 vocabularies begin with BOS, others do not.

    Raises ``ValueError`` for contradictory metadata and ``NotImplementedError`` for a tokenizer
    model, splitting rule or normalisation that would not be reproduced exactly.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model not in ("gpt2", "llama"):
        raise NotImplementedError(
            f"tokenizer.ggml.model={model!r} is not supported; gpt2 (byte-level BPE) and "
            "llama (SentencePiece BPE) are"
        )
    tokens, types = _vocabulary(metadata)
    if model == "gpt2":
        tokenizer = _byte_level_bpe(metadata, tokens)
        adds_bos = metadata.get("tokenizer.ggml.pre") in _LLAMA3_NAMES
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


def _vocabulary(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("tokenizer.ggml.tokens is missing or empty")
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.tokens repeats {len(tokens) - len(set(tokens))} of its "
            f"{len(tokens)} tokens; every token must be unique"
        )
    for key, token_id in metadata.items():
        is_token = key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
        if is_token and not 0 <= token_id < len(tokens):
            raise ValueError(f"{key}={token_id} must lie in [0, {len(tokens)})")
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.token_type has {len(types)} entries, "
            f"tokenizer.ggml.tokens has {len(tokens)}; they must agree"
        )
    return tokens, [int(kind) for kind in types]


def _marker(
    metadata: Mapping[str, Any], tokens: Sequence[str], name: str, *, default: bool
) -> list[tuple[str, int]]:
    """The BOS or EOS token with its id if encoding adds it, else nothing."""
    if not metadata.get(f"tokenizer.ggml.add_{name}_token", default):
        return []
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if token_id is None:
        raise ValueError(
            f"the tokenizer adds {name.upper()} but tokenizer.ggml.{name}_token_id is missing"
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


def _byte_level_bpe(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    # Files older than the key, and those that say "default", name no rule: "gpt2" is then all
    # that is known of the tokenizer, so it is GPT-2's.
    rule = metadata.get("tokenizer.ggml.pre", "default")
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
            f"tokenizer.ggml.pre={rule!r} is not supported (supported: {', '.join(known)}); "
            "use a checkpoint directory with tokenizer.json instead"
        )
    return tokenizer


def _merges(metadata: Mapping[str, Any], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    lines = metadata.get("tokenizer.ggml.merges")
    if lines is None:
        raise ValueError("tokenizer.ggml.merges is missing; a gpt2 tokenizer needs it")
    merges = []
    for number, line in enumerate(lines):
        left, _, right = line.partition(" ")
        if left not in vocabulary or right not in vocabulary or left + right not in vocabulary:
            raise ValueError(
                f"tokenizer.ggml.merges[{number}]={line!r} must be two tokens of the vocabulary, "
                "parted by a space, that join to a third"
            )
        merges.append((left, right))
    return merges


# --- SentencePiece BPE ------------------------------------------------------------------------


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        value = metadata.get(f"tokenizer.ggml.{key}", False)
        if value is not False and (value is True or len(value)):
            raise NotImplementedError(
                f"tokenizer.ggml.{key} is set: this SentencePiece normalisation is not supported"
            )
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError(
            f"tokenizer.ggml.scores must have one score for each of the {len(tokens)} tokens, "
            f"got {None if scores is None else len(scores)}"
        )
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            {token: token_id for token_id, token in enumerate(tokens)},
            _merges_from_scores(tokens, types, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
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
    return [
        (token[:i], token[i:])
        for token in sorted(ordinary, key=lambda token: -ordinary[token])
        for i in range(1, len(token))
        if token[:i] in ordinary and token[i:] in ordinary
    ]
