"""What `locate` gives back, and when it says that there is nothing to find."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from safety_mech import LayerRange, gap_curve, last_token_residuals
from safety_mech.localization import range_sweep, safety_layers
from safety_mech.localization.alpha import ALPHAS_ABOVE, ALPHAS_BELOW, AlphaChoice, AlphaPoint
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.localization.safety_layers import (
    MAX_P,
    SafetyLayers,
    _alphas,
    direction_of,
    locate_by_scaling,
)
from safety_mech.localization.search import grid_best, progressive_search
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, phrases_in_use, refusal_log_odds
from safety_mech.refusal.text import refuses
from safety_mech.stats import Estimate

PHRASES = ("I'm sorry", "Sorry")


def point_at(alpha: float, **changes: object) -> AlphaPoint:
    """A point of the curve over alpha with a clear effect."""
    values = {"range": LayerRange(2, 3), "rate": 0.7, "spread": 0.2, "p_value": 0.001}
    return AlphaPoint(**{"alpha": alpha, **values, "lower_spread": 0.2, "degenerate": 0.0, **changes})


GIVEN = AlphaChoice(1.2, "given", True, (point_at(1.2),), None)

# --- what locate gives back ------------------------------------------------------------------------------------------


def layers_found(samples: dict[tuple[int, int], int]) -> SafetyLayers:
    counted = Counter({LayerRange(*ends): count for ends, count in samples.items()})
    residuals = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    return SafetyLayers(
        range=LayerRange(2, 3),
        initial=LayerRange(2, 3),
        curve=gap_curve(residuals[0], residuals[1], bootstrap=100, permutations=100),
        alpha=GIVEN,
        sweeps=None,
        samples=counted,
        baseline=None,
        effect=None,
        grid=None,
        phrases=(),
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
    grid = torch.zeros(5, 5, 1)
    grid[2, 3] = 0.5
    assert replace(found, grid=grid).is_best_of_grid is True
    grid[2, 4] = 0.6
    assert replace(found, grid=grid).is_best_of_grid is False


# --- alpha ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "direction"), [(1.05, "max"), (1.5, "max"), (0.95, "min"), (0.5, "min")])
def test_direction_of_alpha(alpha, direction):
    assert direction_of(alpha) == direction


@pytest.mark.parametrize("alpha", [1.0, 0.0, -1.2, math.inf, math.nan, "authors"])
def test_an_alpha_that_cannot_be_searched_at(alpha):
    with pytest.raises(ValueError, match="alpha"):
        _alphas(alpha, above=True)


@pytest.mark.parametrize("alpha", ["auto", "paper", 1.2, 0.3])
def test_an_alpha_that_can(alpha):
    rule, alphas = _alphas(alpha, above=True)
    assert (rule, alphas) == ((alpha, ALPHAS_ABOVE) if isinstance(alpha, str) else (None, (alpha,)))


# --- locate, on a tiny model -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(refusing_model, prompts) -> Callable[..., SafetyLayers]:
    """On the refusing model, whose odd prompts are refused; one cluster of prompts each."""

    def locate_with(**options) -> SafetyLayers:
        settings = {"samples": 20, "window": 1, "initial": LayerRange(1, 2), "phrases": PHRASES, **options}
        return locate_by_scaling(refusing_model, prompts[:4], prompts[4:], prompts, **settings)

    return locate_with


@pytest.mark.slow
def test_no_gap_is_a_result_with_a_reason(tiny_model, prompts):
    found = locate_by_scaling(tiny_model, prompts[::2], prompts[1::2], prompts)
    assert found.range is found.initial is found.alpha is found.sweeps is found.grid is found.effect is None
    assert found.baseline is found.best_of_grid is found.is_best_of_grid is None
    assert found.reason == "no gap between malicious and normal prompts that the rule accepts"
    assert found.samples == Counter()
    assert found.interval() is None
    residuals = [last_token_residuals(tiny_model, part) for part in (prompts[::2], prompts[1::2])]
    assert torch.equal(found.curve.gap, gap_curve(*residuals).gap)


@pytest.mark.slow
def test_a_given_alpha_and_range(run, refusing_model, prompts):
    found = run(alpha=0.3, whole_grid=True)
    ranges = ScaledRanges(refusing_model, prompts, 0.3, phrases=PHRASES)
    expected = progressive_search(
        lambda layers: float(ranges.probability(layers).mean()),
        LayerRange(1, 2),
        n_layers=4,
        window=1,
        direction="min",
    )
    assert found.sweeps == (expected.upper, expected.lower)
    assert (found.alpha.alpha, found.alpha.rule) == (0.3, "given")
    assert found.alpha.point.range == expected.range
    assert found.alpha.point.rate == pytest.approx(float(ranges.probability(expected.range).mean()), abs=1e-12)
    unscaled = refusal_log_odds(refusing_model, prompts, phrases=PHRASES).sigmoid()
    torch.testing.assert_close(found.baseline, unscaled, rtol=0, atol=1e-6)
    change = ranges.probability(expected.range) - ranges.probability(None)
    assert found.effect.value == pytest.approx(float(change.mean()), abs=1e-9)
    assert sum(found.samples.values()) == 20
    assert found.samples == run(alpha=0.3).samples
    assert found.grid is not None
    assert torch.equal(found.grid.nan_to_num(), ranges.grid().nan_to_num())
    assert found.best_of_grid == grid_best(ranges.grid(), "min")
    assert found.is_best_of_grid == (found.best_of_grid == found.range)


@pytest.mark.slow
def test_the_best_of_the_grid_is_of_any_width(run):
    """It was limited to the width found, and called the best of all."""
    found = run(alpha=0.3, whole_grid=True)
    lowest = min((float(found.grid[start, end].mean()), start, end) for start in range(4) for end in range(start, 4))
    assert found.best_of_grid == LayerRange(*lowest[1:])


@pytest.mark.slow
def test_phrases_are_those_that_the_model_uses(run, refusing_model, prompts):
    assert run(alpha=1.2).phrases == PHRASES
    found = run(alpha=1.2, phrases=None)
    assert found.phrases == phrases_in_use(refusing_model, prompts[4:]) != REFUSAL_PHRASES


@pytest.mark.slow
def test_alpha_below_one_is_searched_for_the_lowest(run, refusing_model, prompts):
    found = run(alpha=0.5)
    lowest = min(zip(found.sweeps[1].values, found.sweeps[1].ranges, strict=True))
    assert found.alpha.point.range == lowest[1]


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "above"), [("auto", True), ("paper", False)])
def test_a_rule_measures_the_whole_curve(run, above, rule):
    found = run(alpha=rule, above=above)
    assert tuple(point.alpha for point in found.alpha.points) == (ALPHAS_ABOVE if above else ALPHAS_BELOW)
    assert found.alpha.rule == rule
    at_that_alpha = run(alpha=found.alpha.alpha)
    assert at_that_alpha.sweeps == found.sweeps
    assert at_that_alpha.alpha.point == found.alpha.point
    assert at_that_alpha.effect == found.effect


@pytest.mark.slow
def test_refusals_in_text_can_be_the_measure(run, refusing_model, prompts):
    found = run(text=True, alpha=0.3)
    assert found.baseline is not None
    assert found.baseline.tolist() == [0.0, 1.0] * 4
    ranges = ScaledRanges(refusing_model, prompts, 0.3)
    for sweep in found.sweeps:
        assert sweep.values == tuple(float(ranges.refuses(layers).double().mean()) for layers in sweep.ranges)


@pytest.mark.slow
def test_a_text_is_judged_once_however_often_prompts_are_resampled(run, monkeypatch):
    judged = []
    monkeypatch.setattr(range_sweep, "refuses", lambda text: judged.append(text) or refuses(text))

    def count(samples: int) -> int:
        judged.clear()
        run(text=True, alpha=0.3, samples=samples)
        return len(judged)

    assert count(2) == count(40) > 0


@pytest.mark.slow
def test_the_grid_is_of_the_searchs_own_measure(run):
    found = run(text=True, alpha=0.3, whole_grid=True)
    assert set(found.grid.nan_to_num().unique().tolist()) <= {0.0, 1.0}
    share = run(alpha=0.3, whole_grid=True).grid.nan_to_num()
    assert float(share.min()) >= 0
    assert float(share.max()) <= 1


# --- when there is nothing to find ------------------------------------------------------------------------------------


def scaled_to(monkeypatch, rates: dict[LayerRange, float], unscaled: float, n_prompts: int = 40) -> None:
    """Refusals are what the table says, with a little noise of every prompt's own."""

    def probability(self, layers: LayerRange | None) -> Tensor:
        rate = unscaled if layers is None else rates.get(layers, unscaled)
        seed = 0 if layers is None else 1 + 10 * layers.start + layers.end  # hash(None) differs from process to process
        noise = torch.randn(n_prompts, generator=torch.Generator().manual_seed(seed))
        return (rate + 0.02 * noise).double()

    monkeypatch.setattr(ScaledRanges, "probability", probability)
    monkeypatch.setattr(ScaledRanges, "answers", lambda self, layers, whole=False: ["Sure, here is how."] * n_prompts)


