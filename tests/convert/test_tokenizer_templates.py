"""Chat templates: tool calls, errors with their line, and templates that would never end."""

import re
import subprocess
import sys
import time

import pytest
import tokenizers

from lserve_jax import template_bounds
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
        ("{{ namespace(a=1) }}", "line 1 of the template: a namespace cannot become"),
        ("{{ raise_exception([namespace(a=1)]) }}", "a namespace cannot become"),
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
        "{{ messages == messages }}",
        "{{ 'a' in messages }}",
        "{{ messages is defined }}",
        "{{ messages[1:] }}",
    ],
)
def test_every_loop_call_filter_and_sum_is_a_step_that_time_can_end(monkeypatch, source):
    monkeypatch.setattr(template_bounds, "_MAX_SECONDS", -1.0)
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
    monkeypatch.setattr(template_bounds, "_MAX_TEXT", 1000)
    with pytest.raises(ValueError, match=r"it makes more text than 1000 characters"):
        rendered(TOO_LONG[name])


def test_what_would_be_too_long_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr(template_bounds, "_MAX_TEXT", 1000)
    sizes = []
    monkeypatch.setattr(template_bounds.Bounds, "grow", lambda self, size: sizes.append(size))
    with pytest.raises(ValueError, match="it makes more text"):
        rendered("{% set x = 'a'.center(1001) %}")
    assert sizes == []


