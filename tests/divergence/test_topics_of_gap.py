"""The gap's bootstrap over whole topics: against loops, for its coverage, and what it refuses."""

import itertools
from typing import Any

import pytest
import torch
from test_angles import angle, random_sets
from torch import Tensor

from safety_mech.divergence.angles import _topic_numbers, gap_curve, gap_difference
from safety_mech.divergence.resampling import angle_matrix, bootstrap_means, pairable_counts


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


Drawn = list[tuple[int, int, int, Tensor]]
"""Topic, its copy, prompt, stream."""


def drawn(streams: Tensor, topics: list[int], counts: list[int]) -> Drawn:
    return [
        (topic, copy, prompt, streams[prompt]) for prompt, topic in enumerate(topics) for copy in range(counts[topic])
    ]


def mean_angle(first: Drawn, second: Drawn, related: bool) -> float:
    """The oracle: all pairs but of two copies of one topic, or of one prompt or contrastive pair with itself.

    `related`: topics of the same number are the same topic.
    """
    values = [
        angle(x, y)
        for (topic, copy, prompt, x), (other, other_copy, other_prompt, y) in itertools.product(first, second)
        if not related or topic != other or (copy == other_copy and prompt != other_prompt)
    ]
    return sum(values) / len(values)


@pytest.mark.parametrize("paired", [False, True])
def test_bootstrap_equals_drawing_topics_by_loops(paired):
    topics_n = [0, 0, 1, 2, 2, 2, 3]
    topics_m = topics_n if paired else [0, 1, 1, 2, 2]
    normal, malicious = random_sets(6, n=len(topics_n), m=len(topics_m), layers=1)
    n = len(topics_n)
    angles = angle_matrix(torch.cat([normal, malicious]))
    numbers = _topic_numbers(n, len(topics_m), topics_n, topics_m, paired)
    found = bootstrap_means(angles, numbers, n, paired, 15, seeded(1))
    generator = seeded(1)
    counts_n = pairable_counts(15, 4, generator).long().tolist()
    counts_m = counts_n if paired else pairable_counts(15, 3, generator).long().tolist()
    for sample in range(15):
        first = drawn(normal[:, 0], topics_n, counts_n[sample])
        second = drawn(malicious[:, 0], topics_m, counts_m[sample])
        nn, mm = mean_angle(first, first, True), mean_angle(second, second, True)
        nm = mean_angle(first, second, paired)
        assert found.paper[sample].item() == pytest.approx(nm - nn, abs=1e-9)
        assert found.symmetric[sample].item() == pytest.approx(nm - (nn + mm) / 2, abs=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_a_topic_for_each_prompt_is_the_bootstrap_over_prompts(paired):
    sets = random_sets(7, n=8, m=8)
    options: dict[str, Any] = {"paired": paired, "bootstrap": 50, "permutations": 20}
    prompts = gap_curve(*sets, **options)
    malicious = list("abcdefgh") if paired else list("ijklmnop")
    topics = gap_curve(*sets, normal_clusters=list("abcdefgh"), malicious_clusters=malicious, **options)
    assert torch.equal(prompts.samples, topics.samples)
    assert (prompts.resampled, topics.resampled) == ("prompts", "topics")
    coarse = ["a", "a", "b", "b", "c", "c", "d", "d"]
    other = gap_curve(*sets, normal_clusters=coarse, malicious_clusters=coarse, **options)
    assert not torch.allclose(other.samples, prompts.samples), "control: other draws"
    assert other.n_resampled == (4, 4)
    assert torch.equal(other.gap, prompts.gap)


def test_equal_names_in_the_two_sets_are_two_topics():
    sets = random_sets(7, n=6, m=6)
    names = ["a", "a", "b", "b", "c", "c"]
    apart = gap_curve(*sets, normal_clusters=names, malicious_clusters=["x", "x", "y", "y", "z", "z"], bootstrap=30)
    same = gap_curve(*sets, normal_clusters=names, malicious_clusters=names, bootstrap=30)
    assert torch.equal(apart.samples, same.samples)


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_over_topics_covers_the_truth_and_that_over_prompts_does_not(paired):
    """20 topics of 4 prompts a set, whose prompts lie together; every layer is a data set of its own topics."""
    n_topics, each, replicates = 20, 4, 200
    generator = seeded(2)

    def scatter(topics: Tensor) -> Tensor:
        return topics.repeat_interleave(each, 0) + 0.4 * torch.randn(
            n_topics * each, replicates, 6, generator=generator
        )

    of_n, of_m = (torch.randn(n_topics, replicates, 6, generator=generator) for _ in range(2))
    normal, malicious = scatter(of_n), scatter(of_n if paired else of_m)
    normal[..., 0] += 2.0
    malicious[..., 0] += 1.6
    malicious[..., 1] += 1.2
    topics = [str(index // each) for index in range(n_topics * each)]
    options: dict[str, Any] = {"paired": paired, "bootstrap": 300, "permutations": 2}
    over_topics = gap_curve(normal, malicious, normal_clusters=topics, malicious_clusters=topics, **options)
    over_prompts = gap_curve(normal, malicious, **options)
    truth = float(over_topics.gap.mean())  # of 200 data sets: known to a fourteenth of one's standard error

    def covered(low: Tensor, high: Tensor) -> float:
        return float(((low <= truth) & (truth <= high)).double().mean())

    assert 0.89 <= covered(over_topics.low, over_topics.high) <= 0.985
    assert covered(over_prompts.low, over_prompts.high) < 0.80


# --- what is refused --------------------------------------------------------------------------------------------------

SETS = random_sets(0, n=6, m=6)
THREE = ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize(
    ("normal", "malicious", "paired", "message"),
    [
        (THREE, None, False, "topics of one set only: expected normal_clusters and malicious_clusters, or none"),
        (None, THREE, False, "topics of one set only"),
        (THREE[:5], THREE, False, "topics of 5 normal and 6 malicious prompts: expected 6 and 6"),
        (THREE, THREE[::-1], True, "paired: expected contrastive pairs to have the same topic"),
        (["a", "b"] * 3, THREE, False, "2 normal and 3 malicious topics: expected at least 3 of each"),
    ],
)
def test_refused(normal, malicious, paired, message):
    with pytest.raises(ValueError, match=message):
        gap_curve(*SETS, paired=paired, normal_clusters=normal, malicious_clusters=malicious)


def test_curves_over_topics_and_over_prompts_have_no_difference():
    options: dict[str, Any] = {"bootstrap": 20, "permutations": 20}
    over_prompts = gap_curve(*SETS, **options)
    over_topics = gap_curve(*SETS, normal_clusters=THREE, malicious_clusters=THREE, **options)
    with pytest.raises(ValueError, match=r"over \(3, 3\) topics and \(6, 6\) prompts: expected the same"):
        gap_difference(over_topics, over_prompts)
