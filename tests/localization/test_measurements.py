"""What is measured once for several locators, by whom it is shared, and what it is measured with."""

from dataclasses import replace

import pytest
import torch
from tiny import PROMPTS
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.localization import measurements
from safety_mech.localization.locators import LOCATORS
from safety_mech.localization.measurements import Located, Measurements, PromptSets, attempt
from safety_mech.localization.patching import equal_length_pairs, patch_pairs
from safety_mech.refusal.log_odds import phrases_in_use

PAIRS = [sm.PromptPair("XYZ", "ZZY", "y"), sm.PromptPair("ZYX", "XXX", "y"), sm.PromptPair("XYZ", "XYZX", "z")]
SETS = PromptSets(PROMPTS[0::2], PROMPTS[1::2], pairs=PAIRS)


@pytest.mark.slow
def test_every_measurement_is_the_plain_one(refusing_model: HookedTransformer) -> None:
    found = Measurements(refusing_model, replace(SETS, seed=3))
    normal, malicious = (sm.last_token_residuals(refusing_model, texts) for texts in (SETS.normal, SETS.malicious))
    assert torch.equal(found.residuals[0], normal)
    assert torch.equal(found.residuals[1], malicious)
    assert torch.equal(found.curve.low, sm.gap_curve(normal, malicious, seed=3).low)
    assert found.phrases == phrases_in_use(refusing_model, SETS.malicious)
    assert Measurements(refusing_model, replace(SETS, phrases=("Sorry",))).phrases == ("Sorry",)
    assert found.pairs == equal_length_pairs(refusing_model, PAIRS) == PAIRS[:2]
    for what, positions in (("layer", "last"), ("resid", "answer")):
        expected = patch_pairs(refusing_model, PAIRS[:2], phrases=found.phrases, what=what, positions=positions)
        assert torch.equal(found.patched(what, positions).effect, expected.effect)


@pytest.mark.slow
def test_locators_share_measurements_and_a_plain_call_measures_anew(
    refusing_model: HookedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(*args, **settings):
        calls.append(settings["what"])
        return patch_pairs(*args, **settings)

    monkeypatch.setattr(measurements, "patch_pairs", counted)
    measured = Measurements(refusing_model, SETS)
    shared = [attempt(LOCATORS[name], measured)[0] for name in ("decision", "decision_window", "patching")]
    assert calls == ["resid", "layer"]
    alone = LOCATORS["decision"](refusing_model, SETS)
    assert calls == ["resid", "layer", "resid"], "control: other measurements share nothing"
    assert shared[0] is not None
    assert torch.equal(alone.scores, shared[0].scores)


def test_a_plain_function_is_a_locator(refusing_model: HookedTransformer) -> None:
    def locate_by_name(model: HookedTransformer, prompts: PromptSets) -> Located:
        assert model is refusing_model
        return Located("name", sm.LayerRange(1, 2), torch.zeros(4).double(), detail=prompts.normal[0])

    found, detail = attempt(locate_by_name, Measurements(refusing_model, SETS))
    assert found is not None
    assert (found.range, detail) == (sm.LayerRange(1, 2), PROMPTS[0])


def test_an_attempt_that_cannot_be_made_says_why(refusing_model: HookedTransformer) -> None:
    few = Measurements(refusing_model, replace(SETS, pairs=PAIRS[1:]))
    assert attempt(LOCATORS["patching"], few) == (
        None,
        "patching: 1 contrastive pairs of equal token length: expected at least 2",
    )
