"""The whole quality study: one factor at a time around a default, in one command.

    python benchmarks/quality.py --pattern SmolLM2-135M-Instruct-32k

Three parts, each a run of ``lserve_jax.eval`` with a directory of its own below ``--output``:

    needles   passkeys and sentences; head patterns and their controls, budgets, page sizes, reuse
    text      perplexity and agreement with dense by position, head patterns and their controls
    ruler     RULER's tasks, dense and the default

A part that was cut short goes on where it stopped (needles, ruler); finished settings are not run
again.

What it costs, with SmolLM2-135M and the defaults. ``needles``: 15 settings x 4 lengths x 26
haystacks of 8 prompts. If the engine reads the haystack that a group of prompts shares once, a
setting reads 1.6 million tokens of about 1 GFLOP each (0.2 in the linear layers, 0.8 in attention
at these lengths) and decodes 416 groups of about 20 steps: near 15 s of an H200 at a tenth of its
peak, and 25 s for compiling. Without shared prefixes reading takes eight times as long. ``text``
reads 0.24 million tokens a setting, ``ruler`` 2.1 million. Chunks of 4096 tokens divide every
length, so a setting compiles few shapes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from tyro.conf import arg

from convert.artefacts import cache_directory
from lserve_jax.eval.study import Study, run_study

BUDGETS = (512, 1024, 4096)
INTERVALS = (1, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure what sparsity costs in quality, one factor at a time."""

    pattern: Annotated[str, arg(metavar="NAME")]
    """Calibrated head pattern of the model: a shipped name or a directory."""
    model: str = "smollm2-135m-instruct-32k"
    parts: tuple[Literal["needles", "text", "ruler"], ...] = ("needles", "text", "ruler")
    lengths: tuple[int, ...] = (4096, 8192, 16384, 31744)
    """Prompt lengths in tokens; multiples of 1024 below the model's limit."""
    haystacks: int = 13
    """Part needles: for each length and kind of needle, with 8 prompts each."""
    ruler_haystacks: int = 5
    """Part ruler: for each length and task."""
    seed: int = 0
    output: Annotated[Path, arg(metavar="DIR")] = Path(__file__).parent / "results" / "quality"


def lserve(pattern: str, **changes: object) -> str:
    """The default setting of the study with some keys changed."""
    keys = {"pattern": pattern, "fraction": 0.5, "budget": 2048, "page": 64, "logical": 16}
    keys = {**keys, "interval": 4, **changes}
    return "lserve:" + ",".join(f"{key}={value}" for key, value in keys.items())


def needle_settings(pattern: str) -> list[str]:
    return [
        "dense",
        lserve(pattern),
        "lserve:budget=2048,page=64,logical=16,interval=4",  # selection alone: no head streams
        *patterns(pattern)[1:],
        *(lserve(pattern, budget=budget) for budget in BUDGETS),
        lserve(pattern, page=16),
        *(lserve(pattern, interval=interval) for interval in INTERVALS),
    ]


def patterns(pattern: str) -> list[str]:
    """The pattern and its controls, at both fractions; the default first."""
    controls = ({}, {"control": "random"}, {"control": "inverted"})
    return [lserve(pattern, fraction=f, **control) for f in (0.5, 0.33) for control in controls]


def studies(args: Args) -> list[Study]:
    command = f"python benchmarks/quality.py {' '.join(sys.argv[1:])}"
    common = {"model": args.model, "lengths": args.lengths, "seed": args.seed, "plot": True}
    of_part = {
        "needles": {
            "tasks": ("needle",),
            "compare": needle_settings(args.pattern),
            "haystacks": args.haystacks,
            "resume": True,
        },
        "text": {
            "tasks": ("perplexity", "agreement"),
            "compare": ["dense", *patterns(args.pattern)],
        },
        "ruler": {
            "tasks": ("ruler",),
            "compare": ["dense", lserve(args.pattern)],
            "haystacks": args.ruler_haystacks,
            "resume": True,
        },
    }
    return [
        Study(command=command, output=args.output / part, **common, **of_part[part])
        for part in args.parts
    ]


def main(args: Args) -> None:
    runs = studies(args)  # all of them checked before the first runs
    jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "jit"))
    for study in runs:
        result = run_study(study, progress=True)
        print(f"{study.output}: {sum(result['seconds'].values()):.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
