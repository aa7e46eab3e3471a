"""What each KV head is worth to the output: measured by cutting one head at a time.

A sequence is a *context*, which runs densely once, and a *window* of tokens behind it, which are
fed as decode steps would be. Beside its own attention the dense run computes what every head
would give for the window if it were cut, in one of two ways:

    streaming   it sees the first ``decode_sink`` and the last ``decode_local`` tokens
    selecting   it reads MEASURED_SHARE of its pages, selected as decode selects them

A *variant* is the model with one head cut in one way and all else dense. It is the dense run up to
that head's layer, so it starts there, with the head's output replaced. Its loss is how far the
next token's distribution moves, KL(dense || cut), mean over the window. ``docs/lserve.md`` has
the formulas, ``docs/calibration.md`` the recipe.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from lserve_jax.attention.selection import first_tail_page
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
from lserve_jax.model.head_shares import MEASURED_SHARE, MISSED_AT, HeadSensitivity
from lserve_jax.model.linear import Stream
from lserve_jax.model.params import Params
from lserve_jax.model.rope import rotary_angles
from pallas_kernels import api
from pallas_kernels.api import Backend, KVPages

SINK_PAGES = 1  # that selection always keeps: SparsityConfig's forced_sink_pages
NOISE_QUANTILE = 0.1  # of the heads, those whose loss is taken for rounding
CUTS = 2  # streaming and selecting, in this order
_HISTORY_PAGE = 64  # tokens; only the prefill op sees pages of this size


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How heads are measured. Names and defaults of the cuts are ``SparsityConfig``'s.

    Raises ``ValueError`` for a number out of its range, and for a context that is too short for
    the cuts to leave anything out.
    """

    context: int = 16384
    """Tokens that are computed densely before a window."""
    window: int = 256
    """Tokens whose distributions are compared."""
    windows: int = 2
    """Windows with passkeys, and as many of the text."""
    decode_sink: int = 128
    """First tokens that a streaming head sees."""
    decode_local: int = 256
    """Newest tokens that it sees, the own one included."""
    logical_page_size: int = 16
    """Tokens that a selecting head takes or leaves together."""
    reuse_interval: int = 4
    """Tokens between two of its selections."""
    lower_bound_weight: float = 0.5
    """Weight of the lower bound in a page's score."""

    def __post_init__(self):
        for name, least in (
            *(("context", 1), ("window", 1), ("windows", 1), ("decode_sink", 0)),
            *(("decode_local", 1), ("logical_page_size", 1), ("reuse_interval", 1)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0.0 <= self.lower_bound_weight <= 1.0:
            raise ValueError(f"lower_bound_weight={self.lower_bound_weight} must lie in [0, 1]")
        if self.context < self.decode_sink + self.decode_local:
            raise ValueError(
                f"context={self.context} must be at least {self.decode_sink + self.decode_local}, "
                f"decode_sink={self.decode_sink} and decode_local={self.decode_local}: "
                "a streaming head would see all of it"
            )
        # A sink page, the tail, and one that is selected.
        least = round((SINK_PAGES + 2) * self.logical_page_size / MEASURED_SHARE)
        if self.context < least:
            raise ValueError(
                f"context={self.context} must be at least {least}: a share of {MEASURED_SHARE} is "
                f"less than {SINK_PAGES + 2} pages of "
                f"logical_page_size={self.logical_page_size} tokens"
            )

    @property
    def length(self) -> int:
        """T, tokens of a sequence."""
        return self.context + self.window


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class DenseRun:
    """One sequence without any cut, and what cuts would make of it; Q tokens of the window."""

    history: KVPages  # [L, Hk, N, P, D]: keys (rotated) and values of the context
    inputs: Float[Array, "L+1 Q E"]  # of every layer, then the last one's output
    cut: Float[Array, "L 2 Q H D"]  # attention outputs: all heads streaming, all selecting
    missed: Float[Array, "L n Hk"]  # float32; see HeadSensitivity


def _paged(x: Float[Array, "T K D"], page_size: int) -> Float[Array, "K N P D"]:
    """Tokens in pages, zeros behind the last."""
    x = jnp.pad(x, ((0, -x.shape[0] % page_size), (0, 0), (0, 0)))
    return x.reshape(-1, page_size, *x.shape[1:]).transpose(2, 0, 1, 3)


def _page_ranks(
    measurement: Measurement,
    q: Float[Array, "S G D"],
    k: Float[Array, "T D"],
    position: Int[Array, " S"],
) -> tuple[Int[Array, "S N"], Bool[Array, "S N"]]:
    """How queries of one KV head rank its pages, and which pages they read whatever their rank.

    Rank 0 is the best of the pages that are not forced; a forced page's rank means nothing. Forced
    are sink pages and the tail, in which there are pages that the query does not see yet.
    """
    U = measurement.logical_page_size
    pages = _paged(k[:, None], U)  # [1, N, U, D]
    stats = jnp.stack([pages.max(axis=2), pages.min(axis=2)], axis=2)[:, :, None]
    N = pages.shape[1]
    scores = api.page_scores(
        q,
        stats,  # [1, N, 1, 2, D]
        jnp.broadcast_to(jnp.arange(N)[None], (q.shape[0], N)),
        position + 1,
        page_size=U,
        selected_page_size=U,
        lower_bound_weight=measurement.lower_bound_weight,
        backend="reference",  # the specification, and little to do
    )[:, 0]
    page = jnp.arange(N)[None]
    forced = (page < SINK_PAGES) | (page >= first_tail_page(position, U)[:, None])
    # Stable sorts: among equal scores the lower page wins, as in ``select_pages``.
    order = jnp.argsort(jnp.where(forced, jnp.inf, -scores), axis=-1)
    return jnp.argsort(order, axis=-1), forced


def _cut_head(
    measurement: Measurement,
    q: Float[Array, "Q G D"],
    k: Float[Array, "T D"],
    v: Float[Array, "T D"],
) -> tuple[Float[Array, "2 Q G D"], Float32[Array, " n"]]:
    """What a KV head's queries would give, streaming and selecting, and the mass it would miss.

    The window's tokens are the last Q of T; q and k are rotated. Memory is G * Q * T scores.
    """
    (Q, _, D), T = q.shape, k.shape[0]
    C, U = measurement.reuse_interval, measurement.logical_page_size
    position, key = T - Q + jnp.arange(Q), jnp.arange(T)[None]
    highest = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("qgd,td->qgt", q, k, precision=highest, preferred_element_type=jnp.float32)
    causal = key <= position[:, None]
    scores = jnp.where(causal[:, None], scores * D**-0.5, -jnp.inf)

    def attend(visible: Bool[Array, "Q T"]) -> Float[Array, "Q G D"]:
        weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf))
        return jnp.einsum("qgt,td->qgd", weights.astype(v.dtype), v, precision=highest)

    near = (key < measurement.decode_sink) | (key > position[:, None] - measurement.decode_local)
    rank, forced = _page_ranks(measurement, q[::C], k, position[::C])
    # A share counts sinks and one page of the tail among its pages, as a budget does.
    tokens = (position[::C] + 1).astype(jnp.float32)
    budget = jnp.round(jnp.array(MISSED_AT)[:, None] * tokens[None] / U)  # pages, [n, S]
    ranked = jnp.maximum(budget - 1 - SINK_PAGES, 0.0).astype(jnp.int32)

    def of_window(x: Bool[Array, "S N"]) -> Bool[Array, "Q N"]:  # what the last selection made
        return jnp.repeat(x, C, axis=0)[:Q]

    listed = [of_window(forced | (rank < count[:, None])) for count in ranked]
    selected = listed[MISSED_AT.index(MEASURED_SHARE)]
    mass = jax.nn.softmax(scores).mean(axis=1)  # [Q, T], of the group
    by_page = jnp.pad(mass, ((0, 0), (0, -T % U))).reshape(Q, -1, U).sum(axis=-1)
    missed = jnp.stack([jnp.where(pages, 0.0, by_page).sum(axis=-1).mean() for pages in listed])
    visible = jnp.repeat(selected, U, axis=1)[:, :T]
    return jnp.stack([attend(near), attend(visible)]), missed


