"""Many prompts from a file to a file: nothing lost, nothing doubled, whatever happens between."""

import dataclasses
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batch_files import by_index, error_of, read_output, some_prompts, write_lines
from tiny_checkpoints import process_environment, write_chat_model

from lserve_jax import LLM, SamplingParams, batch, generate, model_args
from lserve_jax.batch import PromptFormat, PromptsFile, ResultsFile, run_batch

ROOT = Path(generate.__file__).parent.parent
PAGE_SIZE = 64  # of dense attention


@pytest.fixture(autouse=True)
def keep_the_tests_compile_cache(monkeypatch):
    monkeypatch.setattr(model_args, "keep_compiled", lambda cache: False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random model with a tokenizer of single ASCII characters and a chat template."""
    return write_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(capsys, checkpoint, tmp_path):
    """Runs the command line in ``tmp_path``'s files; returns exit code and stderr."""

    def command(prompts: Path, *argv: object) -> tuple[int, str]:
        output = tmp_path / "out.jsonl"
        options = ["--model", checkpoint, "--prompts-file", prompts, "--output", output]
        code = generate.main([str(argument) for argument in (*options, *argv)])
        captured = capsys.readouterr()
        assert captured.out == ""
        return code, captured.err

    return command


def test_stats_say_what_drafts_did(run, tmp_path):
    """Of all prompts together."""
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt_token_ids": [7, 11] * 60}] * 3)
    exact = ["--attention", "lserve", "--exact", "--draft", "ngram", "--max-tokens", 12]
    code, err = run(prompts, *exact, "--stats")
    assert code == 0
    drafts = r"drafts    (none|\d+, \d+% confirmed), \d+\.\d tokens a verification"
    assert re.search(drafts + r"; last bursts: .*\(\d\)", err)


def test_the_group_of_int4_is_an_option(run, tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "Hello"}])
    code, err = run(prompts, "--weights", "int4", "--weight-group", 48)
    assert code == 2 and "weight_group=48 must be one of (32, 64, 128)" in err


def test_answers_are_those_of_the_same_prompts_one_by_one(run, checkpoint, tmp_path):
    lines = [
        {"prompt": "Hello", "id": "a"},
        {"messages": [{"role": "system", "content": "Hm"}, {"role": "user", "content": "Why?"}]},
        {"prompt_token_ids": [5, 6, 7], "id": 7, "max_tokens": 3},
        {"prompt": "Hi", "temperature": 5, "top_k": 40, "top_p": 0.9, "seed": 3},
        {"prompt": "Hi", "temperature": 5, "seed": 4},
    ]
    code, err = run(write_lines(tmp_path / "p.jsonl", lines), "--max-tokens", 9)
    assert code == 0
    assert "5/5" in err and "tokens/s" in err
    answers = by_index(tmp_path / "out.jsonl")

    llm = LLM(str(checkpoint), max_num_seqs=1)
    texts = ["[user] Hello [answer]", "[system] Hm [user] Why? [answer]", "%&'", *["Hi"] * 2]
    texts[3:] = ["[user] Hi [answer]"] * 2
    plain = SamplingParams(temperature=0, max_tokens=9)
    sampling = [
        *[plain] * 2,
        SamplingParams(temperature=0, max_tokens=3),
        SamplingParams(temperature=5, top_k=40, top_p=0.9, seed=3, max_tokens=9),
        SamplingParams(temperature=5, seed=4, max_tokens=9),
    ]
    for i, (text, params) in enumerate(zip(texts, sampling, strict=True)):
        (alone,) = llm.generate(text, params)[0].outputs
        answer = answers[i + 1]
        assert answer["token_ids"] == alone.token_ids
        assert answer["text"] == alone.text
        assert answer["finish_reason"] == alone.finish_reason
        assert answer["prompt_tokens"] == len(text)
        assert answer["generated_tokens"] == len(alone.token_ids)
        assert answer["cached_tokens"] == 0  # shorter than a page
    assert [answers[i].get("id") for i in range(1, 6)] == ["a", None, 7, None, None]
    assert answers[4]["token_ids"] != answers[5]["token_ids"]


