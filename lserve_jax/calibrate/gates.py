"""Head gates by distillation: which KV heads need the whole context (DuoAttention, arXiv
2410.10819, optimization-based identification of retrieval heads).

Every KV head gets a gate. The *teacher* is the model as it is. The *student* is the same frozen
model whose heads mix what full attention and what streaming attention make of a token:

    gate * full + (1 - gate) * streaming

Gates are trained so that the student's last hidden states stay near the teacher's where old
tokens must be recalled, while an L1 term pulls every gate down: a gate that stays up belongs to a
head that is needed. ``docs/calibration.md`` has the recipe, its memory and where we differ.

The full term is the teacher's attention output. So full attention is computed once and never
differentiated, and the prefill kernel, which has no gradient, can do it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Int32

from lserve_jax.calibrate.layers import (
    checked_tokens,
    full_attention,
    layer_weights,
    no_history,
    one_layer,
    refuse_unlike_layers,
    stack_layers,
)
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.linear import Stream
from lserve_jax.model.params import Attend, Params
from lserve_jax.model.rope import rotary_angles
from pallas_kernels import api
from pallas_kernels.api import Backend


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """How gates are trained; the defaults are DuoAttention's. Sizes are in tokens.

    Raises ``ValueError`` for a number out of its range.
    """

    steps: int = 2000
    """Steps of one sample each."""
    learning_rate: float = 0.02
    """Peak rate of AdamW (no weight decay)."""
    ramp: float = 0.2
    """Share of the steps in which the rate rises at the start, and again falls at the end."""
    ramp_floor: float = 0.1
    """Least rate, as a share of the peak."""
    regularization: float = 0.05
    """Weight of the mean gate in the loss: more of it makes more heads streaming heads."""
    initial_gate: float = 1.0
    """Where every gate starts."""
    sink: int = 128
    """First tokens of a sequence that a streaming head sees."""
    recent: int = 256
    """Newest tokens that it sees, the own one included."""

    def __post_init__(self):
        for name, least in (("steps", 1), ("sink", 0), ("recent", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        if not self.regularization >= 0.0:
            raise ValueError(f"regularization={self.regularization} must not be negative")
        if not 0.0 < self.ramp <= 0.5:
            raise ValueError(f"ramp={self.ramp} must lie in (0, 0.5]")
        for name in ("ramp_floor", "initial_gate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")


class Sample(NamedTuple):
    """One training sequence. The loss is taken at its end, from ``first_label`` on."""

    tokens: Int32[np.ndarray, " T"]
    first_label: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class GateState:
    """All that training changes; donated to the step that replaces it."""

    gates: Float[Array, "L Hk"]  # float32, in [0, 1]; KV heads in checkpoint order
    optimizer: optax.OptState


class StepLoss(NamedTuple):
    distillation: Float[Array, ""]  # squared distance of hidden states, mean over channels, labels
    mean_gate: Float[Array, ""]  # before the step's update


History = Sequence[Sequence[float]]  # of every step done: its loss and mean gate, as ``StepLoss``


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadGates:
    """Trained gates, and how the training went. KV heads are in checkpoint order."""

    gates: Float[np.ndarray, "L Hk"]  # float32, in [0, 1]; 1: the head needs the whole context
    history: Float[np.ndarray, "steps 2"]  # of every step: distillation loss, mean gate before it

    def table(self) -> dict[str, np.ndarray]:
        """One row a layer and KV head, as for a data frame: ``layer``, ``head``, ``gate``."""
        layer, head = (x.ravel() for x in np.indices(self.gates.shape))
        return {"layer": layer, "head": head, "gate": self.gates.ravel()}


def learning_rate(training: GateTraining, step: Int[Array, ""]) -> Float[Array, ""]:
    """Trapezoid: rises during the first ``ramp`` of the steps, falls during the last."""
    done, steps = step.astype(jnp.float32), training.steps
    nearest_end = jnp.minimum(done + 1, steps - done) / (training.ramp * steps)
    return training.learning_rate * jnp.clip(nearest_end, training.ramp_floor, 1.0)


def _optimizer(training: GateTraining) -> optax.GradientTransformation:
    return optax.adamw(partial(learning_rate, training), weight_decay=0.0)


def initial_state(config: ModelConfig, training: GateTraining) -> GateState:
    """All gates at their initial value.

    Raises ``NotImplementedError`` for a model with layers that differ: ``_hidden`` runs one layer
    with the weights of all.
    """
    refuse_unlike_layers(config)
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    gates = jnp.full(shape, training.initial_gate, jnp.float32)
    return GateState(gates=gates, optimizer=_optimizer(training).init(gates))


def streaming_attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B T Hk D"],
    v: Float[Array, "B T Hk D"],
    *,
    sink: int,
    recent: int,
) -> Float[Array, "B T H D"]:
    """Position i sees j <= i if ``j < sink`` or ``j > i - recent``; q and k are already rotated.

    Differentiable. Queries go in blocks of ``recent`` tokens, which together see two blocks of
    keys and the sinks: memory is H * T * (sink + 2 * recent) scores in float32, never T x T.
    """
    B, T, H, D = q.shape
    Hk, n = k.shape[2], -(-T // recent)
    after = n * recent - T
    q, k, v = (jnp.pad(x, ((0, 0), (0, after), (0, 0), (0, 0))) for x in (q, k, v))
    q = q.reshape(B, n, recent, Hk, H // Hk, D)
    sink_k, sink_v = k[:, :sink], v[:, :sink]

    def with_previous(x: Array) -> Array:  # [B, n, 2 * recent, Hk, D]
        blocks = x.reshape(B, n, recent, Hk, D)
        previous = jnp.pad(blocks, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]
        return jnp.concatenate([previous, blocks], axis=2)

    local_k, local_v = with_previous(k), with_previous(v)
    position = jnp.arange(n * recent).reshape(n, recent, 1)
    key = position[:, :1] - recent + jnp.arange(2 * recent)[None, None]  # [n, 1, 2 * recent]
    sees_local = (key >= 0) & (key <= position) & (key > position - recent)
    # A sink inside the window is a local key already.
    sees_sink = jnp.arange(sink_k.shape[1])[None, None] <= position - recent  # [n, recent, sink]
    visible = jnp.concatenate([sees_sink, sees_local], axis=2)[None, :, None, None]
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.concatenate(
        [
            jnp.einsum(equation, q, keys, precision=highest, preferred_element_type=jnp.float32)
            for equation, keys in (
                ("bnqkgd,btkd->bnkgqt", sink_k),
                ("bnqkgd,bntkd->bnkgqt", local_k),
            )
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(jnp.where(visible, scores * D**-0.5, -jnp.inf)).astype(v.dtype)
    sink_weights, local_weights = jnp.split(weights, [sink_k.shape[1]], axis=-1)
    out = jnp.einsum("bnkgqt,btkd->bnqkgd", sink_weights, sink_v, precision=highest)
    out += jnp.einsum("bnkgqt,bntkd->bnqkgd", local_weights, local_v, precision=highest)
    return out.reshape(B, n * recent, H, D)[:, :T]


def teacher_attend(config: ModelConfig, length: int, *, backend: Backend) -> Attend:
    """Causal attention over one sequence that hands its output on as the layer's cache.

    Memory is O(T). The output is the full term of ``blended_attend``.
    """
    positions = jnp.arange(length)[None]
    cos, sin = rotary_angles(config, positions, jnp.array([length]))

    def attend(layer: int, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, Array]:
        q, k = api.apply_rotary(q, cos, sin), api.apply_rotary(k, cos, sin)
        none = no_history(config, k.dtype)
        out = full_attention(q[0], k[0], v[0], none, 0, backend=backend)
        return out[None], out[None]

    return attend


def blended_attend(config: ModelConfig, length: int, *, sink: int, recent: int) -> Attend:
    """The student's attention: ``gate * full + (1 - gate) * streaming`` for every head.

    Its cache is the pair of the layer's gates ``[Hk]`` (float32) and the full term
    ``[B, T, H, D]``; it returns None in their place. Differentiable by the gates, by q, k and v.
    """
    positions = jnp.arange(length)[None]
    cos, sin = rotary_angles(config, positions, jnp.array([length]))

    def attend(
        layer: int, q: Array, k: Array, v: Array, cache: tuple[Array, Array]
    ) -> tuple[Array, None]:
        gates, full = cache
        q, k = api.apply_rotary(q, cos, sin), api.apply_rotary(k, cos, sin)
        streaming = streaming_attention(q, k, v, sink=sink, recent=recent)
        gate = jnp.repeat(gates, config.group_size)[None, None, :, None]
        # In float32: a bf16 gate near 1 has steps of 1/256, and ties would be many.
        blended = gate * full.astype(jnp.float32) + (1 - gate) * streaming.astype(jnp.float32)
        return blended.astype(q.dtype), None

    return attend


def _hidden(
    config: ModelConfig, stacked: Params, tokens: Int[Array, "1 T"], attend: Attend, caches: Any
) -> tuple[Float[Array, "1 T E"], Any]:
    """Last hidden states, as ``Llama`` computes them, and what ``attend`` returned, ``[L, ...]``.

    The layers run as one ``lax.scan``, so a new length compiles one layer and not L; in the
    backward pass a layer is computed anew from its input, the only thing kept of it.
    """

    def layer(x: Array, inputs: tuple[Params, Any]) -> tuple[Array, Any]:
        weights, cache = inputs
        module = one_layer(config, stacked, weights).layers[0]
        stream, cache = module(0, Stream(x), attend, cache, "reference")
        return stream.value, cache

    model = one_layer(config, stacked, layer_weights(stacked, 0))
    x, returned = jax.lax.scan(
        jax.checkpoint(layer, prevent_cse=False),  # a scan's body cannot be merged with its redo
        model.embed(tokens),
        (stacked["layers"], caches),
    )
    return model.norm(x), returned


def distillation_loss(
    config: ModelConfig,
    training: GateTraining,
    stacked: Params,
    gates: Float[Array, "L Hk"],
    tokens: Int[Array, " T"],
    first_label: Int[Array, ""],
    *,
    backend: Backend,
) -> Float[Array, ""]:
    """Squared distance of student and teacher in the last hidden states (after the final norm).

    Mean over channels and over the label tokens, positions ``first_label`` and later. Depends on
    ``gates`` differentiably. ``stacked`` is that of ``stack_layers``.
    """
    T = tokens.shape[0]
    teacher, full = _hidden(
        config, stacked, tokens[None], teacher_attend(config, T, backend=backend), None
    )
    student, _ = _hidden(
        config,
        stacked,
        tokens[None],
        blended_attend(config, T, sink=training.sink, recent=training.recent),
        (gates, jax.lax.stop_gradient(full)),
    )
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    distance = jnp.mean(difference * difference, axis=-1)[0]  # [T]
    return jnp.mean(distance, where=jnp.arange(T) >= first_label)


@partial(jax.jit, static_argnames=("config", "training", "backend"), donate_argnames=("state",))
def train_step(
    config: ModelConfig,
    training: GateTraining,
    stacked: Params,
    state: GateState,
    tokens: Int[Array, " T"],
    first_label: Int[Array, ""],
    *,
    backend: Backend,
) -> tuple[GateState, StepLoss]:
    """One step of AdamW on distillation + ``regularization`` * mean gate; gates stay in [0, 1]."""

    def loss(gates: Array) -> tuple[Array, Array]:
        distillation = distillation_loss(
            config, training, stacked, gates, tokens, first_label, backend=backend
        )
        return distillation + training.regularization * jnp.abs(gates).mean(), distillation

    gradient, distillation = jax.grad(loss, has_aux=True)(state.gates)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
        updates, optimizer = _optimizer(training).update(gradient, state.optimizer, state.gates)
    gates = jax.tree.map(jnp.add, state.gates, updates).clip(0.0, 1.0)
    losses = StepLoss(distillation, state.gates.mean())
    return GateState(gates=gates, optimizer=optimizer), losses


def train_gates(
    config: ModelConfig,
    params: Params,
    sample: Callable[[int], Sample],
    training: GateTraining,
    *,
    backend: Backend = "auto",
    state: GateState | None = None,
    history: History = (),
    on_step: Callable[[GateState, History], None] = lambda *_: None,
) -> HeadGates:
    """Trains a gate for every KV head of a frozen model.

    config, params: the model, as ``convert.load`` returns it. The layers are copied, unless they
        come from ``stack_layers``.
    sample: the sequence of a step, from its number: ``PasskeySamples``, or one's own. Every length
        is compiled once.
    training: the recipe.
    backend: of the teacher's attention; see ``LLM``.
    state, history: what earlier steps made; by default there are none. ``state`` is used up.
    on_step: called after each step with the state and the history up to it. The state is valid
        until the call returns.

    Raises ``ValueError`` for a sample that does not fit the model or has no label,
    ``FloatingPointError`` if a loss is not finite, and ``NotImplementedError`` for a model whose
    layers differ.
    """
    state = initial_state(config, training) if state is None else state
    stacked, done = stack_layers(params), [list(of_step) for of_step in history]
    for step in range(len(done), training.steps):
        tokens, first_label = sample(step)
        tokens = checked_tokens(config, tokens)
        if not 0 <= first_label < len(tokens):
            raise ValueError(f"{first_label=} of step {step} must lie in [0, {len(tokens)})")
        state, loss = train_step(
            config,
            training,
            stacked,
            state,
            jnp.asarray(tokens),
            jnp.int32(first_label),
            backend=backend,
        )
        if not np.isfinite(loss.distillation):
            raise FloatingPointError(f"loss is {loss.distillation} at step {step}")
        done.append([float(loss.distillation), float(loss.mean_gate)])
        on_step(state, done)
    return HeadGates(gates=np.asarray(state.gates), history=np.array(done).reshape(-1, 2))
