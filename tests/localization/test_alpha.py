"""The curve over alpha: spread with noise taken off, sign flips, and the two rules; all by hand or by simulation."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from safety_mech import LayerRange
from safety_mech.localization.alpha import (
    ALPHAS_ABOVE,
    ALPHAS_BELOW,
    PAPER_SPREAD,
    AlphaPoint,
    choose_alpha,
    measure_alpha,
    spread_between,
    spread_p_value,
)
from safety_mech.localization.search import progressive_search


def rand(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_alphas_are_the_papers_steps():
    assert ALPHAS_ABOVE == (1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35, 1.4, 1.45, 1.5)
    assert ALPHAS_BELOW == (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)


# --- spread -----------------------------------------------------------------------------------------------------------


def test_spread_by_hand():
    """Ranges' values [0.1, 0.3] and [0.5, 0.9]: differences to the prompts' means -+0.2 and -+0.3, so m = -+0.25.
    Variance of m over two prompts: 2 * var(0.2, 0.3) / 4 = 0.0025. spread^2 = 2 * (0.0625 - 0.0025) / 1."""
    values = torch.tensor([[0.1, 0.3], [0.5, 0.9]], dtype=torch.float64)
    assert spread_between(values) == pytest.approx(math.sqrt(0.12))


def test_without_noise_the_spread_is_the_standard_deviation():
    values = torch.tensor([0.2, 0.5, 0.6]).double()[:, None] + rand(0, 40)
    assert spread_between(values) == pytest.approx(float(torch.tensor([0.2, 0.5, 0.6]).double().std()), rel=1e-9)


def test_noise_alone_leaves_no_spread_on_average():
    """The square is unbiased before it is cut at 0: here the mean over 300 draws of the uncut one, by its parts."""
    plain, left = [], []
    for seed in range(300):
        values = rand(seed, 5, 30)
        plain.append(float(values.mean(1).var()))
        left.append(spread_between(values) ** 2)
    assert sum(plain) / 300 == pytest.approx(1 / 30, rel=0.1)
    assert sum(left) / 300 < 0.4 / 30


def test_known_spread_is_recovered_under_noise():
    truth = torch.tensor([0.0, 0.1, 0.4, 0.1, 0.0]).double()
    squares = [spread_between(truth[:, None] + rand(seed, 5, 50)) ** 2 for seed in range(300)]
    assert sum(squares) / 300 == pytest.approx(float(truth.var()), rel=0.2)


def test_what_prompts_have_in_common_over_ranges_is_no_noise():
    values, of_prompts = rand(0, 5, 30), 100 * rand(1, 30)
    assert spread_between(values + of_prompts) == pytest.approx(spread_between(values), abs=1e-9)


def test_prompts_of_one_cluster_are_not_independent():
    """Ten copies of three prompts say no more than the three."""
    three = rand(3, 4, 3)
    copied = three.repeat(1, 10)
    words = ["a", "b", "c"] * 10
    assert spread_between(copied, words) == pytest.approx(spread_between(three), abs=1e-12)
    assert spread_between(copied) > spread_between(three) + 0.05


def test_a_single_range_has_no_spread_and_a_single_cluster_no_noise_to_take_off():
    assert spread_between(rand(0, 1, 5)) == 0.0
    assert math.isnan(spread_between(rand(0, 3, 5), ["word"] * 5))


# --- is it noise? -----------------------------------------------------------------------------------------------------


def autocorrelated(seed: int) -> Tensor:
    """No effect of the range on average; neighbouring ranges of a prompt go together, as overlapping ranges do."""
    return rand(seed, 9, 24).cumsum(0)


@pytest.mark.parametrize("noise", [lambda seed: rand(seed, 6, 24), autocorrelated], ids=["independent", "neighbours"])
def test_noise_alone_is_rarely_called_a_spread(noise: Callable[[int], Tensor]):
    p_values = [spread_p_value(noise(seed), flips=400, seed=seed) for seed in range(200)]
    assert sum(p <= 0.05 for p in p_values) <= 20  # 10 expected, standard deviation 3.1


def test_an_effect_that_prompts_share_is_found():
    values = torch.tensor([0.0, 0.3, 0.6, 0.3]).double()[:, None] + 0.3 * rand(0, 24)
    assert spread_p_value(values + 0.2 * rand(1, 4, 24)) < 0.001


def test_two_flips_among_24_prompts_are_noise():
    """The reason for the test: 2 of 24 is a rate of 8 %, far above the paper's 2.5 %, and says nothing."""
    refused = torch.zeros(5, 24)
    refused[2, :2] = 1
    assert float(refused.double().mean(1).std()) > PAPER_SPREAD
    assert spread_p_value(refused) > 0.2


def test_clusters_flip_together():
    refused = torch.zeros(3, 24)
    refused[1, :12] = 1
    assert spread_p_value(refused) < 0.001
    assert spread_p_value(refused, ["kill"] * 12 + list(range(12))) == pytest.approx(1.0)


def test_nothing_that_moves_is_not_significant():
    assert spread_p_value(torch.full((4, 10), 0.3)) == 1.0
    assert spread_p_value(rand(0, 1, 10)) == 1.0


# --- one point of the curve -------------------------------------------------------------------------------------------


