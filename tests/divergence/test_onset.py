"""The initial range of gap curves whose onset and flattening are known."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from safety_mech.divergence.angles import GapCurve, GapStatistic, PairStats, SymmetricGap, gap_curve
from safety_mech.divergence.onset import DEFAULT_RULE, OnsetRule, _flattening, initial_range, initial_range_samples
from safety_mech.layers import LayerRange


def statistic_of(gap: Tensor, below: float, p_any: float, samples: Tensor) -> GapStatistic:
    return GapStatistic(gap, gap - below, gap + below, torch.full_like(gap, p_any), p_any, samples, gap[None])


def curve_of(
    shape: Tensor | list[float],
    below: float = 0.5,
    p_any: float = 0.001,
    samples: Tensor | None = None,
    symmetric: list[float] | None = None,
) -> GapCurve:
    """A GapCurve of this gap, with a lower bound `below` under it; `symmetric`: of another symmetric statistic."""
    gap = torch.as_tensor(shape, dtype=torch.float64)
    zeros = torch.zeros_like(gap)
    stats = PairStats(zeros, zeros, zeros, zeros, n_pairs=9)
    paper = statistic_of(gap, below, p_any, gap[None] if samples is None else samples)
    other = gap if symmetric is None else torch.as_tensor(symmetric, dtype=torch.float64)
    return GapCurve(
        **vars(paper),
        normal_normal=stats,
        malicious_malicious=stats,
        normal_malicious=stats,
        symmetric=SymmetricGap(**vars(statistic_of(other, below, p_any, other[None])), permuted=other[None]),
        level=0.95,
        seed=0,
        resampled="prompts",
        n_resampled=(9, 9),
        r=None,
    )


FLAT = [0.0] * 16
STEP = [0.0] * 5 + [20.0] * 11
RAMP = [0.0] * 5 + [4.0, 8.0, 12.0, 16.0, 20.0] + [20.0] * 6  # rises in layers 5..9
RAMP_TO_THE_END = [0.0] * 9 + [4.0, 8.0, 12.0, 16.0, 20.0, 24.0, 28.0]
RAMP_AND_FALL = [0.0] * 5 + [4.0, 8.0, 12.0, 16.0, 20.0] + [17.0, 14.0, 11.0, 8.0, 5.0, 2.0]
FROM_THE_START = [4.0, 8.0, 12.0, 16.0, 20.0] + [20.0] * 11

SHAPES = {
    "step": (STEP, LayerRange(5, 5)),
    "ramp to plateau": (RAMP, LayerRange(5, 9)),
    "ramp to the last layer": (RAMP_TO_THE_END, LayerRange(9, 15)),
    "ramp and fall": (RAMP_AND_FALL, LayerRange(5, 9)),
    "ramp from layer 0": (FROM_THE_START, LayerRange(0, 4)),
}


@pytest.mark.parametrize(("gap", "expected"), SHAPES.values(), ids=SHAPES.keys())
def test_known_shapes(gap, expected):
    assert initial_range(curve_of(gap)) == expected


@pytest.mark.parametrize(("gap", "expected"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_the_size_of_the_gap_does_not_matter_once_there_is_one(gap, expected, factor):
    assert initial_range(curve_of(torch.tensor(gap) * factor, below=0.5 * factor)) == expected


def test_no_gap():
    assert initial_range(curve_of(FLAT)) is None
    assert initial_range(curve_of([-value for value in RAMP])) is None


def test_a_small_gap_is_none_however_significant():
    assert initial_range(curve_of(torch.tensor(RAMP) * 0.05, below=0.01, p_any=0.0001)) is None  # 1 degree


def test_a_large_gap_that_is_not_significant_is_none():
    assert initial_range(curve_of(RAMP, p_any=0.2)) is None


def test_an_early_bump_is_no_onset_when_the_gap_dies_in_between():
    gap = [0.0, 6.0, 6.0, 0.0, 0.0, *RAMP[5:]]
    assert initial_range(curve_of(gap)) == LayerRange(5, 9)


def noise(seed: int, like: list[float], size: float) -> Tensor:
    return size * torch.randn(len(like), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("gap", "expected"), SHAPES.values(), ids=SHAPES.keys())
def test_noisy_shapes_are_recovered_within_one_layer(gap, expected):
    hits = 0
    for seed in range(100):
        found = initial_range(curve_of(torch.tensor(gap) + noise(seed, gap, 0.4), below=0.8))
        assert found is not None
        hits += abs(found.start - expected.start) <= 1 and abs(found.end - expected.end) <= 1
    assert hits >= 90


def test_noise_only_is_none():
    found = {initial_range(curve_of(noise(seed, FLAT, 0.4), below=0.8)) for seed in range(100)}
    assert found == {None}


# --- through gap_curve -------------------------------------------------------------------------------------------


def planted(seed: int, degrees: list[float]) -> tuple[Tensor, Tensor]:
    """Residual streams of 30 + 30 prompts that are turned apart by that many degrees, layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.zeros(len(degrees), 24)
    shared[:, 0] = 3.0
    turn = torch.deg2rad(torch.tensor(degrees))
    turned = torch.zeros(len(degrees), 24)
    turned[:, 0], turned[:, 1] = 3 * turn.cos(), 3 * turn.sin()
    return (
        shared + 0.1 * torch.randn(30, len(degrees), 24, generator=generator),
        turned + 0.1 * torch.randn(30, len(degrees), 24, generator=generator),
    )


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_range_is_found_from_residual_streams(seed):
    degrees = [0.0] * 4 + [15.0, 30.0, 45.0, 60.0] + [60.0] * 4
    curve = gap_curve(*planted(seed, degrees), bootstrap=200, permutations=199)
    found = initial_range(curve)
    assert found is not None
    assert abs(found.start - 4) <= 1
    assert abs(found.end - 7) <= 1


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_found_where_nothing_is_planted(seed):
    assert initial_range(gap_curve(*planted(seed, [0.0] * 12), bootstrap=200, permutations=199)) is None


