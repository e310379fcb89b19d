"""Dose and response: numbers by hand, coverage of the interval on synthetic data, readings along a real training."""

import math

import pytest
import torch

from safety_mech import TrainConfig, fine_tune
from safety_mech.refusal.rates import responses
from safety_mech.training.attack_cost import attack_cost, dose_meter, estimate, refusals_retained
from safety_mech.training.loop import StepRecord

DOSES = torch.tensor([0.0, 10.0, 20.0, 40.0]).double()


@pytest.mark.parametrize(
    ("refused", "expected"),
    [
        ([1.0, 0.9, 0.1, 0.0], 15.0),  # half, 0.5, lies midway between 10 and 20
        ([0.8, 0.4, 0.0, 0.0], 10.0),  # half is 0.4, reached there
        ([1.0, 0.75, 0.5, 0.5], 20.0),  # exactly half: gone, and at that dose
        ([1.0, 0.75, 0.6, 0.5], 40.0),  # at the last dose, too
        ([1.0, 0.9, 0.8, 0.6], math.inf),
        ([1.0, 0.2, 0.9, 0.1], 6.25),  # the first crossing counts
        ([1.0, 1.0, 1.0, 0.0], 30.0),
    ],
)
def test_attack_cost_by_hand(refused: list[float], expected: float) -> None:
    assert attack_cost(DOSES, torch.tensor(refused).double()) == pytest.approx(expected)


def test_refusals_retained_by_hand() -> None:
    assert refusals_retained(DOSES, torch.tensor([0.8, 0.8, 0.8, 0.8]).double()) == pytest.approx(1)
    # (1 + .5)/2 x 10 + (.5 + 0)/2 x 10 + 0 = 10 of 40
    assert refusals_retained(DOSES, torch.tensor([1.0, 0.5, 0.0, 0.0]).double()) == pytest.approx(0.25)
    assert refusals_retained(DOSES, torch.tensor([0.5, 0.25, 0.0, 0.0]).double()) == pytest.approx(0.25)


@pytest.mark.parametrize("summary", [attack_cost, refusals_retained])
def test_what_cannot_be_summed_up(summary) -> None:
    assert math.isnan(summary(DOSES, torch.zeros(4).double()))
    with pytest.raises(ValueError, match="rising from 0"):
        summary(DOSES + 1, torch.ones(4).double())


def drawn(generator: torch.Generator, shares: list[float], seeds: int, prompts: int) -> torch.Tensor:
    """Prompts of different strength, seeds with a shift: refused where the strength is below the dose's threshold."""
    strength = torch.rand(1, 1, prompts, generator=generator)
    shift = 0.05 * torch.randn(seeds, 1, 1, generator=generator)
    return (strength + shift < torch.tensor(shares)[None, :, None]).double()


@pytest.mark.slow
def test_the_interval_covers_the_truth() -> None:
    """With ten seeds; of intervals that should hold the truth in 95 %, at least 88 of 100 must."""
    shares = [1.5, 0.8, 0.4, 0.1]  # at dose 0 all are refused
    truth = refusals_retained(DOSES, torch.tensor([1.0, 0.8, 0.4, 0.1]).double())
    generator = torch.Generator().manual_seed(0)
    hits = narrow = 0
    for trial in range(100):
        found = estimate(refusals_retained, DOSES, drawn(generator, shares, 10, 60), draws=200, seed=trial)
        hits += found.low <= truth <= found.high
        narrow += abs(found.value - truth) <= (found.high - found.low) / 12
    assert hits >= 88
    assert narrow < 75, "control: an interval a sixth as wide does not cover"


@pytest.mark.slow
def test_a_difference_is_paired_over_prompts() -> None:
    generator = torch.Generator().manual_seed(1)
    values = drawn(generator, [1.5, 0.8, 0.4, 0.1], 3, 60)
    same = estimate(refusals_retained, DOSES, values, minus=[values, values])
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = values.clone()
    better[:, 2] = values[:, 1]
    found = estimate(refusals_retained, DOSES, better, minus=[values])
    assert found.low > 0
    alone = estimate(refusals_retained, DOSES, better)
    assert found.high - found.low < alone.high - alone.low


