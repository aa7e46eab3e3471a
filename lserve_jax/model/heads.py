"""Which attention heads stream and which retrieve, and the reordering that makes them slices.

A *pattern* is what DuoAttention (arXiv 2410.10819) learns for a model: one gate per layer and KV
head, 1 where the head needs full attention, 0 where sink and local tokens suffice. LServe (arXiv
2502.14866, prefilling stage) turns the share of heads with the lowest gates into streaming heads:

    pattern = convert.load_pattern("Llama-3-8B-Instruct-Gradient-1048k")
    partition = partition_heads(pattern, 0.5, num_layers=32, num_kv_heads=8)
    params = permute_heads(config, params, partition)  # retrieval heads now come first

The share is of the whole model: a layer may be left with no retrieval or no streaming head.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float64, Int32, Shaped

from lserve_jax.model.config import ModelConfig
from lserve_jax.model.params import Params
from pallas_kernels.api import Weight


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadPattern:
    """Learned gates of one model. Compared by identity.

    Gates are clipped to [0, 1] (training leaves some just below 0) and made read-only. Raises
    ``ValueError`` if they are not a non-empty matrix of finite numbers, or a size is negative.
    """

    gates: Float64[np.ndarray, "L Hk"]  # 1: needs full attention; KV heads in checkpoint order
    name: str
    sink_size: int  # tokens at the start that a streaming head saw in gate training
    recent_size: int  # tokens before the current one that it saw

    def __post_init__(self):
        gates = np.array(self.gates, np.float64)
        if gates.ndim != 2 or gates.size == 0:
            raise ValueError(
                f"gates of pattern {self.name!r} must be layers x KV heads, got shape {gates.shape}"
            )
        if not np.isfinite(gates).all():
            layer, head = np.argwhere(~np.isfinite(gates))[0].tolist()
            raise ValueError(
                f"gates of pattern {self.name!r} must be finite, "
                f"got {gates[layer, head]} at layer {layer}, head {head}"
            )
        for field in ("sink_size", "recent_size"):
            size = getattr(self, field)
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(
                    f"{field} of pattern {self.name!r} must be a whole number of tokens, "
                    f"got {size!r}"
                )
        gates = gates.clip(0.0, 1.0)
        gates.flags.writeable = False
        object.__setattr__(self, "gates", gates)


@dataclass(frozen=True, kw_only=True)
class HeadPartition:
    """The class of every KV head, as ids in checkpoint order. Hashable: may be a static argument.

    A query head has the class of its KV head. Any class may be empty in a layer. Raises
    ``ValueError`` unless every layer names every KV head once, ascending within each class, and
    each dense head is a retrieval head.
    """

    retrieval: tuple[tuple[int, ...], ...]  # per layer
    streaming: tuple[tuple[int, ...], ...]  # per layer
    # Per layer, the retrieval heads that read everything; () for the whole model: there are none.
    dense: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self):
        if not self.dense:
            object.__setattr__(self, "dense", ((),) * len(self.retrieval))
        if len(self.dense) != len(self.retrieval):
            raise ValueError(
                f"dense names {len(self.dense)} layers, retrieval {len(self.retrieval)}"
            )
        for layer, (retrieval, dense) in enumerate(zip(self.retrieval, self.dense, strict=True)):
            if list(dense) != sorted(set(dense) & set(retrieval)):
                raise ValueError(
                    f"layer {layer}: dense={list(dense)} must be ascending retrieval heads, "
                    f"got retrieval={list(retrieval)}"
                )
        if not self.retrieval or len(self.retrieval) != len(self.streaming):
            raise ValueError(
                "retrieval and streaming must name the same layers, at least one, "
                f"got {len(self.retrieval)} and {len(self.streaming)} layers"
            )
        everyone = list(range(self.num_kv_heads))
        for layer, classes in enumerate(zip(self.retrieval, self.streaming, strict=True)):
            retrieval, streaming = map(list, classes)
            in_order = retrieval == sorted(retrieval) and streaming == sorted(streaming)
            if not in_order or sorted(retrieval + streaming) != everyone:
                raise ValueError(
                    f"layer {layer} must name each of {self.num_kv_heads} KV heads once, ascending "
                    f"in its class, got {retrieval=} and {streaming=}"
                )

    @property
    def num_layers(self) -> int:
        """L"""
        return len(self.retrieval)

    @property
    def num_kv_heads(self) -> int:
        """Hk"""
        return len(self.retrieval[0]) + len(self.streaming[0])

    @property
    def num_retrieval(self) -> tuple[int, ...]:
        """Retrieval KV heads of each layer: after ``permute_heads``, the first so many."""
        return tuple(len(heads) for heads in self.retrieval)

    @property
    def num_dense(self) -> tuple[int, ...]:
        """Dense KV heads of each layer: the last so many of its retrieval heads."""
        return tuple(len(heads) for heads in self.dense)

    @property
    def ranked(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the retrieval heads that rank their pages."""
        return tuple(
            tuple(head for head in retrieval if head not in dense)
            for retrieval, dense in zip(self.retrieval, self.dense, strict=True)
        )

    @property
    def order(self) -> tuple[tuple[int, ...], ...]:
        """Per layer, the checkpoint's id of the KV head at each place: ranked heads, then dense
        ones, then streaming ones."""
        classes = zip(self.ranked, self.dense, self.streaming, strict=True)
        return tuple(ranked + dense + streaming for ranked, dense, streaming in classes)


