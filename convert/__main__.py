"""``python -m convert SRC DST``: any checkpoint to an Orbax checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import convert
from convert.orbax import require_empty
from convert.stream import parse_dtype


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write a checkpoint in Orbax format, with its tokenizer beside it."""

    # Alias, Hugging Face or Orbax directory, .gguf file, or Hugging Face id.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    # Directory to write; must be new or empty.
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    # float32, bfloat16 or float16; the checkpoint's own if not given.
    dtype: str | None = None
    # Directory of a PEFT LoRA adapter to merge.
    adapter: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 for whatever the caller can mend."""
    arguments = tyro.cli(Arguments, prog="python -m convert", args=argv)
    try:
        # Before any work: loading may take minutes.
        require_empty(arguments.destination)
        if arguments.dtype is not None:
            parse_dtype(arguments.dtype)
        source = convert.resolve(arguments.source, progress=True)
        config, params = convert.load(
            source, dtype=arguments.dtype, adapter=arguments.adapter, progress=True
        )
        convert.save(arguments.destination, config, params, tokenizer_from=source.path)
    except (ValueError, NotImplementedError, OSError, MemoryError) as error:
        print(f"error: {str(error) or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # what shells report for Ctrl-C
    return 0


if __name__ == "__main__":
    sys.exit(main())
