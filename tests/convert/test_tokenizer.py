"""Tokenizers from GGUF files and directories, against other implementations' ids."""

import json
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from convert.gguf_file import read_gguf_file
from convert.gguf_tokenizer import build_gguf_tokenizer
from convert.tokenizers import load_tokenizer
from lserve_jax.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def golden(name: str) -> dict:
    return json.loads((DATA / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))


def write_gguf(path: Path, vocabulary: dict, **changes) -> Path:
    """A GGUF file with this vocabulary and no tensors. A change of None leaves the key out."""
    keys = {
        "model": vocabulary["model"],
        "pre": vocabulary["pre"],
        "tokens": vocabulary["tokens"],
        "token_type": vocabulary["types"],
        "merges": vocabulary.get("merges"),
        "scores": vocabulary.get("scores"),
        "bos_token_id": vocabulary["bos"],
        "eos_token_id": vocabulary["eos"],
        **changes,
    }
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        name = key if key.startswith("tokenizer.") else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session", params=["gpt2", "qwen2", "mistral"])
def any_vocabulary(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict[str, Tokenizer]:
    """The tokenizers of the trimmed vocabularies, with a chat template."""
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: load_tokenizer(
            write_gguf(
                folder / f"{name}.gguf",
                golden(name),
                **{"tokenizer.chat_template": TEMPLATE},
            )
        )
        for name in ("gpt2", "qwen2", "mistral")
    }


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


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool) -> list[str]:
    stream = tokenizer.stream(skip_special_tokens)
    return [*map(stream.step, ids), stream.flush()]


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


# --- chat templates ---------------------------------------------------------------------------


def with_template(tokenizer: Tokenizer, source: str | None) -> Tokenizer:
    return Tokenizer(
        backend=tokenizer.backend,
        markers=tokenizer.markers,
        eos_token_ids=tokenizer.eos_token_ids,
        chat_template=source,
    )


USER = [{"role": "user", "content": "Hi"}]


def test_chat_template_of_a_gguf_file(small):
    messages = [*USER, {"role": "assistant", "content": "Ho"}]
    end = "<|im_end|>"
    text = small["qwen2"].apply_chat_template(messages)
    assert text == f"[user] Hi{end}[assistant] Ho{end}[assistant]"
    text = small["qwen2"].apply_chat_template(messages, add_generation_prompt=False)
    assert text == f"[user] Hi{end}[assistant] Ho{end}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%%') }}", "%"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ tools is none and documents is none }}", "True"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("[{{ no_such_name }}]", "[]"),
    ],
)
def test_what_templates_expect(small, source, expected):
    assert with_template(small["gpt2"], source).apply_chat_template(USER) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template failed"),
        ("{{ messages.append(1) }}", "chat template failed"),  # the sandbox: nothing is changed
        ("{{ ''.__class__.__mro__ }}", "chat template failed"),
    ],
)
def test_template_errors_are_value_errors(small, source, message):
    with pytest.raises(ValueError, match=message):
        with_template(small["gpt2"], source).apply_chat_template(USER)


def test_no_chat_template(small):
    tokenizer = with_template(small["gpt2"], None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hi",
        {"role": "user", "content": "Hi"},
        ["Hi"],
        [{"role": "user"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "Hi"}],
    ],
)
def test_malformed_messages_are_refused(small, messages):
    with pytest.raises(ValueError, match='"role"'):
        small["gpt2"].apply_chat_template(messages)


# --- directories ------------------------------------------------------------------------------


@pytest.fixture
def directory(small, tmp_path) -> Path:
    small["qwen2"].save(tmp_path)
    return tmp_path


def edit(path: Path, **changes) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(config | changes), encoding="utf-8")


def test_a_saved_tokenizer_loads_the_same(small, any_vocabulary, tmp_path):
    original = small[any_vocabulary]
    original.save(tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    for text, _ in golden(any_vocabulary)["cases"]:
        ids = original.encode(text)
        assert loaded.encode(text) == ids
        assert loaded.decode(ids) == original.decode(ids)
        assert streamed(loaded, ids, False) == streamed(original, ids, False)
    assert loaded.apply_chat_template(USER) == original.apply_chat_template(USER)
    for name in ("markers", "bos_token_id", "eos_token_ids", "chat_template", "vocab_size"):
        assert getattr(loaded, name) == getattr(original, name)


def test_several_end_ids_survive_saving(tmp_path):
    path = write_gguf(tmp_path / "x.gguf", golden("qwen2"), eot_token_id=5)
    tokenizer = load_tokenizer(path)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").eos_token_ids == tokenizer.eos_token_ids


@pytest.mark.parametrize(
    ("eos", "expected"), [([7, 3, 7], (762, 7, 3)), (7, (762, 7)), (762, (762,))]
)
def test_end_ids_of_the_generation_config(directory, eos, expected):
    edit(directory / "generation_config.json", eos_token_id=eos)
    assert load_tokenizer(directory).eos_token_ids == expected


def test_special_tokens_may_be_objects_or_lie_in_the_map(directory):
    (directory / "tokenizer_config.json").unlink()
    bos = {"content": "<|im_start|>"}
    edit(directory / "tokenizer_config.json", bos_token=bos, added_tokens_decoder={})
    edit(directory / "special_tokens_map.json", eos_token="<|endoftext|>", bos_token="unused")
    tokenizer = load_tokenizer(directory)
    vocabulary = golden("qwen2")["tokens"]
    assert tokenizer.bos_token_id == vocabulary.index("<|im_start|>")
    assert tokenizer.eos_token_ids[0] == vocabulary.index("<|endoftext|>")


def test_add_bos_token_counts_where_tokenizer_json_is_silent(directory):
    edit(directory / "tokenizer.json", post_processor=None)
    plain = load_tokenizer(directory).encode("Hello")
    edit(directory / "tokenizer_config.json", add_bos_token=True)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("Hello") == [tokenizer.bos_token_id, *plain]
    assert tokenizer.encode("Hello", add_special_tokens=False) == plain


def test_limits_for_training_batches_are_lifted(directory):
    tokenizer = load_tokenizer(directory)
    tokenizer.backend.enable_truncation(2)
    tokenizer.backend.enable_padding(length=50)
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    assert (
        load_tokenizer(directory).decode(load_tokenizer(directory).encode("a b c d")) == "a b c d"
    )


def test_chat_template_file_wins(directory):
    (directory / "chat_template.jinja").write_text("from the file", encoding="utf-8")
    assert load_tokenizer(directory).apply_chat_template(USER) == "from the file"


def test_named_chat_templates(directory):
    templates = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    edit(directory / "tokenizer_config.json", chat_template=templates)
    assert load_tokenizer(directory).apply_chat_template(USER) == "b"
    edit(directory / "tokenizer_config.json", chat_template=templates[:1])
    assert not load_tokenizer(directory).has_chat_template


def test_directory_without_a_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path, required=True)


