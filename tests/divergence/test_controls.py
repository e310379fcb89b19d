"""Controls: who plays normal, and which prompts are matched, by hand and by their properties."""

import pytest
import torch

from safety_mech.divergence.angles import gap_curve
from safety_mech.divergence.controls import match_prompts, single_topics, topic_halves, words_of
from safety_mech.divergence.resampling import angle_matrix, labelled_means

TOPICS = ["home", "food", "home", "art", "sea", "art"]


def test_halves_keep_topics_together_and_are_halves():
    halves = topic_halves(TOPICS, samples=200, seed=1)
    assert halves.shape == (200, 6)
    assert torch.equal(halves[:, 0], halves[:, 2])  # home
    assert torch.equal(halves[:, 3], halves[:, 5])  # art
    per_topic = halves[:, [0, 1, 3, 4]]
    assert (per_topic.sum(1) == 2).all()
    assert len({tuple(row) for row in per_topic.tolist()}) == 6  # all ways to choose two of four
    assert torch.equal(halves, topic_halves(TOPICS, samples=200, seed=1))
    assert not torch.equal(halves, topic_halves(TOPICS, samples=200, seed=2))


def test_single_topics_in_alphabetical_order():
    rows = single_topics(TOPICS)
    assert rows.tolist() == [
        [True, True, True, False, True, False],
        [True, False, True, True, True, True],
        [False, True, False, True, True, True],
        [True, True, True, True, False, True],
    ]


def test_too_few_topics():
    with pytest.raises(ValueError, match="3 topics: expected at least 4"):
        topic_halves(["a", "b", "c"])


def test_the_gap_of_a_labelling_is_that_of_gap_curve():
    x = torch.randn(8, 2, 5, generator=torch.Generator().manual_seed(0))
    is_normal = torch.tensor([True, False, True, True, False, True, False, True])
    (found,) = labelled_means(angle_matrix(x), is_normal[None].double()).paper
    curve = gap_curve(x[is_normal], x[~is_normal], bootstrap=2, permutations=2)
    torch.testing.assert_close(found, curve.gap)


def test_words():
    assert words_of("How do I DON'T bake, a cake?") == {"how", "do", "i", "don't", "bake", "a", "cake"}


def test_matching_by_hand():
    malicious = ["how to make a bomb", "steal a car", "kill a man now"]
    normal = ["steal a car now", "how to make a cake", "walk"]
    found = match_prompts(malicious, normal, [5, 3, 4], [4, 5, 4], count=2)
    assert found.pairs == ((0, 1), (2, 0))  # 4 of 6 words; then "a", "now" of 6; (1, 0) would be nearer, but is shorter
    assert found.shared_words == pytest.approx((4 / 6 + 2 / 6) / 2)
    assert found.length_difference == 0.0
    assert found.length_difference_before == pytest.approx(4 - 13 / 3)
    near = match_prompts(malicious, normal, [5, 3, 4], [4, 5, 4], count=2, tolerance=1)
    assert near.pairs == ((1, 0), (0, 1))
    assert near.shared_words > found.shared_words > found.shared_words_before
    assert near.length_difference == -0.5


def test_no_prompt_is_matched_twice():
    malicious, normal = [f"a {n}" for n in range(6)], [f"a {n}" for n in range(5)]
    found = match_prompts(malicious, normal, [2] * 6, [2] * 5, count=5)
    assert len({m for m, _ in found.pairs}) == len({n for _, n in found.pairs}) == 5
    with pytest.raises(ValueError, match="6 matched prompts are wanted, but only 5"):
        match_prompts(malicious, normal, [2] * 6, [2] * 5, count=6)
