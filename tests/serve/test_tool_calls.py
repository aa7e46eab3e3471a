"""Tool calls in answers: whole, streamed in any pieces, broken; grammars that force them."""

import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lserve_jax.serve import tool_calls
from lserve_jax.serve.tool_calls import (
    HERMES,
    LLAMA3_JSON,
    MISTRAL,
    MISTRAL_ARGS,
    MISTRAL_CALL_ID,
    Delta,
    ToolCallParser,
    ToolFormat,
    detect_tool_format,
    is_function_name,
    parse_tool_calls,
)

FORMATS = (HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_ARGS)


def read(form: ToolFormat, text: str) -> tuple[str | None, list[tuple[str, str]]]:
    content, calls = parse_tool_calls(form, text)
    return content, [(call.name, call.arguments) for call in calls]


def streamed(form: ToolFormat, pieces: list[str]) -> list[Delta]:
    parser = ToolCallParser(form)
    return [delta for piece in pieces for delta in parser.feed(piece)] + parser.finish()


# --- whole answers ----------------------------------------------------------------------------

F, G = ("f", '{"x": 1}'), ("g", '{"y": [{"z": "}"}], "w": -1.5e3}')
JSON_F, JSON_G = (f'{{"name": "{name}", "arguments": {text}}}' for name, text in (F, G))
P_F, P_G = (f'{{"name": "{name}", "parameters": {text}}}' for name, text in (F, G))
T = "[TOOL_CALLS]"


@pytest.mark.parametrize(
    ("form", "text", "content", "calls"),
    [
        (HERMES, f"<tool_call>\n{JSON_F}\n</tool_call>", None, [F]),
        (HERMES, f"\n<tool_call>{JSON_F}</tool_call>\n", None, [F]),
        (
            HERMES,
            f"Hm.\n<tool_call>\n{JSON_F}\n</tool_call>\n<tool_call>\n{JSON_G}\n</tool_call>",
            "Hm.",
            [F, G],
        ),
        (HERMES, f"a <tool_call>{JSON_F}</tool_call> b \n", "a b \n", [F]),
        (HERMES, f"<tool_call>{JSON_F}", None, [F]),  # the model left the end out
        (HERMES, f"<tool_call>{JSON_F}<tool_call>{JSON_G}", None, [F, G]),
        (HERMES, f"<tool_call>[{JSON_F}, {JSON_G}]</tool_call>", None, [F, G]),  # SmolLM2
        (HERMES, '<tool_call>{ "arguments": {}, "name": "f"}\n</tool_call> ', None, [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f"}</tool_call>', None, [("f", "{}")]),
        (HERMES, '<tool_call>{"name": "f", "arguments": null}', None, [("f", "{}")]),
        (LLAMA3_JSON, P_F, None, [F]),
        (LLAMA3_JSON, f"<|python_tag|>{P_F}", None, [F]),
        (LLAMA3_JSON, f"\n {P_F}; {P_G}\n{P_F} ;\n", None, [F, G, F]),
        (LLAMA3_JSON, f"<|python_tag|>{P_F}; <|python_tag|>{P_G}", None, [F, G]),
        (LLAMA3_JSON, f"{P_F}; and", "; and", [F]),
        (LLAMA3_JSON, f"So: <|python_tag|>{P_F}", "So:", [F]),
        (LLAMA3_JSON, f"So: {P_F}", f"So: {P_F}", []),  # a JSON answer, not a call
        (LLAMA3_JSON, f"{P_F} so {P_F}", f" so {P_F}", [F]),
        (LLAMA3_JSON, '{"name": "Ann", "age": 4}', '{"name": "Ann", "age": 4}', []),
        (LLAMA3_JSON, '<|python_tag|>{"name": "f"}', None, [("f", "{}")]),
        (MISTRAL, f"{T} [{JSON_F}, {JSON_G}]", None, [F, G]),
        (MISTRAL, f"{T}[ {JSON_F} ,{JSON_G} ]\n", None, [F, G]),
        (MISTRAL, f'Hm. {T} [{JSON_F[:-1]}, "id": "abcdefghi"}}]', "Hm.", [F]),
        (MISTRAL, f"{T}{JSON_F}", None, [F]),
        (MISTRAL, f"{T}f{F[1]}{T}g{G[1]}", None, [F, G]),
        (MISTRAL_ARGS, f"{T}f[ARGS]{F[1]}{T}g[ARGS] {G[1]}", None, [F, G]),
        (MISTRAL_ARGS, f"So.{T}f[CALL_ID]a1b2c3d4e[ARGS]{F[1]}", "So.", [F]),
        (MISTRAL_ARGS, f"{T} [{JSON_F}]", None, [F]),
    ],
)
def test_calls_are_found_and_the_rest_is_content(form, text, content, calls):
    assert read(form, text) == (content, calls)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n",
        "Just text.",
        "a < b [c] {d}; <tool",
        "<tool_call>",
        "<tool_call></tool_call>",
        "<tool_call>{]</tool_call>",
        "</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"x": oops}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
        '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": 1.2.3}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\\q"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": "\n"}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {},}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {{"x": {"1" * 5000}}}}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {{"x": {"[" * 100_000}',
        f'<tool_call>{{"name": "f", "arguments": {{"x": {"[" * 100}{"]" * 100}}}}}',
        '<|python_tag|>brave_search.call(query="x")',
        f"{T}",
        f"{T}f",
        f"{T}f[ARGS]",
        f"{T}f[ARGS][1]",
        f"{T}f[CALL_ID]x",
        f"{T}f[CALL_ID]x[CALL_ID]y[ARGS]{{}}",
        f"{T}{'f' * 65}[ARGS]{{}}",
        f"{T} [",
        f"{T} [1]",
        f'{T} [{{"name": "f", "arguments": {{"x": 1}}',
    ],
)
def test_text_without_a_whole_call_stays_as_it_is(form, text):
    if form is LLAMA3_JSON:
        assert read(form, text.removeprefix("<tool_call>"))[0] == text.removeprefix("<tool_call>")
    assert read(form, text) == (text, [])


