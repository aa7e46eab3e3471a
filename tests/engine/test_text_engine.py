"""Text while requests come and go: what is shown, when it ends, and that a prompt is read once."""

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm import check_nothing_left, random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.engine.options import EngineOptions
from lserve_jax.engine.request import TokenOutput
from lserve_jax.outputs import Completion, TextDelta
from lserve_jax.text_engine import TextEngine
from lserve_jax.tokenizer import Tokenizer

CONFIG = tiny_config(layers=1, kv_heads=1)
GREEDY = SamplingParams(temperature=0, max_tokens=12)
SIZES = {"max_num_seqs": 2, "max_model_len": 256}  # the same programs for all


@pytest.fixture(scope="module")
def params() -> dict:
    return tiny_params(CONFIG)


@pytest.fixture
def text(params: dict, tokenizer: Tokenizer) -> TextEngine:
    options = EngineOptions(**SIZES, burst_steps=4)
    return TextEngine(build_engine(CONFIG, params, options), tokenizer)


def ids(prompt: Sequence[int]) -> dict:
    return {"prompt_token_ids": list(prompt)}


def run(text: TextEngine) -> list[TextDelta]:
    deltas = []
    while text.has_unfinished_requests:
        deltas += text.step()
    return deltas


def test_requests_may_be_added_while_others_run(text: TextEngine, params: dict) -> None:
    prompts = random_prompts(0, [40, 30, 20, 10])
    first = [text.submit(ids(prompt), GREEDY) for prompt in prompts[:2]]
    deltas = text.step() + text.step()
    later = [text.submit(ids(prompt), GREEDY) for prompt in prompts[2:]]
    deltas += run(text)
    llm = LLM((CONFIG, params), **SIZES)
    for request_id, prompt in zip(first + later, prompts, strict=True):
        own = [delta for delta in deltas if delta.request_id == request_id]
        [alone] = llm.generate(ids(prompt), GREEDY)
        assert [t for delta in own for t in delta.token_ids] == alone.outputs[0].token_ids
        assert [delta.finish_reason for delta in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1].finish_reason == "length"
        assert own[-1].output is not None
        assert own[-1].output.outputs[0].text == "".join(delta.text for delta in own)
    check_nothing_left(text.engine)


def test_a_prefix_of_text_leaves_its_last_token_out(text: TextEngine) -> None:
    """However the text is given: another may stand there where it goes on."""
    whole = text.token_ids("the-sea.").ids.tolist()
    for prompt in ("the-sea.", {"prompt": "the-sea."}):
        assert text.prefix_ids(prompt).ids.tolist() == whole[:-1]
    for prompt in (ids(whole), {**ids(whole), "prompt": "the-sea."}):
        assert text.prefix_ids(prompt).ids.tolist() == whole
    with pytest.raises(ValueError, match="a prefix is for prompts without a cache_salt"):
        text.prefix_ids({"prompt": "the-sea.", "cache_salt": "mine"})
    with pytest.raises(ValueError, match=r"a prompt has .*, and no 'text'"):
        text.prefix_ids({"text": "the-sea."})


def test_a_stop_string_is_an_end_and_no_cancellation(text: TextEngine) -> None:
    [prompt] = random_prompts(1, [20])
    text.submit(ids(prompt), GREEDY)
    whole = "".join(delta.text for delta in run(text))
    stop = whole[4:6]
    before = text.engine.metrics()
    text.submit(ids(prompt), SamplingParams(temperature=0, max_tokens=12, stop=stop))
    *_, last = run(text)
    assert (last.finish_reason, last.stop_reason) == ("stop", stop)
    assert last.output is not None
    assert last.output.outputs[0].text == whole[: whole.find(stop)]
    after = text.engine.metrics()
    assert (after.finished - before.finished, after.cancelled) == (1, 0)
    check_nothing_left(text.engine)


