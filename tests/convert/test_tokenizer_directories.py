"""Tokenizers saved to directories and loaded from those that other programs made."""

import json
from pathlib import Path

import pytest
from tokenizer_files import USER, golden, streamed, write_gguf

from convert.tokenizers import load_tokenizer


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
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
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
    with pytest.raises(ValueError, match=r"tokenizer\.json is not (a valid tokenizer|valid JSON)"):
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
