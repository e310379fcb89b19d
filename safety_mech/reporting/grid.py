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
    frames = [(found, ""), (best if best != found else None, "3 2")]
    return render(
        "grid.html",
        n_layers=n_layers,
        cells=[(layers, value, to_hex(colours((value - low) / (high - low or 1)))) for layers, value in values.items()],
        chosen=found or best or next(iter(values)),
        frames=[(layers, dash) for layers, dash in frames if layers],
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
