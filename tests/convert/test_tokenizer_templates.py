"""Chat templates: tool calls, errors with their line, and templates that would never end."""

import pytest
import tokenizers

from lserve_jax import chat_template
from lserve_jax.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]


def with_template(source: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    return Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=source)


def rendered(source: str, messages: list[dict] = USER, **options: object) -> str:
    return with_template(source).apply_chat_template(messages, **options)


# --- what reaches the template ----------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = (
    "{% for m in messages %}{% if m.tool_calls %}[call {{ m.tool_calls[0].function.name }}]"
    "{% else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_message_with_tool_calls_needs_no_content(content):
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [CALL], **content},
        {"role": "tool", "content": "42"},
    ]
    assert rendered(CALLS, messages) == "[user]q[call f][tool]42"  # as transformers has it


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "tool_calls": None, "content": None},
        {"role": "assistant", "tool_calls": [CALL], "content": 5},
        {"role": "assistant"},
        {"tool_calls": [CALL]},
    ],
)
def test_a_message_without_content_and_tool_calls_is_refused(message):
    with pytest.raises(ValueError, match=r'messages\[1\]=.*"role" and "content"'):
        rendered(CALLS, [*USER, message])


def test_tools_reach_the_template():
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    source = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}."
    text = '{"type": "function", "function": {"name": "f", "parameters": {}}}.'
    assert rendered(source, tools=tools) == text
    assert rendered(source) == rendered(source, tools=[]) == "."


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, ["f"], [None]])
def test_malformed_tools_are_refused(tools):
    with pytest.raises(ValueError, match="tools must be a list of mappings"):
        rendered("{{ tools }}", tools=tools)


def test_what_a_generation_block_sets_stays_in_it():
    source = "{% set x = 'a' %}{% generation %}{% set x = 'b' %}{{ x }}{% endgeneration %}{{ x }}"
    assert rendered(source) == "ba"  # as transformers has it
    source = "{% for m in messages %}{% generation %}{{ loop.index }}{{ m.role }}{% break %}"
    assert rendered(source + "{% endgeneration %}{% endfor %}.", USER * 2) == "1user."


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ raise_exception('no system role') }}", "line 2 of the template: no system role"),
        ("a\n\n{{ 'a' + 1 }}", "line 3 of the template: TypeError: can only concatenate"),
        ("{{ 1 / 0 }}", "line 1 of the template: ZeroDivisionError"),
        ("a\n{{ messages[0].tool_calls | length > 0 and 1 // 0 }}\n{{ none | length }}", "line 3"),
        ("{{ {}['a'].b }}", "line 1 of the template: .* has no attribute 'a'"),
        ("a\n{% include 'x' %}", "line 2 of the template: TypeError"),
        ("a\n{% break %}", "line 2 of the template: break outside of a loop"),
        ("a\n{% continue %}", "line 2 of the template: continue outside of a loop"),
        ("a\nb\n{% if %}", "line 3 of the template: Expected an expression"),
        ("a\n{{ x | no_such_filter }}", "line 2 of the template: No filter named"),
        ("{% macro m() %}\n{{ m() }}\n{% endmacro %}{{ m() }}", "line 2 .*: RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ range(10**9) | list }}", "line 1 of the template: OverflowError"),
        ("{{ messages[0].content.encode('nope') }}", "line 1 of the template: LookupError"),
        ("{{ namespace(a=1) | tojson }}", "line 1 of the template: a namespace cannot become"),
    ],
)
def test_every_error_of_a_template_is_a_value_error_with_its_line(source, message):
    with pytest.raises(ValueError, match=f"the chat template failed on these messages.*{message}"):
        rendered(source)


# --- bounds -----------------------------------------------------------------------------------

# The bounds are lowered here, so that no template below is one that harms other software.


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in [1] %}{% endfor %}",
        "{% macro m() %}{% endmacro %}{{ m() }}",
        "{{ messages[0].content.upper() }}",
        "{{ messages[0].content | upper }}",
        "{{ messages | map('upper') | list }}",
        "{{ 1 + 1 }}",
        "{{ 'a' ~ 1 }}",
    ],
)
def test_every_loop_call_filter_and_sum_is_a_step_that_time_can_end(monkeypatch, source):
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", -1.0)
    assert rendered("{{ messages[0].content }}") == "Hi"
    with pytest.raises(ValueError, match=r"line 1 .* seconds of computing"):
        rendered(source)


