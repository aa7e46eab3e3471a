"""Time to first token on this machine's CPU: this engine beside Hugging Face transformers.

    python benchmarks/prefill_cpu.py --peer-python PATH

PATH is the interpreter of an environment with torch and transformers (see ``peer.py``; its
attention is torch's scaled_dot_product_attention). Both sides run the same weights in float32 (the
default model's, exported to a temporary folder), the same prompt and one greedy token, on all
cores. The sides take turns, because a machine's speed drifts; the ratio is that of two turns that
follow each other.

Prints a table and writes ``benchmarks/results/prefill_cpu.json``.
"""

import dataclasses
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from machine import about, provenance
from peer import HERE, Peer, export

import convert
from lserve_jax import LLM, SamplingParams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Args:
    peer_python: str
    """Interpreter that can import torch and transformers."""
    model: str = "smollm2-135m-instruct"
    """Model to run, as for lserve_jax.generate."""
    prompt_tokens: tuple[int, ...] = (512, 2048, 4096)
    runs: int = 7
    """Timed runs of each side and length, after one that is not timed."""
    output: Path = HERE / "results" / "prefill_cpu.json"


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def main(args: Args) -> None:
    machine = provenance()
    config, params = convert.load(convert.resolve(args.model), dtype=jax.numpy.float32)
    generator = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    with tempfile.TemporaryDirectory() as directory:
        export(config, jax.tree.map(np.asarray, params), Path(directory))
        del params
        peer = Peer(args.peer_python, Path(directory))
        llm = LLM(args.model, dtype="float32", max_num_seqs=1, enable_prefix_caching=False)
        rows, same = [], True
        for length in args.prompt_tokens:
            prompt = generator.integers(1000, config.vocab_size, length).tolist()
            ours, theirs = [], []
            for _ in range(args.runs + 1):
                started = time.perf_counter()
                output = llm.generate({"prompt_token_ids": prompt}, sampling)[0]
                ours.append(time.perf_counter() - started)
                [tokens], seconds = peer.generate("float32", [prompt], 1, batch_size=1)
                theirs.append(seconds)
                same &= output.outputs[0].token_ids == tokens
            ours, theirs = ours[1:], theirs[1:]  # the first ones compile and warm up
            ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
            rows.append(
                {
                    "prompt_tokens": length,
                    "lserve_jax_seconds": spread(ours),
                    "transformers_seconds": spread(theirs),
                    "transformers_over_lserve_jax": spread(ratios),
                }
            )
        peer.close()

    result = {
        **machine,
        "versions": {"python": platform.python_version(), **peer.versions},
        "model": args.model,
        "runs": args.runs,
        "tokens_identical": same,
        "rows": rows,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{about(machine)} {result['versions']}; {same=}\n")
    print(f"{'tokens':>7}{'lserve-jax':>22}{'transformers':>22}{'ratio':>22}")
    for row in rows:
        parts = [row[name] for name in list(row)[1:]]
        cells = [f"{x['median']:.2f} ({x['least']:.2f}-{x['most']:.2f})" for x in parts]
        print(f"{row['prompt_tokens']:>7}" + "".join(f"{cell:>22}" for cell in cells))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
