"""The real default models against Hugging Face's answers (tests/data/golden).

The goldens were computed by transformers in float32 from the GGUF weights rounded to bfloat16, so
the tests load in bfloat16 and compute in float32.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from budgets import budgets_of
from oracle_model import Oracle

import convert
import lserve_jax
from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.attention.attend import ChunkRows, prefill_attend
from lserve_jax.attention.cache import init_layer_cache, make_spec
from lserve_jax.model.bound import bind

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
LONG = "smollm2-135m-instruct-32k"


def golden(name: str) -> tuple[dict, dict]:
    directory = GOLDEN / name
    return json.loads((directory / "golden.json").read_text()), dict(
        np.load(directory / "golden.npz")
    )


@pytest.fixture(scope="module")
def base(smollm2):
    """Weights rounded to bfloat16, in float32 arithmetic."""
    config, params = convert.load(smollm2, dtype=jnp.bfloat16)
    return config, jax.tree.map(lambda x: x.astype(jnp.float32), params)


@pytest.fixture(scope="module")
def long_context(smollm2, tmp_path_factory):
    """The 32K model: the adapter merged in float32 into weights rounded to bfloat16."""
    rounded = tmp_path_factory.mktemp("rounded") / "checkpoint"
    convert.save(rounded, *convert.load(smollm2, dtype=jnp.bfloat16))
    source = convert.resolve(LONG)
    return convert.load(
        rounded, dtype=jnp.float32, adapter=source.adapter, overrides=source.overrides
    )


@pytest.fixture(scope="module")
def first_layers(base):
    """Four of its thirty layers, which take as much less to compile, for what holds of any model.

    What they say is no English.
    """
    config, params = base
    config = dataclasses.replace(config, num_hidden_layers=4)
    return config, params | {"layers": {i: params["layers"][i] for i in range(4)}}


def text_logits(config, params, ids) -> np.ndarray:
    score = jax.jit(lserve_jax.logits, static_argnums=0)
    return np.asarray(score(config, params, jnp.asarray(ids)[None])[0])


def negative_log_likelihood(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """In float64, a row at a time: such a copy of all of them would be gigabytes."""

    def of_row(row: np.ndarray, token: int) -> float:
        shifted = row.astype(np.float64) - row.max()
        return np.log(np.exp(shifted).sum()) - shifted[token]

    return np.array([of_row(row, token) for row, token in zip(logits, ids[1:], strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length", "num_places"),
    [("smollm2-135m-instruct", 1024, 6), (LONG, 512, 5)],  # the needle lies far beyond
)
def test_logits_are_those_of_transformers(name, length, num_places, request):
    """Of every token of the text the probability, of some places the twenty likeliest tokens."""
    config, params = request.getfixturevalue("long_context" if name == LONG else "base")
    _, arrays = golden(name)
    text = arrays["text_ids"][:length]
    logits = text_logits(config, params, text)
    nll = negative_log_likelihood(logits[:-1], text)
    # Two float32 implementations of 30 layers; logits reach 30.
    np.testing.assert_allclose(nll, arrays["text_nll"][: len(nll)], atol=2e-3)
    places = arrays["pos"][arrays["pos"] < len(text)]
    assert len(places) == num_places
    for row, ids, values in zip(
        logits[places], arrays["top_ids"], arrays["top_logits"], strict=False
    ):
        assert set(np.argsort(-row)[: len(ids)]) == set(ids)
        np.testing.assert_allclose(row[ids], values, atol=2e-3)


# Everything fits the budget, so lserve must give dense attention's tokens.
UNPRUNED = SparsityConfig(page_size=16, token_budget=1024)


def build(model, attention="dense", **settings) -> LLM:
    """Two slots, and two rows at a time, for all tests: thirty layers take long to compile."""
    return LLM(
        model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2,
        attention=attention,
        sparsity=UNPRUNED if attention == "lserve" else None,
        **settings,
    )


@pytest.mark.slow
def test_greedy_chats_of_lserve_are_those_of_transformers(base):
    expected, _ = golden("smollm2-135m-instruct")
    llm = build(base, "lserve", relay="never", deterministic=True)
    prompts = [{"prompt_token_ids": chat["prompt_ids"]} for chat in expected["chats"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64))
    for output, chat in zip(outputs, expected["chats"], strict=True):
        assert output.outputs[0].token_ids == chat["greedy_ids"]
        assert output.outputs[0].finish_reason == "stop"


def rounded_to_int8(params: dict) -> dict:
    """The numbers that int8 codes stand for, by NumPy: every kernel, a scale for each output."""

    def leaf(path, x) -> np.ndarray:
        x = np.asarray(x)
        if path[-1].key != "kernel":
            return x
        scale = np.abs(x).max(axis=0) / np.float32(127)
        return np.round(x / scale) * scale.astype(np.float64)

    return jax.tree.map_with_path(leaf, params)


@pytest.mark.slow
def test_int8_greedy_chats_are_those_of_the_rounded_model(base):
    """Also those of bfloat16 weights. In one of them every token is the likeliest by float64, up to
    ties: or as likely within float32's errors."""
    expected, _ = golden("smollm2-135m-instruct")
    _, params = base
    llm = build(base, relay="never", deterministic=True, weights="int8")
    assert "lm_head" in llm.engine.params  # on a CPU: the output layer is rounded too
    config = dataclasses.replace(llm.config, tie_word_embeddings=False)
    head = {"kernel": params["embed_tokens"]["embedding"].T}
    rounded = rounded_to_int8(params | {"lm_head": head})
    prompts = [{"prompt_token_ids": chat["prompt_ids"]} for chat in expected["chats"]]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=64))
    for output, chat in zip(outputs, expected["chats"], strict=True):
        assert output.outputs[0].token_ids == chat["greedy_ids"]
    prompt, tokens = expected["chats"][1]["prompt_ids"], outputs[1].outputs[0].token_ids
    logits = Oracle(config, rounded).prefill([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    given_up = logits.max(axis=1) - logits[np.arange(len(tokens)), tokens]
    # As above: 30 layers in float32. The closest two likeliest are 6e-3 apart.
    assert given_up.max() < 2e-3


SYSTEM = (
    "You are a helpful assistant of a small museum of natural history. Visitors ask you about the "
    "exhibits, the opening hours and the world. Answer in one or two sentences, politely and to "
    "the point, and never make anything up. The museum is open from nine to five, except on "
    "Mondays. It shows fossils, minerals and a collection of beetles from five continents. "
)


@pytest.mark.slow
def test_a_shared_prefix_changes_no_token(smollm2, first_layers):
    """A system prompt computed once and read together, cold, remembered and held."""
    tokenizer = convert.load_tokenizer(convert.resolve(smollm2).path)
    llm = build(first_layers, "lserve", relay="always", tokenizer=tokenizer)
    questions = ("When are you open?", "What is the capital of France?")
    chats = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        for question in questions
    ]
    sampling = SamplingParams(temperature=0, max_tokens=16)

    def tokens(shared_prefix=None) -> list[list[int]]:
        outputs = llm.chat(chats, sampling, shared_prefix=shared_prefix)
        assert all(output.num_cached_tokens >= 64 for output in outputs)
        return [output.outputs[0].token_ids for output in outputs]

    alone = []
    for chat in chats:
        [output] = llm.chat(chat, sampling)
        assert output.num_cached_tokens == 0
        alone.append(output.outputs[0].token_ids)
        llm.reset_prefix_cache()
    [output] = llm.chat(chats[0], SamplingParams(max_tokens=1))
    assert tokens() == alone
    llm.reset_prefix_cache()
    prefix = llm.prefix({"prompt_token_ids": output.prompt_token_ids[:80]})
    assert tokens(prefix) == alone


def test_chat_template_and_text(smollm2):
    """From words to words, with the file's own tokenizer and template, and dense attention."""
    expected, _ = golden("smollm2-135m-instruct")
    llm = LLM(smollm2, max_model_len=512, max_num_seqs=2, relay="never", deterministic=True)
    pieces = [""] * len(expected["chats"])

    def collect(request: int, completion: int, text: str) -> None:
        pieces[request] += text

    outputs = llm.chat(
        [[{"role": "user", "content": chat["user"]}] for chat in expected["chats"]],
        SamplingParams(temperature=0, max_tokens=64),
        on_text=collect,
    )
    for output, chat, streamed in zip(outputs, expected["chats"], pieces, strict=True):
        assert output.prompt_token_ids == chat["prompt_ids"]
        assert output.outputs[0].token_ids == chat["greedy_ids"]
        assert output.outputs[0].finish_reason == "stop"
        assert output.outputs[0].text == chat["greedy_text"].removesuffix("<|im_end|>")
        assert streamed == output.outputs[0].text


@pytest.mark.slow
def test_needle_is_found(long_context, optimised):
    """3,644 tokens, prefilled in chunks; the answer is the golden one, token by token."""
    expected, _ = golden(LONG)
    llm = LLM(long_context, dtype="float32", max_model_len=4096, prefill_chunk_size=1024)
    prompt = {"prompt_token_ids": expected["needle"]["prompt_ids"]}
    output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=32))[0]
    assert output.outputs[0].token_ids == expected["needle"]["greedy_ids"]