@partial(jax.jit, static_argnames=("config", "measurement", "backend"))
def dense_run(
    config: ModelConfig,
    measurement: Measurement,
    stacked: Params,
    tokens: Int[Array, " T"],
    *,
    backend: Backend,
) -> DenseRun:
    """Runs a sequence of ``measurement.length`` tokens. ``stacked`` is that of ``stack_layers``.

    Memory beside the result is O(T), and the scores of one KV head's window.
    """
    N = measurement.context
    position = jnp.arange(tokens.shape[0])
    # As prefill and decode have it: the window's tokens come one by one.
    lengths = jnp.maximum(position + 1, N)
    cos, sin = (x[:, 0] for x in rotary_angles(config, position[:, None], lengths))

    def rotate(x: Array, tokens: slice) -> Array:  # [1, T, heads, D]
        return api.apply_rotary(x, cos[None, tokens], sin[None, tokens])

    def context(layer: int, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, KVPages]:
        q, k = rotate(q, slice(N)), rotate(k, slice(N))
        none = no_history(config, k.dtype)
        out = full_attention(q[0], k[0], v[0], none, 0, backend=backend)
        return out[None], KVPages(_paged(k[0], _HISTORY_PAGE), _paged(v[0], _HISTORY_PAGE))

    def window(
        layer: int, q: Array, k: Array, v: Array, history: KVPages
    ) -> tuple[Array, tuple[Array, Array]]:
        q, k = rotate(q, slice(N, None))[0], rotate(k, slice(N, None))[0]
        out = full_attention(q, k, v[0], history, N, backend=backend)

        def whole(pages: Array, own: Array) -> Array:  # [Hk, T, D]
            past = pages.reshape(pages.shape[0], -1, pages.shape[-1])[:, :N]
            return jnp.concatenate([past, own.swapaxes(0, 1)], axis=1)

        by_head = q.reshape(q.shape[0], -1, config.group_size, config.head_dim).swapaxes(0, 1)
        cut, missed = jax.lax.map(
            lambda head: _cut_head(measurement, *head),
            (by_head, whole(history.k, k), whole(history.v, v[0])),
        )  # [Hk, 2, Q, G, D], [Hk, n]
        cut = cut.transpose(1, 2, 0, 3, 4).reshape(CUTS, *q.shape)
        return out[None], (cut, missed.T)

    def layer(
        carry: tuple[Array, Array], weights: Params
    ) -> tuple[tuple[Array, Array], tuple[KVPages, Array, Array, Array]]:
        past, now = carry
        module = one_layer(config, stacked, weights).layers[0]
        past, history = module(0, Stream(past), context, None, "reference")
        after, (cut, missed) = module(0, Stream(now), window, history, "reference")
        return (past.value, after.value), (history, now[0], cut, missed)

    x = one_layer(config, stacked, layer_weights(stacked, 0)).embed(tokens[None])
    (_, last), (history, inputs, cut, missed) = jax.lax.scan(
        layer, (x[:, :N], x[:, N:]), stacked["layers"]
    )
    return DenseRun(history=history, inputs=jnp.concatenate([inputs, last]), cut=cut, missed=missed)


