"""Logits that are not finite end their request with an error that says so, and no other request."""

import json
import math

import pytest
from tiny_llm import check_nothing_left, random_prompts, tiny_config, tiny_params

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.batch import PromptFormat, PromptsFile, ResultsFile, run_batch
from lserve_jax.engine.scoring import score

pytestmark = pytest.mark.usefixtures("all_slots")

CONFIG = tiny_config(layers=1, kv_heads=2)
BAD = 95  # the token whose embedding is not finite
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_tokens=12, seed=3, top_k=5, ignore_eos=True)


def build(value: float = math.nan, **options) -> LLM:
    params = tiny_params(CONFIG)
    embedding = params["embed_tokens"]["embedding"]
    params["embed_tokens"]["embedding"] = embedding.at[BAD].set(value)
    options = {"max_num_seqs": 2, "max_model_len": 256, "burst_steps": 4, **options}
    # Both slots at every step: one program for each way to sample.
    return LLM((CONFIG, params), deterministic=True, relay="never", **options)


def good_prompts(count: int) -> list[dict]:
    """Neither they nor their greedy answers have the bad token."""
    prompts = random_prompts(0, [40] * 4 * count)
    prompts = [{"prompt_token_ids": [token % BAD for token in prompt]} for prompt in prompts]
    found = dict(build().stream((prompt, GREEDY) for prompt in prompts))
    good = [prompt for i, prompt in enumerate(prompts) if found[i].error is None]
    assert len(good) >= count
    return good[:count]


def tokens(llm: LLM, prompts: list[dict], sampling: SamplingParams) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, sampling)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_a_prompt_whose_logits_are_not_finite(value: float, sampling: SamplingParams) -> None:
    llm = build(value)
    with pytest.raises(
        FloatingPointError, match=r"prompt 1: .* 3 tokens of prompt and 0 of output are not"
    ):
        llm.generate([*good_prompts(1), {"prompt_token_ids": [1, BAD, 2]}], sampling)
    check_nothing_left(llm.engine)


def bad_draw(llm: LLM, prompt: dict) -> tuple[SamplingParams, int]:
    """With these the model draws the bad token itself, and it has so many tokens then."""
    for seed in range(400):
        sampling = SamplingParams(
            max_tokens=40, seed=seed, temperature=4.0, ignore_eos=True, logprobs=0
        )
        [(_, output)] = llm.stream([(prompt, sampling)])
        made = output.outputs[0].token_ids
        if output.error is not None and len(made) > 2:
            return sampling, len(made)
    raise AssertionError("no seed draws the bad token")


@pytest.mark.parametrize("attention", ["dense", "lserve"])
def test_others_go_on_and_so_does_the_engine(attention: str) -> None:
    """The slot and the pages of the one that failed serve others afterwards."""
    sparsity = SparsityConfig(token_budget=128) if attention == "lserve" else None
    llm = build(attention=attention, sparsity=sparsity)
    prompts = good_prompts(4)
    expected = tokens(llm, prompts, GREEDY)
    drawn, count = bad_draw(llm, prompts[0])
    requests = [(prompts[0], drawn), *((prompt, GREEDY) for prompt in prompts)]
    requests.insert(3, ({"prompt_token_ids": [BAD]}, GREEDY))
    outputs = dict(llm.stream(requests))
    check_nothing_left(llm.engine)
    failed = outputs[0].outputs[0]
    assert (failed.finish_reason, failed.stop_reason) == ("error", None)
    assert failed.token_ids[-1] == BAD and len(failed.token_ids) == count
    assert math.isfinite(failed.cumulative_logprob)
    assert failed.metrics.generated_tokens == count
    assert f"{count} of output are not finite" in outputs[0].error
    assert outputs[3].outputs[0].finish_reason == "error"
    rest = [outputs[position] for position in (1, 2, 4, 5)]
    assert [output.outputs[0].token_ids for output in rest] == expected
    assert all(output.error is None for output in rest)


def test_scores_are_not_made_of_them() -> None:
    llm = build()
    assert score(llm.engine, [[1, 2]], [[3, 4]])
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        score(llm.engine, [[1, 2]], [[BAD, 4]])
    check_nothing_left(llm.engine)


def test_a_batch_file_gets_an_error_and_goes_on(tmp_path, capsys) -> None:
    prompts = [*good_prompts(2), {"prompt_token_ids": [BAD], "id": "bad"}]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    file = PromptsFile(source, GREEDY, skip_bad_lines=False)
    with ResultsFile(output, {}) as results:
        run_batch(build(), file, PromptFormat(chat=None, system=None), results)
        assert results.done == {1, 2, 3}
    records = {r["index"]: r for r in map(json.loads, output.read_text().splitlines()[1:])}
    assert records[1]["finish_reason"] == records[2]["finish_reason"] == "length"
    assert records[3].keys() == {"index", "id", "error"} and records[3]["id"] == "bad"
    assert "not finite" in records[3]["error"]
    assert "line 3 has failed: the model's logits after 1 tokens" in capsys.readouterr().err