def cached_perplexity(config, params, ids, kv_dtype, chunk=16) -> float:
    """Perplexity when all but the last ``chunk`` keys are read back from a cache of codes."""
    spec = make_spec(
        config,
        sparsity=None,
        heads=budgets_of((config.num_key_value_heads,) * config.num_hidden_layers, None),
        max_model_len=len(ids),
        max_num_seqs=1,
        num_pages=-(-len(ids) // 64),
        max_prefixes=0,
        kv_dtype=kv_dtype,
    )
    caches = [
        init_layer_cache(config, spec, layer, jnp.float32)
        for layer in range(config.num_hidden_layers)
    ]
    page_table = jnp.arange(spec.num_pages)[::-1]

    @jax.jit
    def step(params, caches, tokens, start):
        attend = prefill_attend(
            config,
            spec,
            ChunkRows(
                page_table=page_table[None],
                window_table=jnp.full_like(page_table, -1)[None],  # no head streams
                start=start[None],
                length=jnp.array([chunk]),
                prompt_length=jnp.array([len(ids)]),
                whole_from=jnp.array([0]),
            ),
            chunk,
            backend="reference",
        )
        model = bind(config, params)
        hidden, caches = model(tokens[None], attend, caches)
        return model.unembed(hidden[0]), caches

    logits = []
    for start in range(0, len(ids), chunk):
        tokens = jnp.asarray(ids[start : start + chunk])
        new, caches = step(params, caches, tokens, jnp.int32(start))
        logits.append(np.asarray(new))
    return np.exp(negative_log_likelihood(np.concatenate(logits)[:-1], ids).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("kv_dtype", "most"), [("int8", 0.01), ("int4", 0.03)])
def test_a_cache_of_codes_keeps_perplexity(base, kv_dtype, most, optimised):
    _, arrays = golden("smollm2-135m-instruct")
    ids = arrays["text_ids"][:512]
    plain = np.exp(arrays["text_nll"][:511].mean())
    assert cached_perplexity(*base, ids, kv_dtype) == pytest.approx(plain, rel=most)
