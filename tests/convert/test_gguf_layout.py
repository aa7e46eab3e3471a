"""GGUF files whose layout or metadata is wrong: refused by name, as llama.cpp refuses them."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_checkpoints import LLAMA, model_config, random_tensors, write_gguf

import convert
from convert.gguf_file import read_gguf_file
from convert.gguf_metadata import GGUFMetadata
from convert.gguf_tokenizer import end_token_ids

U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9
F32_TENSOR, F16_TENSOR, Q4_1_TENSOR = 0, 1, 3


def packed(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_bytes(
    tensors: list[tuple[str, list[int], int, int]],
    keys: list[tuple[str, int, bytes]],
    data: bytes,
    alignment: int = 32,
) -> bytes:
    """A file of ``tensors`` (name, dims as the file has them, type, offset) and packed ``keys``."""
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, kind, value in keys:
        header += packed(name) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in tensors:
        header += packed(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", kind, offset)
    return header + bytes(-len(header) % alignment) + data


# Two tensors of 160 and 96 bytes: the first ends in the middle of a block of 64 bytes.
TWO = [("a.weight", [8, 5], F32_TENSOR, 0), ("b.weight", [8, 3], F32_TENSOR, 160)]
DATA = np.arange(64, dtype=np.float32).tobytes()


def test_a_right_layout_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(TWO, [], DATA))
    tensors = read_gguf_file(path).tensors
    np.testing.assert_array_equal(tensors["b.weight"].rows(slice(0, 3)).ravel(), range(40, 64))
    alignment = [("general.alignment", U32, struct.pack("<I", 64))]
    wider = [TWO[0], ("b.weight", [8, 3], F32_TENSOR, 192)]
    data = DATA[:160] + bytes(32) + DATA[160:]
    for padding in (b"", bytes(32)):  # after the last tensor
        path.write_bytes(gguf_bytes(wider, alignment, data + padding, alignment=64))
        tensors = read_gguf_file(path).tensors
        np.testing.assert_array_equal(tensors["b.weight"].rows(slice(0, 3)).ravel(), range(40, 64))


def second(**changes: object) -> list[tuple]:
    fields = dict(zip(("name", "dims", "kind", "offset"), TWO[1], strict=True)) | changes
    return [TWO[0], tuple(fields.values())]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (second(offset=0), "b.weight lies at byte 0 of the data, .* it must lie at 160"),
        (second(offset=128), "lies at byte 128"),
        (second(offset=164), "lies at byte 164"),
        (second(offset=192), "lies at byte 192"),
        (second(offset=2**64 - 32), "lies at byte 18446744073709551584"),
        (list(reversed(TWO)), "b.weight lies at byte 160 of the data, .* it must lie at 0"),
        (second(name="a.weight"), "holds tensor 'a.weight' twice"),
        (second(name=""), "the name of tensor '' must have 1 to 64 bytes"),
        (second(name="b" * 65), "must have 1 to 64 bytes"),
        # The first tensor smaller: the second is not where it ends. The last: bytes are left.
        ([("a.weight", [8, 5], F16_TENSOR, 0), TWO[1]], "lies at byte 160 .* it must lie at 96"),
        (second(kind=F16_TENSOR), "tensors end at byte .* but the file has"),
        (second(dims=[8, 1]), "bytes after the last tensor"),
        (second(dims=[8, 4]), "is truncated: b.weight ends at byte"),
        (second(dims=[8, 2**61]), "is truncated: b.weight ends at byte"),
        (second(dims=[2**40, 2**40]), "is truncated: b.weight ends at byte"),
        (second(dims=[8, 3, 1, 1, 1]), "'b.weight' has 5 dimensions; it must have 1 to 4"),
        (second(dims=[]), "'b.weight' has 0 dimensions"),
        (second(dims=[8, 0]), "'b.weight' of type F32 has shape \\(0, 8\\)"),
        (second(kind=Q4_1_TENSOR), "'b.weight' of type Q4_1 has shape .* whole blocks of 32"),
    ],
)
def test_tensors_that_do_not_follow_each_other_are_refused(tmp_path, tensors, message):
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(tensors, [], DATA))
    with pytest.raises(ValueError, match=rf"x\.gguf.*{message}"):
        read_gguf_file(tmp_path / "x.gguf")


@pytest.mark.parametrize("alignment", [0, 3, 7, 48, 2**32 - 1])
def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path, alignment):
    key = ("general.alignment", U32, struct.pack("<I", alignment))
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(TWO, [key], DATA))
    with pytest.raises(ValueError, match=f"general.alignment={alignment} must be a power of two"):
        read_gguf_file(tmp_path / "x.gguf")


def test_a_key_that_comes_twice_is_refused(tmp_path):
    keys = [("a", U32, struct.pack("<I", 1)), ("a", U32, struct.pack("<I", 1))]
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(TWO, keys, DATA))
    with pytest.raises(ValueError, match="holds metadata key 'a' twice"):
        read_gguf_file(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "value",
    [
        struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQI", U32, 1, 7),
        struct.pack("<IQ", 13, 1) + bytes(8),
    ],
    ids=["nested", "unknown type"],
)
def test_arrays_of_arrays_and_of_unknown_types_are_refused(tmp_path, value):
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(TWO, [("a", ARRAY, value)], DATA))
    with pytest.raises(ValueError, match="metadata key 'a' has values of unknown type"):
        read_gguf_file(tmp_path / "x.gguf")


def test_a_header_that_cannot_be_read_names_the_field(tmp_path):
    whole = gguf_bytes(TWO, [("some.key", STRING, packed("long value"))], DATA)
    (tmp_path / "x.gguf").write_bytes(whole[: whole.index(b"long value") + 4])
    with pytest.raises(ValueError, match=r"cannot be read at byte \d+, in metadata key 'some.key'"):
        read_gguf_file(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(whole[: whole.index(b"b.weight") + 10])
    with pytest.raises(ValueError, match=r"cannot be read at byte \d+, in tensor 'b.weight'"):
        read_gguf_file(tmp_path / "x.gguf")


# --- metadata of a wrong type -----------------------------------------------------------------


def written(tmp_path: Path, change: Callable[[gguf.GGUFWriter], object]) -> Path:
    path = tmp_path / "m.gguf"
    return write_gguf(path, model_config(), random_tensors(LLAMA), metadata=change)


MODEL_KEYS = {
    "llama.rope.scaling.type": lambda w, key: w.add_uint32(key, 3),
    "llama.rope.scaling.factor": lambda w, key: w.add_string(key, "4"),
    "llama.rope.scaling.original_context_length": lambda w, key: w.add_float32(key, 2.5),
    "llama.attention.sliding_window": lambda w, key: w.add_array(key, [1, 2]),
    "split.count": lambda w, key: w.add_string(key, "2"),
    "general.alignment": lambda w, key: w.add_string(key, "32"),
    "tokenizer.ggml.eot_token_id": lambda w, key: w.add_string(key, "7"),
    "tokenizer.ggml.tokens": lambda w, key: w.add_array(key, [1, 2]),
}


@pytest.mark.parametrize("key", MODEL_KEYS)
def test_model_metadata_of_a_wrong_type_is_refused_by_name(tmp_path, key):
    path = written(tmp_path, lambda writer: MODEL_KEYS[key](writer, key))
    with pytest.raises(ValueError, match=rf"m\.gguf: {key}=.* must be"):
        convert.load(path)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_frequency_factors_must_be_positive(tmp_path, value):
    path = write_gguf(
        tmp_path / "m.gguf",
        model_config(),
        random_tensors(LLAMA),
        extra={"rope_freqs.weight": np.full(4, value, np.float32)},
    )
    with pytest.raises(ValueError, match=r"m\.gguf: rope_freqs\.weight must be positive"):
        convert.load(path)


@pytest.mark.parametrize(
    ("kind", "value"),
    [(int, True), (int, 1.0), (int, "1"), (float, True), (str, 5), (bool, 1), (bool, "true")],
)
def test_typed_metadata(kind, value):
    metadata = GGUFMetadata({"key": value, "list": [value]}, where="file")
    with pytest.raises(ValueError, match="file: key="):
        metadata.get("key", kind)
    with pytest.raises(ValueError, match="file: list="):
        metadata.get_list("list", kind)
    with pytest.raises(ValueError, match="file: key="):
        metadata.get_list("key", kind)
    assert metadata.get("missing", kind) is None
    assert metadata.get_list("missing", kind) is None
    assert GGUFMetadata({"key": 3}, where="").get("key", float) == 3


# --- a file that changes while it is read -----------------------------------------------------


@pytest.mark.parametrize("change", ["shorter", "longer", "rewritten", "replaced"])
def test_a_file_that_changes_while_it_is_read_is_an_error_not_a_crash(tmp_path, change):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(TWO, [], DATA))
    tensor = read_gguf_file(path).tensors["b.weight"]
    tensor.rows(slice(0, 1))
    match change:
        case "shorter":
            os.truncate(path, 64)
        case "longer":
            os.truncate(path, path.stat().st_size + 1)
        case "rewritten":
            os.utime(path, ns=(0, 0))
        case "replaced":
            times = path.stat()
            (tmp_path / "y.gguf").write_bytes(path.read_bytes())
            os.utime(tmp_path / "y.gguf", ns=(times.st_atime_ns, times.st_mtime_ns))
            (tmp_path / "y.gguf").replace(path)
    with pytest.raises(ValueError, match=r"x\.gguf changed while it was read: it had \d+ bytes"):
        tensor.rows(slice(1, 2))


def test_a_file_that_is_gone_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_bytes(TWO, [], DATA))
    tensor = read_gguf_file(path).tensors["b.weight"]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.gguf"):
        tensor.rows(slice(0, 1))


# --- end tokens -------------------------------------------------------------------------------


def ends(tokens: list[str], **ids: int) -> list[str]:
    """Texts of the end tokens that a file with these tokens and ``tokenizer.ggml.*`` ids has."""
    values = {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items()}
    metadata = GGUFMetadata({"tokenizer.ggml.tokens": tokens} | values, where="")
    return [tokens[number] for number in end_token_ids(metadata)]


LLAMA3 = ["a", "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
CHATML = ["a", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN = [*CHATML, "<|fim_prefix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
HARMONY = ["a", "<|return|>", "<|call|>", "<|end|>", "<|start|>"]


@pytest.mark.parametrize(
    ("tokens", "ids", "expected"),
    [
        (LLAMA3, {"eos": 2}, ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]),
        (LLAMA3, {"eos": 4}, ["<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"]),
        (CHATML, {"eos": 1}, ["<|endoftext|>", "<|im_end|>"]),
        (CHATML, {"eos": 3}, ["<|im_end|>", "<|endoftext|>"]),
        (CHATML, {}, ["<|endoftext|>", "<|im_end|>"]),
        (CHATML, {"eos": 3, "eot": 0}, ["<|im_end|>", "a", "<|endoftext|>"]),
        (["<s>", "</s>", "<|user|>", "<|end|>"], {"eos": 1}, ["</s>", "<|end|>"]),
        (["<eos>", "<end_of_turn>"], {"eos": 0}, ["<eos>", "<end_of_turn>"]),
        (QWEN, {"eos": 3}, ["<|im_end|>", "<|endoftext|>", *QWEN[-3:]]),
        (QWEN, {"eos": 3, "fim_sep": 0}, ["<|im_end|>", "<|endoftext|>", *QWEN[-3:-1], "a"]),
        (HARMONY, {"eos": 1}, ["<|return|>", "<|call|>"]),  # where <|end|> ends a part only
        (HARMONY[2:], {}, ["<|call|>", "<|end|>"]),
        (["</s>", "<|tool_response>", "<turn|>"], {}, ["<|tool_response>", "<turn|>"]),
        (["a", "b"], {}, []),
    ],
)
def test_end_tokens_are_those_of_llama_cpp(tokens, ids, expected):
    assert ends(tokens, **ids) == expected


def test_model_and_tokenizer_have_the_same_end_tokens_and_hide_them(tmp_path):
    tokens = [
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQ",
        "ab",
        "<|end|>",
        "<|im_end|>",
        "<|x|>",
        "</s>",
    ]

    def vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])
        writer.add_chat_template(
            [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
        )
        writer.add_token_types([1] * 47 + [3])  # as if all but </s> were ordinary text

    path = written(tmp_path, vocabulary)
    tokenizer = convert.load_tokenizer(path)
    assert tokenizer.eos_token_ids == convert.load(path)[0].eos_token_ids == (2, 44, 45, 47)
    ids = tokenizer.encode("a<|im_end|>b", add_special_tokens=False)
    assert ids == [0, 45, 1]
    assert tokenizer.decode(ids) == "ab"
    assert (tokenizer.chat_template, tokenizer.tool_template) == ("plain", "tools")
