"""Tokens a second of ``LLM.generate`` for many prompts that begin with one system prompt.

    python benchmarks/throughput.py [--num-prompts 256] [--peer-python PATH]

Prompts are random token ids, a shared beginning and an own part of random length; answers are
greedy and of a fixed length. Sharing the beginning ("auto", what ``LLM.generate`` does by itself)
is timed beside computing it for every prompt ("off"), and with ``--peer-python`` beside
transformers on the same weights, in batches padded to their longest prompt (``peer.py`` says how
to make its environment). The sides take turns, because a machine's speed drifts; the first run of
each is not timed.

Writes ``benchmarks/results/throughput.json`` and a table beside it.
"""

import json
import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro
from machine import provenance
from peer import HERE, Peer, export
from report import write_throughput

import convert
from lserve_jax import LLM, SamplingParams
from lserve_jax.engine.options import resolve_dtype


@dataclass(frozen=True, kw_only=True)
class Args:
    model: str = "smollm2-135m-instruct"
    """Model to run, as for lserve_jax.generate."""
    dtype: str | None = None
    """float32 or bfloat16; None: bfloat16 on a GPU, float32 on a CPU."""
    num_prompts: int = 256
    system_tokens: int = 512
    """Tokens that all prompts begin with."""
    own_tokens: tuple[int, int] = (16, 128)
    """Fewest and most tokens of a prompt after them."""
    new_tokens: int = 64
    batch_size: int = 32
    """Requests at a time, of either side."""
    runs: int = 3
    """Timed runs of each side."""
    peer_python: str | None = None
    """Interpreter that can import torch and transformers."""
    output: Path = HERE / "results" / "throughput.json"


def make_prompts(args: Args, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    system = rng.integers(0, vocab_size, args.system_tokens)
    lengths = rng.integers(*args.own_tokens, args.num_prompts, endpoint=True)
    return [[*system.tolist(), *rng.integers(0, vocab_size, n).tolist()] for n in lengths]


def main(args: Args) -> None:
    for name in ("num_prompts", "system_tokens", "new_tokens", "batch_size", "runs"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)} must be at least 1")
    about = provenance()
    loaded = convert.load(convert.resolve(args.model), dtype=resolve_dtype(args.dtype))
    shares, forgets = (
        LLM(
            loaded,
            dtype=args.dtype,
            max_num_seqs=args.batch_size,
            max_model_len=args.system_tokens + args.own_tokens[1] + args.new_tokens,
            enable_prefix_caching=enabled,
        )
        for enabled in (True, False)
    )
    dtype = shares.dtype.__name__
    prompts = make_prompts(args, shares.config.vocab_size)
    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)

    def run(llm: LLM) -> tuple[list[list[int]], float]:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling)
        seconds = time.perf_counter() - started
        return [output.outputs[0].token_ids for output in outputs], seconds

    sides = {"lserve-jax": lambda: run(shares), "lserve-jax, no sharing": lambda: run(forgets)}
    versions = {"jax": about["jax"], "python": platform.python_version()}
    peer = None
    if args.peer_python is not None:
        with tempfile.TemporaryDirectory() as directory:
            config, params = convert.load(convert.resolve(args.model), dtype=jax.numpy.float32)
            export(config, jax.tree.map(np.asarray, params), Path(directory))
            del params
            peer = Peer(args.peer_python, Path(directory))
        versions |= peer.versions
        sides["transformers"] = lambda: peer.generate(
            dtype, prompts, args.new_tokens, batch_size=args.batch_size
        )
    rows = [{"system": side, "runs": [], "same_answers": 0} for side in sides]
    result = {
        **about,
        "versions": versions,
        "model": args.model,
        "dtype": dtype,
        "num_prompts": args.num_prompts,
        "system_tokens": args.system_tokens,
        "own_tokens": args.own_tokens,
        "new_tokens": args.new_tokens,
        "batch_size": args.batch_size,
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for number in range(args.runs + 1):
        answers = []
        for row, generate in zip(rows, sides.values(), strict=True):
            token_ids, seconds = generate()
            answers.append(token_ids)
            row["same_answers"] = sum(a == b for a, b in zip(token_ids, answers[0], strict=True))
            if number:
                row["runs"].append(args.num_prompts * args.new_tokens / seconds)
            print(f"{row['system']}: {seconds:.1f} s{'' if number else ', not timed'}", flush=True)
        if number:
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    if peer is not None:
        peer.close()
    write_throughput(result, args.output)
    print(args.output.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
