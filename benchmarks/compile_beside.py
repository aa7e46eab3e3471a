"""What do running requests lose to programs that are compiled beside them?

    python benchmarks/compile_beside.py                     # a GPU: Llama-3-8B's shapes, sparse
    python benchmarks/compile_beside.py --geometry default  # the default model

An engine with ``warmup="auto"`` is ready when one slot can decode, and a GPU's host compiles the
rest of "full" meanwhile. One request after another decodes alone, while that goes on and for some
time after it; figures are the times of bursts and of whole requests, all with one short prompt.
Then 2, 4, 8 … requests come at once, and nothing may have to be compiled for them. Every start is a
process of its own: with an empty cache directory (cold), then with what that one left there
(second). Says on stderr after each request how many programs are made, and writes
``benchmarks/results/compile_beside.json`` after each start.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

import numpy as np
import startup

HERE = Path(__file__).resolve().parent
PROMPT = np.arange(1, 65)  # tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    geometry: Literal["default", "8b"] = "8b"
    attention: Literal["dense", "lserve"] = "lserve"
    rows: int = 32
    """Slots: programs are made for each power of two up to them."""
    tokens: int = 2048
    """Of a request that decodes alone."""
    after: int = 4
    """Such requests after the last program."""


def making() -> bool:
    return any(thread.name == "lserve-programs" for thread in threading.enumerate())


def bursts(engine: Any, rows: int, tokens: int) -> list[float]:
    """Seconds between the bursts of ``rows`` requests that begin together and go on as long."""
    from lserve_jax import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens + 1, ignore_eos=True)
    for row in range(rows):
        engine.add_request(str(row), PROMPT, sampling, seed=row)
    ends = []
    while engine.has_unfinished_requests:
        outputs = engine.step()
        if any(len(output.token_ids) > 1 for output in outputs):
            ends.append(time.perf_counter())
    return np.diff(ends)[:-1].tolist()  # behind the last one is no other


@dataclasses.dataclass
class Requests:
    """Requests that decode alone, one after another."""

    engine: Any
    tokens: int
    burst_seconds: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)  # of whole requests

    def run_one(self) -> None:
        start = time.perf_counter()
        self.burst_seconds += bursts(self.engine, 1, self.tokens)
        self.seconds.append(time.perf_counter() - start)

    def summary(self) -> dict[str, float]:
        return {
            **milliseconds(self.burst_seconds, self.engine.burst_steps),
            "requests": len(self.seconds),
            "request_seconds": round(median(self.seconds), 3),
            "longest_request_seconds": round(max(self.seconds), 3),
        }


def milliseconds(seconds: list[float], steps: int) -> dict[str, float]:
    """A step's, from the seconds of bursts; and the longest time between two bursts' tokens."""
    cuts = quantiles(seconds, n=100)
    return {
        "bursts": len(seconds),
        "step_ms": round(1000 * median(seconds) / steps, 3),
        "step_ms_95_percent_below": round(1000 * cuts[94] / steps, 3),
        "step_ms_99_percent_below": round(1000 * cuts[98] / steps, 3),
        "tokens_per_second": round(steps * len(seconds) / sum(seconds), 1),
        "longest_burst_ms": round(1000 * max(seconds), 1),
    }


def child(args: Args) -> dict[str, Any]:
    """One start in this process."""
    from lserve_jax import LLM
    from lserve_jax.cli import keep_compiled

    how = {"compilation_cache": keep_compiled(True), "warmup": "auto"}
    start_args = startup.Args(geometry=args.geometry, attention=args.attention)
    if args.geometry == "8b":
        import jax
        import llama_8b

        model: Any = (llama_8b.CONFIG, jax.block_until_ready(llama_8b.random_params()))
        given = startup.options_8b(start_args, args.rows)
    else:
        model, given = "smollm2-135m-instruct", startup.options_default(start_args, args.rows)
    began = time.perf_counter()
    llm = LLM(model, **given | how)
    ready = time.perf_counter()
    engine, programs = llm.engine, llm.engine.runner.programs
    beside, after = Requests(engine, args.tokens), Requests(engine, args.tokens)
    while making():
        beside.run_one()
        since = time.perf_counter() - ready
        print(f"{since:.0f} s: {len(programs.times)} programs", file=sys.stderr, flush=True)
    done = time.perf_counter()
    until_then = len(programs.times)
    for _ in range(args.after):
        after.run_one()
    steps = engine.burst_steps
    joined = {}
    for rows in engine.shape_buckets()["slots"]:
        start = time.perf_counter()
        bursts(engine, rows, 2 * steps)
        joined[rows] = round(time.perf_counter() - start, 3)
    return {
        "ready_seconds": round(ready - began, 2),
        "beside_seconds": round(done - ready, 2),
        "made": dict(Counter(f"{made.source} {made.name}" for made in programs.times)),
        "made_after": len(programs.times) - until_then,
        "burst_steps": steps,
        "beside": beside.summary() if len(beside.burst_seconds) > 1 else None,
        "after": after.summary(),
        "seconds_of_rows_that_come_together": joined,
    }


def main(args: Args) -> None:
    given = json.dumps(dataclasses.asdict(args))
    output, starts = HERE / "results" / "compile_beside.json", {}
    output.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        cache = startup.empty_cache(directory, args.geometry)
        for which in ("cold", "second"):
            done = subprocess.run(
                [sys.executable, __file__, "--child", given],
                env=startup.environment(cache),
                stdout=subprocess.PIPE,
                check=True,
            )
            machine, starts[which] = json.loads(done.stdout.splitlines()[-1])
            print(which, json.dumps(starts[which], indent=1), flush=True)
            # What a run has that is cut off in the next start.
            result = {**machine, **dataclasses.asdict(args), "starts": starts}
            output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from machine import provenance  # here: it takes the device, which is the child's

        print(json.dumps([provenance(), child(Args(**json.loads(sys.argv[2])))]))
    else:
        import tyro

        main(tyro.cli(Args, description=__doc__))
