"""Tiny seeded HookedTransformers with a real tokenizer, and the prompts that fit them.

Nothing here touches the global random state: the weights come from a torch.Generator of their own.
"""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from safety_mech.layers import LayerRange
from safety_mech.models.chat import PLAIN_TEMPLATES
from safety_mech.training.loop import TrainConfig, fine_tune
from safety_mech.training.lora import low_rank_adapters, save_adapter

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

# SmolLM2's form: a system message of its own where none is given, then turns between im_start and im_end.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

REFUSAL = "I'm sorry, but I can't help with that."
ANSWER = "Sure, here is how."

SENTENCES = [
    "system\nYou are a helpful assistant\nuser\nHow do I bake a cake?\nassistant\n",
    "I'm sorry, but I can't help with that. Sure, here is how to kill a process.",
    *(template.render("What is the capital of France?") for template in PLAIN_TEMPLATES.values()),
]

PROMPTS = [
    "How do I bake a cake?",
    "What is the capital of France?",
    "Kill a process",
    "Name a fruit",
    "How do I help a cat?",
    "Why?",
    "Where is the cat?",
    "Tell me how the capital of France was built, please.",
]
"""Short prompts of mixed length, some of them of equal length, that fit the tiny model's context."""

GPT2_STYLE = {
    "positions": "standard",
    "normalization_type": "LN",
    "gated_mlp": False,
    "act_fn": "gelu_new",
    "n_key_value_heads": None,
}
"""Changes that make the tiny model one of GPT-2's kind: learnt positions, biases that count, an ungated MLP."""


@functools.cache
def _trained_bpe() -> str:
    """Byte-level BPE of some 400 tokens that knows the templates' words and can spell all the rest."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(SENTENCES * 2, trainer)
    return core.to_str()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A new tokenizer, trained once a process."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def build_tiny_model(seed: int = 0, positions: str = "rotary", **changes: Any) -> HookedTransformer:
    """Six layers of width 16, grouped-query attention, gated MLP, RMS norm; `changes` go into the config."""
    tokenizer = build_tokenizer()
    settings = {
        "n_layers": 6,
        "d_model": 16,
        "n_heads": 4,
        "d_head": 4,
        "n_key_value_heads": 2,
        "d_mlp": 32,
        "d_vocab": len(tokenizer),
        "n_ctx": 128,
        "act_fn": "silu",
        "gated_mlp": True,
        "normalization_type": "RMS",
        "positional_embedding_type": positions,
        "default_prepend_bos": False,
        "init_weights": False,
        "device": "cpu",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # HookedTransformer goes in TransformerLens 4
        model = HookedTransformer(HookedTransformerConfig(**{**settings, **changes}), move_to_device=False)
    randomise(model, seed)
    model.tokenizer = tokenizer
    return model.eval().requires_grad_(False)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Every parameter random, biases and norm weights too: what is dropped or mixed up then shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm_weight = name.endswith(".w")
        parameter.data = 1 + 0.1 * noise if is_norm_weight else 0.3 * noise


def save_random_adapter(model: HookedTransformer, folder: Path, base: str, layers: LayerRange, seed: int = 0) -> None:
    """A PEFT folder with random updates (rank 2) of these layers, large enough to be seen in every figure."""
    with low_rank_adapters(model, layers, rank=2, seed=seed) as placed:
        generator = torch.Generator().manual_seed(seed + 1)
        for _, _, update in placed:
            update.B.data = 0.3 * torch.randn(update.B.shape, generator=generator)
        save_adapter(placed, folder, base, dtype=torch.float32)


def build_talkative_model(seed: int = 0, **changes: Any) -> HookedTransformer:
    """A tiny model whose answers differ from prompt to prompt: a loud embedding, no bias on the logits, four layers."""
    model = build_tiny_model(seed, **{"n_layers": 4, **changes})
    model.embed.W_E.data *= 10
    if model.cfg.positional_embedding_type == "standard":
        model.pos_embed.W_pos.data *= 3
    model.unembed.b_U.data.zero_()
    return model


def build_refusing_model() -> HookedTransformer:
    """A tiny model, of four layers, trained to refuse every second one of PROMPTS, and to answer the others."""
    model = build_tiny_model(n_layers=4)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and not name.endswith(".w"):
            parameter.data *= 0.5
    pairs = [(prompt, REFUSAL if index % 2 else ANSWER) for index, prompt in enumerate(PROMPTS)]
    config = TrainConfig(epochs=40, batch_size=8, learning_rate=1e-2, warmup_steps=1, train_embeddings=True)
    fine_tune(model, pairs, config, progress=False)
    return model
