"""Grammars of tool calls: what they allow is read back as calls, and nothing else is allowed."""

import json
import random

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer

from lserve_jax.serve.tool_calls import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_CALL_ID,
    ToolFormat,
    parse_tool_calls,
)
from lserve_jax.serve.tool_grammar import call_grammar

FORMATS = (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS, MISTRAL_CALL_ID)
WEATHER = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["unit", "days"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = {"get_weather": WEATHER, "stop-now": NOTHING}


class Words:
    """A byte-level vocabulary of letters, with the markers of the format as special tokens."""

    def __init__(self, form: ToolFormat, special: bool):
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        model = tokenizers.models.BPE(vocab={x: i for i, x in enumerate(letters)}, merges=[])
        self.backend = tokenizers.Tokenizer(model)
        self.backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.backend.decoder = tokenizers.decoders.ByteLevel()
        self.backend.add_special_tokens(["</s>", *(form.markers if special else ())])
        self.eos = self.backend.token_to_id("</s>")
        self.control = {
            text: self.backend.token_to_id(text) for text in (form.markers if special else ())
        }
        self.tokens = LLTokenizer(self.backend.to_str(), eos_token=self.eos)

    def text(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=False)

    def allows(self, grammar: str, text: str) -> bool:
        matcher = LLMatcher(self.tokens, grammar)
        ids = self.backend.encode(text, add_special_tokens=False).ids
        taken = matcher.try_consume_tokens(ids)
        assert not matcher.is_error(), matcher.get_error()
        return taken == len(ids) and matcher.is_accepting()

    def walk(self, grammar: str, seed: int) -> str:
        """A random text of the grammar."""
        rng, ids = random.Random(seed), []
        matcher = LLMatcher(self.tokens, grammar)
        while not matcher.is_stopped():
            assert not matcher.is_error(), matcher.get_error()
            mask = matcher.compute_bitmask()
            allowed = [i for i in range(8 * len(mask)) if mask[i // 8] >> (i % 8) & 1]
            token = rng.choice(allowed)
            assert matcher.consume_token(token)
            if token != self.eos:
                ids.append(token)
        return self.text(ids)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_whatever_the_grammar_allows_is_read_as_calls(form, parallel, special):
    words = Words(form, special)
    grammar = call_grammar(form, FUNCTIONS, parallel=parallel, control_tokens=words.control)
    counts = set()
    for seed in range(25):
        content, calls = parse_tool_calls(form, words.walk(grammar, seed))
        assert content is None and calls
        counts.add(len(calls))
        for call in calls:
            arguments = json.loads(call.arguments)
            if call.name == "stop-now":
                assert arguments == {}
            else:
                assert call.name == "get_weather" and arguments.keys() == {"unit", "days"}
                assert arguments["unit"] in "CF" and arguments["days"] <= 9
    assert (counts == {1}) != parallel


def test_the_texts_are_those_of_the_templates():
    arguments = '{"unit": "C", "days": 3}'
    call = f'{{"name": "get_weather", "arguments": {arguments}}}'
    stop = '{"name": "stop-now", "arguments": {}}'
    texts = {
        HERMES: (
            f"<tool_call>\n{call}\n</tool_call>",
            f"<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{stop}\n</tool_call>",
        ),
        LLAMA3_JSON: (
            call.replace("arguments", "parameters"),
            f"{call}; {stop}".replace("arguments", "parameters"),
        ),
        MISTRAL: (f"[TOOL_CALLS] [{call}]", f"[TOOL_CALLS][{call}, {stop}]"),
        MISTRAL_ARGS: (
            f"[TOOL_CALLS]get_weather[ARGS]{arguments}",
            f"[TOOL_CALLS]get_weather[ARGS]{arguments}[TOOL_CALLS]stop-now[ARGS]{{}}",
        ),
        MISTRAL_CALL_ID: (
            f"[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{arguments}",
            f"[TOOL_CALLS]get_weather[CALL_ID]abcDEF123[ARGS]{arguments}"
            "[TOOL_CALLS]stop-now[CALL_ID]000000000[ARGS]{}",
        ),
    }
    for form, (one, two) in texts.items():
        for special in (False, True):
            words = Words(form, special)
            control = words.control
            for parallel in (False, True):
                grammar = call_grammar(form, FUNCTIONS, parallel=parallel, control_tokens=control)
                assert words.allows(grammar, one)
                assert words.allows(grammar, two) == parallel
                assert not words.allows(grammar, one.replace('"C"', '"K"'))
                assert not words.allows(grammar, one.replace("get_weather", "get_time"))
                assert not words.allows(grammar, one.replace(': "C"', ':\n"C"'))
                assert not words.allows(grammar, f"Sure: {one}")
                assert not words.allows(grammar, "")


def test_a_special_token_is_not_spelled_out():
    words = Words(MISTRAL, special=True)
    text = '[TOOL_CALLS] [{"name": "stop-now", "arguments": {}}]'
    spelled = Words(MISTRAL, special=False).backend.encode(text).ids
    assert not set(words.control.values()) & set(spelled)
    for control, taken in ((words.control, 0), ({}, len(spelled))):
        grammar = call_grammar(MISTRAL, FUNCTIONS, parallel=True, control_tokens=control)
        assert LLMatcher(words.tokens, grammar).try_consume_tokens(spelled) == taken


def test_an_answer_may_stand_in_place_of_calls():
    words = Words(HERMES, special=False)
    answer = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
    grammar = call_grammar(HERMES, FUNCTIONS, parallel=True, control_tokens={}, answer=answer)
    call = '<tool_call>\n{"name": "stop-now", "arguments": {}}\n</tool_call>'
    assert words.allows(grammar, '{"sum": 3}') and words.allows(grammar, call)
    assert not words.allows(grammar, '{"sum": "3"}')
    assert not words.allows(grammar, f'{call}\n{{"sum": 3}}')


def test_schemas_may_refer_to_their_own_parts():
    words = Words(HERMES, special=False)
    schema = {
        "$defs": {"A": {"enum": ['"', "\n", "é"]}},
        "properties": {"x": {"$ref": "#/$defs/A"}},
    }
    functions = {"f": {"type": "object", **schema, "required": ["x"]}, "g": NOTHING}
    grammar = call_grammar(HERMES, functions, parallel=False, control_tokens={})
    for value, allowed in (('"\\""', True), ('"é"', True), ('"e"', False)):
        call = f'{{"name": "f", "arguments": {{"x": {value}}}}}'
        assert words.allows(grammar, f"<tool_call>\n{call}\n</tool_call>") == allowed


@pytest.mark.parametrize(
    ("schema", "others"),
    [
        ({}, False),
        ({"required": ["unit"]}, False),
        ({"additionalProperties": True}, True),
        ({"additionalProperties": {"type": "integer"}}, True),
        ({"patternProperties": {"^x": {"type": "integer"}}}, True),
        ({"required": ["x"]}, True),
        ({"allOf": [{"properties": {"x": {"type": "integer"}}}]}, True),
    ],
)
def test_a_call_has_no_arguments_that_its_schema_does_not_speak_of(schema, others):
    words = Words(HERMES, special=False)
    function = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, **schema}
    grammar = call_grammar(HERMES, {"f": function}, parallel=False, control_tokens={})
    call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    orders = '{"unit": "C", "x": 1}', '{"x": 1, "unit": "C"}'
    assert any(words.allows(grammar, call % text) for text in orders) == others
    assert words.allows(grammar, call % '{"unit": "C"}') != (schema.get("required") == ["x"])
