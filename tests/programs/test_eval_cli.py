"""``python -m lserve_jax.eval`` with a tiny model: its files, its tables, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tiny_llm import write_pattern

import convert
from convert.attention_patterns import load_pattern
from lserve_jax import LLM
from lserve_jax.attention.config import SparsityConfig
from lserve_jax.eval import __main__ as command
from lserve_jax.eval import report
from lserve_jax.eval.model import extend_rope
from lserve_jax.eval.report import mean_interval, wilson_interval
from lserve_jax.eval.settings import control_pattern, parse_settings, resolve_sparsity
from lserve_jax.model.config import ModelConfig, RopeConfig
from lserve_jax.tokenizer import Tokenizer

GATES = [[0.9, 0.1], [0.2, 0.7], [0.4, 0.6]]  # of the tiny checkpoint: 3 layers, 2 KV heads


@pytest.fixture(autouse=True)
def keep_the_tests_compile_cache(monkeypatch):
    monkeypatch.setattr(command, "keep_compiled", lambda cache: False)


@pytest.fixture(scope="module")
def checkpoint(conformance, tmp_path_factory) -> Path:
    """A tiny random model with a tokenizer of single characters, and no chat template."""
    return make_checkpoint(conformance, tmp_path_factory.mktemp("plain") / "model", None)


@pytest.fixture(scope="module")
def chat_checkpoint(conformance, tmp_path_factory) -> Path:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[answer]"
    return make_checkpoint(conformance, tmp_path_factory.mktemp("chat") / "model", template)


def make_checkpoint(conformance: Path, directory: Path, template: str | None) -> Path:
    shutil.copytree(conformance / "llama-tied", directory)
    characters = ["\n", *(chr(32 + i) for i in range(95)), *(chr(0xC0 + i) for i in range(64))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[])
    )
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=template)
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def pattern(tmp_path_factory) -> str:
    return write_pattern(tmp_path_factory.mktemp("pattern") / "p", GATES)


def run(capsys, *argv) -> tuple[int, str, str]:
    try:
        code = command.main([str(argument) for argument in argv])
    except SystemExit as stopped:  # tyro's way out
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


SMALL = ("--lengths", 300, "--haystacks", 1, "--depths", 2, "--needles", "passkey")
SPARSE = "lserve:budget=64,page=16,decode_sink=16,decode_local=16"


@pytest.mark.slow
def test_needles_perplexity_and_agreement_end_to_end(
    capsys, chat_checkpoint, pattern, tmp_path, monkeypatch
):
    sparse = f"{SPARSE},pattern={pattern},shares=none,control=random"
    argv = ["--model", chat_checkpoint, *SMALL, "--output", tmp_path, "--plot"]
    argv += ["--tasks", "needle", "perplexity", "agreement", "--windows", 2]
    argv += ["--scored-tokens", 9, "--max-num-seqs", 2]
    argv += ["--compare", "dense", sparse, sparse.replace("budget=64", "budget=48")]
    code, out, err = run(capsys, *argv)
    assert code == 0, err
    result = json.loads((tmp_path / "results.json").read_text())
    assert len(result["answers"]) == 3 * 2  # settings, depths
    assert {row["depth"] for row in result["answers"]} == {0.25, 0.75}
    assert all(0 < len(row["text"]) <= 32 for row in result["answers"])  # characters
    assert len(result["predictions"]) == 3 * 2  # settings, windows
    of_setting = {name: [] for name in result["settings"]}
    for row in result["predictions"]:
        of_setting[row["setting"]] += row["divergence"]
    assert np.abs(of_setting["dense"]).max() == 0
    assert np.mean(of_setting[sparse]) > 1e-6
    assert result["settings"]["dense"] is None
    assert result["settings"][sparse]["control"] == "random"
    assert str(chat_checkpoint) in result["command"]
    table = (tmp_path / "results.md").read_text()
    assert out.strip() == table.strip()
    assert "| documentation | passkey | 300 | `dense` | 0.0 | 0.0 to 65.8 | 2 |  | 100.0 |" in table
    assert "nats a token" in table and "same likeliest token" in table
    for picture in ("passkey.png", "budget.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    # The same seed asks and answers the same; finished settings are not run again.
    needles = [*argv[: argv.index("--tasks")], "--tasks", "needle", "--max-num-seqs", 2]
    needles += ["--compare", "dense", sparse]
    assert "its study is" in refusal(capsys, *needles, "--resume")
    assert "give another output directory" in refusal(capsys, *needles)  # they would be lost
    needles[needles.index("--output") + 1] = tmp_path / "again"
    run(capsys, *needles)
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["answers"] == result["answers"][:4]
    monkeypatch.setattr(LLM, "generate", None)
    code, out, _ = run(capsys, *needles, "--resume")
    assert (code, out.strip()) == (0, report.markdown(again | {"command": command_of(out)}).strip())


def command_of(markdown: str) -> str:
    return markdown.split("`")[1]


def refusal(capsys, *argv) -> str:
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    lines = [x for x in err.replace("\r", "\n").splitlines() if x and "tensor/s]" not in x]
    (sentence,) = lines
    assert sentence.startswith("error: ")
    return sentence


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--compare", "at least one setting"),
        ("--compare dense dense", "setting 'dense' is given twice"),
        ("--compare sparse", "setting 'sparse' must be dense, lserve or lserve:key=value"),
        ("--compare dense:budget=64", "budget in setting 'dense:budget=64' is for lserve, dense"),
        (
            "--compare dense:prefill_dtype=int4",
            "prefill_dtype=int4 in setting 'dense:prefill_dtype",
        ),
        ("--compare lserve:", "'' in setting 'lserve:' must be key=value"),
        ("--compare lserve:budget", "'budget' in setting 'lserve:budget' must be key=value"),
        ("--compare lserve:bugdet=1", "unknown key 'bugdet' in setting"),
        ("--compare dense:weights=int4", "unknown key 'weights' in setting 'dense:weights=int4'"),
        ("--compare lserve:budget=many", "budget=many in setting 'lserve:budget=many' must be of"),
        ("--compare lserve:page=17", "setting 'lserve:page=17': page_size=17"),
        ("--compare lserve:page=16,page=32", "page is given twice"),
        ("--compare lserve:pattern=nobody", "pattern 'nobody' is neither a directory nor"),
        ("--compare lserve:control=random", "control=random in setting"),
        ("--compare lserve:pattern=x,shares=none,control=reversed", "must be inverted or random"),
        ("--compare lserve:fraction=0.5", "needs a head pattern"),
        ("--compare dense:exact=sparse", "exact in setting 'dense:exact=sparse' is for lserve"),
        ("--compare lserve:exact=yes", "exact=yes in setting 'lserve:exact=yes' must be sparse or"),
        (
            "--compare lserve:exact=ngram,budget=64",
            "exact=ngram in setting 'lserve:exact=ngram,budget=64' has no sparse steps, so that it "
            "takes no budget",
        ),
        (
            "--compare lserve:exact=sparse,prefill=block_sparse",
            "setting 'lserve:exact=sparse,prefill=block_sparse': exact=True needs prefill='causal'",
        ),
        ("--tasks agreement --compare dense", "task agreement compares settings"),
        ("--tasks agreement --resume", "task agreement cannot be resumed"),
        ("--haystacks 0", "haystacks=0 must be at least 1"),
        ("--lengths 0", "lengths=(0,) must be positive"),
        ("--lengths 64 64", "lengths=(64, 64) must name at least one, and none twice"),
        ("--model no-such-model", "'no-such-model'"),
    ],
)
def test_refused_before_a_model_is_read(capsys, argv, sentence):
    assert sentence in refusal(capsys, *argv.split())


def test_refused_once_the_model_is_known(capsys, checkpoint, pattern, conformance, tmp_path):
    (tmp_path / "short.txt").write_text("The text is too short.\n")
    other = write_pattern(tmp_path / "other", [[1.0] * 8] * 32)
    for argv, sentence in (
        (("--lengths", 300, "--chat"), "--chat needs a chat template, the checkpoint has none"),
        (("--lengths", 300, "--text", tmp_path / "short.txt"), "has 23 tokens, prompts this long"),
        (
            ("--lengths", 300, "--text", tmp_path / "none.txt"),
            "is no file, and none of documentation, stories",
        ),
        (("--lengths", 490), "up to 522 tokens, the model's limit is 512; --rope-extend"),
        (("--lengths", 300, "--tasks", "ruler"), "tokens"),
        (
            ("--lengths", 300, "--compare", f"lserve:pattern={other}"),
            "is of (32, 8) (layers, KV heads), the model has (3, 2)",
        ),
    ):
        small = ("--depths", 2, "--output", tmp_path / "out")
        assert sentence in refusal(capsys, "--model", checkpoint, *small, *argv), argv
    without = conformance / "llama-tied"
    assert "has no tokenizer" in refusal(capsys, "--model", without, "--lengths", 300)
    assert not (tmp_path / "out").exists()


def test_too_many_tokens_are_refused_before_weights_are_read(
    capsys, checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setattr(convert, "load", None)
    argv = ("--model", checkpoint, "--depths", 2, "--output", tmp_path, "--lengths", 490)
    assert "the model's limit is 512" in refusal(capsys, *argv)


def test_help_names_every_key_of_a_setting(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    with pytest.raises(ValueError, match="; known: ") as unknown:
        parse_settings(["lserve:nothing=1"])
    keys = str(unknown.value).partition("; known: ")[2].split(", ")
    assert set(keys) <= set(re.findall(r"\w+", out.partition("--model")[0]))


@pytest.mark.parametrize(
    ("argv", "words"),
    [("--tasks niddle", "niddle needle ruler perplexity agreement"), ("--nothing 1", "--nothing")],
)
def test_usage_errors_name_option_and_choices(capsys, argv, words):
    code, out, err = run(capsys, *argv.split())
    assert (code, out) == (2, "")
    assert all(word in err for word in words.split())


def test_a_missing_matplotlib_is_said_at_once(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "lserve-jax[plot]" in refusal(capsys, "--model", "no-such-model", "--plot")


@pytest.mark.slow
def test_exact_settings_are_as_dense(capsys, chat_checkpoint, tmp_path):
    """Their answers, and what they think of a text, up to rounding."""
    exact = "lserve:budget=64,page=16,decode_sink=16,decode_local=16,exact=sparse"
    argv = ["--model", chat_checkpoint, *SMALL, "--output", tmp_path, "--dtype", "float32"]
    argv += ["--tasks", "needle", "perplexity", "--windows", 1, "--scored-tokens", 9]
    argv += ["--compare", "dense", exact, "lserve:exact=ngram"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    result = json.loads((tmp_path / "results.json").read_text())
    answers = {}
    for answer in result["answers"]:
        answers.setdefault(answer["setting"], []).append(answer["text"])
    assert answers["dense"] == answers[exact] == answers["lserve:exact=ngram"]
    thought = {x["setting"]: x["logprobs"] for x in result["predictions"]}
    for name in (exact, "lserve:exact=ngram"):
        np.testing.assert_allclose(thought[name], thought["dense"], rtol=0, atol=1e-4)
    assert [result["settings"][name] for name in ("dense", "lserve:exact=ngram")] == [
        None,
        {"exact": "ngram"},
    ]


def test_a_study_knows_its_weights_and_keys(capsys, checkpoint, tmp_path):
    argv = ["--model", checkpoint, "--output", tmp_path, "--tasks", "perplexity", "--windows", 2]
    argv += ["--lengths", 80, "--scored-tokens", 9, "--compare", "dense", "--max-num-seqs", 2]
    losses = []
    rounded = ["--weights", "fp8", "--kv-dtype", "int4"]
    for kinds in ([], rounded):
        code, out, err = run(capsys, *argv, *kinds)
        assert code == 0, err
        assert ("weights fp8, keys and values int4" in out) == bool(kinds)
        result = json.loads((tmp_path / "results.json").read_text())
        losses.append([row["logprobs"] for row in result["predictions"]])
        (tmp_path / "results.json").rename(tmp_path / f"{len(losses)}.json")
    assert losses[0] != losses[1]
    # Weights have three bits of mantissa, keys and values four bits.
    np.testing.assert_allclose(*losses, atol=0.6, rtol=0)
    (tmp_path / "2.json").rename(tmp_path / "results.json")
    for kinds, words in (
        (["--weights", "int8", *rounded[2:]], "its weights is fp8, now it is int8; give another"),
        (rounded[:2], "its kv_dtype is int4, now it is None; give another output directory"),
    ):
        code, _, err = run(capsys, *argv, "--resume", *kinds)
        assert code == 2
        assert words in err


@pytest.mark.slow
def test_lengths_beyond_the_limit_run_with_stretched_positions(capsys, checkpoint, tmp_path):
    argv = ["--model", checkpoint, "--lengths", 520, "--haystacks", 1, "--depths", 1]
    argv += ["--needles", "passkey", "--compare", "dense", "--output", tmp_path, "--rope-extend"]
    code, _, err = run(capsys, *argv)
    assert code == 0, err
    assert len(json.loads((tmp_path / "results.json").read_text())["answers"]) == 1


def test_stretching_takes_the_least_whole_factor():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    config = ModelConfig(**sizes, max_position_embeddings=512, rope=RopeConfig(rope_theta=5e5))
    longer = extend_rope(config, 1025)
    assert longer.max_position_embeddings == 1536
    assert longer.rope == RopeConfig(
        rope_theta=5e5, rope_type="yarn", factor=3.0, original_max_position_embeddings=512
    )
    with pytest.raises(NotImplementedError, match="rope_type='yarn'"):
        extend_rope(longer, 2000)


def test_settings_are_what_they_say():
    text = "lserve:pattern=llama-3-8b-instruct-gradient-1048k,fraction=0.25,budget=512,page=32"
    text += ",logical=16,selected=32,lower=0.25,interval=8,prefill_local=1024"
    text += ",prefill=block_sparse,prefill_threshold=0.8,prefill_min_tokens=1000"
    text += ",shares=none,control=inverted"
    dense, plain, full, rounded, both = parse_settings(
        ["dense", "lserve", text, "dense:prefill_dtype=fp8", "lserve:budget=64,prefill_dtype=int8"]
    )
    assert (dense.name, dense.sparsity, dense.prefill_dtype) == ("dense", None, None)
    assert (rounded.sparsity, rounded.prefill_dtype) == (None, "fp8")
    assert (both.sparsity, both.prefill_dtype) == (SparsityConfig(token_budget=64), "int8")
    assert plain.sparsity == SparsityConfig()
    drafted, looked_up = parse_settings(["lserve:budget=64,exact=sparse", "lserve:exact=ngram"])
    assert (drafted.sparsity, drafted.exact) == (SparsityConfig(token_budget=64), "sparse")
    assert (looked_up.sparsity, looked_up.exact) == (None, "ngram")
    assert full.control == "inverted"
    assert full.sparsity == SparsityConfig(
        pattern="llama-3-8b-instruct-gradient-1048k",
        head_shares=None,
        streaming_fraction=0.25,
        token_budget=512,
        page_size=32,
        logical_page_size=16,
        selected_page_size=32,
        lower_bound_weight=0.25,
        reuse_interval=8,
        prefill_local=1024,
        prefill="block_sparse",
        prefill_threshold=0.8,
        prefill_min_tokens=1000,
    )


def test_controls_are_the_same_gates_for_other_heads(pattern, tmp_path):
    gates = load_pattern(pattern)
    inverted = control_pattern(gates, "inverted", 0).gates
    assert (np.argsort(inverted.ravel()) == np.argsort(gates.gates.ravel())[::-1]).all()
    shuffled = control_pattern(gates, "random", 0).gates
    assert sorted(shuffled.ravel()) == sorted(gates.gates.ravel())
    assert (shuffled != gates.gates).any()
    assert (shuffled == control_pattern(gates, "random", 0).gates).all()
    assert (shuffled != control_pattern(gates, "random", 1).gates).any()
    (setting,) = parse_settings([f"lserve:pattern={pattern},shares=none,control=random"])
    written = resolve_sparsity(setting, tmp_path, 0)
    np.testing.assert_allclose(load_pattern(written.pattern).gates, shuffled)


def test_intervals_are_those_of_the_books():
    # Agresti and Coull 1998 for Wilson's: 0 of 10 gives [0, 0.278]; 5 of 10 [0.237, 0.763].
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.278), abs=5e-4)
    assert wilson_interval(0.5, 10) == pytest.approx((0.237, 0.763), abs=5e-4)
    assert wilson_interval(1.0, 200)[1] == 1.0
    with pytest.raises(ValueError, match="at least one trial"):
        wilson_interval(0.5, 0)
    mean, half = mean_interval([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert half == pytest.approx(1.96 * 1.29099 / 2, rel=1e-4)
    assert mean_interval([0.25]) == (0.25, 0.0)
