"""A head pattern for a model: ``python -m lserve_jax.calibrate --model MODEL --output DIR``.

Trains a gate for every KV head (``gates.py``) on passkeys hidden in text (``passkeys.py``)
and writes DuoAttention's two files, which ``--pattern DIR`` reads, and a picture of the gates. A
run that was stopped continues when its command is given again. ``docs/calibration.md`` has the
recipe and what it costs.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import hashlib
import json
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float
from tqdm import tqdm
from tyro.conf import DisallowNone, OmitArgPrefixes, arg

import convert
from convert.attention_patterns import save_pattern
from convert.tokenizers import load_tokenizer
from lserve_jax.analysis import require_matplotlib
from lserve_jax.calibrate.gates import (
    GateState,
    GateTraining,
    StepLoss,
    initial_state,
    train_gates,
)
from lserve_jax.calibrate.layers import stack_layers
from lserve_jax.calibrate.passkeys import PasskeySamples, PasskeySettings, builtin_text
from lserve_jax.cli import Switch, exit_code, flag, read_text
from lserve_jax.engine.build import check_backend, resolve_dtype

CHECKPOINT = "checkpoint.npz"


# Help texts stay within two lines each: tyro breaks longer ones in odd places.
@dataclass(frozen=True, kw_only=True)
class CalibrateArgs:
    """Find out which KV heads of a model need the whole context.

    Writes a head pattern for --attention lserve, and gates.png.
    """

    model: str = "smollm2-135m-instruct"
    """Alias, checkpoint directory, .gguf file or Hugging Face id."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Where to write. A run that stopped there with the same settings is continued."""
    text: Annotated[Path | None, flag("FILE", "Python's reference manual")] = None
    """Text to hide passkeys in (UTF-8)."""
    samples: OmitArgPrefixes[PasskeySettings] = field(default_factory=PasskeySettings)
    """Lengths are in tokens."""
    training: OmitArgPrefixes[GateTraining] = field(default_factory=GateTraining)
    """The defaults are DuoAttention's."""

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        flag("{float32,bfloat16}", "bfloat16 on a GPU, float32 on a CPU"),
    ] = None
    """Type of weights and arithmetic."""
    backend: Literal["auto", "mosaic", "reference"] = "auto"
    """mosaic: kernels for Hopper GPUs; reference: plain JAX; auto: the kernels where they run."""
    save_every: int = 50
    """Steps between two checkpoints of the training."""
    no_plot: Switch = False
    """Do not draw gates.png, which needs matplotlib."""


def save_checkpoint(
    path: Path,
    settings: Mapping[str, Any],
    state: GateState,
    history: Float[np.ndarray, "steps 2"],
) -> None:
    """Replaces the file at ``path`` at once: what lies there is whole at any time.

    history: distillation loss and mean gate of every step done. Samples are a function of the
    step, so no random state is kept.
    """
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            settings=np.array(json.dumps(settings)),
            history=history,
            **leaves,
        )
    os.replace(temporary, path)


def load_checkpoint(
    path: Path, settings: Mapping[str, Any], like: GateState
) -> tuple[GateState, Float[np.ndarray, "steps 2"]]:
    """The state and history that ``save_checkpoint`` wrote.

    Raises ``ValueError`` if the file is none of ours or was written with other settings; the
    message names each that differs.
    """
    leaves, tree = jax.tree.flatten(like)
    try:
        with path.open("rb") as file, np.load(file) as contents:
            saved = json.loads(str(contents["settings"]))
            arrays = [contents[f"leaf_{i}"] for i in range(len(leaves))]
            history = contents["history"]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a checkpoint of this program: {error}") from error
    differing = [
        f"{name} was {saved.get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path.parent} holds a run with other settings: {'; '.join(differing)}; "
            "give those it began with, or another output directory"
        )
    if [array.shape for array in arrays] != [leaf.shape for leaf in leaves]:
        raise ValueError(f"{path} is of a model with another number of layers or KV heads")
    return jax.tree.unflatten(tree, [jnp.asarray(array) for array in arrays]), history


