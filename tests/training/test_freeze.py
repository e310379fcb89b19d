"""What a run may move, by name; and that one changed bit of the rest is seen."""

import pytest
import torch
from tiny import GPT2_STYLE
from torch import Tensor

from safety_mech import LayerRange
from safety_mech.training.freeze import (
    check_unmoved,
    frozen_layers,
    is_norm,
    layer_of,
    parameter_hashes,
    trainable_names,
)
from safety_mech.training.lora import is_adapter_parameter, low_rank_adapters

PROJECTIONS = ("attn.W_Q", "attn._W_K", "attn._W_V", "attn.W_O", "mlp.W_gate", "mlp.W_in", "mlp.W_out")
BIASES = ("attn.b_Q", "attn._b_K", "attn._b_V", "attn.b_O", "mlp.b_in", "mlp.b_out")
NORMS = ("ln1.w", "ln2.w")
FINAL_NORM = "ln_final.w"


def of_layers(layers: list[int], parts: tuple[str, ...]) -> set[str]:
    return {f"blocks.{layer}.{part}" for layer in layers for part in parts}


@pytest.mark.parametrize(
    ("frozen", "layers"),
    [
        (None, []),
        ([], []),
        (LayerRange(2, 4), [2, 3, 4]),  # the authors' own code would freeze 3 alone
        (LayerRange(0, 0), [0]),
        (LayerRange(5, 5), [5]),
        (LayerRange(0, 5), [0, 1, 2, 3, 4, 5]),
        ([LayerRange(0, 1), LayerRange(4, 5)], [0, 1, 4, 5]),
        ([LayerRange(1, 3), LayerRange(2, 4)], [1, 2, 3, 4]),
        ((LayerRange(3, 3),), [3]),
    ],
)
def test_both_ends_are_frozen(frozen, layers):
    assert frozen_layers(frozen, n_layers=6) == frozenset(layers)


@pytest.mark.parametrize("frozen", [LayerRange(4, 6), LayerRange(6, 6), [LayerRange(0, 1), LayerRange(2, 9)]])
def test_a_layer_that_the_model_does_not_have(tiny_model, frozen):
    for call in (lambda: frozen_layers(frozen, 6), lambda: trainable_names(tiny_model, frozen)):
        with pytest.raises(ValueError, match="the model has 6 layers, so the last is 5"):
            call()


@pytest.mark.parametrize(
    ("name", "layer", "norm"),
    [
        ("blocks.0.attn.W_Q", 0, False),
        ("blocks.17.mlp.b_out", 17, False),
        ("blocks.3.ln1.w", 3, True),
        ("blocks.3.ln2_post.w", 3, True),
        ("blocks.12.attn.q_norm.w", 12, True),
        ("blocks.4.attn.low_rank_W_Q.A", 4, False),
        ("embed.W_E", None, False),
        ("unembed.W_U", None, False),
        ("ln_final.w", None, True),
    ],
)
def test_layer_and_kind_of_a_parameter(name, layer, norm):
    assert (layer_of(name), is_norm(name)) == (layer, norm)


# --- trainable_names -------------------------------------------------------------------------------------------------


def test_by_default_all_but_the_embeddings(tiny_model):
    everything = of_layers(list(range(6)), PROJECTIONS + BIASES + NORMS) | {FINAL_NORM}
    assert set(trainable_names(tiny_model)) == everything
    assert {name for name, _ in tiny_model.named_parameters()} - everything == {
        "embed.W_E",
        "unembed.W_U",
        "unembed.b_U",
    }


def test_names_come_in_the_models_order_and_once(tiny_model):
    names = trainable_names(tiny_model)
    assert names == [name for name, _ in tiny_model.named_parameters() if name in set(names)]


def test_frozen_layers_keep_their_norms_free(tiny_model):
    names = set(trainable_names(tiny_model, LayerRange(2, 4)))
    assert names == of_layers([0, 1, 5], PROJECTIONS + BIASES) | of_layers(list(range(6)), NORMS) | {FINAL_NORM}


def test_freeze_norms_takes_the_frozen_layers_norms_and_no_others(tiny_model):
    names = set(trainable_names(tiny_model, LayerRange(2, 4), freeze_norms=True))
    assert names == of_layers([0, 1, 5], PROJECTIONS + BIASES + NORMS) | {FINAL_NORM}


def test_norms_of_queries_and_keys_are_norms(make_tiny_model):
    model = make_tiny_model(use_qk_norm=True)
    of_three = {f"blocks.3.attn.{kind}_norm.w" for kind in "qk"}
    assert of_three <= set(trainable_names(model, LayerRange(3, 3)))
    assert not of_three & set(trainable_names(model, LayerRange(3, 3), freeze_norms=True))


def test_several_ranges(tiny_model):
    names = set(trainable_names(tiny_model, [LayerRange(0, 0), LayerRange(3, 5)], freeze_norms=True))
    assert names == of_layers([1, 2], PROJECTIONS + BIASES + NORMS) | {FINAL_NORM}


