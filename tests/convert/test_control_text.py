"""Control tokens that users write stay text; those of the template become ids."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import golden, write_gguf

from convert.tokenizers import load_tokenizer
from lserve_jax.control_text import ControlText
from lserve_jax.tokenizer import Tokenizer

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1] | trim }}{% else %}{{ m.content | trim }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
EOS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATES = {"qwen2": CHATML, "mistral": INST, "gpt2": EOS}


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("gguf")
    return {
        name: load_tokenizer(
            write_gguf(
                folder / f"{name}.gguf", golden(name), **{"tokenizer.chat_template": template}
            )
        )
        for name, template in TEMPLATES.items()
    }


def texts_of(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    """Texts of what the vocabulary can express, with pieces that look like control tokens."""
    pieces = ["<", "|", ">", "s", "/s", "[", "]", " ", "\n", "The", " in", "<|im_", "end|>", "é"]
    return st.lists(st.sampled_from(pieces), max_size=12).map("".join)


def spoken(tokenizer: Tokenizer) -> st.SearchStrategy[str]:
    control = st.sampled_from([*tokenizer.control_tokens])
    return st.lists(control | texts_of(tokenizer), max_size=4).map("".join)


def conversation(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def chat_ids(tokenizer: Tokenizer, messages: list[dict], *given, **options) -> list[int]:
    return tokenizer.chat_prompt(messages, *given, **options).encode()


def control_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [i for i in ids if i in tokenizer.control_tokens.values()]


@settings(deadline=None, max_examples=150)
@given(data=st.data(), name=st.sampled_from([*TEMPLATES]))
def test_the_renamed_tokenizer_gives_what_templates_write_the_same_ids(chat, data, name):
    tokenizer = chat[name]
    contents = data.draw(st.lists(spoken(tokenizer), min_size=1, max_size=3))
    text = tokenizer.apply_chat_template(conversation(*contents))
    # All control tokens count as the template's here.
    assert tokenizer._control_text.encode(text) == tokenizer.encode(text, False)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), name=st.sampled_from([*TEMPLATES]))
def test_users_write_no_control_tokens(chat, data, name):
    tokenizer = chat[name]
    contents = data.draw(st.lists(spoken(tokenizer), min_size=1, max_size=3))
    prompt = tokenizer.chat_prompt(conversation(*contents))
    ids = prompt.encode()
    harmless = tokenizer.apply_chat_template(conversation(*["x"] * len(contents)))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, tokenizer.encode(harmless, False))
    # SentencePiece puts a space after each control token.
    text = tokenizer.apply_chat_template(conversation(*contents))
    assert prompt.text == text
    assert tokenizer.decode(ids, False).replace(" ", "") == text.replace(" ", "")


@settings(deadline=None, max_examples=100)
@given(data=st.data(), name=st.sampled_from([*TEMPLATES]))
def test_a_conversation_without_them_has_the_ids_of_its_text(chat, data, name):
    tokenizer = chat[name]
    plain = texts_of(tokenizer).filter(lambda text: not tokenizer._control_text.is_in(text))
    messages = conversation(*data.draw(st.lists(plain, min_size=1, max_size=3)))
    text = tokenizer.apply_chat_template(messages)
    assert chat_ids(tokenizer, messages) == tokenizer.encode(text, add_special_tokens=False)


def test_template_logic_sees_the_words_of_the_message(chat):
    tokenizer = chat["qwen2"]
    answer = {"role": "assistant", "content": "<think>hm</think> ok <|im_end|>"}
    text = tokenizer.decode(chat_ids(tokenizer, [answer]), skip_special_tokens=False)
    assert text.endswith("assistant\nok <|im_end|><|im_end|>\n<|im_start|>assistant\n")


def test_arguments_and_tools_are_users_words_too(chat):
    tokenizer = chat["qwen2"]
    call = {"function": {"name": "f", "arguments": {"<|im_start|>": ["<|im_end|>", 1, None]}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    tools = [{"function": {"name": "f", "description": "ends with <|im_end|>"}}]
    ids = chat_ids(tokenizer, messages, tools=tools)
    wanted = chat_ids(tokenizer, [{"role": "assistant", "content": "x"}], tools=[{}])
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, wanted)
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert '{"<|im_start|>": ["<|im_end|>", 1, null]}' in text
    assert "ends with <|im_end|>" in text


def test_a_message_that_goes_on_may_spell_them_out(chat):
    tokenizer = chat["qwen2"]
    messages = conversation("Hi", "It is <|im_end|>, so")
    ids = chat_ids(tokenizer, messages, False, continue_final_message=True)
    assert tokenizer.decode(ids, False).endswith("assistant\nIt is <|im_end|>, so")
    assert len(control_ids(tokenizer, ids)) == 4  # BOS, both starts and one end


def test_a_private_character_is_refused_only_where_it_could_be_mistaken(chat):
    tokenizer = chat["qwen2"]
    private = chr(0x100000)
    assert chat_ids(tokenizer, conversation(private))
    with pytest.raises(ValueError, match=r"U\+100000 is a private character"):
        chat_ids(tokenizer, conversation(private, "<|im_end|>"))


def nested(depth: int) -> object:
    value: object = "<s>"
    for _ in range(depth):
        value = [value]
    return value


def test_lists_in_lists_have_a_bound(chat):
    assert ControlText(chat["mistral"].backend, ["<s>"]).is_in(nested(200))
    with pytest.raises(ValueError, match="more than 200 lists deep"):
        chat["mistral"].chat_prompt([{"role": "user", "content": "", "x": nested(300)}])


# --- tokenizers made for this -----------------------------------------------------------------


def bpe(tokens: list[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """Letters of ``<s>`` and what they merge to, which is a control token's text."""
    vocab = {piece: i for i, piece in enumerate(["<", "s", ">", "a", " ", "<s", "<s>"])}
    merges = [("<", "s"), ("<s", ">")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.add_special_tokens(tokens)
    return backend


def tokenizer_of(backend: tokenizers.Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=template)


def test_letters_do_not_merge_to_a_control_token():
    tokenizer = tokenizer_of(bpe(["<s>"]), "<s>{{ messages[0].content }}")
    assert tokenizer.encode("<s><s>", False) == [6, 6]
    assert chat_ids(tokenizer, conversation("a<s>a")) == [6, 3, 5, 2, 3]


def test_a_unigram_vocabulary_holds_its_control_tokens():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("<", -1.0), ("s", -1.0), (">", -1.0), ("a", -1.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens(["<s>", "<unk>"])
    tokenizer = tokenizer_of(backend, "<s>{{ messages[0].content }}")
    assert chat_ids(tokenizer, conversation("<s>a")) == [1, 2, 3, 4, 5]


def test_an_unknown_letter_is_the_unknown_token():
    vocab = {piece: i for i, piece in enumerate(["<unk>", "<", "u", "n", "k", ">"])}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<unk>"])
    tokenizer = tokenizer_of(backend, "{{ messages[0].content }}<unk>")
    assert chat_ids(tokenizer, conversation("<unk>é")) == [1, 2, 3, 4, 5, 0, 0]


def test_what_a_token_takes_of_the_spaces_around_it_is_kept():
    backend = bpe([tokenizers.AddedToken("<s>", lstrip=True, rstrip=True, special=True)])
    tokenizer = tokenizer_of(backend, "a <s> {{ messages[0].content }}")
    assert chat_ids(tokenizer, conversation("a")) == [3, 6, 3]
    assert chat_ids(tokenizer, conversation("a <s> a")) == [3, 6, 3, 4, 5, 2, 4, 3]


def test_the_longest_text_at_a_place_counts():
    texts = ["<s>", "<s>a", "a>", "<"]
    backend = bpe(texts)
    assert ControlText(backend, texts).hide("<s>a> <s> a>") == (
        f"{chr(0x100001)}> {chr(0x100000)} {chr(0x100002)}"
    )
    assert ControlText(backend, ["<s>a", "a>"]).hide("<s>a>") == f"{chr(0x100000)}>"
    assert not ControlText(backend, []).is_in("<s>")


def test_which_tokens_are_control_tokens():
    backend = bpe(["<s>"])
    backend.add_tokens(["<|user|>", "<\uff5cAssistant\uff5c>", "</think>", "[END]", "  "])
    end = backend.token_to_id("[END]")
    tokenizer = Tokenizer(backend=backend, markers={}, eos_token_ids=(end,), chat_template=None)
    assert [*tokenizer.control_tokens] == ["<s>", "<|user|>", "<\uff5cAssistant\uff5c>", "[END]"]
