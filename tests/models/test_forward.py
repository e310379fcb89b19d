"""Running blocks by hand gives what HookedTransformer.forward gives, with and without a shared prefix."""

import pytest
import torch
from jaxtyping import TypeCheckError
from tiny import GPT2_STYLE, build_tiny_model
from torch import Tensor

from safety_mech import LayerRange, TrainConfig, fine_tune, generate, last_token_residuals, refusal_log_odds, scaled
from safety_mech.models.chat import ChatTokens, encode_chat, shared_prefix_length
from safety_mech.models.forward import (
    common_prefix,
    embed,
    empty_cache,
    keep_rows,
    merge_caches,
    run_blocks,
    run_prefix,
    stack_rest,
    unembed_last,
)

STYLES = {
    "rotary": {},
    "gpt-2": GPT2_STYLE,
    "soft caps": {"output_logits_soft_cap": 2.0, "attn_scores_soft_cap": 1.0},
    "local attention": {"use_local_attn": True, "window_size": 4, "attn_types": ["local", "global"] * 3},
    "no final norm": {"normalization_type": None},
}
EXACT = {"rtol": 0, "atol": 1e-6}


@pytest.fixture(scope="module", params=list(STYLES.values()), ids=list(STYLES))
def model(request):
    model = build_tiny_model(seed=3, **request.param)
    for parameter in model.parameters():
        parameter.data *= 0.5  # so that 1e-6 is a claim about the code, and not about the size of the numbers
    return model


def some_tokens(model, batch: int = 3, length: int = 17) -> Tensor:
    return torch.randint(model.cfg.d_vocab, (batch, length), generator=torch.Generator().manual_seed(4))


def whole(model, tokens: Tensor) -> Tensor:
    """The residual stream after the last block, by TransformerLens' own forward."""
    return model(tokens, stop_at_layer=model.cfg.n_layers)


def test_all_blocks_equal_the_models_own_forward(model):
    tokens = some_tokens(model)
    torch.testing.assert_close(run_blocks(model, embed(model, tokens)), whole(model, tokens), **EXACT)


@pytest.mark.slow_cases
@pytest.mark.parametrize("cut", [0, 1, 4, 6])
def test_blocks_can_be_run_in_two_goes(model, cut):
    tokens = some_tokens(model)
    below = run_blocks(model, embed(model, tokens), stop=cut)
    assert torch.equal(below, model(tokens, stop_at_layer=cut))
    assert torch.equal(run_blocks(model, below, start=cut), run_blocks(model, embed(model, tokens)))


@pytest.mark.slow_cases
@pytest.mark.parametrize("length", [0, 1, 6, 16])
def test_blocks_on_top_of_a_prefix_equal_the_whole_forward(model, length):
    tokens = some_tokens(model)
    tokens[:, :length] = tokens[0, :length]
    prefix = run_prefix(model, tokens[0, :length])
    resid = run_blocks(model, embed(model, tokens[:, length:], length), cache=prefix.cache_for(len(tokens)))
    torch.testing.assert_close(resid, whole(model, tokens)[:, length:], **EXACT)


def test_another_prefix_gives_another_answer(model):
    tokens = some_tokens(model)
    tokens[:, :6] = tokens[0, :6]
    other = run_prefix(model, tokens[0, :6].flip(0))
    resid = run_blocks(model, embed(model, tokens[:, 6:], 6), cache=other.cache_for(len(tokens)))
    assert (resid - whole(model, tokens)[:, 6:]).abs().max() > 1e-4


def test_learnt_positions_start_where_the_prefix_ends():
    model = build_tiny_model(**GPT2_STYLE)
    tokens = some_tokens(model)
    expected = model.W_E[tokens] + model.W_pos[5 : 5 + tokens.shape[1]]
    assert torch.equal(embed(model, tokens, offset=5), expected)
    assert not torch.equal(embed(model, tokens, offset=0), expected)


def test_rotary_positions_are_left_to_attention(tiny_model):
    tokens = some_tokens(tiny_model)
    assert torch.equal(embed(tiny_model, tokens, offset=5), tiny_model.W_E[tokens])


