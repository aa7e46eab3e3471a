"""Quality from the shell: ``python -m lserve_jax.eval --compare dense lserve:budget=1024 …``.

Tables go to stdout and, with everything else, to the output directory; progress and errors go to
stderr. A mistake of the caller's ends with one sentence and exit code 2.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro
from tyro.conf import DisallowNone, arg

from lserve_jax.cli import Switch, exit_code, flag, keep_compiled
from lserve_jax.eval.model import SharedOptions
from lserve_jax.eval.needle import NeedleKind
from lserve_jax.eval.report import markdown
from lserve_jax.eval.ruler import RulerTask
from lserve_jax.eval.study import Study, Task, run_study


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Compare attention settings on the same prompts: needles, RULER, perplexity, agreement.

    A setting is dense, lserve, or lserve:key=value,... with the keys budget or share, page,
    logical, selected, lower, interval, pattern, fraction, shares, dense_heads, control (inverted
    or random), prefill (causal or block_sparse), prefill_threshold, prefill_density,
    prefill_min_tokens, prefill_sink, prefill_local, decode_sink, decode_local, exact (drafts by
    sparse steps or ngram) and prefill_dtype (int8 or fp8, with dense too); docs/quality.md explains
    tasks and settings.
    """

    model: str = "smollm2-135m-instruct-32k"
    """Alias, checkpoint directory, .gguf file or Hugging Face id."""
    tasks: tuple[Task, ...] = ("needle",)
    """What to run."""
    compare: Annotated[tuple[str, ...], arg(metavar="SETTING SETTING ...")] = ("dense", "lserve")
    """Settings to run side by side; the others are compared with the first."""
    lengths: tuple[int, ...] = (2048, 4096)
    """Tokens of a prompt, chat template included, or of a window of text."""
    output: Annotated[Path, arg(metavar="DIR")] = Path("eval")
    """Directory for results.json, results.md and pictures."""
    plot: Switch = False
    """Draw heat maps (length by depth) and score against budget; needs the extra plot."""
    resume: Switch = False
    """Skip settings that an earlier run of the same study has finished in the output directory."""

    text: Annotated[tuple[str, ...], arg(metavar="TEXT TEXT ...")] = ("documentation",)
    """Texts that facts are hidden in: documentation (Python's language reference), stories (made
    up), neutral (one paragraph repeated), or a file in UTF-8. Every task runs on each of them."""
    chat: Annotated[bool | None, flag("", "chat if the model has a template")] = None
    """Ask through the model's chat template, or without."""
    haystacks: int = 2
    """Haystacks for each text, task and length."""
    depths: int = 8
    """Task needle: facts hidden in a haystack, at even depths; each makes one prompt."""
    needles: tuple[NeedleKind, ...] = get_args(NeedleKind)
    """Task needle: which kinds of facts."""
    ruler_tasks: tuple[RulerTask, ...] = get_args(RulerTask)
    """Task ruler: which of its tasks."""
    windows: int = 4
    """Tasks perplexity and agreement: windows, spread evenly over each text."""
    scored_tokens: int = 256
    """Tasks perplexity and agreement: tokens predicted at the end of each length."""
    rope_extend: Switch = False
    """Stretch rotary positions (YaRN) where lengths exceed the model's limit."""
    seed: int = 0
    """Same seed, same prompts and random controls."""

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        flag("{float32,bfloat16}", "bfloat16 on a GPU, float32 on a CPU"),
    ] = None
    """Type of weights and arithmetic."""
    kv_dtype: Literal["auto", "int8", "fp8", "int4"] = "auto"
    """Storage of keys and values: as --dtype, or quantised to 8 or 4 bits a number."""
    weights: Annotated[
        Literal["int8", "int4", "fp8", "checkpoint"] | None,
        flag("{int8,int4,fp8,checkpoint}", "as --dtype"),
    ] = None
    """Quantise weights at load, or keep a checkpoint's own codes."""
    weight_group: int = 32
    """With --weights int4: inputs that share a scale and a zero point, 32, 64 or 128."""
    kv_cache_bytes: Annotated[int | None, flag("INT", "2 GiB on a CPU, most of a GPU")] = None
    """Memory for the cached keys and values."""
    max_num_seqs: int = 8
    """Prompts that run at the same time."""
    backend: Literal["auto", "mosaic", "reference"] = "auto"
    """mosaic: kernels for Hopper GPUs; reference: plain JAX; auto: the kernels where they run."""
    cache: Annotated[bool, flag("", "kept")] = True
    """Keep compiled programs for the next start, or compile anew and keep nothing."""


def _study(args: EvalArgs, argv: Sequence[str]) -> Study:
    return Study(
        model=args.model,
        tasks=args.tasks,
        compare=args.compare,
        lengths=args.lengths,
        texts=args.text,
        needles=args.needles,
        ruler_tasks=args.ruler_tasks,
        haystacks=args.haystacks,
        depths=args.depths,
        windows=args.windows,
        scored_tokens=args.scored_tokens,
        chat=args.chat,
        rope_extend=args.rope_extend,
        seed=args.seed,
        output=args.output,
        plot=args.plot,
        resume=args.resume,
        command=f"python -m lserve_jax.eval {shlex.join(argv)}",
        options=SharedOptions(
            dtype=args.dtype,
            kv_dtype=args.kv_dtype,
            weights=args.weights,
            weight_group=args.weight_group,
            kv_cache_bytes=args.kv_cache_bytes,
            max_num_seqs=args.max_num_seqs,
            backend=args.backend,
            compilation_cache=keep_compiled(args.cache),
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's); returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        prog = "python -m lserve_jax.eval"
        args = tyro.cli(EvalArgs, args=argv, prog=prog, config=(DisallowNone,))
        study = _study(args, argv)
        print(markdown(run_study(study, progress=True)))

    return exit_code(run, lower="--lengths, --max-num-seqs or --kv-cache-bytes")


if __name__ == "__main__":
    sys.exit(main())
