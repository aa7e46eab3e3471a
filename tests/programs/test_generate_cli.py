"""The command line: what it prints, and one sentence with exit code 2 for every mistake."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.monitoring
import numpy as np
import pytest
from tiny_checkpoints import save_character_tokenizer

from lserve_jax import generate, model_args
from lserve_jax.cli import read_stdin, read_text
from lserve_jax.stats import CompileClock, end_summary, request_summary

PROMPT_LENGTH = 40  # of the goldens in tests/data/conformance


@pytest.fixture(autouse=True)
def keep_the_tests_compile_cache(monkeypatch):
    monkeypatch.setattr(model_args, "keep_compiled", lambda cache: False)


@pytest.fixture(scope="session")
def checkpoint(conformance) -> Path:
    """A tiny random model without a tokenizer."""
    return conformance / "llama-tied"


@pytest.fixture(scope="session")
def chat_checkpoint(checkpoint, tmp_path_factory) -> Path:
    """The same model with a tokenizer of 160 single characters and a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(checkpoint, directory)
    characters = [chr(32 + i) for i in range(95)] + [chr(0xC0 + i) for i in range(65)]
    save_character_tokenizer(directory, characters)
    return directory


def golden_prompt_and_answer(checkpoint: Path) -> tuple[list[int], list[int]]:
    golden = np.load(checkpoint / "golden.npz")
    assert golden["greedy_prompt_len"] == PROMPT_LENGTH
    return golden["input_ids"][0, :PROMPT_LENGTH].tolist(), golden["greedy_tokens"][0].tolist()


