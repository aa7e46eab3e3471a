"""The engine under ``LLM``: text, sampling, what a request costs, and settings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from engine_cases import BUDGET, CONFIG, PAGE_BYTES, C, P, build, greedy, oracle, run, tokens_of
from tiny_llm import (
    VOCAB,
    check_nothing_left,
    expected,
    generate,
    random_prompts,
    tiny_params,
)

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.engine import build as engine_build
from lserve_jax.tokenizer import Tokenizer

# Text.


@pytest.fixture
def texting(pattern: str) -> LLM:
    """With a tokenizer that writes token i as the character 33 + i."""
    vocabulary = {chr(33 + i): i for i in range(VOCAB)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    tokenizer = Tokenizer(backend=backend, markers={}, eos_token_ids=(), chat_template=None)
    return build(pattern, tokenizer=tokenizer)


def spell(tokens: list[int]) -> str:
    return "".join(chr(33 + token) for token in tokens)


@pytest.mark.parametrize("include", [False, True])
def test_stop_strings(include: bool, texting: LLM) -> None:
    """Found across tokens and bursts; never shown, not even its beginning; the engine stops too."""
    [prompt] = random_prompts(15, [20])
    neighbour = random_prompts(16, [50])[0]
    [whole, other] = run(texting, [prompt, neighbour], greedy(40))
    text = whole.outputs[0].text
    assert text == spell(tokens_of(whole))
    stop = text[10:13]
    at = text.find(stop)
    sampling = greedy(40, stop=["\u1234", stop], include_stop_str_in_output=include)
    shown: list[tuple[int, int, str]] = []
    stopped, unaware = run(
        texting,
        [prompt, neighbour],
        [sampling, greedy(40)],
        on_text=lambda *new: shown.append(new),
    )
    completion = stopped.outputs[0]
    assert completion.text == (text[: at + 3] if include else text[:at])
    assert completion.token_ids == tokens_of(whole)[: at + 3]
    assert len(completion.logprobs) == at + 3
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert "".join(new for prompt, _, new in shown if prompt == 0) == completion.text
    assert "".join(new for prompt, _, new in shown if prompt == 1) == other.outputs[0].text
    assert tokens_of(unaware) == tokens_of(other)


def test_text_prompts(texting: LLM) -> None:
    [prompt] = random_prompts(17, [20])
    text = spell(prompt)
    by_text = texting.generate(text, greedy(5))[0]
    assert (by_text.prompt, by_text.prompt_token_ids) == (text, prompt)
    assert tokens_of(by_text) == tokens_of(run(texting, [prompt], greedy(5))[0])


@pytest.mark.parametrize("calls", [1, 3, 7])
def test_errors_in_on_text_leave_nothing_behind(calls: int, texting: LLM) -> None:
    """Also when others have just ended in the same burst, or the failing one has."""
    prompts = random_prompts(18, [20, 30, 40, 50, 60, 70])
    seen = []

    def fail(*new: Any) -> None:
        seen.append(new)
        if len(seen) == calls:
            raise KeyError("from on_text")

    with pytest.raises(KeyError, match="from on_text"):
        run(texting, prompts, greedy(4), on_text=fail)
    check_nothing_left(texting.engine)
    outputs = run(texting, prompts, greedy(4))
    for prompt, output in zip(prompts, outputs, strict=True):
        oracle_logprobs = expected(oracle(), prompt, tokens_of(output))
        assert tokens_of(output) == oracle_logprobs.argmax(axis=1).tolist()


# Sampling through the engine; what a row draws is tested in test_sampling.py.


def test_completions_of_one_prompt(llm: LLM) -> None:
    """n completions differ, and come again with the same seed, whoever is beside them."""
    prompt, other = random_prompts(19, [25, 60])
    sampling = SamplingParams(n=3, max_tokens=12, seed=5)
    [output] = run(llm, [prompt], sampling)
    completions = [completion.token_ids for completion in output.outputs]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(tokens) for tokens in completions}) == 3
    assert all(len(tokens) == 12 for tokens in completions)
    crowd = run(llm, [other, prompt], [SamplingParams(max_tokens=9), sampling])
    assert [completion.token_ids for completion in crowd[1].outputs] == completions
    assert output.outputs[0].logprobs is None
    for tokens, completion in zip(completions, output.outputs, strict=True):
        rows = expected(oracle(), prompt, tokens)
        picked = rows[np.arange(12), tokens].sum()
        assert completion.cumulative_logprob == pytest.approx(picked, abs=1e-4)


@pytest.mark.slow
def test_seeds(pattern: str) -> None:
    """Requests without a seed draw from the LLM's, each differently."""
    [prompt] = random_prompts(20, [25])
    sampling = SamplingParams(max_tokens=12)

    def draw(seed: int) -> list[list[int]]:
        llm = build(pattern, seed=seed)
        return [tokens_of(output) for _ in "ab" for output in run(llm, [prompt] * 2, sampling)]

    one, again, other = draw(1), draw(1), draw(2)
    assert one == again
    assert len({tuple(tokens) for tokens in one + other}) == 8


