"""Several texts in one study: the made-up one, its prompts, and what tables say of each."""

import dataclasses
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from tiny_checkpoints import save_character_tokenizer
from tiny_llm import write_pattern

import convert
from convert.tokenizers import load_tokenizer
from lserve_jax import LLM, SparsityConfig
from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.eval import report
from lserve_jax.eval.answers import answer, prefill_density, share_read
from lserve_jax.eval.needle import _CITIES
from lserve_jax.eval.prompts import Case, Question
from lserve_jax.eval.stories import write_stories
from lserve_jax.eval.study import Study, make_material, run_study
from lserve_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def stories() -> str:
    return write_stories(0)


@pytest.fixture(scope="module")
def tokenizer(smollm2) -> Tokenizer:
    found = load_tokenizer(convert.resolve(smollm2).path)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def checkpoint(conformance, tmp_path_factory) -> Path:
    """A tiny random model that reads characters."""
    directory = tmp_path_factory.mktemp("texts") / "model"
    shutil.copytree(conformance / "llama-tied", directory)
    save_character_tokenizer(directory, ["\n", *(chr(32 + i) for i in range(95))])
    return directory


def test_stories_are_long_and_say_nothing_twice(stories, tokenizer):
    assert len(tokenizer.encode(stories, add_special_tokens=False)) > 60_000
    paragraphs = stories.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    sentences = Counter(re.split(r"(?<=[.!?”])\s+", stories))
    assert len(sentences) > 0.85 * sentences.total()
    for kind in (r"^“.*”$", r"^Dear \w+,$", r"^\w+: ", r"^[A-Z][^“”]+\.$"):  # told, and spoken
        assert len(re.findall(kind, stories, re.MULTILINE)) > 50, kind
    assert not re.search(r"[{}|]|  |\ba [aeiou]", stories)


def test_the_seed_decides_the_stories(stories):
    assert write_stories(0) == stories
    other = set(write_stories(1).split("\n\n"))
    assert not other & set(stories.split("\n\n"))


def test_stories_answer_no_question(stories):
    assert not re.search(r"\d", stories)
    assert not set(_CITIES) & set(re.findall(r"\w+", stories))
    assert "best thing to do" not in stories
    assert "secret" not in stories


def make_study(**changes) -> Study:
    arguments = {"model": "m", "tasks": ("needle", "ruler", "perplexity"), "lengths": (4096,)}
    arguments |= {"compare": ("dense",), "haystacks": 1, "depths": 2, "windows": 1}
    arguments |= {"output": Path("unused"), "command": ""}
    return Study(**arguments | changes)


def test_a_texts_prompts_do_not_depend_on_the_other_texts(tokenizer):
    cases, windows = make_material(make_study(texts=("documentation", "stories")), tokenizer)
    for source in ("documentation", "stories"):
        alone, windows_alone = make_material(make_study(texts=(source,)), tokenizer)
        assert [x for x in windows if x.source == source] == windows_alone
        assert [x for x in cases if x.source == source] == [x for x in alone if x.source == source]
    # Tasks that hold no text run once.
    assert Counter(case.task for case in cases if case.source == "none") == {"cwe": 1, "fwe": 1}
    assert Counter(case.task for case in cases if case.source == "stories") == {
        **{"passkey": 2, "sentence": 2, "niah_single": 1, "niah_multikey": 4},
        **{"niah_multivalue": 1, "niah_multiquery": 1, "vt": 1},
    }


def test_haystacks_are_parts_of_their_text(tokenizer, stories):
    study = make_study(texts=("documentation", "stories"), tasks=("needle",), depths=1)
    cases, _ = make_material(study, tokenizer)
    parts = {case.source: tokenizer.decode(case.token_ids[200:700]) for case in cases}
    assert parts["stories"] in stories
    assert parts["documentation"] not in stories


def test_no_text_and_one_given_twice_are_refused():
    for texts in ((), ("stories", "stories")):
        with pytest.raises(ValueError, match="must name at least one, and none twice"):
            make_study(texts=texts)


def random_cases(haystacks: int, prompts: int, length: int = 200) -> list[Case]:
    """Prompts of which those of a haystack differ in their last token."""
    return [
        Case(
            source="t",
            task="passkey",
            length=length,
            haystack=haystack,
            question=Question(text=f"? {prompt}", answers=("a",), depth=0.5),
            max_tokens=8,
            token_ids=[*((haystack * 7 + i * i) % 90 for i in range(length - 1)), prompt + 1],
        )
        for haystack in range(haystacks)
        for prompt in range(prompts)
    ]


