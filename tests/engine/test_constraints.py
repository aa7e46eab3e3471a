"""What requests may generate: every token is one that an independent account allows.

Weights are random, so without a mask nothing that is asked for here would come by itself.
"""

import gc
import itertools
import json
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import constraint_cases as cases
import jax
import jsonschema
import numpy as np
import pytest
from constraint_cases import END, TEXTS, TOKENIZER, VOCAB, allowed_next, prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_llm import check_nothing_left, sample_alike

from lserve_jax import LLM, CompletionOutput, SamplingParams, StructuredOutputs
from lserve_jax.engine.token_rules import packed
from lserve_jax.text_engine import TextEngine

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}
[PROMPT] = prompts(0, [20])


@pytest.fixture(scope="module")
def dense() -> LLM:
    return cases.build()


@pytest.fixture(scope="module")
def sparse(pattern: str) -> LLM:
    return cases.build(pattern)


@pytest.fixture
def one_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch is sampled in one mode: for tests that ask what a mask does, not who draws how.

    Dense attention runs under the others: greedy in ``test_each_token_is_the_likeliest``, and all
    that there are in ``test_requests_of_several_kinds_beside_one_another``.
    """
    sample_alike(monkeypatch, [SamplingParams(**BATCH[5][0], top_p=0.9, logprobs=VOCAB)])


def run(llm: LLM, prompt: dict, **sampling: Any) -> CompletionOutput:
    [output] = llm.generate(prompt, SamplingParams(**sampling))
    return output.outputs[0]


def check_greedy(
    completion: CompletionOutput,
    allowed: Callable[[list[int]], np.ndarray],
    bias: dict | None = None,
) -> None:
    """Each token is the likeliest of those ``allowed`` after the ones before it.

    Where all of these begin with one byte the text is forced, and llguidance allows only the tokens
    that the tokenizer itself would make of it.
    """
    assert completion.logprobs is not None
    for i, (token, row) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        assert len(row) == VOCAB
        scores = np.array([row[t] + (bias or {}).get(t, 0.0) for t in range(VOCAB)])
        may_come = allowed(completion.token_ids[:i])
        assert may_come[token]
        if len({(TEXTS[t] or b"")[:1] for t in np.flatnonzero(may_come)}) > 1:
            assert token == np.where(may_come, scores, -np.inf).argmax()


def text_of(tokens: Sequence[int]) -> bytes:
    return b"".join(TEXTS[token] or b"" for token in tokens if token != END)


# --- the mask ---------------------------------------------------------------------------------

DIGITS = "0123456789"
LANGUAGES = {
    "choice": (
        {"choice": ["cat", "ca", "cab", 'a/b"c\\n', "d\N{LATIN SMALL LETTER E WITH ACUTE}j\nok"]},
        ["cat", "ca", "cab", 'a/b"c\\n', "d\N{LATIN SMALL LETTER E WITH ACUTE}j\nok"],
    ),
    "regex": (
        {"regex": r"(ab|ba){1,3}c?"},
        [
            "".join(parts) + end
            for n in (1, 2, 3)
            for parts in itertools.product(["ab", "ba"], repeat=n)
            for end in ("", "c")
        ],
    ),
    "grammar": (
        {"grammar": 'start: "(" NUMBER ")" | "true"\nNUMBER: /[0-9]{1,2}/'},
        ["true", *(f"({i})" for i in DIGITS), *(f"({i}{j})" for i in DIGITS for j in DIGITS)],
    ),
    "json": (
        {
            "json": {
                "type": "object",
                "properties": {"a": {"enum": [True, "ab"]}, "b": {"type": "boolean"}},
                "required": ["a"],
                "additionalProperties": False,
                "x-guidance": {"whitespace_pattern": ""},
            }
        },
        [f'{{"a":{a}{b}}}' for a in ("true", '"ab"') for b in ("", ',"b":true', ',"b":false')],
    ),
}


@pytest.mark.parametrize("kind", LANGUAGES)
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_each_token_is_the_likeliest_that_may_come(
    kind: str, attention: str, request: pytest.FixtureRequest
) -> None:
    """The first token, after a prompt of several chunks, too."""
    llm = request.getfixturevalue(attention)
    if attention == "sparse":
        request.getfixturevalue("one_mode")
    asked, texts = LANGUAGES[kind]
    language = {text.encode() for text in texts}
    wanted = StructuredOutputs(**asked)
    for prompt in prompts(1, [3, 150, 64]):
        found = run(llm, prompt, **GREEDY, logprobs=VOCAB, structured_outputs=wanted)
        check_greedy(found, lambda before: allowed_next(language, text_of(before)))
        assert found.text.encode() in language
        assert (found.finish_reason, found.stop_reason) == ("stop", None)
        # Where nothing can follow, no step is spent on the end of text.
        whole = text_of(found.token_ids)
        continues = any(other.startswith(whole) and other != whole for other in language)
        assert (found.token_ids[-1] == END) == continues


@pytest.mark.usefixtures("one_mode")
def test_texts_end_without_a_token_for_it() -> None:
    llm = cases.build(tokenizer=cases.make_tokenizer(has_end=False))
    found = run(llm, PROMPT, **GREEDY, structured_outputs=StructuredOutputs(choice=["cab", "ok"]))
    assert found.text in ("cab", "ok")
    assert found.finish_reason == "stop"
    # Nothing else may come, but it could go on: only max_tokens ends it.
    found = run(llm, PROMPT, **GREEDY, structured_outputs=StructuredOutputs(regex="[ab]*"))
    assert set(found.text) <= {"a", "b"}
    assert (found.finish_reason, len(found.token_ids)) == ("length", 40)


# --- what is asked for, in a batch -------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["x", "caf\N{EURO SIGN}"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_pattern": r"[ \n]{1,2}"},
}
POINT = {
    "$defs": {"number": {"type": "number", "multipleOf": 1, "minimum": -99, "maximum": 99}},
    "type": "array",
    "prefixItems": [{"$ref": "#/$defs/number"}, {"anyOf": [{"type": "null"}, {"const": "y"}]}],
    "items": False,
    "minItems": 2,
}
DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-[0-9]{2}"


def valid(schema: dict) -> Callable[[str], None]:
    def check(text: str) -> None:
        jsonschema.validate(json.loads(text), schema)

    return check


def matches(expression: str) -> Callable[[str], None]:
    def check(text: str) -> None:
        assert re.fullmatch(expression, text)

    return check


BATCH: list[tuple[dict[str, Any], Callable[[str], None]]] = [
    ({"n": 2, "structured_outputs": StructuredOutputs(json=PERSON)}, valid(PERSON)),
    ({}, lambda text: None),
    ({"structured_outputs": StructuredOutputs(json=POINT), "top_p": 0.9}, valid(POINT)),
    ({"temperature": 0}, lambda text: None),
    ({"n": 2, "structured_outputs": StructuredOutputs(regex=DATE)}, matches(DATE)),
    (
        {
            "structured_outputs": StructuredOutputs(json=PERSON),
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.5,
            "min_p": 0.01,
        },
        valid(PERSON),
    ),
    ({"logit_bias": {7: -100, 9: 5}, "bad_words": ["a"]}, lambda text: None),
]


@pytest.mark.parametrize(("attention", "kinds"), [("dense", 7), ("sparse", 4)])
def test_requests_of_several_kinds_beside_one_another(
    attention: str, kinds: int, request: pytest.FixtureRequest
) -> None:
    """All texts are what was asked for, and each is the one that its request makes alone.

    Every way to sample is a program. Attention knows nothing of it: sparse, those that end bursts
    early run beside those that do not, and one program runs them.
    """
    llm, batch = request.getfixturevalue(attention), BATCH[:kinds]
    asked = prompts(2, [10, 40, 80, 20, 5, 30, 15][:kinds])
    if attention == "sparse":
        request.getfixturevalue("one_mode")
    for seed in range(3):
        sampling = [
            SamplingParams(**{"max_tokens": 100, "seed": seed} | changes) for changes, _ in batch
        ]
        outputs = llm.generate(asked, sampling)
        for prompt, params, output, (_, check) in zip(asked, sampling, outputs, batch, strict=True):
            [alone] = llm.generate(prompt, params)
            for one, other in zip(output.outputs, alone.outputs, strict=True):
                check(one.text)
                assert one.token_ids == other.token_ids
                assert one.cumulative_logprob == other.cumulative_logprob
        first, second = outputs[0].outputs
        assert first.token_ids != second.token_ids
    check_nothing_left(llm.engine)


@pytest.mark.usefixtures("one_mode")
def test_any_json_object(dense: LLM) -> None:
    # Quotes and brackets are made likely, so that it comes to an end.
    bias = {token: 30 for token, text in enumerate(TEXTS) if text in (b'"', b"}", b":")}
    for seed, value in enumerate([True, {}, "{}", '{"type": "object"}'] * 2):
        wanted = StructuredOutputs(json=value)
        found = run(
            dense, PROMPT, max_tokens=200, seed=seed, structured_outputs=wanted, logit_bias=bias
        )
        assert isinstance(json.loads(found.text), dict)


@pytest.mark.usefixtures("one_mode")
def test_text_of_any_alphabet(dense: LLM) -> None:
    """A character's bytes are tokens by themselves; the text is whole characters all the same."""
    wanted = StructuredOutputs(regex="[\N{GREEK SMALL LETTER ALPHA}-\N{GREEK SMALL LETTER OMEGA}"
                               "\N{GRINNING FACE}]{3}")  # fmt: skip
    for seed in range(5):
        found = run(dense, PROMPT, max_tokens=20, seed=seed, structured_outputs=wanted)
        assert re.fullmatch("[\u03b1-\u03c9\U0001f600]{3}", found.text)


