"""What cannot be asked for is refused in one sentence, and no grammar takes time without bound."""

import json
import sys
from typing import Any

import constraint_cases as cases
import pytest
from constraint_cases import EOS, SPECIAL, TOKENIZER, VOCAB, prompts

from lserve_jax import LLM, SamplingParams, StructuredOutputs
from lserve_jax.constraints import Constraints

[PROMPT] = prompts(0, [20])


@pytest.fixture(scope="module")
def llm() -> LLM:
    return cases.build()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_bias": {-1: 1}}, "every token id of logit_bias must be an integer of at least 0"),
        ({"logit_bias": {"5": 1}}, "every token id of logit_bias must be an integer"),
        ({"logit_bias": {5: 100.5}}, r"logit_bias of token 5 must be a number in \[-100.0, 100.0"),
        ({"logit_bias": {5: float("nan")}}, "logit_bias of token 5 .* got nan"),
        ({"logit_bias": [5]}, r"logit_bias=\[5\] must map token ids to numbers"),
        ({"logit_bias": dict.fromkeys(range(1025), 1)}, "logit_bias has 1025 entries, more than"),
        ({"allowed_token_ids": []}, r"allowed_token_ids=\(\) must hold at least one token id"),
        ({"allowed_token_ids": [1, -2]}, "every entry of allowed_token_ids must be an integer"),
        ({"allowed_token_ids": 5}, "allowed_token_ids=5 must be a sequence of integers"),
        ({"bad_words": [""]}, r"bad_words=\(''.*must hold non-empty strings"),
        ({"bad_words": "cat"}, "bad_words='cat' must be a sequence of strings"),
        ({"bad_words": ["a"] * 1025}, "1025 bad_words are more than 1024"),
        ({"bad_words": ["a" * 70_000]}, "bad_words have 70000 characters, more than 65536"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs=.* must be StructuredOutputs"),
        (
            {"structured_outputs": StructuredOutputs(regex="a"), "ignore_eos": True},
            "ignore_eos=True contradicts structured_outputs",
        ),
    ],
)
def test_wrong_restrictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**changes)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, choice and grammar, got none"),
        ({"json": {}, "regex": "a"}, "exactly one of .* got json and regex"),
        ({"json": "{"}, "json='{' is no JSON schema"),
        ({"json": "[]"}, r"json='\[\]' must be a JSON schema \(an object\) or True"),
        ({"json": False}, "json=False must be a JSON schema"),
        ({"json": {"a": object()}}, "json=.* is no JSON schema"),
        ({"json": {"a": float("nan")}}, "json=.* is no JSON schema"),
        ({"json": DEEP}, "json=.* is no JSON schema"),
        ({"json": {"enum": ["x" * 70_000]}}, "json has 700.. characters, more than 65536"),
        ({"regex": ""}, "regex='' must be a non-empty string"),
        ({"regex": "a" * 70_000}, "regex has 70000 characters, more than 65536"),
        ({"choice": []}, r"choice=\[\] must hold non-empty strings"),
        ({"choice": ["a", ""]}, "must hold non-empty strings"),
        ({"choice": "ab"}, "choice='ab' must be a sequence of strings"),
        ({"choice": ["a" * 40_000, "b" * 40_000]}, "choice has 80000 characters"),
        ({"grammar": 5}, "grammar=5 must be a non-empty string"),
    ],
)
def test_wrong_structured_outputs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredOutputs(**fields)


