"""The calibration command with --head-shares: its files, continuing a run, every mistake."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import convert
from convert.attention_patterns import load_pattern, save_pattern
from convert.head_shares import load_head_shares
from lserve_jax.calibrate import __main__ as calibrate
from lserve_jax.calibrate.passkeys import PasskeySamples, PasskeySettings
from lserve_jax.calibrate.sensitivity import Measurement
from lserve_jax.calibrate.windows import measured_sequences
from lserve_jax.model.head_shares import SHARES, fit_shares

FILES = ("head_sensitivity.tsv", "head_shares.tsv", "config.json")


@pytest.fixture
def command(word_model, word_text, tmp_path, capsys):
    """Runs the command with options added to small ones: exit code, stdout and stderr."""
    options = {
        "model": word_model,
        "output": tmp_path / "out",
        "text": word_text,
        "context": 448,
        "window": 24,
        "windows": 1,
        "decode_sink": 16,
        "decode_local": 64,
        "logical_page_size": 4,
        "heads_per_pass": 2,
        "num_passkeys": 2,
        "passkey_words": 6,
        "backend": "reference",
    }

    def run(*flags, **changes):
        argv = ["--head-shares", *flags]
        for name, value in {**options, **changes}.items():
            argv += [f"--{name.replace('_', '-')}", str(value)]
        code = calibrate.main([*argv, "--no-cache"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_what_it_writes_loads(command, word_model, tmp_path):
    code, out, err = command()
    assert code == 0, err
    sensitivity, shares = load_head_shares(tmp_path / "out")
    assert (sensitivity.streaming.shape, sensitivity.context) == ((3, 2), 448)
    assert (sensitivity.worth > 0).sum() >= 4 and (sensitivity.missed[0] > 0).all()
    np.testing.assert_array_equal(shares, fit_shares(sensitivity, 0.125, np.zeros((3, 2), bool)))
    assert set(shares.ravel()) <= set(SHARES) and shares.mean() <= 0.125
    assert f"6 KV heads: 0 read everything, mean share {shares.mean():.3f}; worth most:" in out
    assert "6/6" in err and "pass" in err  # the progress bar: 3 passes for each of 2 windows
    record = json.loads((tmp_path / "out" / "config.json").read_text())["head_shares"]
    wanted = {"model_name": str(word_model), "dtype": "float32", "window": 24, "windows": 1}
    wanted |= {"decode_sink": 16, "decode_local": 64, "logical_page_size": 4, "reuse_interval": 4}
    wanted |= {"lower_bound_weight": 0.5, "jax": jax.__version__, "device": "cpu", "seed": 0}
    assert wanted.items() <= record.items()
    assert len(record["text_sha256"]) == 64
    assert (tmp_path / "out" / "head_shares.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16(command, tmp_path):
    assert command("--no-plot", dtype="bfloat16", windows=2)[0] == 0
    exact = command("--no-plot", windows=2, output=tmp_path / "exact")
    assert exact[0] == 0
    rounded, precise = (load_head_shares(tmp_path / name)[0] for name in ("out", "exact"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["head_shares"]["dtype"] == (
        "bfloat16"
    )
    # Losses of up to half a nat, rounding of 2^-9 in every layer.
    np.testing.assert_allclose(rounded.worth, precise.worth, rtol=0.1, atol=1e-3)
    np.testing.assert_allclose(rounded.missed, precise.missed, atol=1e-3)


def test_what_is_measured_on(word_model, word_text):
    tokenizer, text = convert.load_tokenizer(word_model), word_text.read_text()
    assert tokenizer is not None
    measurement = Measurement(
        context=448, window=24, decode_local=64, logical_page_size=4, windows=3
    )
    settings = PasskeySettings(num_passkeys=2, passkey_words=6)
    sequences = measured_sequences(tokenizer, text, settings, measurement)
    assert [len(tokens) for tokens in sequences] == [472] * 6
    sample = PasskeySamples(
        tokenizer, text, dataclasses.replace(settings, max_length=472, num_lengths=1)
    )
    for i in range(3):
        np.testing.assert_array_equal(sequences[i], sample(i).tokens)
        assert sample(i).first_label <= 448  # the window is questions and answers
    ids = np.array(tokenizer.encode(text))  # 600: 128 places for a beginning
    for tokens, start in zip(sequences[3:], (21, 64, 106), strict=True):
        np.testing.assert_array_equal(tokens, ids[start : start + 472])


def test_a_stopped_run_continues_as_if_it_had_not_been(command, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("--no-plot", output=whole)[0] == 0
    assert not (whole / "head_shares.png").exists()

    write, kept = calibrate.write_checkpoint, []

    def write_and_stop(path, settings, arrays):
        write(path, settings, arrays)
        kept.append(len(arrays["losses"]))
        if len(kept) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "write_checkpoint", write_and_stop)
    assert command("--no-plot", output=parts)[0] == 130
    assert not (parts / "head_shares.tsv").exists()
    code, _, err = command("--no-plot", output=parts)
    assert code == 0 and "6/6" in err
    assert kept == [1, 2]
    for name in FILES:
        # To the bit: the same compiled program on the same numbers.
        assert (parts / name).read_bytes() == (whole / name).read_bytes()

    # A finished run is fitted to another budget without the weights.
    monkeypatch.setattr(convert, "load", None)
    before = (parts / "head_sensitivity.tsv").read_bytes()
    assert command("--no-plot", output=parts, budget_share=0.5, heads_per_pass=1)[0] == 0
    _, shares = load_head_shares(parts)
    assert 0.125 < shares.mean() <= 0.5
    assert (parts / "head_sensitivity.tsv").read_bytes() == before
    # Other settings are another run.
    code, _, err = command("--no-plot", output=parts, reuse_interval=8, seed=3)
    assert code == 2
    assert "reuse_interval was 4 and is 8; seed was 0 and is 3" in err


def test_gates_and_shares_lie_in_one_directory(command, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    gates = np.linspace(0, 1, 6).reshape(3, 2)
    save_pattern(out, gates, {"sink_size": 4, "recent_size": 16})
    assert command("--no-plot")[0] == 0
    np.testing.assert_allclose(load_pattern(out).gates, gates)
    assert load_head_shares(out)[0].context == 448
    (out / "head_shares_checkpoint.npz").unlink()  # as in what is shipped
    assert command("--no-plot")[0] == 0


def test_output_must_be_free(command, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    code, _, err = command(output=tmp_path / "notes")
    assert code == 2 and "holds files but no checkpoint.npz or head_shares_checkpoint.npz" in err


def test_a_damaged_checkpoint_is_named(command, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "head_shares_checkpoint.npz").write_bytes(b"nonsense")
    code, _, err = command()
    assert code == 2
    assert "head_shares_checkpoint.npz is not a checkpoint of this program" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "nowhere.txt"}, "text file 'nowhere.txt' does not exist"),
        ({"context": 500}, "context=500 and window=24 exceed the 512 tokens of"),
        ({"window": 60}, "window=60 exceeds the 44 tokens in which num_passkeys=2 are asked"),
        ({"num_passkeys": 10, "passkey_words": 32}, "raise max_length=472"),
        ({"heads_per_pass": 0}, "heads_per_pass=0 must be at least 1"),
        ({"budget_share": 0}, "budget_share=0.0 must lie in (0, 1]"),
        ({"budget_share": "nan"}, "budget_share=nan must lie in (0, 1]"),
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


def test_a_short_text_is_refused(command, tmp_path):
    (tmp_path / "short.txt").write_text("w1 " * 400)
    code, _, err = command(text=tmp_path / "short.txt")
    assert code == 2 and "the text has 400 tokens, context=448 and window=24 need 472" in err


def test_a_model_whose_layers_differ_is_refused(command, conformance, word_model, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (word_model / name).exists():
            (model / name).write_bytes((word_model / name).read_bytes())
    for path in (conformance / "smollm3-nope").iterdir():
        if not path.name.startswith("tokenizer"):
            (model / path.name).write_bytes(path.read_bytes())
    code, _, err = command(model=model)
    assert code == 2 and "layers without rotary embedding" in err


def test_a_loss_that_is_not_finite_ends_the_run(command, tmp_path, monkeypatch):
    load = convert.load

    def load_damaged(*args, **kwargs):
        config, params = load(*args, **kwargs)
        return config, jax.tree.map(lambda x: x * np.nan, params)

    monkeypatch.setattr(convert, "load", load_damaged)
    code, out, err = command()
    assert (code, out) == (2, "")
    assert "error: loss is nan at layer 0, head 0" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "head_shares.tsv").exists()


def test_settings_check_themselves(command):
    with pytest.raises(SystemExit, match="2"):
        command(context=300)


def test_plot_needs_matplotlib_before_any_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = command()
    assert code == 2 and "matplotlib" in err and not (tmp_path / "out").exists()
