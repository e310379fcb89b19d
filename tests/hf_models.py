"""Small transformers models of several architectures, all weights random, saved as a checkpoint is."""

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import build_tokenizer, randomise
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
