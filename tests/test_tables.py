"""What the terminal prints, word for word, from made-up results."""

import pytest
import torch

from safety_mech.divergence import GapDifference
from safety_mech.layers import LayerRange
from safety_mech.locate import Sweep
from safety_mech.tables import difference_sentence, layers_text, sweep_table


def difference_of(low: list[float]) -> GapDifference:
    bounds = torch.tensor(low, dtype=torch.float64)
    samples = torch.zeros(2, len(low), dtype=torch.float64)
    return GapDifference(bounds + 1, bounds, bounds + 2, torch.full_like(bounds, 0.5), 0.25, samples)


@pytest.mark.parametrize(
    ("low", "where"),
    [
        ([-1.0, 0.0, 0.5, 0.25], "above 0 in layers 2-3"),  # 0 itself is not above 0
        ([0.0, -0.5], "above 0 in no layer"),
        ([0.5, 0.0, 0.25], "above 0 in layers 0, 2"),
    ],
)
def test_a_difference_is_above_0_where_its_lower_bound_is(low: list[float], where: str) -> None:
    peak = max(range(len(low)), key=low.__getitem__)
    expected = f"{low[peak] + 1:.2f} degrees [{low[peak]:.2f}, {low[peak] + 2:.2f}] at layer {peak}, {where} "
    assert difference_sentence(difference_of(low)) == f"{expected}(p over all layers 0.250)"


def test_runs_end_where_a_layer_is_missing() -> None:
    assert layers_text([0, 1, 3, 4, 5, 7]) == "0-1, 3-5, 7"


def test_a_sweep_has_its_best_in_stars() -> None:
    ranges = tuple(LayerRange(3, end) for end in (4, 5, 6))
    assert sweep_table(Sweep("upper", ranges, (0.5, 1.25, -1.0), ranges[1]), "value").splitlines() == [
        "upper bound   [3, 4]  *[3, 5]*  [3, 6]",
        "value           0.50      1.25   -1.00",
    ]
