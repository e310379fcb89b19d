"""From scores to a range: the rule by hand, against brute force, and on planted segments with noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from safety_mech import LayerRange
from safety_mech.localization.segments import best_ranges, best_segment, between_squares


def scores(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def means(values: Tensor, layers: LayerRange) -> tuple[float, float]:
    """Inside the range, and outside of it."""
    inside = torch.tensor([layer in layers for layer in range(len(values))])
    return float(values[inside].mean()), float(values[~inside].mean())


def brute_force(values: list[float], max_width: int) -> LayerRange | None:
    """Least squares of two levels, the higher one inside, by the definition."""
    best, found = -math.inf, None
    n = len(values)
    for width in range(1, max_width + 1):
        for start in range(n - width + 1):
            inside, outside = values[start : start + width], values[:start] + values[start + width :]
            levels = (sum(inside) / len(inside), sum(outside) / len(outside))
            if levels[0] <= levels[1] + 1e-9:
                continue
            error = sum((v - levels[0]) ** 2 for v in inside) + sum((v - levels[1]) ** 2 for v in outside)
            if -error > best + 1e-9:
                best, found = -error, LayerRange(start, start + width - 1)
    return found


def test_two_clean_levels():
    found = best_segment(scores(0, 0, 2, 2, 2, 0, 0, 0))
    assert found is not None
    assert found.range == LayerRange(2, 4)
    assert found.explained == pytest.approx(1.0)


def test_an_uneven_segment_by_hand():
    """An organism planted at 18-23: two high layers, three of a third; the two explain more than all five."""
    values = [0.3] * 18 + [2.3, 2.4, 0.8, 0.7, 0.6] + [0.3] * 7
    found = best_segment(scores(*values))
    assert found is not None
    assert found.range == LayerRange(18, 19)
    assert found.range == brute_force(values, 15)


@pytest.mark.parametrize(("scale", "offset"), [(1e-6, 0.0), (1e6, 0.0), (1.0, 1e3), (1.0, -7.0)])
def test_unit_and_offset_do_not_matter(scale, offset):
    values = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert best_segment(values * scale + offset).range == best_segment(values).range


def test_a_dip_is_no_segment():
    found = best_segment(scores(1, 1, 1, -5, 1, 1, 1, 1), max_width=7)
    assert found is not None
    assert 3 not in found.range


def test_a_single_low_layer_does_not_make_the_rest_the_range():
    values = scores(-9, 0, 0, 0, 1, 1, 0, 0, 0, 0)
    assert best_segment(values).range.width <= 5
    assert best_segment(values, max_width=9).range == LayerRange(1, 9)  # control: without the limit it does


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1e9])
def test_equal_scores_have_no_range(value):
    assert best_segment(torch.full((7,), value, dtype=torch.float64)) is None


def test_ties_go_to_the_narrower_then_the_earlier():
    assert best_segment(scores(1, 0, 1, 0)).range == LayerRange(0, 0)
    assert best_segment(scores(0, 1, 0, 0, 1, 0)).range == LayerRange(1, 1)


def test_a_narrow_range_goes_before_an_earlier_wide_one_of_equal_fit():
    """Mean 0; between: [7, 7] 3^2 10 / (1 x 9) = 10, [0, 1] 4^2 10 / (2 x 8) = 10, all others less."""
    tied = scores(2, 2, -1, -1, -1, -1, -1, 3, -1, -1)
    between = between_squares(tied[None])[0]
    assert between[7, 7] == between[0, 1] == between.max() == 10
    assert best_segment(tied).range == LayerRange(7, 7)
    assert best_segment(tied.flip(0)).range == LayerRange(2, 2)


@pytest.mark.slow
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=9), st.integers(1, 8))
@settings(max_examples=200, deadline=None)
def test_equals_brute_force(values, width):
    width = min(width, len(values) - 1)
    found = best_segment(scores(*values), width)
    assert (found.range if found else None) == brute_force([float(v) for v in values], width)


@pytest.mark.slow
@given(st.lists(st.floats(-3, 3), min_size=4, max_size=12))
@settings(max_examples=100, deadline=None)
def test_is_the_largest_sum_above_the_threshold_midway_between_its_levels(values):
    x = scores(*values)
    found = best_segment(x, len(values) - 1)
    inside, outside = means(x, found.range) if found else (0.0, 0.0)
    if found is None or inside - outside < 1e-6:
        return
    above = x - (inside + outside) / 2

    def sum_of(layers: LayerRange) -> float:
        return float(above[layers.start : layers.end + 1].sum())

    n = len(values)
    others = [LayerRange(i, j) for i in range(n) for j in range(i, n) if j - i + 1 < n]
    assert sum_of(found.range) >= max(map(sum_of, others)) - 1e-6


def test_many_rows_at_once_are_the_rows_alone():
    rows = torch.randn(20, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[3] = 1.0
    expected = [found.range if (found := best_segment(row)) else None for row in rows]
    assert best_ranges(rows) == expected
    assert expected[3] is None
    assert len(set(expected)) > 5


def planted(n_rows: int, start: int, end: int, noise: float, n_layers: int = 30) -> Tensor:
    rows = noise * torch.randn(n_rows, n_layers, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rows[:, start : end + 1] += 1
    return rows


@pytest.mark.slow_cases
@pytest.mark.parametrize(("start", "end"), [(5, 10), (18, 23), (14, 16), (8, 21), (0, 4), (25, 29)])
def test_planted_segments_are_found_in_noise(start, end):
    """Mean IoU over 300 draws: nearly 1 where noise is a fifth of the step, still high at half of it (0.65 to 0.92)."""
    truth = LayerRange(start, end)

    def mean_iou(noise: float) -> float:
        found = best_ranges(planted(300, start, end, noise))
        return sum(layers.iou(truth) for layers in found if layers) / len(found)

    assert mean_iou(0.0) == 1.0
    assert mean_iou(0.2) > 0.98
    assert mean_iou(0.5) > 0.6
    assert mean_iou(20.0) < 0.4  # control: buried


@pytest.mark.slow
def test_what_is_explained_tells_a_segment_from_noise():
    def explained(rows: Tensor) -> Tensor:
        return torch.tensor([best_segment(row).explained for row in rows])

    assert explained(planted(100, 5, 10, 0.3)).quantile(0.05) > explained(planted(100, 5, 10, 100.0)).quantile(0.95)


def test_whole_model_and_empty_ranges_have_no_contrast():
    table = between_squares(scores(1, 2, 3)[None])[0]
    assert table[0, 2] == 0
    assert table[2, 0] == 0
    assert table[2, 2] == pytest.approx(1 * 2 / 3 * (3 - 1.5) ** 2)


@pytest.mark.parametrize(
    ("values", "width", "message"),
    [
        ([1.0], None, "expected 1 <= max_width < number of layers"),
        ([1.0, 2.0], 2, "ranges of at most 2"),
        ([1.0, 2.0], 0, "ranges of at most 0"),
        ([1.0, math.nan, 2.0], None, "not finite"),
        ([1.0, math.inf, 2.0], None, "not finite"),
    ],
)
def test_bad_input(values, width, message):
    with pytest.raises(ValueError, match=message):
        best_segment(scores(*values), width)
