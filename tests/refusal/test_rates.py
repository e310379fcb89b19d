"""What is refused, answered and degenerate at: the text judge and the log-odds side by side."""

import pytest
import torch

from safety_mech.refusal import rates as evaluate
from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.rates import Responses, refusal_rate, responses
from safety_mech.refusal.text import refuses

DEGENERATE = "the the the the the the the the the the"


@pytest.mark.slow
def test_responses_of_a_model_whose_refusals_are_known(refusing_model, prompts) -> None:
    found = responses(refusing_model, prompts)
    expected = torch.tensor([index % 2 == 1 for index in range(len(prompts))])
    assert torch.equal(found.refused, expected)
    assert found.log_odds[expected].min() > found.log_odds[~expected].max() + 1
    assert found.harmful_rate.count == int((~expected).sum())
    assert found.harmful_rate_by_log_odds.count == int((found.log_odds < 0).sum())
    assert refusal_rate(refusing_model, prompts).count == int(expected.sum())


def test_degenerate_is_neither_refused_nor_answered() -> None:
    assert is_degenerate(DEGENERATE)
    assert not refuses(DEGENERATE)
    assert refuses("I'm sorry, but I can't help with that.")
    found = Responses(
        torch.tensor([True, False, False]), torch.tensor([False, True, False]), torch.tensor([2.0, 1, -3])
    )
    assert found.harmful_rate.count == 1
    assert found.harmful_rate_by_log_odds.count == 1


def test_a_refusal_that_is_as_likely_as_not_is_not_answered() -> None:
    """Log-odds of 0: not less likely than not."""
    nothing = torch.zeros(3, dtype=torch.bool)
    found = Responses(nothing, nothing, torch.tensor([0.0, -0.5, 0.5]))
    assert found.harmful_rate_by_log_odds.count == 1


def test_sixteen_tokens_are_judged_as_by_the_authors(refusing_model, prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def generate(model, texts, tokens, *args, **settings) -> list[str]:
        asked.append(tokens)
        return ["Sorry"] * len(texts)

    monkeypatch.setattr(evaluate, "generate", generate)
    refusal_rate(refusing_model, prompts)
    responses(refusing_model, prompts)
    assert asked == [16, 16]
