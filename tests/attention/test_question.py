"""question_attention against the pattern in TransformerLens' own cache, prompt by prompt."""

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech import encode_chat, load_prompts, min_max, question_attention
from safety_mech.models.chat import tokenizer_of


def from_the_cache(
    model: HookedTransformer, prompts: list[str], template: str = "alpaca_short", head: int | None = None
) -> list[Tensor]:
    """The oracle: every prompt alone, whole patterns cached, the last row at the question's tokens picked out."""
    found = []
    for chat in encode_chat(tokenizer_of(model), prompts, template):
        _, cache = model.run_with_cache(chat.tokens[None], names_filter=lambda name: name.endswith("hook_pattern"))
        patterns = torch.stack([cache["pattern", layer][0] for layer in range(model.cfg.n_layers)])
        rows = patterns.mean(dim=1) if head is None else patterns[:, head]
        found.append(rows[:, -1, list(chat.question)])
    return found


def assert_same(found: list, expected: list[Tensor], atol: float = 1e-6) -> None:
    assert len(found) == len(expected)
    for attention, weights in zip(found, expected, strict=True):
        torch.testing.assert_close(attention.weights, weights, rtol=0, atol=atol)


@pytest.mark.parametrize("share_prefix", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "batch_tokens", [pytest.param(1, marks=pytest.mark.slow), 100, pytest.param(4096, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("template", ["own", "alpaca_short"])
def test_equals_the_cache_of_every_prompt_alone(tiny_model, prompts, template, batch_tokens, share_prefix):
    found = question_attention(tiny_model, prompts, template, batch_tokens=batch_tokens, share_prefix=share_prefix)
    assert_same(found, from_the_cache(tiny_model, prompts, template))


@pytest.mark.slow_cases
@pytest.mark.parametrize("head", [0, 3])
def test_one_head_equals_that_head_of_the_cache(tiny_model, prompts, head):
    found = question_attention(tiny_model, prompts, head=head)
    assert_same(found, from_the_cache(tiny_model, prompts, head=head))
    mean = question_attention(tiny_model, prompts)
    assert not torch.allclose(found[0].weights, mean[0].weights, atol=1e-3)


@pytest.mark.slow
def test_the_mean_is_over_heads(tiny_model, prompts):
    heads = [question_attention(tiny_model, prompts, head=head)[1].weights for head in range(4)]
    mean = question_attention(tiny_model, prompts)[1].weights
    torch.testing.assert_close(mean, torch.stack(heads).mean(dim=0), rtol=0, atol=1e-6)


def test_it_is_the_last_row_and_not_the_one_before(tiny_model, prompts):
    chat = encode_chat(tokenizer_of(tiny_model), prompts[:1], "alpaca_short")[0]
    _, cache = tiny_model.run_with_cache(chat.tokens[None])
    (found,) = question_attention(tiny_model, prompts[:1])
    before = cache["pattern", 2][0, :, -2].mean(dim=0)[list(chat.question)]
    assert not torch.allclose(found.weights[2], before, atol=1e-4)


def test_with_learnt_positions(make_tiny_model, prompts):
    model = make_tiny_model(seed=5, positions="standard", n_key_value_heads=None)
    assert_same(question_attention(model, prompts), from_the_cache(model, prompts))


def test_equal_prompts_share_all_but_the_last_token(tiny_model, prompts):
    """The shared prefix then covers the question itself; its columns must still be found."""
    found = question_attention(tiny_model, [prompts[0], prompts[0]])
    assert_same(found, from_the_cache(tiny_model, [prompts[0], prompts[0]]))


def test_tokens_and_spans_are_the_questions_text(tiny_model, prompts):
    padded = [f"  {prompt}\n" for prompt in prompts]
    for attention, prompt in zip(question_attention(tiny_model, padded), prompts, strict=True):
        assert attention.prompt == prompt
        assert attention.weights.shape == (6, len(attention.tokens))
        assert "".join(attention.tokens) == prompt
        assert [prompt[slice(*span)].strip() for span in attention.spans] == [t.strip() for t in attention.tokens]
        assert not attention.weights.requires_grad


def test_spans_of_a_letter_that_takes_several_tokens(tiny_model):
    (attention,) = question_attention(tiny_model, ["a \u20ac b"])
    at_euro = [span for span in attention.spans if span[0] <= 2 < span[1]]
    assert len(at_euro) > 1
    assert {span[1] for span in at_euro} == {3}


@pytest.mark.parametrize(("template", "seen"), [("own", "How do I bake a cake?"), ("alpaca", "How do I bake a cake?")])
def test_nothing_of_the_template_is_in_the_question(tiny_model, template, seen):
    (attention,) = question_attention(tiny_model, [seen], template)
    assert "".join(attention.tokens) == seen


def test_a_row_holds_what_the_question_gets_of_the_whole(tiny_model, prompts):
    for attention in question_attention(tiny_model, prompts):
        total = attention.weights.sum(dim=1)
        assert (total > 0).all()
        assert (total < 1).all()


def test_only_the_questions_columns_are_returned(tiny_model):
    (attention,) = question_attention(tiny_model, ["Why? " * 12])
    assert attention.weights.untyped_storage().nbytes() == attention.weights.numel() * 4


def test_hooks_are_removed_and_the_users_own_is_active(fresh_tiny_model, prompts):
    model = fresh_tiny_model
    plain = question_attention(model, prompts)

    def half(pattern: Tensor, hook) -> Tensor:
        return pattern / 2

    with model.hooks([("blocks.2.attn.hook_pattern", half)]):
        hooked = question_attention(model, prompts)
    assert [name for name, point in model.hook_dict.items() if point.has_hooks()] == []
    for a, b in zip(plain, hooked, strict=True):
        assert torch.equal(b.weights[:2], a.weights[:2])
        torch.testing.assert_close(b.weights[2], a.weights[2] / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("head", [-1, 4])
def test_a_head_that_is_not_there_is_refused(tiny_model, prompts, head):
    with pytest.raises(ValueError, match=rf"head {head}: the model has heads 0 to 3"):
        question_attention(tiny_model, prompts, head=head)


def test_a_pattern_that_is_not_a_number_is_reported(fresh_tiny_model, prompts):
    fresh_tiny_model.blocks[4].attn.W_Q.data[:] = float("nan")
    with pytest.raises(ValueError, match="attends to nothing at layer 4 for prompt"):
        question_attention(fresh_tiny_model, prompts)


def test_a_prompt_longer_than_the_context_is_refused(tiny_model):
    with pytest.raises(ValueError, match="the context holds 128"):
        question_attention(tiny_model, ["Why? " * 200])


def test_min_max_by_hand():
    weights = torch.tensor([[1.0, 3.0, 2.0], [0.25, 0.25, 0.25], [0.0, 0.0, 5.0]])
    expected = torch.tensor([[0.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert torch.equal(min_max(weights), expected)
    assert torch.equal(min_max(weights[:, :1]), torch.zeros(3, 1))


@pytest.mark.real_model
def test_real_model_equals_the_cache_of_every_prompt_alone(real_model):
    prompts = load_prompts("malicious:test")[:10]
    for template in ("alpaca_short", "own"):
        found = question_attention(real_model, prompts, template)
        assert_same(found, from_the_cache(real_model, prompts, template), atol=1e-5)
        assert [("".join(attention.tokens)).strip() for attention in found] == prompts
