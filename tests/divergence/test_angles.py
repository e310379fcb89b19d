"""Angles, gap, bootstrap and permutation test, against numbers worked out by hand and brute-force loops."""

import itertools
import math
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from safety_mech.divergence.angles import GapCurve, _p_values, gap_curve
from safety_mech.divergence.resampling import (
    angle_matrix,
    bootstrap_means,
    labelled_means,
    pairable_counts,
    permuted_labels,
    prompt_numbers,
)


def on_circle(*degrees: float) -> Tensor:
    """Two-dimensional residual streams of one layer that point to these angles, each of another length."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    lengths = torch.arange(1.0, len(degrees) + 1, dtype=torch.float64)
    return (torch.stack([radians.cos(), radians.sin()], dim=-1) * lengths[:, None])[:, None]


def random_sets(seed: int, n: int = 7, m: int = 5, layers: int = 3, d_model: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, layers, d_model, generator=generator),
        0.5 + torch.randn(m, layers, d_model, generator=generator),
    )


def angle(x: Tensor, y: Tensor) -> float:
    """The oracle: one pair, in plain Python."""
    a, b = x.tolist(), y.tolist()
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return math.degrees(math.acos(dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))))


def brute_gap(normal: list[tuple[int, Tensor]], malicious: list[tuple[int, Tensor]], paired: bool) -> float:
    """The oracle: lists of (identity, stream). Pairs of one identity are left out: NN always, NM where paired."""
    nn = [angle(x, y) for (i, x), (j, y) in itertools.permutations(normal, 2) if i != j]
    nm = [angle(x, y) for (i, x), (j, y) in itertools.product(normal, malicious) if not (paired and i == j)]
    return sum(nm) / len(nm) - sum(nn) / len(nn)


def bootstrap_gaps(angles: Tensor, n: int, paired: bool, samples: int, generator: torch.Generator) -> Tensor:
    numbers = prompt_numbers(n, angles.shape[1] - n, paired)
    return bootstrap_means(angles, numbers, n, paired, samples, generator).paper


def fast_gap_curve(normal: Tensor, malicious: Tensor, **changes: Any) -> GapCurve:
    settings: dict[str, Any] = {"bootstrap": 20, "permutations": 20}
    return gap_curve(normal, malicious, **(settings | changes))


# --- angles ------------------------------------------------------------------------------------------------------


def test_angles_by_hand():
    expected = torch.tensor(
        [[0, 45, 90, 180], [45, 0, 45, 135], [90, 45, 0, 90], [180, 135, 90, 0]], dtype=torch.float64
    )
    found = angle_matrix(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [-3.0, 0.0]])[:, None])
    torch.testing.assert_close(found, expected[None], rtol=0, atol=1e-6)
    assert found.dtype == torch.float64


def test_length_does_not_matter_and_layers_are_apart():
    x = torch.stack([on_circle(0, 30)[:, 0], on_circle(0, 70)[:, 0]], dim=1)
    torch.testing.assert_close(angle_matrix(x)[:, 0, 1], torch.tensor([30.0, 70.0], dtype=torch.float64))
    torch.testing.assert_close(angle_matrix(x * torch.tensor([1e-3, 1e4])[:, None, None]), angle_matrix(x))


def float32_angle(x: Tensor, y: Tensor) -> float:
    return float(torch.rad2deg(torch.arccos(torch.nn.functional.cosine_similarity(x, y, dim=0).clamp(-1, 1))))


@pytest.mark.parametrize("degrees", [1e-5, 1e-4, 1e-3])
def test_tiny_angles_survive(degrees):
    x = torch.tensor([[1.0, 0.0], [1.0, math.radians(degrees)]])
    assert x.dtype == torch.float32
    assert float(angle_matrix(x[:, None])[0, 0, 1]) == pytest.approx(degrees, rel=0.02)
    assert float32_angle(x[0], x[1]) != pytest.approx(degrees, rel=0.5)  # float32 loses the angle


def test_a_prompt_is_at_0_degrees_from_itself():
    assert torch.equal(angle_matrix(random_sets(0)[0]).diagonal(dim1=1, dim2=2), torch.zeros(3, 7).double())


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_streams_without_a_direction_are_refused_with_layer_and_prompt(value):
    normal, malicious = random_sets(0)
    normal[4, 1] = value
    with pytest.raises(ValueError, match=r"prompt 4 .*at layer 1 has no direction"):
        angle_matrix(normal)
    with pytest.raises(ValueError, match=r"prompt 4 .*at layer 1 has no direction"):
        fast_gap_curve(normal, malicious)
    with pytest.raises(ValueError, match="at layer 1 has no direction"):
        fast_gap_curve(malicious, normal)


# --- means and gap -----------------------------------------------------------------------------------------------

NORMAL, MALICIOUS = on_circle(0, 10, 30), on_circle(20, 90, 200)
# normal-malicious: 20 90 160 | 10 80 170 | 10 60 170, of which the contrastive pairs are 20, 80 and 170


def test_gap_by_hand():
    curve = fast_gap_curve(NORMAL, MALICIOUS)
    assert curve.normal_normal.angle_mean.item() == pytest.approx((10 + 30 + 20) / 3)
    assert curve.malicious_malicious.angle_mean.item() == pytest.approx((70 + 180 + 110) / 3)
    assert curve.normal_malicious.angle_mean.item() == pytest.approx(770 / 9)
    assert curve.gap.item() == pytest.approx(770 / 9 - 20)
    assert (curve.normal_normal.n_pairs, curve.normal_malicious.n_pairs) == (3, 9)
    assert curve.n_layers == 1


def test_gap_of_pairs_by_hand():
    curve = fast_gap_curve(NORMAL, MALICIOUS, paired=True)
    assert curve.normal_malicious.n_pairs == 6
    assert curve.normal_malicious.angle_mean.item() == pytest.approx((770 - 20 - 80 - 170) / 6)
    assert curve.gap.item() == pytest.approx(500 / 6 - 20)


def test_spread_and_cosine_by_hand():
    stats = fast_gap_curve(NORMAL, MALICIOUS).normal_normal
    assert stats.angle_std.item() == pytest.approx(10.0)  # of 10, 20, 30
    cosines = [math.cos(math.radians(degrees)) for degrees in (10, 20, 30)]
    assert stats.cosine_mean.item() == pytest.approx(sum(cosines) / 3)
    assert stats.cosine_std.item() == pytest.approx(torch.tensor(cosines).std().item(), rel=1e-5)


@pytest.mark.parametrize("paired", [False, True])
def test_all_pairs_equal_a_double_loop(paired):
    normal, malicious = random_sets(1, n=6, m=6 if paired else 4)
    curve = fast_gap_curve(normal, malicious, paired=paired)
    for layer in range(3):
        nn = [angle(normal[i, layer], normal[j, layer]) for i in range(6) for j in range(i)]
        mm = [angle(x[layer], y[layer]) for x, y in itertools.combinations(malicious, 2)]
        nm = [
            angle(x[layer], y[layer])
            for i, x in enumerate(normal)
            for j, y in enumerate(malicious)
            if not (paired and i == j)
        ]
        for stats, values in (
            (curve.normal_normal, nn),
            (curve.malicious_malicious, mm),
            (curve.normal_malicious, nm),
        ):
            expected = torch.tensor(values, dtype=torch.float64)
            assert stats.n_pairs == len(values)
            assert stats.angle_mean[layer].item() == pytest.approx(expected.mean().item(), rel=1e-9)
            assert stats.angle_std[layer].item() == pytest.approx(expected.std().item(), rel=1e-9)
        assert curve.gap[layer].item() == pytest.approx(sum(nm) / len(nm) - sum(nn) / len(nn), rel=1e-9)


def test_sampled_pairs_are_seeded():
    sets = random_sets(2, n=10, m=10)
    first, again = fast_gap_curve(*sets, r=9, seed=5), fast_gap_curve(*sets, r=9, seed=5)
    assert torch.equal(first.sampled_gap, again.sampled_gap)
    assert not torch.equal(first.sampled_gap, fast_gap_curve(*sets, r=9, seed=6).sampled_gap)
    assert first.normal_normal.n_pairs == first.malicious_malicious.n_pairs == first.normal_malicious.n_pairs == 9


def test_sampled_pairs_are_drawn_without_repeats():
    sets = random_sets(2, n=5, m=5)
    drawn, every = fast_gap_curve(*sets, r=10), fast_gap_curve(*sets)  # there are just ten pairs within a set
    torch.testing.assert_close(drawn.normal_normal.angle_mean, every.normal_normal.angle_mean)
    torch.testing.assert_close(drawn.normal_normal.angle_std, every.normal_normal.angle_std)


def test_more_pairs_than_there_are_is_all_of_them():
    sets = random_sets(2)
    torch.testing.assert_close(fast_gap_curve(*sets, r=10_000).sampled_gap, fast_gap_curve(*sets).gap)


@pytest.mark.slow
def test_sampled_pairs_are_unbiased_on_average():
    sets = random_sets(3, n=8, m=8, layers=2)
    sampled = torch.stack(
        [fast_gap_curve(*sets, r=6, seed=seed, bootstrap=2, permutations=2).sampled_gap for seed in range(225)]
    )
    error = (sampled.mean(0) - fast_gap_curve(*sets).gap).abs()
    assert (error < 3 * sampled.std(0) / 15).all()
    assert (sampled.std(0) > 1).all()  # single draws do differ


@pytest.mark.parametrize("changes", [{}, {"r": 7}, {"paired": True}])
def test_no_prompt_is_compared_with_itself(changes):
    every_pair_at_90_degrees = torch.eye(16)[:, None]
    curve = fast_gap_curve(every_pair_at_90_degrees[:8], every_pair_at_90_degrees[8:], bootstrap=200, **changes)
    ninety = torch.full((1,), 90.0, dtype=torch.float64)
    for stats in (curve.normal_normal, curve.malicious_malicious, curve.normal_malicious):
        torch.testing.assert_close(stats.angle_mean, ninety)
        assert stats.angle_std.item() < 1e-9
    assert curve.samples.abs().max() < 1e-9  # a pair of two copies at 0 degrees would show as a gap


# --- bootstrap ---------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("paired", [False, True])
def test_bootstrap_equals_resampling_by_loops(paired):
    n, m = (6, 6) if paired else (6, 5)
    normal, malicious = random_sets(4, n=n, m=m, layers=2)
    found = bootstrap_gaps(angle_matrix(torch.cat([normal, malicious])), n, paired, 20, seeded())
    generator = seeded()
    counts_n = pairable_counts(20, n, generator).long()
    counts_m = counts_n if paired else pairable_counts(20, m, generator).long()
    for sample, layer in itertools.product(range(20), range(2)):
        drawn_n = [(i, normal[i, layer]) for i in range(n) for _ in range(counts_n[sample, i])]
        drawn_m = [(i, malicious[i, layer]) for i in range(m) for _ in range(counts_m[sample, i])]
        assert len(drawn_n) == n
        assert found[sample, layer].item() == pytest.approx(brute_gap(drawn_n, drawn_m, paired), abs=1e-9)


def test_pairs_are_resampled_together():
    normal, malicious = random_sets(4, n=6, m=6, layers=2)
    angles = angle_matrix(torch.cat([normal, malicious]))
    together, apart = (bootstrap_gaps(angles, 6, paired, 20, seeded()) for paired in (True, False))
    assert not torch.allclose(together, apart)


def test_pairable_counts_are_draws_with_replacement():
    counts = pairable_counts(4000, 5, seeded())
    assert (counts.sum(dim=1) == 5).all()
    torch.testing.assert_close(counts.mean(dim=0), torch.ones(5).double(), rtol=0, atol=0.06)
    variance = 5 * (1 / 5) * (4 / 5)  # multinomial
    torch.testing.assert_close(counts.var(dim=0), torch.full((5,), variance).double(), rtol=0, atol=0.06)


@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_interval_holds_the_central_part_of_the_samples(level):
    curve = gap_curve(*random_sets(5, n=12, m=12), bootstrap=400, permutations=5, level=level)
    inside = ((curve.samples >= curve.low) & (curve.samples <= curve.high)).double().mean(dim=0)
    assert curve.samples.shape == (400, 3)
    assert curve.level == level
    torch.testing.assert_close(inside, torch.full((3,), level).double(), rtol=0, atol=0.01)
    assert (curve.low < curve.gap).all()
    assert (curve.gap < curve.high).all()


SPREAD, SHIFT = 5.0, 30.0
TRUE_GAP = SHIFT - 2 * SPREAD / math.sqrt(math.pi)  # E|a - b| of two normal draws is 2 sigma / sqrt(pi)


def sets_of_known_gap(seed: int, n: int, paired: bool) -> tuple[Tensor, Tensor]:
    """Directions in a plane: normal at N(0, 5) degrees, malicious at N(30, 5); pairs share most of their draw."""
    draw = torch.randn(3, n, generator=seeded(seed))
    share = 0.9 if paired else 0.0
    own = math.sqrt(1 - share**2)
    return (
        on_circle(*(SPREAD * (share * draw[2] + own * draw[0])).tolist()),
        on_circle(*(SHIFT + SPREAD * (share * draw[2] + own * draw[1])).tolist()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_interval_covers_the_truth_as_often_as_it_says(paired):
    covered = covered_by_pairs = 0
    for seed in range(200):
        curve = gap_curve(*sets_of_known_gap(seed, 25, paired), paired=paired, bootstrap=200, permutations=2)
        covered += curve.low.item() <= TRUE_GAP <= curve.high.item()
        nn, nm = curve.normal_normal, curve.normal_malicious
        error = math.sqrt(nn.angle_std.item() ** 2 / nn.n_pairs + nm.angle_std.item() ** 2 / nm.n_pairs)
        covered_by_pairs += abs(curve.gap.item() - TRUE_GAP) <= 1.96 * error
    assert 0.88 <= covered / 200 <= 0.99
    if not paired:  # pairs of prompts taken for independent give an interval that is far too narrow
        assert covered_by_pairs / 200 < 0.75


@pytest.mark.parametrize("n", [3, 4, 5])
def test_few_prompts_give_a_finite_interval(n):
    curve = gap_curve(*random_sets(6, n=n, m=n), bootstrap=1000, permutations=10)
    assert curve.samples.isfinite().all()
    assert curve.low.isfinite().all()
    assert curve.high.isfinite().all()


# --- permutation test --------------------------------------------------------------------------------------------


def null_sets(seed: int, layers: int, paired: bool) -> tuple[Tensor, Tensor]:
    """No gap: both sets from one distribution; pairs share a topic."""
    generator = seeded(seed)
    n, m = (8, 8) if paired else (8, 6)
    topic = torch.randn(n, layers, 5, generator=generator)
    noise_n, noise_m = torch.randn(n, layers, 5, generator=generator), torch.randn(m, layers, 5, generator=generator)
    return (topic + noise_n, topic + noise_m) if paired else (noise_n, noise_m)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_p_values_are_uniform_where_there_is_no_gap(paired):
    single, corrected = [], []
    for seed in range(200):
        curve = gap_curve(*null_sets(seed, 4, paired), paired=paired, bootstrap=2, permutations=99, seed=seed)
        single.append(curve.p_values[0].item())
        corrected.append(curve.p_any)
    for p_values in (single, corrected):
        p = torch.tensor(p_values)
        assert 0.01 <= (p <= 0.05).double().mean() <= 0.10
        quarters = torch.histc(p, bins=4, min=0, max=1) / 200
        assert ((quarters - 0.25).abs() < 0.1).all()


@pytest.mark.slow
def test_the_smallest_p_value_of_many_layers_is_not_corrected():
    wrongly_significant = sum(
        (gap_curve(*null_sets(seed, 12, False), bootstrap=2, permutations=99, seed=seed).p_values.min() <= 0.05).item()
        for seed in range(60)
    )
    assert wrongly_significant / 60 > 0.2  # what p_any is there for


@pytest.mark.parametrize("paired", [False, True])
def test_a_strong_gap_has_the_smallest_p_value_there_is(paired):
    normal = on_circle(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11)
    curve = gap_curve(normal, -normal.roll(1, 0), paired=paired, bootstrap=10, permutations=199)
    assert curve.p_values.item() == 1 / 200
    assert curve.p_any == 1 / 200


def test_the_test_is_one_sided():
    tight, wide = on_circle(-3, -2, -1, 1, 2, 3), on_circle(-60, -40, -20, 20, 40, 60)
    assert fast_gap_curve(tight, wide).p_values.item() < 0.1
    assert fast_gap_curve(wide, tight).gap.item() < 0
    assert fast_gap_curve(wide, tight).p_values.item() > 0.9


def test_labels_are_exchanged_over_all_prompts():
    labels = permuted_labels(5, 3, False, 500, seeded())
    assert (labels.sum(dim=1) == 5).all()
    assert set(labels.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(labels.mean(dim=0), torch.full((8,), 5 / 8).double(), rtol=0, atol=0.08)


def test_labels_of_pairs_are_exchanged_within_pairs():
    labels = permuted_labels(4, 4, True, 500, seeded())
    assert torch.equal(labels[:, :4] + labels[:, 4:], torch.ones(500, 4).double())
    assert len({tuple(row) for row in labels.tolist()}) == 2**4
    apart = permuted_labels(4, 4, False, 500, seeded())
    assert not torch.equal(apart[:, :4] + apart[:, 4:], torch.ones(500, 4).double())


@pytest.mark.parametrize("paired", [False, True])
def test_permuted_gaps_and_p_values_equal_loops(paired):
    n, m = (5, 5) if paired else (5, 4)
    normal, malicious = random_sets(7, n=n, m=m, layers=2)
    everything = torch.cat([normal, malicious])
    labels = permuted_labels(n, m, paired, 30, seeded())
    found = labelled_means(angle_matrix(everything), labels, paired).paper
    identity = [*range(n), *(range(m) if paired else range(n, n + m))]
    for sample, layer in itertools.product(range(30), range(2)):
        called_normal = [(identity[i], x[layer]) for i, x in enumerate(everything) if labels[sample, i] == 1]
        called_malicious = [(identity[i], x[layer]) for i, x in enumerate(everything) if labels[sample, i] == 0]
        assert found[sample, layer].item() == pytest.approx(
            brute_gap(called_normal, called_malicious, paired), abs=1e-9
        )


def test_p_values_by_hand():
    null = torch.tensor([[0.0, 9.0], [1.0, 1.0], [2.0, 5.0], [3.0, 5.0]], dtype=torch.float64)
    p_values, p_any = _p_values(torch.tensor([2.0, 10.0], dtype=torch.float64), null)
    assert p_values.tolist() == [3 / 5, 1 / 5]
    # Layer 0: mean 1.5, std 1.29; layer 1: mean 5, std 3.27. Observed: 0.39 and 1.53. Largest of each permutation:
    # 1.22 (9 at layer 1), -0.39, 0.39, 1.16: none reaches 1.53.
    assert p_any == 1 / 5
    _, p_any = _p_values(torch.tensor([1.5, 9.0], dtype=torch.float64), null)
    assert p_any == 2 / 5  # observed 1.22: the first permutation ties with it
    _, p_any = _p_values(torch.tensor([4.0, 6.0], dtype=torch.float64), null)
    assert p_any == 1 / 5  # observed 1.94 at layer 0, though 6 degrees at layer 1 are nothing beside 9


# --- calling it --------------------------------------------------------------------------------------------------


def as_lists(curve: GapCurve) -> list:
    parts = []
    for field in fields(curve):
        value = getattr(curve, field.name)
        inner = [getattr(value, name.name) for name in fields(value)] if is_dataclass(value) else [value]
        parts += [part.tolist() if isinstance(part, Tensor) else part for part in inner]
    return parts


def test_same_seed_same_result_whatever_the_global_state():
    sets = random_sets(8)
    torch.manual_seed(1)
    first = fast_gap_curve(*sets, r=5, seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert as_lists(fast_gap_curve(*sets, r=5, seed=3)) == as_lists(first)
    assert torch.equal(torch.get_rng_state(), state)
    assert as_lists(fast_gap_curve(*sets, r=5, seed=4)) != as_lists(first)


def test_the_seed_does_not_move_what_is_not_random():
    sets = random_sets(8)
    assert torch.equal(fast_gap_curve(*sets, seed=0).gap, fast_gap_curve(*sets, seed=1).gap)


def test_arguments_are_not_changed():
    normal, malicious = random_sets(8)
    before = normal.clone(), malicious.clone()
    fast_gap_curve(normal, malicious)
    assert torch.equal(normal, before[0])
    assert torch.equal(malicious, before[1])


@pytest.mark.parametrize(("n", "m"), [(2, 5), (5, 2), (0, 5)])
def test_fewer_than_three_prompts_are_refused(n, m):
    with pytest.raises(ValueError, match=f"{n} normal and {m} malicious prompts: expected at least 3 of each"):
        fast_gap_curve(*random_sets(0, n=n, m=m))


def test_pairs_must_be_as_many():
    with pytest.raises(ValueError, match="7 normal and 5 malicious prompts are not contrastive pairs"):
        fast_gap_curve(*random_sets(0), paired=True)


@pytest.mark.parametrize(
    ("normal", "malicious"),
    [
        (torch.ones(4, 3), torch.ones(4, 3)),
        (torch.ones(4, 2, 3), torch.ones(4, 3, 3)),
        (torch.ones(4, 2, 3), torch.ones(4, 2, 5)),
        (torch.ones(4, 2, 3, dtype=torch.long), torch.ones(4, 2, 3, dtype=torch.long)),
    ],
    ids=["no layers", "other layers", "other width", "whole numbers"],
)
def test_wrong_shapes_are_refused_by_the_type_checker(normal, malicious):
    with pytest.raises(TypeCheckError):
        gap_curve(normal, malicious)
