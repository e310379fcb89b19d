"""The search returns the published ranges, where hill-climbing does not; grid and resampling by hand."""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from safety_mech import LayerRange
from safety_mech.localization.search import (
    Direction,
    NotFiniteError,
    grid_best,
    progressive_search,
    resampled_search,
)

Table = dict[tuple[int, int], int]

PUBLISHED: dict[str, tuple[Direction, int, Table, LayerRange]] = {
    # direction, layers of the model, R_o of 721 prompts by (start, end), the range of the paper
    "Phi-3, alpha 0.8": (
        "min",
        32,
        {(11, 13): 209, (11, 14): 190, (11, 15): 149, (11, 16): 181, (11, 17): 189}
        | {(13, 15): 237, (12, 15): 182, (10, 15): 177, (9, 15): 163},
        LayerRange(11, 15),
    ),
    "Phi-3, alpha 1.2": (
        "max",
        32,
        {(11, 13): 292, (11, 14): 329, (11, 15): 368, (11, 16): 311, (11, 17): 299}
        | {(9, 15): 330, (10, 15): 350, (12, 15): 293, (13, 15): 279},
        LayerRange(11, 15),
    ),
    "Llama-2, alpha 1.15": (
        "max",
        32,
        {(9, 12): 187, (9, 13): 227, (9, 14): 237, (9, 15): 218, (9, 16): 219}
        | {(8, 14): 263, (7, 14): 268, (6, 14): 297, (5, 14): 189, (4, 14): 202},
        LayerRange(6, 14),
    ),
    "Llama-3, alpha 1.2": (
        "max",
        32,
        {(7, 10): 272, (7, 11): 241, (7, 12): 283, (7, 13): 266, (7, 14): 256}
        | {(8, 12): 334, (6, 12): 371, (5, 12): 358, (4, 12): 223},
        LayerRange(6, 12),
    ),
    "gemma, alpha 1.1": (
        "max",
        18,
        {(8, 9): 310, (8, 10): 335, (8, 11): 368, (8, 12): 343, (8, 13): 326}
        | {(7, 11): 371, (6, 11): 407, (5, 11): 404, (4, 11): 323},
        LayerRange(6, 11),
    ),
}
"""Cells that the paper gives in both of its sweeps stand here once."""


def looked_up(table: Table, direction: str) -> Callable[[LayerRange], float]:
    """R_o from the table; a cell that the paper does not give is the worst."""
    worst = -math.inf if direction == "max" else math.inf
    return lambda layers: table.get((layers.start, layers.end), worst)


def upper_start(table: Table) -> int:
    """The start that the paper held in its upper sweep: that of most cells."""
    return max({start for start, _ in table}, key=lambda start: sum(s == start for s, _ in table))


STARTS = [
    (name, LayerRange(upper_start(table), end))
    for name, (_, _, table, _) in PUBLISHED.items()
    for start, end in table
    if start == upper_start(table)
]


@pytest.mark.parametrize("window", [2, 3, 4])
@pytest.mark.parametrize(("name", "initial"), STARTS, ids=str)
def test_the_published_range_is_found(name, initial, window):
    direction, n_layers, table, expected = PUBLISHED[name]
    measure = looked_up(table, direction)
    found = progressive_search(measure, initial, n_layers=n_layers, window=window, direction=direction)
    assert found.range == expected
    assert found.upper.best == LayerRange(initial.start, expected.end)
    assert found.lower.best == expected


def climb(value: Callable[[int], float], at: int) -> int:
    """The wrong way: go to the better neighbour while there is one."""
    while (best := max((at, at - 1, at + 1), key=value)) != at:
        at = best
    return at


def hill_climb(measure: Callable[[LayerRange], float], initial: LayerRange) -> LayerRange:
    end = climb(lambda end: measure(LayerRange(initial.start, end)), initial.end)
    return LayerRange(climb(lambda start: measure(LayerRange(start, end)), initial.start), end)


def test_hill_climbing_misses_the_published_range():
    """Control: the rows are not unimodal. Llama-3 from [7, 10]: [7, 11] is lower, [7, 12] the highest."""
    _, n_layers, table, expected = PUBLISHED["Llama-3, alpha 1.2"]
    measure = looked_up(table, "max")
    assert hill_climb(measure, LayerRange(7, 10)) == LayerRange(7, 10)
    assert progressive_search(measure, LayerRange(7, 10), n_layers=n_layers).range == expected
    assert hill_climb(measure, LayerRange(7, 14)) == expected  # from the other side there is no valley


def test_the_wrong_direction_misses_it_too():
    direction, n_layers, table, expected = PUBLISHED["Phi-3, alpha 0.8"]
    found = progressive_search(looked_up(table, direction), expected, n_layers=n_layers, direction="max")
    assert found.range != expected


