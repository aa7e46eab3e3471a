"""The model as pure functions, for pipelines that want no engine."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from lserve_jax.attention.attend import causal_attend
from lserve_jax.checks import INT32_MAX
from lserve_jax.model.bound import bind
from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Attend, Params, check_params
from pallas_kernels import api


def logits(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
    attend: Attend | None = None,
    remat: bool = False,
) -> Float[Array, "B T V"]:
    """Next-token logits (float32) at every position of full sequences, plain causal attention.

    Arguments and errors are those of ``hidden_states``.
    """
    hidden = hidden_states(
        config,
        params,
        tokens,
        positions=positions,
        segment_ids=segment_ids,
        attention_mask=attention_mask,
        attend=attend,
        remat=remat,
    )
    return unembed(config, params, hidden)


def unembed(
    config: ModelConfig, params: Params, hidden: Float[Array, "... E"]
) -> Float[Array, "... V"]:
    """Logits (float32) of ``hidden_states``, so that a loss can take them some tokens at a time."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    vocabulary = 0 if config.tie_word_embeddings else 1
    spec = _spec(jax.tree.leaves(params[name])[0])[vocabulary]
    tokens = _spec(hidden)[:-1]
    taken = jax.tree.leaves(tuple(tokens))
    split = None if set(jax.tree.leaves(spec)) & set(taken) else spec

    def run(params: Params, hidden: Array) -> Array:
        return bind(config, params).unembed(hidden, backend="reference")

    return _as_auto(run, PartitionSpec(*tokens, split), params, hidden)


def hidden_states(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    attention_mask: Int[Array, "B T"] | Bool[Array, "B T"] | None = None,
    attend: Attend | None = None,
    remat: bool = False,
) -> Float[Array, "B T E"]:
    """The last layer's output after the final norm, in the parameters' dtype.

    params: from ``convert.load`` or ``llama.init_params``.
    positions: of each token, from 0, for rotary embedding alone; None counts the tokens of the same
        segment that stand before it.
    segment_ids: for several sequences in a row. A token sees those of its own segment that do not
        come after it. 0 is padding, which sees and is seen by nothing; what comes out there is
        finite and means nothing.
    attention_mask: 1 (True) for a token, 0 for padding, at whichever end: ``segment_ids`` of one
        sequence a row.
    attend: attention of one's own in place of all that (``docs/pipelines.md``).
    remat: a derivative keeps of each layer only its input and its attention's output. Takes more
        time and a fraction of the memory (``benchmarks/training.py``).

    Pure: works under ``jit`` (with ``config`` static), ``vmap`` and every kind of derivative, and
    over sharded arrays. Memory is O(T) for each layer that is kept.

    Raises ``ValueError`` for ``params`` of other shapes than the model's, for an array that is no
    integers ``[B, T]`` as ``tokens``, for ``attend`` beside what it replaces or with an output that
    is not of ``q``'s shape, and for more tokens than the model's sliding window. And, where values
    are known, for tokens outside the vocabulary, negative positions and segments, and for a mask
    that contradicts ``segment_ids``; in a traced call ``api.value_checks`` reports these.
    """
    given = {
        "positions": positions,
        "segment_ids": segment_ids,
        "attention_mask": attention_mask,
    }
    if attend is not None and (beside := [name for name, x in given.items() if x is not None]):
        raise ValueError(
            f"attend decides about positions and masks itself, so {beside[0]} must be None"
        )
    check_params(config, params)
    if not isinstance(tokens, jax.Array | np.ndarray):
        raise ValueError(f"tokens must be an integer array [B, T], got {type(tokens).__name__}")
    if tokens.ndim != 2 or tokens.size == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(
            f"tokens must be an integer array [B, T], got {tokens.dtype} {tokens.shape}"
        )
    _check_range("tokens", tokens, config.vocab_size - 1)
    positions, segment_ids = _checked(tokens.shape, **given)

    def run(
        params: Params, tokens: Array, positions: Array | None, segment_ids: Array | None
    ) -> Array:
        how = _attend(config, tokens.shape, positions, segment_ids) if attend is None else attend
        caches = [None] * config.num_hidden_layers
        return bind(config, params)(tokens, how, caches, remat=remat)[0]

    spec = PartitionSpec(*_spec(tokens), None)
    return _as_auto(run, spec, params, tokens, positions, segment_ids)


