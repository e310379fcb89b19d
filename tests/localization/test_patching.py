"""Activation patching: every value against full forward passes with hooks, token by token, in float64."""

import math

import pytest
import torch
from tiny import GPT2_STYLE, build_tiny_model
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech import PromptPair, refusal_log_odds
from safety_mech.localization.patching import PATCHES, equal_length_pairs, patch_pairs
from safety_mech.models.chat import encode_chat, tokenizer_of

PHRASES = ("I'm sorry", "I can't")
"""None of one token, so that the positions behind the prompt count."""


@pytest.fixture(scope="module")
def exact_model() -> HookedTransformer:
    return build_tiny_model(seed=3, n_layers=3, dtype=torch.float64).to(torch.float64)


@pytest.fixture(scope="module")
def pairs(exact_model) -> list[PromptPair]:
    """One token a letter, so pairs of equal length by construction; of two lengths."""
    found = [PromptPair("XY Z X?", "YX X Z?", "x"), PromptPair("XYZ", "ZZY", "y"), PromptPair("ZYX", "XXX", "y")]
    assert equal_length_pairs(exact_model, found) == found
    return found


def patched(model: HookedTransformer, target: str, source: str, layer: int | None, what: str, positions: str) -> float:
    """The oracle: every phrase's probability, token by token, by a full forward pass with the source's activations."""
    tokenizer = tokenizer_of(model)
    mine, other = (chat.tokens for chat in encode_chat(tokenizer, [target, source]))
    total = 0.0
    for phrase in PHRASES:
        sequence = tokenizer(phrase, add_special_tokens=False).input_ids
        probability = 1.0
        for depth, token in enumerate(sequence):
            tail = torch.tensor(sequence[:depth], dtype=torch.long)
            tokens, theirs = torch.cat([mine, tail])[None], torch.cat([other, tail])[None]
            _, cache = model.run_with_cache(theirs)
            where = {"last": [len(mine) - 1], "answer": list(range(len(mine) - 1, tokens.shape[1]))}
            rows = where.get(positions, list(range(tokens.shape[1])))

            def put(x: Tensor, hook, rows=rows, cache=cache) -> Tensor:
                new = x.clone()
                new[:, rows] = cache[hook.name][:, rows]
                return new

            names = [] if layer is None else [f"blocks.{layer}.{point}" for point in PATCHES[what]]
            with model.hooks(fwd_hooks=[(name, put) for name in names]):
                probability *= float(model(tokens)[0, -1].softmax(-1)[token])
        total += probability
    return math.log(total / (1 - total))


def slow_but(*fast: tuple[str, str]) -> list:
    """Every kind of patch at every choice of positions; all but `fast` are left to `make test`."""
    both = [(what, positions) for what in PATCHES for positions in ("last", "answer", "all")]
    return [pytest.param(*case, marks=() if case in fast else pytest.mark.slow) for case in both]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "positions"), slow_but(("layer", "last"), ("attn_out", "answer"), ("mlp_out", "last"), ("resid", "all"))
)
def test_equals_full_forward_passes(exact_model, pairs, what, positions):
    found = patch_pairs(exact_model, pairs, phrases=PHRASES, what=what, positions=positions)
    assert found.into_malicious.shape == found.into_normal.shape == (3, 3)
    for layer, index in ((1, 0), (2, 1), (0, 2)):
        pair = pairs[index]
        down = patched(exact_model, pair.malicious, pair.normal, layer, what, positions)
        up = patched(exact_model, pair.normal, pair.malicious, layer, what, positions)
        assert float(found.into_malicious[layer, index]) == pytest.approx(down, abs=1e-8)
        assert float(found.into_normal[layer, index]) == pytest.approx(up, abs=1e-8)


@pytest.mark.slow
def test_what_is_compared_differs(exact_model, pairs):
    """Control: layers, kinds of patch and positions all give other numbers."""
    rows = [
        patch_pairs(exact_model, pairs[:1], phrases=PHRASES, what=what, positions=positions).into_malicious
        for what in ("layer", "attn_out", "mlp_out")
        for positions in ("last", "answer", "all")
    ]
    flat = torch.cat(rows).flatten()
    distances = (flat[:, None] - flat[None]).abs() + torch.eye(len(flat))
    # Equal by right: in the last layer "answer" and "all" (nothing reads the other positions), three times; in layer 0
    # "layer" and "attn_out" at "last" and "answer" (the tokens there are the same in both runs), two times.
    assert int((distances < 1e-7).sum()) == 2 * (3 + 2)


