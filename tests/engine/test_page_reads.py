"""What is recorded of a request's reads, against the oracle, which knows what it attends.

The oracle has heads in the checkpoint's order and tokens in the sequence's: a wrong order of heads,
slot, page table or burst shows as other pages.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import engine_cases
import jax
import lserve_cases
import numpy as np
import pytest
from lserve_cases import CASES
from numpy.testing import assert_array_equal
from oracle_model import Oracle
from relay_cases import Build as BuildRelay
from relay_cases import prompts_with
from tiny_llm import VOCAB, check_nothing_left, random_prompts

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine import reads
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.reads import PageReads
from lserve_jax.engine.request import TokenOutput
from lserve_jax.text_engine import TextEngine
from lserve_jax.tokenizer import Tokenizer

Build = Callable[..., LLM]
GREEDY = {"temperature": 0.0, "logprobs": 96}


@pytest.fixture(scope="module")
def build_case(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return functools.partial(lserve_cases.build, directory=tmp_path_factory.mktemp("patterns"))


class Answer:
    """What came of one request."""

    def __init__(self, outputs: Sequence[TokenOutput]):
        self.tokens = [token for new in outputs for token in new.token_ids]
        self.logprobs = [row for new in outputs for row in new.top_logprobs]
        self.reads, self.metrics = outputs[-1].page_reads, outputs[-1].metrics


def run(
    engine: Engine, prompts: list[list[int]], counts: Sequence[int], recorded: set[int]
) -> list[Answer]:
    outputs: dict[str, list[TokenOutput]] = {str(i): [] for i in range(len(prompts))}
    for i, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        sampling = SamplingParams(max_tokens=count, **GREEDY)
        engine.add_request(str(i), prompt, sampling, seed=0, record_reads=i in recorded)
    for new in engine.stream():
        outputs[new.request_id].append(new)
    check_nothing_left(engine)
    return [Answer(news) for news in outputs.values()]


def check(oracle: Oracle, prompt: list[int], answer: Answer, page_size: int) -> None:
    """Every token's pages are those that the oracle attends positions of."""
    made = answer.reads
    assert isinstance(made, PageReads)
    assert made.page_size == page_size
    oracle.prefill(prompt)
    layers, heads = len(made.head_kinds), len(made.head_kinds[0])
    for layer in range(layers):
        for head in range(heads):
            nothing = np.zeros((heads, 0))  # the mask does not look at queries
            seen = np.flatnonzero(oracle._prompt_mask(layer, head, nothing)[-1])
            got = np.flatnonzero(made.pages(0)[layer, head])
            assert_array_equal(got, np.unique(seen // page_size))
    for number, token in enumerate(answer.tokens[:-1], start=1):
        oracle.decode(token)
        got = made.pages(number)
        assert got.shape == (layers, heads, -(-oracle.length // page_size))
        for (layer, head), positions in oracle.attended.items():
            wanted = np.unique(np.array(positions) // page_size)
            assert_array_equal(np.flatnonzero(got[layer, head]), wanted, f"{number} {layer} {head}")
    assert oracle.closest_call > 1e-5, "two pages tie as far as float32 can tell; other seed"


@pytest.mark.parametrize(
    "case",
    [
        "page 16, reuse 1",
        "page 64, reuse 8",
        "page 64, selected 16, reuse 24",
        "page 64, selected 32, reuse 4",
        "shares",
    ],
)
def test_pages_are_those_that_the_oracle_attends(case: str, build_case: Build) -> None:
    """Prompts around page edges and the budget; more requests than slots, some of them recorded."""
    llm, sizes = build_case(case), CASES[case].sizes
    P, budget = sizes["page_size"], sizes["token_budget"]
    U = sizes["selected_page_size"] or sizes["logical_page_size"]
    prompts = random_prompts(21, [1, 700, P, 2 * budget + 1, 640, P + 1])
    counts = [70, 40, 90, 50, 33, 60]
    recorded = {0, 1, 3, 5}
    answers = run(llm.engine, prompts, counts, recorded)
    for i, answer in enumerate(answers):
        if i in recorded:
            check(CASES[case].oracle(), prompts[i], answer, U)
        else:
            assert answer.reads is None


def test_kinds_of_heads_are_in_the_order_of_the_checkpoint(build_case: Build) -> None:
    engine = build_case("shares").engine
    assert engine.head_kinds == (
        ("dense", "ranked", "streaming", "ranked"),
        ("streaming", "dense", "dense", "streaming"),
        ("ranked", "ranked", "ranked", "streaming"),
    )


def test_what_does_not_record_pays_nothing_and_sees_nothing(build_case: Build) -> None:
    """The same programs, the same bursts, and the same numbers, bit for bit.

    To record compiles one small program: requests run in those that were there.
    """
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details["fun_name"])

    case = "shares"
    prompts, counts = random_prompts(22, [300, 500, 130]), [50, 60, 40]
    engine = build_case(case).engine
    bursts, decode = [], engine.runner.decode

    def log(inputs: Any) -> Any:
        recording = any(r.reads is not None for r in engine.scheduler.running.values())
        bursts.append((recording, inputs.steps))
        return decode(inputs)

    engine.runner.decode = log
    plain = run(engine, prompts, counts, set())
    assert {(False, 16)} < set(bursts) and not any(recording for recording, _ in bursts)
    shapes = set(engine.runner._shapes)
    bursts.clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        recorded = run(engine, prompts, counts, {1})
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert set(compiled) <= {"jit(selected_pages)"}  # unless another test has compiled it
    assert {steps for recording, steps in bursts if recording} == {4}  # one selection each
    assert (False, 16) in bursts  # before it begins
    assert engine.runner._shapes - shapes == {("selected_pages",)}
    bursts.clear()
    again = run(engine, prompts, counts, set())
    assert (False, 16) in bursts
    for one, *others in zip(plain, recorded, again, strict=True):
        for other in others:
            assert other.tokens == one.tokens
            assert other.logprobs == one.logprobs
    assert plain[0].reads is None and recorded[0].reads is None


def test_preempted_requests(pattern: str) -> None:
    """Pages for one request and a half: tokens that are made again are recorded once."""
    llm = engine_cases.build(pattern, max_num_seqs=2)
    prompts = random_prompts(23, [100, 110])
    answers = run(llm.engine, prompts, [80, 80], {0, 1})
    assert llm.engine.metrics().preemptions > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer.reads.selections) == 20
        check(engine_cases.oracle(), prompt, answer, engine_cases.P)


class Anything:
    """A constraint that must be asked at every token, and allows each."""

    is_static, finished, error = False, False, None

    def mask(self) -> np.ndarray:
        return np.full((-(-VOCAB // 32),), 0xFFFFFFFF, np.uint32)

    def accept(self, token: int) -> None:
        pass


@pytest.mark.parametrize("beside", [False, True])
def test_requests_that_take_one_step_a_burst(pattern: str, beside: bool) -> None:
    """Each of their tokens has a selection of its own, also beside one whose bursts are longer."""
    engine = engine_cases.build(pattern).engine
    prompts = random_prompts(29, [100, 70])
    outputs: dict[str, list[TokenOutput]] = {"0": [], "1": []}
    for i, constraint in enumerate([Anything(), None][: 1 + beside]):
        sampling = SamplingParams(max_tokens=30, **GREEDY)
        engine.add_request(
            str(i), prompts[i], sampling, seed=0, constraint=constraint, record_reads=True
        )
    for new in engine.stream():
        outputs[new.request_id].append(new)
    one = Answer(outputs["0"])
    assert [made.first_token for made in one.reads.selections] == list(range(1, 30))
    check(engine_cases.oracle(reuse_interval=1), prompts[0], one, engine_cases.P)
    if beside:
        other = Answer(outputs["1"])
        assert [made.first_token for made in other.reads.selections] == list(range(1, 30, 4))
        check(engine_cases.oracle(), prompts[1], other, engine_cases.P)


def test_a_prefix_that_is_read_together(build: BuildRelay) -> None:
    """All of it is read, and of a request's own part what its selection chose.

    How many tokens these are is what the device counted while it attended.
    """
    prefix, *_ = random_prompts(24, [320])
    llm = build(relay="always", prefill_chunk_size=1024)  # all begin in one step
    prompts = prompts_with(prefix, 25, [10, 140, 60])
    held = llm.engine.add_prefix(prefix)
    answers = run(llm.engine, prompts, [40, 40, 40], {0, 1})
    held.release()
    U, own_budget = 16, 96 // 16
    for answer in answers[:2]:
        assert answer.metrics.relay_steps == answer.metrics.decode_steps
        made, attended = answer.reads, 0
        for number in range(1, 40):
            position, pages = made.position(number), made.pages(number)
            ranked = np.array(made.head_kinds) == "ranked"
            assert ranked.sum() == 1 and (np.array(made.head_kinds) == "streaming").sum() == 1
            assert pages[ranked][:, : 320 // U].all()
            own = pages[ranked][:, 320 // U :].sum(axis=1)
            assert (own >= min(own_budget, (position - 320) // U + 1)).all()
            assert (own <= own_budget + 1).all()
            sizes = np.minimum(U, position + 1 - U * np.arange(pages.shape[-1]))
            attended += (pages[ranked] * sizes).sum()
            attended += min(16 + 32, position + 1)  # streaming: sink and local tokens
        counted = answer.metrics.pages_attended_per_step * 39 * 2 * 16
        assert attended == pytest.approx(counted, abs=0.5)
    assert (~answers[1].reads.pages(39)[answers[1].reads.pages(39).shape[0] - 1]).any()


@pytest.mark.parametrize("draft", ["sparse", "ngram"])
def test_exact_mode_reads_everything(tmp_path: Path, draft: Any) -> None:
    case = CASES["page 32, one layer"]
    settings: dict[str, Any] = {"attention": "lserve", "exact": True, "draft": draft}
    if draft == "sparse":
        settings["sparsity"] = case.sparsity(case.write(tmp_path / "heads"))
    engine = LLM((case.config, case.params()), max_num_seqs=1, **settings).engine
    [answer] = run(engine, random_prompts(26, [300]), [20], {0})
    assert answer.reads.exact
    assert answer.reads.selections == ()
    assert all(answer.reads.pages(number).all() for number in range(20))
    assert ("selected_pages",) not in engine.runner._shapes


def test_dense_attention_reads_everything() -> None:
    case = CASES["page 32, one layer"]
    engine = LLM((case.config, case.params()), max_num_seqs=1).engine
    [answer] = run(engine, random_prompts(26, [300]), [20], {0})
    assert not answer.reads.exact and answer.reads.page_size == 64
    assert answer.reads.pages(19).shape == (1, 3, (300 + 18) // 64 + 1)
    assert answer.reads.pages(19).all()
    assert ("selected_pages",) not in engine.runner._shapes


def test_the_oldest_selections_go_where_they_are_too_many(
    build_case: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt] = random_prompts(27, [700])
    engine = build_case("shares").engine
    [whole] = run(engine, [prompt], [60], {0})
    monkeypatch.setattr(reads, "MOST_BYTES", whole.reads.nbytes // 2)
    [answer] = run(engine, [prompt], [60], {0})
    kept = answer.reads
    assert kept.nbytes <= reads.MOST_BYTES
    assert kept.dropped + len(kept.selections) == len(whole.reads.selections) == 15
    assert kept.first_known == 1 + 4 * kept.dropped > 1
    for number in range(kept.first_known, 60):
        assert_array_equal(kept.pages(number), whole.reads.pages(number))
    with pytest.raises(ValueError, match=f"for token {kept.first_known - 1} of the answer is not"):
        kept.pages(kept.first_known - 1)
    with pytest.raises(ValueError, match="for token 61 of the answer is not"):
        kept.pages(61)


def test_completions_of_text_have_what_they_read(build_case: Build, tokenizer: Tokenizer) -> None:
    """Each completion its own; one that ends at a stop string as far as it came."""
    engine = build_case("shares").engine
    text = TextEngine(engine, None)
    [prompt] = random_prompts(28, [300])
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=2)
    text.submit({"prompt_token_ids": prompt}, sampling, record_reads=True)
    text.submit({"prompt_token_ids": prompt}, sampling)
    done = {}
    while text.has_unfinished_requests:
        done |= {new.request_id: new.output for new in text.step() if new.output is not None}
    one, other = done["0"].outputs
    assert one.token_ids != other.token_ids
    assert (one.page_reads.pages(19) != other.page_reads.pages(19)).any()
    assert [completion.page_reads for completion in done["1"].outputs] == [None, None]
    assert [c.token_ids for c in done["1"].outputs] == [one.token_ids, other.token_ids]


def test_record_reads_must_be_a_bool(build_case: Build) -> None:
    engine = build_case("shares").engine
    with pytest.raises(ValueError, match="record_reads=1 must be True or False"):
        engine.add_request("a", [1], SamplingParams(), seed=0, record_reads=1)
    assert not engine.has_unfinished_requests
