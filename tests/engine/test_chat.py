"""Conversations as prompts: a new answer, or a last message that the model goes on with."""

import pytest
import tokenizers
from tiny_llm import VOCAB, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams
from lserve_jax.tokenizer import Tokenizer

CONFIG = tiny_config(layers=1, kv_heads=1)
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPPING = CHATML.replace("m.content", "m.content | trim")  # Llama 3's template does
NO_ANSWERS = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
QUESTION = {"role": "user", "content": "2+2?"}


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """A token for each printable character."""
    characters = {chr(32 + i): i for i in range(VOCAB - 1)} | {"\n": VOCAB - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=characters, merges=[]))
    backend.decoder = tokenizers.decoders.Fuse()
    return backend


def with_template(backend: tokenizers.Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=template)


def answer(content: str) -> list[dict[str, str]]:
    return [QUESTION, {"role": "assistant", "content": content}]


HEAD = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [  # what transformers 5.24 makes of them
        (CHATML, "It is", f"{HEAD}It is"),
        (CHATML, "It is ", f"{HEAD}It is "),
        (CHATML, "", HEAD),
        (CHATML, "2+2?", f"{HEAD}2+2?"),  # a text that stands in the question too
        (STRIPPING, "It is ", f"{HEAD}It is"),
        (STRIPPING, " It is", f"{HEAD}It is"),
    ],
)
def test_the_last_message_is_left_open(backend, template, content, expected) -> None:
    tokenizer = with_template(backend, template)
    messages = answer(content)
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert text == expected
    assert messages == answer(content)


def test_what_cannot_be_continued(backend) -> None:
    tokenizer = with_template(backend, CHATML)
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        tokenizer.apply_chat_template(answer("It is"), continue_final_message=True)
    tokenizer = with_template(backend, NO_ANSWERS)
    with pytest.raises(ValueError, match=r"does not show the last message as it is.*'It is'"):
        tokenizer.apply_chat_template(answer("It is"), False, True)
    tokenizer = with_template(backend, CHATML + "{{ messages[-1].content }}")
    with pytest.raises(ValueError, match=r"shows the last message 2 times, so .*'It is'"):
        tokenizer.apply_chat_template(answer("It is"), False, True)


def test_chat_goes_on_with_an_answer(backend) -> None:
    llm = LLM(
        (CONFIG, tiny_params(CONFIG)),
        tokenizer=with_template(backend, CHATML),
        max_model_len=256,
        max_num_seqs=2,
    )
    outputs = llm.chat(
        [answer("It is"), answer("Four")],
        GREEDY,
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert [output.prompt for output in outputs] == [f"{HEAD}It is", f"{HEAD}Four"]
    for output in outputs:
        [same] = llm.generate(output.prompt, GREEDY)
        assert output.outputs[0].text == same.outputs[0].text
    [closed] = llm.chat(answer("It is"), GREEDY, add_generation_prompt=False)
    assert closed.prompt == f"{HEAD}It is<|im_end|>\n"
    [opened] = llm.chat(answer("It is"), GREEDY)
    assert opened.prompt == f"{HEAD}It is<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        llm.chat(answer("It is"), GREEDY, continue_final_message=True)
