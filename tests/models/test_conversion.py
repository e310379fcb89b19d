"""Conversion against transformers itself: the same logits and weights, or a refusal."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import (
    TOKENIZER,
    TOLERANCE,
    distance,
    gemma,
    gpt2,
    llama,
    mistral,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    save,
    some_tokens,
)
from tiny import build_tokenizer
from tokenizers.processors import TemplateProcessing
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from safety_mech import encode_chat, load_model
from safety_mech.models.conversion import restore_linear_layout
from safety_mech.models.loading import load_transformers

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Architecture:
    """How to build a small model; what the HookedTransformer's config must say; the folder to save it in."""

    build: Callable[[], PreTrainedModel]
    n_key_value_heads: int | None
    d_head: int = 4
    folder: str = "model"


ARCHITECTURES = {
    "llama": Architecture(llama, 2),
    "llama, tied embeddings": Architecture(lambda: llama(tie_word_embeddings=True), 2),
    "llama, head_dim 8 of 16 / 4": Architecture(lambda: llama(head_dim=8), 2, d_head=8),
    "llama, as many kv heads": Architecture(lambda: llama(num_key_value_heads=4), None),
    "llama 3 rope": Architecture(lambda: llama(rope_parameters=LLAMA3_ROPE), 2),
    "gemma": Architecture(gemma, 1, d_head=8),
    "phi-3": Architecture(phi3, 2),
    "mistral": Architecture(mistral, 2),
    "qwen2": Architecture(qwen2, 2),
    "qwen3": Architecture(qwen3, 2, d_head=8),
    "qwen2 in a folder called my-llama-test": Architecture(qwen2, 2, folder="my-llama-test"),
    "qwen2 in a folder called gemma-2-9b-it": Architecture(qwen2, 2, folder="google/gemma-2-9b-it"),
    "llama in a folder called my-gemma": Architecture(llama, 2, folder="my-gemma"),
    "gpt-2": Architecture(lambda: gpt2(n_ctx=64), None),  # n_ctx as in the config.json that OpenAI's models come with
    "gpt-2 in a folder called my-llama-test": Architecture(lambda: gpt2(n_ctx=64), None, folder="my-llama-test"),
}


@pytest.fixture(scope="module", params=list(ARCHITECTURES.values()), ids=list(ARCHITECTURES))
def loaded(request, tmp_path_factory) -> tuple[Architecture, PreTrainedModel, HookedTransformer]:
    folder = tmp_path_factory.mktemp("models") / request.param.folder
    reference = save(request.param.build(), folder)
    return request.param, reference, load_model(folder)


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama-folder")
    save(llama(), folder)
    return folder


# --- the same logits ---------------------------------------------------------------------------------------------


def test_logits_equal_those_of_transformers_at_all_positions(loaded):
    _, reference, hooked = loaded
    assert distance(hooked, reference) < TOLERANCE


def test_config_keeps_grouped_query_attention_and_head_size(loaded):
    architecture, reference, hooked = loaded
    assert hooked.cfg.n_key_value_heads == architecture.n_key_value_heads
    assert hooked.cfg.d_head == architecture.d_head
    assert hooked.cfg.n_layers == reference.config.num_hidden_layers
    assert hooked.cfg.dtype == torch.float32
    assert not hooked.training


def test_grouped_keys_are_stored_once_per_group(llama_folder):
    model = load_model(llama_folder)
    assert model.blocks[0].attn._W_K.shape == (2, 16, 4)
    assert model.blocks[0].attn.W_Q.shape == (4, 16, 4)


def test_a_loaded_model_reads_its_weights_without_a_copy(loaded):
    _, _, hooked = loaded
    assert hooked.unembed.W_U.T.is_contiguous()
    assert all(block.mlp.W_out.T.is_contiguous() for block in hooked.blocks)


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight",
    ["embed.W_E", "blocks.0.attn._W_K", "blocks.1.mlp.W_gate", "blocks.2.ln2.w", "ln_final.w", "unembed.W_U"],
)
def test_one_changed_weight_is_seen(llama_folder, weight):
    reference, _ = load_transformers(llama_folder)
    hooked = load_model(llama_folder)
    assert distance(hooked, reference) < TOLERANCE
    parameter = dict(hooked.named_parameters())[weight]
    token = some_tokens()[0, 0]
    parameter.data[(token, 0) if weight == "embed.W_E" else (0,) * parameter.ndim] += 0.5
    assert distance(hooked, reference) > TOLERANCE