@partial(jax.jit, static_argnames=("config", "measurement", "backend"))
def variant_losses(
    config: ModelConfig,
    measurement: Measurement,
    stacked: Params,
    run: DenseRun,
    variants: Int[Array, "n 3"],
    *,
    backend: Backend,
) -> Float32[Array, " n"]:
    """KL(dense || cut) in nats, mean over the window, of every variant: layer, KV head, cut.

    They run together from the lowest of their layers on, and one at a time in attention and in the
    output layer, whose arrays are the large ones.
    """
    at_layer, at_head, at_cut = variants.T
    Q, start = measurement.window, measurement.context
    position = start + jnp.arange(Q)
    cos, sin = (x[:, 0][None] for x in rotary_angles(config, position[:, None], position + 1))
    of_head = jnp.arange(config.num_attention_heads)[None] // config.group_size == at_head[:, None]

    def layer(i: Array, x: Float[Array, "n Q E"]) -> Float[Array, "n Q E"]:
        history = jax.tree.map(lambda leaf: leaf[i], run.history)

        def attend(_: int, q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
            def of_one(qkv: tuple[Array, Array, Array]) -> Array:
                q, k, v = qkv
                q, k = (api.apply_rotary(y[None], cos, sin)[0] for y in (q, k))
                return full_attention(q, k, v, history, start, backend=backend)

            replaced = of_head & (at_layer == i)[:, None]  # [n, H]
            out = jax.lax.map(of_one, (q, k, v))
            return jnp.where(replaced[:, None, :, None], run.cut[i][at_cut], out), None

        module = one_layer(config, stacked, layer_weights(stacked, i)).layers[0]
        stream, _ = module(0, Stream(x), attend, None, "reference")
        return stream.value

    first = at_layer.min()
    x = jnp.broadcast_to(run.inputs[first][None], (len(variants), *run.inputs.shape[1:]))
    x = jax.lax.fori_loop(first, config.num_hidden_layers, layer, x)

    model = one_layer(config, stacked, layer_weights(stacked, 0))

    def log_probabilities(hidden: Float[Array, "Q E"]) -> Float32[Array, "Q V"]:
        return jax.nn.log_softmax(model.unembed(model.norm(hidden)))

    dense = log_probabilities(run.inputs[-1])

    def divergence(hidden: Float[Array, "Q E"]) -> Float32[Array, ""]:
        return (jnp.exp(dense) * (dense - log_probabilities(hidden))).sum(axis=-1).mean()

    return jax.lax.map(divergence, x)


def passes(config: ModelConfig, heads_per_pass: int) -> list[Int32[np.ndarray, "n 3"]]:
    """All variants of a model, so many heads at a time; the last pass repeats its last variant."""
    shape = (config.num_hidden_layers, config.num_key_value_heads, CUTS)
    variants = np.array(list(np.ndindex(shape)), np.int32)
    n = min(CUTS * heads_per_pass, len(variants))
    variants = np.pad(variants, ((0, -len(variants) % n), (0, 0)), mode="edge")
    return list(variants.reshape(-1, n, 3))


def measure(
    config: ModelConfig,
    stacked: Params,
    measurement: Measurement,
    tokens: Int[np.ndarray, " T"],
    *,
    heads_per_pass: int,
    backend: Backend = "auto",
    on_pass: Callable[[], object] = lambda: None,
) -> tuple[Float32[np.ndarray, "2 L Hk"], Float32[np.ndarray, "n L Hk"]]:
    """Losses of one sequence, streaming then selecting, and ``missed`` of ``HeadSensitivity``.

    KV heads are in checkpoint order. ``on_pass`` is called after each of ``passes``.

    Raises ``FloatingPointError`` for a loss that is not finite, and ``NotImplementedError`` for a
    model whose layers differ.
    """
    run = dense_run(config, measurement, stacked, jnp.asarray(tokens), backend=backend)
    losses = np.empty((CUTS, config.num_hidden_layers, config.num_key_value_heads), np.float32)
    for variants in passes(config, heads_per_pass):
        found = np.asarray(
            variant_losses(
                config, measurement, stacked, run, jnp.asarray(variants), backend=backend
            )
        )
        bad = np.flatnonzero(~np.isfinite(found))
        if len(bad):
            layer, head, _ = variants[bad[0]].tolist()
            raise FloatingPointError(f"loss is {found[bad[0]]} at layer {layer}, head {head}")
        layer, head, cut = variants.T
        losses[cut, layer, head] = found
        on_pass()
    return losses, np.asarray(run.missed).swapaxes(0, 1)


def combine(
    losses: Float[np.ndarray, "W 2 L Hk"],
    missed: Float[np.ndarray, "W n L Hk"],
    *,
    name: str,
    context: int,
) -> HeadSensitivity:
    """The sensitivity that W windows show: means over them, and losses above the rounding's.

    Every head's loss has a share that is rounding alone, which the least sensitive heads show: the
    10 % quantile over heads is taken off each kind of loss, down to 0. So one head by itself ends
    at 0.
    """
    mean = losses.mean(axis=0, dtype=np.float64)
    mean -= np.quantile(mean, NOISE_QUANTILE, axis=(1, 2), keepdims=True)
    streaming, selecting = np.maximum(mean, 0.0)
    return HeadSensitivity(
        streaming=streaming,
        selecting=selecting,
        missed=missed.mean(axis=0, dtype=np.float64),
        name=name,
        context=context,
    )


class Measured(NamedTuple):
    """What W sequences showed, each as ``measure`` returns it."""

    losses: Float32[np.ndarray, "W 2 L Hk"]
    missed: Float32[np.ndarray, "W n L Hk"]


def nothing_measured(config: ModelConfig) -> Measured:
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    return Measured(
        losses=np.empty((0, CUTS, *shape), np.float32),
        missed=np.empty((0, len(MISSED_AT), *shape), np.float32),
    )


def measure_heads(
    config: ModelConfig,
    params: Params,
    measurement: Measurement,
    sequences: Sequence[Int[np.ndarray, " T"]],
    *,
    heads_per_pass: int = 8,
    backend: Backend = "auto",
    name: str = "",
    before: Measured | None = None,
    on_pass: Callable[[], object] = lambda: None,
    on_sequence: Callable[[Measured], object] = lambda _: None,
) -> HeadSensitivity:
    """What each KV head is worth to the output, mean over sequences.

    config, params: the model, as ``convert.load`` returns it. The layers are copied, unless they
        come from ``stack_layers``.
    sequences: token ids, each of ``measurement.length`` tokens: ``measured_sequences``, or one's
        own.
    heads_per_pass: so many heads are measured together; fewer need less memory.
    name: of the sensitivity, for messages.
    before: what the first sequences have shown already; they are not run again.
    on_pass: called after each of ``passes``.
    on_sequence: called after each sequence with all that was measured so far.

    Raises ``ValueError`` for a sequence that fits neither model nor measurement,
    ``FloatingPointError`` for a loss that is not finite, and ``NotImplementedError`` for a model
    whose layers differ.
    """
    refuse_unlike_layers(config)
    if heads_per_pass < 1:
        raise ValueError(f"{heads_per_pass=} must be at least 1")
    if not len(sequences):
        raise ValueError("there must be at least one sequence to measure heads on")
    checked = [checked_tokens(config, tokens) for tokens in sequences]
    for tokens in checked:
        if len(tokens) != measurement.length:
            raise ValueError(
                f"a sequence has {len(tokens)} tokens, context={measurement.context} and "
                f"window={measurement.window} are {measurement.length}"
            )
    done = nothing_measured(config) if before is None else before
    stacked = stack_layers(params)
    for tokens in checked[len(done.losses) :]:
        of_one = measure(
            config,
            stacked,
            measurement,
            tokens,
            heads_per_pass=heads_per_pass,
            backend=backend,
            on_pass=on_pass,
        )
        done = Measured(*(np.concatenate([a, b[None]]) for a, b in zip(done, of_one, strict=True)))
        on_sequence(done)
    return combine(*done, name=name, context=measurement.context)