def cell_of(rates: dict[tuple[int, int], float], n_prompts: int = 40) -> Callable[[LayerRange], Tensor]:
    return lambda layers: torch.full((n_prompts,), rates.get((layers.start, layers.end), 0.0), dtype=torch.float64)


def search_from(initial: LayerRange, n_layers: int = 6):
    return partial(progressive_search, initial=initial, n_layers=n_layers, window=1)


def test_a_point_is_the_search_and_what_it_saw():
    rates = {(2, 3): 0.1, (2, 4): 0.5, (1, 4): 0.7, (0, 4): 0.2}
    found = measure_alpha(1.2, cell_of(rates), lambda layers: 0.25, search_from(LayerRange(2, 3)))
    assert (found.alpha, found.range, found.rate, found.degenerate) == (1.2, LayerRange(1, 4), 0.7, 0.25)
    # upper sweep: ends 2..5 (5, for the best is at the edge); lower: starts 0..3 at the end found, 4
    looked_at = torch.tensor([0.0, 0.1, 0.5, 0.0, 0.2, 0.7, 0.0]).double()
    assert found.spread == pytest.approx(float(looked_at.std()))
    assert found.lower_spread == pytest.approx(float(torch.tensor([0.2, 0.7, 0.5, 0.0]).double().std()))


def test_one_layer_at_the_start_is_not_nothing_by_construction():
    """From [0, 0] the lower sweep has a single range; the spread is that of all ranges looked at."""
    found = measure_alpha(1.2, cell_of({(0, 0): 0.6, (0, 1): 0.1}), lambda layers: 0.0, search_from(LayerRange(0, 0)))
    assert found.range == LayerRange(0, 0)
    assert found.spread == pytest.approx(float(torch.tensor([0.6, 0.1]).double().std()))
    assert found.lower_spread == pytest.approx(found.spread)
    noisy = measure_alpha(
        1.2,
        lambda layers: (0.6 if layers == LayerRange(0, 0) else 0.1) + 0.05 * rand(layers.end, 40),
        lambda layers: 0.0,
        search_from(LayerRange(0, 0)),
    )
    assert noisy.p_value < 0.001


def test_logits_that_are_not_finite_are_a_point_too():
    found = measure_alpha(
        1.5, lambda layers: torch.full((3,), math.nan), lambda layers: 0.0, search_from(LayerRange(1, 2))
    )
    assert found.range is None
    assert (found.p_value, found.degenerate) == (1.0, 1.0)


# --- the rules --------------------------------------------------------------------------------------------------------


SOME = LayerRange(2, 4)


def point_at(alpha: float, layers: LayerRange | None = SOME, **values: float) -> AlphaPoint:
    defaults = {"rate": 0.5, "spread": 0.1, "p_value": 0.01, "lower_spread": 0.1, "degenerate": 0.0}
    return AlphaPoint(alpha, layers, **{**defaults, **values})


def test_auto_takes_the_greatest_spread_that_is_not_degenerate():
    points = [
        point_at(1.05, spread=0.1),
        point_at(1.1, spread=0.3, degenerate=0.049),
        point_at(1.15, spread=0.4, degenerate=0.05),  # under 5 %, not at it
        point_at(1.2, spread=0.2),
    ]
    choice = choose_alpha(points, "auto")
    assert (choice.alpha, choice.rule, choice.reached) == (1.1, "auto", True)
    assert choice.point is points[1]
    assert choice.points == tuple(points)


def test_the_papers_rule_takes_the_first_that_reaches_it():
    points = [point_at(a, lower_spread=s) for a, s in ((1.05, PAPER_SPREAD - 1e-9), (1.1, PAPER_SPREAD), (1.15, 0.4))]
    assert choose_alpha(points, "paper").alpha == 1.1
    assert choose_alpha(points, "auto").alpha != 1.1


def test_where_no_alpha_will_do():
    never = choose_alpha([point_at(1.05, lower_spread=0.0), point_at(1.1, lower_spread=0.01)], "paper")
    assert (never.alpha, never.reached) == (1.1, False)
    degenerate = choose_alpha([point_at(1.05, degenerate=0.5), point_at(1.1, degenerate=0.2)], "auto")
    assert (degenerate.alpha, degenerate.reached) == (1.1, False)
    nowhere = choose_alpha([point_at(1.05, None, degenerate=1.0)], "auto")
    assert (nowhere.reached, nowhere.agreement) == (False, None)
    with pytest.raises(ValueError, match="no alphas"):
        choose_alpha([], "auto")


def test_agreement_is_with_the_neighbours_alone():
    ranges = [LayerRange(0, 0), LayerRange(2, 3), LayerRange(2, 5), LayerRange(4, 5), LayerRange(9, 9)]
    points = [point_at(1 + k / 10, layers, spread=0.5 if k == 2 else 0.1) for k, layers in enumerate(ranges)]
    assert choose_alpha(points, "auto").agreement == pytest.approx((0.5 + 0.5) / 2)
    edge = [point_at(1.05, LayerRange(2, 3), spread=0.9), point_at(1.1, LayerRange(2, 5)), point_at(1.15)]
    assert choose_alpha(edge, "auto").agreement == 0.5


def test_a_given_alpha_has_no_neighbours():
    choice = choose_alpha([point_at(1.3)], None)
    assert (choice.alpha, choice.rule, choice.reached, choice.agreement) == (1.3, "given", True, None)
    assert not choose_alpha([point_at(1.3, None)], None).reached
