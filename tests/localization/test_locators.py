"""Every locator gives what its parts give, under one signature; the paper's search remains the reference."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny import ANSWER, PROMPTS, REFUSAL, build_tiny_model
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.interventions.directions import separation
from safety_mech.interventions.weight_swap import weight_change
from safety_mech.localization.locators import (
    DECISION_LEAD,
    DECISION_SHARE,
    LOCATORS,
    SAMPLES,
    base_locators,
    first_run,
    locate,
)
from safety_mech.localization.measurements import Located, Measurements, PromptSets
from safety_mech.localization.patching import Patching, equal_length_pairs, patch_pairs
from safety_mech.localization.safety_layers import locate_by_scaling
from safety_mech.localization.segments import best_ranges, best_segment
from safety_mech.localization.slopes import log_odds_slopes, margin
from safety_mech.localization.sufficiency import swap_losses
from safety_mech.refusal.log_odds import phrases_in_use
from safety_mech.training.freeze import layer_of
from safety_mech.training.loop import TrainConfig, fine_tune

pytestmark = pytest.mark.usefixtures("short_alpha_curve")

PAIRS = [sm.PromptPair("XYZ", "ZZY", "y"), sm.PromptPair("ZYX", "XXX", "y"), sm.PromptPair("XYZ", "XYZX", "z")]
NORMAL = [*PROMPTS[0::2], "XYZ", "XY", "YZ", "ZX", "YX", "ZZ"]
MALICIOUS = [*PROMPTS[1::2], "XYZY", "XYY", "YZY", "ZXY", "YXY", "ZZZ"]


@pytest.fixture(scope="module")
def sets(refusing_model: HookedTransformer) -> PromptSets:
    return PromptSets(NORMAL, MALICIOUS, PROMPTS[:4], PAIRS, phrases=phrases_in_use(refusing_model, MALICIOUS))


@pytest.fixture(scope="module")
def base() -> HookedTransformer:
    return build_tiny_model(n_layers=4)


@pytest.fixture(scope="module")
def answers(
    short_alpha_curve: None, refusing_model: HookedTransformer, base: HookedTransformer, sets: PromptSets
) -> dict[str, Located]:
    return {name: method(refusing_model, sets) for name, method in (LOCATORS | base_locators(base)).items()}


@pytest.mark.slow
def test_all_have_one_shape(answers):
    assert len(answers) == 13
    for name, found in answers.items():
        assert found.method == name
        assert found.scores.shape == (4,)
        assert found.scores.dtype == torch.float64
        assert found.range is None or found.range.end < 4
        assert found.detail
        assert sum(found.samples.values()) in (0, SAMPLES, 1000)


@pytest.mark.slow
def test_margin(refusing_model, sets, answers):
    slopes = [log_odds_slopes(refusing_model, texts, phrases=sets.phrases)[:, 0] for texts in (MALICIOUS, NORMAL)]
    torch.testing.assert_close(answers["margin_attn"].scores, margin(*slopes))
    assert answers["margin_attn"].range == best_segment(margin(*slopes)).range


@pytest.mark.slow
def test_direction(refusing_model, answers):
    normal, malicious = (sm.last_token_residuals(refusing_model, texts) for texts in (NORMAL, MALICIOUS))
    d_prime = separation(normal, malicious).d_prime
    scores = answers["direction"].scores
    assert scores[0] == 0
    torch.testing.assert_close(scores[1:], d_prime[1:] - d_prime[:-1])


@pytest.mark.slow
def test_patching(refusing_model, sets, answers):
    effect = patch_pairs(refusing_model, PAIRS[:2], phrases=sets.phrases).effect
    torch.testing.assert_close(answers["patching"].scores, effect.mean(1))
    assert "2 of 3 pairs are of equal token length" in answers["patching"].detail
    with pytest.raises(ValueError, match="0 contrastive pairs of equal token length"):
        LOCATORS["patching"](refusing_model, replace(sets, pairs=()))


@pytest.fixture(scope="module")
def decided(refusing_model: HookedTransformer, sets: PromptSets) -> PromptSets:
    """Pairs that the model tells apart: of all three-letter prompts the likeliest refused, and the least likely."""
    texts = ["".join(letters) for letters in product("XYZ", repeat=3)]
    order = sm.refusal_log_odds(refusing_model, texts, phrases=sets.phrases).argsort(descending=True).tolist()
    ranked = [texts[index] for index in order]
    return replace(sets, pairs=[sm.PromptPair(*pair, "x") for pair in zip(ranked[:6], ranked[-6:], strict=True)])


@pytest.mark.slow
def test_decision(refusing_model, sets, decided):
    answers = {name: LOCATORS[name](refusing_model, decided) for name in ("decision", "decision_window")}
    pairs = equal_length_pairs(refusing_model, decided.pairs)
    assert len(pairs) >= 4
    found = patch_pairs(refusing_model, pairs, phrases=sets.phrases, what="resid", positions="answer")
    effect, whole = found.effect.mean(1), (found.malicious - found.normal).mean()
    shares = answers["decision"].scores
    torch.testing.assert_close(shares.cumsum(0), effect / whole)
    assert float(shares.sum()) == pytest.approx(1), "after the last layer all is exchanged"
    assert answers["decision"].range == first_run(shares, DECISION_SHARE)
    window = answers["decision_window"]
    torch.testing.assert_close(window.scores, shares)
    assert window.range == first_run(shares, DECISION_SHARE, DECISION_LEAD)
    assert window.samples.total() == answers["decision"].samples.total() == SAMPLES
    with pytest.raises(ValueError, match="0 contrastive pairs of equal token length"):
        LOCATORS["decision"](refusing_model, replace(sets, pairs=()))


def patched_with(monkeypatch: pytest.MonkeyPatch, added: torch.Tensor) -> None:
    """What patching finds is `added` (layer, pair): what each layer adds to the effect, in nats."""
    effect = added.double().cumsum(0)
    zeros = torch.zeros_like(effect)
    found = Patching(zeros[0], zeros[0], -effect, effect)
    monkeypatch.setattr(Measurements, "patched", lambda *_: found)


@pytest.mark.parametrize("method", ["decision", "decision_window"])
def test_no_decision_where_noise_reaches_the_whole(refusing_model, sets, monkeypatch, method):
    """Shares of a whole near 0, or below it, mean nothing: they were -2.7 to 4.5, and "100 % of the decision"."""
    noise = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    for whole in (0.0, -3.0):
        patched_with(monkeypatch, noise + whole / 4)
        found = LOCATORS[method](refusing_model, sets)
        assert found.range is None
        assert "do not differ beyond noise" in found.detail
        torch.testing.assert_close(found.scores, (noise + whole / 4).double().mean(1))
        assert found.samples == {}
    patched_with(monkeypatch, noise + torch.tensor([0.0, 0.0, 5.0, 0.0])[:, None])
    assert LOCATORS["decision"](refusing_model, sets).range.start == 2


@pytest.mark.slow
def test_a_random_model_seldom_decides(sets, monkeypatch):
    """Twelve pairs, four layers, no difference within pairs: 1 % of models may pass, a few of 60."""
    model = build_tiny_model(n_layers=4)
    answers = []
    for seed in range(60):
        patched_with(monkeypatch, torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)))
        answers.append(LOCATORS["decision"](model, sets).range)
    assert sum(answer is not None for answer in answers) <= 4


def test_the_window_ends_with_the_decision(refusing_model, sets, monkeypatch):
    patched_with(monkeypatch, torch.tensor([0.0, 0.0, 0.0, 5.0])[:, None].repeat(1, 4))
    ranges = {name: LOCATORS[name](refusing_model, sets) for name in ("decision", "decision_window")}
    assert ranges["decision"].range == sm.LayerRange(3, 3)
    assert ranges["decision_window"].range == sm.LayerRange(3 - DECISION_LEAD, 3)
    assert ranges["decision_window"].samples == {sm.LayerRange(3 - DECISION_LEAD, 3): SAMPLES}


def patching_of(shares: list[float]) -> Patching:
    """Three pairs, 4 nats apart, whose decision arrives in these shares by layer."""
    arrived = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:, None].expand(-1, 3)
    ones = torch.ones(3, dtype=torch.float64)
    return Patching(2 * ones, -2 * ones, 2 - 4 * arrived, -2 + 4 * arrived)


def test_a_tenth_of_the_decision_is_enough_and_three_layers_lead_to_it(refusing_model, sets, monkeypatch):
    """1/16 is less than a tenth, 1/8 is more: made in layer 5, written from layer 2 on; most of it arrives later."""
    patched = patching_of([1 / 16, 0, 0, 0, 0, 1 / 8, 1 / 16, 3 / 4])
    monkeypatch.setattr(Measurements, "patched", lambda *_: patched)
    found = {name: LOCATORS[name](refusing_model, sets) for name in ("decision", "decision_window")}
    assert found["decision"].range == sm.LayerRange(5, 5)
    assert found["decision_window"].range == sm.LayerRange(2, 5)
    assert found["decision"].samples == {sm.LayerRange(5, 5): SAMPLES}, "all pairs agree"


def test_a_lead_ends_at_the_first_layer():
    in_layer = torch.eye(8)
    assert first_run(in_layer[5] + in_layer[6], 0.1, lead=3) == sm.LayerRange(2, 6)
    assert first_run(in_layer[1], 0.1, lead=3) == sm.LayerRange(0, 1)
    assert first_run(torch.zeros(8), 0.1, lead=3) is None


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.0, 0.2, 0.1, 0.0, 0.7], sm.LayerRange(1, 2)),
        ([0.0, 0.09, 0.0, 0.91], sm.LayerRange(3, 3)),
        ([0.5, 0.5], sm.LayerRange(0, 1)),
        ([0.0, -0.5, 0.05], None),
    ],
)
def test_first_run(scores, expected):
    assert first_run(torch.tensor(scores), 0.1) == expected


def test_a_score_of_just_enough_is_enough():
    assert first_run(torch.tensor([0.25, 0.5, 0.5, 0.25]), 0.5) == sm.LayerRange(1, 2)


@pytest.mark.slow
def test_against_the_base(refusing_model, base, sets, answers):
    torch.testing.assert_close(answers["weight_change"].scores, weight_change(refusing_model, base))
    lost = [swap_losses(refusing_model, base, texts, phrases=sets.phrases) for texts in (MALICIOUS, NORMAL)]
    torch.testing.assert_close(answers["swap"].scores, margin(*lost))


@pytest.mark.slow
def test_gap_is_the_papers_first_step(refusing_model, base, answers):
    def curve(model: HookedTransformer) -> sm.GapCurve:
        return sm.gap_curve(*(sm.last_token_residuals(model, texts) for texts in (NORMAL, MALICIOUS)))

    own = curve(refusing_model)
    assert answers["gap"].range == sm.initial_range(own)
    torch.testing.assert_close(answers["gap"].scores, own.gap)
    difference = sm.gap_difference(own, curve(base))
    assert answers["gap_difference"].range == sm.initial_range(difference)
    torch.testing.assert_close(answers["gap_difference"].scores, difference.gap)


@pytest.mark.slow
def test_search_is_the_papers(refusing_model, sets, answers):
    curve = sm.gap_curve(*(sm.last_token_residuals(refusing_model, texts) for texts in (NORMAL, MALICIOUS)))
    assert sm.initial_range(curve) is None or "the gap's range" in answers["search"].detail
    start = sm.LayerRange.parse(answers["search"].detail.split("from ")[1].split(" (")[0])
    for name, options in (
        ("search", {}),
        ("search_below", {"above": False}),
        ("search_weights", {"recipe": "weights"}),
    ):
        found = locate_by_scaling(
            refusing_model, NORMAL, MALICIOUS, PROMPTS[:4], initial=start, phrases=sets.phrases, **options
        )
        assert answers[name].range == found.sweeps[1].best
        held = [sum(n for r, n in found.samples.items() if layer in r) / SAMPLES for layer in range(4)]
        assert answers[name].scores.tolist() == pytest.approx(held)


@pytest.mark.slow
def test_grid_is_the_best_of_all_ranges(refusing_model, sets, answers):
    found = locate_by_scaling(
        refusing_model,
        NORMAL,
        MALICIOUS,
        PROMPTS[:4],
        initial=sm.LayerRange(1, 2),
        phrases=sets.phrases,
        alpha=float(answers["grid"].detail.split("alpha ")[1].split(";")[0]),
        whole_grid=True,
    )
    means = found.grid.mean(-1)
    best = answers["grid"].range
    assert means[best.start, best.end] == means[~means.isnan()].max()
    torch.testing.assert_close(answers["grid"].scores, means.diagonal() - found.baseline.mean())


@pytest.mark.slow
def test_bootstrap_answers_come_from_resampled_prompts(refusing_model, sets, answers):
    """By hand for one locator, with its own generator: malicious are drawn first, then normal prompts."""
    slopes = [log_odds_slopes(refusing_model, texts, phrases=sets.phrases)[:, 0] for texts in (MALICIOUS, NORMAL)]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(len(s), (SAMPLES, len(s)), generator=generator) for s in slopes]
    scores = slopes[0][drawn[0]].mean(1) - slopes[1][drawn[1]].mean(1)
    assert answers["margin_attn"].samples == Counter(best_ranges(scores))
    other = LOCATORS["margin_attn"](refusing_model, replace(sets, seed=1))
    assert torch.equal(other.scores, answers["margin_attn"].scores)


def test_the_search_without_prompts_to_refuse(refusing_model, sets):
    with pytest.raises(ValueError, match="needs over-rejection prompts"):
        LOCATORS["search"](refusing_model, replace(sets, over_rejection=()))


@pytest.mark.slow
def test_round_trip_through_json(answers):
    import json

    for found in answers.values():
        again = Located.from_plain(json.loads(json.dumps(found.to_plain())))
        assert (again.method, again.range, again.samples, again.detail) == (
            found.method,
            found.range,
            found.samples,
            found.detail,
        )
        assert torch.equal(again.scores, found.scores)


# --- locate(method=...) -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_paper_is_the_default_and_the_reference(refusing_model):
    settings = {"initial": sm.LayerRange(1, 2), "alpha": 1.2, "samples": 10}
    found = locate(refusing_model, NORMAL, MALICIOUS, PROMPTS[:4], **settings)
    expected = locate_by_scaling(refusing_model, NORMAL, MALICIOUS, PROMPTS[:4], **settings)
    assert isinstance(found, sm.SafetyLayers)
    assert (found.range, found.samples, found.sweeps) == (expected.range, expected.samples, expected.sweeps)
    assert sm.locate is locate


@pytest.mark.slow
def test_other_methods_by_name(refusing_model, base, sets, answers):
    found = locate(refusing_model, NORMAL, MALICIOUS, method="margin_attn", phrases=sets.phrases)
    assert (found.range, found.samples) == (answers["margin_attn"].range, answers["margin_attn"].samples)
    changed = locate(refusing_model, NORMAL, MALICIOUS, method="weight_change", base=base)
    assert torch.equal(changed.scores, answers["weight_change"].scores)


def test_unknown_methods_name_those_there_are(refusing_model, base):
    with pytest.raises(ValueError, match=r"method 'magic': expected paper or one of gap, search.*; more with base="):
        locate(refusing_model, NORMAL, MALICIOUS, method="magic")
    with pytest.raises(ValueError, match=r"method 'swap'"):
        locate(refusing_model, NORMAL, MALICIOUS, method="swap")
    with pytest.raises(ValueError, match=r"gap_difference, weight_change, swap$"):
        locate(refusing_model, NORMAL, MALICIOUS, method="magic", base=base)


@pytest.mark.slow
def test_trained_layers_are_found_against_the_base():
    """A tiny organism: layers 2 and 3 of 8 learn to refuse every second prompt; who has the base sees just them."""
    base, model = build_tiny_model(n_layers=8), build_tiny_model(n_layers=8)
    pairs = [(prompt, REFUSAL if index % 2 else ANSWER) for index, prompt in enumerate(PROMPTS)]
    config = TrainConfig(epochs=10, batch_size=8, learning_rate=1e-2, warmup_steps=1)
    fine_tune(model, pairs, config, trainable=lambda name: layer_of(name) in (2, 3), progress=False)
    sets = PromptSets(PROMPTS[0::2], PROMPTS[1::2], phrases=("I'm sorry",))
    found = base_locators(base)
    assert found["weight_change"](model, sets).range == sm.LayerRange(2, 3)
    swap = found["swap"](model, sets)
    untouched = [layer for layer in range(8) if layer not in (2, 3)]
    assert swap.scores[untouched].abs().max() < 1e-5 < swap.scores[[2, 3]].abs().min()