@pytest.mark.slow_cases
@pytest.mark.parametrize("bias", ["b_Q", "_b_K", "_b_V"])
def test_the_biases_of_qwen2_matter(tmp_path, bias):
    reference = save(qwen2(), tmp_path)
    assert reference.model.layers[0].self_attn.q_proj.bias.abs().min() > 0
    hooked = load_model(tmp_path)
    getattr(hooked.blocks[0].attn, bias).data.zero_()
    if bias == "_b_K":  # a bias on all keys shifts a query's scores alike until rotation tells positions apart
        assert distance(hooked, reference, some_tokens(length=1)) < TOLERANCE
    assert distance(hooked, reference) > TOLERANCE


UNUSUAL_FEATURES = {
    "rope linear": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "rope yarn": lambda: llama(
        rope_parameters={
            "rope_type": "yarn",
            "factor": 2.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
        }
    ),
    "rope dynamic": lambda: llama(
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, max_position_embeddings=16
    ),
    "attention bias": lambda: llama(attention_bias=True),
    "mlp bias": lambda: llama(mlp_bias=True),
    "gemma with attention bias": lambda: gemma(attention_bias=True),
    "qwen3 with attention bias": lambda: qwen3(attention_bias=True),
    "olmoe with attention bias": lambda: olmoe(attention_bias=True),
    "mistral with attention bias": lambda: mistral(attention_bias=True),
    "phi-3 with attention bias": lambda: phi3(attention_bias=True),
    "qwen2 with mlp bias": lambda: qwen2(mlp_bias=True),
    "gemma with another activation": lambda: gemma(hidden_act="silu"),
    "gemma with rope linear": lambda: gemma(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "gemma with llama 3 rope": lambda: gemma(rope_parameters=LLAMA3_ROPE),
    "phi-3 with partial rotary": lambda: phi3(hidden_size=32, partial_rotary_factor=0.5),
    "qwen2 with a sliding window": lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gpt-2 with a narrow mlp": lambda: gpt2(n_ctx=64, n_inner=40),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("feature", list(UNUSUAL_FEATURES))
def test_what_cannot_be_converted_is_refused_and_never_loaded_with_other_logits(feature, tmp_path):
    reference = save(UNUSUAL_FEATURES[feature](), tmp_path)
    try:
        hooked = load_model(tmp_path)
    except ValueError:
        return
    tokens = some_tokens(length=min(40, hooked.cfg.n_ctx))
    assert distance(hooked, reference, tokens) < TOLERANCE


@pytest.mark.slow_cases
@pytest.mark.parametrize("where", ["llama-runs", "gemma-runs", "Users/medgemma"])
def test_the_name_of_the_temporary_folder_does_not_matter(where, tmp_path, monkeypatch):
    temporary = tmp_path / where
    temporary.mkdir(parents=True)
    reference = save(qwen2(), tmp_path / "model")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    assert distance(load_model(tmp_path / "model"), reference) < TOLERANCE


def test_gpt2_whose_config_has_only_n_positions(tmp_path):
    reference = save(gpt2(), tmp_path)
    assert "n_ctx" not in json.loads((tmp_path / "config.json").read_text())
    hooked = load_model(tmp_path)
    assert hooked.cfg.n_ctx == 64
    assert distance(hooked, reference) < TOLERANCE


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.slow_cases
@pytest.mark.parametrize(("n_ctx", "expected"), [(None, 64), (20, 20), (64, 64), (500, 64)])
def test_n_ctx_is_at_most_the_models_own(llama_folder, n_ctx, expected):
    assert load_model(llama_folder, n_ctx=n_ctx).cfg.n_ctx == expected


def test_n_ctx_is_2048_at_most_unless_asked(tmp_path):
    save(llama(max_position_embeddings=8192), tmp_path)
    assert load_model(tmp_path).cfg.n_ctx == 2048
    assert load_model(tmp_path, n_ctx=4096).cfg.n_ctx == 4096


@pytest.mark.slow_cases
@pytest.mark.parametrize("build", [llama, lambda: gpt2(n_ctx=64)], ids=["llama", "gpt-2"])
def test_processing_keeps_log_probabilities_and_changes_weights(build, tmp_path):
    save(build(), tmp_path)
    plain, processed = load_model(tmp_path), load_model(tmp_path, process_weights=True)
    tokens = some_tokens()
    torch.testing.assert_close(processed(tokens).log_softmax(-1), plain(tokens).log_softmax(-1), rtol=0, atol=1e-4)
    assert not torch.equal(processed.blocks[0].mlp.W_in, plain.blocks[0].mlp.W_in)
    assert not torch.equal(processed.unembed.W_U, plain.unembed.W_U)
    assert str(processed.cfg.normalization_type).endswith("Pre")


def test_without_processing_weights_are_the_checkpoints_own(llama_folder):
    reference: Any = load_transformers(llama_folder)[0]
    hooked: Any = load_model(llama_folder)
    layer = reference.model.layers[1]
    assert torch.equal(hooked.W_E, reference.model.embed_tokens.weight)
    assert torch.equal(hooked.blocks[1].ln1.w, layer.input_layernorm.weight)
    assert torch.equal(hooked.blocks[1].mlp.W_out, layer.mlp.down_proj.weight.T)
    assert torch.equal(hooked.blocks[1].attn.W_Q[3], layer.self_attn.q_proj.weight[12:16].T)


# --- the layout of weights ---------------------------------------------------------------------------------------


def test_restore_linear_layout_keeps_values_shapes_and_identity(fresh_tiny_model):
    model = fresh_tiny_model
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    assert not model.unembed.W_U.T.is_contiguous()  # there is something to do
    restore_linear_layout(model)
    for name, parameter in model.named_parameters():
        same, values = before[name]
        assert parameter is same
        assert parameter.shape == values.shape
        assert torch.equal(parameter, values)


def test_restored_weights_are_contiguous_as_their_product_reads_them(fresh_tiny_model):
    restore_linear_layout(fresh_tiny_model)
    assert fresh_tiny_model.unembed.W_U.T.is_contiguous()
    for block in fresh_tiny_model.blocks:
        for weight in (block.mlp.W_in, block.mlp.W_gate, block.mlp.W_out):
            assert weight.T.is_contiguous()
        for weight in (block.attn.W_Q, block.attn._W_K, block.attn._W_V):
            assert weight.transpose(1, 2).is_contiguous()
        assert block.attn.W_O.permute(2, 0, 1).is_contiguous()


def test_restored_model_gives_the_same_logits(fresh_tiny_model, tiny_model):
    restore_linear_layout(fresh_tiny_model)
    tokens = some_tokens()
    torch.testing.assert_close(fresh_tiny_model(tokens), tiny_model(tokens), rtol=0, atol=1e-6)


# --- the beginning-of-sequence token -----------------------------------------------------------------------------


def tokenizer_of(model: HookedTransformer) -> PreTrainedTokenizerBase:
    assert model.tokenizer is not None
    return model.tokenizer


def prepending(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """As Llama's: a BOS before every text, and written out in the chat template as well."""
    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    processor = TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)])
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    return tokenizer


