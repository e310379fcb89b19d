"""Figures: arrays in, a matplotlib Figure out; nothing is saved here.

One look for all: the Okabe-Ito colours (told apart by colour-blind readers) and a different line style and marker
each, so that they can be told apart in black and white.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from safety_mech.divergence import GapCurve, PairStats
from safety_mech.layers import LayerRange
from safety_mech.locate import Sweep

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#666666"
STYLES: tuple[dict[str, Any], ...] = (
    {"color": ORANGE, "linestyle": "-", "marker": "o"},
    {"color": BLUE, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
    {"color": PURPLE, "linestyle": ":", "marker": "D"},
)


def new_figure(columns: int = 1, rows: int = 1, width: float = 6.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure that belongs to no GUI and no pyplot state, and its axes in reading order."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.grid(alpha=0.25, linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def mark_range(ax: Axes, layers: LayerRange | None, label: str = "initial range") -> None:
    """Shade the layers of a range; both of its ends are inside."""
    if layers is not None:
        span = (layers.start - 0.5, layers.end + 0.5)
        ax.axvspan(
            *span,
            facecolor="#F0E442",
            alpha=0.28,
            hatch="//",
            edgecolor="#B8AE20",
            linewidth=0.0,
            label=f"{label} {layers}",
        )


def layer_axis(ax: Axes, n_layers: int) -> None:
    step = max(1, round(n_layers / 10))
    ax.set_xticks(range(0, n_layers, step))
    ax.set_xlim(-0.6, n_layers - 0.4)
    ax.set_xlabel("layer (0 = first block)")


def plot_gap(curves: Mapping[str, GapCurve], ranges: Mapping[str, LayerRange | None], title: str = "") -> Figure:
    """The paper's two panels (figure 2): cosines with spread, and the gap in degrees with its interval.

    The first curve is the one whose cosines are drawn and whose range is marked; the gap panel has all of them.
    """
    figure, (left, right) = new_figure(columns=2)
    name, first = next(iter(curves.items()))
    _draw_cosines(left, first)
    left.set_title(f"cosine of two prompts: {name}", fontsize=10)
    for (label, curve), style in zip(curves.items(), cycle(STYLES), strict=False):
        _draw_gap(right, curve, label, style)
    for ax in (left, right):
        mark_range(ax, ranges.get(name))
        layer_axis(ax, first.n_layers)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_ylabel("angle gap (degrees)")
    right.set_title(f"normal-malicious minus normal-normal, {first.level:.0%} interval", fontsize=10)
    for ax in (left, right):
        ax.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _draw_cosines(ax: Axes, curve: GapCurve) -> None:
    parts: list[tuple[str, PairStats]] = [
        ("normal-malicious", curve.normal_malicious),
        ("normal-normal", curve.normal_normal),
        ("malicious-malicious", curve.malicious_malicious),
    ]
    layers = np.arange(curve.n_layers)
    for (label, stats), style in zip(parts, STYLES, strict=False):
        mean, std = stats.cosine_mean.numpy(), stats.cosine_std.numpy()
        ax.plot(layers, mean, label=f"{label} (mean, ±1 sd)", markersize=3, linewidth=1.4, **style)
        ax.fill_between(layers, mean - std, mean + std, color=style["color"], alpha=0.12, linewidth=0)
    ax.set_ylabel("cosine similarity at the last token")


def _draw_gap(ax: Axes, curve: GapCurve, label: str, style: Mapping[str, Any]) -> None:
    layers = np.arange(curve.n_layers)
    ax.plot(layers, curve.gap.numpy(), label=label, markersize=3, linewidth=1.4, **style)
    ax.fill_between(layers, curve.low.numpy(), curve.high.numpy(), color=style["color"], alpha=0.18, linewidth=0)


def plot_sweeps(sweeps: Sequence[Sweep], baseline: Tensor | None, unit: str) -> Figure:
    """The two lines of the (i, j) grid that the search saw; the best of each is marked, the baseline dotted."""
    figure, axes = new_figure(columns=len(sweeps), width=5.0)
    for ax, sweep, style in zip(axes, sweeps, STYLES, strict=False):
        bounds = [layers.end if sweep.bound == "upper" else layers.start for layers in sweep.ranges]
        held = sweep.best.start if sweep.bound == "upper" else sweep.best.end
        ax.plot(bounds, sweep.values, **style, label="scaled")
        best = sweep.ranges.index(sweep.best)
        ax.plot(bounds[best], sweep.values[best], "*", color="black", markersize=14, label=f"best {sweep.best}")
        if baseline is not None:
            ax.axhline(float(baseline.mean()), color=GREY, linestyle=":", label="unscaled")
        ax.set_xticks(bounds)
        moving, fixed = ("end", "start") if sweep.bound == "upper" else ("start", "end")
        ax.set_xlabel(f"{moving} of the scaled range (layer); {fixed} held at {held}")
        ax.set_ylabel(unit)
        ax.legend(fontsize=8, frameon=False)
    return figure


def plot_grid(grid: Tensor, found: LayerRange | None, unit: str, best: LayerRange | None = None) -> Figure:
    """Every range: start on the vertical axis, end on the horizontal; the located range and the grid's best marked."""
    figure, (ax,) = new_figure(width=6.5, height=5.2)
    image = ax.imshow(grid.mean(-1).numpy(), cmap="cividis", origin="lower")
    figure.colorbar(image, ax=ax, label=unit)
    ax.grid(visible=False)
    if found is not None:
        _mark_cell(ax, found, "s", f"located {found}")
    if best is not None and best != found:
        _mark_cell(ax, best, "D", f"best of the grid, no wider: {best}")
    if found is not None or best is not None:
        ax.legend(loc="lower right", fontsize=8)
    ax.set_xlabel("end of the scaled range (layer)")
    ax.set_ylabel("start of the scaled range (layer)")
    return figure


def _mark_cell(ax: Axes, layers: LayerRange, marker: str, label: str) -> None:
    """A black mark with a white edge inside: seen on dark and on light cells."""
    at = ([layers.end], [layers.start])
    ax.plot(*at, marker, markersize=11, markerfacecolor="none", markeredgecolor="black", linestyle="none", label=label)
    ax.plot(*at, marker, markersize=9, markerfacecolor="none", markeredgecolor="white", linestyle="none")