@pytest.mark.slow
@pytest.mark.parametrize("style", [GPT2_STYLE, {"parallel_attn_mlp": True}], ids=["gpt-2", "parallel"])
def test_in_other_architectures(style, pairs):
    model = build_tiny_model(seed=3, n_layers=3, dtype=torch.float64, **style).to(torch.float64)
    found = patch_pairs(model, pairs, phrases=PHRASES)
    for index, pair in enumerate(pairs):
        expected = patched(model, pair.malicious, pair.normal, 1, "layer", "last")
        assert float(found.into_malicious[1, index]) == pytest.approx(expected, abs=1e-8)


def test_unpatched_is_the_plain_measure(exact_model, pairs):
    found = patch_pairs(exact_model, pairs, phrases=PHRASES)
    for values, side in ((found.malicious, "malicious"), (found.normal, "normal")):
        expected = refusal_log_odds(exact_model, [getattr(pair, side) for pair in pairs], phrases=PHRASES)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-8)


def test_the_stream_of_the_last_layer_at_all_positions_is_the_other_prompt(exact_model, pairs):
    found = patch_pairs(exact_model, pairs, phrases=PHRASES, what="resid", positions="all")
    torch.testing.assert_close(found.into_malicious[-1], found.normal, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.into_normal[-1], found.malicious, rtol=0, atol=1e-8)
    assert (found.malicious - found.normal).abs().min() > 1e-3


def test_effects_by_hand(exact_model, pairs):
    found = patch_pairs(exact_model, pairs, phrases=PHRASES)
    torch.testing.assert_close(found.lost[2], found.malicious - found.into_malicious[2])
    torch.testing.assert_close(found.gained[2], found.into_normal[2] - found.normal)
    torch.testing.assert_close(found.effect, (found.lost + found.gained) / 2)


def test_equal_prompts_are_moved_by_nothing(exact_model):
    found = patch_pairs(exact_model, [PromptPair("XYZ", "XYZ", "x")] * 2)
    torch.testing.assert_close(found.effect, torch.zeros(3, 2).double(), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_batches_change_nothing(exact_model, pairs):
    together, alone = (patch_pairs(exact_model, pairs, batch_tokens=tokens).effect for tokens in (10_000, 1))
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_neither_layers_nor_positions_before_the_patch_are_run_again(exact_model, pairs, positions):
    """Block k runs the shared prefix and the rest once, and the exchanged positions k + 1 times."""
    runs: list[list[int]] = [[] for _ in range(3)]

    def count(layer):
        def add(module, args, output):
            runs[layer].append(output.shape[1])

        return add

    handles = [block.register_forward_hook(count(layer)) for layer, block in enumerate(exact_model.blocks)]
    try:
        patch_pairs(exact_model, pairs[1:], positions=positions, phrases=["I"])
    finally:
        for handle in handles:
            handle.remove()
    chat, *others = (
        chat.tokens
        for pair in pairs[1:]
        for chat in encode_chat(tokenizer_of(exact_model), [pair.malicious, pair.normal])
    )
    shared = next(i for i, tokens in enumerate(zip(chat, *others, strict=True)) if len({int(t) for t in tokens}) > 1)
    rest = len(chat) - shared
    once = [shared, rest - 1, 1] if positions == "last" else [shared, rest]
    assert runs == [once + [once[-1]] * (layer + 1) for layer in range(3)]


@pytest.mark.slow
def test_the_model_is_left_as_it_was(tiny_model, pairs):
    tokens = torch.tensor([[5, 6, 7]])
    before = tiny_model(tokens)
    patch_pairs(tiny_model, pairs)
    assert torch.equal(tiny_model(tokens), before)
    assert not any(point.fwd_hooks for point in tiny_model.hook_dict.values())


def test_only_pairs_of_equal_length_are_taken(exact_model):
    pairs = [PromptPair("XYZ", "XYZX", "a"), PromptPair("XYZ", "ZYX", "b")]
    assert equal_length_pairs(exact_model, pairs) == pairs[1:]
    with pytest.raises(ValueError, match=r"pair 0: \d+ and \d+ tokens; take equal_length_pairs"):
        patch_pairs(exact_model, pairs)


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "no prompts were given"),
        ([PromptPair("XYZ", "ZYX", "a")], {"what": "head"}, "'head': expected one of layer, attn_out, mlp_out, resid"),
        ([PromptPair("XYZ", "ZYX", "a")], {"positions": "first"}, "positions"),  # or a type error, in tests
        ([PromptPair("why " * 200, "why " * 200, "a")], {}, "the context holds 128"),
    ],
)
def test_bad_input(tiny_model, pairs, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        patch_pairs(tiny_model, pairs, **options)


@pytest.mark.real_model
def test_how_many_shipped_pairs_qualify(real_model):
    from safety_mech import load_pairs

    pairs = load_pairs("test")
    assert len(equal_length_pairs(real_model, pairs)) >= 30