@pytest.mark.slow
def test_penalties_of_one_request_only() -> None:
    """A request with penalties joins one that has none: both as if alone.

    Under dense attention, which compiles fastest: each way to sample is a program.
    """
    llm = LLM((CONFIG, tiny_params(CONFIG)), max_num_seqs=4, deterministic=True, relay="never")
    prompts = random_prompts(21, [25, 40, 30])
    penalty = SamplingParams(temperature=0, max_tokens=15, presence_penalty=2, frequency_penalty=2)
    plain = SamplingParams(temperature=0, max_tokens=15)
    alone = [tokens_of(run(llm, [p], s)[0]) for p, s in zip(prompts, [plain, penalty, plain],
                                                            strict=True)]  # fmt: skip
    together = run(llm, prompts, [plain, penalty, plain])
    assert [tokens_of(output) for output in together] == alone
    assert len(set(alone[1])) == 15  # a penalty of 4 against logits of size 3
    [without] = run(llm, [prompts[1]], plain)
    assert tokens_of(without) != alone[1]


# Numbers.


def test_metrics(llm: LLM) -> None:
    """Selections, bypassed steps and attended pages, counted once more step by step."""
    prompts = random_prompts(22, [5, 40, 48, 49, 100])
    for prompt, output in zip(prompts, run(llm, prompts, greedy(24)), strict=True):
        metrics, model = output.metrics, oracle()
        model.prefill(prompt)
        attended = selections = bypassed = statistics = 0
        for token in tokens_of(output)[:-1]:
            model.decode(token)
            attended += sum(map(len, model.attended.values()))
            pruned = model.tail > BUDGET // P - 1
            bypassed += not pruned
            if pruned and (model.steps - 1) % C == 0:
                selections += 1
                statistics += -(-model.length // P)
        assert metrics.decode_steps == 23
        assert (metrics.selector_runs, metrics.bypassed_steps) == (selections, bypassed)
        assert metrics.pages_attended_per_step == pytest.approx(attended / 23 / 2 / P)
        token_bytes, page_statistics = 2 * 16 * 4, 2 * 16 * 4
        # Selections of one burst all count the pages that there are at its end.
        read = (attended * token_bytes + statistics * page_statistics) / 23
        assert metrics.kv_bytes_read_per_step == pytest.approx(read, rel=0.01)
        lengths = range(len(prompt) + 1, len(prompt) + 24)
        assert metrics.dense_kv_bytes_read_per_step == pytest.approx(
            sum(lengths) * 2 * token_bytes / 23
        )
        assert metrics.kv_bytes_held == -(-(len(prompt) + 23) // P) * PAGE_BYTES + 4 * P * (
            2 * 16 * 4
        )
        assert 0 < metrics.prefill_seconds <= metrics.first_token_seconds
        assert 0 <= metrics.queue_seconds <= metrics.first_token_seconds


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "sparse"}, "attention='sparse' must be 'dense' or 'lserve'"),
        ({"sparsity": SparsityConfig()}, "needs attention='lserve', got attention='dense'"),
        ({"kv_dtype": "int2"}, "kv_dtype='int2'"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be at least 1"),
        ({"max_model_len": 0}, "max_model_len=0 must be a positive integer"),
        ({"prefill_chunk_size": 96}, "prefill_chunk_size=96 must be a power of two"),
        ({"prefill_chunk_size": 32}, "prefill_chunk_size=32 must be a power of two of at least 64"),
        ({"burst_steps": 0}, "burst_steps=0 must be at least 1"),
        ({"adapter": "somewhere"}, "adapter='somewhere' needs a checkpoint"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_llm_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM((CONFIG, tiny_params(CONFIG)), **settings)


def test_backend_is_checked_before_the_model_is_loaded() -> None:
    with pytest.raises(
        NotImplementedError, match=r"backend='mosaic' needs a Hopper GPU, .* is cpu"
    ):
        LLM("no-such-model", backend="mosaic")
    with pytest.raises(ValueError, match=r"backend='cuda' is unknown; known: .*'auto', 'mosaic'"):
        LLM("no-such-model", backend="cuda")
    assert build(None).engine.runner.backend == "reference"


def test_kernels_are_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper GPU, without one."""
    monkeypatch.setattr(engine_build, "resolve_backend", lambda backend: "mosaic")
    with pytest.raises(NotImplementedError, match="dtype='float32' needs backend='reference'"):
        LLM((CONFIG, tiny_params(CONFIG)), dtype="float32")


@pytest.mark.parametrize(
    ("kv_dtype", "stored", "most"),
    [
        ("auto", "bfloat16", 0.1),
        ("int8", "int8", 0.1),
        ("fp8", "float8_e4m3fn", 0.2),
        ("int4", "uint8", 0.4),
    ],
)
def test_bfloat16(kv_dtype: str, stored: str, most: float, pattern: str) -> None:
    """All arrays are bfloat16 and no step mixes it with float32; the output stays close."""
    llm = build(pattern, dtype="bfloat16", kv_dtype=kv_dtype)
    runner = llm.engine.runner
    cache, params = runner.read_cache(0), runner.params
    dtypes = {x.dtype for x in (cache.prefill_window.k, cache.key_stats, *jax.tree.leaves(params))}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert cache.retrieval.k.dtype == cache.streaming.k.dtype
    assert cache.retrieval.k.dtype == stored
    prompts = random_prompts(23, [20, 100, 64, 47])
    for prompt, made in zip(prompts, generate(llm, prompts, 20), strict=True):
        error = np.abs(made.logprobs - expected(oracle(), prompt, made.tokens))
        # bfloat16 has 8 bits. Where two pages nearly tie the other may be chosen: a quantile.
        assert 1e-3 < np.quantile(error, 0.9) < most
