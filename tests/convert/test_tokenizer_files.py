"""Tokens declared outside tokenizer.json, and tokenizer files with values of a wrong type."""

import json
from pathlib import Path

import pytest
from tiny_checkpoints import put_no_file

from convert.tokenizers import load_tokenizer

DATA = Path(__file__).parents[1] / "data" / "tokenizers"
# What transformers makes of one small tokenizer.json beside other files; the 260 tokens are
# <s>, </s>, <|user|>, <|end|> and the bytes.
GOLDEN = json.loads((DATA / "added_tokens.json").read_text(encoding="utf-8"))
CASES = {case["name"]: case for case in GOLDEN["cases"]}
CONFIG = {"bos_token": "<s>", "eos_token": "</s>"}


def write(directory: Path, files: dict) -> Path:
    """The golden's tokenizer.json, with the changes that ``files`` has to it, and ``files``."""
    files = {**files, "tokenizer.json": GOLDEN["base"] | files.get("tokenizer.json", {})}
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", CASES)
def test_declared_tokens_are_those_of_transformers(tmp_path, name):
    case = CASES[name]
    tokenizer = load_tokenizer(write(tmp_path, case["files"]))
    ids = tokenizer.encode(GOLDEN["text"], add_special_tokens=False)
    assert ids == case["ids"]
    assert tokenizer.decode(ids) == case["without"]
    assert (
        "".join([*map((stream := tokenizer.stream()).step, ids), stream.flush()])
        == (case["without"])
    )
    assert tokenizer.eos_token_ids == (case["eos"],)


@pytest.mark.parametrize("name", CASES)
def test_declared_tokens_survive_saving(tmp_path, name):
    tokenizer = load_tokenizer(write(tmp_path, CASES[name]["files"]))
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    ids = saved.encode(GOLDEN["text"], add_special_tokens=False)
    assert ids == CASES[name]["ids"]
    assert saved.decode(ids) == CASES[name]["without"]


def token(content: object, **flags: object) -> dict:
    return {"content": content, "special": True, **flags}


@pytest.mark.parametrize(
    "place",
    [
        {"tokenizer_config.json": CONFIG | {"additional_special_tokens": [token("<|new|>")]}},
        {"tokenizer_config.json": CONFIG | {"extra_special_tokens": {"image": token("<|new|>")}}},
        {
            "tokenizer_config.json": CONFIG,
            "special_tokens_map.json": {"additional_special_tokens": [token("<|new|>")]},
        },
    ],
    ids=["config", "by name", "map"],
)
def test_a_special_token_may_be_an_object(tmp_path, place):
    tokenizer = load_tokenizer(write(tmp_path, place))
    ids = tokenizer.encode("a<|new|>", add_special_tokens=False)
    assert ids[1:] == [260]
    assert tokenizer.decode(ids) == "a"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"added_tokens_decoder": {"265": token("<|new|>")}}}, "260"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"260": token("<|end|>")}}}, "it 3"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"3": token("<|new|>")}}}, "token 3"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"260": token("")}}}, "token 260"),
        ({"added_tokens.json": {"<|new|>": 265}}, r"<\|new\|>' is declared as token 265"),
        ({"tokenizer_config.json": {"eos_token": "<|new|>"}}, "eos_token='<|new|>'"),
    ],
)
def test_a_token_that_does_not_get_its_id_is_refused(tmp_path, files, message):
    with pytest.raises(ValueError, match=message.replace("<|new|>'", r"<\|new\|>'")):
        load_tokenizer(write(tmp_path, files))


def test_an_end_token_may_be_one_of_the_additional_tokens(tmp_path):
    config = {"eos_token": "<|new|>", "additional_special_tokens": ["<|b|>", "<|new|>"]}
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer_config.json": config}))
    assert tokenizer.eos_token_ids == (260,)  # transformers gives markers their ids first


def test_the_map_counts_where_the_config_has_no_added_tokens_decoder(tmp_path):
    files = {
        "tokenizer_config.json": {"eos_token": "</s>", "bos_token": "<s>"},
        "special_tokens_map.json": {"eos_token": "<|end|>"},
    }
    assert load_tokenizer(write(tmp_path, files)).eos_token_ids == (3,)
    files["tokenizer_config.json"]["added_tokens_decoder"] = {}
    assert load_tokenizer(write(tmp_path, files)).eos_token_ids == (1,)


