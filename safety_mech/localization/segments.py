"""From per-layer scores to a range: the one rule of all locators that score layers (docs/method.md#locators).

The range whose two levels, inside and outside, leave the least squared error has the largest

    between(start, end) = n_in n_out / n (mean_in - mean_out)^2      where mean_in > mean_out.

With equal, independent noise in all layers this is the maximum-likelihood range. It is also the contiguous range with
the largest sum of (score - threshold), where the threshold lies midway between its own two means: no threshold is
to be chosen, and the scores' unit and offset do not matter.

A range has at most half of the layers (`max_width`): else a single low layer would make all others "the range".
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from safety_mech.layers import LayerRange


@dataclass(frozen=True)
class Segment:
    """`explained`: share of the scores' variance that the two levels explain."""

    range: LayerRange
    explained: float


def best_segment(scores: Float[Tensor, " layer"], max_width: int | None = None) -> Segment | None:
    """The range whose two levels fit best; None where all scores are equal.

    `max_width`: default half of the layers. Ties go to the narrower, then to the earlier range.
    Raises ValueError for fewer than two layers, scores that are not finite, or a `max_width` that leaves no background.
    """
    (found,) = best_ranges(scores[None], max_width)
    if found is None:
        return None
    between = float(between_squares(scores[None])[0, found.start, found.end])
    total = float((scores.double() - scores.double().mean()).square().sum())
    return Segment(found, explained=between / total)


def best_ranges(scores: Float[Tensor, "sample layer"], max_width: int | None = None) -> list[LayerRange | None]:
    """The range of every row: for bootstrap samples of the scores."""
    n = scores.shape[1]
    max_width = max(1, n // 2) if max_width is None else max_width
    if n < 2 or not 1 <= max_width < n:
        raise ValueError(f"{n} layers and ranges of at most {max_width}: expected 1 <= max_width < number of layers")
    if not scores.isfinite().all():
        raise ValueError("the scores are not finite: check the model's logits, and the dtype")
    between = between_squares(scores)
    widths = torch.arange(n)[None] - torch.arange(n)[:, None] + 1
    allowed = (widths >= 1) & (widths <= max_width)
    # By width, then by start, so that the first of equal maxima is the narrowest and earliest.
    order = torch.argsort((widths * n + torch.arange(n)[:, None])[allowed])
    starts, ends = (axis[order] for axis in allowed.nonzero().T)
    candidates = between[:, starts, ends]
    best = candidates.max(dim=1)
    near = candidates >= best.values[:, None] * (1 - 1e-12)  # equal up to rounding
    first = near.int().argmax(dim=1)
    return [
        LayerRange(int(starts[index]), int(ends[index])) if value > 0 else None
        for index, value in zip(first.tolist(), best.values.tolist(), strict=True)
    ]


def between_squares(scores: Float[Tensor, "sample layer"]) -> Float[Tensor, "sample start end"]:
    """n_in n_out / n (mean_in - mean_out)^2 of every range; 0 where the inside is lower, NaN-free everywhere."""
    scores = scores.double()
    n, rounding = scores.shape[1], 1e-12 * scores.abs().amax(1, keepdim=True)
    centred = scores - scores.mean(1, keepdim=True)
    centred = torch.where(centred.abs() <= rounding, 0.0, centred)
    sums = torch.cat([torch.zeros(len(scores), 1).double(), centred.cumsum(1)], dim=1)
    inside = (sums[:, None, 1:] - sums[:, :-1, None]).clamp_min(0)  # centred: a positive sum is a higher mean
    widths = (torch.arange(n)[None] - torch.arange(n)[:, None] + 1).double()
    valid = (widths >= 1) & (widths < n)
    # With centred scores, mean_in - mean_out = sum_in n / (n_in n_out).
    return torch.where(valid, inside.square() * n / (widths * (n - widths)), 0.0)
