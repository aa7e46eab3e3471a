"""Decode speed on this machine's CPU: this engine beside Hugging Face transformers, in one run.

    python benchmarks/decode_cpu.py --peer-python PATH

PATH is the interpreter of an environment with torch and transformers (see ``peer.py``). Both sides
run the same weights (the default model's, exported to a temporary folder), the same prompt and
greedy decoding of one sequence, on all cores. A run's decode time is the time to generate
``new_tokens + 1`` tokens less the time to generate one, so prompt processing and the overhead of a
call cancel on either side. The sides take turns, because a machine's speed drifts.

Prints a table and writes ``benchmarks/results/decode_cpu.json``.
"""

import dataclasses
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import tyro
from machine import cpu_name
from peer import HERE, Peer, export

import convert
from lserve_jax import LLM, SamplingParams

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    peer_python: str
    """Interpreter that can import torch and transformers."""
    model: str = "smollm2-135m-instruct"
    """Model to run, as for lserve_jax.generate."""
    prompt_tokens: int = 128
    new_tokens: int = 128
    runs: int = 7
    """Timed runs of each side and dtype, after one that is not timed."""
    output: Path = HERE / "results" / "decode_cpu.json"


def main(args: Args) -> None:
    config, params = convert.load(convert.resolve(args.model), dtype=jax.numpy.float32)
    prompt = np.random.default_rng(0).integers(1000, config.vocab_size, args.prompt_tokens).tolist()
    with tempfile.TemporaryDirectory() as directory:
        export(config, jax.tree.map(np.asarray, params), Path(directory))
        del params
        peer = Peer(args.peer_python, Path(directory))
        options = {"max_num_seqs": 1, "enable_prefix_caching": False}
        ours = {dtype: LLM(args.model, dtype=dtype, **options) for dtype in DTYPES}

        def run_ours(dtype: str, num_tokens: int) -> tuple[list[int], float]:
            sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
            started = time.perf_counter()
            output = ours[dtype].generate({"prompt_token_ids": prompt}, sampling)[0]
            return output.outputs[0].token_ids, time.perf_counter() - started

        def run_peer(dtype: str, num_tokens: int) -> tuple[list[int], float]:
            token_ids, seconds = peer.generate(dtype, [prompt], num_tokens, batch_size=1)
            return token_ids[0], seconds

        sides = {"lserve-jax": run_ours, "transformers": run_peer}
        speeds: dict[tuple[str, str], list[float]] = {}
        tokens: dict[tuple[str, str], list[int]] = {}
        for run in range(args.runs + 1):  # the first one warms up and compiles
            for dtype in DTYPES:
                for side, generate in sides.items():
                    _, first = generate(dtype, 1)
                    ids, whole = generate(dtype, args.new_tokens + 1)
                    tokens[side, dtype] = ids
                    if run:
                        speed = args.new_tokens / (whole - first)
                        speeds.setdefault((side, dtype), []).append(speed)
        peer.close()

    same = tokens["lserve-jax", "float32"] == tokens["transformers", "float32"]
    rows = [
        {
            "system": side,
            "dtype": dtype,
            "tokens_per_second": round(statistics.median(values), 1),
            "slowest": round(min(values), 1),
            "fastest": round(max(values), 1),
        }
        for (side, dtype), values in speeds.items()
    ]
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores",
        "versions": {"jax": version("jax"), "python": platform.python_version(), **peer.versions},
        "model": args.model,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "runs": args.runs,
        "load_average": round(os.getloadavg()[1], 1),
        "float32_tokens_identical": same,
        "rows": rows,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['cpu']}; {result['versions']}; same float32 tokens: {same}\n")
    print(f"{'system':<14}{'dtype':<10}{'tokens/s':>10}{'slowest':>10}{'fastest':>10}")
    for row in rows:
        print(
            f"{row['system']:<14}{row['dtype']:<10}{row['tokens_per_second']:>10}"
            f"{row['slowest']:>10}{row['fastest']:>10}"
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