WRONG = {
    "tokenizer_config.json": [
        ("eos_token", 5),
        ("eos_token", ["</s>"]),
        ("eos_token", {"text": "</s>"}),
        ("bos_token", {"content": 5}),
        ("pad_token", {"content": "</s>", "lstrip": 1}),
        ("additional_special_tokens", "<|new|>"),
        ("additional_special_tokens", [5]),
        ("extra_special_tokens", 5),
        ("added_tokens_decoder", ["<|new|>"]),
        ("added_tokens_decoder", {"x": {"content": "<|new|>"}}),
        ("added_tokens_decoder", {"260": 5}),
        ("chat_template", 5),
        ("chat_template", {"default": "x"}),
        ("chat_template", [5]),
        ("chat_template", [{"name": "default"}]),
        ("add_bos_token", "yes"),
    ],
    "generation_config.json": [
        ("eos_token_id", "</s>"),
        ("eos_token_id", [None]),
        ("eos_token_id", 2**31),
        ("eos_token_id", -1),
        ("eos_token_id", True),
        ("eos_token_id", 1.0),
        ("eos_token_id", {"a": 1}),
    ],
    "added_tokens.json": [("<|new|>", "260"), ("<|new|>", None), ("<|new|>", 260.0)],
}


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [(file, field, value) for file, fields in WRONG.items() for field, value in fields],
)
def test_values_of_a_wrong_type_are_refused_with_file_and_field(tmp_path, file, field, value):
    with pytest.raises(ValueError) as caught:
        load_tokenizer(write(tmp_path, {file: {field: value}}))
    assert str(tmp_path) in str(caught.value)
    assert (file if file == "added_tokens.json" else field) in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        *("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
        "added_tokens.json",
    ],
)
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"a":' + b"9" * 5000],
    ids=["empty", "list", "null", "deep list", "deep object", "no text", "long number"],
)
def test_files_that_are_no_json_objects_are_refused_by_name(tmp_path, file, content):
    write(tmp_path, {})
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["a directory", "a link to nothing"])
@pytest.mark.parametrize(
    "file",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
        *("generation_config.json", "added_tokens.json", "chat_template.jinja"),
    ],
)
def test_what_is_no_file_is_refused_by_name(tmp_path, file, kind):
    write(tmp_path, {})
    (tmp_path / file).unlink(missing_ok=True)
    put_no_file(tmp_path / file, kind)
    with pytest.raises(ValueError, match=f"{file} must be a file, and is {kind}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("digits", [11, 5000])
def test_a_token_id_of_many_digits_is_refused_with_file_and_field(tmp_path, digits):
    field = {"added_tokens_decoder": {"9" * digits: {"content": "<|new|>"}}}
    with pytest.raises(ValueError, match=rf"{tmp_path}.*: added_tokens_decoder must map token ids"):
        load_tokenizer(write(tmp_path, {"tokenizer_config.json": field}))


def test_a_template_file_that_is_no_text_is_refused_by_name(tmp_path):
    write(tmp_path, {})
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_text_that_the_vocabulary_cannot_express_is_a_value_error(tmp_path):
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
    changes = {"model": model, "added_tokens": [], "pre_tokenizer": None, "post_processor": None}
    tokenizer = load_tokenizer(write(tmp_path, {"tokenizer.json": changes}))
    assert tokenizer.encode("a") == [0]
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode this text: .*UNK"):
        tokenizer.encode("b")


def test_a_template_of_its_own_for_tools(tmp_path):
    entries = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write(tmp_path, {"tokenizer_config.json": {"chat_template": entries}})
    tokenizer = load_tokenizer(tmp_path)
    messages = [{"role": "user", "content": "Hi"}]
    tokenizer.save(tmp_path / "saved")
    for same in (tokenizer, load_tokenizer(tmp_path / "saved")):
        assert same.apply_chat_template(messages) == "plain"
        assert same.apply_chat_template(messages, tools=[{"name": "f"}]) == "tools"
    write(tmp_path, {"tokenizer_config.json": {"chat_template": entries[1:]}})
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(tmp_path).apply_chat_template(messages)


def test_an_id_beyond_every_vocabulary_is_refused(tmp_path):
    """The library would make a table of four billion bytes for it first."""
    vocabulary = {"<unk>": 0, "a": 1, "b": 10**9}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    file = {"version": "1.0", "added_tokens": [], "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(ValueError, match=r"tokenizer\.json: token 'b' has id 1000000000, ids must"):
        load_tokenizer(tmp_path)
    vocabulary["b"] = 1000  # a gap is allowed
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    assert load_tokenizer(tmp_path).encode("b") == [1000]
