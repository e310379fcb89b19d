"""Refusal log-odds against probabilities multiplied token by token, every one by a full forward of its own."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import GPT2_STYLE, build_tiny_model
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.models.chat import ChatTokens, Template, encode_chat, tokenizer_of
from safety_mech.refusal import log_odds as log_odds_module
from safety_mech.refusal.log_odds import (
    REFUSAL_PHRASES,
    Chain,
    append_chain,
    chain_log_prob,
    log_odds,
    phrase_chains,
    phrases_in_use,
    refusal_log_odds,
)

PHRASES = {
    "one token": ["I"],
    "two tokens": ["I can"],
    "three tokens": ["I'm sorry"],
    "several chains": ["I'm sorry", "I can't", "Sorry"],
    "leaves at different depths": ["I'm sorry", "I can", "S"],
    "two leaves of one node": ["I'm sorry", "I'm a", "I'm how"],
    "one a beginning of another": ["I'm", "I'm sorry", "I can't"],
    "the same twice": ["I'm sorry", "I'm sorry"],
    "the default": list(REFUSAL_PHRASES),
}


@pytest.fixture(scope="module")
def exact_model() -> HookedTransformer:
    """In float64, so that 1e-8 is a claim about the code."""
    return build_tiny_model(seed=3, dtype=torch.float64).to(torch.float64)


def tokens_of(model: HookedTransformer, text: str) -> list[int]:
    return tokenizer_of(model)(text, add_special_tokens=False).input_ids


def brute_force(model: HookedTransformer, prompts: list[str], phrases: list[str], template: str = "own") -> Tensor:
    """Sum over phrases, none counted twice, of the product of the probabilities of its tokens; then log-odds."""
    sequences = {tuple(tokens_of(model, text)) for text in phrases}
    sequences = [s for s in sequences if not any(s != other and s[: len(other)] == other for other in sequences)]
    rows = []
    for chat in encode_chat(tokenizer_of(model), prompts, template):
        total = 0.0
        for sequence in sequences:
            probability = 1.0
            for depth, token in enumerate(sequence):
                so_far = torch.cat([chat.tokens, torch.tensor(sequence[:depth], dtype=torch.long)])
                probability *= float(model(so_far[None])[0, -1].double().softmax(-1)[token])
            total += probability
        rows.append(math.log(total / (1 - total)))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "the default" else ()) for name in PHRASES]
)
def test_equals_probabilities_multiplied_one_by_one(exact_model, prompts, name):
    some = prompts[2:6]  # two of equal length among them
    found = refusal_log_odds(exact_model, some, phrases=PHRASES[name])
    torch.testing.assert_close(found, brute_force(exact_model, some, PHRASES[name]), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_in_another_template(exact_model, prompts):
    found = refusal_log_odds(exact_model, prompts, "alpaca_short", PHRASES["several chains"])
    expected = brute_force(exact_model, prompts, PHRASES["several chains"], "alpaca_short")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    assert not torch.allclose(found, refusal_log_odds(exact_model, prompts, phrases=PHRASES["several chains"]))


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    "style",
    [GPT2_STYLE, {"output_logits_soft_cap": 2.0}, {"normalization_type": None}],
    ids=["gpt-2", "cap", "no norm"],
)
def test_in_another_architecture(prompts, style):
    model = build_tiny_model(seed=3, dtype=torch.float64, **style).to(torch.float64)
    for parameter in model.parameters():
        parameter.data *= 0.5  # without a norm the logits would be in the hundreds
    found = refusal_log_odds(model, prompts[:4], phrases=PHRASES["several chains"])
    expected = brute_force(model, prompts[:4], PHRASES["several chains"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.slow
def test_one_phrase_more_is_seen(exact_model, prompts):
    """Control: the sum is over all phrases, and a wrong one would show."""
    few, more = (refusal_log_odds(exact_model, prompts, phrases=o) for o in (["I'm sorry"], ["I'm sorry", "I can't"]))
    assert ((more - few) > 1e-4).all()
    other = refusal_log_odds(exact_model, prompts, phrases=["I'm sorr"])
    assert ((other - few).abs() > 1e-4).all()


@pytest.mark.slow
def test_a_batch_gives_what_single_prompts_give(tiny_model, prompts):
    together = refusal_log_odds(tiny_model, prompts)
    single = torch.cat([refusal_log_odds(tiny_model, [prompt]) for prompt in prompts])
    torch.testing.assert_close(together, single, rtol=0, atol=1e-5)
    in_parts = refusal_log_odds(tiny_model, prompts, batch_tokens=1)
    torch.testing.assert_close(in_parts, together, rtol=0, atol=1e-5)
    assert len(set(together.tolist())) == len(prompts)


def test_a_prompt_may_be_given_twice(tiny_model, prompts):
    single = refusal_log_odds(tiny_model, prompts[:1])
    torch.testing.assert_close(refusal_log_odds(tiny_model, prompts[:1] * 2), single.repeat(2), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_hooks_are_active(tiny_model, prompts):
    plain = refusal_log_odds(tiny_model, prompts, phrases=["I'm sorry"])
    with tiny_model.hooks([("blocks.2.hook_attn_out", lambda x, hook: 3 * x)]):
        hooked = refusal_log_odds(tiny_model, prompts, phrases=["I'm sorry"])
        torch.testing.assert_close(hooked, brute_force(tiny_model, prompts, ["I'm sorry"]), rtol=0, atol=1e-4)
    assert ((hooked - plain).abs() > 1e-3).any()


@pytest.mark.slow
def test_the_result_is_float64_on_the_cpu_without_gradient(make_tiny_model, prompts):
    found = refusal_log_odds(make_tiny_model().requires_grad_(True), prompts)
    assert (found.dtype, found.device.type, found.requires_grad) == (torch.float64, "cpu", False)


@pytest.mark.slow
def test_a_model_that_was_taught_to_refuse(refusing_model, prompts):
    found = refusal_log_odds(refusing_model, prompts)
    assert found[1::2].min() > found[0::2].max() + 1


@pytest.mark.slow
def test_phrases_in_use_carry_their_share(refusing_model, prompts):
    """By hand, from the probability of every phrase alone."""
    single = [torch.sigmoid(refusal_log_odds(refusing_model, prompts, phrases=[o])) for o in REFUSAL_PHRASES]
    mass = torch.stack(single).sum(1)
    shares = (mass / mass.sum()).tolist()
    assert min(shares) < 1e-3 < max(shares)
    for least in (1e-9, 1e-3, 0.9 * max(shares)):
        used = [text for text, share in zip(REFUSAL_PHRASES, shares, strict=True) if share >= least]
        assert phrases_in_use(refusing_model, prompts, least=least) == tuple(used)
    assert phrases_in_use(refusing_model, prompts, least=1.1) == (REFUSAL_PHRASES[shares.index(max(shares))],)


@pytest.mark.parametrize(
    ("probabilities", "options", "expected"),
    [
        ({"a": 0.6, "b": 0.3, "c": 0.05, "d": 0.005}, {}, ("a", "b", "c")),  # by default one in a hundred
        ({"a": 0.25, "b": 0.25}, {"least": 0.5}, ("a", "b")),  # just enough is enough
        ({"a": 0.2, "b": 0.3, "c": 0.1}, {"least": 0.6}, ("b",)),
    ],
)
def test_phrases_in_use_by_hand(tiny_model, monkeypatch, probabilities, options, expected):
    def log_odds_of(model, prompts, template, phrases):
        return torch.full((2,), probabilities[phrases[0]], dtype=torch.float64).logit()

    monkeypatch.setattr(log_odds_module, "refusal_log_odds", log_odds_of)
    assert phrases_in_use(tiny_model, ["Why?", "How?"], phrases=tuple(probabilities), **options) == expected


@pytest.mark.slow
def test_without_unused_phrases_the_log_odds_hardly_change(refusing_model, prompts):
    used = phrases_in_use(refusing_model, prompts)
    assert len(used) < len(REFUSAL_PHRASES)
    fewer, all_of_them = (refusal_log_odds(refusing_model, prompts, phrases=o) for o in (used, REFUSAL_PHRASES))
    assert (all_of_them - fewer)[1::2].abs().max() < 0.1  # where it refuses
    assert (all_of_them >= fewer).all()


# --- the tree of phrases --------------------------------------------------------------------------------------------


def ids(model: HookedTransformer, *pieces: str) -> tuple[int, ...]:
    tokenizer: Any = tokenizer_of(model)
    found = tuple(tokenizer.convert_tokens_to_ids(list(pieces)))
    assert tokenizer.unk_token_id not in found
    return found


def test_chains_by_hand(tiny_model):
    """I'm sorry, I'm how, I can't, S: the root holds S, I'm holds two leaves, I can holds one."""
    i, m, sorry, how, can, t, s = ids(tiny_model, "I", "'m", "Ġsorry", "Ġhow", "Ġcan", "'t", "S")
    chains = phrase_chains(tiny_model.tokenizer, phrases=["I'm sorry", "I can't", "S", "I'm how"])
    by_tokens = {chain.tokens: chain.leaves for chain in chains}
    assert set(by_tokens) == {(i, m), (i, can)}
    assert by_tokens[i, m][1:] == ((), tuple(sorted((sorry, how))))
    assert by_tokens[i, can][1:] == ((), (t,))
    assert sorted([by_tokens[i, m][0], by_tokens[i, can][0]]) == [(), (s,)]  # counted with one chain only


@pytest.mark.parametrize(
    ("phrases", "expected"),
    [
        (["I"], [((), (("I",),))]),
        (["I'm"], [(("I",), ((), ("'m",)))]),
        (["I", "I'm", "I'm sorry"], [((), (("I",),))]),  # what begins with "I" is in it already
        (["I'm", "I'm sorry"], [(("I",), ((), ("'m",)))]),
        (["I'm sorry", "I'm sorry"], [(("I", "'m"), ((), (), ("Ġsorry",)))]),
    ],
)
def test_small_chains_by_hand(tiny_model, phrases, expected):
    chains = phrase_chains(tiny_model.tokenizer, phrases=phrases)
    assert chains == tuple(
        Chain(ids(tiny_model, *tokens), tuple(ids(tiny_model, *leaves) for leaves in nodes))
        for tokens, nodes in expected
    )


def reached(chains: tuple[Chain, ...]) -> list[tuple[int, ...]]:
    """Every phrase that the chains count, as often as they do."""
    return [
        (*chain.tokens[:depth], leaf)
        for chain in chains
        for depth, leaves in enumerate(chain.leaves)
        for leaf in leaves
    ]


texts = st.text("XYZ", min_size=1, max_size=5)  # one token a letter


@pytest.mark.slow
@given(phrases=st.lists(texts, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_every_leaf_is_counted_exactly_once_and_chains_are_few(tiny_model, phrases):
    tokenizer = tiny_model.tokenizer
    chains = phrase_chains(tokenizer, phrases=phrases)
    smallest = {a for a in phrases if not any(a != b and a.startswith(b) for b in phrases)}
    assert Counter(reached(chains)) == Counter(tuple(tokens_of(tiny_model, text)) for text in smallest)
    for chain in chains:
        others = [other.tokens for other in chains if other is not chain]
        assert not any(other[: len(chain.tokens)] == chain.tokens for other in others)  # no chain lies in another


def test_the_default_phrases_are_all_reached(tiny_model):
    expected = sorted(tuple(tokens_of(tiny_model, text)) for text in REFUSAL_PHRASES)
    assert sorted(reached(phrase_chains(tiny_model.tokenizer))) == expected


def test_an_answer_that_follows_no_space_begins_with_one(tiny_model):
    """After "[/INST]" or "Answer:" a model says " Sorry"; after a line break "Sorry"."""
    for after, text in ((" [/INST]", " Sorry"), ("\nA:\n", "Sorry"), ("\nA: ", "Sorry")):
        chains = phrase_chains(tiny_model.tokenizer, Template("", after), ["Sorry"])
        assert reached(chains) == [tuple(tokens_of(tiny_model, text))]


def test_appending_leaves_prompt_and_question_as_they_are():
    chat = ChatTokens(torch.tensor([5, 6, 7]), range(1, 2))
    (longer,) = append_chain([chat], Chain((8, 9), ((), (), (1,))))
    assert longer.tokens.tolist() == [5, 6, 7, 8, 9]
    assert longer.question == range(1, 2)
    (same,) = append_chain([chat], Chain((), ((1,),)))
    assert same.tokens.tolist() == [5, 6, 7]
    assert same.tokens.dtype == torch.long


def test_a_chain_without_leaves_adds_nothing(tiny_model):
    resid = torch.ones(3, 2, 16)
    assert chain_log_prob(tiny_model, resid, Chain((4,), ((), ()))).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("phrases", [[], [""], ["I'm sorry", "  "], [" \n"]])
def test_no_phrase_and_an_empty_one_are_refused(tiny_model, phrases):
    for call in (
        lambda: phrase_chains(tiny_model.tokenizer, phrases=phrases),
        lambda: refusal_log_odds(tiny_model, ["Why?"], phrases=phrases),
    ):
        with pytest.raises(ValueError, match="refusal phrases: expected at least one, and none of them empty"):
            call()


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [([], "no prompts were given"), (["Why?", " "], "prompt 1 is empty"), (["why " * 200], "the context holds 128")],
)
def test_bad_prompts(tiny_model, prompts, expected):
    with pytest.raises(ValueError, match=expected):
        refusal_log_odds(tiny_model, prompts)


def test_the_phrases_must_fit_the_context_as_well(make_tiny_model):
    length = len(encode_chat(make_tiny_model().tokenizer, ["Why?"])[0])
    refusal_log_odds(make_tiny_model(n_ctx=length + 2), ["Why?"], phrases=["I'm sorry"])
    with pytest.raises(ValueError, match=f"prompt 0 has {length + 2} tokens: the context holds {length + 1}"):
        refusal_log_odds(make_tiny_model(n_ctx=length + 1), ["Why?"], phrases=["I'm sorry"])


# --- log-odds --------------------------------------------------------------------------------------------------------


def odds_of(log_p: float) -> float:
    return float(log_odds(torch.tensor([log_p], dtype=torch.float64)))


@pytest.mark.parametrize("p", [0.5, 0.1, 0.9, 1e-6, 1 - 1e-6])
def test_log_odds_of_ordinary_probabilities(p):
    assert odds_of(math.log(p)) == pytest.approx(math.log(p / (1 - p)), abs=1e-9)


def test_log_odds_at_both_ends():
    assert odds_of(math.log(0.5)) == pytest.approx(0.0, abs=1e-15)
    assert odds_of(-1000.0) == -1000.0  # p is 0 in float64, its logarithm is not
    assert odds_of(-1e-12) == pytest.approx(-math.log(1e-12), rel=1e-9)
    assert odds_of(-math.inf) == -math.inf
    certain = odds_of(0.0)
    assert certain == pytest.approx(-math.log(1e-15), rel=1e-6)
    assert odds_of(1e-9) == certain  # rounding above p = 1


def test_log_odds_never_fall_as_p_grows():
    log_p = -torch.logspace(3, -18, 200, dtype=torch.float64)
    found = log_odds(log_p)
    assert found.isfinite().all()
    assert (found.diff() >= 0).all()


def test_log_odds_of_float32_are_taken_in_float64():
    assert log_odds(torch.tensor([-1e-9])).dtype == torch.float64
    assert float(log_odds(torch.tensor([-1e-9]))) == pytest.approx(-math.log(1e-9), rel=1e-6)


def test_a_model_that_is_certain_gives_finite_log_odds(make_tiny_model, prompts):
    model = make_tiny_model()
    (i,) = ids(model, "I")
    model.unembed.b_U.data[i] = 200.0
    certain = refusal_log_odds(model, prompts, phrases=["I"])
    assert certain.isfinite().all()
    assert (certain > 30).all()
    model.unembed.b_U.data[i] = -2000.0
    hopeless = refusal_log_odds(model, prompts, phrases=["I"])
    assert hopeless.isfinite().all()
    assert (hopeless < -1900).all()


def test_phrases_that_share_all_probability_add_up_to_one(exact_model):
    """Every token of the vocabulary as a phrase: p is 1, up to rounding, and the log-odds stay finite."""
    everything = Chain((), (tuple(range(exact_model.cfg.d_vocab)),))
    total = chain_log_prob(exact_model, torch.ones(2, 1, 16, dtype=torch.float64), everything)
    torch.testing.assert_close(total, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    assert log_odds(total).isfinite().all()