# --- the search, on scripted measures --------------------------------------------------------------------------------


def peak_at(start: int, end: int) -> Callable[[LayerRange], float]:
    return lambda layers: -abs(layers.start - start) - abs(layers.end - end)


@pytest.mark.parametrize("direction", ["max", "min"])
@pytest.mark.parametrize("initial", [LayerRange(0, 0), LayerRange(0, 9), LayerRange(4, 5)], ids=str)
@pytest.mark.parametrize("goal", [(0, 9), (2, 5), (3, 4), (6, 9)], ids=str)
def test_a_single_peak_is_found_from_any_start_that_is_not_beyond_it(initial, direction, goal):
    sign = 1 if direction == "max" else -1
    peak = peak_at(*goal)
    found = progressive_search(lambda r: sign * peak(r), initial, n_layers=10, window=1, direction=direction)
    assert found.range == LayerRange(*goal)


def test_a_sweep_evaluates_its_whole_window_and_no_cell_twice():
    asked: list[LayerRange] = []

    def measure(layers: LayerRange) -> float:
        asked.append(layers)
        return peak_at(5, 8)(layers)

    found = progressive_search(measure, LayerRange(5, 8), n_layers=20, window=3)
    assert asked == [LayerRange(5, end) for end in range(5, 12)] + [LayerRange(start, 8) for start in range(2, 9)]
    assert found.upper.ranges == tuple(asked[:7])
    assert found.lower.ranges == tuple(asked[7:])
    assert found.upper.values == (-3.0, -2.0, -1.0, 0.0, -1.0, -2.0, -3.0)
    assert (found.upper.bound, found.lower.bound) == ("upper", "lower")


@pytest.mark.parametrize(
    ("goal", "window", "upper", "lower"),
    [
        ((5, 10), 2, range(6, 13), range(3, 8)),  # 6..10, its best is the edge 10: 11 and 12 are tried as well
        ((5, 12), 2, range(6, 15), range(3, 8)),
        ((5, 6), 2, range(5, 11), range(3, 7)),  # down to the start that is held, up to the end
        ((3, 8), 2, range(6, 11), range(1, 8)),
        ((0, 8), 2, range(6, 11), range(8)),  # down to layer 0
        ((5, 14), 4, range(4 + 1, 15), range(1, 10)),  # up to the last layer
    ],
)
def test_a_window_with_its_best_at_the_edge_is_widened(goal, window, upper, lower):
    found = progressive_search(peak_at(*goal), LayerRange(5, 8), n_layers=15, window=window)
    assert found.range == LayerRange(*goal)
    assert [layers.end for layers in found.upper.ranges] == list(upper)
    assert [layers.start for layers in found.lower.ranges] == list(lower)


def test_a_better_value_beyond_a_window_whose_best_is_inside_is_not_looked_for():
    """What the paper's search cannot see, `grid_best` can: a second peak across a valley wider than the window."""
    values = {8: 1.0, 12: 5.0}
    found = progressive_search(lambda r: values.get(r.end, 0.0), LayerRange(5, 8), n_layers=20, window=2)
    assert found.upper.best == LayerRange(5, 8)


def test_no_range_leaves_the_model():
    asked = []
    progressive_search(lambda r: asked.append(r) or 0.0, LayerRange(0, 3), n_layers=4, window=9)
    assert asked == [LayerRange(0, end) for end in range(4)] + [LayerRange(start, 3) for start in range(4)]


@pytest.mark.parametrize("direction", ["max", "min"])
def test_ties_go_to_the_range_that_was_held(direction):
    found = progressive_search(lambda r: 7.0, LayerRange(4, 6), n_layers=12, window=3, direction=direction)
    assert found.range == LayerRange(4, 6)
    assert len(found.upper.ranges) == 6  # ends 4..9: an edge that is no better is not gone beyond


def test_of_equal_bests_the_nearest():
    values = {5: 3.0, 7: 3.0, 9: 3.0}
    found = progressive_search(lambda r: values.get(r.end, 0.0), LayerRange(4, 8), n_layers=12, window=3)
    assert found.upper.best.end in (7, 9)
    far_and_near = {5: 3.0, 9: 3.0}
    found = progressive_search(lambda r: far_and_near.get(r.end, 0.0), LayerRange(4, 8), n_layers=12, window=3)
    assert found.upper.best.end == 9


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"window": 0}, "window 0: expected at least one layer to each side"),
        ({"window": -1}, "window -1"),
        ({"n_layers": 6}, r"layer range \[4, 6\]: the model has 6 layers"),
    ],
)
def test_a_search_that_makes_no_sense(options, expected):
    with pytest.raises(ValueError, match=expected):
        progressive_search(lambda r: 0.0, LayerRange(4, 6), **{"n_layers": 12, **options})


