"""A scaled layer is one whose weights were scaled, leaves nothing behind, and refuses what makes no sense."""

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from tiny import GPT2_STYLE, build_tiny_model, build_tokenizer, randomise
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

from safety_mech import LayerRange
from safety_mech.interventions.scaling import RECIPES, Recipe, check_alpha, find_recipe, scaled
from safety_mech.models.conversion import to_hooked
from safety_mech.training.lora import low_rank_adapters

TOKENIZER = build_tokenizer()
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
}


def gemma() -> PreTrainedModel:
    changes: dict[str, Any] = {"head_dim": 8, "num_key_value_heads": 1}
    config = transformers.GemmaConfig(**(SHAPE | changes))
    return transformers.GemmaForCausalLM(config)


CHECKPOINTS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)),
    "gemma": gemma,
    "phi-3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SHAPE)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)),
    "gpt-2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2_SHAPE)),
}
TINY: dict[str, dict[str, Any]] = {
    "tiny, all biases": {},
    "tiny, norms of queries and keys": {"use_qk_norm": True},
    "tiny, norms after the block": {"use_normalization_before_and_after": True},
}
WEIGHTS = ("W_Q", "W_K", "_W_K", "W_V", "_W_V", "W_O", "W_gate", "W_in", "W_out")
CHOSEN = LayerRange(1, 2)
CLOSE = {"rtol": 0, "atol": 1e-4}


@cache
def build(name: str) -> HookedTransformer:
    """Random throughout; every bias that the architecture has is far from zero."""
    if name in TINY:
        model = build_tiny_model(seed=1, n_layers=4, **TINY[name])
        for parameter in model.parameters():
            parameter.data *= 0.5
        return model
    checkpoint = CHECKPOINTS[name]()
    randomise(checkpoint, seed=1)
    return to_hooked(checkpoint.eval().requires_grad_(False), TOKENIZER)


