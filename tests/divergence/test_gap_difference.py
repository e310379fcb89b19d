"""Two models on the same prompts: the difference of their gaps, draw by draw."""

import pytest
import torch

from safety_mech.divergence.angles import gap_curve, gap_difference
from safety_mech.divergence.onset import OnsetRule, initial_range, initial_range_samples
from safety_mech.layers import LayerRange
from safety_mech.reporting.tables import layers_text


def streams(shift: float, seed: int = 0, n: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of residual streams in 3 layers; the malicious ones are turned by `shift` in the last layer."""
    generator = torch.Generator().manual_seed(seed)
    normal, malicious = (torch.randn(n, 3, 8, generator=generator) * 0.3 for _ in range(2))
    for part in (normal, malicious):
        part[..., 0] += 2.0
    malicious[:, 2, 1] += shift
    return normal, malicious


def test_a_model_compared_with_itself_differs_by_exactly_nothing() -> None:
    curve = gap_curve(*streams(1.0), bootstrap=200, permutations=200)
    difference = gap_difference(curve, curve)
    assert torch.equal(difference.gap, torch.zeros(3, dtype=torch.float64))
    assert torch.equal(difference.low, difference.high)
    assert difference.p_any == 1.0


def test_an_added_shift_is_found_in_its_layer_and_nowhere_else() -> None:
    before = gap_curve(*streams(0.0), bootstrap=400, permutations=400)
    after = gap_curve(*streams(2.0), bootstrap=400, permutations=400)
    difference = gap_difference(after, before)
    assert difference.gap[2] > 5
    assert difference.low[2] > 0
    assert difference.p_values[2] == pytest.approx(1 / 401)
    assert torch.equal(difference.gap[:2], torch.zeros(2, dtype=torch.float64))  # the same streams there


def test_what_both_models_share_cancels() -> None:
    """Each gap alone has an interval; their difference, on the same draws, has a far narrower one."""
    before = gap_curve(*streams(1.0), bootstrap=400, permutations=100)
    after = gap_curve(*streams(1.05), bootstrap=400, permutations=100)
    difference = gap_difference(after, before)
    assert float(difference.high[2] - difference.low[2]) < 0.3 * float(after.high[2] - after.low[2])


def test_curves_of_other_draws_are_refused() -> None:
    normal, malicious = streams(1.0)
    curve = gap_curve(normal, malicious, bootstrap=100, permutations=100)
    with pytest.raises(ValueError, match="seeds 0 and 1"):
        gap_difference(curve, gap_curve(normal, malicious, bootstrap=100, permutations=100, seed=1))
    with pytest.raises(ValueError, match="same prompts and settings"):
        gap_difference(curve, gap_curve(normal, malicious, bootstrap=101, permutations=100))


@pytest.mark.parametrize(("layers", "text"), [([], ""), ([3], "3"), ([1, 2, 3], "1-3"), ([0, 2, 3, 9], "0, 2-3, 9")])
def test_layers_text(layers: list[int], text: str) -> None:
    assert layers_text(layers) == text


# --- the initial range of a difference --------------------------------------------------------------------------------


def test_a_small_sure_difference_has_an_initial_range_where_a_small_gap_has_none() -> None:
    """A degree or two of absolute gap is what any two sets of prompts make; of a difference it is alignment's."""
    before = gap_curve(*streams(0.0), bootstrap=400, permutations=400)
    after = gap_curve(*streams(0.4), bootstrap=400, permutations=400)
    difference = gap_difference(after, before)
    assert 0 < float(difference.low[2]) < OnsetRule().min_gap
    assert initial_range(difference) == LayerRange(2, 2)
    assert initial_range(difference, OnsetRule()) is None
    counted = initial_range_samples(difference)
    assert counted.total() == 400
    assert counted[LayerRange(2, 2)] > 300


def test_no_difference_has_no_initial_range() -> None:
    """Control: the same model twice; its lower bound is 0, not above it."""
    curve = gap_curve(*streams(2.0), bootstrap=200, permutations=200)
    assert initial_range(gap_difference(curve, curve)) is None
    assert initial_range(gap_difference(curve, curve), OnsetRule(min_gap=0.0, max_p=1.0)) is None
