"""The calibration command: its files, continuing a run, and one sentence for every mistake."""

import json

import jax
import numpy as np
import pytest

import convert
from convert.attention_patterns import load_pattern
from lserve_jax.calibrate import __main__ as calibrate

STEPS = 6


@pytest.fixture
def command(word_model, word_text, tmp_path, capsys):
    """Runs the command with options added to small ones: exit code, stdout and stderr."""
    options = {
        "model": word_model,
        "output": tmp_path / "out",
        "text": word_text,
        "steps": STEPS,
        "save_every": 2,
        "max_length": 128,
        "num_lengths": 1,
        "num_passkeys": 2,
        "passkey_words": 3,
        "sink": 4,
        "recent": 16,
        "learning_rate": 0.1,
    }

    def run(*flags, **changes):
        argv = list(flags)
        for name, value in {**options, **changes}.items():
            argv += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        code = calibrate.main([*argv, "--no-cache"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_pattern_it_writes_loads(command, tmp_path):
    code, out, err = command(backend="reference")
    assert code == 0, err
    pattern = load_pattern(tmp_path / "out")
    assert pattern.gates.shape == (3, 2)
    assert (pattern.sink_size, pattern.recent_size) == (4, 16)
    assert 0.5 < pattern.gates.min() < 0.95  # six steps of at most 0.1 each
    assert f"6 KV heads: mean gate {pattern.gates.mean():.3f}" in out
    assert "6/6" in err and "mean_gate=" in err  # the progress bar
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (record["steps"], record["max_length"], record["dtype"]) == (STEPS, 128, "float32")
    assert (tmp_path / "out" / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_run_continues_as_if_it_had_not_been(command, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command(output=whole)[0] == 0

    save, kept = calibrate.save_checkpoint, []

    def save_and_stop(path, settings, state, history):
        save(path, settings, state, history)
        kept.append(len(history))
        if len(history) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "save_checkpoint", save_and_stop)
    assert command(output=parts)[0] == 130
    assert not (parts / "full_attention_heads.tsv").exists()
    assert command(output=parts)[0] == 0
    assert kept == [2, 4, 6]
    for name in ("full_attention_heads.tsv", "config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    with np.load(whole / "checkpoint.npz") as one, np.load(parts / "checkpoint.npz") as other:
        assert one.files == other.files
        for name in one.files:
            # To the bit: the same compiled step on the same float32 state.
            np.testing.assert_array_equal(one[name], other[name])
        assert one["history"].shape == (STEPS, 2)

    assert command(output=parts)[0] == 0  # finished already
    assert kept == [2, 4, 6]


def test_other_settings_do_not_continue_a_run(command, word_text, tmp_path, monkeypatch):
    assert command("--no-plot")[0] == 0
    assert not (tmp_path / "out" / "gates.png").exists()
    monkeypatch.setattr(convert, "load", None)  # refused before any weights are read
    code, _, err = command(learning_rate=0.2, seed=3)
    assert code == 2
    assert "learning_rate was 0.1 and is 0.2; seed was 0 and is 3" in err
    other = tmp_path / "other.txt"
    other.write_text(word_text.read_text() + " w0")
    code, _, err = command(text=other)
    assert code == 2 and "text_sha256 was " in err and "steps" not in err


def test_a_damaged_checkpoint_is_named(command, tmp_path):
    (tmp_path / "out").mkdir()
    checkpoint = tmp_path / "out" / "checkpoint.npz"
    for content in (b"", b"PK\x03\x04 and no more", b"nonsense"):
        checkpoint.write_bytes(content)
        code, _, err = command()
        assert code == 2 and "checkpoint.npz is not a checkpoint of this program" in err
    np.savez(checkpoint, settings=np.array("{}"))
    code, _, err = command()
    assert code == 2 and "checkpoint.npz is not a checkpoint of this program" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "nowhere.txt"}, "text file 'nowhere.txt' does not exist"),
        ({"max_length": 700}, "the text has 600 tokens, samples of max_length=700 need as many"),
        ({"max_length": 520}, "max_length=520 exceeds the 512 tokens of"),
        ({"max_length": 60}, "more than the shortest sample has: 60 tokens"),
        ({"save_every": 0}, "save_every=0 must be at least 1"),
        ({"backend": "mosaic"}, "needs a Hopper GPU"),
        ({"model": "nowhere"}, "model 'nowhere' is neither a path that exists"),
    ],
)
def test_mistakes_are_one_sentence(command, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(convert, "load", None)  # refused before any weights are read
    code, out, err = command(**options)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_ends_the_run(command, tmp_path, monkeypatch):
    load = convert.load

    def load_damaged(*args, **kwargs):
        config, params = load(*args, **kwargs)
        return config, jax.tree.map(lambda x: x * np.nan, params)

    monkeypatch.setattr(convert, "load", load_damaged)
    code, out, err = command()
    assert (code, out) == (2, "")
    assert "error: loss is nan at step 0" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "full_attention_heads.tsv").exists()


@pytest.mark.parametrize("option", ["steps", "num_passkeys", "recent"])
def test_settings_check_themselves(command, option):
    with pytest.raises(SystemExit, match="2"):
        command(**{option: 0})


def test_text_must_be_utf8(command, tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 300)
    code, _, err = command(text=tmp_path / "latin.txt")
    assert code == 2 and "latin.txt' is not UTF-8" in err


def test_output_must_be_free(command, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    code, _, err = command(output=tmp_path / "notes")
    assert code == 2 and "holds files but no checkpoint.npz" in err
    code, _, err = command(output=tmp_path / "notes" / "mine.txt")
    assert code == 2 and "is not a directory" in err


def test_a_model_without_tokenizer_is_refused(command, conformance):
    code, _, err = command(model=conformance / "llama-tied")
    assert code == 2 and "tokenizer" in err


def test_plot_needs_matplotlib_before_any_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command()
    assert code == 2 and "matplotlib" in err and not (tmp_path / "out").exists()
