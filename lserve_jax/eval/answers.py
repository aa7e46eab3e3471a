"""Greedy answers to prompts, haystack by haystack: what prompts have in common is read once."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.eval.prompts import Case, share_found
from lserve_jax.llm import LLM
from lserve_jax.outputs import RequestOutput
from lserve_jax.sampling_params import SamplingParams


def answer(
    llm: LLM, setting: str, cases: Sequence[Case], *, progress: Callable[[int], object]
) -> list[dict[str, Any]]:
    """The rows of results, in the order of ``cases``.

    Prompts of one haystack run one after another, so that the engine remembers what they have in
    common. ``progress`` is called with the number of prompts done since the last call.

    Raises ``ValueError`` and ``FloatingPointError`` where ``LLM.stream`` and its requests do.
    """
    by_haystack: dict[tuple, list[int]] = {}
    for i, case in enumerate(cases):
        key = (case.source, case.task, case.length, case.haystack)
        by_haystack.setdefault(key, []).append(i)
    order = [i for group in by_haystack.values() for i in group]
    outputs = _outputs(llm, [cases[i] for i in order], progress)
    rows = {i: _row(setting, cases[i], outputs[at]) for at, i in enumerate(order)}
    return [rows[i] for i in range(len(cases))]


def _outputs(
    llm: LLM, cases: Sequence[Case], progress: Callable[[int], object]
) -> dict[int, RequestOutput]:
    outputs = {}
    requests = [
        (
            {"prompt_token_ids": case.token_ids},
            SamplingParams(temperature=0, max_tokens=case.max_tokens),
        )
        for case in cases
    ]
    with contextlib.closing(llm.stream(requests)) as stream:
        for position, output in stream:
            if output.error is not None:
                raise FloatingPointError(f"prompt {position}: {output.error}")
            outputs[position] = output
            progress(1)
    return outputs


def _row(setting: str, case: Case, output: RequestOutput) -> dict[str, Any]:
    text = output.outputs[0].text
    return {
        "setting": setting,
        "source": case.source,
        "task": case.task,
        "length": case.length,
        "haystack": case.haystack,
        "depth": case.question.depth,
        "question": case.question.text.strip(),
        "answers": case.question.answers,
        "text": text,
        "score": share_found(text, case.question.answers),
        "read": share_read(output.metrics),
        "density": prefill_density(output.metrics),
    }


def prefill_density(metrics: RequestMetrics) -> float | None:
    """Share of the blocks that retrieval heads would attend causally, of those that chose.

    None where they did not choose, or where a part of the prompt was there already.
    """
    if metrics.prefix_tokens or metrics.prefill_density == 1:
        return None
    return round(metrics.prefill_density, 5)


def share_read(metrics: RequestMetrics) -> float | None:
    """Share of dense attention's K and V bytes that a decode step read, statistics included.

    The mean over decode steps; None where there was none.
    """
    if metrics.decode_steps == 0:
        return None
    return round(metrics.kv_bytes_read_per_step / metrics.dense_kv_bytes_read_per_step, 5)