# 2 ** 40 items, were they written out; what is compared holds none of the other's lists.
DEEP = "".join(
    "{% set " + x + " = [1] %}" + ("{% set " + x + " = [" + x + ", " + x + "] %}") * 40
    for x in "ab"
)
TUPLES = DEEP.replace("[", "(").replace("]", ")").replace("(1)", "(1,)")
TEXTS = (
    *("e", "escape", "forceescape", "upper", "lower", "trim", "urlencode", "safe", "replace(1, 2)"),
    *(
        "title",
        "striptags",
        "capitalize",
        "xmlattr",
        "string",
        "join",
        "tojson",
        "pprint",
        "center",
    ),
    *("wordcount", "truncate", "indent", "urlize", "format(1)", "int", "float", "filesizeformat"),
)
ENDLESS = {
    **{f"filter {name}": DEEP + "{% set x = a | " + name + " %}" for name in TEXTS},
    **{f"filter {name}": DEEP + "{% set x = [a, b] | " + name + " %}" for name in ("sort", "min")},
    **{f"a {name} b": DEEP + "{% set x = a " + name + " b %}" for name in ("==", "!=", "<", ">=")},
    **{f"is {name}": DEEP + "{% set x = a is " + name + " %}" for name in ("eq b", "in [b]")},
    "a chain": DEEP + "{% set x = 1 < 2 < 3 != a == b %}",
    "in": DEEP + "{% set x = a in [b] %}",
    "not in": DEEP + "{% set x = a not in (b,) %}",
    "in values": DEEP + "{% set x = a in {1: b}.values() %}",
    "text in lists": DEEP + "{% set x = 'a' in a %}",
    "selectattr": DEEP + "{% set x = [{'k': a}] | selectattr('k', 'eq', b) | list %}",
    "select": DEEP + "{% set x = [a] | select('in', [b]) | list %}",
    "what is made": DEEP + "{% set x = [a, b] | map('list') | sort %}",
    "max": DEEP + "{% set x = [a, b] | max %}",
    "groupby": DEEP + "{% set x = [{'k': a}, {'k': b}] | groupby('k') %}",
    "dictsort": DEEP + "{% set x = {1: a, 2: b} | dictsort(by='value') %}",
    "unique": TUPLES + "{% set x = [a, b] | unique | list %}",
    "key": TUPLES + "{% set x = {a: 1} %}",
    "look-up": TUPLES + "{% set x = {}[a] %}",
    "name of what is undefined": DEEP + "{% set x = [][a] + 1 %}",
    "keys without": TUPLES + "{% set x = {1: 2}.keys() - [a] %}",
    "get": TUPLES + "{% set x = {}.get(a) %}",
    "dict": TUPLES + "{% set x = dict([(a, 1)]) %}",
    "index": DEEP + "{% set x = [b].index(a) %}",
    "count": DEEP + "{% set x = [b].count(a) %}",
    "changed": "{% for i in [1, 2] %}" + DEEP + "{% set x = loop.changed(a) %}{% endfor %}",
    "output": DEEP + "{{ a }}",
    "concatenation": DEEP + "{% set x = 'a' ~ a %}",
    "format": DEEP + "{% set x = '%s' % a %}",
    "str.format": DEEP + "{% set x = '{}'.format(a) %}",
    "str.join": DEEP + "{% set x = ' '.join(a) %}",
    "Markup.escape": DEEP + "{% set x = ('' | safe).escape(a) %}",
    "attr": DEEP + "{% set x = 1 | attr(a) %}",
    "exception": DEEP + "{{ raise_exception(a) }}",
    "is lower": DEEP + "{% set x = a is lower %}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_lists_in_lists_without_end_are_stopped(name):
    with pytest.raises(ValueError, match=r"line 1 .* a list of more than 1000000 items, counted"):
        rendered(ENDLESS[name])


def test_a_message_that_holds_itself_is_stopped():
    message = {"role": "user", "content": "Hi"}
    message["self"] = [message]
    assert rendered("{{ messages[0].content }}", [message]) == "Hi"
    for source in ("{{ messages }}", "{{ messages == [messages] }}", "{{ messages | sort }}"):
        with pytest.raises(ValueError, match="a list of more than 1000000 items"):
            rendered(source, [message])


LETTERS = "('ab' * 25000000)"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ('a ' * 9999) | wordwrap(1) }}", "wordwrap is for texts of at most 10000 characters"),
        ("{{ ('<!---->' * 9999) | striptags }}", "striptags is for texts of at most 10000"),
        ("{{ ('<!---->' | safe * 9999).striptags() }}", "striptags is for texts of at most"),
        ("{{ (')' * 9999 ~ 'x)') | urlize }}", "urlize is for texts of at most"),
        ("{{ ('a' * 9999).strip('b' * 9999) }}", "strip is for at most 1000 characters"),
        ("{{ ('a' * 9999) | trim('b' * 9999) }}", "trim is for at most 1000 characters"),
        (
            "{{ (range(50000) | map('string') | join).encode('punycode') }}",
            "encode has no 'punycode' here",
        ),
        ("{{ 'é'.encode('ascii', 'namereplace') }}", "encode has no 'namereplace' here"),
        ("{{ 'a'.encode().decode(encoding='IDNA ') }}", "decode has no 'IDNA ' here"),
        ("{{ strftime_now('%Y' * 9999) }}", "the format of a time has 19998 characters"),
        ("{{ ([[1]] * 100000) | sum(start=[]) | length }}", "it makes more text"),
        ("{{ '%999999999d' is odd }}", "it makes more text"),
        ("{{ '%999999999d' is divisibleby 3 }}", "it makes more text"),
        ("{{ '%999999999d'.encode() % 3 }}", "it makes more text"),
        ("{{ '{:{}}'.format(1, '999999999') }}", "it makes more text"),
        ("{{ '{:{[a]}}'.format(1, {'a': 999999999}) }}", "it makes more text"),
        ("{{ ('{:999}' * 200000).format(1) }}", "it makes more text"),
        ("{{ (('a' * 30000000) | safe).split() }}", "it makes more text"),
        *(
            (f"{{{{ {LETTERS} | {name} | list }}}}", "a list of more than 1000000 items")
            for name in ("map(attribute='x')", "selectattr('x')", "select", "sort", "unique")
        ),
        *(
            (f"{{{{ {LETTERS} | {name} }}}}", "a list of more than 1000000 items")
            for name in ("max", "groupby('x')", "join(attribute='x')")
        ),
        # Python makes a list of all of them before anybody can look: of 50 million a busy machine
        # would take more than its seconds.
        ("{{ namespace(*('ab' * 600000)) }}", "a list of more than 1000000 items"),
        ("{% for c in " + LETTERS + " if c.x %}{% endfor %}", "more than 3 seconds"),
        ("{{ ((range(99999) | list) * 50) | selectattr('x') | list }}", "more than 3 seconds"),
        ("{{ ('a ' * 9999999) | title }}", "title is for texts of at most 10000000 characters"),
        ("{{ ('a ' * 9999999) | pprint }}", "pprint is for texts of at most 10000000 characters"),
        *(
            (f"{{{{ ('a' * 2000000).{name}('ab' + 'a' * 999999) }}}}", f"{name} is for at most")
            for name in ("rfind", "rindex", "rsplit", "rpartition")
        ),
        ("{{ 5 | round(40000000, 'ceil') }}", "a number of more than 20000 bits"),
        ("{{ 5 | round(-40000000) }}", "a number of more than 20000 bits"),
        ("{{ ('f' * 9999) | int(base=16) }}", "a number of more than 20000 bits"),
        (
            "{% set n = namespace(x=[]) %}{% for i in range(200) %}"
            "{% set n.x = [n.x] %}{% endfor %}{{ [n.x, [1] * 900000] | pprint }}",
            "it makes more text",
        ),
        (
            "{% set n = namespace(x=[1] * 900000) %}{% for i in range(200) %}"
            "{% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson(indent=1) }}",
            "it makes more text",
        ),
        (
            "{% set x = 'a' * 9999999 %}{% set n = namespace(x=[]) %}"
            "{% for i in range(99) %}{% set n.x = [n.x, x[1:]] %}{% endfor %}",
            "it makes more text",
        ),
    ],
)
def test_single_steps_that_take_too_long_are_refused(source, message):
    start = time.thread_time()
    with pytest.raises(ValueError, match=message):
        rendered(source)
    assert time.thread_time() - start < 5


