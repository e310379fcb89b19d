"""Shares, means, correlations and the agreement of ranges, each with its interval.

Shares have Wilson intervals. The others are bootstrap percentiles over ITEMS (organisms, prompt sets), or over groups
of items that are not independent (two seeds of one planted range): whole groups are drawn. `estimate` and what builds
on it has few items, and plain percentiles of few items are too narrow. They are read further out, as far as Student's t
lies beyond the normal distribution (the expanded percentile interval of Hesterberg 2015). tests/test_stats_coverage.py
measures the coverage on synthetic data.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import ndtr, stdtrit
from torch import Tensor

from safety_mech.layers import LayerRange

Weighted = Callable[[Float[Tensor, "sample item"]], Float[Tensor, " sample"]]
"""A statistic of many weighted samples at once."""


@dataclass(frozen=True)
class Rate:
    """`count` of `total`."""

    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % score interval. It also holds near 0 and 1, where the usual +- interval is empty."""
        from scipy.stats import binomtest  # a second to import, and only needed for a share

        if not 0 <= self.count <= self.total or self.total == 0:
            raise ValueError(f"{self.count} of {self.total}: expected 0 <= count <= total, and a total above 0")
        interval = binomtest(self.count, self.total).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count}/{self.total} = {self.share:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap interval; all NaN where the value is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{interval}"


@dataclass(frozen=True)
class RangeScore:
    """A found range against the true one. Errors are found minus true, in layers; None where nothing was found."""

    iou: float
    start_error: int | None
    end_error: int | None
    centre_hit: bool
    """The middle of the found range lies inside the true one."""


def overlap(first: LayerRange | None, second: LayerRange | None) -> float:
    """IoU; 0 where a range is missing: two missing answers do not agree."""
    return 0.0 if first is None or second is None else first.iou(second)


def score_range(found: LayerRange | None, truth: LayerRange) -> RangeScore:
    if found is None:
        return RangeScore(0.0, None, None, False)
    hit = truth.start <= found.centre <= truth.end
    return RangeScore(found.iou(truth), found.start - truth.start, found.end - truth.end, hit)


def middle_third(n_layers: int) -> LayerRange:
    """What one may guess without looking: layers n/3 to 2n/3."""
    return LayerRange(n_layers // 3, max(n_layers // 3, 2 * n_layers // 3 - 1))


def random_iou(truth: LayerRange, n_layers: int) -> float:
    """Expected IoU of a random range: the width uniform from 1 to n, then the start uniform."""
    truth.check_inside(n_layers)
    means = []
    for width in range(1, n_layers + 1):
        starts = range(n_layers - width + 1)
        means.append(sum(LayerRange(start, start + width - 1).iou(truth) for start in starts) / len(starts))
    return sum(means) / n_layers


def bootstrap_mean(
    values: Float[Tensor, "item *rest"], *, samples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Mean over items, and the bounds of its percentile interval: items are drawn with replacement, rows as a whole.

    Raises ValueError for fewer than two items.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} prompts: expected at least 2 for an interval")
    means = resampled_means(values, samples, torch.Generator().manual_seed(seed))
    return values.double().mean(dim=0), *percentiles(means, level)


def percentiles(
    samples: Float[Tensor, "sample *rest"], level: float = 0.95
) -> tuple[Float[Tensor, "*rest"], Float[Tensor, "*rest"]]:
    """Bounds that leave half of 1 - level of the samples outside on either side."""
    tail = (1 - level) / 2
    low, high = torch.quantile(samples.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def mean_estimate(
    values: Sequence[float], groups: Sequence[Hashable] | None = None, *, level: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean with its interval; `groups[i]`: what item i belongs to, drawn as a whole."""
    x = torch.tensor(values, dtype=torch.float64)
    return estimate(lambda w: (w * x).sum(1) / w.sum(1), group_numbers(len(x), groups), level=level, seed=seed)


def correlation(x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable] | None = None) -> Estimate:
    """Pearson's r with its interval; undefined where y is constant or x has fewer than three values (two: |r| is 1)."""

    def r(var_x: Tensor, var_y: Tensor, cov: Tensor) -> Tensor:
        return torch.where((var_x > 1e-12) & (var_y > 1e-12), cov / (var_x * var_y).sqrt(), torch.nan)

    found = _of_moments(r, x, y, groups)
    return found if len(set(x)) >= 3 else Estimate(math.nan, math.nan, math.nan)


def slope(x: Sequence[float], y: Sequence[float], groups: Sequence[Hashable] | None = None) -> Estimate:
    """Least-squares slope of y on x, with its interval: 1 where y follows x, 0 where it stays.

    Undefined for constant x.
    """
    return _of_moments(lambda var_x, _, cov: torch.where(var_x > 1e-12, cov / var_x, torch.nan), x, y, groups)


def _of_moments(
    statistic: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Sequence[float],
    y: Sequence[float],
    groups: Sequence[Hashable] | None,
) -> Estimate:
    """A statistic of the weighted variances of x and y and their covariance, with its interval."""
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(f"{len(x)} and {len(y)} values: expected two lists of equal length, of at least 2")
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)

    def of_weights(w: Float[Tensor, "sample item"]) -> Float[Tensor, " sample"]:
        w = w / w.sum(1, keepdim=True)
        da, db = a - (w @ a)[:, None], b - (w @ b)[:, None]
        return statistic((w * da * da).sum(1), (w * db * db).sum(1), (w * da * db).sum(1))

    return estimate(of_weights, group_numbers(len(a), groups))


def mean_pairwise_iou(ranges: Sequence[LayerRange | None]) -> Estimate:
    """Mean IoU of all pairs of different ranges; the interval is over ranges, not over pairs.

    A pair of two copies of one range has IoU 1 and says nothing: it is left out of every draw.
    """
    kinds = list(dict.fromkeys(ranges))  # a thousand bootstrap answers are a few dozen different ranges
    of_kinds = torch.tensor([[overlap(a, b) for b in kinds] for a in kinds], dtype=torch.float64)
    which = [kinds.index(layers) for layers in ranges]
    table = of_kinds[which][:, which].fill_diagonal_(0)

    def statistic(w: Float[Tensor, "sample item"]) -> Float[Tensor, " sample"]:
        return ((w @ table) * w).sum(1) / (w.sum(1).square() - w.square().sum(1))

    return estimate(statistic, list(range(len(ranges))))


def estimate(
    statistic: Weighted, groups: Sequence[int], *, samples: int = 2000, level: float = 0.95, seed: int = 0
) -> Estimate:
    """The statistic at equal weights, and its interval over draws of whole groups (numbered 0, 1, ...).

    With one group, or where the statistic is not defined, there is no interval: its bounds are NaN.
    """
    n_groups = max(groups) + 1
    membership = torch.nn.functional.one_hot(torch.tensor(groups), n_groups).double()
    value = float(statistic(torch.ones(1, len(groups), dtype=torch.float64))[0])
    if n_groups < 2 or math.isnan(value):
        return Estimate(value, math.nan, math.nan)
    counts = resampled_counts(samples, n_groups, torch.Generator().manual_seed(seed))
    values = statistic(counts @ membership.T)
    tail = expanded_tail((1 - level) / 2, n_groups)
    low, high = torch.nanquantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(value, low, high)


def resampled_counts(samples: int, n: int, generator: torch.Generator) -> Float[Tensor, "sample item"]:
    """How often each of n items is drawn in n draws with replacement."""
    drawn = torch.randint(n, (samples, n), generator=generator)
    return torch.zeros(samples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(samples, n).double())


def resampled_means(
    values: Float[Tensor, "item *rest"], samples: int, generator: torch.Generator
) -> Float[Tensor, "sample *rest"]:
    """Means over items drawn with replacement, rows as a whole."""
    counts = resampled_counts(samples, len(values), generator)
    return torch.tensordot(counts, values.double(), dims=1) / len(values)


def expanded_tail(tail: float, n: int) -> float:
    """The tail probability at which percentiles of n items' bootstrap distribution have to be read.

    Phi(-sqrt(n / (n - 1)) t), t: Student's quantile with n - 1 degrees of freedom.
    """
    return float(ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, tail)))


def group_numbers(n_items: int, groups: Sequence[Hashable] | None) -> list[int]:
    """0, 1, ... for the groups in the order in which they come; every item its own group where none are given."""
    if n_items < 1 or (groups is not None and len(groups) != n_items):
        raise ValueError(
            f"{n_items} items in {len(groups or [])} groups: expected at least one item, and a group for each"
        )
    labels = groups or range(n_items)
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]