DOUBLED = "{% set a = [1] %}" + "{% set a = [a, a] %}" * 9
TOO_LONG = {
    "loop": "{% for i in range(99) %}" + "x" * 99 + "{% endfor %}",
    "loop in a set block": "{% set x %}{% for i in range(99) %}" + "x" * 99 + "{% endfor %}"
    "{% endset %}",
    "times": "{% set x = 'a' * 1001 %}",
    "times, the other way": "{% set x = 1001 * 'a' %}",
    "times a list": "{% set x = [1] * 1001 %}",
    "sums": "{% set n = namespace(x='a') %}{% for i in range(10) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "joints": "{% set n = namespace(x='a') %}{% for i in range(10) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "set blocks": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 10,
    "lists as text": DOUBLED + "{% set x %}{{ a }}{% endset %}",
    "lists as JSON": DOUBLED + "{% set x = a | tojson %}",
    "lists joined": DOUBLED + "{% set x = '' ~ a %}",
    "filter's width": "{% set x = 'a' | center(1001) %}",
    "method's width": "{% set x = 'a'.center(1001) %}",
    "indent": "{% set x = 'a\\nb' | indent(1001) %}",
    "format's width": "{% set x = '%1001d' % 1 %}",
    "format's width apart": "{% set x = '%*d' % (1001, 1) %}",
    "str.format's width": "{% set x = '{:1001}'.format(1) %}",
    "str.format's width apart": "{% set x = '{:{}}'.format(1, 1001) %}",
    "replace": "{% set x = 'a' * 99 %}{% set x = x.replace('a', x) %}",
    "filter replace": "{% set x = 'a' * 99 %}{% set x = x | replace('a', x) %}",
    "join": "{% set x = ('a' * 99).join(range(99) | map('string') | list) %}",
    "filter join": "{% set x = range(99) | map('string') | list | join('a' * 99) %}",
    "join of what is made": "{% set x = ('a' * 99).join(range(99) | map('string')) %}",
    "filter join of what is made": "{% set x = range(99) | map('string') | join('a' * 99) %}",
    "list": "{% set x = ('a' * 200) | list %}",
    "round": "{% set x = 5 | round(-1001) %}",
    "bytes": "{% set x = (5).to_bytes(1001, 'big') %}",
    "JSON's indent": "{% set x = [1] | tojson(indent=1001) %}",
    "batch": "{% set x = [1] | batch(1001, 'x') | list %}",
}


@pytest.mark.parametrize("name", TOO_LONG)
def test_templates_that_make_too_much_text_are_stopped(monkeypatch, name):
    monkeypatch.setattr(chat_template, "_MAX_TEXT", 1000)
    with pytest.raises(ValueError, match=r"it makes more text than 1000 characters"):
        rendered(TOO_LONG[name])


def test_what_would_be_too_long_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_TEXT", 1000)
    sizes = []
    monkeypatch.setattr(chat_template._Bounds, "grow", lambda self, size: sizes.append(size))
    with pytest.raises(ValueError, match="it makes more text"):
        rendered("{% set x = 'a'.center(1001) %}")
    assert sizes == []


@pytest.mark.parametrize("source", ["{{ 10 ** 31 }}", "{{ 10**20 * 10**20 }}"])
def test_templates_that_make_too_large_numbers_are_stopped(monkeypatch, source):
    monkeypatch.setattr(chat_template, "_MAX_BITS", 100)
    with pytest.raises(ValueError, match="it makes a number of more than 100 bits"):
        rendered(source)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # What looks like a width and is none.
        ("{{ 1700000000000 | string }} {{ {'id': 1700000000000} | tojson }}", "1700000000000 {"),
        ("{{ '%d' % 1700000000000 }} {{ '{}'.format(1700000000000) }}", "1700000000000 170"),
        ("{{ messages[0].content | replace('a', 'bb') | length }}", "8000000"),
        ("{{ messages[0].content.replace('a', '') | length }}", "0"),
        ("{{ ('%s' % messages[0].content) | length }}", "4000000"),
        ("{{ (messages | tojson(indent=4)) | length }}", "40000"),
        ("{% for m in messages %}{{ (m.role + m.content) | trim | length }}{% endfor %}", "400"),
        ("{{ [1, 2] | join(', ') }}|{{ 'a' | center(3) }}|{{ 'é' * 3 }}", "1, 2| a |ééé"),
        ("{% for i in range(4) if i is odd %}{{ i }}{{ loop.last }}{% endfor %}", "1False3True"),
    ],
)
def test_long_conversations_stay_within_the_bounds(source, expected):
    messages = [{"role": "user", "content": "a" * 4_000_000}]
    assert rendered(source, messages).startswith(expected)


def test_a_conversation_of_many_messages_stays_within_the_bounds():
    source = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}last{% endif %}"
        "{{ '<' + m.role + '>' ~ m.content }}{% endfor %}"
    )
    text = rendered(source, [{"role": "user", "content": "x" * 1000}] * 3000)
    assert len(text) == 3000 * 1006 + 4