def test_cancelling_ends_all_completions(text: TextEngine) -> None:
    prompt, other = random_prompts(2, [20, 20])
    sampling = SamplingParams(n=2, max_tokens=200, ignore_eos=True)
    gone, kept = text.submit(ids(prompt), sampling), text.submit(ids(other), GREEDY)
    before = text.step() + text.step()
    text.cancel(gone)
    with pytest.raises(ValueError, match=f"no request with id '{gone}' is waiting or running"):
        text.cancel(gone)
    deltas = run(text)
    ends = [delta for delta in deltas if delta.request_id == gone]
    assert [(d.index, d.token_ids, d.finish_reason) for d in ends] == [
        (0, [], "cancelled"),
        (1, [], "cancelled"),
    ]
    output = ends[-1].output
    assert output is not None
    made = [t for d in before if (d.request_id, d.index) == (gone, 0) for t in d.token_ids]
    assert output.outputs[0].token_ids == made and made
    assert {delta.request_id for delta in deltas} == {gone, kept}
    assert text.engine.metrics().cancelled == 2
    with pytest.raises(ValueError, match=f"no request with id '{gone}' is waiting or running"):
        text.cancel(gone)
    check_nothing_left(text.engine)


def test_a_deadline_ends_a_request_with_what_it_has(params: dict, tokenizer: Tokenizer) -> None:
    engine = build_engine(CONFIG, params, EngineOptions(**SIZES, burst_steps=1))
    now = 0.0
    engine.clock = lambda: now
    text = TextEngine(engine, tokenizer)
    [prompt] = random_prompts(3, [20])
    text.submit(ids(prompt), SamplingParams(max_tokens=200, ignore_eos=True), deadline=5)
    deltas = [delta for _ in range(5) for delta in text.step()]
    now = 6.0
    *_, last = run(text)
    assert last.finish_reason == "deadline"
    assert last.output is not None
    made = [t for delta in (*deltas, last) for t in delta.token_ids]
    assert 0 < len(made) < 200
    assert last.output.outputs[0].token_ids[: len(made)] == made
    with pytest.raises(ValueError, match="deadline=0 must be positive"):
        text.submit(ids(prompt), GREEDY, deadline=0)
    assert not text.has_unfinished_requests


def test_a_refused_request_leaves_nothing(text: TextEngine) -> None:
    with pytest.raises(ValueError, match="more than max_model_len=256"):
        text.submit(ids([1] * 250), GREEDY)
    assert not text.has_unfinished_requests
    check_nothing_left(text.engine)


def test_requests_of_somebody_else_are_an_error(text: TextEngine) -> None:
    text.engine.add_request("raw", [1, 2], GREEDY, seed=0)
    with pytest.raises(ValueError, match="'raw' that was not submitted here"):
        while True:
            text.step()


@pytest.mark.parametrize("step", range(1, 7))
def test_a_deadline_and_a_stop_string_in_one_step(
    step: int, params: dict, tokenizer: Tokenizer
) -> None:
    """Whichever comes first, a request ends once and takes no other with it."""
    engine = build_engine(CONFIG, params, EngineOptions(**SIZES, burst_steps=4))
    text, now = TextEngine(engine, tokenizer), 0.0
    engine.clock = lambda: now
    [prompt] = random_prompts(1, [20])
    text.submit(ids(prompt), SamplingParams(temperature=0, max_tokens=60))
    whole = "".join(delta.text for delta in run(text))
    sampling = SamplingParams(temperature=0, max_tokens=60, stop=whole[10:13])
    late = text.submit(ids(prompt), sampling, deadline=5)
    other = text.submit(ids(prompt), GREEDY)
    deltas = []
    for number in range(1, 40):
        if number == step:
            now = 6.0
        deltas += text.step()
        if not text.has_unfinished_requests:
            break
    ends = {d.request_id: d for d in deltas if d.output is not None}
    assert ends.keys() == {late, other}
    assert ends[late].finish_reason in ("stop", "deadline")
    assert ends[other].finish_reason == "length"
    shown = "".join(d.text for d in deltas if d.request_id == late)
    assert whole[: whole.find(whole[10:13])].startswith(shown)
    check_nothing_left(engine)


