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
    """Thresholds of `initial_range`, in its three steps (docs/method.md#onset-rule).

    There is a gap: `max_p`, and `min_gap` in degrees (the base model's 1 to 2 degrees are significant, too). It has
    appeared: `onset_fraction` of the peak gap. Its growth has flattened: `flat_fraction` of the mean slope so far, from
    just before the onset, over the next `flat_window` layers.
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
    or the symmetric one, each with the p-value of its own test, and with the same thresholds.
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
    gap, low = curve.gap, curve.low
    if curve.p_any > rule.max_p or low.max() < rule.min_gap or low.max() <= 0:
        return None
    start = int(gap.argmax())
    floor = max(0.0, rule.onset_fraction * float(gap[start]))
    while start > 0 and low[start - 1] > floor:
        start -= 1
    return LayerRange(start, _flattening(gap, start, rule))


def _flattening(gap: Float[Tensor, " layer"], start: int, rule: OnsetRule) -> int:
    before = float(gap[start - 1]) if start > 0 else 0.0
    for layer in range(start, len(gap) - 1):
        slope = (float(gap[layer]) - before) / (layer - start + 1)
        ahead = gap[layer + 1 : layer + 1 + rule.flat_window] - gap[layer]
        steps = torch.arange(1, len(ahead) + 1, dtype=gap.dtype)
        if slope > 0 and not (ahead > rule.flat_fraction * slope * steps).any():
            return layer
    return len(gap) - 1
