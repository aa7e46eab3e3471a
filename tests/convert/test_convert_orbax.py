"""Orbax checkpoints: round trips, what is kept beside the arrays, the command that writes them."""

import asyncio
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny_checkpoints import LLAMA, model_config, random_tensors, write_gguf, write_hf
from tokenizers.pre_tokenizers import ByteLevel

import convert
from convert.__main__ import main
from convert.tokenizers import load_tokenizer

CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"
NAMES = sorted(path.name for path in CONFORMANCE.iterdir())


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, expected)


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of ours in float32, with what was saved."""
    config, params = convert.load(write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA)))
    convert.save(tmp_path / "orbax", config, params)
    return tmp_path / "orbax", config, params


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    config, params = convert.load(CONFORMANCE / name)
    convert.save(tmp_path / "new" / "orbax", config, params)
    found_config, found = convert.load(tmp_path / "new" / "orbax")
    assert found_config == config
    assert_same(found, params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_restoring_casts_as_jax_does(saved, dtype):
    path, _, params = saved
    _, found = convert.load(path, dtype=dtype)
    assert_same(found, jax.tree.map(lambda x: x.astype(dtype), params))


def test_overrides(saved):
    path, config, _ = saved
    changed, _ = convert.load(path, overrides={"rope_theta": 7.0, "eos_token_id": [3, 4]})
    assert changed.rope.rope_theta == 7.0
    assert changed.eos_token_ids == (3, 4)
    assert changed.hidden_size == config.hidden_size


def test_sharding_is_used(saved):
    path, _, _ = saved
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))
    _, params = convert.load(path, sharding=sharding)
    assert {leaf.sharding for leaf in jax.tree.leaves(params)} == {sharding}


def test_all_wrong_arrays_are_reported_at_once(saved):
    path, _, _ = saved
    text = json.loads((path / "config.json").read_text())
    text |= {"tie_word_embeddings": True, "vocab_size": 47, "num_hidden_layers": 3}
    (path / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError) as caught:
        convert.load(path)
    for line in (
        "missing: layers.2.mlp.down_proj.kernel, expected (64, 32)",
        "unexpected: lm_head.kernel, found (32, 48)",
        "misshapen: embed_tokens.embedding, found (48, 32), expected (47, 32)",
    ):
        assert line in str(caught.value)


def test_an_incomplete_checkpoint_is_refused(saved):
    path, _, _ = saved
    for file in (path / "params").glob("_*"):
        file.unlink()
    (path / "files.json").unlink()
    with pytest.raises(ValueError, match="is not a complete Orbax checkpoint"):
        convert.load(path)


def _largest(path: Path) -> Path:
    return max((path / "params").rglob("*"), key=lambda file: file.stat().st_size)


def _metadata(path: Path, text: str) -> None:
    """As long as the right one, so that its size does not give it away."""
    file = path / "params" / "_METADATA"
    file.write_text(text.ljust(file.stat().st_size))


DAMAGES = {
    r"params/.* is damaged: 5000 bytes, not \d+": lambda path: os.truncate(_largest(path), 5000),
    r"params/.* is missing": lambda path: _largest(path).unlink(),
    r"params cannot be read: AttributeError": lambda path: _metadata(path, "null"),
    r"params is not a complete Orbax checkpoint": lambda path: _metadata(path, "{"),
    r"files.json is not valid JSON": lambda path: (path / "files.json").write_text("{"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, saved, capfd, message):
    path, _, _ = saved
    DAMAGES[message](path)
    assert main([str(path), str(tmp_path / "out")]) == 2
    [line] = capfd.readouterr().err.splitlines()
    assert re.match(f"error: {path}/{message}", line), line
    with pytest.raises(ValueError, match=message):
        convert.load(path)


def test_checkpoints_without_a_list_of_their_files_load(saved):
    path, config, params = saved
    (path / "files.json").unlink()
    found_config, found = convert.load(path)
    assert found_config == config
    assert_same(found, params)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, saved, monkeypatch):
    _, config, params = saved
    before = sorted(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    monkeypatch.setattr(ocp.StandardCheckpointer, "save", None)
    with pytest.raises(OSError, match=r"the parameters take \d+ bytes, and 10 are free: .*other"):
        convert.save(tmp_path / "other", config, params)
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, saved, monkeypatch, capfd):
    path, _, _ = saved
    before = sorted(tmp_path.iterdir())

    def full(self, *args, **kwargs):
        logging.getLogger("absl").error("a traceback")
        raise Exception("see below") from ValueError("No space left on device\nmore")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", full)
    assert main([str(path), str(tmp_path / "other")]) == 2
    message = f"error: {tmp_path}/other cannot be written: ValueError: No space left on device\n"
    assert capfd.readouterr().err == message
    assert sorted(tmp_path.iterdir()) == before


def test_threads_take_turns_and_leave_the_process_as_it_was(tmp_path, saved):
    _, config, params = saved
    before = asyncio.new_event_loop, logging.getLogger("absl").level

    def write_and_read(number: int) -> None:
        for name in "abc":
            convert.save(tmp_path / f"{name}{number}", config, params)
            assert_same(convert.load(tmp_path / f"{name}{number}")[1], params)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write_and_read, range(4)))
    assert (asyncio.new_event_loop, logging.getLogger("absl").level) == before


def test_a_running_loop_is_left_as_it_was(tmp_path, saved):
    """As in a notebook, also by what fails."""
    path, config, params = saved
    _metadata(path, "null")

    async def cell() -> None:
        convert.save(tmp_path / "new", config, params)
        assert_same(convert.load(tmp_path / "new")[1], params)
        with pytest.raises(ValueError, match="cannot be read"):
            convert.load(path)
        await asyncio.sleep(0)

    asyncio.run(cell())


def test_values_that_are_not_finite_are_refused(tmp_path, saved):
    _, config, params = saved
    wrong = {**params, "norm": {"scale": params["norm"]["scale"].at[3].set(jnp.nan)}}
    convert.save(tmp_path / "other", config, wrong)
    with pytest.raises(ValueError, match=r"other: norm.scale holds values that are not finite"):
        convert.load(tmp_path / "other")


def test_more_layers_than_arrays_are_refused_at_once(saved, monkeypatch):
    path, _, _ = saved
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(text | {"num_hidden_layers": 10**9}))
    monkeypatch.setattr(convert.orbax, "abstract_params", None)
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000, but there are 15 tensors"):
        convert.load(path)


def test_params_that_do_not_fit_are_not_saved(tmp_path, saved):
    _, config, params = saved
    wrong = {**params, "norm": {"scale": jnp.ones((3,), jnp.float32)}}
    with pytest.raises(ValueError, match=r"misshapen: norm.scale, found \(3,\)"):
        convert.save(tmp_path / "other", config, wrong)
    assert not (tmp_path / "other").exists()


def test_only_a_new_or_empty_directory_is_written(tmp_path, saved):
    path, config, params = saved
    before = sorted(path.rglob("*"))
    with pytest.raises(ValueError, match=f"output directory {path} must be new or empty"):
        convert.save(path, config, params)
    assert sorted(path.rglob("*")) == before
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="file must be new or empty"):
        convert.save(tmp_path / "file", config, params)
    (tmp_path / "empty").mkdir()
    convert.save(tmp_path / "empty", config, params)
    assert convert.load(tmp_path / "empty")[0] == config


def test_an_interrupted_save_leaves_nothing(tmp_path, saved, monkeypatch):
    _, config, params = saved
    before = sorted(tmp_path.iterdir())

    def interrupted(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert.save(tmp_path / "other", config, params)
    assert sorted(tmp_path.iterdir()) == before


TOKENIZER_FILES = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": '{"a": 1}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": '{"eos_token_id": [2, 5]}',
}


def test_the_command_converts_and_keeps_the_tokenizer(tmp_path, capsys):
    source = write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    for name, text in TOKENIZER_FILES.items():
        (source / name).write_text(text)
    (source / "README.md").write_text("not a tokenizer")
    assert main([str(source), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"params", "files.json", "config.json", *TOKENIZER_FILES}
    for name, text in TOKENIZER_FILES.items():
        assert (tmp_path / "out" / name).read_text() == text
    config, params = convert.load(tmp_path / "out")
    assert config.eos_token_ids == (2, 5)
    assert_same(params, convert.load(source, dtype="bfloat16")[1])
    assert capsys.readouterr().out == ""
    # And once more, from our own format.
    assert main([str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert_same(convert.load(tmp_path / "again")[1], params)


MISTAKES = {
    "must be new or empty": ["hf", "hf"],
    "dtype 'int4' is unknown": ["hf", "out", "--dtype", "int4"],
    "neither a path that exists": ["nowhere", "out"],
    "model_type 'gpt2' is not supported": ["gpt2", "out"],
    "truncated": ["cut", "out"],
    "adapter hf has no adapter_config.json": ["hf", "out", "--adapter", "hf"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_end_with_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, message):
    monkeypatch.chdir(tmp_path)
    tensors = random_tensors(LLAMA)
    write_hf(Path("hf"), LLAMA, tensors)
    write_hf(Path("gpt2"), {"model_type": "gpt2"}, tensors)
    cut = write_hf(Path("cut"), LLAMA, tensors) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    before = sorted(tmp_path.rglob("*"))
    assert main(MISTAKES[message]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_arguments_exit_with_code_2():
    with pytest.raises(SystemExit) as caught:
        main(["only-one"])
    assert caught.value.code == 2


def test_a_gguf_tokenizer_becomes_files(tmp_path):
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<end>", "<turn>", "<pad>", *alphabet, "he", "ll", "hell"]

    def metadata(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 3, *[1] * (len(tokens) - 3)])
        writer.add_token_merges(["h e", "l l", "he ll"])
        writer.add_chat_template("{{ messages[0]['content'] }}<turn>")
        writer.add_eot_token_id(1)

    raw = {**LLAMA, "vocab_size": len(tokens)}
    source = write_gguf(
        tmp_path / "m.gguf",
        model_config(raw, bos_token_id=None, eos_token_ids=(0,)),
        random_tensors(raw),
        metadata=metadata,
    )
    assert main([str(source), str(tmp_path / "out")]) == 0
    original, copy = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    text = "hello, Gr\N{LATIN SMALL LETTER U WITH DIAERESIS}\N{GRINNING FACE}<turn>"
    assert copy.encode(text) == original.encode(text)
    assert copy.encode("hell") == [len(tokens) - 1]
    assert copy.chat_template == original.chat_template
    config, params = convert.load(tmp_path / "out")
    expected_config, expected = convert.load(source)
    assert config == expected_config
    assert copy.eos_token_ids == original.eos_token_ids == config.eos_token_ids == (0, 1)
    assert_same(params, expected)
