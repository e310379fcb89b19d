"""Scores and agreement of ranges by hand; the coverage of the intervals is in test_stats_coverage.py."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from safety_mech import LayerRange
from safety_mech.stats import (
    Estimate,
    Rate,
    bootstrap_mean,
    correlation,
    expanded_tail,
    mean_estimate,
    mean_pairwise_iou,
    middle_third,
    overlap,
    random_iou,
    resampled_counts,
    score_range,
    slope,
)

R = LayerRange


def test_scores_by_hand():
    score = score_range(R(4, 9), R(6, 12))
    assert (score.iou, score.start_error, score.end_error, score.centre_hit) == (4 / 9, -2, -3, True)
    assert not score_range(R(0, 9), R(6, 12)).centre_hit  # 4.5 lies before 6
    assert score_range(R(5, 6), R(6, 12)).centre_hit is False
    ends = [score_range(R(layer, layer), R(6, 12)).centre_hit for layer in (5, 6, 12, 13)]
    assert ends == [False, True, True, False]  # both ends are inside
    assert score_range(R(6, 12), R(6, 12)).iou == 1.0
    nothing = score_range(None, R(6, 12))
    assert (nothing.iou, nothing.start_error, nothing.end_error, nothing.centre_hit) == (0.0, None, None, False)


def test_no_answer_overlaps_with_nothing():
    assert overlap(None, None) == overlap(None, R(0, 3)) == overlap(R(0, 3), None) == 0.0
    assert overlap(R(0, 3), R(2, 5)) == 2 / 6


@pytest.mark.parametrize(
    ("n", "expected"), [(30, R(10, 19)), (32, R(10, 20)), (6, R(2, 3)), (4, R(1, 1)), (1, R(0, 0))]
)
def test_the_middle_third(n, expected):
    assert middle_third(n) == expected


@pytest.mark.slow
def test_the_random_range_by_hand():
    """Two layers, truth [0, 0]: width 1 gives 1 or 0, width 2 gives a half."""
    assert random_iou(R(0, 0), 2) == pytest.approx((0.5 + 0.5) / 2)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(4000):
        width = int(torch.randint(1, 11, (1,), generator=generator))
        start = int(torch.randint(0, 10 - width + 1, (1,), generator=generator))
        drawn.append(R(start, start + width - 1).iou(R(3, 5)))
    assert random_iou(R(3, 5), 10) == pytest.approx(sum(drawn) / len(drawn), abs=0.02)


def test_mean_correlation_and_slope_equal_scipy():
    x, y = [1.0, 2.0, 4.0, 8.0, 9.0], [2.0, 1.0, 5.0, 7.0, 11.0]
    assert mean_estimate(x).value == pytest.approx(4.8)
    fitted = stats.linregress(x, y)
    assert correlation(x, y).value == pytest.approx(fitted.rvalue)
    assert slope(x, y).value == pytest.approx(fitted.slope)
    for found in (mean_estimate(x), correlation(x, y), slope(x, y)):
        assert found.low < found.value < found.high


def test_a_locator_that_always_gives_one_answer_has_slope_0_and_no_correlation():
    x, y = [1.0, 5.0, 9.0, 20.0], [12.0] * 4
    assert slope(x, y) == Estimate(0.0, 0.0, 0.0)
    found = correlation(x, y)
    assert math.isnan(found.value)
    assert math.isnan(found.low)
    assert str(found) == "undefined"


def test_two_values_make_no_correlation():
    """Through two points there is always a line."""
    assert str(correlation([1.0, 1.0, 5.0], [2.0, 3.0, 7.0])) == "undefined"
    assert correlation([1.0, 2.0, 5.0], [2.0, 3.0, 7.0]).value > 0.9


def test_groups_are_drawn_as_a_whole():
    """Ten copies of each item say no more than the items: the same interval, where without groups it is narrower."""
    x = [1.0, 2.0, 4.0, 8.0, 9.0]
    copies = [value for value in x for _ in range(10)]
    groups = [index for index in range(5) for _ in range(10)]
    assert mean_estimate(copies, groups) == mean_estimate(x)
    alone = mean_estimate(copies)
    assert alone.high - alone.low < 0.5 * (mean_estimate(x).high - mean_estimate(x).low)


def test_one_group_has_a_value_and_no_interval():
    found = mean_estimate([1.0, 2.0], ["a", "a"])
    assert found.value == 1.5
    assert math.isnan(found.low)
    assert str(found) == "1.50"
    assert str(Estimate(0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"


def test_mean_pairwise_iou_by_hand():
    found = mean_pairwise_iou([R(0, 3), R(2, 5), None])
    assert found.value == pytest.approx((2 / 6 + 0 + 0) / 3)
    same = mean_pairwise_iou([R(0, 3)] * 4)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)


@pytest.mark.slow
def test_a_thousand_answers_cost_no_memory():
    found = mean_pairwise_iou([R(0, 3), R(2, 5)] * 500)
    assert found.value == pytest.approx((499 + 500 / 3) / 999)


def test_counts_of_draws():
    counts = resampled_counts(500, 6, torch.Generator().manual_seed(0))
    assert (counts.sum(1) == 6).all()
    torch.testing.assert_close(counts.mean(0), torch.ones(6).double(), rtol=0, atol=0.15)
    torch.testing.assert_close(counts.var(0), torch.full((6,), 5 / 6).double(), rtol=0, atol=0.2)


@pytest.mark.parametrize(("n", "t"), [(2, 12.7062), (5, 2.77645), (14, 2.16037), (1000, 1.96234)])
def test_tails_lie_as_far_out_as_students(n, t):
    """t: from a printed table, 95 %, n - 1 degrees of freedom."""
    assert expanded_tail(0.025, n) == pytest.approx(stats.norm.sf(math.sqrt(n / (n - 1)) * t), rel=1e-3)
    assert expanded_tail(0.025, n) < 0.025


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (5, 10, (0.2366, 0.7634)), (81, 263, (0.2553, 0.3662))],
)
def test_wilson_interval_by_the_book(count: int, total: int, expected: tuple[float, float]) -> None:
    assert Rate(count, total).interval == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("count", "total"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_interval_refuses_impossible_counts(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= count <= total"):
        _ = Rate(count, total).interval


def test_a_rate_says_its_interval() -> None:
    assert str(Rate(5, 10)) == "5/10 = 50.0% [23.7%, 76.3%]"


def test_the_bootstrap_of_means_equals_loops() -> None:
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    drawn = torch.randint(7, (200, 7), generator=torch.Generator().manual_seed(4))
    means = np.array([[np.mean([values[i, k].item() for i in row]) for k in range(3)] for row in drawn])
    mean, low, high = bootstrap_mean(values, samples=200, level=0.8, seed=4)
    assert mean.tolist() == pytest.approx(values.mean(0).tolist())
    assert [low.tolist(), high.tolist()] == pytest.approx(np.quantile(means, [0.1, 0.9], axis=0))


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    """300 sets of 40 draws: 95 % intervals hold 0 in about 95 % of them; half as wide, they do not (control)."""
    values = torch.randn(40, 300, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean, low, high = bootstrap_mean(values)
    torch.testing.assert_close(mean, values.mean(dim=0))
    assert 0.90 < float(((low < 0) & (high > 0)).double().mean()) < 0.98
    narrow_low, narrow_high = (low + mean) / 2, (high + mean) / 2
    assert float(((narrow_low < 0) & (narrow_high > 0)).double().mean()) < 0.8


@pytest.mark.parametrize(("level", "tails"), [(0.5, (0.25, 0.75)), (0.95, (0.025, 0.975))])
def test_the_intervals_bounds_are_quantiles_of_its_level(level, tails):
    values = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    means = resampled_counts(1000, 12, torch.Generator().manual_seed(0)) @ values / 12
    _, *found = bootstrap_mean(values, level=level)
    assert [float(bound) for bound in found] == pytest.approx(np.quantile(means.numpy(), tails).tolist())


def test_the_interval_is_seeded_and_of_any_shape():
    values = torch.rand(10, 3, 2, generator=torch.Generator().manual_seed(0))
    first, again, other = (bootstrap_mean(values, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert first[1].shape == (3, 2)
    _, low, high = bootstrap_mean(values[:, 0, 0])
    assert np.allclose([float(low), float(high)], [first[1][0, 0], first[2][0, 0]])
    with pytest.raises(ValueError, match="1 prompts: expected at least 2"):
        bootstrap_mean(values[:1])


@pytest.mark.parametrize(
    "call",
    [
        lambda: correlation([1.0], [1.0]),
        lambda: slope([1.0, 2.0], [1.0]),
        lambda: mean_estimate([]),
        lambda: mean_estimate([1.0, 2.0], ["a"]),
        lambda: random_iou(R(3, 5), 5),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match=r"expected|layer range"):
        call()