def test_an_effect_to_be_seen_is_found(run, monkeypatch):
    scaled_to(monkeypatch, {LayerRange(1, 3): 0.6, LayerRange(1, 2): 0.4}, 0.2)
    found = run(alpha=1.2, least_refused=0.0)
    assert found.range == LayerRange(1, 3)
    assert found.reason == "found"
    assert found.effect.value == pytest.approx(0.4, abs=0.03)


@pytest.mark.slow
def test_a_significant_effect_that_nobody_sees_is_none(run, monkeypatch):
    scaled_to(monkeypatch, {LayerRange(1, 3): 0.26, LayerRange(1, 2): 0.23}, 0.2)
    found = run(alpha=1.2, least_refused=0.0)
    assert found.alpha.point.p_value <= MAX_P
    assert found.range is None
    assert "changes refusals by +6" in found.reason
    assert run(alpha=1.2, least_refused=0.0, least_effect=0.02).range == LayerRange(1, 3)


def test_how_sure_and_how_large_an_effect_must_be(run, monkeypatch):
    scaled_to(monkeypatch, {LayerRange(1, 3): 0.6, LayerRange(1, 2): 0.4}, 0.2)
    choice = run(alpha=1.2, least_refused=0.0).alpha

    def is_answer(value: float, low: float, p_value: float) -> bool:
        points = (replace(choice.point, p_value=p_value),)
        effect = Estimate(value, low, 0.5)
        return safety_layers._nothing_found(1.0, 0.1, replace(choice, points=points), effect, 0.25) is None

    assert is_answer(0.25, 0.01, MAX_P), "all three just enough"
    assert not is_answer(0.24, 0.01, MAX_P)
    assert not is_answer(0.25, 0.0, MAX_P)
    assert not is_answer(0.25, 0.01, 0.011)


