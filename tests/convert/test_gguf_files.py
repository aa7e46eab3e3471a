"""What GGUF files may say, and which of them, or of their vocabularies, are refused."""

import gguf
import pytest
from tokenizer_files import golden, write_gguf

from convert.gguf_file import read_gguf_file
from convert.tokenizers import load_tokenizer


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