def test_a_text_file_has_a_prompt_a_line(run, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_bytes(b"Hello\r\nHow are you?")
    assert run(prompts, "--no-chat", "--max-tokens", 2)[0] == 0
    answers = by_index(tmp_path / "out.jsonl")
    assert {i: answers[i]["prompt_tokens"] for i in answers} == {1: 5, 2: 12}


def test_options_that_older_outputs_lack_leave_their_header_as_it_was(run, tmp_path):
    prompts, output = write_lines(tmp_path / "p.txt", ["Hello"]), tmp_path / "out.jsonl"
    assert run(prompts, "--max-tokens", 2, "--stop-token-ids", 3)[0] == 0
    assert read_output(output)[0]["run"]["stop_token_ids"] == [3]
    difference = error_of(run(prompts, "--max-tokens", 2, "--no-skip-special-tokens"))
    assert "stop_token_ids is [3] there and null here" in difference
    assert "skip_special_tokens is null there and false here" in difference
    output.unlink()
    assert run(prompts, "--max-tokens", 2, "--skip-special-tokens")[0] == 0
    younger = {"stop_token_ids", "skip_special_tokens", "exact", "draft"}
    younger |= {"draft_weights", "max_draft_tokens"}
    assert not younger & read_output(output)[0]["run"].keys()
    difference = error_of(run(prompts, "--max-tokens", 2, "--max-draft-tokens", 3))
    assert "max_draft_tokens is null there and 3 here" in difference


def test_stop_ids_and_special_tokens_of_a_line(run, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "Hello"}])
    run(path, "--max-tokens", 12)
    whole = by_index(tmp_path / "out.jsonl")[1]["token_ids"]
    (tmp_path / "out.jsonl").unlink()
    write_lines(path, [{"prompt": "Hello", "stop_token_ids": [whole[3]]}])
    assert run(path, "--max-tokens", 12)[0] == 0
    end = whole.index(whole[3]) + 1
    assert by_index(tmp_path / "out.jsonl")[1]["token_ids"] == whole[:end]
    write_lines(path, [{"prompt": "Hello", "skip_special_tokens": False}])
    file = PromptsFile(path, SamplingParams(), skip_bad_lines=False)
    assert not next(file.lines()).sampling.skip_special_tokens


def test_stop_strings_of_a_line(run, tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "Hello"}])
    run(path, "--max-tokens", 12)
    whole = by_index(tmp_path / "out.jsonl")[1]["text"]
    (tmp_path / "out.jsonl").unlink()
    stop = whole[4:6]
    write_lines(path, [{"prompt": "Hello", "stop": [stop, "no such text"]}])
    run(path, "--max-tokens", 12)
    answer = by_index(tmp_path / "out.jsonl")[1]
    assert answer["text"] == whole[: whole.index(stop)]
    assert answer["finish_reason"] == "stop"


@pytest.mark.slow
def test_killed_in_the_middle_and_continued_nothing_is_lost_or_doubled(run, checkpoint, tmp_path):
    prompts = write_lines(tmp_path / "p.jsonl", some_prompts(150))
    argv = ["--max-tokens", "24", "--max-num-seqs", "4"]
    assert run(prompts, *argv)[0] == 0
    (tmp_path / "out.jsonl").rename(tmp_path / "whole.jsonl")

    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "lserve_jax.generate", "--model", checkpoint]
    command += ["--prompts-file", prompts, "--output", output, *argv]
    environment = process_environment(XDG_CACHE_HOME=str(ROOT / ".cache"))
    with subprocess.Popen(
        [str(word) for word in command], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
    ) as process:
        while not output.exists() or output.read_bytes().count(b"\n") < 8:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = output.read_bytes().count(b"\n") - 1
    assert 7 <= done < 150
    with output.open("ab") as file:
        file.write(b'{"index": 150, "te')  # as if it had been killed while writing

    code, err = run(prompts, *argv)
    assert code == 0
    assert f"{done}/150" in err and "150/150" in err
    assert by_index(output) == by_index(tmp_path / "whole.jsonl")
    before = output.read_bytes()
    code, err = run(prompts, *argv)
    assert code == 0 and "has all 150 answers already" in err
    assert output.read_bytes() == before


