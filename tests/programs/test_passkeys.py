"""Calibration samples: read back as text, every passkey stands where it should and is answered."""

import re

import numpy as np
import pytest
import tokenizers

from lserve_jax.calibrate.passkeys import (
    PREFACE,
    WORDS,
    PasskeySamples,
    PasskeySettings,
    builtin_text,
)
from lserve_jax.tokenizer import Tokenizer

# A token a character: ids are text again, and counts are exact.
CHARACTERS = "\n" + "".join(chr(32 + i) for i in range(95))
TEXT = "".join(f"~{i:05d}" for i in range(2000))  # every place of it is recognised
SETTINGS = PasskeySettings(max_length=2400, num_lengths=2, num_passkeys=3, passkey_words=4, seed=7)


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {c: i for i, c in enumerate(CHARACTERS)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)


def stated(text):
    """Ordinal, passkey and place of every passkey hidden in the text."""
    found = re.finditer(r"\nMemorize this: the (\w+) passkey is ([a-z ]+)\.\n", text)
    return [(m[1], m[2], m.start(), m.end()) for m in found]


def read(tokenizer, sample):
    """What a reader of one sample finds: (text before the labels, labels)."""
    before = tokenizer.decode(sample.tokens[: sample.first_label].tolist())
    return before, tokenizer.decode(sample.tokens[sample.first_label :].tolist())


def test_every_passkey_is_hidden_once_and_answered(tokenizer):
    samples = PasskeySamples(tokenizer, TEXT, SETTINGS)
    for step in range(8):
        before, labels = read(tokenizer, samples(step))
        hidden = {ordinal: passkey for ordinal, passkey, *_ in stated(before)}
        answers = re.findall(r"\nWhich one is the (\w+) passkey\?\nIt is ([a-z ]+)\.\n", labels)
        assert [ordinal for ordinal, _ in answers] == ["first", "second", "third"]
        assert hidden == dict(answers)
        for passkey in hidden.values():
            assert len(passkey.split()) == 4 and set(passkey.split()) <= set(WORDS)


def test_labels_are_the_questions_and_nothing_else(tokenizer):
    before, labels = read(tokenizer, PasskeySamples(tokenizer, TEXT, SETTINGS)(0))
    assert labels.startswith("\n\nThe text ends here.") and labels.endswith(".\n")
    assert before.startswith(PREFACE)
    # Without what was hidden in it, the middle is one piece of the text.
    middle = before.removeprefix(PREFACE)
    for *_, start, end in reversed(stated(middle)):
        middle = middle[:start] + middle[end:]
    assert middle in TEXT


def test_passkeys_stand_at_different_depths_within_bounds(tokenizer):
    settings = PasskeySettings(
        max_length=3000,
        num_lengths=1,
        num_passkeys=3,
        passkey_words=2,
        min_depth=0.4,
        max_depth=0.6,
    )
    depths = []
    for step in range(20):
        before, _ = read(tokenizer, PasskeySamples(tokenizer, TEXT, settings)(step))
        middle, hidden_before = before.removeprefix(PREFACE), 0
        places = []
        for *_, start, end in stated(middle):
            places.append(start - hidden_before)
            hidden_before += end - start
        room = len(middle) - hidden_before
        assert len(set(places)) == 3
        depths += [place / room for place in places]
    assert min(depths) >= 0.4 - 1e-3 and max(depths) <= 0.6  # the lower bound rounds down
    assert max(depths) - min(depths) > 0.15  # 60 draws from a range of 0.2


def test_lengths_are_exact_and_take_turns(tokenizer):
    samples = PasskeySamples(tokenizer, TEXT, SETTINGS)
    lengths = [len(samples(step).tokens) for step in range(12)]
    assert all(sorted(lengths[i : i + 2]) == [1200, 2400] for i in range(0, 12, 2))
    assert lengths != lengths[:2] * 6  # not always in the same order


def test_samples_are_a_function_of_seed_and_step(tokenizer):
    first, again = (PasskeySamples(tokenizer, TEXT, SETTINGS) for _ in range(2))
    again(0)  # the order of calls does not matter
    np.testing.assert_array_equal(first(5).tokens, again(5).tokens)
    other = PasskeySamples(tokenizer, TEXT, PasskeySettings(**{**vars(SETTINGS), "seed": 8}))
    passkeys = [
        passkey
        for samples in (first, other)
        for step in range(6)
        for _, passkey, *_ in stated(read(tokenizer, samples(step))[0])
    ]
    assert len(set(passkeys)) == len(passkeys) == 2 * 6 * 3


def test_the_builtin_text_is_long_prose():
    text = builtin_text()
    assert len(text) > 400_000
    assert len(set(re.findall(r"[a-z]{3,}", text))) > 3000


@pytest.mark.parametrize(
    ("text", "change", "message"),
    [
        (TEXT[:1000], {}, "the text has 1000 tokens, samples of max_length=2400 need as many"),
        ("", {}, "the text has 0 tokens"),
        (TEXT, {"max_length": 1000}, "more than the shortest sample has: 500 tokens"),
        (TEXT, {"passkey_words": 40}, "3 passkeys of 40 words take up to"),
    ],
)
def test_text_and_passkeys_must_fit(tokenizer, text, change, message):
    settings = PasskeySettings(**{**vars(SETTINGS), **change})
    with pytest.raises(ValueError, match=message):
        PasskeySamples(tokenizer, text, settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 0}, "max_length=0 must be at least 1"),
        ({"num_lengths": 0}, "num_lengths=0 must be at least 1"),
        ({"num_passkeys": 11}, "num_passkeys=11 must be at most 10"),
        ({"passkey_words": 0}, "passkey_words=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"min_depth": 0.7, "max_depth": 0.7}, "min_depth=0.7 and max_depth=0.7 must be ascending"),
        ({"max_depth": 1.1}, r"lie in \[0, 1\]"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        PasskeySettings(**change)