# --- the rule ----------------------------------------------------------------------------------------------------

SLOW_START = [0.0] * 4 + [3.0, 4.0, 5.0, 10.0, 15.0, 20.0] + [20.0] * 6
TWO_SLOPES = [0.0] * 5 + [4.0, 8.0, 12.0, 13.5, 15.0, 16.5, 18.0, 18.0, 18.0, 18.0, 18.0]
PAUSE = [0.0] * 5 + [4.0, 8.0, 8.0, 14.0, 18.0, 18.0] + [18.0] * 5


@pytest.mark.parametrize(
    ("gap", "below", "p_any", "changed", "before", "after"),
    [
        ([value * 0.07 for value in RAMP], 0.1, 0.001, {"min_gap": 1.5}, LayerRange(5, 9), None),
        ([value * 0.05 for value in RAMP], 0.05, 0.001, {"min_gap": 0.5}, None, LayerRange(5, 9)),
        (RAMP, 0.5, 0.02, {"max_p": 0.05}, None, LayerRange(5, 9)),
        (RAMP, 0.5, 0.005, {"max_p": 0.001}, LayerRange(5, 9), None),
        (SLOW_START, 0.5, 0.001, {"onset_fraction": 0.3}, LayerRange(4, 9), LayerRange(7, 9)),
        (SLOW_START, 0.5, 0.001, {"onset_fraction": 0.0}, LayerRange(4, 9), LayerRange(4, 9)),
        (TWO_SLOPES, 0.5, 0.001, {"flat_fraction": 0.5}, LayerRange(5, 11), LayerRange(5, 7)),
        (PAUSE, 0.5, 0.001, {"flat_window": 1}, LayerRange(5, 9), LayerRange(5, 6)),
    ],
)
def test_every_threshold_matters(gap, below, p_any, changed, before, after):
    curve = curve_of(gap, below=below, p_any=p_any)
    assert initial_range(curve) == before
    assert initial_range(curve, OnsetRule(**changed)) == after


@pytest.mark.parametrize(("p_any", "found"), [(0.01, True), (0.0101, False)])
def test_max_p_is_itself_allowed(p_any, found):
    assert (initial_range(curve_of(RAMP, p_any=p_any)) is not None) == found


@pytest.mark.parametrize(("below", "found"), [(19.0, True), (19.01, False)])
def test_min_gap_is_asked_of_the_lower_bound(below, found):
    assert (initial_range(curve_of(RAMP, below=below)) is not None) == found


def test_onset_looks_at_the_lower_bound():
    assert initial_range(curve_of(RAMP, below=0.5)) == LayerRange(5, 9)
    assert initial_range(curve_of(RAMP, below=2.5)) == LayerRange(6, 9)  # 4 - 2.5 is not above a tenth of the peak


def test_defaults_are_the_rule_that_is_used():
    assert OnsetRule() == DEFAULT_RULE
    assert initial_range(curve_of(RAMP), OnsetRule()) == initial_range(curve_of(RAMP))


