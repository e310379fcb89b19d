"""The symmetric statistic NM - (NN + MM) / 2: place without spread; its interval, and the mirror test of one place."""

import itertools
import math
from typing import Any

import pytest
import torch
from test_angles import MALICIOUS, NORMAL, angle, brute_gap, random_sets
from torch import Tensor

from safety_mech.divergence.angles import GapCurve, _p_values, gap_curve, gap_difference
from safety_mech.divergence.resampling import (
    angle_matrix,
    bootstrap_means,
    labelled_means,
    mirrored_means,
    pairable_counts,
    permuted_labels,
    prompt_numbers,
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rejected(p_values: Tensor) -> float:
    return float((p_values <= 0.05).double().mean())


def permutation_p(curve: GapCurve) -> Tensor:
    return _p_values(curve.symmetric.gap, curve.symmetric.permuted)[0]


# --- by hand and by loops ---------------------------------------------------------------------------------------------


def test_by_hand():
    # NN: 10, 30, 20, mean 20; MM: 70, 180, 110, mean 120; NM: 770 / 9, without the contrastive pairs 500 / 6
    curve = gap_curve(NORMAL, MALICIOUS, bootstrap=5, permutations=5)
    assert curve.symmetric.gap.item() == pytest.approx(770 / 9 - 70)
    pairs = gap_curve(NORMAL, MALICIOUS, paired=True, bootstrap=5, permutations=5)
    assert pairs.symmetric.gap.item() == pytest.approx(500 / 6 - 70)


def test_the_two_sets_may_swap_names():
    normal, malicious = random_sets(1)
    there, back = (gap_curve(*sets, bootstrap=5, permutations=5) for sets in ((normal, malicious), (malicious, normal)))
    torch.testing.assert_close(there.symmetric.gap, back.symmetric.gap)
    assert not torch.allclose(there.gap, back.gap, atol=1.0), "control: the paper's gap is another one"
    torch.testing.assert_close(there.symmetric.gap, (there.gap + back.gap) / 2)


@pytest.mark.parametrize("paired", [False, True])
def test_permuted_values_are_the_mean_of_the_gaps_both_ways(paired):
    normal, malicious = random_sets(2, n=6, m=6)
    angles = angle_matrix(torch.cat([normal, malicious]))
    labels = permuted_labels(6, 6, paired, 30, seeded(0))
    found = labelled_means(angles, labels, paired).symmetric
    both = labelled_means(angles, labels, paired).paper + labelled_means(angles, 1 - labels, paired).paper
    torch.testing.assert_close(found, both / 2)


@pytest.mark.parametrize("paired", [False, True])
def test_bootstrap_equals_resampling_by_loops(paired):
    n, m = (6, 6) if paired else (6, 5)
    normal, malicious = random_sets(4, n=n, m=m, layers=2)
    angles = angle_matrix(torch.cat([normal, malicious]))
    found = bootstrap_means(angles, prompt_numbers(n, m, paired), n, paired, 20, seeded(0)).symmetric
    generator = seeded(0)
    counts_n = pairable_counts(20, n, generator).long()
    counts_m = counts_n if paired else pairable_counts(20, m, generator).long()
    for sample, layer in itertools.product(range(20), range(2)):
        drawn_n = [(i, normal[i, layer]) for i in range(n) for _ in range(counts_n[sample, i])]
        drawn_m = [(i, malicious[i, layer]) for i in range(m) for _ in range(counts_m[sample, i])]
        expected = (brute_gap(drawn_n, drawn_m, paired) + brute_gap(drawn_m, drawn_n, paired)) / 2
        assert found[sample, layer].item() == pytest.approx(expected, abs=1e-9)


def reflected(streams: Tensor, shared: Tensor, signs: list[float]) -> list[Tensor]:
    """The oracle: unit vectors, moved to the length of their own mean along `shared`, residuals times the signs."""
    units = [x / x.norm() for x in streams.double()]
    n = len(units)
    mean = sum(units, torch.zeros_like(units[0])) / n
    return [
        mean.norm() * shared + sign * math.sqrt(n / (n - 1)) * (x - mean) for x, sign in zip(units, signs, strict=True)
    ]


@pytest.mark.parametrize("paired", [False, True])
def test_mirrored_values_equal_reflecting_by_loops(paired):
    n, m = (5, 5) if paired else (5, 4)
    normal, malicious = random_sets(5, n=n, m=m, layers=1)
    found = mirrored_means(normal, malicious, paired, 12, seeded(3)).symmetric
    generator = seeded(3)
    signs_n = torch.randint(2, (12, n), generator=generator) * 2.0 - 1
    signs_m = signs_n if paired else torch.randint(2, (12, m), generator=generator) * 2.0 - 1
    means = [torch.stack([x / x.norm() for x in streams[:, 0].double()]).mean(0) for streams in (normal, malicious)]
    shared = sum((mean / mean.norm() for mean in means), torch.zeros_like(means[0]))
    shared = shared / shared.norm()
    for draw in range(12):
        moved_n = list(enumerate(reflected(normal[:, 0], shared, signs_n[draw].tolist())))
        moved_m = list(enumerate(reflected(malicious[:, 0], shared, signs_m[draw].tolist())))
        expected = (brute_gap(moved_n, moved_m, paired) + brute_gap(moved_m, moved_n, paired)) / 2
        assert found[draw].item() == pytest.approx(expected, abs=1e-9)


def test_opposite_mean_directions_have_a_finite_null():
    normal = NORMAL.repeat(2, 1, 1) + 0.01
    curve = gap_curve(normal, -normal, bootstrap=5, permutations=19)
    assert curve.symmetric.null.isfinite().all()
    assert curve.symmetric.gap.item() == pytest.approx(180 - 2 * float(curve.normal_normal.angle_mean), abs=25)


# --- place and spread -------------------------------------------------------------------------------------------------

D, LENGTH, REPLICATES = 24, 10.0, 40


def two_sets(turn: float, width: float, n: int = 50, seed: int = 0, skewed: bool = False) -> tuple[Tensor, Tensor]:
    """`turn`: degrees between the mean directions; `width`: scatter of M, where N has 1. Replicates: layers."""
    generator = seeded(seed)

    def scatter() -> Tensor:
        if skewed:
            return -torch.log1p(-torch.rand(n, REPLICATES, D, generator=generator)) - 1  # exponential, mean 0
        return torch.randn(n, REPLICATES, D, generator=generator)

    normal, malicious = scatter(), width * scatter()
    normal[..., 0] += LENGTH
    malicious[..., 0] += LENGTH * math.cos(math.radians(turn))
    malicious[..., 1] += LENGTH * math.sin(math.radians(turn))
    return normal, malicious


@pytest.mark.slow_cases
@pytest.mark.parametrize("skewed", [False, True])
def test_mere_spread_is_a_gap_to_the_paper_and_none_to_the_symmetric_statistic(skewed):
    curve = gap_curve(*two_sets(0, 1.5, skewed=skewed), bootstrap=2, permutations=200)
    assert float(curve.gap.mean()) > 6
    assert rejected(curve.p_values) >= 0.95
    assert rejected(curve.symmetric.p_values) <= 0.125  # 5 of 40; 2 are expected
    # What is left of it is what spread alone makes, and it is small.
    assert 0.5 < float(curve.symmetric.gap.mean()) < 0.15 * float(curve.gap.mean())
    torch.testing.assert_close(curve.symmetric.spread_alone.mean(), curve.symmetric.gap.mean(), rtol=0, atol=0.1)
    assert rejected(permutation_p(curve)) > 0.8, "control: labels are not exchangeable"
    assert curve.symmetric.p_same_distribution <= 0.05


@pytest.mark.slow_cases
@pytest.mark.parametrize("width", [1.0, 1.5])
def test_another_place_is_a_gap_to_both(width):
    curve = gap_curve(*two_sets(20, width), bootstrap=2, permutations=200)
    assert rejected(curve.p_values) == rejected(curve.symmetric.p_values) == 1.0
    assert curve.symmetric.p_any <= 0.05
    assert (curve.symmetric.gap - curve.symmetric.spread_alone > 2).all()


def test_a_narrower_set_hides_its_place_from_the_paper_only():
    """What the base's negative gap in late layers is: M closer together than N."""
    curve = gap_curve(*two_sets(10, 1 / 1.5), bootstrap=2, permutations=200)
    assert rejected(curve.p_values) == 0.0
    assert rejected(curve.symmetric.p_values) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("n", [20, 50])
def test_where_nothing_differs_both_reject_in_five_percent(n):
    curves = [gap_curve(*two_sets(0, 1.0, n, seed), bootstrap=2, permutations=99) for seed in range(5)]
    for part in (curves, [curve.symmetric for curve in curves]):
        assert 0.01 <= rejected(torch.cat([one.p_values for one in part])) <= 0.10
        p = torch.cat([one.p_values for one in part])
        assert abs(float((p <= 0.5).double().mean()) - 0.5) < 0.15


@pytest.mark.slow
def test_pairs_are_reflected_together():
    """What the two of a pair share cancels in their difference: a turn of 2 degrees is found, which apart it is not."""
    normal, malicious = two_sets(2, 1.0)
    centre_n, centre_m = normal.mean(0), malicious.mean(0)
    malicious = centre_m + 0.95 * (normal - centre_n) + (1 - 0.95**2) ** 0.5 * (malicious - centre_m)
    pairs = gap_curve(normal, malicious, paired=True, bootstrap=2, permutations=200)
    apart = gap_curve(normal, malicious, bootstrap=2, permutations=200)
    assert rejected(pairs.symmetric.p_values) > 0.8
    assert rejected(apart.symmetric.p_values) < 0.2


@pytest.mark.slow
def test_pairs_of_one_place_are_rejected_in_five_percent():
    generator = seeded(8)
    shared, own_n, own_m = (torch.randn(40, 200, 8, generator=generator) for _ in range(3))
    normal, malicious = 0.8 * shared + 0.6 * own_n, 1.5 * (0.8 * shared + 0.6 * own_m)
    for part in (normal, malicious):
        part[..., 0] += 4
    curve = gap_curve(normal, malicious, paired=True, bootstrap=2, permutations=200)
    assert rejected(curve.symmetric.p_values) <= 0.10
    assert rejected(curve.p_values) > 0.9, "control: the paper's gap finds the spread"


@pytest.mark.slow
def test_the_interval_covers_the_truth():
    sets = [two_sets(15, 1.5, n=30, seed=seed) for seed in range(5)]
    curve = gap_curve(*(torch.cat(side, dim=1) for side in zip(*sets, strict=True)), bootstrap=400, permutations=2)
    x, y = two_sets(15, 1.5, n=2500, seed=99)
    flat = [part.flatten(0, 1).double() for part in (x, y)]

    def mean_angle(a: Tensor, b: Tensor) -> float:
        cosine = torch.nn.functional.cosine_similarity(a, b.roll(7 * REPLICATES, 0)).clamp(-1, 1)
        return float(torch.rad2deg(cosine.arccos()).mean())

    nn, mm, nm = mean_angle(flat[0], flat[0]), mean_angle(flat[1], flat[1]), mean_angle(flat[0], flat[1])
    truth, part = nm - (nn + mm) / 2, curve.symmetric
    inside = ((part.low <= truth) & (truth <= part.high)).double().mean()
    assert 0.90 <= float(inside) <= 0.995
    half = (part.high - part.low) / 4  # control: half as wide
    assert float(((part.gap - half <= truth) & (truth <= part.gap + half)).double().mean()) < 0.85


# --- two models -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_of_two_models_the_symmetric_difference_tells_place_from_spread():
    settings: dict[str, Any] = {"bootstrap": 200, "permutations": 200}
    before, wider, moved = (gap_curve(*two_sets(*change), **settings) for change in ((0, 1.0), (0, 1.5), (20, 1.0)))
    spread, place = gap_difference(wider, before), gap_difference(moved, before)
    torch.testing.assert_close(place.symmetric.gap, moved.symmetric.gap - before.symmetric.gap)
    torch.testing.assert_close(place.symmetric.samples, moved.symmetric.samples - before.symmetric.samples)
    torch.testing.assert_close(place.symmetric.null, moved.symmetric.null - before.symmetric.null)
    torch.testing.assert_close(place.symmetric.permuted, moved.symmetric.permuted - before.symmetric.permuted)
    assert rejected(place.p_values) == rejected(place.symmetric.p_values) == 1.0
    assert rejected(spread.p_values) >= 0.95
    assert rejected(spread.symmetric.p_values) <= 0.125


def test_a_model_less_itself_is_nothing():
    curve = gap_curve(*two_sets(10, 1.5), bootstrap=20, permutations=20)
    difference = gap_difference(curve, curve).symmetric
    assert torch.equal(difference.gap, torch.zeros(REPLICATES, dtype=torch.float64))
    assert difference.p_any == 1.0


# --- sampled pairs ----------------------------------------------------------------------------------------------------


def test_with_sampled_pairs_value_interval_and_test_are_those_of_all_pairs():
    sets, others = random_sets(2, n=10, m=10), random_sets(3, n=10, m=10)
    options: dict[str, Any] = {"bootstrap": 50, "permutations": 50}
    every = [gap_curve(*part, **options) for part in (sets, others)]
    sampled = [gap_curve(*part, r=9, **options) for part in (sets, others)]
    for one, part in zip(every, sampled, strict=True):
        assert torch.equal(one.gap, part.gap)
        assert torch.equal(one.samples, part.samples)
        assert torch.equal(one.null, part.null)
        assert not torch.allclose(part.sampled_gap, part.gap, atol=0.5), "control: nine pairs are not all"
        torch.testing.assert_close(one.sampled_gap, one.gap)
    differences = [gap_difference(*pair) for pair in (every, sampled)]
    for name in ("gap", "low", "high", "p_values"):
        assert torch.equal(getattr(differences[0], name), getattr(differences[1], name))


def test_the_sampled_gap_is_that_of_the_sampled_pairs():
    curve = gap_curve(*random_sets(2, n=10, m=10), r=9, bootstrap=2, permutations=2)
    expected = curve.normal_malicious.angle_mean - curve.normal_normal.angle_mean
    assert torch.equal(curve.sampled_gap, expected)
    assert curve.r == 9


def test_angles_are_what_the_means_are_of():
    """What the oracle above rests on."""
    assert angle(NORMAL[0, 0], MALICIOUS[1, 0]) == pytest.approx(90)