def _spec(x: Array) -> tuple[Any, ...]:
    """Over which mesh axes each axis of x lies, as far as x's type says."""
    spec = jax.typeof(x).sharding.spec
    return (*spec, *[None] * (x.ndim - len(spec)))


def _as_auto(run: Callable[..., Array], spec: PartitionSpec, *arguments: Any) -> Array:
    """``run(*arguments)``, on a mesh of Explicit axes too: inside they are Auto.

    There every sharding of the parameters makes sense, and XLA places what lies between. ``spec``
    is the result's.
    """
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arguments)]
    mesh = next((m for m in meshes if AxisType.Explicit in m.axis_types), None)
    if mesh is None:
        return run(*arguments)
    with jax.sharding.use_abstract_mesh(mesh):
        inside: Any = jax.sharding.auto_axes(run, out_sharding=NamedSharding(mesh, spec))
        return inside(*arguments)


def _checked(
    shape: tuple[int, ...],
    *,
    positions: Array | None,
    segment_ids: Array | None,
    attention_mask: Array | None,
) -> tuple[Array | None, Array | None]:
    """``positions`` and ``segment_ids``, the latter also for what ``attention_mask`` says."""
    positions = _integers("positions", positions, shape)
    segment_ids = _integers("segment_ids", segment_ids, shape)
    if isinstance(attention_mask, jax.Array | np.ndarray) and attention_mask.dtype == bool:
        attention_mask = attention_mask.astype(jnp.int32)
    attention_mask = _integers("attention_mask", attention_mask, shape, most=1)
    if segment_ids is None:
        segment_ids = attention_mask
    elif attention_mask is not None:
        differs = (attention_mask == 0) == (segment_ids > 0)
        name = "places where attention_mask and segment_ids differ"
        _check_range(name, differs.astype(jnp.int32), 0)
    return positions, segment_ids


def _attend(
    config: ModelConfig,
    shape: tuple[int, ...],
    positions: Array | None,
    segment_ids: Array | None,
) -> Attend:
    if segment_ids is None:
        if positions is None:
            positions = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return causal_attend(config, positions)
    places, lengths = jax.vmap(_places)(segment_ids, positions)
    return causal_attend(config, places, lengths=lengths, segment_ids=segment_ids)


def _places(
    segment_ids: Int[Array, " T"], positions: Int[Array, " T"] | None
) -> tuple[Int[Array, " T"], Int[Array, " T"]]:
    """Each token's position, where none is given, and the length of its segment."""
    T = segment_ids.shape[0]
    order = jnp.argsort(segment_ids, stable=True)
    ordered = segment_ids[order]
    first = jnp.concatenate([jnp.ones((1,), bool), ordered[1:] != ordered[:-1]])
    number = jnp.zeros((T,), jnp.int32).at[order].set(jnp.cumsum(first) - 1)  # of its segment
    if positions is None:
        start = jax.lax.cummax(jnp.where(first, jnp.arange(T), 0))
        positions = jnp.zeros((T,), jnp.int32).at[order].set(jnp.arange(T) - start)
    return positions, jax.ops.segment_max(positions + 1, number, T)[number]


def _integers(
    name: str, x: Array | None, shape: tuple[int, ...], most: int = INT32_MAX
) -> Array | None:
    if x is None:
        return None
    if not isinstance(x, jax.Array | np.ndarray):
        raise ValueError(f"{name} must be an integer array {list(shape)}, got {type(x).__name__}")
    if x.shape != shape or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be an integer array {list(shape)}, as tokens, got {x.dtype} {x.shape}"
        )
    _check_range(name, x, most)
    return jnp.asarray(x, jnp.int32)


def _check_range(name: str, x: Array, most: int) -> None:
    """Every x is in [0, most]: now where values are known, else under ``api.value_checks``."""
    if isinstance(x, jax.core.Tracer):
        api.check_range(name, x, most)
        return
    values = np.asarray(x)
    if values.min() < 0 or values.max() > most:
        raise ValueError(f"{name} must lie in [0, {most}], got {values.min()} to {values.max()}")
