"""Calibration and evaluation from Python: what is loaded goes in, tables and figures come out."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_checkpoints import save_character_tokenizer
from tiny_llm import write_pattern

import convert
from lserve_jax.calibrate import (
    GateTraining,
    Measurement,
    PasskeySamples,
    PasskeySettings,
    Sample,
    builtin_text,
    fit_shares,
    measure_heads,
    measured_sequences,
    plot_gates,
    plot_head_shares,
    train_gates,
)
from lserve_jax.calibrate import __main__ as calibrate_command
from lserve_jax.calibrate.layers import stack_layers
from lserve_jax.eval import Study, figures, markdown, run_study

TRAINING = GateTraining(steps=3, learning_rate=0.1, sink=4, recent=16)
PASSKEYS = PasskeySettings(max_length=128, num_lengths=1, num_passkeys=2, passkey_words=3)
MEASUREMENT = Measurement(
    context=448, window=24, windows=1, decode_sink=16, decode_local=64, logical_page_size=4
)


@pytest.fixture(scope="module")
def loaded(word_model):
    tokenizer = convert.load_tokenizer(word_model)
    assert tokenizer is not None
    return *convert.load(word_model, dtype="float32"), tokenizer


def assert_table(table, shape):
    """Columns of one length, a row for each layer and head in order."""
    layer, head = np.indices(shape)
    np.testing.assert_array_equal(table["layer"], layer.ravel())
    np.testing.assert_array_equal(table["head"], head.ravel())
    assert {len(column) for column in table.values()} == {layer.size}


def test_gates_are_those_of_the_command(loaded, word_model, word_text, tmp_path):
    config, params, tokenizer = loaded
    ids = tokenizer.encode(word_text.read_text(), add_special_tokens=False)
    samples = PasskeySamples(tokenizer, np.array(ids), PASSKEYS)  # the text as tokens
    seen = []
    trained = train_gates(
        config, params, samples, TRAINING, on_step=lambda _, history: seen.append(len(history))
    )
    assert seen == [1, 2, 3] and trained.history.shape == (3, 2)
    assert 0 not in stack_layers(params)["layers"]
    again = train_gates(config, stack_layers(params), samples, TRAINING)
    np.testing.assert_array_equal(trained.gates, again.gates)
    table = trained.table()
    assert_table(table, (3, 2))
    np.testing.assert_array_equal(table["gate"], trained.gates.ravel())
    assert isinstance(plot_gates(trained), Figure)
    convert.save_pattern(tmp_path, trained.gates, {"sink_size": 4, "recent_size": 16})
    np.testing.assert_allclose(convert.load_pattern(tmp_path).gates, trained.gates, rtol=1e-8)

    args = calibrate_command.CalibrateArgs(
        model=str(word_model),
        output=tmp_path / "out",
        text=word_text,
        samples=PASSKEYS,
        training=TRAINING,
        no_plot=True,
    )
    of_command = calibrate_command.calibrate(args)
    np.testing.assert_array_equal(of_command.gates, trained.gates)
    np.testing.assert_array_equal(of_command.history, trained.history)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample(np.array([1, 2, 160], np.int32), 1), r"token ids must lie in \[0, 160\), got 160"),
        (Sample(np.array([1, -2], np.int32), 1), r"token ids must lie in \[0, 160\), got -2"),
        (Sample(np.ones((1, 4), np.int32), 1), r"of shape \[T\], got int32 \(1, 4\)"),
        (Sample(np.ones(4, np.float32), 1), r"must be integers of shape \[T\], got float32"),
        (Sample(np.ones(4, np.int32), 4), r"first_label=4 of step 0 must lie in \[0, 4\)"),
    ],
)
def test_samples_that_do_not_fit_are_refused(loaded, sample, message):
    config, params, _ = loaded
    with pytest.raises(ValueError, match=message):
        train_gates(config, params, lambda step: sample, TRAINING)


def test_heads_are_measured_on_sequences_of_ones_own(loaded, word_text, tmp_path):
    config, params, tokenizer = loaded
    passkeys = dataclasses.replace(PASSKEYS, passkey_words=6)
    sequences = measured_sequences(tokenizer, word_text.read_text(), passkeys, MEASUREMENT)
    done = []
    sensitivity = measure_heads(
        config, params, MEASUREMENT, sequences, backend="reference", on_sequence=done.append
    )
    assert [len(measured.losses) for measured in done] == [1, 2]
    continued = measure_heads(
        config, params, MEASUREMENT, sequences, backend="reference", before=done[0]
    )
    np.testing.assert_array_equal(continued.worth, sensitivity.worth)
    table = sensitivity.table()
    assert_table(table, (3, 2))
    np.testing.assert_array_equal(table["worth"], sensitivity.worth.ravel())
    np.testing.assert_array_equal(table["missed_0.125"], sensitivity.missed[6].ravel())
    shares = fit_shares(sensitivity, 0.125)
    assert 0 < shares.mean() <= 0.125
    assert isinstance(plot_head_shares(sensitivity, shares), Figure)
    convert.save_head_shares(tmp_path, sensitivity, shares, {})
    written, of_file = convert.load_head_shares(tmp_path)
    assert written is not None and written.context == 448
    np.testing.assert_array_equal(of_file, shares)


def test_sequences_that_do_not_fit_are_refused(loaded):
    config, params, _ = loaded
    for sequences, message in (
        ([], "at least one sequence"),
        ([np.ones(100, np.int32)], "has 100 tokens, context=448 and window=24 are 472"),
        ([np.full(472, 160, np.int32)], "got 160"),
    ):
        with pytest.raises(ValueError, match=message):
            measure_heads(config, params, MEASUREMENT, sequences)


def test_the_command_says_value_error_for_a_model_without_tokenizer(conformance, tmp_path):
    args = calibrate_command.CalibrateArgs(
        model=str(conformance / "llama-tied"), output=tmp_path / "out", no_plot=True
    )
    for run in (calibrate_command.calibrate, calibrate_command.calibrate_head_shares):
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            run(args)


@pytest.fixture(scope="module")
def characters(conformance, tmp_path_factory):
    """A tiny model that reads characters: its config, parameters and tokenizer."""
    directory = tmp_path_factory.mktemp("characters")
    save_character_tokenizer(directory, ["\n", *(chr(32 + i) for i in range(95))])
    tokenizer = convert.load_tokenizer(directory)
    return *convert.load(conformance / "llama-tied", dtype="float32"), tokenizer


@pytest.mark.slow
def test_a_study_of_what_is_loaded(characters, tmp_path, monkeypatch):
    pattern = write_pattern(tmp_path / "p", [[0.9, 0.1], [0.2, 0.7], [0.4, 0.6]])
    sparse = f"lserve:budget=64,page=16,pattern={pattern},shares=none,control=inverted"
    study = Study(
        model="mine",
        tasks=("needle", "agreement"),
        compare=("dense", sparse, sparse.replace("budget=64", "budget=48")),
        lengths=(300,),
        texts={"topics": builtin_text()[:4000], "tokens": np.arange(4000) % 90},
        needles=("passkey",),
        haystacks=1,
        depths=2,
        windows=1,
        scored_tokens=8,
    )
    # Neither looks for a model called mine nor writes anything.
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = run_study(study, model=characters)
    assert sorted(tmp_path.rglob("*")) == before
    sources = [row["source"] for row in result["answers"]]
    assert sources == 3 * ["topics", "topics", "tokens", "tokens"]  # settings, depths
    assert len(result["predictions"]) == 3 * 2
    assert result["study"]["texts"] == ["topics", "tokens"]
    json.dumps(result)
    assert "| topics | passkey | 300 | `dense` |" in markdown(result)
    drawn = figures(result)
    assert list(drawn) == ["passkey", "budget"]
    assert all(isinstance(figure, Figure) for figure in drawn.values())
    assert figures(result | {"answers": []}) == {}
    # With an output the same rows, in files.
    needles = {"tasks": ("needle",), "compare": ("dense",)}
    written = dataclasses.replace(study, output=tmp_path / "out", plot=True, **needles)
    assert run_study(written, model=characters)["answers"] == result["answers"][:4]
    assert (tmp_path / "out" / "passkey.png").exists()
    # The weights given are those that run.
    config, params, tokenizer = characters
    other = jax.tree.map(lambda x: x * 0.5, params)
    dense = dataclasses.replace(study, tasks=("perplexity",), compare=("dense",))
    changed = run_study(dense, model=(config, other, tokenizer))["predictions"]
    assert changed[0]["logprobs"] != result["predictions"][0]["logprobs"]


def test_what_needs_an_output_says_so():
    for name in ("plot", "resume"):
        with pytest.raises(ValueError, match=f"{name}=True needs an output directory"):
            Study(model="m", tasks=("needle",), compare=("dense",), lengths=(64,), **{name: True})


def test_texts_of_ones_own_are_checked(characters):
    common = {"model": "m", "tasks": ("perplexity",), "compare": ("dense",), "lengths": (300,)}
    with pytest.raises(ValueError, match="text 'short' has 3 tokens, prompts this long need 300"):
        run_study(Study(texts={"short": "abc"}, **common), model=characters)
    with pytest.raises(ValueError, match="must name at least one"):
        Study(texts={}, **common)