def make_llm(checkpoint: Path, **options) -> LLM:
    sizes = {"max_num_seqs": 4, "max_model_len": 256, "prefill_chunk_size": 64}
    return LLM(checkpoint, relay="never", deterministic=True, **sizes, **options)


@pytest.fixture(scope="module")
def alone(checkpoint) -> tuple[list[dict], int]:
    """Answers to the cases of three haystacks one by one, and the bytes of a page."""
    llm, rows = make_llm(checkpoint), []
    for case in random_cases(haystacks=3, prompts=3):
        rows += answer(llm, "dense", [case], progress=unwatched)
        llm.reset_prefix_cache()
    plan = llm.memory_plan()
    return rows, (plan["retrieval"] + plan["key_stats"]) // llm.spec.num_pages


@pytest.mark.parametrize("pages", [48, 9])
def test_haystacks_are_read_once(checkpoint, alone, pages):
    cases = random_cases(haystacks=3, prompts=3)  # six pages a haystack, three of them shared
    alone, page_bytes = alone
    llm = make_llm(checkpoint, kv_cache_bytes=pages * page_bytes)
    assert llm.spec.num_pages == pages
    done = []
    mixed = cases[::3] + cases[1::3] + cases[2::3]
    rows = alone[::3] + alone[1::3] + alone[2::3]
    assert answer(llm, "dense", mixed, progress=done.append) == rows
    assert sum(done) == len(cases)
    metrics = llm.engine.metrics()
    assert metrics.prompt_tokens == 3 * 192 + len(cases) * (200 - 192)
    assert (metrics.pinned_pages, metrics.free_pages) == (0, pages)


def unwatched(count: int) -> None:
    """Progress that nobody watches."""


def test_answers_say_what_was_read(checkpoint):
    cases = random_cases(haystacks=1, prompts=2)
    for row in answer(make_llm(checkpoint), "dense", cases, progress=unwatched):
        assert row["read"] == 1
    sparsity = SparsityConfig(page_size=16, token_budget=64, reuse_interval=1)
    llm = make_llm(checkpoint, attention="lserve", sparsity=sparsity)
    # Four pages of 201 to 207 tokens, the newest of which has 9 to 15; and two vectors of
    # statistics for every 16 keys and 16 values.
    for row in answer(llm, "sparse", cases, progress=unwatched):
        assert row["read"] == pytest.approx(60 / 204 + 1 / 16, abs=0.005)
    assert share_read(RequestMetrics(generated_tokens=1)) is None  # from the prompt's last position


def answer_row(setting: str, source: str, length: int, prompt: int, score: float) -> dict:
    where = {"setting": setting, "source": source, "task": "passkey", "length": length}
    return {**where, "depth": 0.5, "haystack": prompt, "score": score, "read": 0.25}


def result_of(answers: list[dict], predictions: list[dict]) -> dict:
    head = {"model": "m", "dtype": "float32", "device": "cpu", "date": "today", "seed": 0}
    head |= {
        "versions": {"jax": "1"},
        "command": "c",
        "heads": {"s": {"policy": "64 tokens a head"}},
    }
    return {**head, "answers": answers, "predictions": predictions}


def cells_of(markdown: str, begin: str) -> list[str]:
    """The table rows that begin with ``begin``."""
    return [line for line in markdown.splitlines() if line.startswith(f"| {begin} |")]


def test_tables_show_every_text_and_all_of_them():
    answers = []
    for setting, lost in (("dense", {}), ("s", {("b", 20): 10, ("b", 30): 5, ("a", 20): 1})):
        for source in "ab":
            for length in (20, 30):
                prompts = 5 if length == 30 else 40  # too few to be called the worst
                wrong = lost.get((source, length), 0)
                answers += [
                    answer_row(setting, source, length, i, float(i >= wrong))
                    for i in range(prompts)
                ]
    text = report.markdown(result_of(answers, []))
    assert "* `s`: 64 tokens a head" in text
    assert cells_of(text, "a | passkey | 20 | `s`") == [
        "| a | passkey | 20 | `s` | 97.5 | 87.1 to 99.6 | 40 | -2.5 ± 4.9 | 25.0 |"
    ]
    assert cells_of(text, "a | `s`") == [
        "| a | `s` | 97.8 | 45 | -2.2 ± 4.4 | 25.0 | a, passkey, 20: -2.5 ± 4.9 |"
    ]
    assert cells_of(text, "b | `s`")[0].endswith(
        "| -33.3 ± 13.9 | 25.0 | b, passkey, 20: -25.0 ± 13.6 |"
    )
    assert cells_of(text, "all | `s`")[0].startswith("| all | `s` | 82.2 | 90 | -17.8 ±")
    assert cells_of(text, "all | `s`")[0].endswith("| b, passkey, 20: -25.0 ± 13.6 |")
    assert cells_of(text, "all | `dense`") == ["| all | `dense` | 100.0 | 90 |  | 25.0 |  |"]