def partition_heads(
    pattern: HeadPattern | None,
    streaming_fraction: float,
    *,
    num_layers: int,
    num_kv_heads: int,
) -> HeadPartition:
    """Makes the heads with the lowest gates streaming heads.

    All L*Hk heads are sorted by (gate, layer, head); the first ``round(streaming_fraction*L*Hk)``
    stream. LServe instead keeps every head whose gate reaches the global quantile. Gates were
    trained in bfloat16 and often tie there; then ``gate >= quantile`` keeps all of the tied heads
    and fewer stream than asked for (at 0.5, by 2 or 3 of 256 heads in four of the shipped
    patterns). LServe's remedy, noise on the gates, chooses differently at every start. Here the
    number is exact and the choice always the same. At 0.5 only heads tied at the quantile get
    another class than by ``gate >= quantile``; at other fractions the interpolation of the
    quantile may also move the number by one.

    Args:
      pattern: the gates; None makes every head a retrieval head and needs fraction 0.
      streaming_fraction: share of all KV heads that stream, in [0, 1].
      num_layers: L of the model.
      num_kv_heads: Hk of the model.

    Raises ``ValueError`` for a fraction outside [0, 1], a positive one without a pattern, and a
    pattern of another shape than the model's.
    """
    if not 0.0 <= streaming_fraction <= 1.0:
        raise ValueError(f"{streaming_fraction=} must lie in [0, 1]")
    shape = (num_layers, num_kv_heads)
    if pattern is None and streaming_fraction > 0.0:
        raise ValueError(
            f"{streaming_fraction=} needs a pattern that says which heads may stream; "
            "without a pattern it must be 0"
        )
    if pattern is not None and pattern.gates.shape != shape:
        raise ValueError(
            f"pattern {pattern.name!r} is of {pattern.gates.shape} (layers, KV heads), "
            f"the model has {shape}"
        )
    streams = np.zeros(num_layers * num_kv_heads, bool)
    if pattern is not None:
        # Flat index order is (layer, head), so a stable sort breaks ties by it.
        by_gate = np.argsort(pattern.gates, axis=None, kind="stable")
        streams[by_gate[: round(streaming_fraction * streams.size)]] = True
    streams = streams.reshape(shape)
    return partition_of(streams, dense=np.zeros_like(streams))


def partition_of(
    streams: Bool[np.ndarray, "L Hk"], *, dense: Bool[np.ndarray, "L Hk"]
) -> HeadPartition:
    """The partition in which these heads stream and those read everything."""

    def ids(chosen: np.ndarray) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(np.flatnonzero(layer).tolist()) for layer in chosen)

    return HeadPartition(retrieval=ids(~streams), streaming=ids(streams), dense=ids(dense))


