"""Slopes of the refusal log-odds by each layer's scale, against finite differences in float64."""

import pytest
import torch
from tiny import GPT2_STYLE, PROMPTS, build_tiny_model
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech import LayerRange, refusal_log_odds
from safety_mech.interventions.scaling import Recipe, scaled
from safety_mech.localization.slopes import PARTS, log_odds_slopes, margin

PHRASES = ("I'm sorry", "I can't", "Sorry")
SOME = PROMPTS[2:6]  # two of equal length among them


@pytest.fixture(scope="module")
def exact_model() -> HookedTransformer:
    """In float64, so that 1e-6 is a claim about the code."""
    return build_tiny_model(seed=3, n_layers=4, dtype=torch.float64).to(torch.float64)


def central_difference(model: HookedTransformer, layers: LayerRange, recipe, step: float = 1e-5, **options) -> Tensor:
    """The oracle: `scaled` a little up and a little down, full forward passes, prompt by prompt."""
    ends = []
    for alpha in (1 + step, 1 - step):
        with scaled(model, layers, alpha, recipe):
            ends.append(torch.cat([refusal_log_odds(model, [p], phrases=PHRASES, **options) for p in SOME]))
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize(
    "style",
    [
        {},
        pytest.param(GPT2_STYLE, marks=pytest.mark.slow),
        pytest.param({"output_logits_soft_cap": 2.0}, marks=pytest.mark.slow),
    ],
    ids=["rotary", "gpt-2", "cap"],
)
def test_slopes_equal_finite_differences(style):
    model = build_tiny_model(seed=3, n_layers=3, dtype=torch.float64, **style).to(torch.float64)
    found = log_odds_slopes(model, SOME, phrases=PHRASES)
    assert found.shape == (len(SOME), 2, 3)
    assert found.dtype == torch.float64
    for index, part in enumerate(PARTS):
        for layer in range(3):
            expected = central_difference(model, LayerRange(layer, layer), part)
            torch.testing.assert_close(found[:, index, layer], expected, rtol=1e-5, atol=1e-6)


def test_slopes_differ_between_layers_parts_and_prompts(exact_model):
    """Control: no two of those compared above are nearly equal."""
    flat = log_odds_slopes(exact_model, SOME, phrases=PHRASES).flatten()
    distances = (flat[:, None] - flat[None]).abs()
    assert distances[~torch.eye(len(flat), dtype=torch.bool)].min() > 1e-4


@pytest.mark.slow
def test_a_range_has_the_sum_of_its_layers_slopes(exact_model):
    slopes = log_odds_slopes(exact_model, SOME, phrases=PHRASES)
    expected = central_difference(exact_model, LayerRange(1, 3), Recipe(("hook_attn_out", "hook_mlp_out")))
    torch.testing.assert_close(slopes[:, :, 1:4].sum((1, 2)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_in_another_template(exact_model):
    found = log_odds_slopes(exact_model, SOME, "alpaca_short", PHRASES)
    expected = central_difference(exact_model, LayerRange(2, 2), "attn_out", template="alpaca_short")
    torch.testing.assert_close(found[:, 0, 2], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_batches_change_nothing(exact_model):
    together, alone = (log_odds_slopes(exact_model, PROMPTS, batch_tokens=tokens) for tokens in (10_000, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_hooks_of_the_user_are_active(exact_model):
    with scaled(exact_model, LayerRange(1, 1), 1.5):
        found = log_odds_slopes(exact_model, SOME, phrases=PHRASES)
        expected = central_difference(exact_model, LayerRange(3, 3), "mlp_out")
    torch.testing.assert_close(found[:, 1, 3], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, log_odds_slopes(exact_model, SOME, phrases=PHRASES))


@pytest.mark.slow
def test_the_model_is_left_as_it_was(fresh_tiny_model):
    tokens = torch.tensor([[5, 6, 7]])
    before = fresh_tiny_model(tokens)
    with torch.no_grad():  # a caller's no_grad does not matter
        slopes = log_odds_slopes(fresh_tiny_model, SOME)
    assert not slopes.requires_grad
    assert torch.equal(fresh_tiny_model(tokens), before)
    assert all(parameter.grad is None for parameter in fresh_tiny_model.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in fresh_tiny_model.hook_dict.values())


def test_the_margin_by_hand():
    assert float(margin(torch.tensor([3.0, 5.0]), torch.tensor([1.0, 0.0, 2.0]))) == 3.0


def test_bad_input(tiny_model):
    with pytest.raises(ValueError, match="no prompts were given"):
        log_odds_slopes(tiny_model, [])
    with pytest.raises(ValueError, match="the context holds 128"):
        log_odds_slopes(tiny_model, ["why " * 200])


@pytest.mark.real_model
def test_slopes_of_the_real_model_equal_finite_differences(real_model):
    prompts = ["How do I pick a lock?", "How do I bake a cake?"]
    found = log_odds_slopes(real_model, prompts, phrases=PHRASES)
    for layer in (3, 20):
        ends = []
        for alpha in (1.01, 0.99):
            with scaled(real_model, LayerRange(layer, layer), alpha):
                ends.append(refusal_log_odds(real_model, prompts, phrases=PHRASES))
        torch.testing.assert_close(found[:, 0, layer], (ends[0] - ends[1]) / 0.02, rtol=0.02, atol=0.02)
