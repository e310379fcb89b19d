"""The initial range: from the layer where the gap appears to the layer where its growth first flattens (§3.4).

It is read off a model's gap curve, or off the difference of its curve to that of the model before alignment.
"""

from collections import Counter
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from safety_mech.divergence.angles import GapCurve, GapDifference, GapStatistic, chosen
from safety_mech.divergence.resampling import Statistic
from safety_mech.layers import LayerRange


@dataclass(frozen=True)
class OnsetRule:
    """Thresholds of `initial_range`.

    1. There is a gap at all if its p-value over all layers is at most `max_p`, and its lower bound is above 0 and
       reaches `min_gap` degrees at some layer. (Any difference between two sets of prompts becomes significant with
       enough prompts: the base model's 1 to 2 degrees do, so significance alone would find layers anywhere.)
    2. It has appeared at the first layer from which its lower bound stays above `onset_fraction` of the peak gap,
       and above 0, up to the peak.
    3. Its growth has flattened at the first layer after that from which no gap of the next `flat_window` layers
       lies above a line with `flat_fraction` of the mean slope so far (from just before the onset to that layer).
    """

    min_gap: float = 1.0
    max_p: float = 0.01
    onset_fraction: float = 0.1
    flat_fraction: float = 0.25
    flat_window: int = 2


DEFAULT_RULE = OnsetRule()
DIFFERENCE_RULE = OnsetRule(min_gap=0.0)
"""For a difference of two models' curves: what the prompts make is subtracted, so any gap above 0 is alignment's."""


def initial_range(
    curve: GapCurve | GapDifference, rule: OnsetRule | None = None, statistic: Statistic = "paper"
) -> LayerRange | None:
    """The initial range of a gap curve, or None where there is no gap: that is a result, not an error.

    `rule`: by default DEFAULT_RULE for a curve, DIFFERENCE_RULE for a difference. `statistic`: the paper's gap
    or the symmetric one, each with the p-value of its own test. The thresholds are the same: the two statistics are
    equal where the two sets are equally wide.
    """
    return _range(chosen(curve, statistic), rule or rule_for(curve))


def rule_for(curve: GapCurve | GapDifference) -> OnsetRule:
    return DEFAULT_RULE if isinstance(curve, GapCurve) else DIFFERENCE_RULE


def initial_range_samples(
    curve: GapCurve | GapDifference, rule: OnsetRule | None = None, statistic: Statistic = "paper"
) -> Counter[LayerRange | None]:
    """The initial range of every bootstrap curve, counted: how sure the range is.

    Each sample keeps the observed distance between gap and lower bound, and the observed p-value.
    """
    part, rule = chosen(curve, statistic), rule or rule_for(curve)
    below = part.gap - part.low
    return Counter(_range(replace(part, gap=sample, low=sample - below), rule) for sample in part.samples)


def _range(curve: GapStatistic, rule: OnsetRule) -> LayerRange | None:
    highest = curve.low.max()
    if curve.p_any > rule.max_p or highest < rule.min_gap or highest <= 0:
        return None
    start = _onset(curve.gap, curve.low, rule)
    return LayerRange(start, _flattening(curve.gap, start, rule))


def _onset(gap: Float[Tensor, " layer"], low: Float[Tensor, " layer"], rule: OnsetRule) -> int:
    peak = int(gap.argmax())
    floor = max(0.0, rule.onset_fraction * float(gap[peak]))
    start = peak
    while start > 0 and low[start - 1] > floor:
        start -= 1
    return start


def _flattening(gap: Float[Tensor, " layer"], start: int, rule: OnsetRule) -> int:
    before = float(gap[start - 1]) if start > 0 else 0.0
    for layer in range(start, len(gap) - 1):
        slope = (float(gap[layer]) - before) / (layer - start + 1)
        ahead = gap[layer + 1 : layer + 1 + rule.flat_window] - gap[layer]
        steps = torch.arange(1, len(ahead) + 1, dtype=gap.dtype)
        if slope > 0 and not (ahead > rule.flat_fraction * slope * steps).any():
            return layer
    return len(gap) - 1