@pytest.mark.parametrize("ending", [b"", b'{"ind', b'{"index": 9}', b'{"index": 2, "x": "\xc3'])
def test_a_torn_last_line_is_cut_off(tmp_path, ending):
    path = tmp_path / "out.jsonl"
    with ResultsFile(path, {"model": "m"}) as results:
        results.append(1, {"text": "ä"})
        results.append(4, {"error": "e"})
    whole = path.read_bytes()
    path.write_bytes(whole + ending)
    with ResultsFile(path, {"model": "m"}) as results:
        assert results.done == {1, 4}
        results.append(2, {"text": ""})
    assert path.read_bytes() == whole + b'{"index": 2, "text": ""}\n'


def test_a_run_can_end_within_the_header(tmp_path):
    path, settings = tmp_path / "out.jsonl", {"model": "m", "stop": ("a", "b")}
    with ResultsFile(path, settings) as results:
        assert results.done == set()
        results.append(1, {})
    whole = path.read_bytes()
    for end in (0, 1, whole.index(b"\n"), whole.index(b"\n") + 1):
        path.write_bytes(whole[:end])
        with ResultsFile(path, settings) as results:
            assert results.done == set()
            results.append(1, {})
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"my notes", "is no output of this program"),
        (b"my notes\nand more\n", "is no output of this program"),
        (b'{"prompt": "Hello"}\n', "is no output of this program"),
        (b'{"lserve_jax": "0"}\n', "is no output of this program"),
        (b'{"lserve_jax": "0", "run": {"model": "n", "max_tokens": 2}}\n',
         'model is "n" there and "m" here, top_k is null there and 1 here$'),
        (b'{"lserve_jax": "0", "run": {"model": "m", "max_tokens": 2, "top_k": 1}}\nx\n{}\n',
         "line 2: not a result"),
        (b'{"lserve_jax": "0", "run": {"model": "m", "max_tokens": 2, "top_k": 1}}\n'
         b'{"index": 1}\n{"index": 2}\n{"index": 1}\n',
         "line 4: .*there already"),
    ],
)  # fmt: skip
def test_files_of_others_are_refused_and_left_alone(tmp_path, content, sentence):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        ResultsFile(path, {"model": "m", "max_tokens": 2, "top_k": 1})
    assert path.read_bytes() == content


def test_two_runs_cannot_write_one_file(tmp_path):
    with (
        ResultsFile(tmp_path / "out.jsonl", {}),
        pytest.raises(ValueError, match="in use by another run"),
    ):
        ResultsFile(tmp_path / "out.jsonl", {})


