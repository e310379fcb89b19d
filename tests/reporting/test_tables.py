"""What the terminal prints, word for word: the gap by both statistics, what its interval is over, sweeps."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from test_angles import random_sets
from test_plots import curve_of

from safety_mech import LayerRange
from safety_mech.divergence.angles import GapDifference, SymmetricGap, gap_curve, gap_difference
from safety_mech.localization.search import Sweep
from safety_mech.reporting.tables import (
    bootstrap_text,
    difference_sentence,
    gap_sentence,
    gap_table,
    layers_text,
    sweep_table,
)

CURVE = curve_of(3.0)
"""Paper 3 degrees in the last layer, 2.5 to 3.5; symmetric 6, 5.5 to 6.5; p 0.01."""


def test_a_line_a_layer_with_both_statistics():
    head, *lines = gap_table(CURVE, LayerRange(10, 11)).splitlines()
    assert " ".join(head.split()).endswith("gap (deg) 95% interval p symmetric 95% interval spread p")
    assert len(lines) == 12
    cells = lines[11].split()
    assert cells[4:8] == ["3.00", "[2.50,", "3.50]", "0.010"]
    assert cells[8:] == ["6.00", "[5.50,", "6.50]", "6.00", "0.010", "|"]
    assert [line.endswith("|") for line in lines] == [False] * 10 + [True] * 2
    assert {len(line.removesuffix(" |")) for line in (head, *lines)} == {len(head)}, "columns stand below each other"


def test_the_sentence_names_both_statistics_and_what_was_drawn():
    samples = Counter({LayerRange(1, 2): 3, None: 1})
    said = gap_sentence(CURVE, LayerRange(1, 2), samples)
    assert said.startswith("largest gap 3.00 degrees [2.50, 3.50] at layer 11, p over all layers 0.010; ")
    assert "symmetric 6.00 degrees [5.50, 6.50] at layer 11, p over all layers 0.010 (spread alone: 6.00)" in said
    assert "bootstrap over 5 normal and 5 malicious prompts" in said
    assert said.endswith("initial range [1, 2] (the same in 75% of bootstrap curves, none in 25%)")
    assert "by the symmetric" not in said
    assert "[1, 2] (by the symmetric statistic) (the same" in gap_sentence(
        CURVE, LayerRange(1, 2), samples, "symmetric"
    )
    assert "no initial range (by the symmetric statistic)" in gap_sentence(CURVE, None, samples, "symmetric")


def test_topics_and_sampled_pairs_are_said():
    sampled = replace(CURVE, resampled="topics", n_resampled=(12, 10), r=10)
    assert bootstrap_text(sampled) == "bootstrap over 12 normal and 10 malicious topics"
    said = gap_sentence(sampled, None, Counter())
    assert "of 10 sampled pairs of each kind 3.00 degrees at layer 11" in said
    assert "sampled" not in gap_sentence(CURVE, None, Counter()), "control"


def test_a_difference_is_said_by_both_statistics():
    curves = [gap_curve(*random_sets(seed), bootstrap=20, permutations=20) for seed in (1, 2)]
    difference = gap_difference(*curves)
    said = difference_sentence(difference)
    assert said.startswith(f"{float(difference.gap.max()):.2f} degrees [")
    assert f"; symmetric {float(difference.symmetric.gap.max()):.2f} degrees [" in said
    assert torch.equal(difference.symmetric.spread_alone, difference.symmetric.null.mean(0))


def difference_of(low: list[float]) -> GapDifference:
    bounds = torch.tensor(low, dtype=torch.float64)
    samples = torch.zeros(2, len(low), dtype=torch.float64)
    parts = (bounds + 1, bounds, bounds + 2, torch.full_like(bounds, 0.5), 0.25, samples, samples)
    return GapDifference(*parts, symmetric=SymmetricGap(*parts, permuted=samples))


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
    assert difference_sentence(difference_of(low)).startswith(f"{expected}(p over all layers 0.250); symmetric")


def test_runs_end_where_a_layer_is_missing() -> None:
    assert layers_text([0, 1, 3, 4, 5, 7]) == "0-1, 3-5, 7"


def test_a_sweep_has_its_best_in_stars() -> None:
    ranges = tuple(LayerRange(3, end) for end in (4, 5, 6))
    assert sweep_table(Sweep("upper", ranges, (0.5, 1.25, -1.0), ranges[1]), "value").splitlines() == [
        "upper bound   [3, 4]  *[3, 5]*  [3, 6]",
        "value          0.500     1.250  -1.000",
    ]
