"""Requests that arrive at random at one engine: latency, throughput and goodput at several rates.

    python benchmarks/serving.py [--request-rates 1 4 inf] [--goodput ttft:500 tpot:50]

The engine runs in this process, without a server, on the wall clock. Requests arrive by a Poisson
process of the given rate a second (inf: all at once), prompts are random token ids, answers are
greedy and of a fixed length. "prefix_repetition" prompts begin with one of a few prefixes, which
the engine holds; "random" prompts have nothing in common. To compile, 1, 2, 4 and so on of the
requests run at once before, and before every timed run the same requests untimed; what a timed run
still compiled is in its row.

Metrics are those of vLLM's ``bench serve``:

    TTFT   from the arrival of a request to its first token
    E2EL   from its arrival to its last token
    TPOT   (E2EL - TTFT) / (tokens - 1)
    ITL    every gap between two outputs of a request; an output is a burst of up to 16 tokens
    goodput  requests a second of those that meet every limit given

An arrival counts from its planned time, so waiting for the engine's step is part of it. Writes
``benchmarks/results/serving.json``, a table and a picture beside it.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from machine import provenance
from report import write_serving
from tqdm import tqdm

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.relay import RelayMode

LIMITS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct"
    """Model to run, as for lserve_jax.generate."""
    attention: Literal["dense", "lserve"] = "dense"
    max_num_seqs: int = 8
    """Requests that run at the same time."""
    relay: RelayMode = "auto"
    """Whether requests of one prefix read it together."""
    share: bool = True
    """Whether the engine holds the prefixes; else every request computes its own."""

    workload: Literal["prefix_repetition", "random"] = "prefix_repetition"
    num_prompts: int = 32
    num_prefixes: int = 2
    prefix_len: int = 512
    """Tokens of a prefix; random prompts are as long as prefix and suffix."""
    suffix_len: int = 64
    output_len: int = 32
    request_rates: tuple[float, ...] = (0.5, 1.0, math.inf)
    """Requests a second; inf: all arrive at once."""
    goodput: tuple[str, ...] = ()
    """Limits in milliseconds, as ttft:500 tpot:50 e2el:3000."""
    seed: int = 0
    output: Path = Path(__file__).parent / "results" / "serving.json"


@dataclass(kw_only=True)
class Timeline:
    """When a request came and when its tokens did; seconds since the run began."""

    arrival: float
    times: list[float] = field(default_factory=list)  # of each output
    tokens: int = 0

    @property
    def ttft(self) -> float:
        return self.times[0] - self.arrival

    @property
    def e2el(self) -> float:
        return self.times[-1] - self.arrival

    @property
    def tpot(self) -> float:
        """0 for a single token."""
        return (self.e2el - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0

    @property
    def itl(self) -> list[float]:
        return np.diff(self.times).tolist()


def parse_limits(texts: Sequence[str]) -> dict[str, float]:
    """Seconds by metric, from ``ttft:500``. Raises ``ValueError`` for anything else."""
    limits = {}
    for text in texts:
        name, _, milliseconds = text.partition(":")
        try:
            limits[name] = float(milliseconds) / 1e3
        except ValueError:
            raise ValueError(f"limit {text!r} must be like ttft:500, in milliseconds") from None
        if name not in LIMITS or not limits[name] > 0:
            raise ValueError(f"limit {text!r} must be a positive time of one of {LIMITS}")
    return limits


def meets(line: Timeline, limits: dict[str, float]) -> bool:
    return all(getattr(line, name) <= limit for name, limit in limits.items())


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    milliseconds = 1e3 * np.asarray(seconds)
    return {
        "mean": float(milliseconds.mean()),
        "median": statistics.median(milliseconds.tolist()),
        "p90": float(np.percentile(milliseconds, 90)),
        "p99": float(np.percentile(milliseconds, 99)),
    }


def summary(
    lines: Sequence[Timeline], prompt_tokens: int, limits: dict[str, float]
) -> dict[str, float | dict | None]:
    """One run's metrics. Like vLLM's, TPOT leaves out requests of a single token."""
    duration = max(line.times[-1] for line in lines)
    output_tokens = sum(line.tokens for line in lines)
    several = [line.tpot for line in lines if line.tokens > 1]
    gaps = [gap for line in lines for gap in line.itl]
    good = sum(meets(line, limits) for line in lines)
    return {
        "duration": duration,
        "requests_per_second": len(lines) / duration,
        "output_tokens_per_second": output_tokens / duration,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / duration,
        "goodput": good / duration if limits else None,
        "ttft": spread([line.ttft for line in lines]),
        "tpot": spread(several) if several else None,
        "itl": spread(gaps) if gaps else None,
        "e2el": spread([line.e2el for line in lines]),
    }


def make_prompts(args: Args, vocab_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """The prefixes ``[num_prefixes, prefix_len]``, and prompts in the order of their arrival."""
    rng = np.random.default_rng(args.seed)
    if args.workload == "random":
        length = args.prefix_len + args.suffix_len
        prompts = rng.integers(0, vocab_size, (args.num_prompts, length))
        return np.zeros((0, args.prefix_len), np.int64), list(prompts)
    prefixes = rng.integers(0, vocab_size, (args.num_prefixes, args.prefix_len))
    suffixes = rng.integers(0, vocab_size, (args.num_prompts, args.suffix_len))
    which = rng.permutation(np.arange(args.num_prompts) % args.num_prefixes)
    return prefixes, list(np.concatenate([prefixes[which], suffixes], axis=1))


def arrival_times(rate: float, count: int, seed: int) -> np.ndarray:
    """Seconds since the run began, ``[count]``."""
    if math.isinf(rate):
        return np.zeros((count,))
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()


def serve(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    arrivals: np.ndarray,
    output_len: int,
    *,
    title: str,
) -> list[Timeline]:
    """Runs all requests, each added when its time has come."""
    sampling = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    lines = [Timeline(arrival=float(time)) for time in arrivals]
    sent, begin = 0, time.perf_counter()
    with tqdm(total=len(prompts), desc=title, unit="request") as bar:
        while sent < len(prompts) or engine.has_unfinished_requests:
            now = time.perf_counter() - begin
            while sent < len(prompts) and arrivals[sent] <= now:
                engine.add_request(str(sent), prompts[sent], sampling, seed=sent)
                sent += 1
            if not engine.has_unfinished_requests:
                time.sleep(arrivals[sent] - now)
                continue
            outputs = engine.step()
            now = time.perf_counter() - begin
            for output in outputs:
                line = lines[int(output.request_id)]
                line.times.append(now)
                line.tokens += len(output.token_ids)
                bar.update(output.finish_reason is not None)
    return lines


def check(args: Args) -> None:
    for name in ("num_prompts", "num_prefixes", "prefix_len", "suffix_len", "output_len"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1")
    for rate in args.request_rates:
        if not rate > 0:
            raise ValueError(f"a request rate of {rate} must be positive")


def main(args: Args) -> None:
    check(args)
    limits = parse_limits(args.goodput)
    about = provenance()
    llm = LLM(
        args.model,
        attention=args.attention,
        max_model_len=args.prefix_len + args.suffix_len + args.output_len,
        max_num_seqs=args.max_num_seqs,
        max_prefixes=args.num_prefixes,
        relay=args.relay,
        progress=True,
    )
    prefixes, prompts = make_prompts(args, llm.config.vocab_size)
    if args.share:
        for prefix in prefixes:
            llm.engine.add_prefix(prefix)
    prompt_tokens = sum(map(len, prompts))
    settings = {
        name: value
        for name, value in dataclasses.asdict(args).items()
        if name not in ("request_rates", "output")
    }
    rows: list[dict] = []
    result = {**about, "dtype": llm.dtype.__name__, **settings, "rows": rows}
    for slots in llm.engine.shape_buckets()["slots"]:
        first = prompts[:slots]
        serve(llm.engine, first, np.zeros(len(first)), args.output_len, title=f"{slots} at once")
    for rate in args.request_rates:
        arrivals = arrival_times(rate, args.num_prompts, args.seed)
        serve(llm.engine, prompts, arrivals, args.output_len, title=f"rate {rate:g}, untimed")
        before = llm.engine.metrics()
        lines = serve(llm.engine, prompts, arrivals, args.output_len, title=f"rate {rate:g}")
        after = llm.engine.metrics()
        rows.append(
            {
                "request_rate": "inf" if math.isinf(rate) else rate,
                **summary(lines, prompt_tokens, limits),
                "prefix_share": (after.prefix_tokens - before.prefix_tokens) / prompt_tokens,
                "relay_bursts": after.relay_bursts - before.relay_bursts,
                "preemptions": after.preemptions - before.preemptions,
                "compilations": after.compilations - before.compilations,
            }
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    write_serving(result, args.output)
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
