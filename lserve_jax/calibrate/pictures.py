"""Pictures of what calibration found. They need matplotlib (extra ``plot``)."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from lserve_jax.analysis import require_matplotlib
from lserve_jax.calibrate.gates import HeadGates
from lserve_jax.model.head_shares import SHARES, HeadSensitivity

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_gates(trained: HeadGates, path: Path | None = None) -> "Figure":
    """A figure, also as a PNG at ``path``: the gates, and how loss and mean gate went.

    Raises ``ValueError`` if matplotlib (extra ``plot``) is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # not at the top: an optional dependency

    gates, history = trained.gates, trained.history
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
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure


def plot_head_shares(
    sensitivity: HeadSensitivity, shares: Float[np.ndarray, "L Hk"], path: Path | None = None
) -> "Figure":
    """A figure, also as a PNG at ``path``: what each head is worth (logarithmic) and reads.

    Raises ``ValueError`` if matplotlib (extra ``plot``) is not installed.
    """
    require_matplotlib()
    from matplotlib.colors import LogNorm  # not at the top: an optional dependency
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    most = max(float(sensitivity.worth.max()), 1e-9)
    worth = np.maximum(sensitivity.worth, 1e-4 * most)  # zero has no logarithm
    for axes, values, norm, label, title in (
        (left, worth, LogNorm(1e-4 * most, most), "nats", "loss when a head alone is cut"),
        (right, shares, LogNorm(SHARES[0], 1.0), "share of the context", "what a head reads"),
    ):
        image = axes.imshow(values.T, aspect="auto", origin="lower", norm=norm, cmap="viridis")
        figure.colorbar(image, ax=axes, label=label)
        axes.set(xlabel="layer", ylabel="KV head", title=title)
        axes.set_yticks(range(values.shape[1]))
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
