"""Answers that are generated side by side are the ones of a plain argmax loop, prompt by prompt."""

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from tiny import GPT2_STYLE, build_talkative_model
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as CacheEntry

from safety_mech.models import generation
from safety_mech.models.chat import encode_chat, tokenizer_of
from safety_mech.models.forward import merge_caches
from safety_mech.models.generation import generate, generate_tokens

STYLES = {
    "rotary": {},
    "gpt-2": {"seed": 5, **GPT2_STYLE},
    "local attention": {"seed": 8, "use_local_attn": True, "window_size": 9, "attn_types": ["local", "global"] * 2},
}
LENGTH = 6


@pytest.fixture(scope="module", params=list(STYLES.values()), ids=list(STYLES))
def model(request) -> HookedTransformer:
    return build_talkative_model(**request.param)


@pytest.fixture(scope="module")
def talkative_model() -> HookedTransformer:
    return build_talkative_model()


def argmax_loop(model: HookedTransformer, prompt: str, length: int = LENGTH, template: str = "own") -> list[int]:
    """The oracle: the whole text through the whole model for every token."""
    tokens = encode_chat(tokenizer_of(model), [prompt], template)[0].tokens[None]
    answer: list[int] = []
    while len(answer) < length and answer[-1:] != [tokenizer_of(model).eos_token_id]:
        answer.append(int(model(tokens)[0, -1].argmax()))
        tokens = torch.cat([tokens, torch.tensor([answer[-1:]])], dim=1)
    return answer


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("template", "batch_tokens"),
    [
        ("own", 4096),
        pytest.param("own", 1, marks=pytest.mark.slow),
        pytest.param("alpaca_short", 4096, marks=pytest.mark.slow),
    ],
)
def test_equals_an_argmax_loop(model, prompts, template, batch_tokens):
    answers = generate_tokens(model, prompts, LENGTH, template, batch_tokens=batch_tokens)
    assert answers == [argmax_loop(model, prompt, LENGTH, template) for prompt in prompts]


def test_the_answers_compared_are_not_all_the_same(model, prompts):
    answers = generate_tokens(model, prompts, LENGTH)
    assert len(set(map(tuple, answers))) > len(prompts) // 2


@pytest.mark.slow
def test_one_by_one_gives_the_same(model, prompts):
    together = generate_tokens(model, prompts, LENGTH)
    assert [generate_tokens(model, [prompt], LENGTH)[0] for prompt in prompts] == together


def test_a_prompt_may_be_given_twice(talkative_model, prompts):
    twice = [prompts[3], prompts[0], prompts[3]]
    assert generate_tokens(talkative_model, twice, LENGTH) == [argmax_loop(talkative_model, p) for p in twice]


@pytest.mark.slow_cases
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_shorter_answer_is_the_beginning_of_a_longer_one(talkative_model, prompts, length):
    longer = generate_tokens(talkative_model, prompts, LENGTH)
    assert generate_tokens(talkative_model, prompts, length) == [answer[:length] for answer in longer]


@pytest.mark.parametrize("length", [0, -1])
def test_at_least_one_token_must_be_asked_for(talkative_model, prompts, length):
    with pytest.raises(ValueError, match=f"max_new_tokens = {length}: expected at least 1"):
        generate_tokens(talkative_model, prompts, length)


# --- groups of rows --------------------------------------------------------------------------------------------------


@pytest.fixture
def groups(monkeypatch) -> list[int]:
    """Rows of every group that goes on together."""
    seen: list[int] = []
    go_on = generation.continue_greedily

    def watched(model, started, *arguments):
        seen.append(sum(len(first) for _, first in started))
        return go_on(model, started, *arguments)

    monkeypatch.setattr(generation, "continue_greedily", watched)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_more_rows_than_go_on_together(model, prompts, groups, monkeypatch, batch_tokens):
    expected = generate_tokens(model, prompts, LENGTH)
    assert groups == [8]
    monkeypatch.setattr(generation, "ROWS", 3)
    assert generate_tokens(model, prompts, LENGTH, batch_tokens=batch_tokens) == expected
    assert len(groups) >= 4
    assert max(groups[1:]) <= 3
    assert sum(groups[1:]) == len(prompts)


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[0, 1], [2, 3], [4]], [[[0, 1], [2, 3]], [[4]]]),  # just full
        ([[0, 1, 2], [3, 4]], [[[0, 1, 2]], [[3, 4]]]),
        ([[0, 1, 2, 3, 4]], [[[0, 1, 2, 3]], [[4]]]),
        ([], []),
    ],
)
def test_groups_are_filled_up_to_the_bound(batches, expected):
    assert list(generation._groups(batches, 4)) == expected


def test_rows_are_a_bound_for_prompts_of_equal_length_as_well(talkative_model, prompts, groups, monkeypatch):
    monkeypatch.setattr(generation, "ROWS", 2)
    generate_tokens(talkative_model, prompts[:1] * 5, 2)
    assert max(groups) <= 2


# --- where an answer ends --------------------------------------------------------------------------------------------


def end_token(model: HookedTransformer) -> int:
    tokenizer: Any = tokenizer_of(model)
    return tokenizer.eos_token_id


def with_end_token(model: HookedTransformer, token: int) -> HookedTransformer:
    """The model says its end-of-turn token where it would have said `token`, and the other way round."""
    end = end_token(model)
    order = torch.arange(model.cfg.d_vocab)
    order[[token, end]] = order[[end, token]]
    model.unembed.W_U.data = model.unembed.W_U.data[:, order]
    return model


def cut_before(answer: list[int], token: int) -> list[int]:
    return answer[: answer.index(token)] if token in answer else answer


