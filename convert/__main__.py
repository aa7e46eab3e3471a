"""``python -m convert SRC DST``: any checkpoint to an Orbax or a Hugging Face checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import convert
from convert.orbax import require_empty
from convert.stream import parse_dtype
from lserve_jax.cli import exit_code


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a checkpoint in Orbax or Hugging Face format, with its tokenizer beside it."""

    # Alias, Hugging Face or Orbax directory, .gguf file, or Hugging Face id.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    # Directory to write; must be new or empty.
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    # orbax restores into a sharding; safetensors is what transformers and vLLM read.
    format: Literal["orbax", "safetensors"] = "orbax"
    # float32, bfloat16 or float16; the checkpoint's own if not given.
    dtype: str | None = None
    # Directory of a PEFT LoRA adapter to merge.
    adapter: Path | None = None


def _convert(argv: Sequence[str] | None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m convert", args=argv)
    # Before any work: loading may take minutes.
    require_empty(arguments.destination)
    if arguments.dtype is not None:
        parse_dtype(arguments.dtype)
    source = convert.resolve(arguments.source, progress=True)
    config, params = convert.load(
        source, dtype=arguments.dtype, adapter=arguments.adapter, progress=True
    )
    write = convert.save if arguments.format == "orbax" else convert.export_hf
    write(arguments.destination, config, params, tokenizer_from=source.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 for whatever the caller can mend."""
    return exit_code(lambda: _convert(argv), lower="the width of the numbers (--dtype)")


if __name__ == "__main__":
    sys.exit(main())