def test_what_block_sparse_prefill_attended_has_a_table_and_a_picture():
    answers = [answer_row("dense", "a", 20, i, 1.0) for i in range(4)]  # as older results have them
    for i, density in enumerate((0.25, None, 0.35, None)):
        answers.append(answer_row("s", "a", 20, i, 0.5) | {"density": density})
    result = result_of(answers, []) | {"settings": {"dense": None}}
    assert cells_of(report.markdown(result), "`s` | 20") == [
        "| `s` | 20 | 30.0 | 25.0 to 35.0 | 2 |"
    ]
    figure = report.figures(result)["prefill"]
    [line] = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[pytest.approx(0.3), 0.5], [1.0, 1.0]]
    assert "## Prefill" not in report.markdown(result_of(answers[:4], []))
    assert "prefill" not in report.figures(result | {"answers": answers[:4]})
    chosen = RequestMetrics(prefill_density=0.25)
    assert prefill_density(chosen) == 0.25
    assert prefill_density(dataclasses.replace(chosen, prefix_tokens=64)) is None
    assert prefill_density(RequestMetrics()) is None  # read causally


def test_one_text_needs_no_row_for_all():
    answers = [answer_row(setting, "a", 20, i, 1.0) for setting in ("dense", "s") for i in range(3)]
    text = report.markdown(result_of(answers, []))
    assert cells_of(text, "a | `s`") == ["| a | `s` | 100.0 | 3 | +0.0 ± 0.0 | 25.0 |  |"]
    assert not cells_of(text, "all | `s`")


def test_predictions_are_paired_in_every_text_and_in_all():
    predictions = [
        {"setting": setting, "source": source, "length": length, "window": 0}
        | {"logprobs": [-1.0 - more, -2.0 - more], "divergence": None, "same_token": None}
        for setting, more in (("dense", 0.0), ("s", 0.5))
        for source in "ab"
        for length in (20, 30)
    ]
    text = report.markdown(result_of([], predictions))
    for where, tokens in (("a | 20", 2), ("b | 30", 2), ("b | all", 4), ("all | all", 8)):
        (row,) = cells_of(text, f"{where} | `s`")
        assert row.endswith(f"| 7.389 | 2.0000 | +0.5000 ± 0.0000 | {tokens} |")


def test_a_study_is_another_once_its_heads_are_calibrated_anew(checkpoint, tmp_path, monkeypatch):
    pattern = write_pattern(tmp_path / "p", [[0.9, 0.1], [0.2, 0.7], [0.4, 0.6]])
    study = make_study(
        model=str(checkpoint),
        compare=(f"lserve:pattern={pattern},page=16",),
        tasks=("needle",),
        lengths=(300,),
        output=tmp_path / "out",
        resume=True,
    )
    monkeypatch.setattr("lserve_jax.eval.study.answer", lambda *args, **keywords: [])
    result = run_study(study)
    (heads,) = result["heads"].values()
    assert heads["policy"] == "4096 tokens a head, streaming by gates"
    assert run_study(study)["seconds"] == result["seconds"]
    write_pattern(tmp_path / "p", [[0.1, 0.9], [0.2, 0.7], [0.4, 0.6]])
    with pytest.raises(ValueError, match="results of another study: its heads is"):
        run_study(study)


@pytest.mark.slow
def test_a_study_of_two_texts_end_to_end(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text("One thing after another. " * 40)
    texts = ("stories", str(tmp_path / "text.txt"))
    study = make_study(
        model=str(checkpoint),
        texts=texts,
        tasks=("needle", "perplexity"),
        lengths=(300,),
        needles=("passkey",),
        scored_tokens=8,
        output=tmp_path / "out",
        resume=True,
    )
    result = run_study(study)
    for rows in (result["answers"], result["predictions"]):
        assert {row["source"] for row in rows} == set(texts)
    assert all(row["read"] == 1 for row in result["answers"])
    table = (tmp_path / "out" / "results.md").read_text()
    for source in (*texts, "all"):
        assert cells_of(table, f"{source} | `dense`")
    assert run_study(study)["seconds"] == result["seconds"]  # all of it was there
    # The same study by name; but the file holds another text.
    (tmp_path / "text.txt").write_text("One thing or another. " * 40)
    with pytest.raises(ValueError, match="results of another study: its prompts is"):
        run_study(study)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["study"]["texts"] == list(texts)