# --- its life in the engine -------------------------------------------------------------------


@pytest.mark.usefixtures("one_mode")
def test_preempted_requests_go_on_where_they_were(pattern: str) -> None:
    """Twenty pages for four long requests: the newer ones begin again, and make the same."""
    letters = StructuredOutputs(regex="([ab]{5}c){15}")
    asked = prompts(3, [90, 85, 80, 70])
    sampling = SamplingParams(max_tokens=100, seed=1, structured_outputs=letters, min_tokens=3)
    llm = cases.build(pattern)
    alone = [llm.generate(prompt, sampling)[0].outputs[0].token_ids for prompt in asked]
    before = llm.engine.metrics().preemptions
    outputs = llm.generate(asked, sampling)
    assert llm.engine.metrics().preemptions > before
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert all(re.fullmatch("([ab]{5}c){15}", output.outputs[0].text) for output in outputs)
    check_nothing_left(llm.engine)


@pytest.mark.usefixtures("one_mode")
def test_a_cancelled_request_lets_go_of_its_grammar(dense: LLM) -> None:
    text = TextEngine(dense.engine, TOKENIZER)
    sampling = SamplingParams(
        max_tokens=50, structured_outputs=StructuredOutputs(regex="[ab]{40}"), n=2
    )
    request_id = text.submit(PROMPT, sampling)
    for _ in range(4):
        text.step()
    held = [weakref.ref(request.rules) for request in dense.engine.unfinished.values()]
    text.cancel(request_id)
    text.step()  # the burst in flight had it
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    check_nothing_left(dense.engine)


