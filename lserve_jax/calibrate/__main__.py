"""A head pattern for a model: ``python -m lserve_jax.calibrate --model MODEL --output DIR``.

Trains a gate for every KV head (``gates.py``) on passkeys hidden in text (``passkeys.py``)
and writes DuoAttention's two files, which ``--pattern DIR`` reads, and a picture of the gates.

With ``--head-shares`` it measures what each KV head is worth to the output (``sensitivity.py``),
fits to it how much of the context each reads, and writes both beside the gates, with a picture.

A run that was stopped continues when its command is given again. ``docs/calibration.md`` has the
recipes and what they cost.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends it, no traceback

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Float
from tqdm import tqdm
from tyro.conf import DisallowNone, OmitArgPrefixes, arg

import convert
from convert.attention_patterns import GATES_FILE, save_pattern
from convert.head_shares import SHARES_FILE, save_head_shares
from convert.tokenizers import load_tokenizer
from lserve_jax.analysis import require_matplotlib
from lserve_jax.calibrate.checkpoint import read_checkpoint, write_checkpoint
from lserve_jax.calibrate.gates import (
    GateState,
    GateTraining,
    HeadGates,
    History,
    initial_state,
    train_gates,
)
from lserve_jax.calibrate.layers import refuse_unlike_layers, stack_layers
from lserve_jax.calibrate.passkeys import PasskeySamples, PasskeySettings, builtin_text
from lserve_jax.calibrate.pictures import plot_gates, plot_head_shares
from lserve_jax.calibrate.sensitivity import (
    Measured,
    Measurement,
    combine,
    measure_heads,
    nothing_measured,
    passes,
)
from lserve_jax.calibrate.windows import measured_sequences
from lserve_jax.cli import Switch, exit_code, flag, keep_compiled, read_text
from lserve_jax.engine.options import check_backend, resolve_dtype
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.head_shares import HeadSensitivity, fit_shares
from lserve_jax.tokenizer import Tokenizer

CHECKPOINT = "checkpoint.npz"
SHARES_CHECKPOINT = "head_shares_checkpoint.npz"


# Help texts stay within two lines each: tyro breaks longer ones in odd places.
@dataclass(frozen=True, kw_only=True)
class CalibrateArgs:
    """Find out which KV heads of a model need the whole context.

    Writes a head pattern for --attention lserve, and gates.png; with --head-shares instead how
    much of the context each head reads, beside a pattern or alone, and head_shares.png.
    """

    model: str = "smollm2-135m-instruct"
    """Alias, checkpoint directory, .gguf file or Hugging Face id."""
    output: Annotated[Path, arg(metavar="DIR")]
    """Where to write. A run that stopped there with the same settings is continued."""
    text: Annotated[Path | None, flag("FILE", "Python's reference manual")] = None
    """Text to hide passkeys in (UTF-8)."""
    samples: OmitArgPrefixes[PasskeySettings] = field(default_factory=PasskeySettings)
    """Lengths are in tokens; with --head-shares --context and --window set them."""
    training: OmitArgPrefixes[GateTraining] = field(default_factory=GateTraining)
    """Of the gates. The defaults are DuoAttention's."""
    head_shares: Switch = False
    """Measure what each head is worth, and fit shares of the context to it; train no gates."""
    measurement: OmitArgPrefixes[Measurement] = field(default_factory=Measurement)
    """With --head-shares. Sizes are in tokens."""
    budget_share: float = 0.125
    """With --head-shares: share of the context that heads read, their mean."""
    heads_per_pass: int = 8
    """With --head-shares: so many heads are measured together; fewer need less memory."""

    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        flag("{float32,bfloat16}", "bfloat16 on a GPU, float32 on a CPU"),
    ] = None
    """Type of weights and arithmetic."""
    backend: Literal["auto", "mosaic", "reference"] = "auto"
    """mosaic: kernels for Hopper GPUs; reference: plain JAX; auto: the kernels where they run."""
    cache: Annotated[bool, flag("", "kept")] = True
    """Keep compiled programs for the next start, or compile anew and keep nothing."""
    save_every: int = 50
    """Steps between two checkpoints of the training."""
    no_plot: Switch = False
    """Do not draw a picture, which needs matplotlib."""


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
    write_checkpoint(path, settings, {"history": history, **leaves})


