"""One table, two languages: a projection's weight goes from transformers to TransformerLens and back unchanged."""

from typing import Any

import pytest
import torch
import transformers
from tiny import GPT2_STYLE, build_tokenizer, randomise
from transformers import LlamaConfig, LlamaForCausalLM

from safety_mech.models.conversion import to_hooked
from safety_mech.models.parameters import PROJECTIONS, as_hooked, as_linear, block_projections
from safety_mech.training.lora import low_rank_adapters

HEADS = {"grouped queries": 2, "no grouped queries": None}


@pytest.fixture(params=list(HEADS.values()), ids=list(HEADS))
def model(request, make_tiny_model):
    return make_tiny_model(n_layers=2, n_key_value_heads=request.param)


def weights_of(model, layer: int = 0) -> dict[str, torch.Tensor]:
    block = model.blocks[layer]
    return {projection.module: block.get_parameter(projection.hooked) for projection in block_projections(model)}


def test_there_are_seven(model):
    assert [projection.module.split(".")[1] for projection in block_projections(model)] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]


def test_keys_and_values_have_their_name_by_the_kind_of_attention(model):
    grouped = model.cfg.n_key_value_heads is not None
    expected = ("attn._W_K", "attn._W_V") if grouped else ("attn.W_K", "attn.W_V")
    assert tuple(projection.hooked for projection in block_projections(model))[1:3] == expected


@pytest.mark.parametrize("index", range(len(PROJECTIONS)), ids=[p.module for p in PROJECTIONS])
def test_there_and_back_is_the_identity(model, index):
    projection = block_projections(model)[index]
    hooked = model.blocks[0].get_parameter(projection.hooked)
    linear = as_linear(projection, hooked, model)
    assert linear.ndim == 2
    again = as_hooked(projection, linear, model)
    assert again.shape == hooked.shape
    assert torch.equal(again, hooked)
    other = torch.randn(linear.shape, generator=torch.Generator().manual_seed(index))
    assert torch.equal(as_linear(projection, as_hooked(projection, other, model), model), other)
    assert not torch.equal(as_hooked(projection, other, model), hooked)


def test_a_view_and_no_copy(model):
    for projection in block_projections(model):
        linear = as_linear(projection, model.blocks[0].get_parameter(projection.hooked), model).contiguous()
        assert as_hooked(projection, linear, model).data_ptr() == linear.data_ptr()


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_linear_shape_is_transformers_own_weight(kv_heads):
    """The oracle: TransformerLens' conversion of a small Llama whose heads are wider than hidden_size / heads."""
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 20, "head_dim": 8, "intermediate_size": 28, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": kv_heads}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, **heads))
    randomise(llama, seed=1)
    hooked = to_hooked(llama.eval(), tokenizer)
    for layer in range(2):
        for projection in block_projections(hooked):
            linear = as_linear(projection, hooked.blocks[layer].get_parameter(projection.hooked), hooked)
            module = llama.model.layers[layer].get_submodule(projection.module)
            assert torch.equal(linear, module.get_parameter("weight"))


def test_a_weight_of_another_shape_is_refused(model):
    query, *_, down = block_projections(model)
    with pytest.raises(Exception, match="shape"):
        as_hooked(query, torch.zeros(6, 16), model)  # 6 rows are not 4 heads
    with pytest.raises(Exception, match=r"shape|expected"):
        as_linear(down, torch.zeros(4, 4, 16), model)


def test_gpt2_is_refused(make_tiny_model):
    with pytest.raises(ValueError, match=r"no mlp\.W_gate: expected a gated, Llama-like architecture"):
        block_projections(make_tiny_model(**GPT2_STYLE))


def test_a_real_gpt2_is_refused():
    tokenizer = build_tokenizer()
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 32, "n_ctx": 32}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(tokenizer), **sizes))
    with pytest.raises(ValueError, match="Llama-like"):
        block_projections(to_hooked(gpt2.eval(), tokenizer))


@pytest.mark.parametrize("kv_heads", [2, None])
def test_projections_are_found_under_low_rank_updates_as_well(make_tiny_model, kv_heads):
    model = make_tiny_model(n_layers=1, n_key_value_heads=kv_heads)
    plain = block_projections(model)
    with low_rank_adapters(model, rank=1):
        assert block_projections(model) == plain
