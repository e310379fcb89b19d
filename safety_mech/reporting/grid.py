"""The (start, end) grid as a picture inside a page: every cell says its range and value.

Three ways to the same numbers: the pointer, a finger or the arrow keys (html.js fills the line below the picture),
the cell's <title> where scripts are off, and a table that can be unfolded, for screen readers and for copying.
"""

from collections.abc import Iterator

from jaxtyping import Float
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

from safety_mech.layers import LayerRange
from safety_mech.reporting.html import folded, table

CELL, LEFT, BOTTOM, LEGEND = 16, 46, 42, 34
"""Units of the picture: a cell's side, room for the axes' numbers and names, and for the colour scale below."""

PICTURE = Markup("""<figure class="grid">
<output aria-live="polite">Point at a cell, or choose one with the arrow keys.</output>
<div class="scroll">
<svg viewBox="0 0 {width} {height}" role="group" aria-label="{label}">
{cells}
{marks}
{axes}
{legend}
</svg>
</div>
<figcaption>{caption}</figcaption>
</figure>""")

RECT = Markup(
    '<rect class="cell" data-at="{start}-{end}" x="{x}" y="{y}" width="{side}" height="{side}" fill="{colour}" '
    'tabindex="{tab}" role="img" aria-label="{label}"><title>{label}</title></rect>'
)
MARK = Markup(
    '<rect class="mark" x="{x}" y="{y}" width="{side}" height="{side}" stroke="{colour}" stroke-width="{width}"{dash}/>'
)
TEXT = Markup('<text x="{x}" y="{y}" text-anchor="{anchor}"{turn}>{text}</text>')


def grid_picture(
    means: Float[Tensor, "start end"],
    unit: str,
    found: LayerRange | None = None,
    best: LayerRange | None = None,
) -> Markup:
    """Start of the range upwards, its end to the right, as in `plot_grid`; cells that are no range are left out.

    `found` is framed in black and white, `best` (where it is another) dashed. Raises ValueError without a finite cell.
    """
    n_layers = len(means)
    values = {
        (start, end): float(means[start, end])
        for start in range(n_layers)
        for end in range(start, n_layers)
        if bool(means[start, end].isfinite())
    }
    if not values:
        raise ValueError("grid: no finite value in it; expected a value for every range (start, end), start <= end")
    chosen = found or best or LayerRange(*min(values))
    side = n_layers * CELL
    return Markup("{}\n{}").format(
        PICTURE.format(
            width=LEFT + side + 8,
            height=side + BOTTOM + LEGEND + 8,
            label=f"{unit} by start and end of the scaled range",
            cells=Markup("\n").join(_cells(values, unit, n_layers, (chosen.start, chosen.end))),
            marks=_marks(found, best, n_layers),
            axes=_axes(n_layers),
            legend=_legend(values, unit, n_layers),
            caption=_caption(unit, found, best),
        ),
        folded("All values as a table", _value_table(means, values, unit)),
    )


def _cells(
    values: dict[tuple[int, int], float], unit: str, n_layers: int, tab_stop: tuple[int, int]
) -> Iterator[Markup]:
    low, high = min(values.values()), max(values.values())
    colours = colormaps["cividis"]
    for (start, end), value in values.items():
        yield RECT.format(
            start=start,
            end=end,
            x=LEFT + end * CELL,
            y=_top(start, n_layers),
            side=CELL,
            colour=to_hex(colours((value - low) / (high - low or 1))),
            tab=0 if (start, end) == tab_stop else -1,
            label=f"layers {start} to {end}: {value:.3f} {unit}",
        )


def _top(start: int, n_layers: int) -> int:
    return 4 + (n_layers - 1 - start) * CELL


def _marks(found: LayerRange | None, best: LayerRange | None, n_layers: int) -> Markup:
    """A white line on a black one: seen on dark and on light cells."""
    parts = []
    for layers, dash in ((found, ""), (best if best != found else None, ' stroke-dasharray="3 2"')):
        if layers is None:
            continue
        for colour, width in (("#000", 3.5), ("#fff", 1.5)):
            at = {"x": LEFT + layers.end * CELL, "y": _top(layers.start, n_layers), "side": CELL}
            parts.append(MARK.format(**at, colour=colour, width=width, dash=Markup(dash if colour == "#fff" else "")))
    return Markup("\n").join(parts)


def _axes(n_layers: int) -> Markup:
    step = max(1, round(n_layers / 10))
    side = n_layers * CELL
    turn = Markup(' transform="rotate(-90 12 {})"').format(side / 2)
    parts = [
        TEXT.format(x=LEFT + side / 2, y=side + 34, anchor="middle", turn="", text="end of the scaled range (layer)"),
        TEXT.format(x=12, y=side / 2, anchor="middle", turn=turn, text="start of the scaled range (layer)"),
    ]
    for layer in range(0, n_layers, step):
        middle = layer * CELL + CELL / 2
        parts.append(TEXT.format(x=LEFT + middle, y=side + 18, anchor="middle", turn="", text=layer))
        y = _top(layer, n_layers) + CELL / 2 + 4
        parts.append(TEXT.format(x=LEFT - 6, y=y, anchor="end", turn="", text=layer))
    return Markup("\n").join(parts)


def _legend(values: dict[tuple[int, int], float], unit: str, n_layers: int) -> Markup:
    """The colour scale from the least to the greatest value."""
    top, side, colours = n_layers * CELL + BOTTOM + 4, n_layers * CELL, colormaps["cividis"]
    steps = 40
    bars = [
        Markup('<rect x="{}" y="{}" width="{}" height="10" fill="{}"/>').format(
            LEFT + step * side / steps, top, side / steps + 0.3, to_hex(colours(step / (steps - 1)))
        )
        for step in range(steps)
    ]
    low, high = min(values.values()), max(values.values())
    ends = [
        TEXT.format(x=LEFT, y=top + 24, anchor="start", turn="", text=f"{low:.2f}"),
        TEXT.format(x=LEFT + side / 2, y=top + 24, anchor="middle", turn="", text=unit),
        TEXT.format(x=LEFT + side, y=top + 24, anchor="end", turn="", text=f"{high:.2f}"),
    ]
    return Markup("\n").join([*bars, *ends])


def _caption(unit: str, found: LayerRange | None, best: LayerRange | None) -> str:
    parts = [f"Every range of layers, scaled: {unit}."]
    if found is not None:
        parts.append(f"Full frame: the located range, layers {found.start} to {found.end}.")
    if best is not None:
        if best == found:
            parts.append("It is also the best of the grid.")
        else:
            parts.append(f"Dashed: the best of the grid, layers {best.start} to {best.end}.")
    return " ".join(parts)


def _value_table(means: Tensor, values: dict[tuple[int, int], float], unit: str) -> Markup:
    n_layers = len(means)
    rows = [
        [str(start), *(f"{values[start, end]:.2f}" if (start, end) in values else "" for end in range(n_layers))]
        for start in range(n_layers)
    ]
    return table(["start \\ end", *map(str, range(n_layers))], rows, f"{unit}, by start (down) and end (across)")