def test_another_run_is_another_file(run, tmp_path):
    prompts = write_lines(tmp_path / "p.txt", ["Hello", "Hi"])
    assert run(prompts, "--max-tokens", 2)[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    assert "max_tokens is 2 there and 3 here" in error_of(run(prompts, "--max-tokens", 3))
    assert "chat is null there and false here" in error_of(
        run(prompts, "--max-tokens", 2, "--no-chat")
    )
    sparse = error_of(run(prompts, "--max-tokens", 2, "--attention", "lserve"))
    assert "attention is" in sparse and "sparsity is null there" in sparse
    write_lines(prompts, ["Hello", "Ho"])
    assert "prompts_sha256 is" in error_of(run(prompts, "--max-tokens", 2))
    assert (tmp_path / "out.jsonl").read_bytes() == before
    # What decides no answer may change.
    write_lines(prompts, ["Hello", "Hi"])
    assert run(prompts, "--max-tokens", 2, "--max-num-seqs", 3, "--stats")[0] == 0


BAD_LINES = [
    ("", "it is blank"),
    ("{'prompt': 1}", "it is not JSON"),
    ("[" * 100_000, "it is not JSON"),
    ("[1, 2]", "must be a JSON object, got [1, 2]"),
    ('{"id": 1}', "exactly one of prompt, prompt_token_ids, messages, got []"),
    ('{"prompt": "a", "messages": []}', "exactly one of"),
    ('{"prompt": 5}', "prompt must be a string, got 5"),
    ('{"prompt_token_ids": "abc"}', 'prompt_token_ids must be a list, got "abc"'),
    ('{"messages": ["hi"]}', 'messages must be a list of objects, got ["hi"]'),
    ('{"prompt": "a", "max_token": 5}', "unknown keys ['max_token']"),
    ('{"prompt": "a", "id": [1]}', "id must be a string or an integer"),
    ('{"prompt": "a", "id": true}', "id must be a string or an integer, got true"),
    ('{"prompt": "a", "temperature": -1}', "temperature=-1"),
    ('{"prompt": "a", "max_tokens": null}', "max_tokens must be an integer"),
    ('{"prompt": "a", "stop": null}', "stop must be a string or a list of strings, got null"),
    ('{"prompt": "a", "stop": [1]}', "stop=(1,)"),
    ('{"prompt": "a", "stop_token_ids": "12"}', 'stop_token_ids must be a list, got "12"'),
    ('{"prompt": "a", "stop_token_ids": [1.5]}', "stop_token_ids must be an integer"),
    ('{"prompt": "a", "skip_special_tokens": "no"}', "skip_special_tokens='no' must be"),
]
# Known only once the model is.
BAD_PROMPTS = [
    ('{"prompt_token_ids": []}', "the prompt is empty"),
    ('{"prompt_token_ids": [1, 96]}', "token id 96 is outside the vocabulary"),
    ('{"prompt_token_ids": [1, 0.5]}', "token id 0.5 must be an integer"),
    ('{"prompt_token_ids": [1, true]}', "token id True must be an integer"),
    ('{"messages": []}', "messages must be a non-empty list"),
    ('{"messages": [{"role": "user"}]}', '"role" and "content"'),
    ('{"prompt": "half a pair: \\ud83d"}', "no valid Unicode"),
    (json.dumps({"prompt": "a" * 600}), "more than max_model_len=512"),
]


@pytest.mark.parametrize(("line", "sentence"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_before_a_model_is_read(run, tmp_path, line, sentence):
    prompts = write_lines(tmp_path / "p.jsonl", ['{"prompt": "Hello"}', line])
    said = error_of(run(prompts, "--model", "no-such-model"))
    assert "line 2" in said and sentence in said
    assert not (tmp_path / "out.jsonl").exists()


def test_bytes_that_are_no_text_are_a_bad_line(run, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"Hello\n\xff\xfe\n")
    assert "line 2: it is not UTF-8" in error_of(run(tmp_path / "p.txt"))


@pytest.fixture(scope="module")
def llm(checkpoint) -> LLM:
    return LLM(str(checkpoint))


@pytest.mark.parametrize(
    ("name", "text"), [("p.txt", "The sea\nis\n"), ("p.jsonl", '{"prompt": "The sea"}\n')]
)
def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path, name, text) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    file = PromptsFile(tmp_path / name, SamplingParams(), skip_bad_lines=False)
    assert next(file.lines()).prompt == "The sea"
    (tmp_path / "blank.txt").write_text("\n", encoding="utf-8-sig")
    with pytest.raises(ValueError, match="line 1: it is blank"):
        PromptsFile(tmp_path / "blank.txt", SamplingParams(), skip_bad_lines=False)


def test_a_shared_prefix_file_with_a_byte_order_mark(run, tmp_path) -> None:
    prompts = write_lines(tmp_path / "p.txt", ["Hello"])
    (tmp_path / "shared.txt").write_text("Once ", encoding="utf-8-sig")
    argv = ["--shared-prefix-file", tmp_path / "shared.txt", "--no-chat", "--max-tokens", 2]
    assert run(prompts, *argv)[0] == 0
    header, _ = read_output(tmp_path / "out.jsonl")
    assert header["run"]["shared_prefix_sha256"] == hashlib.sha256(b"Once ").hexdigest()


@pytest.mark.parametrize(("line", "sentence"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_a_prompt_that_cannot_run_is_named_before_any_does(llm, tmp_path, line, sentence):
    path = write_lines(tmp_path / "p.jsonl", ['{"prompt": "Hello"}', line])
    prompts = PromptsFile(path, SamplingParams(), skip_bad_lines=False)
    with (
        ResultsFile(tmp_path / "out.jsonl", {}) as results,
        pytest.raises(ValueError, match="line 2: ") as refused,
    ):
        batch.run_batch(llm, prompts, PromptFormat(chat=None, system=None), results)
    assert sentence in str(refused.value)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_with_skip_bad_lines_the_others_run(run, tmp_path):
    bad = [line for line, _ in BAD_LINES + BAD_PROMPTS]
    lines = ['{"prompt": "Hello"}', *bad, '{"prompt": "Hi"}']
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    code, err = run(prompts, "--max-tokens", 2, "--skip-bad-lines")
    assert code == 0
    answers = by_index(tmp_path / "out.jsonl")
    assert answers.keys() == set(range(1, len(lines) + 1))
    wanted = dict(enumerate(BAD_LINES + BAD_PROMPTS, start=2))
    for index, answer in answers.items():
        assert (index in wanted) == (answer.keys() == {"error"})
        if index in wanted:
            assert wanted[index][1] in answer["error"]
            assert f"line {index} is skipped: " in err
    assert "has all" in run(prompts, "--max-tokens", 2, "--skip-bad-lines")[1]


def test_tools_and_calls_of_a_conversation(llm, run, tmp_path):
    user = {"role": "user", "content": "How warm is it?"}
    call = {"type": "function", "function": {"name": "warmth", "arguments": {}}}
    messages = [
        user,
        {"role": "assistant", "tool_calls": [call], "content": None},
        {"role": "tool", "content": "17"},
    ]
    lines = [
        {"messages": messages, "tools": [call]},
        {"messages": [user, {"role": "assistant", "content": "a", "tool_calls": None}, user]},
        {"prompt": "a", "tools": [call]},
        {"messages": [user], "tools": "warmth"},
        {"messages": [user], "tools": ["warmth"]},
        {"messages": [user]},
    ]
    template = (
        "{% for tool in tools or [] %}({{ tool.function.name }}){% endfor %}"
        "{% for m in messages %}[{{ m.role }}]{% if 'tool_calls' in m and m.tool_calls|length %}"
        "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    tokenizer = dataclasses.replace(llm.tokenizer, chat_template=template)
    model = LLM((llm.config, llm.engine.runner.params), tokenizer=tokenizer)
    file = PromptsFile(
        write_lines(tmp_path / "p.jsonl", lines), SamplingParams(max_tokens=2), skip_bad_lines=True
    )
    with ResultsFile(tmp_path / "out.jsonl", {}) as results:
        run_batch(model, file, PromptFormat(chat=None, system=None), results)
    answers = by_index(tmp_path / "out.jsonl")
    assert {i for i, answer in answers.items() if "error" in answer} == {2, 3, 4, 5}
    assert "has no len()" in answers[2]["error"]
    for index in (3, 4, 5):
        assert "tools must be a list" in answers[index]["error"]
    text = "(warmth)[user]How warm is it?[assistant]warmth[tool]17"
    assert answers[1]["prompt_tokens"] == len(text)
    [output] = model.chat(messages, SamplingParams(max_tokens=1), tools=[call])
    assert output.prompt == text


def test_one_bad_conversation_ends_no_file(run, tmp_path):
    user = {"role": "user", "content": "How warm is it?"}
    call = {"type": "function", "function": {"name": "warmth", "arguments": {}}}
    asked = {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}
    lines = [
        {"messages": [user, asked, {"role": "tool", "content": "17"}]},
        {"messages": [user, {"role": "tool", "content": 17}]},
        {"messages": [user, {"content": "17"}]},
        {"messages": [user]},
    ]
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    assert "line 2" in error_of(run(prompts, "--max-tokens", 2))
    assert run(prompts, "--max-tokens", 2, "--skip-bad-lines")[0] == 0
    answers = by_index(tmp_path / "out.jsonl")
    assert {i for i, answer in answers.items() if "error" in answer} == {2, 3}
    text = "[user] How warm is it? [assistant] Let me see. [tool] 17 [answer]"
    assert answers[1]["prompt_tokens"] == len(text)


def prompt_tokens(err: str) -> tuple[int, int]:
    """Tokens run and saved, as --stats says."""
    words = err.split("prompts   ")[1].split()
    return int(words[0]), int(words[3])


def test_what_all_prompts_begin_with_is_computed_once(run, tmp_path):
    shared = "You are a pirate. " * 8  # 144 characters and as many tokens: two whole pages
    whole_pages = len(shared) // PAGE_SIZE * PAGE_SIZE
    texts = [f"{shared}{i} and {i}" for i in range(12)]
    argv = ["--no-chat", "--max-tokens", 3, "--stats"]
    assert run(write_lines(tmp_path / "p.txt", texts), *argv)[0] == 0
    alone = by_index(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()

    (tmp_path / "shared.txt").write_text(shared)
    write_lines(tmp_path / "p.txt", [text.removeprefix(shared) for text in texts])
    with_prefix = [*argv, "--shared-prefix-file", tmp_path / "shared.txt", "--relay", "always"]
    code, err = run(tmp_path / "p.txt", *with_prefix)
    assert code == 0, err
    assert by_index(tmp_path / "out.jsonl") == alone
    ran, saved = prompt_tokens(err)
    assert saved == 11 * whole_pages  # the first one computes them
    assert ran == sum(map(len, texts)) - saved
    assert "relay     0 bursts" not in err


def test_the_shared_prefix_of_chats_is_their_system_message(run, tmp_path):
    (tmp_path / "shared.txt").write_text("S" * 100)
    lines = [{"prompt": "Hello"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    prompts = write_lines(tmp_path / "p.jsonl", lines)
    argv = ["--max-tokens", 2, "--shared-prefix-file", tmp_path / "shared.txt", "--stats"]
    code, err = run(prompts, *argv)
    assert code == 0
    answers = by_index(tmp_path / "out.jsonl")
    for index, text in ((1, "Hello"), (2, "Hi")):
        whole = f"[system] {'S' * 100} [user] {text} [answer]"
        assert answers[index]["prompt_tokens"] == len(whole)
    assert prompt_tokens(err)[1] == PAGE_SIZE  # of the second


@pytest.mark.parametrize(
    ("line", "argv", "sentence"),
    [
        ({"prompt": "a"}, "--no-chat --system x", "--system needs a chat"),
        ({"prompt_token_ids": [1]}, "--chat", "--chat needs the prompt as text"),
        ({"prompt_token_ids": [1]}, "--shared-prefix-file {shared}", "prompt as text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "--no-chat", "--no-chat forbids"),
        (
            {"messages": [{"role": "system", "content": "a"}]},
            "--shared-prefix-file {shared}",
            "a system message of their own",
        ),
    ],
)
def test_options_that_contradict_a_line(run, tmp_path, line, argv, sentence):
    (tmp_path / "shared.txt").write_text("shared")
    prompts = write_lines(tmp_path / "p.jsonl", [line])
    said = error_of(run(prompts, *argv.format(shared=tmp_path / "shared.txt").split()))
    assert "line 1: " in said and sentence in said


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--prompts-file {p}", "--prompts-file needs --output"),
        ("--prompts-file {p} --prompt a --output {o}", "exactly one of"),
        ("--prompts-file {p} --output {o} --json", "--json is for a single prompt"),
        ("--prompt a --output {o}", "--output needs --prompts-file"),
        ("--prompt a --max-num-seqs 3 --skip-bad-lines", "--skip-bad-lines, --max-num-seqs needs"),
        ("--prompts-file p.csv --output {o}", "must end in .txt or .jsonl"),
        ("--prompts-file no.txt --output {o}", "'no.txt' does not exist"),
        ("--prompts-file {empty} --output {o}", "is empty"),
        ("--prompts-file {p} --output {o} --shared-prefix-file no", "shared prefix file 'no'"),
        ("--prompts-file {p} --output {o} --shared-prefix-file {p} --system x", "one of --system"),
        ("--prompts-file {p} --output {p}", "is no output of this program"),
        ("--prompts-file {p} --output {o} --max-num-seqs 0", "max_num_seqs=0"),
    ],
)
def test_options_that_contradict_each_other(capsys, tmp_path, checkpoint, argv, sentence):
    (tmp_path / "empty.txt").touch()
    paths = {"p": write_lines(tmp_path / "p.txt", ["Hello"]), "o": tmp_path / "o.jsonl"}
    paths["empty"] = tmp_path / "empty.txt"
    words = argv.format(**paths).split()
    code = generate.main([*words, "--model", str(checkpoint)])
    assert sentence in error_of((code, capsys.readouterr().err))
    assert paths["p"].read_text() == "Hello\n"
