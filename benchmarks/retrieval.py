"""Does page selection keep what a model can retrieve? A needle in long prompts, dense and lserve.

    python benchmarks/retrieval.py --lengths 4096 8192 16384

A five-digit number stands in one sentence of a long prompt, at five depths, with several seeds;
the model is asked for it through its chat template. Haystacks: one neutral paragraph repeated, and
technical documentation (the docstrings of NumPy's public names). lserve runs without a head
pattern, so every head selects pages, and what is measured is selection alone. Writes
``benchmarks/results/retrieval.json`` and the table ``retrieval.md`` beside it.
"""

import json
import random
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import tyro

from lserve_jax import LLM, SamplingParams, SparsityConfig
from lserve_jax.tokenizer import Tokenizer

RESULTS = Path(__file__).parent / "results"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
CITIES = ("Quito", "Oslo", "Nairobi", "Lima", "Hanoi", "Porto", "Tunis", "Riga")
NEUTRAL = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Needle retrieval, dense attention beside lserve."""

    model: str = "smollm2-135m-instruct-32k"
    lengths: tuple[int, ...] = (4096, 8192, 16384)
    """Prompt lengths in tokens."""
    haystacks: tuple[Literal["neutral", "documentation"], ...] = ("neutral", "documentation")
    seeds: int = 4
    """Needles for each length, haystack and depth."""
    lserve: tuple[tuple[int, int, int], ...] = ((16, 1024, 4), (64, 1024, 4))
    """Settings to run beside dense: page size, token budget, reuse interval, and so on."""
    dtype: str | None = None
    output: Path = RESULTS / "retrieval.json"


@dataclass(frozen=True)
class Case:
    haystack: str
    length: int
    depth: float
    answer: str
    token_ids: list[int]


def documentation() -> str:
    names = sorted(name for name in dir(np) if not name.startswith("_"))
    texts = (getattr(getattr(np, name), "__doc__", None) for name in names)
    return "\n\n".join(text.strip() for text in texts if text)


def make_case(
    tokenizer: Tokenizer, haystack: str, text_ids: list[int], length: int, depth: float, seed: int
) -> Case:
    """A prompt of exactly ``length`` tokens with its needle at ``depth`` of the haystack."""
    rng = random.Random(f"{haystack} {length} {depth} {seed}")
    city, answer = rng.choice(CITIES), str(rng.randrange(10000, 100000))
    needle = f"\nThe special magic number for the city of {city} is {answer}.\n"
    question = f"\n\nWhat is the special magic number for the city of {city}?"
    frame = tokenizer.apply_chat_template([{"role": "user", "content": "HAYSTACK" + question}])
    before, after = (
        tokenizer.encode(part, add_special_tokens=False) for part in frame.split("HAYSTACK")
    )
    needle_ids = tokenizer.encode(needle, add_special_tokens=False)
    room = length - len(before) - len(after) - len(needle_ids)
    start = rng.randrange(len(text_ids) - room)
    hay, at = text_ids[start : start + room], int(room * depth)
    return Case(haystack, length, depth, answer, before + hay[:at] + needle_ids + hay[at:] + after)


def settings(args: Args) -> dict[str, SparsityConfig | None]:
    lserve = {
        f"page {page_size}/16, budget {budget}, C={interval}": SparsityConfig(
            page_size=page_size,
            logical_page_size=16,
            token_budget=budget,
            reuse_interval=interval,
            # The papers' selection, of which the committed tables are.
            selected_page_size=page_size,
            lower_bound_weight=0.0,
        )
        for page_size, budget, interval in args.lserve
    }
    return {"dense": None, **lserve}


def main(args: Args) -> None:
    rows, cases, metrics = [], [], {}
    for name, sparsity in settings(args).items():
        llm = LLM(
            args.model,
            dtype=args.dtype,
            max_num_seqs=1,
            max_model_len=max(args.lengths) + 32,
            attention="dense" if sparsity is None else "lserve",
            sparsity=sparsity,
        )
        if not cases:
            assert llm.tokenizer is not None  # the default model has one
            texts = {"neutral": NEUTRAL * 4000, "documentation": documentation()}
            for haystack in args.haystacks:
                ids = llm.tokenizer.encode(texts[haystack], add_special_tokens=False)
                cases += [
                    make_case(llm.tokenizer, haystack, ids, length, depth, seed)
                    for length in args.lengths
                    for depth in DEPTHS
                    for seed in range(args.seeds)
                ]
        started = time.perf_counter()
        for case in cases:
            output = llm.generate(
                {"prompt_token_ids": case.token_ids}, SamplingParams(temperature=0, max_tokens=24)
            )[0]
            rows.append(
                {
                    "setting": name,
                    "haystack": case.haystack,
                    "length": case.length,
                    "depth": case.depth,
                    "answer": case.answer,
                    "text": output.outputs[0].text,
                    "found": case.answer in output.outputs[0].text,
                }
            )
            if case.length == max(args.lengths):
                metrics[name] = {
                    "kv_bytes_read_per_step": output.metrics.kv_bytes_read_per_step,
                    "dense_kv_bytes_read_per_step": output.metrics.dense_kv_bytes_read_per_step,
                    "pages_attended_per_step": output.metrics.pages_attended_per_step,
                }
        print(f"{name}: {len(cases)} prompts in {time.perf_counter() - started:.0f} s", flush=True)
        write(args, rows, metrics)  # after every setting: a long run may be cut short
    print(args.output.with_suffix(".md").read_text())


def write(args: Args, rows: list[dict], metrics: dict[str, dict]) -> None:
    result = {
        "what": "needle retrieval, greedy, 5 depths; lserve without a head pattern",
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "model": args.model,
        "dtype": args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
        "seeds": args.seeds,
        "metrics_at_longest": metrics,
        "rows": rows,
    }
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(markdown(result, list(metrics)))


def markdown(result: dict, names: list[str]) -> str:
    """Accuracy by haystack and length, one column a setting."""
    rows = result["rows"]
    keys = list(dict.fromkeys((row["haystack"], row["length"]) for row in rows))
    lines = [
        f"Needle retrieval of {result['model']} ({result['dtype']}), found of asked; lserve by "
        f"page/logical page size, token budget and reuse interval C. {result['device']}, JAX "
        f"{result['versions']['jax']}, {result['date']}, `benchmarks/retrieval.py`.",
        "",
        "| haystack | tokens | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for haystack, length in keys:
        cells = []
        for name in names:
            found = [
                row["found"]
                for row in rows
                if (row["setting"], row["haystack"], row["length"]) == (name, haystack, length)
            ]
            cells.append(f"{sum(found)}/{len(found)}")
        lines.append(f"| {haystack} | {length} | " + " | ".join(cells) + " |")
    lines += ["", "KV bytes read per decode step at the longest prompt:", ""]
    for name, metrics in result["metrics_at_longest"].items():
        read = metrics["kv_bytes_read_per_step"] / 1e6
        dense = metrics["dense_kv_bytes_read_per_step"] / 1e6
        lines.append(f"* {name}: {read:.1f} MB (dense {dense:.1f} MB)")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args))
