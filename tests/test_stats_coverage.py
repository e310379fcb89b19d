"""Do 95 % intervals hold the truth in 95 % of cases, do tests reject a true null in 5 %? On data with a known truth.

Every check has a negative control: an interval or a p-value that is too bold, which fails it. Replicates are laid along
the `layer` axis where layers do not meet (every layer its own data set), so that hundreds cost one call.
"""

import pytest
import torch
from torch import Tensor

from safety_mech import LayerRange
from safety_mech.divergence.angles import gap_curve, gap_difference
from safety_mech.divergence.resampling import angle_matrix
from safety_mech.stats import Estimate, correlation, mean_estimate, mean_pairwise_iou, slope

pytestmark = pytest.mark.slow  # simulations

N, D = 30, 6
REPLICATES = 300
MEAN_N = torch.tensor([2.0, 0, 0, 0, 0, 0])
MEAN_M = torch.tensor([1.6, 1.2, 0, 0, 0, 0])
"""Two clusters some degrees apart; prompts scatter by 1 in every dimension."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(
    seed: int, n: int, replicates: int, mean_m: Tensor = MEAN_M, n_m: int | None = None
) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    normal = torch.randn(n, replicates, D, generator=generator) + MEAN_N
    malicious = torch.randn(n_m or n, replicates, D, generator=generator) + mean_m
    return normal, malicious


def true_gap(mean_m: Tensor = MEAN_M) -> float:
    """From 200,000 independent pairs: known to 0.1 degrees, where intervals are some 5 wide."""
    x, y, z = (torch.randn(200_000, D, generator=seeded(s)) for s in (100, 101, 102))

    def mean_angle(a: Tensor, b: Tensor) -> float:
        cosine = torch.nn.functional.cosine_similarity(a.double(), b.double()).clamp(-1, 1)
        return float(torch.rad2deg(cosine.arccos()).mean())

    return mean_angle(x + MEAN_N, y + mean_m) - mean_angle(x + MEAN_N, z + MEAN_N)


def covered(low: Tensor, high: Tensor, truth: float) -> float:
    return float(((low <= truth) & (truth <= high)).double().mean())


@pytest.mark.parametrize("n_m", [N, 20])
def test_the_gaps_bootstrap_interval_covers_the_truth(n_m):
    normal, malicious = clusters(0, N, REPLICATES, n_m=n_m)
    curve = gap_curve(normal, malicious, bootstrap=500, permutations=2)
    truth = true_gap()
    assert truth > 2
    assert 0.90 <= covered(curve.low, curve.high, truth) <= 0.985
    # Control: pairs taken for independent, as error bars over the paper's 500 pairs would be.
    spread = (
        1.96
        * (
            curve.normal_malicious.angle_std.square() / curve.normal_malicious.n_pairs
            + curve.normal_normal.angle_std.square() / curve.normal_normal.n_pairs
        ).sqrt()
    )
    assert covered(curve.gap - spread, curve.gap + spread, truth) < 0.75


def test_the_paired_interval_covers_the_truth():
    """Both sides of a pair share a part of their scatter, but are never compared: the truth stays the same."""
    normal, malicious = clusters(1, N, REPLICATES)
    shared = 0.8
    malicious = MEAN_M + shared * (normal - MEAN_N) + (1 - shared**2) ** 0.5 * (malicious - MEAN_M)
    curve = gap_curve(normal, malicious, paired=True, bootstrap=500, permutations=2)
    assert 0.90 <= covered(curve.low, curve.high, true_gap()) <= 0.985
    half = (curve.high - curve.low) / 4  # control: half as wide
    assert covered(curve.gap - half, curve.gap + half, true_gap()) < 0.80


def test_the_difference_of_two_models_covers_zero():
    """The same prompts in both, a part of their scatter shared, and the same true gap."""
    first = clusters(2, N, REPLICATES)
    fresh = clusters(3, N, REPLICATES)
    second = tuple(m + 0.8 * (a - m) + 0.6 * (b - m) for a, b, m in zip(first, fresh, (MEAN_N, MEAN_M), strict=True))
    curves = [gap_curve(*sets, bootstrap=500, permutations=200) for sets in (first, second)]
    difference = gap_difference(*curves)
    assert 0.90 <= covered(difference.low, difference.high, 0.0) <= 0.985
    assert 0.01 <= float((difference.p_values <= 0.05).double().mean()) <= 0.10
    width = (difference.high - difference.low) / 4
    assert covered(difference.gap - width, difference.gap + width, 0.0) < 0.80


@pytest.mark.parametrize("paired", [False, True])
def test_the_permutation_test_rejects_a_true_null_in_five_percent(paired):
    normal, malicious = clusters(4, 20, 600, mean_m=MEAN_N)
    curve = gap_curve(normal, malicious, paired=paired, bootstrap=1, permutations=400)
    for level in (0.05, 0.2):
        sd = (level * (1 - level) / 600) ** 0.5
        assert abs(float((curve.p_values <= level).double().mean()) - level) < 3.5 * sd
    # Control: a normal approximation over pairs, which are not independent.
    stats = (curve.normal_malicious, curve.normal_normal)
    error = sum(part.angle_std.square() / part.n_pairs for part in stats) ** 0.5
    assert float((curve.gap / error > 1.645).double().mean()) > 0.12


def test_looking_at_all_layers_is_paid_for():
    """p_any of 20 independent layers without a gap; the smallest of the layers' own p-values would be far too bold."""
    any_p, smallest = [], []
    for seed in range(120):
        normal, malicious = clusters(1000 + seed, 12, 20, mean_m=MEAN_N)
        curve = gap_curve(normal, malicious, bootstrap=1, permutations=99)
        any_p.append(curve.p_any)
        smallest.append(float(curve.p_values.min()))
    rejected = sum(p <= 0.05 for p in any_p) / 120
    assert rejected <= 0.05 + 3.5 * (0.05 * 0.95 / 120) ** 0.5
    assert sum(p <= 0.2 for p in any_p) / 120 > 0.08  # and it is not so timid that it never rejects
    assert sum(p <= 0.05 for p in smallest) / 120 > 0.4  # control