def load_checkpoint(
    path: Path, settings: Mapping[str, Any], like: GateState
) -> tuple[GateState, Float[np.ndarray, "steps 2"]]:
    """The state and history that ``save_checkpoint`` wrote.

    Raises ``ValueError`` if the file is none of ours or was written with other settings; the
    message names each that differs.
    """
    leaves, tree = jax.tree.flatten(like)
    names = [f"leaf_{i}" for i in range(len(leaves))]
    history, *arrays = read_checkpoint(path, settings, ["history", *names])
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
        **_machine(),
    }
    save_pattern(directory, gates, record)


def _machine() -> dict[str, str]:
    return {"jax": jax.__version__, "device": jax.devices()[0].device_kind}


def _check_output(directory: Path, *ours: str) -> None:
    """Nothing but what this program wrote may lie there: one of the files ``ours`` does, if any."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output {str(directory)!r} is not a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not any((directory / name).is_file() for name in ours):
        raise ValueError(
            f"output {str(directory)!r} holds files but no {' or '.join(ours)}: "
            "give a new or empty directory, or one whose run to continue"
        )


class _Inputs(NamedTuple):
    """What both kinds of run read before the weights."""

    dtype: jnp.dtype
    text: str
    source: convert.ModelSource
    tokenizer: Tokenizer
    config: ModelConfig
    settings: dict[str, Any]  # what they add to those of the run


def _read_inputs(args: CalibrateArgs) -> _Inputs:
    check_backend(args.backend)
    dtype = jnp.dtype(resolve_dtype(args.dtype))
    text = builtin_text() if args.text is None else read_text(args.text, "text file")
    source = convert.resolve(args.model, progress=True)
    tokenizer = load_tokenizer(source.path, required=True)
    config = convert.read_config(source)
    settings = {
        "model_name": args.model,
        "dtype": dtype.name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    return _Inputs(dtype, text, source, tokenizer, config, settings)


def calibrate(args: CalibrateArgs) -> HeadGates:
    """Runs the calibration that ``args`` describe, writes its files, and returns the gates.

    Raises ``ValueError`` for settings that contradict each other, the model, the text or the run
    to be continued, before the weights are read, and ``FloatingPointError`` once a loss is not
    finite.
    """
    if args.save_every < 1:
        raise ValueError(f"save_every={args.save_every} must be at least 1")
    if not args.no_plot:
        require_matplotlib()
    _check_output(args.output, CHECKPOINT, SHARES_CHECKPOINT)
    inputs = _read_inputs(args)
    config = inputs.config
    samples = PasskeySamples(inputs.tokenizer, inputs.text, args.samples)
    limit = config.context_length
    if args.samples.max_length > limit:
        raise ValueError(
            f"max_length={args.samples.max_length} exceeds the {limit} tokens of {args.model}"
        )

    settings = {**inputs.settings, **asdict(args.samples), **asdict(args.training)}
    state, history = initial_state(config, args.training), np.zeros((0, 2))
    checkpoint = args.output / CHECKPOINT
    if checkpoint.is_file():
        state, history = load_checkpoint(checkpoint, settings, state)
    _, params = convert.load(inputs.source, dtype=inputs.dtype, progress=True)
    params = stack_layers(params)  # under the same name: the layers should not exist twice
    args.output.mkdir(parents=True, exist_ok=True)
    steps = args.training.steps

    with tqdm(total=steps, initial=len(history), desc="gates", unit="step") as bar:

        def on_step(state: GateState, history: History) -> None:
            distillation, mean_gate = history[-1]
            bar.set_postfix(loss=f"{distillation:.3g}", mean_gate=f"{mean_gate:.3f}", refresh=False)
            bar.update()
            if len(history) % args.save_every == 0 or len(history) == steps:
                save_checkpoint(checkpoint, settings, state, np.array(history))

        trained = train_gates(
            config,
            params,
            samples,
            args.training,
            backend=args.backend,
            state=state,
            history=history.tolist(),
            on_step=on_step,
        )
    write_pattern(args.output, trained.gates, settings)
    if not args.no_plot:
        plot_gates(trained, args.output / "gates.png")
    return trained


def calibrate_head_shares(
    args: CalibrateArgs,
) -> tuple[HeadSensitivity, Float[np.ndarray, "L Hk"]]:
    """Measures the heads as ``args`` describe, fits shares, writes both and returns them.

    ``--budget-share`` and ``--heads-per-pass`` may differ from those of a run that is continued:
    a finished one is fitted anew, and nothing is measured. Raises what ``calibrate`` raises.
    """
    if args.heads_per_pass < 1:
        raise ValueError(f"heads_per_pass={args.heads_per_pass} must be at least 1")
    if not 0.0 < args.budget_share <= 1.0:
        raise ValueError(f"budget_share={args.budget_share} must lie in (0, 1]")
    if not args.no_plot:
        require_matplotlib()
    _check_output(args.output, CHECKPOINT, SHARES_CHECKPOINT, GATES_FILE, SHARES_FILE)
    inputs, measurement = _read_inputs(args), args.measurement
    config = inputs.config
    refuse_unlike_layers(config)
    if measurement.length > config.context_length:
        raise ValueError(
            f"context={measurement.context} and window={measurement.window} exceed the "
            f"{config.context_length} tokens of {args.model}"
        )
    sequences = measured_sequences(inputs.tokenizer, inputs.text, args.samples, measurement)

    settings = {**inputs.settings, **asdict(args.samples), **asdict(measurement)}
    for name in ("max_length", "num_lengths"):  # the measurement's are used
        del settings[name]
    before = nothing_measured(config)
    checkpoint = args.output / SHARES_CHECKPOINT
    if checkpoint.is_file():
        before = Measured(*read_checkpoint(checkpoint, settings, Measured._fields))
        if before.losses.shape[2:] != nothing_measured(config).losses.shape[2:]:
            raise ValueError(f"{checkpoint} is of a model with another number of layers or heads")
    args.output.mkdir(parents=True, exist_ok=True)
    if len(before.losses) == len(sequences):  # nothing to measure, no weights to read
        sensitivity = combine(*before, name=args.model, context=measurement.context)
    else:
        _, params = convert.load(inputs.source, dtype=inputs.dtype, progress=True)
        params = stack_layers(params)  # under the same name: the layers should not exist twice
        each = len(passes(config, args.heads_per_pass))
        total, initial = each * len(sequences), each * len(before.losses)
        with tqdm(total=total, initial=initial, desc="heads", unit="pass") as bar:
            sensitivity = measure_heads(
                config,
                params,
                measurement,
                sequences,
                heads_per_pass=args.heads_per_pass,
                backend=args.backend,
                name=args.model,
                before=before,
                on_pass=bar.update,
                on_sequence=lambda done: write_checkpoint(checkpoint, settings, done._asdict()),
            )
    shares = fit_shares(sensitivity, args.budget_share)
    record = {"budget_share": args.budget_share, **settings, **_machine()}
    save_head_shares(args.output, sensitivity, shares, record)
    if not args.no_plot:
        plot_head_shares(sensitivity, shares, args.output / "head_shares.png")
    return sensitivity, shares


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's); returns the exit code."""

    def run() -> None:
        prog = "python -m lserve_jax.calibrate"
        args = tyro.cli(CalibrateArgs, args=argv, prog=prog, config=(DisallowNone,))
        keep_compiled(args.cache)
        if args.head_shares:
            sensitivity, shares = calibrate_head_shares(args)
            worth = sensitivity.worth
            layer, head = np.unravel_index(worth.argmax(), worth.shape)
            print(
                f"{shares.size} KV heads: {(shares == 1).sum()} read everything, mean share "
                f"{shares.mean():.3f}; worth most: layer {layer}, head {head} "
                f"({worth.max():.3g} of {worth.sum():.3g} nats)"
            )
            return
        gates = calibrate(args).gates
        print(
            f"{gates.size} KV heads: mean gate {gates.mean():.3f}, {(gates < 0.5).sum()} below "
            f"0.5; use it with --attention lserve --pattern {args.output}"
        )

    return exit_code(run, lower="--max-length, or with --head-shares --context or --heads-per-pass")


if __name__ == "__main__":
    sys.exit(main())
