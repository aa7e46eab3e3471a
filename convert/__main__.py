"""``python -m convert SRC DST``: any checkpoint to an Orbax or a Hugging Face checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import convert
from convert.names import flatten
from convert.orbax import require_empty, write
from convert.stream import parse_dtype
from lserve_jax.cli import exit_code
from lserve_jax.model.quantise import WeightForm, check_weights


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
    # Matrices, and an embedding table with an output layer beside it, as codes: rounded to int8,
    # int4 or fp8, or "checkpoint" for those of a quantised checkpoint as they are. Without it they
    # are floats; codes in Orbax format stay codes.
    weights: WeightForm | None = None
    # Inputs that share a scale and a zero point in int4: 32, 64 or 128.
    weight_group: Annotated[int, tyro.conf.arg(name="group")] = 32


def _convert(argv: Sequence[str] | None) -> None:
    arguments = tyro.cli(Arguments, prog="python -m convert", args=argv)
    # Before any work: loading may take minutes.
    require_empty(arguments.destination)
    if arguments.dtype is not None:
        parse_dtype(arguments.dtype)
    check_weights(arguments.weights, arguments.weight_group)
    if arguments.format == "safetensors" and arguments.weights is not None:
        raise ValueError(
            f"--weights {arguments.weights} with --format safetensors: codes are written in Orbax "
            "format only"
        )
    source = convert.resolve(arguments.source, progress=True)
    config, params = convert.load(
        source,
        dtype=arguments.dtype,
        adapter=arguments.adapter,
        weights=arguments.weights,
        weight_group=arguments.weight_group,
        progress=True,
    )
    if arguments.format == "safetensors":
        convert.export_hf(arguments.destination, config, params, tokenizer_from=source.path)
        return
    flat = flatten(params)
    del params  # codes are packed leaf by leaf, and must not be held twice
    write(arguments.destination, config, flat, tokenizer_from=source.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, 2 for whatever the caller can mend."""
    return exit_code(lambda: _convert(argv), lower="the width of the numbers (--dtype)")


if __name__ == "__main__":
    sys.exit(main())