@pytest.mark.parametrize("kind", ["alibi", "shortformer"])
def test_other_positions_are_refused(fresh_tiny_model, kind):
    fresh_tiny_model.cfg.positional_embedding_type = kind
    with pytest.raises(ValueError, match=f"'{kind}' is not supported: expected standard or rotary"):
        embed(fresh_tiny_model, some_tokens(fresh_tiny_model))


def test_frozen_entries_serve_any_batch_and_stay_as_they_are(tiny_model):
    tokens = some_tokens(tiny_model, batch=5)
    tokens[:, :6] = tokens[0, :6]
    prefix = run_prefix(tiny_model, tokens[0, :6])
    keys = [entry.past_keys.clone() for entry in prefix.cache]
    for rows in ([0, 1, 2, 3, 4], [2], [4, 0]):
        entries = prefix.cache_for(len(rows))
        for _ in range(2):  # the same entries a second time: they did not grow
            resid = run_blocks(tiny_model, embed(tiny_model, tokens[rows, 6:], 6), cache=entries)
            torch.testing.assert_close(resid, whole(tiny_model, tokens[rows])[:, 6:], rtol=0, atol=1e-5)
    for entry, before in zip(prefix.cache, keys, strict=True):
        assert torch.equal(entry.past_keys, before)


def test_entries_for_a_batch_are_views(tiny_model):
    prefix = run_prefix(tiny_model, some_tokens(tiny_model)[0])
    for entry, own in zip(prefix.cache_for(64), prefix.cache, strict=True):
        assert entry.past_keys.shape == (64, 17, 2, 4)
        assert entry.past_keys.data_ptr() == own.past_keys.data_ptr()
        assert entry.past_values.data_ptr() == own.past_values.data_ptr()


def test_unfrozen_entries_grow_token_by_token(tiny_model):
    tokens = some_tokens(tiny_model)
    tokens[:, :6] = tokens[0, :6]
    cache = run_prefix(tiny_model, tokens[0, :6]).cache_for(len(tokens), frozen=False)
    expected = whole(tiny_model, tokens)
    for pos in range(6, tokens.shape[1]):
        resid = run_blocks(tiny_model, embed(tiny_model, tokens[:, pos : pos + 1], pos), cache=cache)
        torch.testing.assert_close(resid[:, 0], expected[:, pos], rtol=0, atol=1e-5)
        assert {entry.past_keys.shape[1] for entry in cache} == {pos + 1}


@pytest.mark.slow_cases
@pytest.mark.parametrize("style", [{}, GPT2_STYLE], ids=["rotary", "gpt-2"])
def test_rows_of_different_length_go_on_together_as_they_would_alone(style):
    model = build_tiny_model(seed=3, **style)
    tokens = some_tokens(model, batch=3)
    lengths = [5, 11, 8]
    caches = []
    for row, length in zip(tokens, lengths, strict=True):
        caches.append(empty_cache(model, batch=1))
        run_blocks(model, embed(model, row[None, :length]), cache=caches[-1])
    merged, mask = merge_caches(caches)
    assert mask.tolist() == [[0] * 6 + [1] * 5, [1] * 11, [0] * 3 + [1] * 8]
    for step in range(3):
        new = torch.stack([row[length + step] for row, length in zip(tokens, lengths, strict=True)])[:, None]
        offset, mask = mask.shape[1], torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        resid = run_blocks(model, embed(model, new, offset, mask), cache=merged, attention_mask=mask)
        for index, length in enumerate(lengths):
            alone = whole(model, tokens[index : index + 1])[0, length + step]
            torch.testing.assert_close(resid[index, 0], alone, rtol=0, atol=1e-5)


def test_keep_rows_takes_the_rows_that_are_true(tiny_model):
    cache = empty_cache(tiny_model, batch=4)
    run_blocks(tiny_model, embed(tiny_model, some_tokens(tiny_model, batch=4)), cache=cache)
    chosen = keep_rows(cache, torch.tensor([True, False, False, True]))
    for entry, own in zip(chosen, cache, strict=True):
        assert torch.equal(entry.past_keys, own.past_keys[[0, 3]])
        assert torch.equal(entry.past_values, own.past_values[[0, 3]])