@pytest.mark.slow_cases
@pytest.mark.parametrize("style", [{}, GPT2_STYLE], ids=["rotary", "gpt-2"])
def test_embeddings_are_trained_only_when_asked_for(make_tiny_model, style):
    model = make_tiny_model(**style)
    added = set(trainable_names(model, embeddings=True)) - set(trainable_names(model))
    assert added == {name for name, _ in model.named_parameters() if "embed." in name}


def test_biases_that_are_zero_throughout_are_left_out(fresh_tiny_model):
    for block in fresh_tiny_model.blocks:
        block.mlp.b_out.data.zero_()
    fresh_tiny_model.blocks[1].attn._b_K.data.zero_()
    nearly = fresh_tiny_model.blocks[2].attn._b_K
    nearly.data.zero_()
    nearly.data[1, 3] = 1e-30
    left_out = of_layers(list(range(6)), PROJECTIONS + BIASES + NORMS) - set(trainable_names(fresh_tiny_model))
    assert left_out == of_layers(list(range(6)), ("mlp.b_out",)) | {"blocks.1.attn._b_K"}


def test_weights_that_are_zero_are_not_left_out(fresh_tiny_model):
    fresh_tiny_model.blocks[0].mlp.W_out.data.zero_()
    fresh_tiny_model.blocks[0].ln1.w.data.zero_()
    assert {"blocks.0.mlp.W_out", "blocks.0.ln1.w"} <= set(trainable_names(fresh_tiny_model))


def test_a_filter_of_ones_own_only_narrows(tiny_model):
    names = trainable_names(tiny_model, LayerRange(0, 3), lambda name: ".W_O" in name or name == "embed.W_E")
    assert names == ["blocks.4.attn.W_O", "blocks.5.attn.W_O"]


def test_low_rank_updates_are_parameters_like_others(fresh_tiny_model):
    with low_rank_adapters(fresh_tiny_model, LayerRange(2, 3), rank=2):
        free = trainable_names(fresh_tiny_model, trainable=is_adapter_parameter)
        assert len(free) == 2 * 7 * 2
        left = trainable_names(fresh_tiny_model, LayerRange(3, 5), is_adapter_parameter)
        assert left == [name for name in free if name.startswith("blocks.2.")]


# --- hashes ----------------------------------------------------------------------------------------------------------


def all_names(model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def flip_bit(parameter: Tensor, bit: int) -> None:
    """One bit of the last number of a float32 parameter."""
    flat = parameter.data.view(torch.int32).view(-1)
    flat[-1] ^= 1 << bit


def test_nothing_moved(tiny_model, fresh_tiny_model):
    names = all_names(tiny_model)
    before = parameter_hashes(tiny_model, names)
    assert list(before) == names
    assert parameter_hashes(fresh_tiny_model, names) == before
    check_unmoved(tiny_model, before)
    check_unmoved(tiny_model, {})


@pytest.mark.parametrize("name", ["blocks.3.attn._W_K", "blocks.0.ln1.w", "embed.W_E", "unembed.b_U"])
@pytest.mark.parametrize("bit", [0, 23, 30])
def test_one_changed_bit_is_seen(fresh_tiny_model, name, bit):
    before = parameter_hashes(fresh_tiny_model, all_names(fresh_tiny_model))
    flip_bit(fresh_tiny_model.get_parameter(name), bit)
    with pytest.raises(RuntimeError, match=f"1 frozen parameters moved, the first is {name}"):
        check_unmoved(fresh_tiny_model, before)
    flip_bit(fresh_tiny_model.get_parameter(name), bit)
    check_unmoved(fresh_tiny_model, before)


def test_minus_zero_is_not_zero(fresh_tiny_model):
    weight = fresh_tiny_model.blocks[0].attn.W_Q
    weight.data[0, 0, 0] = 0.0
    before = parameter_hashes(fresh_tiny_model, ["blocks.0.attn.W_Q"])
    weight.data[0, 0, 0] = -0.0
    with pytest.raises(RuntimeError, match="moved"):
        check_unmoved(fresh_tiny_model, before)


def test_only_the_named_are_looked_at(fresh_tiny_model):
    before = parameter_hashes(fresh_tiny_model, ["blocks.1.mlp.W_in"])
    flip_bit(fresh_tiny_model.blocks[2].mlp.W_in, 0)
    check_unmoved(fresh_tiny_model, before)


def test_the_layout_in_memory_does_not_matter(fresh_tiny_model):
    weight = fresh_tiny_model.blocks[0].mlp.W_in
    before = parameter_hashes(fresh_tiny_model, ["blocks.0.mlp.W_in"])
    weight.data = weight.data.T.contiguous().T
    assert not weight.is_contiguous()
    check_unmoved(fresh_tiny_model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_number_formats_have_bits_as_well(make_tiny_model, dtype):
    model = make_tiny_model(n_layers=1).to(dtype)
    before = parameter_hashes(model, all_names(model))
    model.blocks[0].ln1.w.data.view(torch.uint8)[0] ^= 1
    with pytest.raises(RuntimeError, match=r"first is blocks\.0\.ln1\.w"):
        check_unmoved(model, before)