def interrupted_at(number: int, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ``number``-th request that the engine gets from now on is interrupted."""
    real, calls = engine.add_request, itertools.count(1)

    def add_request(*args, **settings):
        if next(calls) == number:
            raise KeyboardInterrupt
        real(*args, **settings)

    monkeypatch.setattr(engine, "add_request", add_request)


def test_ctrl_c_in_submit_leaves_nothing(text: TextEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    [prompt] = random_prompts(6, [20])
    sampling = SamplingParams(n=3, max_tokens=4, ignore_eos=True)
    with monkeypatch.context() as patch:
        interrupted_at(2, text.engine, patch)
        with pytest.raises(KeyboardInterrupt):
            text.submit(ids(prompt), sampling)
    assert not text.has_unfinished_requests
    check_nothing_left(text.engine)
    text.submit(ids(prompt), sampling)
    assert len([d for d in run(text) if d.finish_reason]) == 3


def test_ctrl_c_while_requests_are_drawn_leaves_nothing(
    params: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM((CONFIG, params), **SIZES)
    [common] = random_prompts(7, [128])
    prompts = [ids([*common, last]) for last in (1, 2)]
    with monkeypatch.context() as patch:
        interrupted_at(2, llm.engine, patch)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, SamplingParams(n=2, max_tokens=4))
    check_nothing_left(llm.engine)
    assert len(llm.generate(prompts, GREEDY)) == 2


def test_ctrl_c_a_second_time_leaves_nothing(params: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ends the call, the second comes while its requests are being ended."""
    llm = LLM((CONFIG, params), **SIZES)
    prompts = [ids(prompt) for prompt in random_prompts(9, [10, 20, 30])]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]

    def interrupt(*args) -> None:
        raise KeyboardInterrupt

    for owner, name in (
        (llm.engine.runner, "wait"),
        (llm.engine.scheduler.prefix_cache.pool, "release"),
    ):
        stream = llm.stream((prompt, SamplingParams(max_tokens=99)) for prompt in prompts)
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "step", interrupt)
            patch.setattr(owner, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        check_nothing_left(llm.engine)
        outputs = llm.generate(prompts, GREEDY)
        assert [output.outputs[0].token_ids for output in outputs] == expected


def test_a_reset_is_no_end_of_a_stream(params: dict) -> None:
    llm = LLM((CONFIG, params), **SIZES)
    prompts = [ids(prompt) for prompt in random_prompts(10, [10] * 5)]
    stream = llm.stream((prompt, GREEDY) for prompt in prompts)
    next(stream)
    llm.engine.reset()
    with pytest.raises(ValueError, match="the engine was reset"):
        list(stream)
    assert len(llm.generate(prompts, GREEDY)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 200}, r"embedding'\]: shape \(96, 48\), expected \(200, 48\)"),
        ({"num_hidden_layers": 2}, r"\['layers'\]\[1\].*: shape None, expected"),
        ({"num_key_value_heads": 2, "num_attention_heads": 2}, "params do not fit the config in 2"),
    ],
)
def test_params_of_another_model(params: dict, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM((dataclasses.replace(CONFIG, **changes), params))


def test_no_more_is_drawn_than_can_run_and_wait(params: dict) -> None:
    llm = LLM((CONFIG, params), **SIZES)
    drawn, prompts = [], random_prompts(8, [10] * 6)

    def requests():
        for number, prompt in enumerate(prompts):
            drawn.append(number)
            yield ids(prompt), SamplingParams(n=2, max_tokens=40, ignore_eos=True)

    outputs = llm.stream(requests())
    next(outputs)
    # Two completions run, two wait to run next; one request more may have been drawn for each end.
    assert len(drawn) <= 4
    outputs.close()
    check_nothing_left(llm.engine)


# What is shown of a text.

# Letters, a space, and characters of two, three and four bytes; few, so that stops occur.
TEXT = st.text("ab é\N{EURO SIGN}\N{GRINNING FACE}", min_size=1, max_size=24)


def token_outputs(tokens: Sequence[int], burst: int, finish_reason: str) -> list[TokenOutput]:
    """The tokens in bursts, as an engine returns them."""
    starts = range(0, len(tokens), burst)
    return [
        TokenOutput(
            request_id="0",
            token_ids=list(tokens[start : start + burst]),
            logprobs=[0.0] * len(tokens[start : start + burst]),
            top_logprobs=[{}] * len(tokens[start : start + burst]),
            finish_reason=finish_reason if start + burst >= len(tokens) else None,
            metrics=RequestMetrics(),
        )
        for start in starts
    ]


def expected_text(text: str, ends: Sequence[str], stops: Sequence[str], least: int) -> str:
    """``text`` up to the first stop that is complete after more than ``least`` tokens.

    ``ends`` are the texts after each token.
    """
    for count, known in enumerate(ends, start=1):
        if count <= least:
            continue
        before = ends[count - 2] if count > 1 else ""
        found = [
            at
            for stop in stops
            if (at := known.find(stop, max(len(before) - len(stop) + 1, 0))) >= 0
        ]
        if found:
            return known[: min(found)]
    return text


@settings(max_examples=300, deadline=None)
@given(
    text=TEXT,
    stops=st.lists(st.text("ab é\N{EURO SIGN}", min_size=1, max_size=9), max_size=3),
    burst=st.sampled_from([1, 4, 16]),
    least=st.integers(0, 6),
)
def test_what_is_shown_is_never_taken_back(
    tokenizer: Tokenizer, text: str, stops: list[str], burst: int, least: int
) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    sampling = SamplingParams(stop=stops, max_tokens=99, min_tokens=least)
    completion, shown = Completion(0, sampling, tokenizer), []
    for new in token_outputs(tokens, burst, "length"):
        shown.append(completion.append(new)[0])
        if completion.finished:
            break
    final = completion.output().text
    # Independently: the text after each token, whole characters only, but for the last.
    stream = tokenizer.stream(skip_special_tokens=True)
    ends, known = [], ""
    for token in tokens:
        known += stream.step(token)
        ends.append(known)
    assert final == expected_text(text, ends, stops, least)
    assert "".join(shown) == final


@pytest.fixture(scope="module")
def texting(params: dict, tokenizer: Tokenizer) -> LLM:
    options = {"max_num_seqs": 3, "max_model_len": 128, "burst_steps": 4, "relay": "never"}
    return LLM((CONFIG, params), tokenizer=tokenizer, deterministic=True, **options)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    n=st.integers(2, 4),
    cuts=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 3), st.integers(0, 30), st.integers(1, 4)),
        max_size=3,
    ),
)
def test_what_n_completions_show_is_never_taken_back(
    texting: LLM, seed: int, n: int, cuts: list[tuple[int, int, int, int]]
) -> None:
    """Each is cut at its own first stop; the stops are pieces of what one of them says."""
    prompts = [ids(prompt) for prompt in random_prompts(11, [10, 20])]
    sampling = SamplingParams(n=n, seed=seed, max_tokens=32, ignore_eos=True)
    whole = texting.generate(prompts, sampling)
    pieces = [whole[p].outputs[i % n].text[at : at + size] for p, i, at, size in cuts]
    stops = [piece for piece in pieces if piece]
    shown: list[tuple[tuple[int, int], str]] = []
    outputs = texting.generate(
        prompts,
        dataclasses.replace(sampling, stop=stops),
        on_text=lambda prompt, index, new: shown.append(((prompt, index), new)),
    )
    for prompt, index in itertools.product(range(2), range(n)):
        plain, stopped = (found[prompt].outputs[index] for found in (whole, outputs))
        stream = texting.tokenizer.stream()
        ends = list(itertools.accumulate(map(stream.step, plain.token_ids)))
        assert stopped.text == expected_text(plain.text, ends, stops, 0)
        assert stopped.token_ids == plain.token_ids[: len(stopped.token_ids)]
        mine = [new for place, new in shown if place == (prompt, index)]
        assert "".join(mine) == stopped.text
    check_nothing_left(texting.engine)