def test_what_follows_a_broken_call_is_read_again():
    text = f"<tool_call>{{x <tool_call>{JSON_F}</tool_call>"
    assert read(HERMES, text) == ("<tool_call>{x", [F])
    text = f"<tool_<tool_call>{JSON_F}</tool_</tool_call>"
    assert read(HERMES, text) == ("<tool_</tool_</tool_call>", [F])
    text = f"{T} [{JSON_F}, {{]"
    assert read(MISTRAL, text) == (", {]", [F])
    text = f"{T} [{JSON_F} {T} [{JSON_G}]"
    assert read(MISTRAL, text) == (None, [F, G])


def test_a_marker_inside_of_an_argument_is_part_of_it():
    arguments = json.dumps({"x": "</tool_call><tool_call>{", 'y"': ["}", '\\"']})
    text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    assert read(HERMES, text) == (None, [("f", arguments)])


def test_arguments_have_a_depth():
    arguments = f'{{"x": {"[" * 98}{"]" * 98}}}'
    assert read(HERMES, f'<tool_call>{{"name": "f", "arguments": {arguments}}}') == (
        None,
        [("f", arguments)],
    )


def test_arguments_are_kept_as_the_model_wrote_them():
    arguments = '{"b":1e3, "a" :"\\ud800\\u00e9", "a": 1e999 }'
    text = f'{{"name": "f", "parameters":  {arguments} , "z": 1}}'
    assert read(LLAMA3_JSON, text) == (None, [("f", arguments)])


def test_ids():
    hermes = [HERMES.new_id() for _ in range(50)]
    assert len(set(hermes)) == 50
    assert all(i.startswith("call_") and len(i) == 29 and i[5:].isalnum() for i in hermes)
    for form in (MISTRAL, MISTRAL_ARGS, MISTRAL_CALL_ID):
        assert len(form.new_id()) == 9 and form.new_id().isalnum() and form.new_id().isascii()
    _, calls = parse_tool_calls(MISTRAL, f"{T} [{JSON_F}, {JSON_G}]")
    assert len({call.id for call in calls}) == 2


def test_names():
    assert all(map(is_function_name, ["f", "get_Weather-2", "x" * 64]))
    assert not any(map(is_function_name, ["", "a.b", "é", "x" * 65, None, 5]))


# --- streams ----------------------------------------------------------------------------------

PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    *(JSON_F, JSON_G, P_F, "f", '{"a": "', "{", "}", "[", "]", ",", ";", " ", "\n", '"', "\\"),
    *("text", "<tool_", "[TOOL", "é", "1", "null", ":"),
]
ANSWERS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


def merged(deltas: list[Delta]) -> list[str | tuple[int, str, str]]:
    """Content and calls in order; what content pieces are cut into does not count."""
    out: list = []
    for delta in deltas:
        if delta.call is not None:
            assert delta.content == ""
            out.append((delta.index, delta.call.name, delta.call.arguments))
        elif out and isinstance(out[-1], str):
            out[-1] += delta.content
        else:
            out.append(delta.content)
    return out


@settings(deadline=None, max_examples=500)
@given(form=st.sampled_from(FORMATS), text=ANSWERS, seed=st.integers(0, 10**6))
@example(form=HERMES, text=f"a <tool_call>\n{JSON_F}\n</tool_call>\n<tool_call>{JSON_G}", seed=0)
def test_a_stream_gives_what_the_whole_answer_gives(form, text, seed):
    rng = random.Random(seed)
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(8)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = merged(streamed(form, [text]))
    assert merged(streamed(form, pieces)) == whole == merged(streamed(form, list(text)))
    content, calls = read(form, text)
    assert "".join(part for part in whole if isinstance(part, str)) == (content or "")
    assert [part[1:] for part in whole if not isinstance(part, str)] == calls
    assert [part[0] for part in whole if not isinstance(part, str)] == [*range(len(calls))]