def test_an_unknown_direction():
    """In the tests the type checker is there before our own error."""
    with pytest.raises((ValueError, TypeCheckError), match=r"direction.*up"):
        progressive_search(lambda r: 0.0, LayerRange(4, 6), n_layers=12, direction="up")  # pyright: ignore


def test_a_measure_that_is_no_number_is_refused():
    with pytest.raises(NotFiniteError, match="nan"):
        progressive_search(lambda r: math.nan if r.end == 6 else float(r.end), LayerRange(4, 6), n_layers=12)


# --- resampling ------------------------------------------------------------------------------------------------------


def resample(
    cell: Callable[[LayerRange], Tensor], samples: int = 60, seed: int = 0, direction: Direction = "max"
) -> Counter:
    search = partial(progressive_search, initial=LayerRange(4, 6), n_layers=12, direction=direction)
    return resampled_search(search, cell, len(cell(LayerRange(4, 6))), samples=samples, seed=seed)


def divided(layers: LayerRange) -> Tensor:
    """Half of the prompts say [3, 6], the others [5, 8]."""
    votes = [peak_at(3, 6)(layers), peak_at(5, 8)(layers)]
    return torch.tensor(votes * 5) + 0.01 * torch.arange(10)


def test_samples_are_counted_and_seeded():
    first, again, other = resample(divided), resample(divided), resample(divided, seed=1)
    assert sum(first.values()) == sum(other.values()) == 60
    assert first == again
    assert len(first) > 1
    assert first != other


def test_prompts_that_agree_leave_no_doubt():
    assert resample(lambda layers: torch.full((10,), float(peak_at(3, 7)(layers)))) == Counter({LayerRange(3, 7): 60})
    lowest = resample(lambda layers: -torch.full((10,), float(peak_at(3, 7)(layers))), direction="min")
    assert lowest == Counter({LayerRange(3, 7): 60})


def test_refusals_are_resampled_as_numbers():
    def cell(layers: LayerRange) -> Tensor:
        return torch.arange(20) < 20 + 2 * peak_at(4, 6)(layers)

    assert resample(cell) == Counter({LayerRange(4, 6): 60})


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    resample(divided)
    assert torch.equal(torch.get_rng_state(), before)


# --- the grid --------------------------------------------------------------------------------------------------------


def small_grid() -> Tensor:
    """Means over two prompts: [0,0] 1, [0,1] 5, [0,2] 9, [1,1] 2, [1,2] 6, [2,2] -3; below the diagonal NaN."""
    means = torch.tensor([[1.0, 5.0, 9.0], [math.nan, 2.0, 6.0], [math.nan, math.nan, -3.0]], dtype=torch.float64)
    return torch.stack([means - 4, means + 4], dim=-1)


@pytest.mark.parametrize(("direction", "expected"), [("max", LayerRange(0, 2)), ("min", LayerRange(2, 2))])
def test_the_best_of_the_grid_by_hand(direction, expected):
    assert grid_best(small_grid(), direction) == expected


def test_the_grid_sees_what_the_search_does_not():
    grid = torch.full((12, 12, 1), torch.nan)
    for start in range(12):
        for end in range(start, 12):
            grid[start, end] = 10.0 if (start, end) == (8, 11) else peak_at(2, 4)(LayerRange(start, end))
    found = progressive_search(lambda r: float(grid[r.start, r.end]), LayerRange(2, 5), n_layers=12)
    assert found.range == LayerRange(2, 4)
    assert grid_best(grid, "max") == LayerRange(8, 11)


def test_a_cell_that_is_not_a_number_is_not_the_best():
    grid = small_grid()
    grid[0, 2] = math.nan
    assert grid_best(grid, "max") == LayerRange(1, 2)
    grid[2, 2] = math.nan
    assert grid_best(grid, "min") == LayerRange(0, 0)


def test_a_grid_without_any_number_has_no_best():
    assert grid_best(torch.full((3, 3, 2), math.nan), "max") is None


@pytest.mark.slow
def test_clusters_are_resampled_as_a_whole():
    """Six prompts in two clusters, which disagree: a sample is one cluster, the other, or both halves."""
    votes = [peak_at(3, 6), peak_at(5, 8)]

    def cell(layers: LayerRange) -> Tensor:
        return torch.tensor([votes[number // 3](layers) for number in range(6)])

    search = partial(progressive_search, initial=LayerRange(4, 6), n_layers=12)
    alone = resampled_search(search, cell, 6)
    together = resampled_search(search, cell, 6, clusters=list("aaabbb"))
    # one cluster alone is drawn in half of the samples; three prompts of six alone in (1/2)^6 * 2
    assert 75 <= together[LayerRange(3, 6)] + together[LayerRange(5, 8)] <= 125
    assert alone != together
