"""The whole quality study: one factor at a time around a default, in one command.

    python benchmarks/quality.py --pattern SmolLM2-135M-Instruct-32K

Seven parts with directories of their own below ``--output``:

    heads   passkeys and sentences: head patterns and their controls, and selection alone
    pages   the same prompts: budgets, page sizes, reuse, and how pages are scored
    text    perplexity and agreement with dense by position, head patterns and their controls
    ruler   RULER's tasks, dense and the default
    shares  head shares beside LServe's own policy: passkeys, sentences, keys among others, and
            perplexity, on the language reference and on stories, which no head was calibrated on
    prefill block-sparse prefill at several thresholds beside causal prefill, all else being the
            default: long passkeys, sentences, keys among others, and perplexity, on stories
    keys    RULER's needles on stories, dense and the default: one key, one among four, four at once

The first four are about LServe's own policy (``shares=none``). The parts run at the same time, each
in a process of its own: a small model leaves most of a GPU idle. Parts shares, prefill and keys
have a process for each setting, since most of a setting's time is compiling, and put their results
together.

A part that was cut short goes on where it stopped (all but text); finished settings are not run
again. Every result records the seconds that each setting took, compiling included.
"""

import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import jax
import tyro
from tyro.conf import arg

from convert.artefacts import cache_directory
from lserve_jax.eval import report
from lserve_jax.eval.model import SharedOptions
from lserve_jax.eval.study import Study, run_study

Part = Literal["heads", "pages", "text", "ruler", "shares", "prefill", "keys"]

BUDGETS = (512, 1024, 4096)
INTERVALS = (1, 8, 16)
THRESHOLDS = (0.8, 0.9, 0.95)
# Fifteen processes, or fewer, share the GPU. Five haystacks of 31K tokens with their prompts fit
# into this.
OPTIONS = SharedOptions(max_num_seqs=32, kv_cache_bytes=4 << 30)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure what sparsity costs in quality, one factor at a time."""

    pattern: Annotated[str, arg(metavar="NAME")]
    """Calibrated head pattern of the model: a shipped name or a directory."""
    model: str = "smollm2-135m-instruct-32k"
    parts: tuple[Part, ...] = get_args(Part)
    lengths: tuple[int, ...] = (4096, 8192, 16384, 31744)
    """Prompt lengths in tokens; multiples of 1024 below the model's limit."""
    haystacks: int = 7
    """Parts heads and pages: for each length and kind of needle, with 8 prompts each."""
    ruler_haystacks: int = 5
    """Part ruler: for each length and task."""
    share_haystacks: int = 10
    """Part shares: for each text, length and task, with 5 prompts each (4 of niah_multikey)."""
    prefill_lengths: tuple[int, ...] = (16384, 31744)
    """Prompt lengths of part prefill."""
    prefill_haystacks: int = 25
    """Part prefill: for each length and task, with 5 prompts each (4 of niah_multikey)."""
    keys_haystacks: int = 40
    """Part keys: for each length and task, with a prompt each (4 of niah_multikey)."""
    processes: int | None = None
    """Most parts and settings at the same time; None: all. A kernel of cuBLAS may fail where
    processes share a GPU (docs/kernels.md)."""
    seed: int = 0
    output: Annotated[Path, arg(metavar="DIR")] = Path(__file__).parent / "results" / "quality"


def lserve(pattern: str, **changes: object) -> str:
    """LServe's own policy, the default of the first four parts, with some keys changed."""
    keys = {"shares": "none", "fraction": 0.5, "budget": 2048, "page": 64, "logical": 16}
    return setting(pattern, **{**keys, "interval": 4, **changes})


def setting(pattern: str, **changes: object) -> str:
    """``SparsityConfig``'s defaults with a pattern, and some keys changed."""
    keys = {"pattern": pattern, **changes}
    return "lserve:" + ",".join(f"{key}={value}" for key, value in keys.items())


def head_settings(pattern: str) -> list[str]:
    # Last: no head streams.
    return ["dense", *patterns(pattern), "lserve:budget=2048,page=64,logical=16,interval=4"]


def page_settings(pattern: str) -> list[str]:
    return [
        "dense",
        lserve(pattern),
        *(lserve(pattern, budget=budget) for budget in BUDGETS),
        lserve(pattern, page=16),
        lserve(pattern, selected=64),  # whole pages, as published
        *(lserve(pattern, interval=interval) for interval in INTERVALS),
        lserve(pattern, lower=0),  # the papers' score: the upper bound alone
    ]


