"""Chat templates: tool calls, errors with their line, and templates that would never end."""

import pytest
import tokenizers

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

DOUBLED = "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60
ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}"
    "{{ m(99) }}",
}
TOO_LONG = {
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}" + "x" * 9999 + "{% endfor %}"
    "{% endfor %}",
    "loop in a set block": "{% set x %}{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}"
    "{% endset %}",
    "times": "{{ 'a' * 10**10 }}",
    "times, the other way": "{{ 10**10 * 'a' }}",
    "times a list": "{{ [1] * 10**10 }}",
    "sums": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}",
    "joints": "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}",
    "set blocks": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "lists as text": DOUBLED + "{{ a }}",
    "lists as JSON": DOUBLED + "{{ a | tojson }}",
    "lists joined": DOUBLED + "{{ '' ~ a }}",
    "filter's width": "{{ 'a' | center(10**10) }}",
    "method's width": "{{ 'a'.center(10**10) }}",
    "indent": "{{ 'a\\nb' | indent(10**10) }}",
    "format's width": "{{ '%9999999999d' % 1 }}",
    "format's width apart": "{{ '%*d' % (10**10, 1) }}",
    "str.format's width": "{{ '{:9999999999}'.format(1) }}",
    "str.format's width apart": "{{ '{:{}}'.format(1, 10**10) }}",
    "replace": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "filter replace": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) }}",
    "join": "{% set x = 'a' * 99999 %}{{ x.join(range(99999) | map('string') | list) }}",
    "JSON's indent": "{{ messages | tojson(indent=10**10) }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_templates_that_never_end_are_stopped(name):
    with pytest.raises(ValueError, match=r"line 1 .* more than 3 seconds of computing"):
        rendered(ENDLESS[name])


@pytest.mark.parametrize("name", TOO_LONG)
def test_templates_that_make_endless_text_are_stopped(name):
    with pytest.raises(ValueError, match="it makes more text than 100000000 characters"):
        rendered(TOO_LONG[name])


@pytest.mark.parametrize("source", ["{{ 10 ** (10 ** 10) }}", "{{ 10**4000 * 10**4000 }}"])
def test_templates_that_make_endless_numbers_are_stopped(source):
    with pytest.raises(ValueError, match="it makes a number of more than 20000 bits"):
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
