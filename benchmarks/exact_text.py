"""Exact mode on a real model and real text: tokens a second, acceptance, and whether answers agree.

    python benchmarks/exact_text.py [--lengths 31744] [--rows 16]
    python benchmarks/exact_text.py --dtype float32 --rows 50 --alike 10 --tokens 64 \
        --before 0 --runs 1 --lengths 4096 8192 16384 31744 --settings dense exact ngram \
        --output exact_float32.json

Greedy continuations of windows of two texts, by dense attention, by sparse attention alone and in
exact mode (drafts by sparse steps, also with quantised weights, and looked up). Prompts are
computed first; a figure is the wall time from then on over the tokens made, the median of the timed
runs. Those before them compile, and in them exact mode measures whether drafts pay: "drafting" is
the share of the timed bursts in which anything was drafted. Acceptance and tokens a verification
are of all bursts that drafted. Where an answer differs from dense attention's, the two likeliest
tokens there are compared: a tie says that rounding decided. float32 has no kernels: XLA runs it,
whatever the device, with products that round nothing more. Writes
``benchmarks/results/exact_text.json``.
"""

import gc
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tyro
from machine import provenance

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.engine.inputs import BurstInputs
from lserve_jax.engine.request import TokenOutput
from lserve_jax.engine.state import Burst
from lserve_jax.eval.prompts import read_text

TAIL = 256  # tokens


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct-32k"
    pattern: str = "SmolLM2-135M-Instruct-32K"
    lengths: tuple[int, ...] = (4096, 16384, 31744)
    rows: int = 16
    alike: int = 1
    """Prompts that share all but their last 256 tokens, so that these are computed once."""
    tokens: int = 256
    burst: int = 64  # tokens
    runs: int = 3  # timed ones
    before: int = (
        8  # runs: two of the bursts without drafts are tried in them, of which one compiles
    )
    dtype: str = "bfloat16"
    settings: tuple[str, ...] = ("dense", "sparse", "exact", "ngram")
    output: Path = Path(__file__).parent / "results" / "exact_text.json"


def settings_of(name: str, args: Args) -> dict[str, Any]:
    sparse = {"attention": "lserve", "sparsity": SparsityConfig(pattern=args.pattern)}
    exact = sparse | {"exact": True}
    return {
        "dense": {},
        "sparse": sparse,
        "exact": exact,
        "exact_int8": exact | {"draft_weights": "int8"},
        "exact_int4": exact | {"draft_weights": "int4"},
        "ngram": {"attention": "lserve", "exact": True, "draft": "ngram"},
    }[name]


def run(llm: LLM, prompts: list[list[int]], tokens: int) -> tuple[float, dict[str, list]]:
    """Seconds of decoding, and every answer's outputs."""
    engine = llm.engine
    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=2)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, sampling, seed=0)
    engine.prefill.run_waiting()
    engine.runner.wait()
    answers: dict[str, list[TokenOutput]] = {str(i): [] for i in range(len(prompts))}
    begin = time.perf_counter()
    while engine.has_unfinished_requests:
        for output in engine.step():
            answers[output.request_id].append(output)
    return time.perf_counter() - begin, answers


def record_bursts(llm: LLM) -> list[tuple[bool, Burst]]:
    """Filled from now on: every burst, and whether it drafts."""
    runner, bursts = llm.engine.runner, []
    decode = runner.decode

    def decoded(inputs: BurstInputs) -> Burst:
        burst = decode(inputs)
        bursts.append((inputs.drafts is not None and bool(inputs.drafts.any()), burst))
        return burst

    runner.decode = decoded  # this object's own
    return bursts


def drafting_of(bursts: list[tuple[bool, Burst]]) -> dict[str, float]:
    drafted = [burst for drafts, burst in bursts if drafts]

    def total(name: str) -> int:
        return sum(int(getattr(burst, name).sum()) for burst in drafted)

    return {
        "acceptance": total("confirmed") / max(total("drafted"), 1),
        "tokens_per_verification": total("steps") / max(total("verified"), 1),
    }


def agreement(wanted: dict[str, list], got: dict[str, list]) -> dict[str, Any]:
    """Answers that are the same, and the gap of the two likeliest tokens where one is not."""
    gaps = []
    for key, outputs in wanted.items():
        ours = [token for output in got[key] for token in output.token_ids]
        theirs = [token for output in outputs for token in output.token_ids]
        tops = [top for output in outputs for top in output.top_logprobs]
        first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if first is not None:
            best, second = sorted(tops[first].values(), reverse=True)[:2]
            gaps.append(best - second)
    return {"same": len(wanted) - len(gaps), "of": len(wanted), "gaps": sorted(gaps)}


def prompts_of(texts: list[list[int]], length: int, args: Args) -> list[list[int]]:
    """Windows of the texts in turn, at even distances, or beginnings with several ends each."""

    def windows(count: int, size: int) -> list[list[int]]:
        found = []
        for i in range(count):
            ids = texts[i % 2]
            start = (len(ids) - size) * (i // 2) // max((count - 1) // 2, 1)
            found.append(list(ids[start : start + size]))
        return found

    if args.alike == 1:
        return windows(args.rows, length)
    beginnings = windows(-(-args.rows // args.alike), length - TAIL)
    ends = windows(args.rows, TAIL)
    return [beginnings[i // args.alike] + ends[i] for i in range(args.rows)]


def main(args: Args) -> None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    about, rows, dense = provenance(), [], {}
    for name in args.settings:
        llm = LLM(
            args.model,
            dtype=args.dtype,
            backend="reference" if args.dtype == "float32" else "auto",
            max_num_seqs=args.rows,
            max_model_len=max(args.lengths) + args.tokens,
            max_prefixes=0,
            relay="never",
            burst_steps=args.burst,
            **settings_of(name, args),
        )
        assert llm.tokenizer is not None  # the model has one
        bursts = record_bursts(llm)
        for length in args.lengths:
            texts = [
                read_text(llm.tokenizer, text, length) for text in ("documentation", "stories")
            ]
            prompts = prompts_of(texts, length, args)
            seconds, answers, timed_from = [], {}, 0
            bursts.clear()
            for number in range(args.before + args.runs):
                timed_from = len(bursts) if number <= args.before else timed_from
                spent, answers = run(llm, prompts, args.tokens)
                seconds.append(spent)
            seconds, timed = seconds[args.before :], bursts[timed_from:]
            last = [outputs[-1].metrics for outputs in answers.values()]
            row = {
                "setting": name,
                "length": length,
                "rows": args.rows,
                "tokens_per_second": args.rows * args.tokens / median(seconds),
                "seconds": seconds,
                "drafting": sum(drafts for drafts, _ in timed) / len(timed),
                **drafting_of(bursts),
                "reason": last[0].draft_reason,
            }
            dense.setdefault(length, answers)
            row["agreement"] = agreement(dense[length], answers)
            rows.append(row)
            args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            print(row, flush=True)
        del llm  # the memory of its cache is needed, and it holds itself
        gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