def test_sentencepiece_file_alone_is_not_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(NotImplementedError, match=r"tokenizer\.model but no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "?"}}'])
def test_damaged_tokenizer_json(directory, content):
    (directory / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer"):
        load_tokenizer(directory)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_configuration(directory, content):
    (directory / "tokenizer_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load_tokenizer(directory)


def test_unknown_special_token(directory):
    edit(directory / "tokenizer_config.json", eos_token="<nowhere>")
    with pytest.raises(ValueError, match="eos_token='<nowhere>'"):
        load_tokenizer(directory)


# --- GGUF files that are wrong or not supported -----------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gpt2", {"model": "bert"}, NotImplementedError, "model='bert'"),
        ("gpt2", {"model": None}, NotImplementedError, "model=None"),
        ("gpt2", {"pre": "deepseek-llm"}, NotImplementedError, "pre='deepseek-llm'"),
        ("gpt2", {"merges": None}, ValueError, "merges is missing"),
        ("gpt2", {"merges": ["Ġ t", "Ġ\u2603 t"]}, ValueError, r"merges\[1\]='Ġ\u2603 t'"),
        ("gpt2", {"merges": ["Ġt"]}, ValueError, r"merges\[0\]='Ġt'"),
        ("gpt2", {"tokens": ["a", "a"]}, ValueError, "repeats 1 of its 2 tokens"),
        ("gpt2", {"tokens": None}, ValueError, "tokens is missing"),
        ("gpt2", {"token_type": [1, 1]}, ValueError, "2 entries"),
        ("gpt2", {"eos_token_id": 651}, ValueError, r"eos_token_id=651 must lie in \[0, 651\)"),
        ("gpt2", {"bos_token_id": None, "add_bos_token": True}, ValueError, "adds BOS"),
        ("mistral", {"scores": None}, ValueError, "one score for each"),
        ("mistral", {"scores": [1.0]}, ValueError, "one score for each"),
        ("mistral", {"remove_extra_whitespaces": True}, NotImplementedError, "whitespaces"),
        ("mistral", {"precompiled_charsmap": [1, 2]}, NotImplementedError, "charsmap"),
    ],
)
def test_gguf_tokenizers_that_are_refused(tmp_path, name, changes, error, message):
    path = write_gguf(tmp_path / "x.gguf", golden(name), **changes)
    with pytest.raises(error, match=message):
        load_tokenizer(path)


def test_gguf_metadata_values(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("text", "é\u2603")
    writer.add_int8("int8", -3)
    writer.add_uint16("uint16", 65535)
    writer.add_int64("int64", -(2**40))
    writer.add_uint64("uint64", 2**63)
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 0.25])
    writer.add_array("strings", ["a", "", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    values = read_gguf_file(tmp_path / "x.gguf").metadata
    arrays = {name: list(values.pop(name)) for name in ("ints", "floats", "strings")}
    assert arrays == {"ints": [1, -2, 3], "floats": [0.5, 0.25], "strings": ["a", "", "b"]}
    assert values == {
        "general.architecture": "llama",
        "text": "é\u2603",
        "int8": -3,
        "uint16": 65535,
        "int64": -(2**40),
        "uint64": 2**63,
        "float32": 0.5,
        "float64": 0.1,
        "bool": True,
    }


@pytest.mark.parametrize("kept", [5, 20, 30, 200, -1])
def test_truncated_gguf(tmp_path, kept):
    whole = write_gguf(tmp_path / "x.gguf", golden("gpt2")).read_bytes()
    (tmp_path / "x.gguf").write_bytes(whole[:kept])
    with pytest.raises(ValueError, match=r"x\.gguf is (truncated|not a GGUF file)"):
        load_tokenizer(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04", "not a GGUF file"),
        (b"GGUF\x01\x00\x00\x00" + bytes(16), "version 1"),
        (b"GGUF\x00\x00\x00\x03" + bytes(16), "version 50331648"),
        (
            b"GGUF\x03\x00\x00\x00" + bytes(8) + b"\x01" + bytes(15) + b"\x63" + bytes(9),
            "truncated or damaged",
        ),
    ],
)
def test_files_that_are_no_gguf(tmp_path, content, message):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "x.gguf")