@settings(deadline=None, max_examples=300)
@given(form=st.sampled_from(FORMATS), text=ANSWERS)
def test_no_text_is_lost(form, text):
    """What is neither content nor in a call is only frame: markers, lists, separators."""
    content, calls = parse_tool_calls(form, text)
    left = text
    for part in [call.arguments for call in calls]:
        assert part in left
        left = left.replace(part, "", 1)
    letters = "".join(filter(str.isalpha, content or ""))
    frame = iter(filter(str.isalpha, text))
    assert all(letter in frame for letter in letters)  # in order
    if not calls and not any(marker in text for marker in form.markers):
        assert content == text


def test_content_comes_at_once_and_what_could_be_a_marker_is_held_back():
    parser = ToolCallParser(HERMES)
    assert parser.feed("Let me") == [Delta("Let me")]
    assert parser.feed(" see <tool") == [Delta(" see")]
    assert parser.feed("box> and <") == [Delta(" <toolbox> and")]
    assert parser.feed("tool_call>\n" + JSON_F[:-1]) == []
    [delta] = parser.feed("}\n</tool")
    assert delta.call is not None and (delta.call.name, delta.call.arguments) == F
    assert parser.feed("_call>") == []
    assert parser.finish() == []


def work(text: str, form: ToolFormat) -> int:
    """How many characters the parser looks at, one piece each."""
    looked = 0
    take = ToolCallParser._take

    def counted(parser, char):
        nonlocal looked
        looked += 1
        take(parser, char)

    ToolCallParser._take = counted
    try:
        streamed(form, list(text))
    finally:
        ToolCallParser._take = take
    return looked


@pytest.mark.parametrize(
    "unit",
    [
        "word ",
        "<",
        "<tool_call>",
        "<tool_call>{",
        '<tool_call>{"',
        '<tool_call>{"a": ["',
        '<tool_call>["',
        '","<tool_call>{"',
        "[TOOL_CALLS]",
        "[TOOL_CALLS] [",
        "[TOOL_CALLS]f[ARGS]{",
        '[TOOL_CALLS]f[ARGS]{"',
        "{",
        '{"name": "f"}',
        '{"name": "f"};',
        " ",
        "<|python_tag|>{",
    ],
)
@pytest.mark.parametrize("form", FORMATS)
def test_the_work_grows_as_the_answer(form, unit):
    for beginning in ("", '<tool_call>{"name": "', "[TOOL_CALLS]f[ARGS]{", '{"a": "'):
        text = beginning + unit * 400
        assert work(text, form) <= 4 * len(text)


# --- which format -----------------------------------------------------------------------------

# The lines of well-known templates that show a call, in the spelling of their files.
LLAMA = """{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}
{{- tool_call.arguments | tojson }}{{- "}" }}"""
QWEN = """{{- "<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}" }}
{{- '<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}"""
HERMES_2 = """{{- '\\n<tool_call>\\n' }}{{- '{ ' }}{{- '"arguments": ' }}
{{- tool_call.arguments|tojson }}{{- ', ' }}{{- '"name": "' }}"""
QWEN_CODER = """{{- '<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
{%- for name, value in tool_call.arguments|items %}{{- '<parameter=' + name + '>\\n' }}"""
NEMO = """{{- "[TOOL_CALLS][" }}{%- set out = tool_call.function|tojson %}{{- out[:-1] }}
{{- ', "id": "' + tool_call.id + '"}' }}"""
DEVSTRAL = """{{- "[TOOL_CALLS]" + tool['function']['name'] + "[ARGS]" + arguments }}"""
SMALL_3_2 = """{{- '[TOOL_CALLS]' + tool_call.function.name + '[CALL_ID]' + tool_call.id }}
{{- '[ARGS]' + tool_call['function']['arguments']|tojson }}"""


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (LLAMA, LLAMA3_JSON),
        (QWEN, HERMES),
        (HERMES_2, HERMES),
        ("<|start_header_id|>" + HERMES_2, HERMES),  # Hermes on Llama 3
        (NEMO, MISTRAL),
        (DEVSTRAL, MISTRAL_ARGS),
        (SMALL_3_2, MISTRAL_CALL_ID),
        (QWEN_CODER, None),
        ("{{ '<|start_header_id|>' + role }}", None),  # Llama 3 before 3.1
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        ("", None),
    ],
)
def test_the_format_is_that_of_the_template(template, form):
    assert detect_tool_format(template) == form


def test_markers_that_may_be_special_tokens():
    assert HERMES.markers == ("<tool_call>", "</tool_call>")
    assert LLAMA3_JSON.markers == ("<|python_tag|>",)
    assert MISTRAL_CALL_ID.markers == ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    assert tool_calls.MISTRAL.markers == ("[TOOL_CALLS]",)