def write_pattern(
    directory: Path, gates: Float[np.ndarray, "L Hk"], settings: Mapping[str, Any]
) -> None:
    """Writes the gates and the settings they were trained with."""
    # DuoAttention's names for what its and our readers look up.
    record = {
        **settings,
        "sink_size": settings["sink"],
        "recent_size": settings["recent"],
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    save_pattern(directory, gates, record)


def plot_gates(
    gates: Float[np.ndarray, "L Hk"], history: Float[np.ndarray, "steps 2"], path: Path
) -> None:
    """Writes a PNG: the gates as a heat map, and how loss and mean gate went.

    Raises ``ValueError`` if matplotlib (extra ``plot``) is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # not at the top: an optional dependency

    figure = Figure(figsize=(11, 4), layout="constrained")
    heat, curve = figure.subplots(1, 2, width_ratios=[3, 2])
    image = heat.imshow(gates.T, aspect="auto", origin="lower", vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, ax=heat, label="gate")
    heat.set(xlabel="layer", ylabel="KV head", title="1: needs the whole context")
    heat.set_yticks(range(gates.shape[1]))
    steps = np.arange(1, len(history) + 1)
    curve.plot(steps, history[:, 1], color="tab:green", label="mean gate")
    curve.set(xlabel="step", ylabel="mean gate", ylim=(0, 1.02))
    losses = curve.twinx()
    losses.plot(steps, history[:, 0], color="tab:gray", linewidth=0.7, label="distillation loss")
    losses.set(ylabel="distillation loss")
    figure.legend(loc="outside upper right", fontsize="small", ncols=2)
    figure.savefig(path, dpi=130)


def _check_output(directory: Path) -> None:
    """Nothing but a run of this program may lie there."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output {str(directory)!r} is not a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CHECKPOINT).is_file():
        raise ValueError(
            f"output {str(directory)!r} holds files but no {CHECKPOINT}: "
            "give a new or empty directory, or one whose run to continue"
        )


def calibrate(args: CalibrateArgs) -> Float[np.ndarray, "L Hk"]:
    """Runs the calibration that ``args`` describe, writes its files, and returns the gates.

    Raises ``ValueError`` for settings that contradict each other, the model, the text or the run
    to be continued, before the weights are read, and ``FloatingPointError`` once a loss is not
    finite.
    """
    if args.save_every < 1:
        raise ValueError(f"save_every={args.save_every} must be at least 1")
    if not args.no_plot:
        require_matplotlib()
    _check_output(args.output)
    check_backend(args.backend)
    dtype = resolve_dtype(args.dtype)
    text = builtin_text() if args.text is None else read_text(args.text, "text file")
    source = convert.resolve(args.model, progress=True)
    tokenizer = load_tokenizer(source.path, required=True)
    assert tokenizer is not None  # required
    samples = PasskeySamples(tokenizer, text, args.samples)
    config = convert.read_config(source)
    limit = config.context_length
    if args.samples.max_length > limit:
        raise ValueError(
            f"max_length={args.samples.max_length} exceeds the {limit} tokens of {args.model}"
        )

    settings = {
        "model_name": args.model,
        "dtype": jnp.dtype(dtype).name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **asdict(args.samples),
        **asdict(args.training),
    }
    state, history = initial_state(config, args.training), np.zeros((0, 2))
    checkpoint = args.output / CHECKPOINT
    if checkpoint.is_file():
        state, history = load_checkpoint(checkpoint, settings, state)
    _, params = convert.load(source, dtype=dtype, progress=True)
    params = stack_layers(params)  # under the same name: the layers should not exist twice
    args.output.mkdir(parents=True, exist_ok=True)
    losses = history.tolist()
    steps = args.training.steps

    with tqdm(total=steps, initial=len(losses), desc="gates", unit="step") as bar:

        def on_step(done: int, state: GateState, loss: StepLoss) -> None:
            distillation, mean_gate = float(loss.distillation), float(loss.mean_gate)
            losses.append([distillation, mean_gate])
            bar.set_postfix(loss=f"{distillation:.3g}", mean_gate=f"{mean_gate:.3f}", refresh=False)
            bar.update()
            if done % args.save_every == 0 or done == steps:
                save_checkpoint(checkpoint, settings, state, np.array(losses))

        gates = train_gates(
            config,
            params,
            samples,
            args.training,
            backend=args.backend,
            start=len(losses),
            state=state,
            on_step=on_step,
        )
    write_pattern(args.output, gates, settings)
    if not args.no_plot:
        plot_gates(gates, np.array(losses), args.output / "gates.png")
    return gates


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's); returns the exit code."""

    def run() -> None:
        prog = "python -m lserve_jax.calibrate"
        args = tyro.cli(CalibrateArgs, args=argv, prog=prog, config=(DisallowNone,))
        gates = calibrate(args)
        print(
            f"{gates.size} KV heads: mean gate {gates.mean():.3f}, {(gates < 0.5).sum()} below "
            f"0.5; use it with --attention lserve --pattern {args.output}"
        )

    return exit_code(run, lower="--max-length")


if __name__ == "__main__":
    sys.exit(main())
