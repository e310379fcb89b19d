"""The progressive search over ranges (paper §3.4), the best of the whole grid, and the search on resampled prompts."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from safety_mech.layers import LayerRange
from safety_mech.stats import group_numbers, resampled_counts

Direction = Literal["max", "min"]
Measure = Callable[[LayerRange], float]
Cell = Callable[[LayerRange], Float[Tensor, " prompt"]]
"""From a range to every prompt's refusal with that range scaled: a probability, or 0 and 1."""


class NotFiniteError(ValueError):
    """The measure is not a number: the scaled model's logits are not finite."""


@dataclass(frozen=True)
class Sweep:
    """One line of the grid: the ranges tried and what the measure said; `best` is the arg max (or min)."""

    bound: Literal["upper", "lower"]
    ranges: tuple[LayerRange, ...]
    values: tuple[float, ...]
    best: LayerRange


class SearchResult(NamedTuple):
    """Both sweeps; `range`, the best of the lower one, is the search's answer."""

    upper: Sweep
    lower: Sweep

    @property
    def range(self) -> LayerRange:
        return self.lower.best


Search = Callable[[Measure], SearchResult]
"""`progressive_search` with all but its measure given."""


def progressive_search(
    measure: Measure, initial: LayerRange, *, n_layers: int, window: int = 2, direction: Direction = "max"
) -> SearchResult:
    """The paper's search: hold the start and sweep the end, take the best; then hold that end and sweep the start.

    A sweep evaluates the whole window to both sides, for the curves are not unimodal (Llama-3 in the paper's table).
    If its best value is on its very edge, it is widened to that side by `window` more, as the paper's lower sweeps must
    have been (Llama-2: from 9 down to 4).
    Ties go to the range nearest to the one that was held. `direction`: "max" for alpha > 1, "min" for alpha < 1.
    Raises ValueError for a range outside the model, a window below 1, or an unknown direction.
    """
    if direction not in ("max", "min"):
        raise ValueError(f"direction {direction!r}: expected 'max' (alpha > 1) or 'min' (alpha < 1)")
    if window < 1:
        raise ValueError(f"window {window}: expected at least one layer to each side")
    initial.check_inside(n_layers)
    sign = 1.0 if direction == "max" else -1.0

    def with_end(end: int) -> LayerRange:
        return LayerRange(initial.start, end)

    def with_start(start: int) -> LayerRange:
        return LayerRange(start, upper.best.end)

    upper = _sweep("upper", measure, with_end, initial.end, (initial.start, n_layers - 1), window, sign)
    lower = _sweep("lower", measure, with_start, initial.start, (0, upper.best.end), window, sign)
    return SearchResult(upper, lower)


def _sweep(
    bound: Literal["upper", "lower"],
    measure: Measure,
    range_at: Callable[[int], LayerRange],
    centre: int,
    limits: tuple[int, int],
    window: int,
    sign: float,
) -> Sweep:
    """Evaluate centre +- window inside the limits; while the best is an edge that can move, widen that side."""
    low, high = max(limits[0], centre - window), min(limits[1], centre + window)
    values = {at: float(measure(range_at(at))) for at in range(low, high + 1)}
    while True:
        if any(map(math.isnan, values.values())):
            raise NotFiniteError(
                "the measure gave nan: the scaled model's logits are not finite; take alpha nearer to 1"
            )
        best = max(values, key=lambda at: (sign * values[at], -abs(at - centre)))
        if best == low and low > limits[0]:
            wider = range(max(limits[0], low - window), low)
        elif best == high and high < limits[1]:
            wider = range(high + 1, min(limits[1], high + window) + 1)
        else:
            ordered = sorted(values)
            return Sweep(bound, tuple(map(range_at, ordered)), tuple(values[at] for at in ordered), range_at(best))
        values |= {at: float(measure(range_at(at))) for at in wider}
        low, high = min(values), max(values)


def grid_best(grid: Float[Tensor, "start end prompt"], direction: Direction) -> LayerRange | None:
    """The best range of the whole grid, by the mean over prompts; cells that are nan are no candidates."""
    means = grid.double().mean(-1)
    if means.isnan().all():
        return None
    sign = 1.0 if direction == "max" else -1.0
    best = int((sign * means).nan_to_num(-torch.inf).argmax())
    return LayerRange(*divmod(best, len(means)))


def mean_of(cell: Cell) -> Measure:
    """Its mean over prompts."""
    return lambda layers: float(cell(layers).double().mean())


def resampled_search(
    search: Search,
    cell: Cell,
    n_prompts: int,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 200,
    seed: int = 0,
) -> Counter[LayerRange]:
    """The search's answers over bootstrap samples of prompts, or of whole `clusters` of them (one label a prompt)."""
    numbers = group_numbers(n_prompts, clusters)
    counts = resampled_counts(samples, max(numbers) + 1, torch.Generator().manual_seed(seed))
    return Counter(
        search(lambda layers, weights=weights: float(cell(layers).double() @ weights / weights.sum())).range
        for weights in counts[:, numbers]
    )
