"""Tokenizers from GGUF files, against other implementations' ids; text as it is streamed."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import DATA, golden, streamed, write_gguf

import convert
from convert.gguf_tokenizer import build_gguf_tokenizer
from convert.tokenizers import load_tokenizer
from lserve_jax.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2) -> Tokenizer:
    return load_tokenizer(convert.resolve(smollm2).path)


# --- ids --------------------------------------------------------------------------------------


def test_gguf_vocabularies_give_the_ids_of_other_implementations(small, any_vocabulary):
    for text, ids in golden(any_vocabulary)["cases"]:
        assert small[any_vocabulary].encode(text, add_special_tokens=False) == ids, repr(text)


def test_decode_inverts_encode(small, any_vocabulary):
    for text, ids in golden(any_vocabulary)["cases"]:
        expected = text.replace("e\u0301", "\u00e9") if any_vocabulary == "qwen2" else text
        # SentencePiece marks spaces with U+2581, so it cannot keep that character itself.
        expected = expected.replace("▁", " ") if any_vocabulary == "mistral" else expected
        assert small[any_vocabulary].decode(ids) == expected


def test_smollm2_chat_prompts_are_the_golden_ids(smollm2_tokenizer):
    path = DATA / "golden" / "smollm2-135m-instruct" / "golden.json"
    for chat in json.loads(path.read_text(encoding="utf-8"))["chats"]:
        text = smollm2_tokenizer.apply_chat_template([{"role": "user", "content": chat["user"]}])
        assert smollm2_tokenizer.encode(text, add_special_tokens=False) == chat["prompt_ids"]
        answer = smollm2_tokenizer.decode(chat["greedy_ids"], skip_special_tokens=False)
        assert answer == chat["greedy_text"]


def test_smollm2_needle_prompt_is_the_golden_ids(smollm2_tokenizer):
    path = DATA / "golden" / "smollm2-135m-instruct-32k" / "golden.json"
    ids = json.loads(path.read_text(encoding="utf-8"))["needle"]["prompt_ids"]
    text = smollm2_tokenizer.decode(ids, skip_special_tokens=False)
    assert smollm2_tokenizer.encode(text, add_special_tokens=False) == ids


def test_smollm2_varied_texts(smollm2_tokenizer):
    for text, ids in golden("smollm2")["cases"]:
        assert smollm2_tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)


def test_smollm2_digits_stand_alone(smollm2_tokenizer):
    tokens = [smollm2_tokenizer.decode([i]) for i in smollm2_tokenizer.encode("In 1984,  37 of")]
    assert tokens == ["In", " ", "1", "9", "8", "4", ",", "  ", "3", "7", " of"]
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.bos_token_id == 1
    assert smollm2_tokenizer.eos_token_ids == (2, 0, 4)  # im_end, endoftext, reponame


def byte_level(rule: str, tokens: list[str]):
    """A byte-level tokenizer that merges nothing."""
    return build_gguf_tokenizer(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": rule,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [],
            "tokenizer.ggml.bos_token_id": 0,
        }
    )


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", "It|'s| I|'|LLs| 12345| ,|\n\n | x"),
        ("default", "It|'s| I|'|LLs| 12345| ,|\n\n | x"),
        ("smollm", "It|'s| I|'|LLs| |1|2|3|4|5| ,|\n\n | x"),
        ("qwen2", "It|'s| I|'LL|s| |1|2|3|4|5| ,\n\n| | x"),
        ("llama-bpe", "It|'s| I|'LL|s| |123|45| ,\n\n| | x"),
    ],
)
def test_splitting_rules(rule, pieces):
    split = byte_level(rule, ["a"]).pre_tokenizer.pre_tokenize_str(pieces.replace("|", ""))
    text = pieces.replace("|", "")
    assert [text[start:end] for _, (start, end) in split] == pieces.split("|")


@pytest.mark.parametrize(("rule", "ids"), [("llama-bpe", [3]), ("gpt-2", [0, 1, 2])])
def test_llama3_keeps_a_word_whole_that_merges_do_not_reach(rule, ids):
    tokenizer = byte_level(rule, ["a", "b", "c", "abc"])
    assert tokenizer.encode("abc", add_special_tokens=False).ids == ids


def test_special_tokens_in_the_text_become_their_ids(small):
    vocabulary = golden("qwen2")
    start, end = (vocabulary["tokens"].index(f"<|im_{x}|>") for x in ("start", "end"))
    ids = small["qwen2"].encode("<|im_start|>x<|im_end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert small["qwen2"].decode(ids) == "x"
    assert small["qwen2"].decode(ids, skip_special_tokens=False) == "<|im_start|>x<|im_end|>"


@pytest.mark.parametrize(
    ("name", "changes", "adds_bos"),
    [
        ("gpt2", {}, False),
        ("gpt2", {"add_bos_token": True}, True),
        ("gpt2", {"pre": "llama-bpe"}, True),
        ("gpt2", {"pre": "llama-bpe", "add_bos_token": False}, False),
        ("mistral", {}, True),
        ("mistral", {"add_bos_token": False}, False),
    ],
)
def test_bos_is_added_where_the_file_asks_for_it(tmp_path, name, changes, adds_bos):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "x.gguf", golden(name), **changes))
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    bos = [tokenizer.bos_token_id] if adds_bos else []
    assert tokenizer.encode("Hello") == bos + plain


def test_sentencepiece_without_space_prefix(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", golden("mistral"), add_space_prefix=False)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(" x", add_special_tokens=False)
    assert tokenizer.decode(ids) == " x"
    assert tokenizer.encode("x", add_special_tokens=False) != ids


def test_end_of_turn_ids_end_a_completion_too(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", golden("qwen2"), eot_token_id=5, eom_token_id=5)
    assert load_tokenizer(path).eos_token_ids[:2] == (golden("qwen2")["eos"], 5)


@pytest.mark.parametrize("bad", [-1, 651, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(small, bad):
    size = small["gpt2"].vocab_size
    assert size == 651
    with pytest.raises(ValueError, match=rf"token id {bad} must lie in \[0, 651\)"):
        small["gpt2"].decode([0, bad])
    with pytest.raises(ValueError, match=rf"token id {bad} must lie"):
        small["gpt2"].stream().step(bad)


def test_only_text_is_encoded(small):
    with pytest.raises(ValueError, match="text must be a str, got bytes"):
        small["gpt2"].encode(b"x")


# --- incremental detokenisation ---------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(small, data):
    tokenizer = small[data.draw(st.sampled_from(["gpt2", "mistral"]))]
    # The first ids are bytes, special tokens and spaces: the interesting ones.
    token = st.integers(0, 300) | st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(token, max_size=12))
    skip = data.draw(st.booleans())
    assert "".join(streamed(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


def test_multi_byte_text_is_never_shown_in_parts(small, any_vocabulary):
    tokenizer = small[any_vocabulary]
    for text, ids in golden(any_vocabulary)["cases"]:
        parts = streamed(tokenizer, ids, True)
        assert "".join(parts) == tokenizer.decode(ids)
        assert not any("\ufffd" in part for part in parts), repr(text)


def test_text_comes_with_the_token_that_completes_it(small):
    tokenizer = small["gpt2"]
    ids = tokenizer.encode("a\u2603b")  # a snowman, three bytes without a token of their own
    assert streamed(tokenizer, ids, True) == ["a", "", "", "\u2603", "b", ""]


def test_flush_gives_out_what_never_became_a_character(small):
    tokenizer = small["gpt2"]
    ids = tokenizer.encode("a\u2603")[:-1]
    assert streamed(tokenizer, ids, True) == ["a", "", "", "\ufffd"]
