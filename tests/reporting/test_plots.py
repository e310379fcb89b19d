"""The gap figure: units, legend, the range marked at its ends, curves told apart without colour, nothing saved."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from safety_mech import GapCurve, LayerRange, PairStats, plot_gap
from safety_mech.divergence.angles import GapStatistic, SymmetricGap
from safety_mech.reporting.plots import STYLES, layer_axis, mark_range, new_figure, plot_dose, plot_grid

N_LAYERS = 12


def stats_of(angle: float) -> PairStats:
    angles = torch.full((N_LAYERS,), angle, dtype=torch.float64)
    cosine = torch.cos(torch.deg2rad(angles))
    return PairStats(cosine, 0.1 * cosine, angles, torch.ones_like(angles), n_pairs=10)


def curve_of(peak: float) -> GapCurve:
    """A gap that rises to `peak`; the symmetric one rises to twice of it."""
    gap = torch.linspace(0, peak, N_LAYERS, dtype=torch.float64)
    paper, twice = (
        GapStatistic(line, line - 0.5, line + 0.5, torch.full_like(line, 0.01), 0.01, line.repeat(5, 1), line[None])
        for line in (gap, 2 * gap)
    )
    return GapCurve(
        **vars(paper),
        normal_normal=stats_of(10.0),
        malicious_malicious=stats_of(20.0),
        normal_malicious=stats_of(10.0 + peak),
        symmetric=SymmetricGap(**vars(twice), permuted=twice.null),
        level=0.95,
        seed=0,
        resampled="prompts",
        n_resampled=(5, 5),
        r=None,
    )


def curves_of(n: int) -> dict[str, GapCurve]:
    return {f"set {number}": curve_of(1.0 + number) for number in range(n)}


def curve_lines(ax: Axes) -> list[Line2D]:
    """The curves, without the line at 0 degrees and what spread alone makes."""
    lines = [line for line in ax.lines if len(np.asarray(line.get_xdata())) == N_LAYERS]
    return [line for line in lines if line.get_gid() != "spread alone"]


def legend_texts(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def marks(ax: Axes) -> list[tuple[float, float]]:
    """From where to where the axes are shaded."""
    spans = [patch.get_bbox() for patch in ax.patches if isinstance(patch, Rectangle)]
    return [(span.x0, span.x1) for span in spans]


@pytest.fixture
def figure() -> Figure:
    return plot_gap(curves_of(2), {"set 0": LayerRange(3, 6), "set 1": LayerRange(1, 2)}, "tiny, template own")


def test_it_gives_a_figure_of_three_panels_outside_of_pyplot(figure: Figure) -> None:
    import matplotlib.pyplot as plt

    assert isinstance(figure, Figure)
    assert isinstance(figure.canvas, FigureCanvasAgg)
    assert len(figure.axes) == 3
    assert plt.get_fignums() == [], "no GUI and no global state"
    assert figure.get_suptitle() == "tiny, template own"


def test_axes_say_what_and_in_which_unit(figure: Figure) -> None:
    left, middle, right = figure.axes
    assert left.get_ylabel() == "cosine similarity at the last token"
    assert middle.get_ylabel() == "angle gap (degrees)"
    assert right.get_ylabel() == "symmetric gap (degrees)"
    assert middle.get_ylim() == right.get_ylim(), "the two statistics are compared on one scale"
    assert right.get_ylim()[1] > float(curve_of(2.0).symmetric.high.max())
    assert {ax.get_xlabel() for ax in figure.axes} == {"layer (0 = first block)"}


def test_the_legends_name_every_curve_and_the_range(figure: Figure) -> None:
    texts = [legend_texts(ax) for ax in figure.axes]
    mark = "initial range [3, 6]"
    assert texts[1] == ["set 0", "set 1", mark]
    assert texts[2] == ["set 0", "set 1", "spread alone (same colour)", mark]
    kinds = ("normal-malicious", "normal-normal", "malicious-malicious")
    assert texts[0] == [*(f"{kind} (mean, ±1 sd)" for kind in kinds), mark]


def test_the_curves_are_the_data(figure: Figure) -> None:
    curves = list(curves_of(2).values())
    left, middle, right = figure.axes
    for ax, parts in ((middle, curves), (right, [curve.symmetric for curve in curves])):
        for line, part in zip(curve_lines(ax), parts, strict=True):
            assert np.array_equal(np.asarray(line.get_xdata()), np.arange(N_LAYERS))
            assert np.array_equal(np.asarray(line.get_ydata()), part.gap.numpy())
    alone = [line for line in right.lines if line.get_gid() == "spread alone"]
    for line, curve in zip(alone, curves, strict=True):
        assert np.array_equal(np.asarray(line.get_ydata()), curve.symmetric.spread_alone.numpy())
    kinds = (curves[0].normal_malicious, curves[0].normal_normal, curves[0].malicious_malicious)
    for line, kind in zip(curve_lines(left), kinds, strict=True):
        assert np.array_equal(np.asarray(line.get_ydata()), kind.cosine_mean.numpy())


def test_the_band_is_the_interval(figure: Figure) -> None:
    vertices = np.asarray(figure.axes[1].collections[0].get_paths()[0].vertices)
    at_peak = vertices[vertices[:, 0] == N_LAYERS - 1][:, 1]
    curve = curve_of(1.0)
    assert at_peak.min() == float(curve.low[-1])
    assert at_peak.max() == float(curve.high[-1])
    assert "95% interval" in figure.axes[1].get_title()


def test_the_range_is_shaded_with_both_of_its_ends(figure: Figure) -> None:
    assert [marks(ax) for ax in figure.axes] == [[(2.5, 6.5)]] * 3


@pytest.mark.slow_cases
@pytest.mark.parametrize(("start", "end"), [(0, 0), (4, 4), (0, 11)])
def test_one_layer_is_one_wide(start: int, end: int) -> None:
    figure = plot_gap({"a": curve_of(1.0)}, {"a": LayerRange(start, end)})
    assert marks(figure.axes[1]) == [(start - 0.5, end + 0.5)]
    assert figure.axes[1].get_xlim()[0] < start - 0.5 + 1e-9
    assert figure.axes[1].get_xlim()[1] > end + 0.5 - 1e-9


@pytest.mark.slow_cases
@pytest.mark.parametrize("ranges", [{}, {"set 0": None}, {"set 1": LayerRange(1, 2)}])
def test_without_a_range_nothing_is_shaded(ranges: dict[str, LayerRange | None]) -> None:
    figure = plot_gap(curves_of(2), ranges)
    assert [marks(ax) for ax in figure.axes] == [[], [], []]
    assert not [text for ax in figure.axes for text in legend_texts(ax) if "range" in text]


def test_the_shading_is_hatched() -> None:
    """A printer without colours shows a hatch; a pale yellow it does not."""
    _, (ax,) = new_figure()
    mark_range(ax, LayerRange(2, 3), "found")
    (patch,) = [patch for patch in ax.patches if isinstance(patch, Patch)]
    assert patch.get_hatch()
    assert patch.get_label() == "found [2, 3]"


@pytest.mark.slow
@pytest.mark.parametrize("n", range(1, len(STYLES) + 1))
def test_curves_are_told_apart_without_colour(n: int) -> None:
    figure = plot_gap(curves_of(n), {})
    for ax, count in zip(figure.axes, (3, n, n), strict=True):
        lines = curve_lines(ax)
        assert len(lines) == count
        assert len({line._unscaled_dash_pattern for line in lines}) == count  # get_linestyle calls all dashes "--"
        assert len({line.get_marker() for line in lines}) == count
        assert len({line.get_color() for line in lines}) == count
        assert all(line.get_marker() not in ("", "None", None) for line in lines)


@pytest.mark.slow
def test_no_curve_is_dropped() -> None:
    assert len(curve_lines(plot_gap(curves_of(len(STYLES) + 1), {}).axes[1])) == len(STYLES) + 1


def test_the_interval_level_is_the_curves() -> None:
    assert "90% interval" in plot_gap({"a": replace(curve_of(1.0), level=0.9)}, {}).axes[1].get_title()


@pytest.mark.slow
def test_a_figure_can_be_drawn_and_nothing_is_saved(
    figure: Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: pytest.fail("a plot function saved its figure"))
    plot_gap(curves_of(2), {"set 0": LayerRange(3, 6)}).canvas.draw()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    figure.savefig(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 0


@pytest.mark.parametrize("n_layers", [1, 6, 30, 80])
def test_the_layer_axis_has_about_ten_whole_ticks(n_layers: int) -> None:
    _, (ax,) = new_figure()
    layer_axis(ax, n_layers)
    ticks = ax.get_xticks()
    assert ticks[0] == 0
    assert all(tick == int(tick) < n_layers for tick in ticks)
    assert len(ticks) <= 16


def test_dose_has_a_column_an_attack_and_a_line_a_method() -> None:
    doses = torch.tensor([0.0, 8, 16])
    refused = torch.tensor([[1.0, 0.5, 0.0], [1.0, 0.7, 0.2]])
    log_odds = 4 * refused - 2
    methods = {name: (doses, refused * scale, log_odds * scale) for name, scale in (("full", 1.0), ("SPPFT", 0.5))}
    figure = plot_dose({"normal": methods, "implicit": methods}, n_prompts=40)
    upper, other, lower, _ = figure.axes
    full, frozen, half = upper.lines
    assert full.get_ydata() == pytest.approx([100, 60, 10])
    assert frozen.get_ydata() == pytest.approx([50, 30, 5])
    assert half.get_ydata() == pytest.approx([50, 50])  # half of what is refused at dose 0
    assert lower.lines[0].get_ydata() == pytest.approx([2, 0.4, -1.6])
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["full", "SPPFT", "half of the refusals"]
    assert (upper.get_title(), other.get_title()) == ("attack: normal", "attack: implicit")
    assert upper.get_ylabel() == "malicious prompts refused (% of 40)"
    assert "nats" in lower.get_ylabel()
    assert "examples" in lower.get_xlabel()
    band = upper.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0, 100))


def test_the_grid_has_starts_upwards_and_ends_to_the_right() -> None:
    grid = torch.full((3, 3, 2), torch.nan, dtype=torch.float64)
    for start, end in torch.triu_indices(3, 3).T.tolist():
        grid[start, end] = torch.tensor([10 * start + end, 10 * start + end + 1])
    (ax, _) = plot_grid(grid, LayerRange(0, 2), "nats", LayerRange(1, 1)).axes
    (image,) = ax.images
    shown = np.ma.filled(image.get_array(), np.nan)
    assert shown[0].tolist() == [0.5, 1.5, 2.5], "start 0: the bottom row"
    assert shown[1, 2] == 12.5
    assert np.isnan(shown[2, 0]), "no range ends before it starts"
    assert image.origin == "lower"
    located, best = ([line.get_xydata().tolist() for line in ax.lines][k] for k in (0, 2))
    assert (located, best) == ([[2.0, 0.0]], [[1.0, 1.0]])
    assert legend_texts(ax) == ["located [0, 2]", "best of the grid: [1, 1]"]
    assert (ax.get_xlabel()[:3], ax.get_ylabel()[:5]) == ("end", "start")
