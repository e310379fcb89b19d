"""The search returns the published ranges, where hill-climbing does not; alpha, grid and resampling by hand."""

import math
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from safety_mech import LayerRange, gap_curve, last_token_residuals
from safety_mech.locate import (
    MAX_ALPHA_STEPS,
    TARGET_SNR,
    TARGET_STD,
    AlphaChoice,
    Direction,
    SafetyLayers,
    choose_alpha,
    direction_of,
    grid_best,
    locate_by_scaling,
    progressive_search,
    resampled_search,
    signal_to_noise,
)
from safety_mech.overrejection import ScaledRanges
from safety_mech.refusal import REFUSAL_OPENINGS, openings_in_use, refusal_log_odds

Table = dict[tuple[int, int], int]
OPENINGS = ("I'm sorry", "Sorry")

PUBLISHED: dict[str, tuple[Direction, int, Table, LayerRange]] = {
    # METHOD 2: direction, layers of the model, R_o of 721 prompts by (start, end), the range of the paper
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


def test_the_models_limits_are_kept():
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
    with pytest.raises(ValueError, match="nan"):
        progressive_search(lambda r: math.nan if r.end == 6 else float(r.end), LayerRange(4, 6), n_layers=12)


# --- alpha -----------------------------------------------------------------------------------------------------------


def fake_cells(effect: Callable[[float, LayerRange], float], n_prompts: int = 40, noise: float = 0.1) -> Callable:
    """cells(alpha)(range) -> one value a prompt: a base of each prompt's own, the effect, and noise of every cell."""

    def cells(alpha: float) -> Callable[[LayerRange], Tensor]:
        def cell(layers: LayerRange) -> Tensor:
            generator = torch.Generator().manual_seed(1000 * layers.start + layers.end)
            base = torch.randn(n_prompts, generator=torch.Generator().manual_seed(1)) * 5
            return base + effect(alpha, layers) + noise * torch.randn(n_prompts, generator=generator)

        return cell

    return cells


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("steps", [1, 3, MAX_ALPHA_STEPS])
def test_alpha_is_the_first_that_moves_enough(above, steps):
    threshold = steps - 0.5

    def effect(alpha: float, layers: LayerRange) -> float:
        return layers.start * 10.0 if abs(alpha - 1) / 0.05 > threshold else 0.0

    choice = choose_alpha(fake_cells(effect), LayerRange(4, 8), above=above)
    assert choice.reached
    assert choice.alpha == round(1 + (0.05 if above else -0.05) * steps, 2)
    assert [alpha for alpha, _ in choice.tried] == [
        round(1 + (0.05 if above else -0.05) * k, 2) for k in range(1, steps + 1)
    ]
    assert choice.tried[-1][1] >= TARGET_SNR
    assert all(value < TARGET_SNR for _, value in choice.tried[:-1])
    assert choice.unit == "signal-to-noise ratio of the sweep"


@pytest.mark.parametrize(("above", "last"), [(True, 1.5), (False, 0.5)])
def test_alpha_that_is_never_reached(above, last):
    choice = choose_alpha(fake_cells(lambda alpha, layers: 0.0), LayerRange(4, 8), above=above)
    assert not choice.reached
    assert choice.alpha == last
    assert len(choice.tried) == MAX_ALPHA_STEPS


@pytest.mark.parametrize(
    ("refused", "reached"), [([1, 1, 1, 1, 1], False), ([0, 1, 2, 3, 4], False), ([0, 5, 9, 5, 0], True)]
)
def test_alpha_for_text_is_the_spread_of_rates(refused, reached):
    """Standard deviation of the five rates of 100 prompts, by hand: 0, 0.0158 and 0.0382; 0.025 is wanted."""

    def cells(alpha: float) -> Callable[[LayerRange], Tensor]:
        return lambda layers: torch.arange(100) < refused[layers.start - 2]

    choice = choose_alpha(cells, LayerRange(4, 8), above=True, text=True)
    mean = sum(refused) / 5
    by_hand = math.sqrt(sum((count - mean) ** 2 for count in refused) / 4) / 100
    assert choice.tried[0] == (1.05, pytest.approx(by_hand, abs=1e-12))
    assert choice.reached == reached == (by_hand >= TARGET_STD)
    assert choice.unit == "sd of the refusal rate over the sweep"


def test_alpha_looks_at_the_lower_sweep():
    asked = set()

    def cells(alpha: float) -> Callable[[LayerRange], Tensor]:
        return lambda layers: asked.add((alpha, layers)) or torch.full((3,), float(layers.start))

    choose_alpha(cells, LayerRange(4, 8), above=True, window=3)
    assert asked == {(1.05, LayerRange(start, 8)) for start in range(1, 8)}


def test_alpha_for_an_initial_range_of_the_first_layer_alone():
    choice = choose_alpha(fake_cells(lambda alpha, layers: 100.0 * layers.end), LayerRange(0, 0), above=True)
    assert all(math.isfinite(value) for _, value in choice.tried)


def test_signal_to_noise_by_hand():
    """Means 1 and 5: sd sqrt(8). Differences to the prompts' means are -1, -3 and 1, 3: sd sqrt(2), error 1."""
    assert signal_to_noise(torch.tensor([[0.0, 2.0], [2.0, 8.0]])) == pytest.approx(math.sqrt(8))


def test_what_prompts_have_in_common_over_ranges_is_no_noise():
    values = torch.randn(5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    of_prompts = 100 * torch.randn(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert signal_to_noise(values + of_prompts) == pytest.approx(signal_to_noise(values), rel=1e-9)
    assert signal_to_noise(values + torch.arange(5.0)[:, None]) > 3 * signal_to_noise(values)


def test_without_noise_the_ratio_is_large_and_finite():
    assert 1e9 < signal_to_noise(torch.tensor([[1.0, 1.0], [2.0, 2.0]])) < math.inf


@pytest.mark.parametrize(("alpha", "direction"), [(1.05, "max"), (1.5, "max"), (0.95, "min"), (0.5, "min")])
def test_direction_of_alpha(alpha, direction):
    assert direction_of(alpha) == direction


# --- resampling ------------------------------------------------------------------------------------------------------


def resample(cell: Callable[[LayerRange], Tensor], samples: int = 60, seed: int = 0, direction: str = "max") -> Counter:
    options = {"n_layers": 12, "window": 2, "direction": direction, "samples": samples, "seed": seed}
    return resampled_search(cell, LayerRange(4, 6), **options)


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


@pytest.mark.parametrize(
    ("direction", "max_width", "expected"),
    [
        ("max", None, LayerRange(0, 2)),
        ("max", 3, LayerRange(0, 2)),
        ("max", 2, LayerRange(1, 2)),
        ("max", 1, LayerRange(1, 1)),
        ("min", None, LayerRange(2, 2)),
        ("min", 1, LayerRange(2, 2)),
    ],
)
def test_the_best_of_the_grid_by_hand(direction, max_width, expected):
    assert grid_best(small_grid(), direction, max_width) == expected


def test_the_grid_sees_what_the_search_does_not():
    grid = torch.full((12, 12, 1), torch.nan)
    for start in range(12):
        for end in range(start, 12):
            grid[start, end] = 10.0 if (start, end) == (8, 11) else peak_at(2, 4)(LayerRange(start, end))
    found = progressive_search(lambda r: float(grid[r.start, r.end]), LayerRange(2, 5), n_layers=12)
    assert found.range == LayerRange(2, 4)
    assert grid_best(grid, "max") == LayerRange(8, 11)


# --- what locate gives back ------------------------------------------------------------------------------------------


def layers_found(samples: dict[tuple[int, int], int]) -> SafetyLayers:
    counted = Counter({LayerRange(*ends): count for ends, count in samples.items()})
    residuals = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    return SafetyLayers(
        range=LayerRange(2, 3),
        initial=LayerRange(2, 3),
        curve=gap_curve(residuals[0], residuals[1], bootstrap=100, permutations=100),
        alpha=AlphaChoice(1.2, True, (), "given"),
        sweeps=None,
        samples=counted,
        baseline=None,
        grid=None,
        best_of_grid=None,
        openings=(),
        refused=1.0,
        reason="found",
    )


def test_the_interval_is_of_starts_and_of_ends():
    found = layers_found({(2, 3): 90, (0, 9): 4, (5, 7): 6})
    assert found.interval(level=0.9) == ((2, 5), (3, 7))
    assert found.interval(level=0.5) == ((2, 2), (3, 3))
    assert found.interval(level=1.0) == ((0, 5), (3, 9))
    assert layers_found({(2, 3): 5}).interval() == ((2, 2), (3, 3))


def test_without_samples_there_is_no_interval():
    assert layers_found({}).interval() is None


def test_whether_the_search_found_the_best_of_the_grid():
    found = layers_found({})
    assert found.is_best_of_grid is None
    assert replace(found, best_of_grid=LayerRange(2, 3)).is_best_of_grid is True
    assert replace(found, best_of_grid=LayerRange(2, 4)).is_best_of_grid is False


# --- locate, on a tiny model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(refusing_model, prompts) -> Callable[..., SafetyLayers]:
    def locate_with(**options) -> SafetyLayers:
        settings = {"samples": 20, "window": 1, "initial": LayerRange(1, 2), "openings": OPENINGS, **options}
        return locate_by_scaling(refusing_model, prompts[:4], prompts[4:], prompts, **settings)

    return locate_with


def test_no_gap_is_a_result_with_a_reason(tiny_model, prompts):
    found = locate_by_scaling(tiny_model, prompts[::2], prompts[1::2], prompts)
    assert found.range is found.initial is found.alpha is found.sweeps is found.grid is None
    assert found.baseline is found.best_of_grid is found.is_best_of_grid is None
    assert found.reason == "no gap between malicious and normal prompts that the rule accepts"
    assert found.samples == Counter()
    assert found.interval() is None
    residuals = [last_token_residuals(tiny_model, part) for part in (prompts[::2], prompts[1::2])]
    assert torch.equal(found.curve.gap, gap_curve(*residuals).gap)


def test_a_given_alpha_and_range(run, refusing_model, prompts):
    found = run(alpha=1.5, whole_grid=True)
    ranges = ScaledRanges(refusing_model, prompts, 1.5, openings=OPENINGS)
    expected = progressive_search(
        lambda layers: float(ranges.log_odds(layers).mean()), LayerRange(1, 2), n_layers=4, window=1
    )
    assert found.range == expected.range
    assert found.sweeps == (expected.upper, expected.lower)
    assert found.alpha == AlphaChoice(1.5, True, (), "given")
    assert found.reason == "found"
    torch.testing.assert_close(
        found.baseline, refusal_log_odds(refusing_model, prompts, openings=OPENINGS), rtol=0, atol=1e-5
    )
    assert sum(found.samples.values()) == 20
    assert found.samples == run(alpha=1.5).samples
    assert found.grid is not None
    assert torch.equal(found.grid.nan_to_num(), ranges.grid().nan_to_num())
    assert found.best_of_grid == grid_best(ranges.grid(), "max", found.range.width)
    assert found.is_best_of_grid == (found.best_of_grid == found.range)


def test_openings_are_those_that_the_model_uses(run, refusing_model, prompts):
    assert run(alpha=1.2).openings == OPENINGS
    found = run(alpha=1.2, openings=None)
    assert found.openings == openings_in_use(refusing_model, prompts[4:]) != REFUSAL_OPENINGS
    assert run(alpha=0.3, openings=None, text=True).openings == REFUSAL_OPENINGS


def test_alpha_below_one_is_searched_for_the_lowest(run, refusing_model, prompts):
    found = run(alpha=0.5)
    lowest = min(zip(found.sweeps[1].values, found.sweeps[1].ranges, strict=True))
    assert found.range == lowest[1]
    ranges = ScaledRanges(refusing_model, prompts, 0.5, openings=OPENINGS)
    assert lowest[0] == float(ranges.log_odds(found.range).mean())


def test_alpha_is_chosen_and_kept(run):
    found = run(above=False)
    assert found.alpha is not None
    assert found.alpha.alpha == found.alpha.tried[-1][0] < 1
    assert (found.range is not None) == found.alpha.reached == (found.reason == "found")


def test_refusals_in_text_can_be_the_measure(run, refusing_model, prompts):
    found = run(text=True, alpha=0.3)
    assert found.baseline is not None
    assert found.baseline.tolist() == [0.0, 1.0] * 4
    ranges = ScaledRanges(refusing_model, prompts, 0.3)
    for sweep in found.sweeps:
        assert sweep.values == tuple(float(ranges.refuses(layers).double().mean()) for layers in sweep.ranges)


def test_the_grid_is_of_the_searchs_own_measure(run):
    found = run(text=True, alpha=0.3, whole_grid=True)
    assert set(found.grid.nan_to_num().unique().tolist()) <= {0.0, 1.0}


def test_nothing_beyond_noise_is_a_result_too(run, monkeypatch):
    module = sys.modules[locate_by_scaling.__module__]  # `safety_mech.locate` is the function
    monkeypatch.setattr(module, "TARGET_SNR", math.inf)
    monkeypatch.setattr(module, "MAX_ALPHA_STEPS", 2)
    found = run()
    assert found.range is None
    assert found.initial == LayerRange(1, 2)
    assert found.alpha is not None
    assert not found.alpha.reached
    assert found.reason == "scaling moves nothing beyond noise at any alpha tried"
    assert found.sweeps is not None


@pytest.mark.parametrize("text", [False, True])
def test_a_model_that_does_not_refuse_has_nothing_to_locate(run, refusing_model, prompts, text):
    """Scaling moves something in every model; the answer is kept beside the reason why it is none."""
    found = run(alpha=0.3, text=text)
    openings = found.openings
    share = float(refusal_log_odds(refusing_model, prompts[4:], openings=openings).sigmoid().mean())
    assert found.refused == pytest.approx(share)
    assert found.range is not None
    unaligned = run(alpha=0.3, text=text, least_refused=share + 0.01)
    assert unaligned.range is None
    assert unaligned.reason.startswith(f"the model refuses {share:.1%} of the malicious prompts")
    assert (unaligned.sweeps, unaligned.samples) == (found.sweeps, found.samples)
    assert run(alpha=0.3, text=text, least_refused=share - 0.01).range == found.range


def test_no_hook_and_no_other_weight_is_left(run, refusing_model):
    before = {name: parameter.clone() for name, parameter in refusing_model.named_parameters()}
    run(alpha=1.2, recipe="weights", text=True)
    assert not any(point.fwd_hooks for point in refusing_model.hook_dict.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in refusing_model.named_parameters())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"alpha": -1.0}, "alpha = -1.0"),
        ({"alpha": 1.2, "recipe": "atn"}, "recipe 'atn'"),
        ({"alpha": 1.2, "initial": LayerRange(3, 4)}, "the model has 4 layers"),
        ({"alpha": 1.2, "window": 0}, "window 0"),
    ],
)
def test_what_makes_no_sense_is_refused(run, options, expected):
    with pytest.raises(ValueError, match=expected):
        run(**options)
