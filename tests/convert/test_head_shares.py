"""Head shares on disk: what is written is read back, and what is damaged is named."""

import json

import numpy as np
import pytest

import convert
from convert import attention_patterns
from convert.attention_patterns import load_pattern, save_pattern
from convert.head_shares import has_head_shares, load_head_shares, save_head_shares
from lserve_jax.model.head_shares import MISSED_AT, HeadSensitivity, fit_shares

SETTINGS = {"budget_share": 0.125, "model_name": "made-up"}


def make_sensitivity(layers=3, heads=2, seed=0):
    rng = np.random.default_rng(seed)
    shape = (layers, heads)
    return HeadSensitivity(
        streaming=rng.random(shape),
        selecting=rng.random(shape),
        missed=-np.sort(-rng.random((len(MISSED_AT), *shape)), axis=0),
        name="measured",
        context=4096,
    )


def write(directory, sensitivity=None, shares=None, settings=SETTINGS):
    directory.mkdir(parents=True, exist_ok=True)
    sensitivity = sensitivity or make_sensitivity()
    streams = np.zeros(sensitivity.streaming.shape, bool)
    shares = fit_shares(sensitivity, 0.125, streams) if shares is None else shares
    save_head_shares(directory, sensitivity, shares, settings)
    return directory


@pytest.mark.parametrize("shape", [(3, 2), (1, 1), (12, 1)])
def test_what_is_written_is_read(tmp_path, shape):
    written = make_sensitivity(*shape)
    directory = write(tmp_path / "tiny", written)
    sensitivity, shares = convert.load_head_shares(str(directory))
    assert (sensitivity.name, sensitivity.context) == ("tiny", 4096)
    for field in ("streaming", "selecting", "missed"):
        np.testing.assert_allclose(getattr(sensitivity, field), getattr(written, field), rtol=1e-8)
    # To the bit: shares are short binary fractions.
    np.testing.assert_array_equal(shares, fit_shares(written, 0.125, np.zeros(shape, bool)))
    assert has_head_shares(directory)


def test_gates_and_shares_keep_each_others_settings(tmp_path):
    training = {"sink_size": 64, "recent_size": 192, "steps": 5}
    save_pattern(tmp_path, np.array([[0.5, 1.0]] * 3), training)
    assert not has_head_shares(tmp_path)
    write(tmp_path)
    both = json.loads((tmp_path / "config.json").read_text())
    assert both == {**training, "head_shares": {**SETTINGS, "context": 4096}}
    save_pattern(tmp_path, np.array([[0.25, 1.0]] * 3), training)
    assert json.loads((tmp_path / "config.json").read_text()) == both
    assert load_pattern(tmp_path).sink_size == 64
    assert load_head_shares(tmp_path)[0].context == 4096


def test_names_are_those_of_patterns(tmp_path):
    nested = write(tmp_path / "tiny" / "lr=0.02")
    assert load_head_shares(tmp_path / "tiny")[0].name == "tiny"
    write(tmp_path / "tiny" / "lr=0.01")
    for function in (load_head_shares, has_head_shares):
        with pytest.raises(ValueError, match=r"several patterns.*lr=0\.01, lr=0\.02"):
            function(tmp_path / "tiny")
        with pytest.raises(ValueError, match="neither a directory nor a shipped pattern"):
            function("Llama-9B")
    # Its gates are known, its shares are not.
    assert not has_head_shares("mistral-7b-instruct-v0.2")
    with pytest.raises(ValueError, match=r"mistral-7b-instruct-v0\.2 holds no head_shares\.tsv"):
        load_head_shares("mistral-7b-instruct-v0.2")
    with pytest.raises(ValueError, match=r"holds no head_shares\.tsv; python -m lserve_jax"):
        load_head_shares(write_nothing(tmp_path / "empty"))
    assert load_head_shares(nested)[0].name == "lr=0.02"