def test_structured_outputs_are_values() -> None:
    """A schema given in several ways is one, so that it is compiled once."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    given = StructuredOutputs(json=schema)
    assert given == StructuredOutputs(json=json.dumps(schema, indent=2))
    assert hash(given) == hash(StructuredOutputs(json=json.dumps(schema)))
    assert StructuredOutputs(json=True) == StructuredOutputs(json={})
    assert StructuredOutputs(choice=["a"]).choice == ("a",)
    params = SamplingParams(structured_outputs=given, logit_bias={1: 2}, bad_words=["x"])
    assert hash(params) == hash(SamplingParams(structured_outputs=given, bad_words=["x"]))


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"logit_bias": {VOCAB: 1}}, r"logit_bias holds token id 288, outside .* \[0, 288\)"),
        ({"allowed_token_ids": [1, 999]}, "allowed_token_ids holds token id 999, outside"),
        (
            {"allowed_token_ids": [7], "min_tokens": 2, "stop_token_ids": [7]},
            "leave no token to begin with before min_tokens=2",
        ),
        (
            {"allowed_token_ids": [7], "structured_outputs": StructuredOutputs(regex="zz")},
            "leave no token to begin with",
        ),
    ],
)
def test_requests_that_could_never_run(llm: LLM, sampling: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llm.generate(PROMPT, SamplingParams(**sampling))
    assert not llm.engine.has_unfinished_requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"json": {"type": "strng"}}, "json='.*strng.*' cannot be used: Invalid type: strng"),
        ({"json": {"$ref": "http://example.com/x"}}, "json=.* cannot be used: Resource"),
        ({"json": {"$ref": "#"}}, "json=.* cannot be used"),
        ({"json": {"enum": []}}, "json=.* cannot be used: Unsatisfiable schema"),
        ({"json": {"type": "object", "not": {}}}, "json=.* cannot be used: Unimplemented keys"),
        ({"regex": "("}, r"regex='\(' cannot be used: .*unclosed group"),
        ({"regex": "a(?=b)"}, "regex=.* cannot be used: .*look-around"),
        ({"grammar": "start: x"}, "grammar='start: x' cannot be used: .*unknown name"),
    ],
)
def test_grammars_that_cannot_be_followed(llm: LLM, fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        llm.generate(PROMPT, SamplingParams(structured_outputs=StructuredOutputs(**fields)))
    assert "\n" not in str(caught.value)


NESTED: dict[str, Any] = {"type": "integer"}
for _ in range(10):
    NESTED = {"anyOf": [NESTED, NESTED]}
HOSTILE = {
    "repetitions": {"regex": "(a{1000}){1000}"},
    "more repetitions": {"regex": "((a{1,100}b{1,100}){1,100}){1,100}"},
    "automaton": {"regex": "(a|b)*a(a|b){30}"},
    "groups": {"regex": "(" * 30_000 + ")" * 30_000},
    "brackets": {"grammar": "start: " + "(" * 30_000 + '"a"' + ")" * 30_000},
    "ambiguous": {"grammar": 'start: s\ns: s s s | s s | "a" | '},
    "alternatives": {"choice": [str(i) for i in range(10_000)]},
    "rules": {"grammar": "start: " + " | ".join(f'"{i}"' for i in range(6000))},
    "doubled": {"json": NESTED},
    "properties": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(2000)}}},
    "array": {"json": {"type": "array", "items": {"type": "string"}, "minItems": 10**9}},
    "string": {"json": {"type": "string", "maxLength": 10**9, "pattern": "^(([a-z])+.)+[A-Z]+$"}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_grammar_has_bounds(llm: LLM, kind: str) -> None:
    """It is refused, or its text ends: by max_tokens, or with an error that says why.

    Were its work without bounds, this would not end, or take all memory.
    """
    sampling = SamplingParams(
        max_tokens=20, seed=0, structured_outputs=StructuredOutputs(**HOSTILE[kind])
    )
    try:
        [(_, output)] = llm.stream([(PROMPT, sampling)])
    except ValueError as error:
        assert "cannot be used" in str(error)
        return
    completion = output.outputs[0]
    assert completion.finish_reason in ("length", "stop", "error")
    assert (completion.finish_reason == "error") == (completion.error is not None)


def test_a_grammar_that_becomes_too_complex(llm: LLM) -> None:
    """Its request ends with what it has, and others go on."""
    wanted = StructuredOutputs(**HOSTILE["repetitions"])
    sampling = SamplingParams(max_tokens=20, seed=0, structured_outputs=wanted)
    requests = [(PROMPT, sampling), (PROMPT, SamplingParams(max_tokens=20, seed=0))]
    failed, other = (output for _, output in sorted(llm.stream(requests), key=lambda x: x[0]))
    assert failed.outputs[0].finish_reason == "error"
    assert set(failed.outputs[0].text) == {"a"}
    assert failed.error is not None and "grammar became too complex" in failed.error
    assert other.outputs[0].finish_reason in ("length", "stop") and other.error is None
    with pytest.raises(ValueError, match="prompt 0: the text's grammar became too complex"):
        llm.generate(PROMPT, sampling)


def test_without_a_tokenizer() -> None:
    llm = cases.build(tokenizer=None)
    for sampling in (
        SamplingParams(bad_words=["a"]),
        SamplingParams(structured_outputs=StructuredOutputs(regex="a")),
    ):
        with pytest.raises(ValueError, match=r"(bad_words|structured_outputs)=.* needs a tokeniz"):
            llm.generate(PROMPT, sampling)
        with pytest.raises(ValueError, match="needs a constraint made by a tokenizer"):
            llm.engine.add_request("a", [1], sampling, seed=0)
    # Token ids need none.
    ids = SamplingParams(temperature=0, allowed_token_ids=[5], logit_bias={6: 3})
    assert llm.generate(PROMPT, ids)[0].outputs[0].token_ids == [5] * 16


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = cases.build()
    sampling = SamplingParams(structured_outputs=StructuredOutputs(regex="b"))
    with pytest.raises(ValueError, match=r"llguidance package: pip install lserve-jax\[serve\]"):
        llm.generate(PROMPT, sampling)


@pytest.mark.parametrize(
    "asked", [{"choice": [SPECIAL]}, {"json": {"const": EOS}}, {"regex": r"a<\|end\|>x"}]
)
def test_a_text_may_have_to_spell_out_a_control_token(llm: LLM, asked: dict[str, Any]) -> None:
    """In plain tokens: a grammar's text is no place for control."""
    sampling = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputs(**asked))
    found = llm.generate(PROMPT, sampling)[0].outputs[0]
    assert found.finish_reason == "stop"
    assert (SPECIAL if "choice" in asked else EOS) in found.text
    special = {TOKENIZER.backend.token_to_id(text) for text in (EOS, SPECIAL)}
    assert special.isdisjoint(found.token_ids[:-1])


def test_words_are_worked_out_once() -> None:
    """However many completions ask for them: the engine's thread makes a constraint for each."""
    constraints, sampling = Constraints(TOKENIZER, VOCAB), SamplingParams(bad_words=["ab", "tree"])
    made = [constraints.make(sampling) for _ in range(5)]
    assert constraints._words.cache_info().misses == 1
    assert len(set(map(id, made))) == 5