def test_an_effect_in_the_wrong_direction_is_none(run, monkeypatch):
    """Above 1 the search takes the greatest rate; here every range lowers it."""
    lower = {LayerRange(start, end): 0.1 * start for start in range(4) for end in range(start, 4)}
    scaled_to(monkeypatch, lower, 0.9)
    found = run(alpha=1.2, least_refused=0.0)
    assert found.range is None
    assert "changes refusals by -" in found.reason


def test_noise_is_no_answer_also_at_a_given_alpha(run, monkeypatch):
    scaled_to(monkeypatch, {}, 0.5)
    found = run(alpha=1.2, least_refused=0.0)
    assert found.range is None
    assert "do not differ beyond noise at alpha 1.2" in found.reason
    assert found.sweeps is not None


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [1.0001, 0.9999])
def test_next_to_one_nothing_is_located(run, alpha):
    """Signal to noise of log-odds is the same there as at 1.05; refusals are not."""
    found = run(alpha=alpha, least_refused=0.0)
    assert found.range is None


def test_alpha_of_one_is_refused(run):
    with pytest.raises(ValueError, match="alpha = 1 changes nothing"):
        run(alpha=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "above", "recipe"), [(False, True, "weights"), (True, False, "attn_out")])
def test_a_random_model_has_nothing_to_locate_at_any_alpha(make_tiny_model, prompts, text, above, recipe):
    model = make_tiny_model(n_layers=3)
    found = locate_by_scaling(
        model,
        prompts[:4],
        prompts[4:],
        prompts[:3],
        initial=LayerRange(1, 2),
        window=1,
        samples=5,
        text=text,
        above=above,
        recipe=recipe,
        phrases=PHRASES,
        least_refused=0.0,
    )
    assert found.range is None
    assert len(found.alpha.points) == 10
    assert found.reason != "found"


def test_from_the_first_layer_alone(run, monkeypatch):
    scaled_to(monkeypatch, {LayerRange(0, 0): 0.7}, 0.2)
    found = run(alpha=1.2, initial=LayerRange(0, 0), least_refused=0.0)
    assert found.range == LayerRange(0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True])
def test_a_model_that_does_not_refuse_has_nothing_to_locate(run, refusing_model, prompts, text):
    """Scaling moves something in every model; the answer stands beside the reason why it is none."""
    found = run(alpha=0.3, text=text, least_refused=0.0)
    phrases = found.phrases
    share = float(refusal_log_odds(refusing_model, prompts[4:], phrases=phrases).sigmoid().mean())
    assert found.refused == pytest.approx(share)
    unaligned = run(alpha=0.3, text=text, least_refused=share + 0.01)
    assert unaligned.range is None
    assert unaligned.reason.startswith(f"the model refuses {share:.1%} of the malicious prompts")
    assert (unaligned.sweeps, unaligned.samples) == (found.sweeps, found.samples)
    assert run(alpha=0.3, text=text, least_refused=share - 0.01).range == found.range


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("refused", "options", "found"),
    [(0.5, {"least_refused": 0.5}, True), (0.5, {"least_refused": 0.51}, False), (0.12, {}, True), (0.05, {}, False)],
)
def test_how_much_has_to_be_refused(run, monkeypatch, refused, options, found):
    """Just enough is enough; by default a tenth of the malicious prompts."""
    scaled_to(monkeypatch, {LayerRange(1, 3): 0.6, LayerRange(1, 2): 0.4}, 0.2)
    log_odds = torch.full((4,), refused, dtype=torch.float64).logit()
    monkeypatch.setattr(safety_layers, "refusal_log_odds", lambda *args, **settings: log_odds)
    assert (run(alpha=1.2, **options).range is not None) == found


@pytest.mark.slow
def test_no_hook_and_no_other_weight_is_left(run, refusing_model):
    before = {name: parameter.clone() for name, parameter in refusing_model.named_parameters()}
    run(alpha=1.2, recipe="weights", text=True)
    assert not any(point.fwd_hooks for point in refusing_model.hook_dict.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in refusing_model.named_parameters())


@pytest.mark.slow_cases
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