def some_tokens(model: HookedTransformer, batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(model.cfg.d_vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def multiplied(model: HookedTransformer, leaves: tuple[str, ...], alpha: float, layers: LayerRange) -> Tensor:
    """The oracle: logits of a copy whose parameters of these names were really multiplied."""
    changed = copy.deepcopy(model)
    found = set()
    for name, parameter in changed.named_parameters():
        parts = name.split(".")
        if parts[0] == "blocks" and int(parts[1]) in layers and parts[-1] in leaves:
            parameter.data *= alpha
            found.add(parts[-1])
    assert found
    return changed(some_tokens(model))


def scaled_logits(
    model: HookedTransformer, layers: LayerRange, alpha: float, *arguments: Any, **options: Any
) -> Tensor:
    with scaled(model, layers, alpha, *arguments, **options):
        return model(some_tokens(model))


# --- the recipes -----------------------------------------------------------------------------------------------------


MULTIPLIED = {
    "weights": WEIGHTS,
    "weights_no_o": tuple(name for name in WEIGHTS if name != "W_O"),
    "attn_out": ("W_O", "b_O"),
    "mlp_out": ("W_out", "b_out"),
}
NORM_AFTER = "tiny, norms after the block"  # its outputs are hooked behind the norm: see the test below
CASES = [
    (name, recipe)
    for name in [*CHECKPOINTS, *TINY]
    for recipe in MULTIPLIED
    if not (name == NORM_AFTER and recipe.endswith("_out"))
]


@pytest.mark.slow_cases
@pytest.mark.parametrize("alpha", [pytest.param(0.8, marks=pytest.mark.slow), 1.2])
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_a_recipe_equals_weights_that_were_multiplied(name, recipe, alpha):
    model = build(name)
    expected = multiplied(model, MULTIPLIED[recipe], alpha, CHOSEN)
    torch.testing.assert_close(scaled_logits(model, CHOSEN, alpha, recipe), expected, **CLOSE)
    assert (expected - model(some_tokens(model))).abs().max() > 0.01


@pytest.mark.slow
def test_low_rank_updates_are_multiplied_only_while_their_weights_are(fresh_tiny_model):
    model = fresh_tiny_model

    def multipliers() -> list[float]:
        return [model.blocks[layer].mlp.low_rank_W_in.multiplier for layer in range(4)]

    with low_rank_adapters(model, rank=1):
        with scaled(model, CHOSEN, 2.0, "weights"):
            assert multipliers() == [1.0, 2.0, 2.0, 1.0]
            with scaled(model, LayerRange(2, 3), 1.5, "weights"):
                assert multipliers() == [1.0, 2.0, 3.0, 1.5]
            assert multipliers() == [1.0, 2.0, 2.0, 1.0]
        with scaled(model, CHOSEN, 2.0, "weights", positions=[-1]):  # activations, the updates' among them
            assert multipliers() == [1.0] * 4
        with pytest.raises(KeyboardInterrupt), scaled(model, CHOSEN, 2.0, "weights"):
            raise KeyboardInterrupt
        assert multipliers() == [1.0] * 4
    inner = LayerRange(2, 3), 1.5, "weights_no_o"
    with scaled(model, CHOSEN, 2.0, "weights"), scaled(model, *inner), low_rank_adapters(model, rank=1):
        assert multipliers() == [1.0, 2.0, 3.0, 1.5]
        assert model.blocks[2].attn.low_rank_W_O.multiplier == 2.0
    with low_rank_adapters(model, rank=1):
        assert multipliers() == [1.0] * 4


def mixture_of_experts() -> HookedTransformer:
    """A random Mixtral of two experts a layer."""
    experts: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
    checkpoint = transformers.MixtralForCausalLM(transformers.MixtralConfig(**(SHAPE | experts)))
    randomise(checkpoint, seed=1)
    return to_hooked(checkpoint.eval().requires_grad_(False), TOKENIZER)


@pytest.mark.slow
def test_a_recipe_that_would_pass_experts_by_is_refused():
    model = mixture_of_experts()
    for recipe in ("weights", "weights_no_o", Recipe(("attn.hook_z", "mlp.hook_pre"))):
        for positions in (None, [-1]):
            with pytest.raises(ValueError, match="the model has 2 experts a layer") as caught:
                scaled_logits(model, CHOSEN, 1.2, recipe, positions=positions)
            assert "\n" not in str(caught.value)
    plain = model(some_tokens(model))
    for recipe in ("attn_out", "mlp_out"):  # their hook points are outside of the experts
        assert (scaled_logits(model, CHOSEN, 1.2, recipe) - plain).abs().max() > 0.01


def test_an_output_is_scaled_behind_the_norm_that_follows_it():
    """With a norm after the block, multiplying W_O would do nothing; what the stream receives is multiplied."""
    model = build_tiny_model(n_layers=4, use_normalization_before_and_after=True)
    expected = multiplied(model, ("W_O", "b_O"), 1.5, CHOSEN)
    plain = model(some_tokens(model))
    assert (scaled_logits(model, CHOSEN, 1.5) - plain).abs().max() > 0.1
    assert (expected - plain).abs().max() < 0.01
    after_norm = copy.deepcopy(model)
    for layer in CHOSEN:
        after_norm.blocks[layer].ln1_post.w.data *= 1.5
    torch.testing.assert_close(scaled_logits(model, CHOSEN, 1.5), after_norm(some_tokens(model)), **CLOSE)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["qwen2", "gpt-2", "tiny, all biases"])
def test_biases_are_not_scaled(name):
    """Control: a scale on the biases as well gives other logits, so that the test above can tell."""
    model = build(name)
    biases = ("b_Q", "b_K", "_b_K", "b_V", "_b_V")
    assert any(parameter.any() for key, parameter in model.named_parameters() if key.endswith(biases))
    with_biases = multiplied(model, WEIGHTS + biases, 1.2, CHOSEN)
    assert (scaled_logits(model, CHOSEN, 1.2, "weights") - with_biases).abs().max() > 1e-2


@pytest.mark.slow_cases
@pytest.mark.parametrize("layers", [LayerRange(0, 0), LayerRange(3, 3), LayerRange(0, 3), LayerRange(2, 3)], ids=str)
@pytest.mark.parametrize("recipe", ["weights", "attn_out"])
def test_both_ends_are_scaled_and_nothing_beyond(layers, recipe):
    model = build_tiny_model(n_layers=4)
    logits = scaled_logits(model, layers, 1.3, recipe)
    torch.testing.assert_close(logits, multiplied(model, MULTIPLIED[recipe], 1.3, layers), **CLOSE)


def test_layers_before_the_range_are_left_as_they_were(tiny_model):
    tokens, name = some_tokens(tiny_model), "blocks.{}.hook_resid_post".format
    _, plain = tiny_model.run_with_cache(tokens)
    with scaled(tiny_model, LayerRange(2, 3), 1.2):
        _, cache = tiny_model.run_with_cache(tokens)
    assert torch.equal(cache[name(1)], plain[name(1)])
    added = plain["blocks.2.hook_attn_out"]
    assert torch.equal(cache["blocks.2.hook_resid_mid"], cache[name(1)] + added * 1.2)
    for layer in range(2, 6):
        assert not torch.allclose(cache[name(layer)], plain[name(layer)], atol=1e-3)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", [*CHECKPOINTS, *TINY])
def test_alpha_one_changes_nothing(name):
    model = build(name)
    for recipe in RECIPES:
        torch.testing.assert_close(scaled_logits(model, CHOSEN, 1.0, recipe), model(some_tokens(model)), **CLOSE)


@pytest.mark.slow_cases
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layer", range(6))
def test_every_layer_matters(tiny_model, recipe, layer):
    """Control for all that is claimed to be equal here."""
    logits = scaled_logits(tiny_model, LayerRange(layer, layer), 1.2, recipe)
    assert (logits - tiny_model(some_tokens(tiny_model))).abs().max() > 1e-2


# --- heads and positions ---------------------------------------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("heads", [[0], [3], [1, 2], [0, 1, 2, 3]])
def test_heads_equal_their_slice_of_w_o(tiny_model, heads):
    changed = copy.deepcopy(tiny_model)
    for layer in CHOSEN:
        changed.blocks[layer].attn.W_O.data[heads] *= 1.4
    logits = scaled_logits(tiny_model, CHOSEN, 1.4, heads=heads)
    torch.testing.assert_close(logits, changed(some_tokens(tiny_model)), **CLOSE)
    assert (logits - tiny_model(some_tokens(tiny_model))).abs().max() > 1e-3


def test_all_heads_are_the_recipe_without_its_bias(tiny_model):
    heads = scaled_logits(tiny_model, CHOSEN, 1.4, heads=range(4))
    torch.testing.assert_close(heads, multiplied(tiny_model, ("W_O",), 1.4, CHOSEN), **CLOSE)
    assert (heads - scaled_logits(tiny_model, CHOSEN, 1.4)).abs().max() > 1e-3


@pytest.mark.slow_cases
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("positions", [[-1], [-2, -1], [-1, -5, -100]])
def test_only_these_positions_are_scaled(tiny_model, recipe, positions):
    """In ONE layer: what other positions see of the scaled ones comes from the layers above."""
    tokens = some_tokens(tiny_model)
    names = ["blocks.2.hook_resid_post", "blocks.2.attn.hook_z"]
    _, plain = tiny_model.run_with_cache(tokens, names_filter=names)
    with scaled(tiny_model, LayerRange(2, 2), 1.5, recipe, positions=positions):
        _, cache = tiny_model.run_with_cache(tokens, names_filter=names)
    chosen = [position + 12 for position in positions if position >= -12]
    before = [position for position in range(12) if position < min(chosen)]
    difference = (cache[names[0]] - plain[names[0]]).abs().amax(dim=(0, 2))
    assert torch.equal(cache[names[0]][:, before], plain[names[0]][:, before])
    assert all(difference[position] > 1e-3 for position in chosen)
    if "weights" not in recipe:  # keys and values of a scaled position reach the later ones
        assert [position for position in range(12) if difference[position] > 0] == sorted(chosen)


def test_the_last_position_alone_leaves_all_others_in_every_layer(tiny_model):
    tokens = some_tokens(tiny_model)
    _, plain = tiny_model.run_with_cache(tokens)
    with scaled(tiny_model, LayerRange(0, 5), 1.5, positions=[-1]):
        _, cache = tiny_model.run_with_cache(tokens)
    for layer in range(6):
        name = f"blocks.{layer}.hook_resid_post"
        assert torch.equal(cache[name][:, :-1], plain[name][:, :-1])
        assert not torch.allclose(cache[name][:, -1], plain[name][:, -1], atol=1e-3)


def test_all_positions_are_no_choice(tiny_model):
    every = range(-12, 0)
    assert torch.equal(scaled_logits(tiny_model, CHOSEN, 1.5, positions=every), scaled_logits(tiny_model, CHOSEN, 1.5))


def test_heads_and_positions_together(tiny_model):
    tokens = some_tokens(tiny_model)
    with scaled(tiny_model, LayerRange(2, 2), 2.0, heads=[1, 3], positions=[-2]):
        _, cache = tiny_model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_z")
    _, plain = tiny_model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_z")
    expected = plain["blocks.2.attn.hook_z"].clone()
    expected[:, -2, [1, 3]] *= 2
    assert torch.equal(cache["blocks.2.attn.hook_z"], expected)


# --- coming and going ------------------------------------------------------------------------------------------------


def hooks_on(model: HookedTransformer) -> list[str]:
    return [name for name, point in model.hook_dict.items() if point.fwd_hooks or point.bwd_hooks]


@pytest.mark.parametrize("recipe", RECIPES)
def test_nested_scales_multiply(tiny_model, recipe):
    with scaled(tiny_model, LayerRange(1, 3), 1.2, recipe):
        inner = scaled_logits(tiny_model, LayerRange(1, 3), 1.5, recipe)
    torch.testing.assert_close(inner, scaled_logits(tiny_model, LayerRange(1, 3), 1.8, recipe), **CLOSE)


def test_nested_ranges_overlap(tiny_model):
    with scaled(tiny_model, LayerRange(1, 2), 2.0):
        inner = scaled_logits(tiny_model, LayerRange(2, 3), 3.0)
        after_inner = tiny_model(some_tokens(tiny_model))
    expected = copy.deepcopy(tiny_model)
    for layer, alpha in ((1, 2.0), (2, 6.0), (3, 3.0)):
        expected.blocks[layer].attn.W_O.data *= alpha
        expected.blocks[layer].attn.b_O.data *= alpha
    torch.testing.assert_close(inner, expected(some_tokens(tiny_model)), **CLOSE)
    assert torch.equal(after_inner, scaled_logits(tiny_model, LayerRange(1, 2), 2.0))


@pytest.mark.slow_cases
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("leave", ["plainly", "by an exception", "nested", "by an exception inside of two"])
def test_leaving_restores_every_bit(fresh_tiny_model, recipe, leave):
    model, tokens = fresh_tiny_model, some_tokens(fresh_tiny_model)
    before = model(tokens)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def run() -> None:
        with scaled(model, LayerRange(0, 5), 1.7, recipe):
            assert not torch.equal(model(tokens), before)
            if leave == "by an exception":
                raise KeyError("on purpose")
            if "nested" in leave or "two" in leave:
                with scaled(model, LayerRange(2, 3), 0.5, recipe):
                    model(tokens)
                    if "two" in leave:
                        raise KeyError("on purpose")

    if "exception" in leave:
        with pytest.raises(KeyError, match="on purpose"):
            run()
    else:
        run()
    assert torch.equal(model(tokens), before)
    assert hooks_on(model) == []
    assert model.context_level == 0
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


def test_only_a_recipe_of_weights_changes_weights_and_none_in_place(fresh_tiny_model):
    own = {name: parameter.data for name, parameter in fresh_tiny_model.named_parameters()}
    values = {name: tensor.clone() for name, tensor in own.items()}
    for recipe, names in MULTIPLIED.items():
        with scaled(fresh_tiny_model, LayerRange(0, 5), 1.7, recipe) as inside:
            inside(some_tokens(inside))
            assert inside is fresh_tiny_model
            changed = {name for name, weight in inside.named_parameters() if weight.data_ptr() != own[name].data_ptr()}
            expected = {name for name in own if name.startswith("blocks.") and name.split(".")[-1] in names}
            assert changed == (expected if "weights" in recipe else set())
        assert all(torch.equal(tensor, values[name]) for name, tensor in own.items())


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", [*CHECKPOINTS, *TINY])
def test_activations_of_all_positions_amount_to_multiplied_weights(name):
    """What `weights` does to chosen positions, done to all of them, is what it does to weights."""
    model = build(name)
    hooked = scaled_logits(model, CHOSEN, 1.2, "weights", positions=range(-12, 0))
    torch.testing.assert_close(hooked, multiplied(model, WEIGHTS, 1.2, CHOSEN), **CLOSE)
    assert not torch.equal(hooked, model(some_tokens(model)))


def test_activations_are_not_edited_in_place(tiny_model):
    """A hook of the user's own that runs first keeps what it saw."""
    seen = []
    with tiny_model.hooks([("blocks.2.hook_attn_out", lambda x, hook: seen.append((x, x.clone())))]):
        scaled_logits(tiny_model, LayerRange(2, 2), 3.0)
    ((activation, copied),) = seen
    assert torch.equal(activation, copied)


def double(x: Tensor, hook) -> Tensor:
    return 2 * x


@pytest.mark.parametrize("how", ["add_hook", "add_perma_hook"])
def test_hooks_of_ones_own_survive(fresh_tiny_model, how):
    model, tokens = fresh_tiny_model, some_tokens(fresh_tiny_model)
    getattr(model, how)("blocks.1.hook_mlp_out", double)
    hooked = model(tokens)
    with scaled(model, LayerRange(1, 2), 1.5, "mlp_out"):
        both = model(tokens)
    assert torch.equal(model(tokens), hooked)
    assert hooks_on(model) == ["blocks.1.hook_mlp_out"]
    model.reset_hooks(including_permanent=True)
    with scaled(model, LayerRange(1, 1), 3.0, "mlp_out"), scaled(model, LayerRange(2, 2), 1.5, "mlp_out"):
        torch.testing.assert_close(both, model(tokens), **CLOSE)


def test_a_context_of_ones_own_around_it_survives(fresh_tiny_model):
    model, tokens = fresh_tiny_model, some_tokens(fresh_tiny_model)
    with model.hooks([("blocks.1.hook_mlp_out", double)]):
        hooked = model(tokens)
        assert not torch.equal(scaled_logits(model, LayerRange(1, 2), 1.5), hooked)
        assert torch.equal(model(tokens), hooked)
    assert hooks_on(model) == []


def test_gradients_go_through(fresh_tiny_model):
    """The attention output is linear in W_O: scaled by 3, so is the gradient of its sum."""
    weight = fresh_tiny_model.blocks[2].attn.W_O.requires_grad_(True)
    tokens = some_tokens(fresh_tiny_model)
    seen: list[Tensor] = []
    with fresh_tiny_model.hooks([("blocks.2.hook_resid_mid", lambda x, hook: seen.append(x))]):
        fresh_tiny_model(tokens)
        with scaled(fresh_tiny_model, LayerRange(2, 2), 3.0):
            fresh_tiny_model(tokens)
    plain, tripled = (torch.autograd.grad(resid.sum(), weight)[0] for resid in seen)
    torch.testing.assert_close(tripled, 3 * plain, rtol=1e-5, atol=1e-4)
    assert plain.abs().max() > 1


# --- recipes of one's own --------------------------------------------------------------------------------------------


def test_a_recipe_is_a_line(tiny_model, monkeypatch):
    monkeypatch.setitem(RECIPES, "keys", Recipe(("attn.hook_k",)))
    expected = multiplied(tiny_model, ("_W_K", "_b_K"), 1.5, CHOSEN)
    torch.testing.assert_close(scaled_logits(tiny_model, CHOSEN, 1.5, "keys"), expected, **CLOSE)
    assert torch.equal(
        scaled_logits(tiny_model, CHOSEN, 1.5, Recipe(("attn.hook_k",))), scaled_logits(tiny_model, CHOSEN, 1.5, "keys")
    )


def test_a_recipe_may_spare_a_bias(tiny_model):
    keys = Recipe(("attn.hook_k",), (("attn.hook_k", "attn.b_K"),))
    expected = multiplied(tiny_model, ("_W_K",), 1.5, CHOSEN)
    torch.testing.assert_close(scaled_logits(tiny_model, CHOSEN, 1.5, keys), expected, **CLOSE)


def test_recipes_are_found_by_name_or_as_they_are():
    mine = Recipe(("hook_resid_post",))
    assert find_recipe(mine) is mine
    assert find_recipe("weights") is RECIPES["weights"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0, 0.0, -1.2, math.nan, math.inf, -math.inf])