def test_empty_cache_has_an_entry_for_every_layer(tiny_model):
    cache = empty_cache(tiny_model, batch=3)
    assert [tuple(entry.past_keys.shape) for entry in cache] == [(3, 0, 2, 4)] * 6
    assert not any(entry.frozen for entry in cache)


def test_unembed_last_equals_the_last_logits(model):
    tokens = some_tokens(model)
    logits = unembed_last(model, run_blocks(model, embed(model, tokens)))
    torch.testing.assert_close(logits, model(tokens)[:, -1], **EXACT)
    assert not torch.allclose(logits, model(tokens)[:, -2], atol=1e-3)


def test_unembed_last_norms_no_other_position(tiny_model):
    seen = []
    with tiny_model.hooks([("ln_final.hook_normalized", lambda x, hook: seen.append(tuple(x.shape)))]):
        unembed_last(tiny_model, whole(tiny_model, some_tokens(tiny_model)))
    assert seen == [(3, 1, 16)]


def test_common_prefix_is_what_all_prompts_share(tiny_model, prompts):
    chats = encode_chat(tiny_model.tokenizer, prompts)
    prefix = common_prefix(tiny_model, chats)
    assert len(prefix) == shared_prefix_length(chats) > 10
    assert torch.equal(prefix.tokens, chats[3].tokens[: len(prefix)])
    assert {entry.past_keys.shape[1] for entry in prefix.cache} == {len(prefix)}
    assert len(common_prefix(tiny_model, chats, share=False)) == 0


def test_hooks_are_active_while_the_prefix_runs(tiny_model, prompts):
    chats = encode_chat(tiny_model.tokenizer, prompts)
    plain = common_prefix(tiny_model, chats)
    with tiny_model.hooks([("blocks.1.hook_attn_out", lambda x, hook: 2 * x)]):
        changed = common_prefix(tiny_model, chats)
    assert torch.equal(plain.cache[1].past_keys, changed.cache[1].past_keys)
    assert not torch.equal(plain.cache[2].past_keys, changed.cache[2].past_keys)


def test_stack_rest_keeps_the_order_of_indices(tiny_model):
    chats = [ChatTokens(torch.tensor([9, 9, index, index + 1]), range(2, 4)) for index in range(5)]
    assert stack_rest(tiny_model, chats, [3, 0, 4], offset=2).tolist() == [[3, 4], [0, 1], [4, 5]]


def test_shapes_are_checked(tiny_model):
    with pytest.raises(TypeCheckError):
        unembed_last(tiny_model, torch.zeros(3, 16))
    with pytest.raises(TypeCheckError):
        embed(tiny_model, torch.zeros(5, dtype=torch.long))
    with pytest.raises(TypeCheckError):
        run_prefix(tiny_model, torch.zeros(1, 5, dtype=torch.long))


@pytest.mark.slow
def test_a_model_on_several_devices_is_refused_wherever_it_is_run(fresh_tiny_model):
    """Without several devices at hand: the config says that there are two."""
    model = fresh_tiny_model

    def scaled_once() -> None:
        with scaled(model, LayerRange(1, 2), 1.2):
            pass

    uses = {
        "residuals": lambda: last_token_residuals(model, ["Why?"]),
        "generate": lambda: generate(model, ["Why?"]),
        "log-odds": lambda: refusal_log_odds(model, ["Why?"]),
        "scaled": scaled_once,
        "fine_tune": lambda: fine_tune(model, [("Why?", "No.")], TrainConfig(epochs=1), progress=False),
    }
    for use in uses.values():
        use()
    model.cfg.n_devices = 2
    for use in uses.values():
        with pytest.raises(ValueError, match="n_devices = 2: expected a model on one device") as caught:
            use()
        assert "\n" not in str(caught.value)