@pytest.mark.parametrize(
    ("gap", "start", "end"),
    [
        ([0, 4, 5, 6, 7, 8], 1, 1),  # slope 4 / 1: a quarter of it is 1 a layer, and no gap lies ABOVE that line
        ([0, 4, 5.1, 6.2, 7.3, 8.4], 1, 5),  # slopes 4, 2.55, 2.07, 1.825: 1.1 is above a quarter of each
        ([0, 4, 8, 9, 10, 11], 1, 2),  # slope at layer 2: 8 / 2, over the layers from 1 to 2
        ([0, 4, 8, 9.1, 10.2, 11.3], 1, 5),
        ([4, 5, 6, 7], 0, 0),  # before layer 0 the gap is 0
        ([3, 7, 8, 9, 10], 1, 1),  # slope (7 - 3) / 1: from just before the onset
        ([3, 7, 8.1, 9.2, 10.3], 1, 4),
        ([0, 4, 4, 4, 12, 12, 12], 1, 1),  # two layers ahead are flat; the third is not looked at
        ([0, 4, 4, 12, 12, 12], 1, 3),  # the second is
        ([0, 4, 8, 12, 16], 1, 4),  # never flat: to the last layer
    ],
)
def test_flattening_by_hand(gap, start, end):
    assert _flattening(torch.tensor(gap, dtype=torch.float64), start, DEFAULT_RULE) == end


def test_the_statistic_chooses_the_curve_that_is_read():
    curve = curve_of(FLAT, symmetric=RAMP)
    assert initial_range(curve) is None
    assert initial_range(curve, statistic="symmetric") == LayerRange(5, 9)
    assert initial_range_samples(curve) == Counter({None: 1})
    assert initial_range_samples(curve, statistic="symmetric") == Counter({LayerRange(5, 9): 1})
    assert initial_range(curve_of(RAMP, symmetric=FLAT), statistic="symmetric") is None
    strict = OnsetRule(min_gap=50.0)
    assert initial_range(curve, strict, "symmetric") is None


@pytest.mark.slow_cases
@pytest.mark.parametrize("seed", range(3))
def test_a_wider_set_has_an_initial_range_by_the_paper_and_none_by_the_symmetric_statistic(seed):
    """All layers of one place; from layer 4 on M scatters 1.5 times as wide."""
    normal, malicious = (part * 1.0 for part in planted(seed, [0.0] * 10))
    centre = torch.zeros(24)
    centre[0] = 3.0
    malicious[:, 4:] = centre + 3.0 * (malicious[:, 4:] - centre)
    normal[:, 4:] = centre + 2.0 * (normal[:, 4:] - centre)
    curve = gap_curve(normal, malicious, bootstrap=200, permutations=199)
    assert initial_range(curve) is not None
    assert initial_range(curve, statistic="symmetric") is None
    turned = gap_curve(
        *planted(seed, [0.0] * 4 + [15.0, 30.0, 45.0, 60.0] + [60.0] * 4), bootstrap=200, permutations=199
    )
    found = initial_range(turned, statistic="symmetric")
    assert found is not None, "control: another place is found by both"
    assert abs(found.start - 4) <= 1


# --- samples -----------------------------------------------------------------------------------------------------


def test_sample_counts_add_up():
    samples = torch.stack([torch.tensor(RAMP) + noise(seed, RAMP, 0.4) for seed in range(50)])
    curve = curve_of(RAMP, samples=samples)
    counts = initial_range_samples(curve)
    assert sum(counts.values()) == 50
    assert counts[LayerRange(5, 9)] >= 40


def test_every_sample_is_read_with_the_observed_distance_to_the_lower_bound():
    gaps = torch.tensor([RAMP, STEP, FLAT, RAMP, [value * 0.07 for value in RAMP]], dtype=torch.float64)
    counts = initial_range_samples(curve_of(RAMP, below=0.5, samples=gaps))
    # The last has a peak of 1.4 degrees and so a lower bound of 0.9: too small.
    assert counts == Counter({LayerRange(5, 9): 2, LayerRange(5, 5): 1, None: 2})


def test_samples_of_a_curve_that_is_not_significant_are_all_none():
    assert initial_range_samples(curve_of(RAMP, p_any=0.5)) == Counter({None: 1})


def test_samples_follow_the_rule_they_are_given():
    curve = curve_of(TWO_SLOPES)
    assert initial_range_samples(curve) == Counter({LayerRange(5, 11): 1})
    assert initial_range_samples(curve, OnsetRule(flat_fraction=0.5)) == Counter({LayerRange(5, 7): 1})
