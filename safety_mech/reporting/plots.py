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
from matplotlib.image import AxesImage
from torch import Tensor

from safety_mech.attention.question import QuestionAttention, min_max
from safety_mech.attention.word_classes import KINDS, WordShares
from safety_mech.divergence.angles import GapCurve, GapStatistic, PairStats
from safety_mech.layers import LayerRange
from safety_mech.localization.alpha import MAX_DEGENERATE, AlphaChoice
from safety_mech.localization.search import Sweep
from safety_mech.stats import bootstrap_mean

BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#666666"
STYLES: tuple[dict[str, Any], ...] = (
    {"color": ORANGE, "linestyle": "-", "marker": "o"},
    {"color": BLUE, "linestyle": "--", "marker": "s"},
    {"color": GREEN, "linestyle": "-.", "marker": "^"},
    {"color": PURPLE, "linestyle": ":", "marker": "D"},
    {"color": SKY, "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "v"},
    {"color": GREY, "linestyle": (0, (9, 3)), "marker": "P"},
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
    """The paper's two panels (figure 2): cosines with spread, and the gap in degrees with its interval; beside them the
    symmetric statistic, on the same scale.

    The first curve is the one whose cosines are drawn and whose range is marked; the gap panels have all of them.
    Thin dotted lines in the third: what the spreads alone make of the symmetric statistic.
    """
    figure, (left, middle, right) = new_figure(columns=3, width=5.4)
    right.sharey(middle)
    name, first = next(iter(curves.items()))
    _draw_cosines(left, first)
    left.set_title(f"cosine of two prompts: {name}", fontsize=10)
    for (label, curve), style in zip(curves.items(), cycle(STYLES), strict=False):
        _draw_gap(middle, curve, label, style)
        _draw_gap(right, curve.symmetric, label, style)
        spread = curve.symmetric.spread_alone.numpy()
        right.plot(spread, color=style["color"], linewidth=0.9, linestyle=(0, (1, 2)), gid="spread alone")
    right.plot([], [], color="black", linewidth=0.9, linestyle=(0, (1, 2)), label="spread alone (same colour)")
    panels = (
        (middle, "angle gap (degrees)", f"normal-malicious minus normal-normal, {first.level:.0%} interval"),
        (right, "symmetric gap (degrees)", f"minus the mean of both within, {first.level:.0%} interval"),
    )
    for ax, label, heading in panels:
        ax.axhline(0, color="black", linewidth=0.8)
        ax.set_ylabel(label)
        ax.set_title(heading, fontsize=10)
    for ax in (left, middle, right):
        mark_range(ax, ranges.get(name))
        layer_axis(ax, first.n_layers)
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


def _draw_gap(ax: Axes, curve: GapStatistic, label: str, style: Mapping[str, Any]) -> None:
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


def plot_alpha(choice: AlphaChoice, baseline: float) -> Figure:
    """The curve over alpha: refusals with the best range scaled, spread between ranges, degenerate answers."""
    figure, (ax,) = new_figure()
    alphas = [point.alpha for point in choice.points]
    lines = {
        "refused with the best range scaled": [point.rate for point in choice.points],
        "spread between ranges, noise taken off": [point.spread for point in choice.points],
        "degenerate answers": [point.degenerate for point in choice.points],
    }
    for (label, values), style in zip(lines.items(), STYLES, strict=False):
        ax.plot(alphas, values, label=label, **style)
    ax.axhline(baseline, color=GREY, linestyle=":", label=f"refused unscaled ({baseline:.2f})")
    limit = f"degenerate answers stay under {MAX_DEGENERATE:.0%}"
    ax.axhline(MAX_DEGENERATE, color="black", linewidth=0.8, linestyle=(0, (1, 3)), label=limit)
    ax.axvline(choice.alpha, color="black", linewidth=1.0, label=f"alpha chosen: {choice.alpha}")
    ax.set_xticks(alphas)
    ax.set_xlabel("alpha (1 = unscaled)")
    ax.set_ylabel("share of the prompts")
    ax.set_ylim(-0.02, 1.02)
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
        _mark_cell(ax, best, "D", f"best of the grid: {best}")
    if found is not None or best is not None:
        ax.legend(loc="upper left", fontsize=8, frameon=False)
    ax.set_xlabel("end of the scaled range (layer)")
    ax.set_ylabel("start of the scaled range (layer)")
    return figure


def _mark_cell(ax: Axes, layers: LayerRange, marker: str, label: str) -> None:
    """A black mark with a white edge inside: seen on dark and on light cells."""
    at = ([layers.end], [layers.start])
    ax.plot(*at, marker, markersize=11, markerfacecolor="none", markeredgecolor="black", linestyle="none", label=label)
    ax.plot(*at, marker, markersize=9, markerfacecolor="none", markeredgecolor="white", linestyle="none")


def plot_attention(attention: QuestionAttention, layers: LayerRange | None = None, title: str = "") -> Figure:
    """The paper's heatmap (A.5): a row a layer, a column a token of the question, every row min-max scaled.

    `words.by_word(attention)` gives a column a word. The edges of `layers` are drawn across.
    """
    figure, (ax,) = new_figure(width=2.6 + 0.36 * len(attention.tokens), height=5.2)
    image = _draw_attention(ax, attention, layers)
    figure.colorbar(image, ax=ax, label=_ATTENTION_LABEL)
    ax.set_title(title or "attention of the last token over the question", fontsize=10)
    return figure


def plot_contrastive_pair(
    harmful: QuestionAttention, harmless: QuestionAttention, layers: LayerRange | None = None
) -> Figure:
    """The heatmaps of a contrastive pair side by side; each row is scaled within its own prompt."""
    columns = max(len(harmful.tokens), len(harmless.tokens))
    figure, axes = new_figure(columns=2, width=1.6 + 0.36 * columns, height=5.2)
    images = [_draw_attention(ax, attention, layers) for ax, attention in zip(axes, (harmful, harmless), strict=True)]
    for ax, name in zip(axes, ("harmful prompt", "harmless prompt"), strict=True):
        ax.set_title(name, fontsize=10)
    axes[1].set_ylabel("")
    figure.colorbar(images[0], ax=axes, label=_ATTENTION_LABEL)
    return figure


_ATTENTION_LABEL = "attention of the last token, scaled per layer\n(0 = least of the question, 1 = most)"


def _draw_attention(ax: Axes, attention: QuestionAttention, layers: LayerRange | None) -> AxesImage:
    image = ax.imshow(
        min_max(attention.weights).numpy(), cmap="cividis", origin="lower", aspect="auto", vmin=0.0, vmax=1.0
    )
    ax.grid(visible=False)
    labels = [token.strip() or repr(token)[1:-1] for token in attention.tokens]
    ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    n_layers = len(attention.weights)
    ax.set_yticks(range(0, n_layers, max(1, round(n_layers / 10))))
    ax.set_ylabel("layer (0 = first block)")
    _mark_rows(ax, layers)
    return image


def _mark_rows(ax: Axes, layers: LayerRange | None) -> None:
    """The edges of a range across a heatmap, dashed white on black: seen on dark and on light cells."""
    if layers is None:
        return
    for edge in (layers.start - 0.5, layers.end + 0.5):
        ax.axhline(edge, color="black", linewidth=2.4)
        ax.axhline(edge, color="white", linewidth=1.2, linestyle=(0, (4, 2)))
    ax.text(
        1.01, layers.centre, f"range {layers}", transform=ax.get_yaxis_transform(), rotation=90, va="center", fontsize=8
    )


def plot_word_shares(shares: Mapping[str, WordShares], layers: LayerRange | None = None, level: float = 0.95) -> Figure:
    """Share of the question's attention on each kind of word by layer, with intervals over prompts; a panel a set.

    A thin line of the same style, without marks, is what equal attention to every token would give.
    """
    figure, axes = new_figure(columns=len(shares))
    for ax, (name, part) in zip(axes, shares.items(), strict=True):
        mean, low, high = (100 * values for values in bootstrap_mean(part.shares, level=level))
        equal = 100 * part.uniform.mean(dim=0)
        for index, (kind, style) in enumerate(zip(KINDS, STYLES, strict=False)):
            x = np.arange(part.n_layers)
            ax.plot(x, mean[:, index].numpy(), label=kind, markersize=3, linewidth=1.4, **style)
            ax.fill_between(
                x, low[:, index].numpy(), high[:, index].numpy(), color=style["color"], alpha=0.18, linewidth=0
            )
            ax.axhline(float(equal[index]), color=style["color"], linestyle=style["linestyle"], linewidth=0.8)
        mark_range(ax, layers, "range")
        layer_axis(ax, part.n_layers)
        ax.set_ylim(bottom=0)
        ax.set_ylabel("share of the attention over the question (%)")
        ax.set_title(f"{name}: {len(part.shares)} prompts, {level:.0%} interval; thin: equal attention", fontsize=10)
        ax.legend(fontsize=8, frameon=False)
    return figure


def plot_dose(curves: Mapping[str, Mapping[str, tuple[Tensor, Tensor, Tensor]]], n_prompts: int) -> Figure:
    """Dose and response: what is left of refusals after so many examples of an attack, a column an attack.

    `curves`: by attack and method, (doses [point], refused share [seed point], mean log-odds [seed point]). Lines are
    means over seeds, bands reach from the least to the greatest seed; dotted, half of the refusals at dose 0.
    """
    figure, axes = new_figure(columns=len(curves), rows=2, width=4.6, height=3.2)
    for column, (attack, methods) in enumerate(curves.items()):
        upper, lower = axes[column], axes[column + len(curves)]
        for (name, (doses, refused, log_odds)), style in zip(methods.items(), cycle(STYLES), strict=False):
            for ax, values in ((upper, 100 * refused), (lower, log_odds)):
                ax.plot(doses, values.mean(0), label=name, markersize=4, linewidth=1.4, **style)
                ax.fill_between(doses, values.amin(0), values.amax(0), color=style["color"], alpha=0.12, linewidth=0)
        start = next(iter(methods.values()))[1][:, 0].mean()
        upper.axhline(50 * float(start), color="black", linestyle=":", linewidth=0.9, label="half of the refusals")
        lower.axhline(0, color="black", linewidth=0.8)
        upper.set_title(f"attack: {attack}", fontsize=10)
        upper.set_ylim(-4, 104)
        lower.set_xlabel("examples of the attack seen")
    axes[0].set_ylabel(f"malicious prompts refused (% of {n_prompts})")
    axes[len(curves)].set_ylabel("mean refusal log-odds (nats)")
    axes[0].legend(fontsize=7, frameon=False)
    return figure