def test_bad_alpha(tiny_model, alpha):
    for call in (lambda: check_alpha(float(alpha)), lambda: scaled_logits(tiny_model, CHOSEN, float(alpha))):
        with pytest.raises(ValueError, match=r"alpha = .*: expected a finite number above 0"):
            call()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": LayerRange(4, 6)}, r"layer range \[4, 6\]: the model has 6 layers"),
        ({"layers": LayerRange(6, 6)}, "so the last is 5"),
        (
            {"recipe": "atn_out"},
            "recipe 'atn_out': expected one of attn_out, mlp_out, weights, weights_no_o, or a Recipe",
        ),
        (
            {"recipe": Recipe(("attn.hook_nothing",))},
            r"no hook point of the recipe is in this model: attn\.hook_nothing",
        ),
        ({"recipe": Recipe(())}, "no hook point of the recipe"),
        ({"heads": [4]}, r"heads \[4\]: the model has heads 0 to 3"),
        ({"heads": [0, -1]}, r"heads \[0, -1\]: the model has heads 0 to 3"),
        ({"heads": [0], "recipe": "weights"}, "heads can be chosen with the recipe 'attn_out' only"),
        ({"heads": [0], "recipe": Recipe(("attn.hook_z",))}, "heads can be chosen with the recipe 'attn_out' only"),
        ({"positions": [0]}, r"positions \[0\]: expected negative ones, counted from the end"),
        ({"positions": [-1, 3]}, r"positions \[-1, 3\]"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_no_hook(fresh_tiny_model, options, expected):
    settings = {"layers": CHOSEN, "alpha": 1.2, **options}
    with pytest.raises(ValueError, match=expected):
        scaled_logits(fresh_tiny_model, **settings)
    assert hooks_on(fresh_tiny_model) == []


def test_a_gated_models_hook_point_is_not_missed_in_gpt2():
    model = build_tiny_model(**GPT2_STYLE)
    assert "blocks.0.mlp.hook_pre_linear" not in model.hook_dict
    scaled_logits(model, CHOSEN, 1.2, "weights")
