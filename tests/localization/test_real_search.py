"""Scaling and its search on the real aligned model: exact against changed weights and against the full forward."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech import LayerRange
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.models.chat import encode_chat, tokenizer_of
from safety_mech.models.parameters import block_projections
from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.log_odds import chain_log_prob, log_odds, phrase_chains
from safety_mech.refusal.text import JUDGED_TOKENS

pytestmark = pytest.mark.real_model

PHRASES = ("I'm sorry", "I'm not able", "I cannot")
CELLS = [LayerRange(start, end) for start in range(30) for end in range(start, 30)]
SAMPLE = [LayerRange(0, 0), LayerRange(29, 29), LayerRange(0, 29), *random.Random(0).sample(CELLS, 4)]


@pytest.fixture(scope="module")
def aligned() -> HookedTransformer:
    torch.set_num_threads(2)
    return sm.load_model("smollm2-135m-aligned")


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return sm.load_prompts("over_rejection:test")[:8]


@contextmanager
def weights_multiplied(model: HookedTransformer, layers: LayerRange, alpha: float) -> Iterator[None]:
    names = {f"blocks.{layer}.{projection.hooked}" for layer in layers for projection in block_projections(model)}
    original = {name: weight.data.clone() for name, weight in model.named_parameters() if name in names}
    assert len(original) == 7 * len(layers)
    for name in original:
        model.get_parameter(name).data.mul_(alpha)
    try:
        yield
    finally:
        for name, weight in original.items():
            model.get_parameter(name).data.copy_(weight)


def last_logits(model: HookedTransformer, prompts: list[str]) -> Tensor:
    with torch.no_grad():
        return torch.stack([model(chat.tokens[None])[0, -1] for chat in encode_chat(tokenizer_of(model), prompts)])


@pytest.mark.parametrize(("layers", "alpha"), [(LayerRange(12, 17), 1.2), (LayerRange(4, 25), 0.8)], ids=str)
def test_the_weights_recipe_is_multiplied_weights(aligned, prompts, layers, alpha) -> None:
    plain = last_logits(aligned, prompts[:3])
    with sm.scaled(aligned, layers, alpha, "weights"):
        found = last_logits(aligned, prompts[:3])
    with weights_multiplied(aligned, layers, alpha):
        multiplied = last_logits(aligned, prompts[:3])
    torch.testing.assert_close(found, multiplied, rtol=0, atol=1e-4)
    assert (found - plain).abs().max() > 0.1, "control: scaling does something"
    assert torch.equal(last_logits(aligned, prompts[:3]), plain)


@pytest.mark.long_run
def test_activations_scaled_instead_are_multiplied_weights(prompts) -> None:
    """As `weights` does it to chosen positions; in float64, for float32 rounds the two orders to 1.2e-4."""
    model = sm.load_model("smollm2-135m-aligned").to(torch.float64)
    layers, longest = LayerRange(12, 17), max(len(c.tokens) for c in encode_chat(tokenizer_of(model), prompts[:3]))
    with sm.scaled(model, layers, 1.2, "weights", positions=range(-longest, 0)):
        hooked = last_logits(model, prompts[:3])
    with weights_multiplied(model, layers, 1.2):
        multiplied = last_logits(model, prompts[:3])
    torch.testing.assert_close(hooked, multiplied, rtol=0, atol=1e-9)


def test_after_an_exception_and_nesting_every_bit_is_back(aligned, prompts) -> None:
    plain = last_logits(aligned, prompts[:2])

    def interrupted() -> None:
        with sm.scaled(aligned, LayerRange(3, 9), 1.4, "weights"):
            with sm.scaled(aligned, LayerRange(5, 20), 0.7):
                last_logits(aligned, prompts[:1])
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(last_logits(aligned, prompts[:2]), plain)


def whole_log_odds(model: HookedTransformer, prompts: list[str]) -> Tensor:
    """The oracle: every prompt with every chain in a full forward of its own; nothing shared, nothing cached."""
    chains = phrase_chains(tokenizer_of(model), "own", PHRASES)
    rows = []
    with torch.no_grad():
        for chat in encode_chat(tokenizer_of(model), prompts):
            log_p = []
            for chain in chains:
                tokens = torch.cat([chat.tokens, torch.tensor(chain.tokens, dtype=torch.long)])
                resid = model(tokens[None], stop_at_layer=model.cfg.n_layers)
                log_p.append(chain_log_prob(model, resid[:, -len(chain.tokens) - 1 :], chain)[0])
            rows.append(torch.stack(log_p).logsumexp(0))
    return log_odds(torch.stack(rows))


@pytest.mark.parametrize("recipe", ["attn_out", pytest.param("weights", marks=pytest.mark.long_run)])
def test_cached_prefixes_give_the_log_odds_of_the_full_forward(aligned, prompts, recipe) -> None:
    few = prompts[:4]
    engine = ScaledRanges(aligned, few, 1.2, recipe, phrases=PHRASES)
    for layers in SAMPLE:
        with sm.scaled(aligned, layers, 1.2, recipe):
            expected = whole_log_odds(aligned, few)
        torch.testing.assert_close(engine.log_odds(layers), expected, rtol=0, atol=1e-4)
    assert len({round(float(engine.log_odds(layers).mean()), 3) for layers in SAMPLE}) > 3, "control: cells differ"


@pytest.mark.long_run
def test_in_float64_they_are_equal_to_nine_digits(prompts) -> None:
    """What float32 leaves open is rounding, not the method."""
    model = sm.load_model("smollm2-135m-aligned").to(torch.float64)
    engine = ScaledRanges(model, prompts[:2], 0.8, "weights", phrases=PHRASES)
    for layers in SAMPLE[:4]:
        with sm.scaled(model, layers, 0.8, "weights"):
            expected = whole_log_odds(model, prompts[:2])
        torch.testing.assert_close(engine.log_odds(layers), expected, rtol=0, atol=1e-9)


@pytest.mark.long_run
def test_cached_prefixes_give_the_tokens_of_plain_generation(aligned, prompts) -> None:
    engine = ScaledRanges(aligned, prompts, 1.2, "weights")
    for layers in SAMPLE:
        with sm.scaled(aligned, layers, 1.2, "weights"):
            expected = sm.generate(aligned, prompts, JUDGED_TOKENS)
        assert engine.answers(layers, whole=True) == expected


@pytest.mark.long_run
@pytest.mark.parametrize("recipe", ["attn_out", pytest.param("weights", marks=pytest.mark.long_run)])
def test_scaled_too_far_the_model_degenerates_and_that_is_no_refusal(aligned, prompts, recipe) -> None:
    """Attention output: repetitions, which the judge calls degenerate; weights: a salad of words, no refusal either."""
    engine = ScaledRanges(aligned, prompts, 4.0, recipe)
    layers = LayerRange(2, 27)
    answers = engine.answers(layers, whole=True)
    if recipe == "attn_out":
        assert sum(map(is_degenerate, answers)) >= 6, answers
    plain = engine.answers(None, whole=True)
    assert not any(map(is_degenerate, plain)), "control: unscaled answers are no degenerate output"
    assert not set(answers) & set(plain)
    assert int(engine.refuses(layers).sum()) == 0, answers