def test_a_real_gap_is_found():
    """Power, so that a test which never rejects would fail here."""
    normal, malicious = clusters(5, 20, 200)
    curve = gap_curve(normal, malicious, bootstrap=1, permutations=400)
    assert float((curve.p_values <= 0.05).double().mean()) > 0.35


# --- over organisms and prompt sets -----------------------------------------------------------------------------------


def share_that_covers(found: list[Estimate], truth: float) -> float:
    return sum(e.low <= truth <= e.high for e in found) / len(found)


def organisms(seed: int, n_ranges: int, follows: float) -> tuple[list[float], list[float], list[int]]:
    """Two seeds of every planted range: planted and found centres; the errors of one range's seeds are alike."""
    generator = seeded(seed)
    planted = torch.randn(n_ranges, generator=generator).double().repeat_interleave(2)
    common = torch.randn(n_ranges, generator=generator).double().repeat_interleave(2)
    own = torch.randn(2 * n_ranges, generator=generator).double()
    found = follows * planted + (0.9**0.5) * common + (0.1**0.5) * own
    return planted.tolist(), found.tolist(), [index // 2 for index in range(2 * n_ranges)]


def test_means_over_organisms_cover_and_seeds_are_no_independent_organisms():
    draws = [organisms(seed, 7, 0.0) for seed in range(300)]
    grouped = [mean_estimate(found, groups) for _, found, groups in draws]
    assert 0.90 <= share_that_covers(grouped, 0.0) <= 0.99
    assert share_that_covers([mean_estimate(found) for _, found, _ in draws], 0.0) < 0.88  # control


@pytest.mark.parametrize("follows", [0.0, 1.0])
def test_correlation_and_slope_of_centres_cover(follows):
    draws = [organisms(1000 + seed, 10, follows) for seed in range(200)]
    r = follows / (follows**2 + 1) ** 0.5
    assert 0.88 <= share_that_covers([correlation(*draw) for draw in draws], r) <= 0.99
    assert 0.88 <= share_that_covers([slope(*draw) for draw in draws], follows) <= 0.99
    ungrouped = [correlation(planted, found) for planted, found, _ in draws]
    assert share_that_covers(ungrouped, r) < 0.87  # control: twice as many "organisms"


@pytest.mark.parametrize("follows", [0.0, 1.0, 3.0])
def test_with_five_ranges_as_planted_has_intervals_err_to_the_wide_side(follows):
    draws = [organisms(1000 + seed, 5, follows) for seed in range(200)]
    r = follows / (follows**2 + 1) ** 0.5
    assert share_that_covers([correlation(*draw) for draw in draws], r) >= 0.95
    assert share_that_covers([slope(*draw) for draw in draws], follows) >= 0.95
    ungrouped = [correlation(planted, found) for planted, found, _ in draws]
    assert share_that_covers(ungrouped, r) < 0.95  # control: ten "organisms"


def test_mean_pairwise_iou_covers_and_pairs_are_not_independent():
    """Ranges of width 6 with starts from 0 to 9, the middle ones more often; the truth: the mean of two such draws."""
    weights = torch.tensor([1.0, 1, 1, 6, 12, 6, 1, 1, 1, 1]) / 31
    starts = torch.multinomial(weights, 150 * 15, replacement=True, generator=seeded(7)).view(150, 15).tolist()
    sets = [[LayerRange(s, s + 5) for s in row] for row in starts]
    table = torch.tensor([[LayerRange(a, a + 5).iou(LayerRange(b, b + 5)) for a in range(10)] for b in range(10)])
    truth = float(weights @ table @ weights)
    found = [mean_pairwise_iou(row) for row in sets]
    assert 0.90 <= share_that_covers(found, truth) <= 0.995
    naive = []
    for row in sets:
        ious = [a.iou(b) for k, a in enumerate(row) for b in row[k + 1 :]]
        naive.append(mean_estimate(ious))
    assert share_that_covers(naive, truth) < 0.88  # control: 105 pairs taken for independent


def test_angles_of_replicates_do_not_meet():
    """What the trick with the layer axis relies on."""
    normal, malicious = clusters(8, 5, 3)
    together = angle_matrix(torch.cat([normal, malicious]))
    alone = angle_matrix(torch.cat([normal, malicious])[:, 1:2])
    assert torch.equal(together[1:2], alone)