def test_a_tokenizer_that_prepends_bos_does_so_once(tmp_path):
    save(llama(), tmp_path, prepending(build_tokenizer()))
    model = load_model(tmp_path)
    bos = tokenizer_of(model).bos_token_id
    assert model.cfg.default_prepend_bos
    assert model.to_tokens("cake")[0].tolist().count(bos) == 1
    for template in ("own", "alpaca"):
        tokens = encode_chat(tokenizer_of(model), ["cake"], template)[0].tokens.tolist()
        assert tokens[0] == bos
        assert tokens.count(bos) == 1


def test_a_tokenizer_without_bos_gets_none(llama_folder):
    model = load_model(llama_folder)
    assert not model.cfg.default_prepend_bos
    assert tokenizer_of(model).bos_token_id not in model.to_tokens("cake")[0]
    assert tokenizer_of(model).bos_token_id not in encode_chat(tokenizer_of(model), ["cake"], "alpaca")[0].tokens


def test_the_tokenizer_comes_as_it_was_saved(llama_folder):
    tokenizer = tokenizer_of(load_model(llama_folder))
    assert tokenizer.chat_template == TOKENIZER.chat_template
    assert tokenizer("What is it? Ünïcödé", add_special_tokens=False).input_ids == TOKENIZER.encode(
        "What is it? Ünïcödé", add_special_tokens=False
    )
    assert tokenizer.padding_side == "right"