def share_settings(pattern: str) -> list[str]:
    return [
        "dense",
        setting(pattern, shares="none", budget=2048),  # LServe's own
        setting(pattern),  # the default
        setting(pattern, share=0.0625),
        setting(pattern, dense_heads=4, budget=2048),
        setting(pattern, fraction=0),
        setting(pattern, fraction=0.5),
    ]


def prefill_settings(pattern: str) -> list[str]:
    blocks = {"prefill": "block_sparse"}
    return [
        setting(pattern),
        *(setting(pattern, **blocks, prefill_threshold=threshold) for threshold in THRESHOLDS),
    ]


def patterns(pattern: str) -> list[str]:
    """The pattern and its controls, at both fractions; the default first."""
    controls = ({}, {"control": "random"}, {"control": "inverted"})
    return [lserve(pattern, fraction=f, **control) for f in (0.5, 0.33) for control in controls]


def studies(args: Args) -> list[Study]:
    """All runs: one of each part, and one of each setting of parts shares, prefill and keys."""
    command = f"python benchmarks/quality.py {' '.join(sys.argv[1:])}"
    common = {"model": args.model, "lengths": args.lengths, "seed": args.seed, "options": OPTIONS}
    needles = {"tasks": ("needle",), "haystacks": args.haystacks, "plot": True, "resume": True}
    of_part = {
        "heads": {"compare": head_settings(args.pattern), **needles},
        "pages": {"compare": page_settings(args.pattern), **needles},
        "text": {
            "tasks": ("perplexity", "agreement"),
            "compare": ["dense", *patterns(args.pattern)],
        },
        "ruler": {
            "tasks": ("ruler",),
            "compare": ["dense", lserve(args.pattern)],
            "haystacks": args.ruler_haystacks,
            "plot": True,
            "resume": True,
        },
    }
    runs = [
        Study(command=command, output=args.output / part, **common, **of_part[part])
        for part in args.parts
        if part in of_part
    ]
    by_setting = {
        "shares": {"texts": ("documentation", "stories"), "haystacks": args.share_haystacks},
        "prefill": {
            "texts": ("stories",),
            "haystacks": args.prefill_haystacks,
            "lengths": args.prefill_lengths,
            "windows": 16,
        },
        "keys": {
            "texts": ("stories",),
            "haystacks": args.keys_haystacks,
            "tasks": ("ruler",),
            "ruler_tasks": ("niah_single", "niah_multikey", "niah_multiquery"),
        },
    }
    both = {"tasks": ("needle", "ruler", "perplexity"), "ruler_tasks": ("niah_multikey",)}
    for part, names in settings_apart(args).items():
        runs += [
            Study(
                command=command,
                output=args.output / part / "settings" / str(number),
                depths=5,
                compare=[name],
                resume=True,
                **common | both | by_setting[part],
            )
            for number, name in enumerate(names)
        ]
    return runs


def settings_apart(args: Args) -> dict[Part, list[str]]:
    """Of the parts whose settings run in processes of their own, those settings."""
    every: dict[Part, list[str]] = {
        "shares": share_settings(args.pattern),
        "prefill": prefill_settings(args.pattern),
        "keys": ["dense", setting(args.pattern)],
    }
    return {part: names for part, names in every.items() if part in args.parts}


def together(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several that differ in their settings alone, in their order."""
    whole = dict(results[0])
    for name in ("settings", "heads", "seconds"):
        whole[name] = {key: value for result in results for key, value in result[name].items()}
    for name in ("answers", "predictions"):
        whole[name] = [row for result in results for row in result[name]]
    return whole


def run(study: Study) -> dict[str, Any]:
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jit"))
    result = run_study(study, progress=False)
    print(f"{study.output}: {sum(result['seconds'].values()):.0f} s", flush=True)
    return result


def main(args: Args) -> None:
    if not args.parts or len(set(args.parts)) < len(args.parts):
        raise ValueError(f"--parts {' '.join(args.parts)} must name parts, each of them once")
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes {args.processes} must be at least 1")
    runs = studies(args)  # all of them checked before the first runs
    begin = time.perf_counter()
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # the processes share the GPU
    most = min(args.processes or len(runs), len(runs))
    # A process for each run: its memory is given back when it ends.
    pool = multiprocessing.get_context("spawn").Pool(most, maxtasksperchild=1)
    with pool as processes:
        results = processes.map(run, runs, chunksize=1)
    apart = settings_apart(args)
    at = len(runs) - sum(map(len, apart.values()))
    for part, names in apart.items():
        of_part = together(results[at : at + len(names)])
        report.write(args.output / part, of_part, plots=part == "prefill")
        at += len(names)
    print(f"all: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main(tyro.cli(Args))
