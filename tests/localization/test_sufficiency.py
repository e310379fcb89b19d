"""Minimal sufficient ranges of models of which we know what was put into them."""

import json
import math

import pytest
import torch
from tiny import PROMPTS, build_tiny_model
from transformer_lens import HookedTransformer

from safety_mech import LayerRange, refusal_log_odds
from safety_mech.interventions.weight_swap import swapped
from safety_mech.localization import sufficiency
from safety_mech.localization.slopes import margin
from safety_mech.localization.sufficiency import Transplants, swap_losses, transplant

PHRASES = ("I'm sorry", "I can't")
MALICIOUS, NORMAL = PROMPTS[:4], PROMPTS[4:]


def built(*others: int) -> HookedTransformer:
    """The base, with these layers of another model."""
    model, other = (build_tiny_model(seed, dtype=torch.float64).to(torch.float64) for seed in (0, 1))
    for layer in others:
        model.blocks[layer].load_state_dict(other.blocks[layer].state_dict())
    return model


def margin_of(model: HookedTransformer) -> float:
    return float(margin(*(refusal_log_odds(model, texts, phrases=PHRASES) for texts in (MALICIOUS, NORMAL))))


@pytest.mark.slow
def test_shares_are_those_of_models_put_together():
    base, model = built(), built(1, 2, 4)
    sign = 1 if margin_of(model) > margin_of(base) else -1  # random models: either set may be "malicious"
    sets = (MALICIOUS, NORMAL)[::sign]
    found = transplant(model, base, LayerRange(1, 4), *sets, phrases=PHRASES)
    gained = margin_of(model) - margin_of(base)
    assert found.gained == pytest.approx(sign * gained)
    for start in range(6):
        for end in range(6):
            if not 1 <= start <= end <= 4:
                assert math.isnan(found.shares[start, end])
                continue
            part = built(*(layer for layer in (1, 2, 4) if start <= layer <= end))
            expected = (margin_of(part) - margin_of(base)) / gained
            assert float(found.shares[start, end]) == pytest.approx(expected, abs=1e-6)
    assert float(found.shares[3, 3]) == pytest.approx(0, abs=1e-6), "control: layer 3 is the base's"
    assert float(found.shares[1, 4]) == pytest.approx(1)
    whole = refusal_log_odds(model, sets[0], phrases=PHRASES)
    assert float(found.refused[1, 4]) == float((whole > 0).double().mean())
    assert margin_of(base) == margin_of(built())
    again = Transplants.from_plain(json.loads(json.dumps(found.to_plain())))
    assert torch.equal(again.shares.nan_to_num(9), found.shares.nan_to_num(9))
    assert torch.equal(again.refused.nan_to_num(9), found.refused.nan_to_num(9))
    assert again.gained == found.gained


def test_shares_and_refusals_by_hand(tiny_model, monkeypatch):
    """Malicious prompts at -1 nats, normal ones at -3: a margin of 2. With any range 1 more, and 2 of 3 are refused."""

    class Ranges:
        def __init__(self, model, texts, *args, **settings):
            self.unchanged, self.changed = {
                "malicious": ([-1.0, -1.0, -1.0], [1.0, -2.0, 1.0]),
                "normal": ([-3.0, -3.0], [-2.0, -4.0]),
            }[texts[0]]

        def log_odds(self, part):
            return torch.tensor(self.unchanged if part is None else self.changed, dtype=torch.float64)

    monkeypatch.setattr(sufficiency, "ScaledRanges", Ranges)
    found = transplant(tiny_model, tiny_model, LayerRange(2, 3), ["malicious"], ["normal"])
    assert found.gained == 1.0
    measured = {(start, end) for start, end in (~found.shares.isnan()).nonzero().tolist()}
    assert measured == {(2, 2), (2, 3), (3, 3)}
    assert {float(found.shares[cell]) for cell in measured} == {1.0}
    assert {float(found.refused[cell]) for cell in measured} == {2 / 3}


def test_the_minimal_range_is_the_narrowest_with_enough():
    shares = torch.full((4, 4), torch.nan, dtype=torch.float64)
    for (start, end), share in {(0, 0): 0.1, (1, 1): 0.5, (2, 2): 0.3, (0, 1): 0.6, (1, 2): 0.85, (0, 2): 1.0}.items():
        shares[start, end] = share
    found = Transplants(shares, shares, 3.0)
    assert found.minimal_sufficient_range() == LayerRange(1, 2)
    assert found.minimal_sufficient_range(0.9) == LayerRange(0, 2)
    assert found.minimal_sufficient_range(0.4) == LayerRange(1, 1)
    assert found.minimal_sufficient_range(1.1) is None
    assert found.best_single == (1, 0.5)


@pytest.mark.parametrize("best", [0, 2, 3])
def test_of_equally_narrow_ranges_it_is_that_with_the_greatest_share(best):
    shares = torch.full((4, 4), torch.nan, dtype=torch.float64)
    for layer, share in zip((0, 2, 3), (0.85, 0.9, 0.95), strict=True):
        shares[layer, layer] = share
    shares[best, best] = 0.99
    shares[0, 3] = 1.2  # wider, with more
    found = Transplants(shares, shares, 3.0)
    assert found.minimal_sufficient_range() == LayerRange(best, best)
    assert found.minimal_sufficient_range(0.99) == LayerRange(best, best), "the share itself is enough"
    assert found.minimal_sufficient_range(0.995) == LayerRange(0, 3)


@pytest.mark.slow
def test_a_model_that_was_not_aligned():
    with pytest.raises(ValueError, match=r"the margin is \+0.00 nats above the base's: expected a model"):
        transplant(built(), built(), LayerRange(1, 2), MALICIOUS, NORMAL, phrases=PHRASES)


def test_swap_losses_equal_full_forward_passes():
    base, model = built(), built(2, 3)
    found = swap_losses(model, base, PROMPTS[2:6], phrases=PHRASES)
    plain = refusal_log_odds(model, PROMPTS[2:6], phrases=PHRASES)
    for layer in range(6):
        with swapped(model, base, LayerRange(layer, layer)):
            expected = plain - refusal_log_odds(model, PROMPTS[2:6], phrases=PHRASES)
        torch.testing.assert_close(found[:, layer], expected, rtol=0, atol=1e-9)
    assert found[:, [0, 1, 4, 5]].abs().max() == 0  # not even run
    assert found[:, [2, 3]].abs().min() > 1e-3  # control