def test_masks_are_no_part_of_a_program(pattern: str) -> None:
    """A second schema compiles nothing, and requests without one run what they ran before."""
    llm = cases.build(pattern, deterministic=False)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def generate(*restrictions: dict[str, Any]) -> tuple[int, int]:
        """Programs that the requests compiled, and new shapes that the engine counted."""
        before, shapes = len(compiled), llm.engine.metrics().compilations
        sampling = [SamplingParams(max_tokens=30, seed=0, **given) for given in restrictions]
        llm.generate([PROMPT] * len(sampling), sampling)
        return len(compiled) - before, llm.engine.metrics().compilations - shapes

    person = {"structured_outputs": StructuredOutputs(json=PERSON)}
    point = {"structured_outputs": StructuredOutputs(json=POINT)}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert generate({})[1] == 3  # a chunk, an insertion, a burst
        new = generate(person)
        assert new[1] == 2  # an insertion and a burst with masks, both for the first time
        for restriction in (point, {"allowed_token_ids": [3, 4]}, {"bad_words": ["abc"]}):
            # A mask that never changes leaves the burst as long as it was: a program of its own.
            assert generate(restriction)[1] == ("allowed_token_ids" in restriction)
        assert generate(point) == generate(person) == generate({}) == (0, 0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.usefixtures("one_mode")
def test_only_masks_that_change_shorten_bursts(sparse: LLM) -> None:
    engine = sparse.engine
    text = TextEngine(engine, TOKENIZER)

    def bursts(*restrictions: dict[str, Any]) -> set[int]:
        for restriction in restrictions:
            text.submit(PROMPT, SamplingParams(max_tokens=25, ignore_eos=True, **restriction))
        lengths = set()
        while text.has_unfinished_requests:
            text.step()
            last = engine.metrics().last_step
            assert last is not None
            lengths.add(last.decode_steps)
        return lengths - {0}

    static = [{"bad_words": ["a"]}, {"allowed_token_ids": [1, 2]}, {"logit_bias": {1: 2}}]
    assert bursts({}, *static) == {8}
    assert bursts({"bad_words": ["abc"]}) == {1}
    # The others go on, in bursts that are as short as one selection lasts; 8 before it came.
    assert {4} <= bursts({}, {"bad_words": ["abc"]}) <= {8, 4, 1}


# --- words, ids and bias ----------------------------------------------------------------------

LETTERS = [token for token, text in enumerate(TEXTS) if text in (b"a", b"b", b" ", b"c", b"ab")]


def banned_next(words: Sequence[str], before: list[int]) -> np.ndarray:
    mask = np.zeros((VOCAB,), bool)
    for word in words:
        bare = word.lstrip(" ")
        for form in (word, bare, " " + bare):
            ids = TOKENIZER.encode(form)
            if ids and before[len(before) - len(ids) + 1 :] == ids[:-1]:
                mask[ids[-1]] = True
    return mask


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    words=st.lists(st.text("abc ", min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_bad_words_never_come(dense: LLM, words: list[str], seed: int) -> None:
    """Few letters may come at all, so that words do."""
    ids = [*LETTERS, VOCAB - 1]  # one that is no word's
    [prompt] = prompts(seed, [12])
    sampling = {"allowed_token_ids": ids, "bad_words": words, "logprobs": VOCAB}
    found = run(dense, prompt, temperature=0, max_tokens=12, **sampling)

    def allowed(before: list[int]) -> np.ndarray:
        return np.isin(np.arange(VOCAB), ids) & ~banned_next(words, before)

    check_greedy(found, allowed)
    assert len(found.token_ids) == 12
    drawn = run(dense, prompt, max_tokens=12, seed=seed, temperature=1.5, **sampling)
    for i, token in enumerate(drawn.token_ids):
        assert allowed(drawn.token_ids[:i])[token]


@pytest.mark.usefixtures("one_mode")
def test_words_that_are_forbidden_would_have_come(dense: LLM) -> None:
    """Of one token, of several, in the middle of a text and where it begins."""
    free = run(dense, PROMPT, **GREEDY, allowed_token_ids=LETTERS)
    for size in (1, 2, 3):
        for start in (0, 10, 25):
            word = text_of(free.token_ids[start : start + size]).decode()
            found = run(dense, PROMPT, **GREEDY, allowed_token_ids=LETTERS, bad_words=[word])
            ids = TOKENIZER.encode(word)
            windows = zip(*(found.token_ids[i:] for i in range(len(ids))), strict=False)
            assert tuple(ids) not in set(windows)


@pytest.mark.usefixtures("one_mode")
def test_allowed_ids_and_bias(dense: LLM) -> None:
    rng = np.random.default_rng(0)
    ids = sorted(rng.choice(VOCAB, 20, replace=False).tolist())
    bias = {int(t): float(b) for t, b in zip(rng.choice(VOCAB, 30), rng.normal(0, 3, 30))}  # noqa: B905
    mask = np.isin(np.arange(VOCAB), ids)
    end = {"temperature": 0, "max_tokens": 20, "logprobs": VOCAB, "ignore_eos": True}
    check_greedy(run(dense, PROMPT, **end, allowed_token_ids=ids), lambda before: mask)
    everything = np.ones((VOCAB,), bool)
    check_greedy(run(dense, PROMPT, **end, logit_bias=bias), lambda before: everything, bias)
    both = run(dense, PROMPT, **end, allowed_token_ids=ids, logit_bias=bias)
    check_greedy(both, lambda before: mask, bias)
    # These logits are far below a bias of 100.
    likeliest = run(dense, PROMPT, **end).token_ids[0]
    found = run(dense, PROMPT, **end, logit_bias={likeliest: -100, VOCAB - 1: 100})
    assert found.token_ids == [VOCAB - 1] * 20
    found = run(dense, PROMPT, **end, logit_bias={likeliest: -100})
    assert likeliest not in found.token_ids


def test_packed_bits() -> None:
    for size in (1, 31, 32, 33, 100):
        ids = np.flatnonzero(np.random.default_rng(size).random(size) < 0.5).tolist()
        words = packed(ids, size)
        assert words.dtype == np.uint32 and words.shape == (-(-size // 32),)
        found = [t for t in range(32 * len(words)) if int(words[t // 32]) >> (t % 32) & 1]
        assert found == ids


# --- together with what ends a text ------------------------------------------------------------


@pytest.mark.usefixtures("one_mode")
def test_ends_of_a_text(dense: LLM) -> None:
    word = StructuredOutputs(regex="abcab")
    found = run(dense, PROMPT, **GREEDY, structured_outputs=word, stop="ca")
    assert (found.text, found.finish_reason, found.stop_reason) == ("ab", "stop", "ca")
    [c] = TOKENIZER.encode("c")
    found = run(dense, PROMPT, **GREEDY, structured_outputs=word, stop_token_ids=[c])
    assert (found.text, found.finish_reason, found.stop_reason) == ("ab", "stop", c)
    found = run(dense, PROMPT, temperature=0, max_tokens=1, structured_outputs=word)
    assert (found.finish_reason, len(found.token_ids)) == ("length", 1)
    # The text is complete before min_tokens, and nothing but its end could follow.
    found = run(dense, PROMPT, **GREEDY, structured_outputs=word, min_tokens=30)
    assert (found.text, found.finish_reason) == ("abcab", "stop")
    # An end is no end before min_tokens where the text can go on.
    repeated = StructuredOutputs(regex="[ab]*")
    for seed in range(5):
        found = run(dense, PROMPT, seed=seed, structured_outputs=repeated, min_tokens=10,
                    max_tokens=20)  # fmt: skip
        assert len(found.token_ids) >= 10


@pytest.mark.usefixtures("one_mode")
def test_a_mask_that_leaves_nothing_ends_the_text(dense: LLM) -> None:
    """Bad words and allowed ids that come to forbid everything, in the course of the text."""
    a, b = TOKENIZER.encode("a")[0], TOKENIZER.encode("b")[0]
    found = run(
        dense, PROMPT, **GREEDY, allowed_token_ids=[a, b], bad_words=["aa", "b"], logit_bias={a: 9}
    )
    assert (found.token_ids, found.finish_reason) == ([a], "stop")


@pytest.mark.usefixtures("one_mode")
def test_exact_mode() -> None:
    """Verification honours masks that never change; for others nothing is drafted."""
    exact = cases.build(attention="lserve", exact=True, draft="ngram")
    dense = cases.build()
    asked = [{"prompt_token_ids": p["prompt_token_ids"] * 4} for p in prompts(5, [20, 30, 25])]
    sampling = [
        SamplingParams(max_tokens=30, seed=1, structured_outputs=StructuredOutputs(json=PERSON)),
        SamplingParams(max_tokens=30, seed=2, allowed_token_ids=[3, 4, 5]),
        SamplingParams(max_tokens=30, seed=3, logit_bias={5: 60, 8: 60, 9: -100}, bad_words=["a"]),
    ]
    for params in (sampling, sampling[1:]):
        wanted = dense.generate(asked[: len(params)], params)
        found = exact.generate(asked[: len(params)], params)
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in wanted]
    assert all(output.outputs[0].metrics.drafted_tokens for output in found)