NESTED = (
    "{% set n = namespace(x=()) %}{% for i in range(2) %}{% for i in range(90000) %}"
    "{% set n.x = STEP %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (NESTED.replace("STEP", "(n.x,)") + "{{ {n.x: 1} | length }}", "more than 1000 deep"),
        (NESTED.replace("STEP", "n.x | select") + "{{ n.x | first }}", "RecursionError|3 seconds"),
        (NESTED.replace("STEP", "n.x | map('upper')") + "{{ n.y.z }}", "no attribute|3 seconds"),
    ],
)
def test_what_python_cannot_walk_or_free_does_not_end_the_process(source, message):
    script = (
        "from lserve_jax.chat_template import ChatTemplate\n"
        f"ChatTemplate({source!r}).render({{'messages': []}})"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert process.returncode == 1  # a signal's would be negative
    assert re.search(f"ValueError: the chat template failed.*({message})", process.stderr)


def test_lazy_filters_stay_lazy():
    source = "{{ (messages | map('upper')) is iterable }}{% if [] | select %}yes{% endif %}"
    assert rendered(source + "{{ none | map('upper') | list }}") == "Trueyes[]"
    assert rendered("{% for i in range(9) if i is odd %}{{ i }}{{ loop.last }}{% endfor %}") == (
        "1False3False5False7True"
    )


def test_lists_are_walked_once():
    """However often a list of tools is compared, in a conversation of many messages."""
    tools = [{"name": f"f{i}", "parameters": {"a": list(range(50))}} for i in range(500)]
    source = (
        "{% for m in messages %}{% if tools != none and m in messages %}x{% endif %}{% endfor %}"
    )
    assert rendered(source, [dict(USER[0]) for _ in range(1000)], tools=tools) == "x" * 1000


def test_comparisons_mean_what_they_do_in_python():
    source = "{{ 1 < 2 < 3 }} {{ 3 > 2 > 2 }} {{ 'a' in 'abc' == 'abc' }} {{ 1 == 2 < (1 // 0) }}"
    assert rendered(source) == "True False True False"
    source = (
        "{{ {('a', 1): 2}[('a', 1)] }} {{ [1, 2, 3][1:][0] }} {{ [] is eq [] }} {{ 4 is even }}"
    )
    assert rendered(source) == "2 2 True True"


@pytest.mark.parametrize("source", ["{{ 10 ** 31 }}", "{{ 10**20 * 10**20 }}"])
def test_templates_that_make_too_large_numbers_are_stopped(monkeypatch, source):
    monkeypatch.setattr(template_bounds, "_MAX_BITS", 100)
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
