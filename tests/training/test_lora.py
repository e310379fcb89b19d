"""Low-rank updates: nothing at first, only A and B trained, off again bit for bit, and read by peft as they are."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import GPT2_STYLE, build_tokenizer, randomise
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM

from safety_mech import LayerRange, load_model
from safety_mech.interventions.scaling import scaled
from safety_mech.models.parameters import as_hooked
from safety_mech.training.loop import TrainConfig, fine_tune
from safety_mech.training.lora import (
    LowRankUpdate,
    is_adapter_parameter,
    low_rank_adapters,
    matrices_in_bfloat16,
    save_adapter,
)

PAIRS = [("How do I bake a cake?", "I'm sorry."), ("Name a fruit", "Sure, a pear."), ("Why?", "No.")]
STEPS = TrainConfig(epochs=3, batch_size=3, learning_rate=1e-2, warmup_steps=1)


def some_tokens(model: HookedTransformer, length: int = 20) -> Tensor:
    return torch.randint(model.cfg.d_vocab, (3, length), generator=torch.Generator().manual_seed(4))


def state(model: HookedTransformer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def put_in(model: HookedTransformer, placed: list) -> None:
    """The oracle: add the updates to the weights themselves, in place."""
    for layer, projection, update in placed:
        module, leaf = projection.hooked.split(".")
        weight = getattr(getattr(model.blocks[layer], module), leaf)
        weight.data += as_hooked(projection, update.scale * update.B.detach() @ update.A.detach(), model)


def randomise_updates(placed: list) -> None:
    """As after training: B is zero no longer."""
    generator = torch.Generator().manual_seed(9)
    for _, _, update in placed:
        update.B.data = 0.2 * torch.randn(update.B.shape, generator=generator)


# --- on and off ------------------------------------------------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize("style", [{}, {"n_key_value_heads": None}], ids=["grouped queries", "no grouped queries"])
def test_at_first_they_change_nothing(make_tiny_model, style):
    model = make_tiny_model(**style)
    tokens = some_tokens(model)
    before = model(tokens)
    with low_rank_adapters(model) as placed:
        assert torch.equal(model(tokens), before)
        randomise_updates(placed)
        assert not torch.allclose(model(tokens), before, atol=1e-2)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("style", [{}, {"n_key_value_heads": None}], ids=["grouped queries", "no grouped queries"])
def test_every_activation_is_that_of_changed_weights(make_tiny_model, style):
    model = make_tiny_model(**style)
    tokens = some_tokens(model)
    _, plain = model.run_with_cache(tokens)
    with low_rank_adapters(model, LayerRange(1, 2), rank=3, alpha=12.0) as placed:
        assert {update.scale for _, _, update in placed} == {4.0}
        randomise_updates(placed)
        _, adapted = model.run_with_cache(tokens)
    put_in(model, placed)
    _, changed = model.run_with_cache(tokens)
    assert set(adapted) == set(changed) == set(plain)
    for name in changed:
        torch.testing.assert_close(adapted[name], changed[name], rtol=0, atol=2e-5)
    for point in ("attn.hook_q", "attn.hook_k", "attn.hook_v", "mlp.hook_pre", "mlp.hook_pre_linear", "hook_mlp_out"):
        difference = (changed[f"blocks.1.{point}"] - plain[f"blocks.1.{point}"]).abs().max()
        assert difference > 1e-3, "control: the update changes it"


def test_the_weight_of_an_update_is_the_formula(fresh_tiny_model):
    with low_rank_adapters(fresh_tiny_model, LayerRange(1, 1), rank=3, alpha=12.0) as placed:
        randomise_updates(placed)
        for _, _, update in placed:
            torch.testing.assert_close(update.weight(), 12.0 / 3 * update.B @ update.A)


@pytest.mark.slow_cases
@pytest.mark.parametrize("point", ["attn.hook_q", "mlp.hook_pre"])
def test_an_interrupted_forward_pass_leaves_no_hook(fresh_tiny_model, point):
    """Interrupted where a tap has begun to listen; a pass after it, inside, is right; after leaving nothing is left."""
    model = fresh_tiny_model
    tokens = some_tokens(model)

    def interrupt(activation: Tensor, hook: Any) -> None:
        raise KeyboardInterrupt

    with low_rank_adapters(model) as placed:
        randomise_updates(placed)
        expected = model(tokens)
        with pytest.raises(KeyboardInterrupt), model.hooks([(f"blocks.1.{point}", interrupt)]):
            model(tokens)
        assert torch.equal(model(tokens), expected)
        with pytest.raises(KeyboardInterrupt), model.hooks([(f"blocks.1.{point}", interrupt)]):
            model(tokens)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("rank", [0, -1])
def test_a_rank_below_one_is_refused(fresh_tiny_model, rank):
    with pytest.raises(ValueError, match="expected at least 1"), low_rank_adapters(fresh_tiny_model, rank=rank):
        pass


def test_split_inputs_are_refused(fresh_tiny_model):
    fresh_tiny_model.set_use_split_qkv_input(True)
    with pytest.raises(ValueError, match="use_split_qkv_input"), low_rank_adapters(fresh_tiny_model):
        pass


def test_layers_and_sizes(fresh_tiny_model):
    with low_rank_adapters(fresh_tiny_model, LayerRange(2, 4), rank=3) as placed:
        assert [layer for layer, _, _ in placed] == [2] * 7 + [3] * 7 + [4] * 7
        sizes = {p.module: (tuple(u.A.shape), tuple(u.B.shape)) for _, p, u in placed}
    assert sizes["self_attn.q_proj"] == sizes["self_attn.o_proj"] == ((3, 16), (16, 3))
    assert sizes["self_attn.k_proj"] == sizes["self_attn.v_proj"] == ((3, 16), (8, 3))
    assert sizes["mlp.gate_proj"] == sizes["mlp.up_proj"] == ((3, 16), (32, 3))
    assert sizes["mlp.down_proj"] == ((3, 32), (16, 3))


def test_without_a_range_all_layers_have_them(fresh_tiny_model):
    with low_rank_adapters(fresh_tiny_model, rank=1) as placed:
        assert len(placed) == 6 * 7


def test_the_seed_decides_a(fresh_tiny_model):
    def drawn(seed: int) -> list[Tensor]:
        with low_rank_adapters(fresh_tiny_model, LayerRange(0, 1), rank=2, seed=seed) as placed:
            return [update.A.detach().clone() for _, _, update in placed]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[7])


def test_a_is_uniform_as_in_peft(make_tiny_model):
    """kaiming_uniform with a = sqrt(5): between -1/sqrt(in) and 1/sqrt(in)."""
    with low_rank_adapters(make_tiny_model(n_layers=1), rank=64) as placed:
        for _, _, update in placed:
            bound = update.A.shape[1] ** -0.5
            assert 0.97 * bound < float(update.A.detach().abs().max()) <= bound


@pytest.mark.slow_cases
@pytest.mark.parametrize("leave", ["plainly", "by an exception", "trained"])
def test_leaving_restores_every_bit(fresh_tiny_model, leave):
    model, tokens = fresh_tiny_model, some_tokens(fresh_tiny_model)
    before, logits = state(model), model(tokens)
    strides = {name: parameter.stride() for name, parameter in model.named_parameters()}

    def run() -> None:
        with low_rank_adapters(model, LayerRange(0, 3), rank=2) as placed:
            randomise_updates(placed)
            if leave == "trained":
                fine_tune(model, PAIRS, STEPS, trainable=is_adapter_parameter, progress=False)
            if leave == "by an exception":
                raise KeyError("on purpose")

    if leave == "by an exception":
        with pytest.raises(KeyError, match="on purpose"):
            run()
    else:
        run()
    assert same(state(model), before)
    assert {name: parameter.stride() for name, parameter in model.named_parameters()} == strides
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(tokens), logits)


@pytest.mark.slow
def test_they_can_be_put_on_again(fresh_tiny_model):
    before = state(fresh_tiny_model)
    for _ in range(2):
        with low_rank_adapters(fresh_tiny_model, rank=1) as placed:
            randomise_updates(placed)
    assert same(state(fresh_tiny_model), before)


def test_a_range_outside_the_model(fresh_tiny_model):
    with (
        pytest.raises(ValueError, match="the last is 5"),
        low_rank_adapters(fresh_tiny_model, LayerRange(4, 6)),
    ):
        pass


def test_gpt2_is_refused(make_tiny_model):
    model = make_tiny_model(**GPT2_STYLE)
    before = state(model)
    with pytest.raises(ValueError, match="Llama-like"), low_rank_adapters(model):
        pass
    assert same(state(model), before)


# --- together with training and scaling ------------------------------------------------------------------------------


def test_only_a_and_b_of_the_planted_layers_are_trained(fresh_tiny_model):
    model = fresh_tiny_model
    base = state(model)
    with low_rank_adapters(model, LayerRange(2, 3), rank=2) as placed:
        before = state(model)
        record = fine_tune(model, PAIRS, STEPS, trainable=is_adapter_parameter, progress=False)
        after = state(model)
        updates = {id(tensor) for _, _, update in placed for tensor in (update.A, update.B)}
        planted = {name for name, parameter in model.named_parameters() if id(parameter) in updates}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(planted) == 2 * 7 * 2
    assert moved == planted
    assert all(name.startswith(("blocks.2.", "blocks.3.")) for name in planted)
    assert record.n_trained == sum(before[name].numel() for name in planted)
    assert record.steps[-1].loss < record.steps[0].loss
    assert same(state(model), base)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.2.attn.low_rank_W_Q.A", True),
        ("blocks.2.mlp.low_rank_W_in.B", True),
        ("blocks.2.attn.W_Q", False),
        ("blocks.2.attn.A", False),
    ],
)
def test_is_adapter_parameter(name, expected):
    assert is_adapter_parameter(name) == expected


@pytest.mark.slow_cases
@pytest.mark.parametrize("recipe", ["weights", "attn_out", "weights_no_o"])
@pytest.mark.parametrize("outer", ["adapters", "scaling"])
def test_an_update_is_scaled_as_its_weight_is(fresh_tiny_model, recipe, outer):
    """Scaling the adapted model equals scaling the model with the sum put in, whichever came first."""
    model, tokens = fresh_tiny_model, some_tokens(fresh_tiny_model)

    def adapters():
        return low_rank_adapters(model, LayerRange(1, 2), rank=2)

    def scaling():
        return scaled(model, LayerRange(2, 3), 1.3, recipe)

    if outer == "adapters":
        with adapters() as placed:
            randomise_updates(placed)
            unscaled = model(tokens)
            with scaling():
                adapted = model(tokens)
    else:
        with scaling(), adapters() as placed:
            randomise_updates(placed)
            adapted = model(tokens)
    put_in(model, placed)
    if outer == "adapters":
        assert not torch.allclose(adapted, unscaled, atol=1e-2), "control: scaling does something"
    with scaling():
        torch.testing.assert_close(model(tokens), adapted, rtol=0, atol=2e-5)


# --- saved, and read by peft -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 4], ids=["grouped queries", "no grouped queries"])
def llama_folder(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tokenizer = build_tokenizer()
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": request.param}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes, **heads))
    randomise(llama, seed=1)
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: HookedTransformer) -> Tensor:
    return model(some_tokens(model)).detach()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [None, LayerRange(1, 2)], ids=["everywhere", "planted"])
@pytest.mark.parametrize("how", ["at random", "trained"])
def test_peft_reads_a_saved_adapter(llama_folder, tmp_path, layers, how):
    model = load_model(llama_folder)
    plain = logits(model)
    with low_rank_adapters(model, layers, rank=3, alpha=7.0) as placed:
        if how == "trained":
            fine_tune(model, PAIRS, STEPS, trainable=is_adapter_parameter, progress=False)
        else:
            randomise_updates(placed)
        adapted = logits(model)
        folder = save_adapter(placed, tmp_path / "new" / "adapter", str(llama_folder), torch.float32)
    assert float((adapted - plain).abs().max()) > 0.05
    torch.testing.assert_close(logits(load_model(llama_folder, adapter=folder)), adapted, rtol=0, atol=1e-5)


@pytest.mark.slow_cases
def test_a_saved_adapter_has_its_layers_only(llama_folder, tmp_path):
    with low_rank_adapters(load_model(llama_folder), LayerRange(1, 2), rank=3, alpha=6.0) as placed:
        folder = save_adapter(placed, tmp_path, "org/base")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert {int(name.split(".")[4]) for name in tensors} == {1, 2}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [1, 2]
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert config["base_model_name_or_path"] == "org/base"


@pytest.mark.slow_cases
def test_float16_is_half_as_large(llama_folder, tmp_path):
    with low_rank_adapters(load_model(llama_folder), rank=64) as placed:
        randomise_updates(placed)
        whole = save_adapter(placed, tmp_path / "whole", "org/base", torch.float32)
        half = save_adapter(placed, tmp_path / "half", "org/base")
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in (whole, half)]
    assert {tensor.dtype for tensor in tensors[1].values()} == {torch.float16}
    numbers = sum(update.A.numel() + update.B.numel() for _, _, update in placed)
    assert [sum(tensor.nbytes for tensor in part.values()) for part in tensors] == [4 * numbers, 2 * numbers]
    sizes = [(folder / "adapter_model.safetensors").stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    rounded = max(float((tensors[0][name] - tensors[1][name].float()).abs().max()) for name in tensors[0])
    assert 0 < rounded < 1e-3


def test_an_update_keeps_the_number_format_of_its_weight(make_tiny_model):
    model = make_tiny_model(n_layers=1, dtype=torch.bfloat16).to(torch.bfloat16)
    with low_rank_adapters(model, rank=2) as placed:
        assert {tensor.dtype for _, _, update in placed for tensor in (update.A, update.B)} == {torch.bfloat16}
        assert model(some_tokens(model)).isfinite().all()


def test_the_model_is_no_part_of_its_update(fresh_tiny_model):
    """Otherwise every module would hold the whole model, and a search for parameters would never end."""
    with low_rank_adapters(fresh_tiny_model, LayerRange(0, 0), rank=1) as placed:
        update = placed[0][2]
        assert isinstance(update, LowRankUpdate)
        assert [name for name, _ in update.named_parameters()] == ["A", "B"]


# --- training them faster ---------------------------------------------------------------------------------------------


def trained_updates(model: HookedTransformer, held: bool) -> dict[str, Tensor]:
    config = replace(STEPS, bfloat16=True)
    with low_rank_adapters(model, LayerRange(2, 4)) as placed:
        with matrices_in_bfloat16(model) if held else nullcontext():
            fine_tune(model, PAIRS, config, trainable=is_adapter_parameter, progress=False)
        return {f"{layer}.{p.module}": update.weight().detach().clone() for layer, p, update in placed}


@pytest.mark.slow
def test_matrices_held_in_bfloat16_train_the_same_updates_bit_for_bit(make_tiny_model):
    plain, held = (trained_updates(make_tiny_model(), held) for held in (False, True))
    assert same(plain, held)
    assert all(update.any() for update in plain.values())  # control: they were trained
    other = trained_updates(make_tiny_model(seed=1), True)
    assert not same(plain, other)


def test_only_matrices_of_blocks_and_unembedding_are_held_and_they_come_back(make_tiny_model):
    model = make_tiny_model()
    before, pointers = state(model), [parameter.data_ptr() for parameter in model.parameters()]
    kinds = {}
    stopped = pytest.raises(RuntimeError, match="stop")
    with stopped, low_rank_adapters(model), matrices_in_bfloat16(model):
        kinds |= {name: parameter.dtype for name, parameter in model.named_parameters()}
        raise RuntimeError("stop")
    held = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    leaves = {name.removeprefix("blocks.0.") for name in held if name.startswith("blocks.0.")}
    assert leaves == {f"attn.{w}" for w in ("W_Q", "_W_K", "_W_V", "W_O")} | {"mlp.W_in", "mlp.W_gate", "mlp.W_out"}
    assert {name for name in held if not name.startswith("blocks.")} == {"unembed.W_U"}
    assert same(state(model), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


@pytest.mark.slow
def test_layers_below_the_trained_ones_keep_no_graph(make_tiny_model):
    """So there is nothing to be gained by running them under no_grad."""
    model = make_tiny_model()
    with low_rank_adapters(model, LayerRange(2, 3)):
        wants: dict[str, bool] = {}

        def look(resid, hook):
            wants[hook.name] = resid.requires_grad

        with model.hooks([(f"blocks.{layer}.hook_resid_post", look) for layer in range(6)]):
            model(some_tokens(model))
    assert list(wants.values()) == [False, False, True, True, True, True]