def test_shipped_shares(tmp_path, monkeypatch):
    write(tmp_path / "shipped" / "Tiny-1B")
    monkeypatch.setattr(attention_patterns, "_shipped", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert load_head_shares("made-up/tiny-1b")[0].name == "Tiny-1B"
    # A folder of that name that is no pattern, a checkpoint say, is not meant; a pattern is.
    write_nothing(tmp_path / "tiny-1b")
    assert has_head_shares("tiny-1b")
    save_pattern(tmp_path / "tiny-1b", np.ones((3, 2)), {"sink_size": 64, "recent_size": 192})
    assert not has_head_shares("tiny-1b")


def write_nothing(directory):
    directory.mkdir()
    return directory


def test_a_config_that_is_damaged_stays_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_shares_alone(tmp_path):
    """Shares of another program, or written by hand."""
    (tmp_path / "head_shares.tsv").write_text("0.5\t1\n0.0625\t0.25\n")
    sensitivity, shares = load_head_shares(tmp_path)
    assert sensitivity is None
    assert shares.tolist() == [[0.5, 1.0], [0.0625, 0.25]]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"holds no config\.json"),
        ("{", r"config\.json is not JSON"),
        ("[]", r"config\.json must be a JSON object"),
        ('{"sink_size": 4}', r"config\.json must have 'head_shares'"),
        ('{"head_shares": 3}', r"config\.json: head_shares must be an object, got 3"),
        (
            '{"head_shares": {"budget_share": 0.5, "context": 1.5}}',
            r"config\.json: head_shares\.context must be a positive integer below 2\^31, got 1\.5",
        ),
    ],
)
def test_damaged_configs(tmp_path, config, message):
    directory = write(tmp_path)
    (directory / "config.json").unlink()
    if config is not None:
        (directory / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        load_head_shares(directory)


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ("0.5\t0\n1\t1\n1\t1\n", r"shares in \(0, 1\], got 0\.0 at layer 0, head 1"),
        ("0.5\t1\n1\t1\n1\t1.5\n", r"shares in \(0, 1\], got 1\.5 at layer 2, head 1"),
        ("0.5\t1\nnan\t1\n1\t1\n", r"shares in \(0, 1\], got nan at layer 1, head 0"),
        ("0.5\t1\n1\n1\t1\n", "as many shares in every layer, got 2 in layer 0 and 1 in layer 1"),
        ("0.5\tall\n1\t1\n1\t1\n", "must hold numbers, got 'all' at layer 0, head 1"),
        (
            "0.5\t1\n1\t1\n",
            r"is of \(2, 2\) \(layers, KV heads\), head_sensitivity\.tsv of \(3, 2\)",
        ),
        ("", "a row for every layer, it is empty"),
    ],
)
def test_damaged_shares(tmp_path, shares, message):
    directory = write(tmp_path)
    (directory / "head_shares.tsv").write_text(shares)
    with pytest.raises(ValueError, match=rf"head_shares\.tsv .*{message}"):
        load_head_shares(directory)


def edited(lines, line, column, cell):
    cells = lines[line].split("\t")
    cells[column] = cell
    return [*lines[:line], "\t".join(cells), *lines[line + 1 :]]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [], "must begin with the columns layer, head, streaming, selecting"),
        (lambda lines: lines[1:], "must begin with the columns"),
        (lambda lines: lines[:1], "a row for every KV head, .*got 0 of layer 0 and 0 in all"),
        (lambda lines: lines[:-1], "a row for every KV head, .*got 2 of layer 0 and 5 in all"),
        (lambda lines: edited(lines, 4, 0, "2"), "layer 1, head 1 in line 5, got 2, 1"),
        (lambda lines: edited(lines, 2, 1, "0"), "layer 0, head 1 in line 3, got 0, 0"),
        (lambda lines: edited(lines, 3, 2, "x"), "numbers, got 'x' as streaming in line 4"),
        (lambda lines: edited(lines, 3, 2, "1\t2"), "must have 14 columns, got 15 in line 4"),
        (lambda lines: edited(lines, 3, 2, "-1"), r"negative, got -1\.0 at layer 1, head 0"),
        (lambda lines: edited(lines, 6, 5, "nan"), "finite and not negative, got nan at layer 2"),
    ],
)
def test_damaged_sensitivities(tmp_path, edit, message):
    directory = write(tmp_path)
    path = directory / "head_sensitivity.tsv"
    path.write_text("\n".join(edit(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=rf"head_sensitivity\.tsv.*{message}"):
        load_head_shares(directory)


def test_half_of_the_files(tmp_path):
    directory = write(tmp_path)
    (directory / "head_sensitivity.tsv").unlink()
    assert load_head_shares(directory)[0] is None
    write(tmp_path)
    (directory / "head_shares.tsv").unlink()
    with pytest.raises(ValueError, match=r"holds no head_shares\.tsv"):
        load_head_shares(directory)
