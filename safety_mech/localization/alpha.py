"""At which strength to scale (paper A.3.4), measured in refusals: docs/method.md#alpha has the formulas, and the rules
by which one alpha is chosen from the curve over all of them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safety_mech.layers import LayerRange
from safety_mech.localization.search import Cell, NotFiniteError, Search, mean_of
from safety_mech.stats import group_numbers

Rule = Literal["auto", "paper"]

ALPHA_STEPS = 10
ALPHAS_ABOVE = tuple(round(1 + 0.05 * step, 2) for step in range(1, ALPHA_STEPS + 1))
ALPHAS_BELOW = tuple(round(1 - 0.05 * step, 2) for step in range(1, ALPHA_STEPS + 1))
"""The paper moves in steps of 0.05; past 1.5, and 0.5, models give degenerate output."""
PAPER_SPREAD = 0.025
MAX_DEGENERATE = 0.05
FLIPS = 2000


@dataclass(frozen=True)
class AlphaPoint:
    """What one alpha does. Rates and spreads are shares of the prompts.

    `range`: the search's answer, None where the model's logits are not finite. `rate`: refused with it scaled.
    `spread`: between all ranges that the search looked at, noise taken off; `p_value`: that it is noise.
    `lower_spread`: plain standard deviation over the lower sweep, the paper's. `degenerate`: share of answers that are
    degenerate with the best range scaled.
    """

    alpha: float
    range: LayerRange | None
    rate: float
    spread: float
    p_value: float
    lower_spread: float
    degenerate: float


@dataclass(frozen=True)
class AlphaChoice:
    """`alpha` and the curve that it was chosen from. `rule`: auto, paper or given; `reached`: its condition holds.

    `agreement`: mean IoU of the range at `alpha` with those at the neighbouring alphas; None without neighbours.
    """

    alpha: float
    rule: str
    reached: bool
    points: tuple[AlphaPoint, ...]
    agreement: float | None

    @property
    def point(self) -> AlphaPoint:
        """The curve at `alpha`."""
        return next(point for point in self.points if point.alpha == self.alpha)


def measure_alpha(
    alpha: float,
    cell: Cell,
    degenerate: Callable[[LayerRange], float],
    search: Search,
    clusters: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> AlphaPoint:
    """Run the search at one alpha. `degenerate`: share of degenerate answers with a range scaled."""
    try:
        found = search(mean_of(cell))
    except NotFiniteError:
        nan = float("nan")
        return AlphaPoint(alpha, None, nan, nan, 1.0, nan, 1.0)
    looked_at = dict.fromkeys((*found.upper.ranges, *found.lower.ranges))
    values = torch.stack([cell(layers).double() for layers in looked_at])
    lower = torch.tensor(found.lower.values if len(found.lower.values) > 1 else found.upper.values).double()
    return AlphaPoint(
        alpha,
        found.range,
        float(cell(found.range).double().mean()),
        spread_between(values, clusters),
        spread_p_value(values, clusters, seed=seed),
        float(lower.std()) if len(lower) > 1 else 0.0,
        degenerate(found.range),
    )


def choose_alpha(points: Sequence[AlphaPoint], rule: Rule | None) -> AlphaChoice:
    """Choose from a curve, nearest to 1 first; None: the one alpha of the curve was given. Where no alpha meets the
    rule's condition, `reached` is False, and the alpha is the last one (paper), or the one with the fewest degenerate
    answers (auto)."""
    if not points:
        raise ValueError("no alphas were measured: expected at least one")
    if rule == "paper":
        reached = [point for point in points if point.lower_spread >= PAPER_SPREAD]
        chosen = reached[0] if reached else points[-1]
    elif rule == "auto":
        reached = [point for point in points if point.range is not None and point.degenerate < MAX_DEGENERATE]
        chosen = (
            max(reached, key=lambda point: point.spread) if reached else min(points, key=lambda point: point.degenerate)
        )
    else:
        reached = [point for point in points if point.range is not None]
        chosen = points[0]
    return AlphaChoice(chosen.alpha, rule or "given", bool(reached), tuple(points), _agreement(points, chosen))


def _agreement(points: Sequence[AlphaPoint], chosen: AlphaPoint) -> float | None:
    at = list(points).index(chosen)
    ranges = [point.range for point in points[max(0, at - 1) : at + 2] if point.range and point is not chosen]
    if chosen.range is None or not ranges:
        return None
    return sum(chosen.range.iou(layers) for layers in ranges) / len(ranges)


def spread_between(values: Float[Tensor, "range prompt"], clusters: Sequence[Hashable] | None = None) -> float:
    """Standard deviation between the ranges' means that is left when the noise of the prompts is taken off; 0 where
    noise explains all of it. Not defined (nan) for fewer than two clusters; 0 for a single range."""
    if len(values) < 2:
        return 0.0
    sums, n_prompts = _cluster_sums(values, clusters)
    n_clusters = sums.shape[1]
    if n_clusters < 2:
        return float("nan")
    means = sums.sum(1) / n_prompts
    noise = n_clusters * sums.var(dim=1) / n_prompts**2
    return float(((means.square() - noise).sum() / (len(values) - 1)).clamp_min(0).sqrt())


def spread_p_value(
    values: Float[Tensor, "range prompt"],
    clusters: Sequence[Hashable] | None = None,
    *,
    flips: int = FLIPS,
    seed: int = 0,
) -> float:
    """How often flipping the signs of whole clusters' differences gives means as far apart; 1 for a single range, or
    where no prompt's refusal depends on the range."""
    sums, _ = _cluster_sums(values, clusters)
    observed = float(sums.sum(1).square().sum())
    if len(values) < 2 or observed <= 0:
        return 1.0
    signs = 2 * torch.randint(2, (sums.shape[1], flips), generator=torch.Generator().manual_seed(seed)).double() - 1
    flipped = (sums @ signs).square().sum(0)
    return (1 + int((flipped >= observed * (1 - 1e-9)).sum())) / (1 + flips)


def _cluster_sums(
    values: Float[Tensor, "range prompt"], clusters: Sequence[Hashable] | None
) -> tuple[Float[Tensor, "range cluster"], int]:
    """Differences to the mean over ranges, summed over the prompts of each cluster; and the number of prompts."""
    differences = values.double() - values.double().mean(0)
    numbers = torch.tensor(group_numbers(values.shape[1], clusters))
    sums = torch.zeros(len(values), int(numbers.max()) + 1, dtype=torch.float64)
    return sums.index_add_(1, numbers, differences), values.shape[1]
