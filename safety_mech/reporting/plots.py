"""Figures: arrays in, a matplotlib Figure out; nothing is saved here.

One look for all: the Okabe-Ito colours (told apart by colour-blind readers) and a different line style and marker
each, so that they can be told apart in black and white.
"""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from safety_mech.attention.question import QuestionAttention, min_max
from safety_mech.attention.word_classes import KINDS, WordShares
from safety_mech.divergence.angles import GapCurve, PairStats
from safety_mech.layers import LayerRange
from safety_mech.localization.alpha import MAX_DEGENERATE, AlphaChoice
from safety_mech.localization.search import Sweep
from safety_mech.stats import bootstrap_mean

Line = Float[Tensor, " point"]
Style = Mapping[str, Any]

BLUE, ORANGE, GREEN, PURPLE, SKY, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#666666"
STYLES: tuple[Style, ...] = (
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
    """Shade the layers of a range."""
    if layers is not None:
        look: dict[str, Any] = {"facecolor": "#F0E442", "alpha": 0.28, "hatch": "//", "edgecolor": "#B8AE20"}
        ax.axvspan(*edges(layers), linewidth=0.0, label=f"{label} {layers}", **look)


def edges(layers: LayerRange) -> tuple[float, float]:
    """From where to where a range is drawn: both of its ends are inside."""
    return layers.start - 0.5, layers.end + 0.5


def layer_axis(ax: Axes, n_layers: int, ylabel: str = "", title: str = "") -> None:
    """Layers from left to right; what is drawn over them, in which unit, and the panel's title."""
    ticks = range(0, n_layers, max(1, round(n_layers / 10)))
    ax.set(xticks=ticks, xlim=(-0.6, n_layers - 0.4), xlabel="layer (0 = first block)", ylabel=ylabel)
    ax.set_title(title, fontsize=10)


def line_with_band(
    ax: Axes, line: Line, low: Line, high: Line, label: str, style: Style, shade: float = 0.18, x: Line | None = None
) -> None:
    """A line in one of STYLES, and from `low` to `high` a band of its colour, as opaque as `shade`; `x`: by default the
    layers, 0, 1, 2, ..."""
    places = range(len(line)) if x is None else x
    ax.plot(places, line, label=label, linewidth=1.4, **{"markersize": 3, **style})
    ax.fill_between(places, low, high, color=style["color"], alpha=shade, linewidth=0)


def plot_gap(curves: Mapping[str, GapCurve], ranges: Mapping[str, LayerRange | None], title: str = "") -> Figure:
    """The paper's two panels (figure 2): cosines with spread, and the gap in degrees with its interval; beside them the
    symmetric statistic, on the same scale.

    The first curve is the one whose cosines are drawn and whose range is marked; the gap panels have all of them.
    Thin dotted lines in the third: what the spreads alone make of the symmetric statistic.
    """
    figure, (left, middle, right) = new_figure(columns=3, width=5.4)
    right.sharey(middle)
    name, first = next(iter(curves.items()))
    for kind, style in zip(("normal_malicious", "normal_normal", "malicious_malicious"), STYLES, strict=False):
        stats: PairStats = getattr(first, kind)
        band = (stats.cosine_mean - stats.cosine_std, stats.cosine_mean + stats.cosine_std)
        label = f"{kind.replace('_', '-')} (mean, ±1 sd)"
        line_with_band(left, stats.cosine_mean, *band, label, style, shade=0.12)
    for (label, curve), style in zip(curves.items(), cycle(STYLES), strict=False):
        for ax, part in ((middle, curve), (right, curve.symmetric)):
            line_with_band(ax, part.gap, part.low, part.high, label, style)
        spread = curve.symmetric.spread_alone.numpy()
        right.plot(spread, color=style["color"], linewidth=0.9, linestyle=(0, (1, 2)), gid="spread alone")
    right.plot([], [], color="black", linewidth=0.9, linestyle=(0, (1, 2)), label="spread alone (same colour)")
    panels = {
        "cosine similarity at the last token": f"cosine of two prompts: {name}",
        "angle gap (degrees)": f"normal-malicious minus normal-normal, {first.level:.0%} interval",
        "symmetric gap (degrees)": f"minus the mean of both within, {first.level:.0%} interval",
    }
    for ax, (label, heading) in zip((left, middle, right), panels.items(), strict=True):
        if ax is not left:
            ax.axhline(0, color="black", linewidth=0.8)
        mark_range(ax, ranges.get(name))
        layer_axis(ax, first.n_layers, label, heading)
        ax.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def plot_sweeps(sweeps: Sequence[Sweep], baseline: Tensor | None, unit: str) -> Figure:
    """The two lines of the (i, j) grid that the search saw; the best of each is marked, the baseline dotted."""
    figure, axes = new_figure(columns=len(sweeps), width=5.0)
    for ax, sweep, style in zip(axes, sweeps, STYLES, strict=False):
        moving, fixed = ("end", "start") if sweep.bound == "upper" else ("start", "end")
        bounds = [getattr(layers, moving) for layers in sweep.ranges]
        ax.plot(bounds, sweep.values, **style, label="scaled")
        best = sweep.ranges.index(sweep.best)
        ax.plot(bounds[best], sweep.values[best], "*", color="black", markersize=14, label=f"best {sweep.best}")
        if baseline is not None:
            ax.axhline(float(baseline.mean()), color=GREY, linestyle=":", label="unscaled")
        held = f"{moving} of the scaled range (layer); {fixed} held at {getattr(sweep.best, fixed)}"
        ax.set(xticks=bounds, xlabel=held, ylabel=unit)
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
    ax.set(xticks=alphas, xlabel="alpha (1 = unscaled)", ylabel="share of the prompts", ylim=(-0.02, 1.02))
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
    ax.set(xlabel="end of the scaled range (layer)", ylabel="start of the scaled range (layer)")
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
    return _attention_figure({title or "attention of the last token over the question": attention}, layers, margin=2.6)


def plot_contrastive_pair(
    harmful: QuestionAttention, harmless: QuestionAttention, layers: LayerRange | None = None
) -> Figure:
    """The heatmaps of a contrastive pair side by side; each row is scaled within its own prompt."""
    return _attention_figure({"harmful prompt": harmful, "harmless prompt": harmless}, layers, margin=1.6)


def _attention_figure(panels: Mapping[str, QuestionAttention], layers: LayerRange | None, margin: float) -> Figure:
    """A heatmap under each title; `margin`: the width of a panel beside its tokens."""
    n_tokens = max(len(attention.tokens) for attention in panels.values())
    figure, axes = new_figure(columns=len(panels), width=margin + 0.36 * n_tokens, height=5.2)
    for ax, (title, attention) in zip(axes, panels.items(), strict=True):
        scaled = min_max(attention.weights).numpy()
        ax.imshow(scaled, cmap="cividis", origin="lower", aspect="auto", vmin=0.0, vmax=1.0)
        ax.grid(visible=False)
        labels = [token.strip() or repr(token)[1:-1] for token in attention.tokens]
        ax.set_xticks(range(len(labels)), labels, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
        ax.set_yticks(range(0, len(scaled), max(1, round(len(scaled) / 10))))
        ax.set_title(title, fontsize=10)
        for edge in edges(layers) if layers else ():  # dashed white on black: seen on dark and on light cells
            ax.axhline(edge, color="black", linewidth=2.4)
            ax.axhline(edge, color="white", linewidth=1.2, linestyle=(0, (4, 2)))
        if layers:
            beside = ax.get_yaxis_transform()
            ax.text(1.01, layers.centre, f"range {layers}", transform=beside, rotation=90, va="center", fontsize=8)
    axes[0].set_ylabel("layer (0 = first block)")
    scale = "attention of the last token, scaled per layer\n(0 = least of the question, 1 = most)"
    figure.colorbar(axes[0].images[0], ax=axes, label=scale)
    return figure


def plot_word_shares(shares: Mapping[str, WordShares], layers: LayerRange | None = None, level: float = 0.95) -> Figure:
    """Share of the question's attention on each kind of word by layer, with intervals over prompts; a panel a set.

    A thin line of the same style, without marks, is what equal attention to every token would give.
    """
    figure, axes = new_figure(columns=len(shares))
    for ax, (name, part) in zip(axes, shares.items(), strict=True):
        mean, low, high = (100 * values for values in bootstrap_mean(part.shares, level=level))
        equal = 100 * part.uniform.mean(dim=0)
        for index, (kind, style) in enumerate(zip(KINDS, STYLES, strict=False)):
            line_with_band(ax, mean[:, index], low[:, index], high[:, index], kind, style)
            ax.axhline(float(equal[index]), color=style["color"], linestyle=style["linestyle"], linewidth=0.8)
        mark_range(ax, layers, "range")
        heading = f"{name}: {len(part.shares)} prompts, {level:.0%} interval; thin: equal attention"
        layer_axis(ax, part.n_layers, "share of the attention over the question (%)", heading)
        ax.set_ylim(bottom=0)
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
                seeds = (values.mean(0), values.amin(0), values.amax(0))
                line_with_band(ax, *seeds, name, {**style, "markersize": 4}, shade=0.12, x=doses)
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