def permute_heads(config: ModelConfig, params: Params, partition: HeadPartition) -> Params:
    """Reorders the heads of every layer so that retrieval heads come before streaming heads.

    Whole GQA groups move: a KV head with the G query heads that read it. The model computes the
    same function as before, up to rounding of the sum over heads in the output projection.
    ``partition`` speaks of checkpoint order, so apply it once, to parameters as loaded.

    Args:
      config: the model's shape.
      params: nested dict of ``jax.Array`` as ``convert.load`` returns it. It is left as it is;
        the result shares every leaf that need not move. The other leaves exist twice while the
        caller keeps the old tree.
      partition: of the same layers and KV heads as ``config``.

    Returns the nested dict, each leaf with the dtype and sharding it had. Raises ``ValueError`` if
    the shapes of partition and model differ.
    """
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    if (partition.num_layers, partition.num_kv_heads) != shape:
        raise ValueError(
            f"partition is of {(partition.num_layers, partition.num_kv_heads)} "
            f"(layers, KV heads), the model has {shape}"
        )
    H, Hk, D, G = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.group_size,
    )
    layers = dict(params["layers"])
    for i, order in enumerate(partition.order):
        if order == tuple(range(Hk)):
            continue
        q = _positions(order, G * D)  # [H*D]
        kv = _positions(order, D)  # [Hk*D]
        qkv = np.concatenate([q, H * D + kv, (H + Hk) * D + kv])  # columns q|k|v
        attention = dict(layers[i]["self_attn"])
        attention["qkv_proj"] = {
            # kernel [E, (H + 2*Hk)*D], bias [(H + 2*Hk)*D]: heads lie on the last axis of both
            name: jax.tree.map(lambda x, at=qkv: _take(x, at, axis=-1), leaf)
            for name, leaf in attention["qkv_proj"].items()
        }
        attention["o_proj"] = attention["o_proj"] | {
            "kernel": _take_inputs(attention["o_proj"]["kernel"], order, G * D)  # [H*D, E]
        }
        layers[i] = layers[i] | {"self_attn": attention}
    return params | {"layers": layers}


def _positions(order: tuple[int, ...], unit: int) -> Int32[np.ndarray, " n"]:
    """Old position of every new position when blocks of ``unit`` are laid out in ``order``."""
    blocks = np.array(order, np.int32)[:, None] * unit + np.arange(unit, dtype=np.int32)
    return blocks.reshape(-1)


def _take_inputs(kernel: Array | Weight, order: tuple[int, ...], unit: int) -> Array | Weight:
    """Rows of a matrix in blocks of ``unit``, with the groups that they are scaled in."""
    positions = _positions(order, unit)
    if not isinstance(kernel, Weight):
        return _take(kernel, positions, axis=0)
    inputs, groups = kernel.codes.shape[0], kernel.scale.shape[0]
    if groups == 1:
        return kernel._replace(codes=_take(kernel.codes, positions, axis=0))
    # A group that holds more than a block, or a part of two, is split into ones that do not.
    size = math.gcd(inputs // groups, unit)
    split = inputs // groups // size
    blocks = _positions(order, unit // size)

    def moved(x: Array) -> Array:
        return _take(jnp.repeat(x, split, axis=0), blocks, axis=0)

    return Weight(
        _take(kernel.codes, positions, axis=0),
        moved(kernel.scale),
        None if kernel.zero is None else moved(kernel.zero),
    )


def _take(
    leaf: Shaped[Array, "..."], positions: Int32[np.ndarray, " n"], *, axis: int
) -> Shaped[Array, "..."]:
    moved = jnp.take(leaf, positions, axis=axis)
    if isinstance(leaf, jax.core.Tracer):  # its shape is asked for
        return moved
    # A gather along a sharded axis comes back replicated, which might not fit.
    return moved if moved.sharding == leaf.sharding else jax.device_put(moved, leaf.sharding)
