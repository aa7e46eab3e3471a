"""Requests that arrive at random at the server: latency, throughput and goodput at several rates.

    python benchmarks/serving.py [--request-rates 1 4 inf] [--goodput ttft:500 tpot:50]
    python benchmarks/serving.py --compare-offline 5       # and what HTTP costs
    python benchmarks/serving.py --url http://HOST:PORT    # a server that runs already

The server is ``python -m lserve_jax.serve`` in a process of its own; this one is its client, over
HTTP, with a stream a request. Requests arrive by a Poisson process of the given rate a second (inf:
all at once), prompts are random token ids, answers are greedy and of a fixed length.
"prefix_repetition" prompts begin with one of a few prefixes, which the server holds (/v1/prefixes);
"random" prompts have nothing in common. To compile, 1, 2, 4 and so on of the requests run at once
before, and before every timed run the same requests untimed; what a timed run still compiled is in
its row.

Metrics are those of vLLM's ``bench serve``:

    TTFT   from the arrival of a request to its first token
    E2EL   from its arrival to its last token
    TPOT   (E2EL - TTFT) / (tokens - 1)
    ITL    every gap between two chunks of a stream; a chunk is a burst of up to 16 tokens
    goodput  requests a second of those that meet every limit given

An arrival counts from its planned time, so what the client takes to send is part of it.

With ``--compare-offline`` the same prompts run all at once through the server and through
``LLM.generate`` in this process, in turns, so that what else the machine does meets both; the first
pair is not timed. Beside tokens a second there are the seconds of CPU that the server's process and
this one used: other work on the machine changes them little. On a GPU both hold the model: set
XLA_PYTHON_CLIENT_MEM_FRACTION=0.45.

Needs the extras serve, hub (for httpx) and plot. Writes ``benchmarks/results/serving.json``, a
table and a picture beside it.
"""

import contextlib
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np
import tyro
from http_load import (
    Timeline,
    connection,
    counters,
    cpu_seconds,
    held_prefixes,
    run_streams,
    server,
)
from report import write_serving

from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.relay import RelayMode