def run(capsys, *argv) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line."""
    try:
        code = generate.main([str(argument) for argument in argv])
    except SystemExit as stopped:  # tyro's way out, for help and usage errors
        code = stopped.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_token_ids_in_token_ids_out(capsys, checkpoint):
    prompt, answer = golden_prompt_and_answer(checkpoint)
    code, out, _ = run(
        capsys, "--model", checkpoint, "--max-tokens", len(answer), "--prompt-token-ids", *prompt
    )
    assert code == 0
    assert out.split() == [str(token) for token in answer]


def test_two_processes_at_once_keep_what_a_third_one_loads(checkpoint, tmp_path):
    prompt, answer = golden_prompt_and_answer(checkpoint)
    # What takes long to import, and is for tracing, training, pictures or other formats.
    unneeded = ("flax", "optax", "orbax", "matplotlib", "lm_eval", "huggingface_hub", "starlette")
    script = "import sys; from lserve_jax import generate; assert generate.main() == 0\n"
    script += f"print([name for name in {unneeded} if name in sys.modules], file=sys.stderr)"
    command = [sys.executable, "-c", script, "--json", "--model", str(checkpoint)]
    command += ["--max-tokens", str(len(answer)), "--stats", "--prompt-token-ids"]

    def start() -> subprocess.Popen:
        return subprocess.Popen(
            [*command, *map(str, prompt)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **{"XDG_CACHE_HOME": str(tmp_path), "PATH": "", "JAX_PLATFORMS": "cpu"},
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            },
            cwd=Path(generate.__file__).parent.parent,
        )

    def said(process: subprocess.Popen) -> tuple[str, str]:
        """What became of its programs, and which of the modules it imported."""
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert json.loads(out)["token_ids"] == answer
        found = re.search("^programs  (.*)$", err, re.MULTILINE)
        assert found, err
        return found[1], err.splitlines()[-1]

    for process in (start(), start()):
        # The quicker one's programs may be there when the other one asks for them.
        assert re.search(r"\d (compiled|loaded) in", said(process)[0])
    programs, imported = said(start())
    assert re.fullmatch(r"3 loaded in \d+\.\d\d s, summed over threads", programs)
    assert imported == "[]"
    made = tmp_path / "lserve-jax"
    assert len([path for path in (made / "programs").iterdir() if path.suffix != ".used"]) == 3
    assert list((made / "jit").iterdir())


def test_without_the_cache_nothing_is_kept(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.undo()  # what keeps the tests' own cache
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prompt, answer = golden_prompt_and_answer(checkpoint)
    argv = ["--model", checkpoint, "--max-tokens", len(answer), "--no-cache"]
    code, out, _ = run(capsys, *argv, "--prompt-token-ids", *prompt)
    assert (code, out.split()) == (0, [str(token) for token in answer])
    assert not list(tmp_path.iterdir())


def test_warmup_compiles_before_the_prompt_runs(capsys, checkpoint):
    prompt, answer = golden_prompt_and_answer(checkpoint)
    argv = ["--model", checkpoint, "--max-tokens", len(answer), "--prompt-token-ids", *prompt]
    code, out, err = run(capsys, *argv, "--warmup", "auto", "--stats")
    assert (code, out.split()) == (0, [str(token) for token in answer])
    assert re.search(r"^programs  5 compiled in", err, re.MULTILINE)


def test_json_has_text_tokens_reason_and_timings(capsys, chat_checkpoint):
    code, out, _ = run(
        capsys, "--model", chat_checkpoint, "--prompt", "Hello", "--max-tokens", 8, "--json"
    )
    assert code == 0
    (line,) = out.splitlines()
    record = json.loads(line)
    assert record["finish_reason"] == "length"
    assert len(record["token_ids"]) == len(record["text"]) == record["generated_tokens"] == 8
    assert record["prompt_tokens"] == len("[user] Hello [answer]")
    assert {"prefill_seconds", "first_token_seconds", "decode_seconds"} <= record["timings"].keys()
    assert all(seconds > 0 for name, seconds in record["timings"].items() if "queue" not in name)


def prompt_tokens(capsys, checkpoint, *argv) -> int:
    _, out, _ = run(capsys, "--model", checkpoint, "--max-tokens", 1, "--json", *argv)
    return json.loads(out)["prompt_tokens"]


def test_chat_template_is_used_if_there_is_one_and_not_refused(capsys, chat_checkpoint):
    for argv, text in (
        (["--prompt", "Hello"], "[user] Hello [answer]"),
        (["--prompt", "Hello", "--chat"], "[user] Hello [answer]"),
        (["--prompt", "Hello", "--no-chat"], "Hello"),
        (["--prompt", "Hello", "--system", "Hm"], "[system] Hm [user] Hello [answer]"),
    ):
        assert prompt_tokens(capsys, chat_checkpoint, *argv) == len(text)


def test_prompt_from_file_and_from_stdin(capsys, chat_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("ÀÁÂ!", encoding="utf-8")
    argv = ["--no-chat", "--prompt-file"]
    assert prompt_tokens(capsys, chat_checkpoint, *argv, tmp_path / "prompt.txt") == 4
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert prompt_tokens(capsys, chat_checkpoint, *argv, "-") == 5


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("ÀÁÂ!", encoding="utf-8-sig")
    assert read_text(tmp_path / "prompt.txt", "prompt file") == "ÀÁÂ!"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffHello"))
    assert read_stdin() == "Hello"


def test_standard_input_that_gives_no_text(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    with pytest.raises(ValueError, match="standard input is not text"):
        read_stdin()
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed"):
        read_stdin()


def test_text_is_written_as_it_is_made(capsys, chat_checkpoint, monkeypatch):
    argv = ["--model", chat_checkpoint, "--prompt", "Hello", "--max-tokens", 60]
    whole = json.loads(run(capsys, *argv, "--json")[1])["text"]
    flushes = []
    flush = sys.stdout.flush
    monkeypatch.setattr(sys.stdout, "flush", lambda: (flushes.append(1), flush()))
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert out == whole + "\n"
    assert len(flushes) > 1


def test_stop_ends_the_text_before_the_stop_string(capsys, chat_checkpoint):
    argv = ["--model", chat_checkpoint, "--prompt", "Hello", "--max-tokens", 16, "--json"]
    whole = json.loads(run(capsys, *argv)[1])["text"]
    stop = whole[5:7]
    record = json.loads(run(capsys, *argv, "--stop", "no such text", "--stop", stop)[1])
    assert record["finish_reason"] == "stop"
    assert record["text"] == whole[: whole.index(stop)]


def test_stop_token_ids_end_it_too(capsys, checkpoint):
    argv = ["--model", checkpoint, "--prompt-token-ids", *range(1, 9), "--max-tokens", 8]
    whole = json.loads(run(capsys, *argv, "--json")[1])["token_ids"]
    argv += ["--json", "--stop-token-ids", whole[4], whole[2]]
    record = json.loads(run(capsys, *argv)[1])
    end = min(whole.index(whole[4]), whole.index(whole[2])) + 1
    assert (record["finish_reason"], record["token_ids"]) == ("stop", whole[:end])


@pytest.mark.parametrize(
    ("argv", "skipped"),
    [((), True), (("--skip-special-tokens",), True), (("--no-skip-special-tokens",), False)],
)
def test_special_tokens_are_shown_or_not(monkeypatch, argv, skipped):
    seen = []
    monkeypatch.setattr(generate, "_load", lambda args: seen.append(args) or sys.exit(0))
    with pytest.raises(SystemExit):
        generate.main(["--prompt", "Hello", *argv])
    assert generate._sampling_params(seen[0]).skip_special_tokens is skipped


def test_stats_name_the_tokens_that_end_an_answer(capsys, checkpoint, chat_checkpoint):
    end = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    argv = ["--max-tokens", 1, "--stats", "--model"]
    _, _, err = run(capsys, *argv, checkpoint, "--prompt-token-ids", 1)
    assert f"\nends at   {end}\n" in err
    _, _, err = run(capsys, *argv, chat_checkpoint, "--prompt", "Hi")
    assert f"\nends at   {end} (" in err
    assert end_summary((), None) == "ends at   no token of the model's own"


def test_seed_repeats_a_sample(capsys, chat_checkpoint):
    argv = ["--model", chat_checkpoint, "--prompt", "Hi", "--max-tokens", 16, "--temperature", 5]
    first, again, other = (run(capsys, *argv, "--seed", seed)[1] for seed in (1, 1, 2))
    assert first == again != other


def test_stats_go_to_stderr(capsys, checkpoint):
    argv = ["--model", checkpoint, "--prompt-token-ids", *range(1, 9), "--max-tokens", 8]
    _, plain, _ = run(capsys, *argv)
    code, out, err = run(capsys, *argv, "--stats")
    assert (code, out) == (0, plain)
    for word in ("prefill   8 tokens in", "decode    7 tokens in", "compile", "parameters", "peak"):
        assert word in err
    assert "selections" not in err


def test_a_prefill_that_compiled_meanwhile_has_no_speed():
    metrics = SimpleNamespace(
        prompt_tokens=100, prefill_seconds=10.0, generated_tokens=51, decode_seconds=5.0
    )
    decode = "decode    50 tokens in 5.00 s, 10.0 tokens/s"
    clock = SimpleNamespace(seconds=lambda: 8.0)  # all before the first token
    assert request_summary(metrics, clock, sparse=False) == [
        "prefill   100 tokens in 10.00 s, speed unknown: compiled or loaded meanwhile",
        decode,
        "compile   8.00 s",
    ]
    clock = SimpleNamespace(seconds=lambda: 0.0)
    assert request_summary(metrics, clock, sparse=False) == [
        "prefill   100 tokens in 10.00 s, 10.0 tokens/s",
        decode,
        "compile   0.00 s",
    ]


def test_compile_seconds_at_the_same_time_count_once():
    clock = CompileClock()
    with clock:
        assert clock.seconds() == 0.0
        for span in ((2.0, 3.0), (1.0, 5.0), (4.0, 8.0), (10.0, 11.5)):
            jax.monitoring.record_event_time_span("/jax/core/compile/made_up", *span)
        jax.monitoring.record_event_time_span("/jax/something/else", 0.0, 100.0)
    assert clock.seconds() == 8.5
    jax.monitoring.record_event_time_span("/jax/core/compile/made_up", 20.0, 30.0)  # behind it
    assert clock.seconds() == 8.5


def test_lserve_attention_prunes_and_says_so(capsys, checkpoint):
    argv = ["--model", checkpoint, "--prompt-token-ids", *([7, 11, 13, 17] * 50), "--stats"]
    sparse = ["--attention", "lserve", "--page-size", 16, "--token-budget", 64]
    code, _, err = run(capsys, *argv, "--max-tokens", 9, *sparse)
    assert code == 0
    # 8 decode steps after the first token: selections at steps 0 and 4, and 4 pages of budget
    # plus at most one partial page attended.
    assert "2 selections, in 0% of steps selection left nothing out" in err
    assert "read a step, of --page-size tokens each (mean over layers and KV heads)" in err
    pages = float(err.split("pages     ")[1].split()[0])
    assert 3 < pages <= 5


@pytest.mark.parametrize("draft", ["sparse", "ngram"])
def test_exact_answers_are_dense_ones_and_stats_say_what_drafts_did(draft, capsys, checkpoint):
    argv = ["--model", checkpoint, "--prompt-token-ids", *([7, 11, 13, 17] * 50)]
    argv += ["--max-tokens", 20]
    code, dense, _ = run(capsys, *argv)
    exact = ["--attention", "lserve", "--exact", "--draft", draft, "--stats"]
    if draft == "sparse":
        exact += ["--page-size", 16, "--token-budget", 64, "--head-shares", "none"]
    code, out, err = run(capsys, *argv, *exact)
    assert (code, out) == (0, dense)
    assert re.search(
        r"drafts    (none|\d+, \d+% confirmed), \d+\.\d tokens a verification; last burst: ", err
    )
    assert draft == "sparse" or "selection" not in err  # nothing is selected for drafts looked up
    # Every option of sparse steps is refused where there are none, and verification without them.
    for options, words in (
        ("--attention dense --exact", "exact=True needs attention='lserve'"),
        ("--attention lserve --max-draft-tokens 3", "--max-draft-tokens 3 needs --exact"),
        ("--attention lserve --draft-weights int4", "--draft-weights int4 needs --exact"),
        ("--attention lserve --draft ngram", "draft='ngram' needs exact=True"),
        ("--attention lserve --exact --draft ngram --dense-heads 1", "has no sparse steps"),
        ("--attention lserve --exact --draft ngram --budget-share 0.5", "has no sparse steps"),
        ("--attention lserve --exact --max-draft-tokens 16", "max_draft_tokens=16 must lie in"),
    ):
        code, out, err = run(capsys, *argv, *options.split())
        assert (code, out) == (2, "") and words in err


def test_help_names_every_option(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    options = (
        "--model --adapter --prompt --prompt-file --prompt-token-ids --chat --no-chat --system "
        "--max-tokens --temperature --top-p --top-k --seed --stop --dtype --max-model-len --json "
        "--stats --attention --pattern --streaming-fraction --page-size --logical-page-size "
        "--token-budget --reuse-interval --prefill-sink --prefill-local --decode-sink "
        "--decode-local --kv-dtype --stop-token-ids --skip-special-tokens --no-skip-special-tokens"
    )
    assert set(options.split()) <= set(out.replace(",", " ").split())


@pytest.fixture
def broken_checkpoint(checkpoint, tmp_path):
    """Makes a copy of the checkpoint with its config changed or its tensors cut short."""

    def make(*, cut: bool = False, **changes) -> Path:
        directory = tmp_path / "broken"
        shutil.copytree(checkpoint, directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | changes))
        if cut:
            tensors = directory / "model.safetensors"
            tensors.write_bytes(tensors.read_bytes()[:-100])
        return directory

    return make


def refusal(capsys, *argv) -> str:
    """The one sentence on stderr of a command line that must be refused."""
    code, out, err = run(capsys, *argv)
    assert code == 2
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").splitlines() if "tensor/s]" not in line]
    (sentence,) = [line for line in lines if line]
    assert sentence.startswith("error: ")
    return sentence


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("", "exactly one of --prompt, --prompt-file, --prompt-token-ids and --prompts-file"),
        ("--prompt a --prompt-file b", "exactly one of"),
        ("--prompt=", "the prompt is empty"),
        ("--prompt-file no/such/file", "prompt file 'no/such/file' does not exist"),
        ("--prompt-token-ids 1 --temperature -1", "temperature=-1"),
        ("--prompt-token-ids 1 --top-p 0", "top_p=0"),
        ("--prompt-token-ids 1 --max-tokens 0", "max_tokens"),
        ("--prompt-token-ids 1 --stop=", "stop"),
        ("--prompt-token-ids 1 --page-size 16", "--attention lserve"),
        ("--prompt-token-ids 1 --model no-such-model", "'no-such-model'"),
    ],
)
def test_refused_before_a_model_is_read(capsys, argv, sentence):
    assert sentence in refusal(capsys, *argv.split())


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--prompt-token-ids 1 160", "160"),
        ("--prompt-token-ids 1 -7", "-7"),
        (
            "--prompt-token-ids 1 2 3 --max-tokens 98 --max-model-len 100",
            "3 .*98.*max_model_len=100",
        ),
        ("--prompt-token-ids 1 --max-model-len 0", "max_model_len=0 must be a positive integer"),
        ("--prompt-token-ids 1 --chat", "--chat needs the prompt as text, got token ids"),
        ("--prompt-token-ids 1 --system x", "--system needs a chat"),
        ("--prompt-token-ids 1 --stop x", "needs a tokenizer"),
        ("--prompt hi", "no tokenizer"),
        ("--prompt hi --chat", "tokenizer"),
        ("--prompt-token-ids 1 --adapter no/such/adapter", "no/such/adapter"),
    ],
)
def test_refused_once_the_model_is_known(capsys, checkpoint, argv, sentence):
    said = refusal(capsys, "--model", checkpoint, *argv.split())
    assert re.search(sentence, said), said


def test_a_prompt_file_that_is_not_text_is_refused(capsys, tmp_path):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refusal(capsys, "--prompt-file", tmp_path / "prompt.bin")


def test_broken_checkpoints_are_refused(capsys, broken_checkpoint):
    directory = broken_checkpoint(cut=True)
    said = refusal(capsys, "--model", directory, "--prompt-token-ids", 1)
    assert "model.safetensors" in said


def test_unknown_architectures_are_refused(capsys, broken_checkpoint):
    directory = broken_checkpoint(model_type="gpt_neox")
    said = refusal(capsys, "--model", directory, "--prompt-token-ids", 1)
    assert "gpt_neox" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--dtype float16", "float16 --dtype bfloat16 float32"),
        ("--attention sparse", "sparse --attention dense lserve"),
        ("--backend cuda", "cuda --backend auto mosaic reference"),
        ("--no-such-option 1", "--no-such-option"),
        ("--attention lserve --page-size 17", "page_size=17 16 32 64 128"),
        (
            "--attention lserve --page-size 32 --token-budget 100",
            "token_budget=100 selected_page_size=16",
        ),
        ("--attention lserve --pattern x --streaming-fraction 1.5", "streaming_fraction=1.5"),
    ],
)
def test_usage_errors_name_option_and_rule(capsys, argv, words):
    code, out, err = run(capsys, "--prompt-token-ids", 1, *argv.split())
    assert (code, out) == (2, "")
    for word in words.split():
        assert word in err
