"""The (start, end) grid as a picture inside a page: every cell says its range and value.

Three ways to the same numbers: the pointer, a finger or the arrow keys (html.js fills the line below the picture),
the cell's <title> where scripts are off, and a table that can be unfolded, for screen readers and for copying.
"""

from jaxtyping import Float
from markupsafe import Markup
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

from safety_mech.layers import LayerRange
from safety_mech.reporting.html import folded, table
from safety_mech.reporting.templates import render

CELL, LEFT, BOTTOM = 16, 46, 42
"""Units of the picture: a cell's side, room for the vertical axis' and for the horizontal axis' numbers and name."""


def grid_picture(
    means: Float[Tensor, "start end"],
    unit: str,
    found: LayerRange | None = None,
    best: LayerRange | None = None,
) -> Markup:
    """Draw every range, its start upwards and its end to the right, as in `plot_grid`.

    `found` is framed in black and white, `best` (where it is another) dashed. Raises ValueError without a finite cell.
    """
    n_layers = len(means)
    values = {
        LayerRange(start, end): float(means[start, end])
        for start in range(n_layers)
        for end in range(start, n_layers)
        if bool(means[start, end].isfinite())
    }
    if not values:
        raise ValueError("grid: no finite value in it; expected a value for every range (start, end), start <= end")
    low, high, colours = min(values.values()), max(values.values()), colormaps["cividis"]
    chosen = found or best or next(iter(values))

    def top(start: int) -> int:
        return 4 + (n_layers - 1 - start) * CELL

    def place(layers: LayerRange) -> dict[str, int]:
        return {"x": LEFT + layers.end * CELL, "y": top(layers.start)}

    cells = [
        {
            "start": layers.start,
            "end": layers.end,
            **place(layers),
            "colour": to_hex(colours((value - low) / (high - low or 1))),
            "tab": 0 if layers == chosen else -1,
            "label": f"layers {layers.start} to {layers.end}: {value:.3f} {unit}",
        }
        for layers, value in values.items()
    ]
    frames = [(found, ""), (best if best != found else None, "3 2")]
    return render(
        "grid.html",
        cells=cells,
        frames=[(place(layers), dash) for layers, dash in frames if layers],
        cell=CELL,
        left=LEFT,
        side=n_layers * CELL,
        scale_top=n_layers * CELL + BOTTOM + 4,
        top=top,
        ticks=range(0, n_layers, max(1, round(n_layers / 10))),
        scale=[to_hex(colours(step / 39)) for step in range(40)],
        low=low,
        high=high,
        unit=unit,
        found=found,
        best=best,
        table=folded("All values as a table", _value_table(values, unit, n_layers)),
    )


def _value_table(values: dict[LayerRange, float], unit: str, n_layers: int) -> Markup:
    written = {(layers.start, layers.end): f"{value:.2f}" for layers, value in values.items()}
    rows = [[start, *(written.get((start, end), "") for end in range(n_layers))] for start in range(n_layers)]
    return table(["start \\ end", *range(n_layers)], rows, f"{unit}, by start (down) and end (across)")
