"""How much of the context each KV head reads, by what the head is worth to the output.

A few heads carry most answers, and neither a head's gate nor where its attention goes tells which.
Cutting one head alone and looking at the output does. A *sensitivity* is that loss for every head;
from it come the heads that stream, the heads that read everything (*dense heads*), and the *share*
of the context that each of the others selects. ``docs/lserve.md`` has the formulas and what was
measured, ``python -m lserve_jax.calibrate --head-shares`` measures a model.
"""

import heapq
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

# What a head may be given. Nothing lies between 3/8 and everything: a list that long is dearer to
# select than what it leaves out is to read.
SHARES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1.0)
# The share at which the loss of a selecting head is measured.
MEASURED_SHARE = 1 / 32
# Mass left out is measured at no page but sinks and tail, and at every share but 1.
MISSED_AT = (0.0, *SHARES[:-1])
# Heads that never stream, however many are to.
PROTECTED_HEADS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadSensitivity:
    """What the output loses when one KV head alone reads less; heads in checkpoint order.

    Losses are KL(dense || cut) of the next token in nats, means over tokens, above the noise of
    rounding. Compared by identity. Raises ``ValueError`` naming layer and head for numbers that are
    not finite or negative, and for shapes that differ.
    """

    streaming: Float64[np.ndarray, "L Hk"]  # loss while the head streams
    selecting: Float64[np.ndarray, "L Hk"]  # loss while it selects MEASURED_SHARE
    # Attention mass beyond sinks and tail that its selection leaves out, at each of MISSED_AT.
    missed: Float64[np.ndarray, "n L Hk"]
    name: str  # where it was read
    context: int  # tokens of context at which it was measured

    def __post_init__(self):
        shape = np.shape(self.streaming)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"sensitivity {self.name!r} must be layers x KV heads, got {shape}")
        for field, wanted in (
            ("streaming", shape),
            ("selecting", shape),
            ("missed", (len(MISSED_AT), *shape)),
        ):
            values = np.array(getattr(self, field), np.float64)
            if values.shape != wanted:
                raise ValueError(
                    f"{field} of sensitivity {self.name!r} has shape {values.shape}, "
                    f"expected {wanted}"
                )
            bad = np.argwhere(~np.isfinite(values) | (values < 0))
            if len(bad):
                *_, layer, head = bad[0].tolist()
                raise ValueError(
                    f"{field} of sensitivity {self.name!r} must be finite and not negative, "
                    f"got {values[tuple(bad[0])]} at layer {layer}, head {head}"
                )
            values.flags.writeable = False
            object.__setattr__(self, field, values)
        if self.context < 1:
            raise ValueError(f"context={self.context} of {self.name!r} must be positive")

    @property
    def worth(self) -> Float64[np.ndarray, "L Hk"]:
        """One number a head: the greater of both losses."""
        return np.maximum(self.streaming, self.selecting)

    def table(self) -> dict[str, np.ndarray]:
        """One row a layer and KV head, as for a data frame.

        ``layer``, ``head``, ``streaming``, ``selecting``, ``worth`` (nats), and ``missed_…`` for
        each of MISSED_AT.
        """
        layer, head = (x.ravel() for x in np.indices(self.worth.shape))
        losses = {"streaming": self.streaming, "selecting": self.selecting, "worth": self.worth}
        missed = {f"missed_{share}": x for share, x in zip(MISSED_AT, self.missed, strict=True)}
        return {"layer": layer, "head": head} | {k: x.ravel() for k, x in (losses | missed).items()}

    def most_sensitive(self, count: int) -> Bool[np.ndarray, "L Hk"]:
        """The ``count`` heads of the greatest worth; of equal ones the first.

        Raises ``ValueError`` if there are not as many.
        """
        if not 0 <= count <= self.worth.size:
            raise ValueError(
                f"dense_heads={count} must lie in [0, {self.worth.size}], the model's KV heads"
            )
        chosen = np.zeros(self.worth.size, bool)
        chosen[np.argsort(-self.worth, axis=None, kind="stable")[:count]] = True
        return chosen.reshape(self.worth.shape)

    def least_sensitive(self, fraction: float) -> Bool[np.ndarray, "L Hk"]:
        """The share ``fraction`` of heads of the least worth, without the protected ones."""
        wanted = round(fraction * self.worth.size)
        count = max(min(wanted, self.worth.size - PROTECTED_HEADS), 0)
        return ~self.most_sensitive(self.worth.size - count)

    def losses(self) -> Float64[np.ndarray, "n L Hk"]:
        """Estimated loss of every head at each of ``SHARES``.

        Between the two losses measured, and beyond them, it goes with the mass that selection
        leaves out.
        """
        at = MISSED_AT.index(MEASURED_SHARE)
        measured = np.maximum(self.missed[at], 1e-6)
        span = np.maximum(self.missed[0] - self.missed[at], 1e-6)
        rows = []
        for i, share in enumerate(MISSED_AT):
            if share >= MEASURED_SHARE:
                rows.append(self.selecting * self.missed[i] / measured)
            else:
                part = np.clip((self.missed[i] - self.missed[at]) / span, 0.0, 1.0)
                rows.append(self.selecting + (self.streaming - self.selecting) * part)
        rows.append(np.zeros_like(self.selecting))
        # More is never worse: what says so is noise.
        return np.minimum.accumulate(np.array(rows[1:]), axis=0)


def fit_shares(
    sensitivity: HeadSensitivity,
    budget: float,
    streams: Bool[np.ndarray, "L Hk"] | None = None,
    *,
    dense: Bool[np.ndarray, "L Hk"] | None = None,
    statistics: float = 0.0,
    window: float = 0.0,
) -> Float64[np.ndarray, "L Hk"]:
    """Shares of ``SHARES`` with the least summed loss at a mean cost of ``budget`` a head.

    A head of share b costs b of the context and, unless it reads everything, ``statistics`` for
    the ranking; one that streams costs ``window`` and gets share 0. Those ``dense`` get 1. Greedy
    along the lower convex hull of each head's loss, which is optimal up to the last step. By
    default no head streams, and none is dense by order.

    Every head that does not stream has the least share at least, even where ``budget`` is less.
    Raises ``ValueError`` for a budget outside (0, 1].
    """
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"budget_share={budget} must lie in (0, 1]")
    losses = sensitivity.losses()
    streams = np.zeros(losses.shape[1:], bool) if streams is None else streams
    cost = np.array([share + (statistics if share < 1.0 else 0.0) for share in SHARES])
    chosen = np.zeros(losses.shape[1:], np.int64)
    steps: list[tuple[float, int, int, int]] = []  # worst slope first, of a head's next step

    def push(layer: int, head: int) -> None:
        i, loss = chosen[layer, head], losses[:, layer, head]
        if i + 1 < len(SHARES):
            slopes = (loss[i] - loss[i + 1 :]) / (cost[i + 1 :] - cost[i])
            best = int(np.argmax(slopes))
            heapq.heappush(steps, (-float(slopes[best]), layer, head, i + 1 + best))

    if dense is not None:
        chosen[dense & ~streams] = len(SHARES) - 1
    for layer, head in np.argwhere(~streams):
        push(int(layer), int(head))
    room = budget * streams.size - window * streams.sum() - cost[chosen][~streams].sum()
    while steps:
        slope, layer, head, to = heapq.heappop(steps)
        if slope == 0.0:
            break
        size = cost[to] - cost[chosen[layer, head]]
        if size <= room:  # else a smaller step of another head may fit
            room -= size
            chosen[layer, head] = to
            push(layer, head)
    return np.where(streams, 0.0, np.array(SHARES)[chosen])
