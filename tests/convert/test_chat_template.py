"""Chat templates: what they may use, and which messages and templates are refused."""

import pytest
from tokenizer_files import USER

from lserve_jax.tokenizer import Tokenizer


def with_template(tokenizer: Tokenizer, source: str | None) -> Tokenizer:
    return Tokenizer(
        backend=tokenizer.backend,
        markers=tokenizer.markers,
        eos_token_ids=tokenizer.eos_token_ids,
        chat_template=source,
    )


def test_chat_template_of_a_gguf_file(small):
    messages = [*USER, {"role": "assistant", "content": "Ho"}]
    end = "<|im_end|>"
    text = small["qwen2"].apply_chat_template(messages)
    assert text == f"[user] Hi{end}[assistant] Ho{end}[assistant]"
    text = small["qwen2"].apply_chat_template(messages, add_generation_prompt=False)
    assert text == f"[user] Hi{end}[assistant] Ho{end}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "Hi"}]'),
        ("{{ {'a': '<é>'} | tojson(indent=1) }}", '{\n "a": "<é>"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ strftime_now('%%') }}", "%"),
        ("  {% if true %}\n  x\n  {% endif %}\n", "  x\n"),
        ("{{ tools is none and documents is none }}", "True"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("[{{ no_such_name }}]", "[]"),
    ],
)
def test_what_templates_expect(small, source, expected):
    assert with_template(small["gpt2"], source).apply_chat_template(USER) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "chat template failed"),
        ("{{ messages.append(1) }}", "chat template failed"),  # the sandbox: nothing is changed
        ("{{ ''.__class__.__mro__ }}", "chat template failed"),
    ],
)
def test_template_errors_are_value_errors(small, source, message):
    with pytest.raises(ValueError, match=message):
        with_template(small["gpt2"], source).apply_chat_template(USER)


def test_no_chat_template(small):
    tokenizer = with_template(small["gpt2"], None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template(USER)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "Hi",
        {"role": "user", "content": "Hi"},
        ["Hi"],
        [{"role": "user"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": None}],
        [{"role": 1, "content": "Hi"}],
    ],
)
def test_malformed_messages_are_refused(small, messages):
    with pytest.raises(ValueError, match='"role"'):
        small["gpt2"].apply_chat_template(messages)
