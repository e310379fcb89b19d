"""Refusal attribution: the slope of the log-odds, checked against the log-odds themselves, token by token."""

import functools
from collections.abc import Callable

import pytest
import torch
from jaxtyping import Float
from tiny import GPT2_STYLE, build_tiny_model
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech import encode_chat, refusal_log_odds
from safety_mech.models.chat import Template, tokenizer_of
from safety_mech.refusal import attribution
from safety_mech.refusal.attribution import refusal_attribution, replacement_effects

PROMPT = "Why help?"
PHRASES = ("I'm sorry", "I can't", "No")
"""Three chains; the default phrases, which are many more, in test_tokens_question_and_log_odds."""
SHORT = Template("Say: ", "\nA:")
STEP = 1e-5
STYLES = {"rotary": {}, "gpt2": GPT2_STYLE}


@functools.cache
def exact(style: str = "rotary") -> HookedTransformer:
    """In float64: a difference quotient is then good to eight places. Shared; every test leaves it as it is."""
    return build_tiny_model(seed=3, n_layers=2, dtype=torch.float64, **STYLES[style]).to(torch.float64)


def moved(token: int, step: float, centre: Tensor) -> Callable[..., Tensor]:
    """Token `token`'s embedding, and no other, moved away from the centre by a share `step` of its distance."""

    def move(embedding: Float[Tensor, "prompt pos d_model"], hook: object) -> Tensor:
        new = embedding.clone()
        new[:, token] += step * (embedding[:, token] - centre)
        return new

    return move


def log_odds(model: HookedTransformer, template: str | Template = SHORT) -> Tensor:
    return refusal_log_odds(model, [PROMPT], template, PHRASES)[0]


def length_of(model: HookedTransformer, template: str | Template = SHORT) -> int:
    (chat,) = encode_chat(tokenizer_of(model), [PROMPT], template)
    return len(chat)


def difference_quotients(model: HookedTransformer, centre: Tensor, template: str | Template = SHORT) -> Tensor:
    rows = []
    for token in range(length_of(model, template)):
        sides = []
        for step in (STEP, -STEP):
            with model.hooks(fwd_hooks=[("hook_embed", moved(token, step, centre))]):
                sides.append(float(log_odds(model, template)))
        rows.append((sides[0] - sides[1]) / (2 * STEP))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("style", "template"), [("rotary", "own"), ("gpt2", SHORT)], ids=["rotary-own", "gpt2-short"])
def test_it_is_the_slope_of_the_log_odds(style: str, template: str | Template) -> None:
    model = exact(style)
    found = refusal_attribution(model, PROMPT, template, PHRASES).values
    expected = difference_quotients(model, model.embed.W_E.mean(0), template)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert float(expected.abs().max()) > 0.01, "else everything would agree"
    assert not torch.allclose(found.roll(1), expected, rtol=1e-2), "control: values belong to their own tokens"


@pytest.mark.slow
def test_a_baseline_of_zeros_is_gradient_times_embedding() -> None:
    model = exact()
    zeros = torch.zeros(model.cfg.d_model, dtype=torch.float64)
    found = refusal_attribution(model, PROMPT, SHORT, PHRASES, baseline=zeros)
    torch.testing.assert_close(found.values, difference_quotients(model, zeros), rtol=1e-6, atol=1e-8)
    default = refusal_attribution(model, PROMPT, SHORT, PHRASES)
    assert not torch.allclose(found.values, default.values, atol=1e-3), "the baseline matters"


def test_tokens_question_and_log_odds() -> None:
    model = exact()
    found = refusal_attribution(model, f"  {PROMPT} ")
    (chat,) = encode_chat(tokenizer_of(model), [PROMPT])
    assert "".join(found.tokens) == tokenizer_of(model).decode(chat.tokens)
    assert "".join(found.tokens[pos] for pos in found.question).strip() == PROMPT
    assert found.log_odds == pytest.approx(float(refusal_log_odds(model, [PROMPT])[0]), abs=1e-12)


def test_the_model_is_left_as_it_was() -> None:
    model = exact()
    before = log_odds(model)
    refusal_attribution(model, PROMPT, SHORT, PHRASES)
    assert torch.equal(log_odds(model), before)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_it_works_where_gradients_are_off() -> None:
    model = exact()
    with torch.no_grad():
        inside = refusal_attribution(model, PROMPT, SHORT, PHRASES)
    assert torch.equal(inside.values, refusal_attribution(model, PROMPT, SHORT, PHRASES).values)


def test_too_long_a_prompt_is_refused(tiny_model: HookedTransformer) -> None:
    with pytest.raises(ValueError, match="the context holds 128"):
        refusal_attribution(tiny_model, "why " * 200)


@functools.cache
def effects_one_by_one(style: str) -> tuple[float, tuple[float, ...]]:
    """The log-odds, and what they lose: `moved` by a whole step towards the centre is the replacement."""
    model = exact(style)
    centre, whole = model.embed.W_E.mean(0), float(log_odds(model))
    lost = []
    for token in range(length_of(model)):
        with model.hooks(fwd_hooks=[("hook_embed", moved(token, -1.0, centre))]):
            lost.append(whole - float(log_odds(model)))
    return whole, tuple(lost)


@pytest.mark.slow_cases
@pytest.mark.parametrize(("style", "rows"), [("rotary", 1), ("rotary", 100), ("gpt2", 5)])
def test_effects_are_those_of_each_token_replaced_alone(style: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of every size."""
    model = exact(style)
    monkeypatch.setattr(attribution, "DEFAULT_BATCH_TOKENS", rows * length_of(model))
    whole, expected = effects_one_by_one(style)
    found = replacement_effects(model, PROMPT, SHORT, PHRASES)
    torch.testing.assert_close(found.values, torch.tensor(expected).double(), rtol=0, atol=1e-6)
    assert found.log_odds == pytest.approx(whole, abs=1e-12)
    assert not torch.allclose(found.values, found.values.roll(1), atol=0.01), "the order of tokens matters"


def test_effects_near_the_baseline_are_slopes() -> None:
    """With a baseline close to one token's embedding, its effect is its slope; the two functions agree in sign."""
    model = exact()
    (chat,) = encode_chat(tokenizer_of(model), [PROMPT], SHORT)
    token = chat.question[2]
    embedding = model.embed.W_E[chat.tokens[token]]
    near = embedding + 1e-5 * torch.ones_like(embedding)
    slope, effect = (
        f(model, PROMPT, SHORT, PHRASES, baseline=near).values[token]
        for f in (refusal_attribution, replacement_effects)
    )
    torch.testing.assert_close(slope, effect, rtol=1e-3, atol=0)
    assert float(slope.abs()) > 1e-8