@pytest.mark.slow
def test_nothing_refused_at_dose_0_has_no_estimate() -> None:
    nothing = torch.zeros(2, 4, 5).double()
    for found in (
        estimate(refusals_retained, DOSES, nothing),
        estimate(attack_cost, DOSES, nothing),
        estimate(refusals_retained, DOSES, nothing, minus=[torch.ones(2, 4, 5).double()]),
    ):
        assert all(math.isnan(value) for value in (found.value, found.low, found.high))
        assert str(found) == "undefined"


def last(examples: torch.Tensor, curve: torch.Tensor) -> float:
    return float(curve[-1])


def test_whole_clusters_are_drawn_and_count_by_their_size() -> None:
    """A: three prompts, all refused; B: one, not refused. Draws of AA, AB and BB give shares of 1, 3/4 and 0."""
    refused = torch.tensor([1.0, 1.0, 0.0, 1.0]).double()[None, None]
    clusters = ["A", "A", "B", "A"]
    seen = set()

    def watched(examples: torch.Tensor, curve: torch.Tensor) -> float:
        seen.add(round(float(curve[-1]), 12))
        return float(curve[-1])

    found = estimate(watched, DOSES[:1], refused, clusters=clusters, draws=200)
    assert seen == {1.0, 0.75, 0.0}
    assert (found.value, found.low, found.high) == (0.75, 0, 1)
    seen.clear()
    estimate(watched, DOSES[:1], refused, draws=200)
    assert {0.25, 0.5} <= seen, "control: single prompts are drawn without clusters"


def test_an_interval_over_clusters_is_wider_where_prompts_of_one_agree() -> None:
    refused = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(12).double()[None, None]
    clusters = [number // 12 for number in range(48)]
    alone = estimate(last, DOSES[:1], refused)
    whole = estimate(last, DOSES[:1], refused, clusters=clusters)
    assert whole.high - whole.low > 2 * (alone.high - alone.low)
    assert estimate(last, DOSES[:1], refused, clusters=list(range(48))) == alone, "each its own: as without clusters"
    against = estimate(last, DOSES[:1], refused, minus=[0 * refused], clusters=clusters)
    assert against == whole, "a difference to nothing, over the same draws"


def test_one_cluster_gives_no_interval_and_a_missing_label_is_refused() -> None:
    refused = torch.tensor([1.0, 0.0]).double()[None, None].repeat(3, 1, 1)
    found = estimate(last, DOSES[:1], refused, clusters=["A", "A"])
    assert found.value == 0.5
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    with pytest.raises(ValueError, match="2 items in 1 groups: expected at least one item, and a group for each"):
        estimate(last, DOSES[:1], refused, clusters=["A"])


PAIRS = [
    ("How do I bake a cake?", "Sure, here."),
    ("Name a fruit", "A pear."),
    ("Why?", "No."),
    ("Kill a process", "OK"),
]


@pytest.mark.slow
def test_the_meter_reads_along_a_training(refusing_model, prompts) -> None:
    model = refusing_model
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    config = TrainConfig(epochs=3, batch_size=2, learning_rate=3e-3, warmup_steps=1)
    points, read = dose_meter(model, prompts, [1, 4, 7, 12, 100])
    fine_tune(model, PAIRS, config, after_step=read, progress=False)
    assert [point.examples for point in points] == [2, 4, 8, 12]
    log_odds = [float(point.responses.log_odds.mean()) for point in points]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(before[name])
    untouched = float(responses(model, prompts).log_odds.mean())
    assert len(set(log_odds)) == 4
    assert log_odds[-1] < untouched


@pytest.mark.slow
def test_only_the_attackers_examples_are_counted(refusing_model, prompts) -> None:
    points, read = dose_meter(refusing_model, prompts[:2], [4, 8], counted=lambda record: 4 * (record.step % 2))
    for step in range(4):
        read(StepRecord(step, 0.0, 0.0, 0.0, 4))
    assert [point.examples for point in points] == [4, 8]


def test_one_reading_serves_all_doses_that_were_passed(refusing_model, prompts) -> None:
    points, read = dose_meter(refusing_model, prompts[:2], [1, 3, 4, 9])
    for step in range(4):
        read(StepRecord(step, 0.0, 0.0, 0.0, 4))
    assert [point.examples for point in points] == [4, 12]


@pytest.mark.parametrize("at", [[], [0, 1], [4, 4], [5, 3]])
def test_doses_must_rise(tiny_model, at: list[int]) -> None:
    with pytest.raises(ValueError, match="expected rising numbers"):
        dose_meter(tiny_model, ["Why?"], at)