@pytest.mark.slow
@pytest.mark.parametrize("style", list(STYLES.values()), ids=list(STYLES))
def test_an_answer_ends_with_the_end_token(style, prompts):
    endless = generate_tokens(build_talkative_model(**style), prompts, LENGTH)
    (token, _), *_ = Counter(chain.from_iterable(endless)).most_common()
    model = with_end_token(build_talkative_model(**style), token)
    answers = generate_tokens(model, prompts, LENGTH)
    end = end_token(model)
    assert [cut_before(answer, end) for answer in answers] == [cut_before(answer, token) for answer in endless]
    assert [end in answer for answer in answers] == [token in answer for answer in endless]
    assert len({len(answer) for answer in answers}) > 1
    assert answers == [argmax_loop(model, prompt) for prompt in prompts]


@pytest.mark.slow
def test_text_is_decoded_without_special_tokens(prompts):
    endless = generate_tokens(build_talkative_model(), prompts, LENGTH)
    model = with_end_token(build_talkative_model(), endless[0][1])
    tokens = generate_tokens(model, prompts, LENGTH)
    assert any(answer[-1] == end_token(model) for answer in tokens)
    texts = generate(model, prompts, LENGTH)
    tokenizer = tokenizer_of(model)
    assert texts == [str(tokenizer.decode(answer, skip_special_tokens=True)).strip() for answer in tokens]
    assert not any("<|im_end|>" in text for text in texts)


def test_a_trained_model_says_what_it_was_taught(refusing_model, prompts):
    """The same from the outside: real sentences, one that ends early beside one that is cut."""
    texts = generate(refusing_model, prompts, 8)
    assert texts == ["Sure, here is how.", "I'm sorry, but I can't"] * 4


def rows_running(model: HookedTransformer, prompts: list[str], decided=None) -> list[int]:
    """How many rows run through the first block at each token after the first."""
    rows: list[int] = []

    def watch(resid: Tensor, hook) -> None:
        if resid.shape[1] == 1:
            rows.append(len(resid))

    with model.hooks([("blocks.0.hook_resid_pre", watch)]):
        generate_tokens(model, prompts, LENGTH, decided=decided)
    return rows


@pytest.mark.slow_cases
def test_what_is_decided_leaves_early_and_changes_no_other_row(model, prompts):
    full = generate_tokens(model, prompts, LENGTH)
    decode = model.tokenizer.decode

    def decided(text: str) -> bool:
        return sum(map(ord, text)) % 3 == 0

    def until_decided(answer: list[int]) -> list[int]:
        beginnings = [answer[:n] for n in range(1, LENGTH + 1)]
        return next((part for part in beginnings if decided(decode(part, skip_special_tokens=True).strip())), answer)

    answers = generate_tokens(model, prompts, LENGTH, decided=decided)
    assert answers == [until_decided(answer) for answer in full]
    lengths = [len(answer) for answer in answers]
    assert len(set(lengths)) > 2
    running = [sum(length > step for length in lengths) for step in range(1, LENGTH)]
    assert rows_running(model, prompts, decided) == [rows for rows in running if rows]


def test_without_a_decision_all_rows_run_on(talkative_model, prompts):
    assert rows_running(talkative_model, prompts) == [len(prompts)] * (LENGTH - 1)
    assert rows_running(talkative_model, prompts, decided=lambda text: True) == []


# --- hooks, context, caches ------------------------------------------------------------------------------------------


@pytest.mark.slow_cases
def test_hooks_are_active_for_prompt_and_answer(model, prompts):
    plain = generate_tokens(model, prompts, LENGTH)
    with model.hooks([("blocks.2.hook_attn_out", lambda x, hook: 3 * x)]):
        hooked = generate_tokens(model, prompts, LENGTH)
        assert hooked == [argmax_loop(model, prompt) for prompt in prompts]
    assert hooked != plain


@pytest.mark.slow
@pytest.mark.parametrize("style", [{}, GPT2_STYLE], ids=["rotary", "gpt-2"])
def test_prompt_and_answer_must_fit_the_context(style, prompts):
    roomy = build_talkative_model(**style)
    longest = max(len(chat) for chat in encode_chat(tokenizer_of(roomy), prompts))
    just = build_talkative_model(n_ctx=longest + LENGTH, **style)
    assert generate_tokens(just, prompts, LENGTH) == [argmax_loop(just, prompt) for prompt in prompts]
    tight = build_talkative_model(n_ctx=longest + LENGTH - 1, **style)
    expected = f"prompt 7 has {longest} tokens and {LENGTH} to generate: the context holds {longest + LENGTH - 1}"
    with pytest.raises(ValueError, match=expected):
        generate_tokens(tight, prompts, LENGTH)


def filled_cache(rows: int, length: int, value: float) -> list[CacheEntry]:
    """Two layers with 3 heads of width 5; keys all `value`, values all `-value`."""
    shape = (rows, length, 3, 5)
    return [CacheEntry(torch.full(shape, value + layer), torch.full(shape, -value - layer)) for layer in range(2)]


def test_merged_caches_are_padded_on_the_left_and_masked():
    merged, mask = merge_caches([filled_cache(2, 3, 10.0), filled_cache(1, 1, 20.0), filled_cache(1, 4, 30.0)])
    assert mask.tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    values = torch.tensor([10.0, 10.0, 20.0, 30.0])[:, None]
    for layer, entry in enumerate(merged):
        expected = ((values + layer) * mask)[:, :, None, None].expand(4, 4, 3, 5)
        assert torch.equal(entry.past_keys, expected)
        assert torch.equal(entry.past_values, -expected)
        assert not entry.frozen


def test_one_cache_alone_is_merged_without_padding():
    merged, mask = merge_caches([filled_cache(2, 3, 10.0)])
    assert mask.tolist() == [[1, 1, 1]] * 2
    assert merged[0].past_keys.shape == (2, 3, 3, 5)
