"""SmolLM2 on a Hopper GPU: the engine on the kernels answers as on the reference ops, both in bf16.

Greedy answers to the golden prompts, token by token. Where the two differ, the first token that
does must have been as good as a tie: bf16 activations of 30 layers leave 8 bits of a logit near 30.
"""

import json
from pathlib import Path

import pytest

from lserve_jax import LLM, CompletionOutput, SamplingParams, SparsityConfig

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
MODELS = ("smollm2-135m-instruct", "smollm2-135m-instruct-32k")
# 3,644 tokens of prompt with a budget of 1024: pages are left out.
PRUNED = SparsityConfig(page_size=16, token_budget=1024)
TIE = 0.25  # of a log-probability


def prompts(model: str) -> list[dict[str, list[int]]]:
    golden = json.loads((GOLDEN / model / "golden.json").read_text())
    cases = golden["chats"] if "chats" in golden else [golden["needle"]]
    return [{"prompt_token_ids": case["prompt_ids"]} for case in cases]


def assert_same_up_to_ties(
    expected_answers: list[CompletionOutput], answers: list[CompletionOutput]
) -> None:
    """The same tokens, as far as the first that was as good as a tie."""
    for expected, made in zip(expected_answers, answers, strict=True):
        pairs = zip(expected.token_ids, made.token_ids, strict=False)
        differ = [i for i, (a, b) in enumerate(pairs) if a != b]
        if differ:
            likely = expected.logprobs[differ[0]]
            rival = likely.get(made.token_ids[differ[0]], float("-inf"))
            assert max(likely.values()) - rival < TIE, differ[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sparsity", [None, PRUNED], ids=["dense", "lserve"])
def test_kernels_answer_as_the_reference(model: str, sparsity: SparsityConfig | None) -> None:
    answers = []
    for backend in ("reference", "mosaic"):
        llm = LLM(
            model,
            dtype="bfloat16",
            max_model_len=4096,
            max_num_seqs=4,
            kv_cache_bytes=1 << 30,
            attention="dense" if sparsity is None else "lserve",
            sparsity=sparsity,
            prefill_chunk_size=1024,
            backend=backend,
        )
        sampling = SamplingParams(temperature=0, max_tokens=48, logprobs=5)
        outputs = llm.generate(prompts(model), sampling)
        answers.append([output.outputs[0] for output in outputs])
    assert_same_up_to_ties(*answers)


SYSTEM = "You are a helpful assistant. " * 40  # some 200 tokens


@pytest.mark.parametrize("sparsity", [None, PRUNED], ids=["dense", "lserve"])
def test_a_prefix_read_together(sparsity: SparsityConfig | None) -> None:
    """Eight requests with one system prompt: relay on the kernels, and on the reference ops."""
    answers = []
    for backend in ("reference", "mosaic"):
        llm = LLM(
            MODELS[0],
            dtype="bfloat16",
            max_model_len=2048,
            max_num_seqs=8,
            kv_cache_bytes=1 << 30,
            attention="dense" if sparsity is None else "lserve",
            sparsity=sparsity,
            prefill_chunk_size=1024,
            relay="always",
            backend=backend,
        )
        chats = [
            [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"Count to {n}."}]
            for n in range(2, 10)
        ]
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=24, logprobs=5))
        assert all(output.metrics.relay_steps > 0 for output in outputs)
        answers.append([output.outputs[0] for output in outputs])
    assert_same_up_to_ties(*answers)