def test_min_tokens_with_several_stops(tokenizer: Tokenizer) -> None:
    """A shorter stop that was complete before ``min_tokens`` is text; the longer one ends it."""
    tokens = tokenizer.encode("a b a a a", add_special_tokens=False)
    sampling = SamplingParams(stop=["b", "a a a"], min_tokens=4, max_tokens=9)
    completion = Completion(0, sampling, tokenizer)
    for new in token_outputs(tokens, 1, "length"):
        completion.append(new)
        if completion.finished:
            break
    output = completion.output()
    assert (output.text, output.stop_reason) == ("a b ", "a a a")


@pytest.fixture(scope="module")
def with_added(tokenizer: Tokenizer) -> Tokenizer:
    """Beside the bytes two added tokens: <end>, which is special, and <tool>, which is not."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.add_special_tokens(["<end>"])
    backend.add_tokens(["<tool>"])
    return Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)


@pytest.mark.parametrize(
    ("settings", "text", "stop_reason"),
    [
        ({"stop": "<end>"}, "a b", "<end>"),
        ({"stop": ["x", "<end>"]}, "a b", "<end>"),
        ({"stop": "<end>", "include_stop_str_in_output": True}, "a b<end>", "<end>"),
        ({"stop": "<end>", "skip_special_tokens": False}, "a b", "<end>"),
        ({"stop": "<tool>"}, "a ba", "<tool>"),
        ({"stop": ["<tool>", "<end>"]}, "a b", "<end>"),
        ({"stop": ["<end>", "b"]}, "a ", "b"),
        ({"stop": "<end>", "min_tokens": 4}, "a ba<tool>b", "<end>"),  # the second one
        ({"stop": "<end>x"}, "a ba<tool>b", None),  # no token by itself
    ],
)
@pytest.mark.parametrize("burst", [1, 4, 16])
def test_a_stop_string_that_is_a_token_ends_at_it(
    with_added: Tokenizer, settings: dict, text: str, stop_reason: str | None, burst: int
) -> None:
    tokens = with_added.encode("a b<end>a<tool>b<end>", add_special_tokens=False)
    assert len(tokens) == 8
    completion, shown = Completion(0, SamplingParams(**settings), with_added), ""
    for new in token_outputs(tokens, burst, "length"):
        shown += completion.append(new)[0]
        if completion.finished:
            break
    output = completion.output()
    assert (output.text, shown, output.stop_reason) == (text, text, stop_reason)
    assert output.finish_reason == ("length" if stop_reason is None else "stop")


def test_what_was_held_back_comes_before_a_stop_token(with_added: Tokenizer) -> None:
    euro = with_added.encode("a\N{EURO SIGN}", add_special_tokens=False)
    tokens = [*euro[:-1], with_added.encode("<end>")[0]]  # its last byte is missing
    completion = Completion(0, SamplingParams(stop="<end>"), with_added)
    completion.append(token_outputs(tokens, 16, "length")[0])
    assert completion.output().text == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_that_is_the_end_of_text_is_named(with_added: Tokenizer) -> None:
    tokens = with_added.encode("ab<end>", add_special_tokens=False)
    for stop, reason in ((), None), ("<end>", "<end>"):
        completion = Completion(0, SamplingParams(stop=stop), with_added)
        completion.append(token_outputs(tokens, 16, "stop")[0])  # the engine ended there itself
        output = completion.output()
        assert (output.text, output.finish_reason, output.stop_reason) == ("ab", "stop", reason)