HERE = Path(__file__).parent
LIMITS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str | None = None
    """A server that runs already, without /v1. --model, --dtype, --attention, --max-num-seqs and
    --relay then say what it runs; the device is taken to be this machine's."""
    api_key: str | None = None
    """Its key, if it needs one."""
    model: str = "smollm2-135m-instruct"
    """Model to run, as for lserve_jax.serve."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """None: bfloat16 on a GPU, float32 on a CPU."""
    attention: Literal["dense", "lserve"] = "dense"
    max_num_seqs: int = 8
    """Requests that run at the same time."""
    relay: RelayMode = "auto"
    """Whether requests of one prefix read it together."""
    share: bool = True
    """Whether the server holds the prefixes; else every request computes its own."""

    workload: Literal["prefix_repetition", "random"] = "prefix_repetition"
    num_prompts: int = 32
    num_prefixes: int = 2
    prefix_len: int = 512
    """Tokens of a prefix; random prompts are as long as prefix and suffix."""
    suffix_len: int = 64
    output_len: int = 32
    vocab_size: int = 32_000
    """Token ids of prompts are below it."""
    request_rates: tuple[float, ...] = (0.5, 1.0, math.inf)
    """Requests a second; inf: all arrive at once."""
    goodput: tuple[str, ...] = ()
    """Limits in milliseconds, as ttft:500 tpot:50 e2el:3000."""
    compare_offline: int = 0
    """So many pairs of runs, through a server of its own and by LLM.generate; 0: none."""
    seed: int = 0
    output: Path = HERE / "results" / "serving.json"


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


def make_prompts(args: Args) -> tuple[np.ndarray, list[np.ndarray]]:
    """The prefixes ``[num_prefixes, prefix_len]``, and prompts in the order of their arrival."""
    rng = np.random.default_rng(args.seed)
    if args.workload == "random":
        length = args.prefix_len + args.suffix_len
        prompts = rng.integers(0, args.vocab_size, (args.num_prompts, length))
        return np.zeros((0, args.prefix_len), np.int64), list(prompts)
    prefixes = rng.integers(0, args.vocab_size, (args.num_prefixes, args.prefix_len))
    suffixes = rng.integers(0, args.vocab_size, (args.num_prompts, args.suffix_len))
    which = rng.permutation(np.arange(args.num_prompts) % args.num_prefixes)
    return prefixes, list(np.concatenate([prefixes[which], suffixes], axis=1))


def arrival_times(rate: float, count: int, seed: int) -> np.ndarray:
    """Seconds since the run began, ``[count]``."""
    if math.isinf(rate):
        return np.zeros((count,))
    return np.random.default_rng(seed).exponential(1 / rate, count).cumsum()


def completion_bodies(args: Args, prompts: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """What is sent to /v1/completions."""
    common = {"temperature": 0, "max_tokens": args.output_len, "ignore_eos": True}
    return [{**common, "prompt": prompt.tolist()} for prompt in prompts]


def check(args: Args) -> None:
    for name in ("num_prompts", "num_prefixes", "prefix_len", "suffix_len", "output_len"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1")
    for rate in args.request_rates:
        if not rate > 0:
            raise ValueError(f"a request rate of {rate} must be positive")
    if args.compare_offline < 0:
        raise ValueError(f"compare_offline={args.compare_offline} must not be negative")
    if args.compare_offline and args.url is not None:
        raise ValueError(f"compare_offline={args.compare_offline} is of the same machine: no url")


def provenance_from_outside() -> dict[str, str]:
    """``provenance`` of a process that ends, so that this one takes no memory of a GPU."""
    program = "import json, machine; print(json.dumps(machine.provenance()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def max_model_len(args: Args) -> int:
    return args.prefix_len + args.suffix_len + args.output_len


def server_options(args: Args) -> list[str]:
    dtype = [] if args.dtype is None else ["--dtype", args.dtype]
    # The server may count a request of the run before after its client has had the end of it.
    return [
        *("--model", args.model, "--attention", args.attention, "--relay", args.relay, *dtype),
        *("--max-model-len", str(max_model_len(args)), "--max-num-seqs", str(args.max_num_seqs)),
        *("--max-prefixes", str(args.num_prefixes), "--max-queue", str(2 * args.num_prompts)),
        *(() if args.share else ("--no-prefix-cache",)),
    ]


def at_a_rate(
    rate: float, args: Args, options: Mapping[str, Any], client: httpx.Client
) -> dict[str, Any]:
    """One row of the result."""
    prompts = make_prompts(args)[1]
    bodies, prompt_tokens = completion_bodies(args, prompts), sum(map(len, prompts))
    arrivals = arrival_times(rate, args.num_prompts, args.seed)
    run_streams(options, bodies, arrivals, title=f"rate {rate:g}, untimed")
    before = counters(client)
    lines = run_streams(options, bodies, arrivals, title=f"rate {rate:g}")
    after = counters(client)

    def counted(name: str) -> int:
        return int(after[f"{name}_total"] - before[f"{name}_total"])

    return {
        "request_rate": "inf" if math.isinf(rate) else rate,
        **summary(lines, prompt_tokens, parse_limits(args.goodput)),
        "prefix_share": sum(line.cached_tokens for line in lines) / prompt_tokens,
        "relay_bursts": counted("relay_bursts"),
        "preemptions": counted("num_preemptions"),
        "compilations": counted("compilations"),
    }


def compare_offline(args: Args, options: Mapping[str, Any], process: int) -> dict[str, Any]:
    """Both sides, a pair a row, and how many answers are the same.

    ``process`` is the server's.
    """
    prefixes, prompts = make_prompts(args)
    llm = LLM(
        args.model,
        dtype=args.dtype,
        attention=args.attention,
        max_model_len=max_model_len(args),
        max_num_seqs=args.max_num_seqs,
        max_prefixes=args.num_prefixes,
        enable_prefix_caching=args.share,
        relay=args.relay,
        progress=True,
    )
    if args.share:
        for prefix in prefixes:
            llm.engine.add_prefix(prefix)
    sampling = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    bodies = completion_bodies(args, prompts)
    answers: dict[str, list[str]] = {}

    def through_server() -> dict[str, float]:
        before = cpu_seconds(process)
        lines = run_streams(options, bodies, np.zeros(len(bodies)), title="through the server")
        answers["server"] = [line.text for line in lines]
        tokens, seconds = sum(line.tokens for line in lines), max(line.times[-1] for line in lines)
        return {"tokens_per_second": tokens / seconds, "cpu": cpu_seconds(process) - before}

    def offline() -> dict[str, float]:
        begin, before = time.perf_counter(), time.process_time()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        seconds, cpu = time.perf_counter() - begin, time.process_time() - before
        answers["offline"] = [output.outputs[0].text for output in outputs]
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        return {"tokens_per_second": tokens / seconds, "cpu": cpu}

    sides = {"server": through_server, "offline": offline}
    pairs = []
    for number in range(args.compare_offline + 1):
        # Each side comes first in every other pair.
        order = list(sides) if number % 2 else list(reversed(sides))
        pair = {name: sides[name]() for name in order}
        if number:
            pairs.append({name: pair[name] for name in sides})
            print(json.dumps(pairs[-1]), flush=True)
    same = sum(a == b for a, b in zip(answers["server"], answers["offline"], strict=True))
    return {"pairs": pairs, "same_answers": same}


def main(args: Args) -> None:
    check(args)
    parse_limits(args.goodput)
    about = provenance_from_outside()
    prefixes, prompts = make_prompts(args)
    bodies = completion_bodies(args, prompts)
    settings = dataclasses.asdict(args)
    for name in ("url", "api_key", "request_rates", "compare_offline", "output"):
        del settings[name]
    settings["dtype"] = args.dtype or ("float32" if "cpu" in about else "bfloat16")
    settings["server"] = ", ".join(f"{name} {version(name)}" for name in ("uvicorn", "starlette"))
    rows: list[dict] = []
    result = {**about, **settings, "rows": rows}

    def save() -> None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    with contextlib.ExitStack() as stack:
        url, process = args.url, 0
        if url is None:
            url, process = stack.enter_context(server(server_options(args)))
        options = connection(url, args.api_key)
        client = stack.enter_context(httpx.Client(**options))
        stack.enter_context(held_prefixes(client, prefixes if args.share else []))
        slots = 1
        while slots <= min(args.max_num_seqs, args.num_prompts):
            run_streams(options, bodies[:slots], np.zeros(slots), title=f"{slots} at once")
            slots *= 2
        for rate in args.request_rates:
            rows.append(at_a_rate(rate, args, options, client))
            save()
        if args.compare_offline:
            result["offline"] = compare_offline(args, options, process)
            save()
    write_serving(result, args.output)
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
