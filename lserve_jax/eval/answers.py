"""Greedy answers to prompts, several haystacks at a time, so that few slots are idle."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.engine.prefix import CommonPrefix
from lserve_jax.eval.prompts import Case, share_found
from lserve_jax.llm import LLM
from lserve_jax.outputs import RequestOutput
from lserve_jax.sampling_params import SamplingParams


@dataclass(frozen=True, kw_only=True)
class _Haystack:
    """The prompts of one haystack."""

    cases: list[Case]
    beginning: list[int]  # whole pages of tokens that they have in common; to be read once
    pages: int  # that all of it takes in the KV cache


def answer(
    llm: LLM, setting: str, cases: Sequence[Case], *, progress: Callable[[int], object]
) -> list[dict[str, Any]]:
    """The rows of results, in the order of ``cases``.

    Each haystack is read once. As many are held as there is room for, and all their prompts run
    together. ``progress`` is called with the number of prompts done since the last call.

    Raises ``ValueError`` and ``FloatingPointError`` where ``LLM.stream`` and its requests do.
    """
    rows = []
    for batch in _batches(llm, _haystacks(llm, cases)):
        together = [case for haystack in batch for case in haystack.cases]
        with contextlib.ExitStack() as held:
            for haystack in batch:
                if haystack.beginning:
                    prefix = llm.prefix({"prompt_token_ids": haystack.beginning})
                    held.callback(prefix.release)
            outputs = _outputs(llm, together, progress)
        rows += [_row(setting, case, outputs[i]) for i, case in enumerate(together)]
    return rows


def _haystacks(llm: LLM, cases: Sequence[Case]) -> list[_Haystack]:
    groups: dict[tuple, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.source, case.task, case.length, case.haystack), []).append(case)
    page_size, shares = llm.spec.page_size, llm.engine.prefix_store.has_room
    haystacks = []
    for group in groups.values():
        common = CommonPrefix()
        for case in group:
            common.add(case.token_ids)
        beginning = common.whole_pages(page_size) if shares and len(group) > 1 else []
        shared = len(beginning) // page_size
        own = sum(-(-(case.length + case.max_tokens) // page_size) - shared for case in group)
        haystacks.append(_Haystack(cases=group, beginning=beginning, pages=shared + own))
    return haystacks


def _batches(llm: LLM, haystacks: Sequence[_Haystack]) -> Iterator[list[_Haystack]]:
    """As many haystacks as the cache can hold with all their prompts, at least one."""
    batch: list[_Haystack] = []
    for haystack in haystacks:
        pages = sum(other.pages for other in batch) + haystack.pages
        if batch and (len(batch) == llm.spec.max_prefixes or pages > llm.spec.num_pages):
            yield batch
            batch = []
        batch.append(haystack)
    if batch:
        yield batch


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
    }


def share_read(metrics: RequestMetrics) -> float | None:
    """Share of dense attention's K and V bytes that a decode step read, statistics included.

    The mean over decode steps; None where there was none.
    """
    if metrics.decode_steps == 0:
        return None
    return round(metrics.kv_bytes_read_per_step / metrics.dense_kv_bytes_read_per_step, 5)
