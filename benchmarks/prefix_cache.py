"""What remembered prompts save: time to the first token, prompt tokens, throughput.

    python benchmarks/prefix_cache.py [--workloads questions chat documents shared restored]
        [--geometry llama-3-8b --document 32768 --chunk 8192] [--attention lserve]

    questions   one document, one question after another: seconds to the first token of each
    chat        one conversation, turn by turn: of each turn the tokens computed and the seconds
    documents   several documents, requests about them mixed, with and without remembering: tokens
                a second
    shared      one remembered document, as many requests about it as there are slots, which read
                it together (relay) or each by itself: tokens a second
    restored    a document whose pages went to host memory for another's: seconds to the first
                token of a question about it, beside those of computing it
    unshared    prompts that share nothing, with and without remembering, in turns: what it costs

Prompts are random token ids. ``--geometry model`` is a checkpoint, ``llama-3-8b`` has that model's
sizes and random weights. Every shape is compiled by prompts of other tokens first. Writes
``benchmarks/results/prefix_cache.json``.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import numpy as np
import tyro
from llama_8b import CONFIG, LSERVE, random_params
from machine import provenance

import convert
from lserve_jax import SamplingParams
from lserve_jax.cli import keep_compiled
from lserve_jax.engine.build import build_engine
from lserve_jax.engine.engine import Engine
from lserve_jax.engine.metrics import RequestMetrics
from lserve_jax.engine.options import EngineOptions, resolve_dtype, with_shipped_shares
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.llama import Params

Workload = Literal["questions", "chat", "documents", "shared", "restored", "unshared"]
Prompts = list[np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Args:
    geometry: Literal["model", "llama-3-8b"] = "model"
    model: str = "smollm2-135m-instruct"
    attention: Literal["dense", "lserve"] = "dense"
    workloads: tuple[Workload, ...] = get_args(Workload)
    document: int = 4096
    """Tokens of a document."""
    question: int = 32
    """Tokens of a question, and of what a user says in a turn."""
    answer: int = 16
    """New tokens of a request."""
    questions: int = 3
    turns: int = 4
    documents: int = 2
    requests: int = 8
    """About all documents together."""
    pairs: int = 5
    """Timed runs of each kind, where a kind runs several times."""
    host_cache_gib: int = 2
    """Of the workload restored."""
    kv_cache_gib: int = 4
    """Of each of the two engines of the workload unshared, which are there at the same time."""
    max_num_seqs: int = 4
    chunk: int = 1024
    """Most tokens of a chunk of a prompt."""
    output: Path = Path(__file__).parent / "results" / "prefix_cache.json"


def load(args: Args) -> tuple[ModelConfig, Params, EngineOptions]:
    """The model and its options but for what differs between runs."""
    extra = args.turns * (args.question + args.answer)
    sizes = {
        "max_num_seqs": args.max_num_seqs,
        "max_model_len": args.document + extra,
        "max_prefixes": args.documents,
        "prefill_chunk_size": args.chunk,
        "compilation_cache": keep_compiled(True),  # engines of one kind are made several times
    }
    if args.geometry == "llama-3-8b":
        sparsity = LSERVE if args.attention == "lserve" else None
        sizes |= {"dtype": "bfloat16", "sparsity": sparsity}
        return CONFIG, random_params(), EngineOptions(attention=args.attention, **sizes)
    source = convert.resolve(args.model)
    options = with_shipped_shares(EngineOptions(attention=args.attention, **sizes), source)
    config, params = convert.load(source, dtype=resolve_dtype(options.dtype))
    return config, params, options


class Runs:
    """Engines of one model, and prompts of its vocabulary."""

    def __init__(self, args: Args):
        self.args = args
        self.config, self.params, self.options = load(args)
        self._rng = np.random.default_rng(0)

    def engine(self, **changes: Any) -> Engine:
        """One at a time: its cache takes most of a GPU."""
        options = {name: getattr(self.options, name) for name in self.options.__dict__}
        return build_engine(self.config, self.params, EngineOptions(**options | changes))

    def random(self, tokens: int) -> np.ndarray:
        return self._rng.integers(0, self.config.vocab_size, tokens)

    def document_and(self, questions: int) -> Prompts:
        document = self.random(self.args.document)
        own = [self.random(self.args.question) for _ in range(questions)]
        return [np.concatenate([document, question]) for question in own]

    def answer(self, engine: Engine, prompts: Prompts) -> list[tuple[list[int], RequestMetrics]]:
        """Runs requests together; their tokens and what they cost."""
        sampling = SamplingParams(temperature=0, max_tokens=self.args.answer, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, sampling, seed=0)
        tokens: list[list[int]] = [[] for _ in prompts]
        ends: dict[int, RequestMetrics] = {}
        for new in engine.stream():
            tokens[int(new.request_id)] += new.token_ids
            ends[int(new.request_id)] = new.metrics
        return [(tokens[i], ends[i]) for i in range(len(prompts))]


def questions(runs: Runs) -> dict[str, Any]:
    engine = runs.engine()
    for prompt in runs.document_and(2):  # compiles what a first and a later question run
        runs.answer(engine, [prompt])
    engine.reset_prefix_cache()
    seconds, cached = [], []
    for prompt in runs.document_and(runs.args.questions):
        [(_, metrics)] = runs.answer(engine, [prompt])
        seconds.append(metrics.first_token_seconds)
        cached.append(metrics.prefix_tokens)
    return {
        "first_token_seconds": seconds,
        "cached_tokens": cached,
        "later_by_first": median(seconds[1:]) / seconds[0],
    }


def chat(runs: Runs) -> dict[str, Any]:
    rows = {}
    for name, enabled in (("remembered", True), ("nothing remembered", False)):
        engine = runs.engine(enable_prefix_caching=enabled)
        for timed in (False, True):
            engine.reset_prefix_cache()
            [prompt] = runs.document_and(1)
            turns = []
            for _ in range(runs.args.turns):
                before = engine.metrics().prompt_tokens
                [(answer, metrics)] = runs.answer(engine, [prompt])
                computed = engine.metrics().prompt_tokens - before
                turns.append({"computed": computed, "seconds": metrics.first_token_seconds})
                prompt = np.concatenate([prompt, answer, runs.random(runs.args.question)])
            if timed:
                rows[name] = turns
    return rows


def documents(runs: Runs) -> dict[str, Any]:
    args, rows = runs.args, {}

    def mixed() -> Prompts:
        each = -(-args.requests // args.documents)
        groups = [runs.document_and(each) for _ in range(args.documents)]
        return [prompt for group in zip(*groups, strict=True) for prompt in group][: args.requests]

    prompts = mixed()
    for name, enabled in (("remembered", True), ("nothing remembered", False)):
        engine = runs.engine(relay="never", enable_prefix_caching=enabled)
        # All of them where that is cheap: which slots run together decides on shapes.
        runs.answer(engine, mixed()[: args.requests if enabled else args.max_num_seqs])
        engine.reset_prefix_cache()
        rows[name] = timed_answers(runs, engine, prompts)
        print(name, rows[name], flush=True)
        del engine  # before the next one: both may not fit
    return rows


def shared(runs: Runs) -> dict[str, Any]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, relay in (("together", "auto"), ("each by itself", "never")):
        engine = runs.engine(relay=relay)
        rows[name] = []
        for run in range(runs.args.pairs + 1):  # the first compiles
            first, *prompts = runs.document_and(runs.args.max_num_seqs + 1)
            runs.answer(engine, [first])
            row = timed_answers(runs, engine, prompts)
            print(name, row, flush=True)
            if run > 0:
                rows[name].append(row)
        del engine
    speeds = [median(row["tokens_per_second"] for row in timed) for timed in rows.values()]
    return {**rows, "ratio": speeds[0] / speeds[1]}


def timed_answers(runs: Runs, engine: Engine, prompts: Prompts) -> dict[str, Any]:
    before, began = engine.metrics(), time.perf_counter()
    runs.answer(engine, prompts)
    seconds, after = time.perf_counter() - began, engine.metrics()
    return {
        "tokens_per_second": len(prompts) * runs.args.answer / seconds,
        "computed": after.prompt_tokens - before.prompt_tokens,
        "cached_tokens": after.prefix_tokens - before.prefix_tokens,
        "relay_bursts": after.relay_bursts - before.relay_bursts,
        "preemptions": after.preemptions - before.preemptions,
        "compilations": after.compilations - before.compilations,
    }


def restored(runs: Runs) -> dict[str, Any]:
    # Room for two documents: the third one's pages are those of the first.
    limit = runs.args.host_cache_gib << 30
    options = {"max_num_seqs": 1, "max_prefixes": 1, "host_cache_bytes": limit}
    engine = runs.engine(warmup="auto", **options)  # with what moves pages
    rows = []
    for pair in range(runs.args.pairs + 1):  # the first compiles
        first, second = runs.document_and(2)
        [(_, computed)] = runs.answer(engine, [first])
        for _ in range(2):
            runs.answer(engine, runs.document_and(1))
        pages = engine.metrics().host_pages
        [(_, back)] = runs.answer(engine, [second])
        row = {
            "computed_seconds": computed.first_token_seconds,
            "restored_seconds": back.first_token_seconds,
            "cached_tokens": back.prefix_tokens,
            "pages_in_host_memory": pages,
        }
        print(row, flush=True)
        if pair > 0:
            rows.append(row)
    ratio = median(row["restored_seconds"] / row["computed_seconds"] for row in rows)
    return {"rows": rows, "restored_by_computed": ratio}


def unshared(runs: Runs) -> dict[str, Any]:
    room = runs.args.kv_cache_gib << 30
    engines = {
        name: runs.engine(kv_cache_bytes=room, enable_prefix_caching=enabled)
        for name, enabled in (("remembered", True), ("nothing remembered", False))
    }
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for pair in range(runs.args.pairs + 1):  # the first compiles
        prompts = [runs.document_and(1)[0] for _ in range(runs.args.max_num_seqs)]
        for name, engine in engines.items():
            began = time.perf_counter()
            runs.answer(engine, prompts)
            took = time.perf_counter() - began
            print(name, took, flush=True)
            if pair > 0:
                seconds[name].append(took)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    return {"seconds": seconds, "ratio": median(ratios)}


WORKLOADS: dict[Workload, Callable[[Runs], dict[str, Any]]] = {
    "questions": questions,
    "chat": chat,
    "documents": documents,
    "shared": shared,
    "restored": restored,
    "unshared": unshared,
}


def main(args: Args) -> None:
    runs = Runs(args)
    given = {name: value for name, value in vars(args).items() if name != "output"}
    result: dict[str, Any] = {**provenance(), "settings": given}
    for workload in args.workloads:
        result[workload] = WORKLOADS[workload](runs)
        print(workload, json.dumps(result[workload], indent=2), flush=True)
        args.output.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
