"""From a transformers model to a HookedTransformer: TransformerLens' own conversion, its gaps closed or refused."""

import tempfile
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CONTEXT = 2048
"""Tokens of context that a loaded model is given, at most: plenty for prompts, and cheap to hold."""


def to_hooked(
    hf_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    process_weights: bool = False,
    n_ctx: int | None = None,
) -> HookedTransformer:
    """Convert a transformers model, with TransformerLens' own weight conversion for its architecture."""
    cfg, state_dict = _hooked_config_and_weights(hf_model, dtype, n_ctx)
    cfg.device = device
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # HookedTransformer goes in TransformerLens 4: see loading.py
        model = HookedTransformer(cfg, move_to_device=False)
    names = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(state_dict, **dict.fromkeys(names, process_weights))
    model.to(device, print_details=False)
    restore_linear_layout(model)
    _attach_tokenizer(model, tokenizer)
    ends = getattr(hf_model.generation_config, "eos_token_id", None)
    # Read by chat.end_tokens: a chat model ends its turns with other tokens than its tokenizer's EOS.
    vars(model)["generation_ends"] = () if ends is None else tuple(torch.tensor(ends).flatten().tolist())
    return model.eval()


def _hooked_config_and_weights(
    hf_model: PreTrainedModel, dtype: torch.dtype, n_ctx: int | None
) -> tuple[HookedTransformerConfig, dict[str, Tensor]]:
    """TransformerLens reads a config from a folder whose NAME decides the family: give it a neutral one."""
    architecture = hf_model.config.architectures[0] if hf_model.config.architectures else type(hf_model).__name__
    hf_model.config.architectures = [architecture]
    if architecture == "GPT2LMHeadModel" and not hasattr(hf_model.config, "n_ctx"):
        hf_model.config.n_ctx = hf_model.config.n_positions  # TransformerLens reads the older name
    _refuse_what_would_be_dropped(architecture, hf_model.config)
    with tempfile.TemporaryDirectory(prefix="model-") as name:
        folder = _NeutralPath(name)
        hf_model.config.save_pretrained(folder)
        try:
            if architecture == "GemmaForCausalLM":
                cfg = HookedTransformerConfig.from_dict(_gemma_config(hf_model.config))
            else:
                cfg = get_pretrained_model_config(folder, hf_cfg=hf_model.config.to_dict(), dtype=dtype)
        except NotImplementedError as error:
            raise ValueError(
                f"architecture {architecture} is not supported by TransformerLens 3.9: try a Llama, Mistral, Gemma, "
                "Phi-3, Qwen or GPT-2 model"
            ) from error
        cfg.dtype = dtype
        _correct_config(cfg, hf_model.config, n_ctx)
        return cfg, get_pretrained_state_dict(folder, cfg, hf_model=hf_model, dtype=dtype)


class _NeutralPath(str):
    """A path in which TransformerLens' search for "llama" and "gemma" finds nothing, wherever TMPDIR is."""

    def lower(self) -> str:
        return "model"


def _refuse_what_would_be_dropped(architecture: str, config: Any) -> None:
    """What TransformerLens' conversion leaves out without a word: the logits would be others."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind, llama = rope.get("rope_type", "default"), architecture == "LlamaForCausalLM"
    plain = architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    gemma = architecture == "GemmaForCausalLM"
    may_have_biases = llama or gemma or architecture in ("Qwen3ForCausalLM", "OlmoForCausalLM", "OlmoeForCausalLM")
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
    dropped = {
        f"rope_type {kind!r}": (plain or gemma or "Phi3" in architecture)
        and kind not in ("default", "dynamic", *["llama3"] * llama),
        "attention_bias": may_have_biases and getattr(config, "attention_bias", False),
        "mlp_bias": llama and getattr(config, "mlp_bias", False),
        "hidden_act": gemma and config.hidden_act not in ("gelu", "gelu_pytorch_tanh"),
        "partial_rotary_factor": architecture == "Phi3ForCausalLM" and partial != 1.0,
        "use_sliding_window": architecture.startswith("Qwen") and getattr(config, "use_sliding_window", False),
    }
    if found := [name for name, there in dropped.items() if there]:
        raise ValueError(
            f"{architecture} with {', '.join(found)}: TransformerLens 3.9 would drop it, and give other logits; "
            "use a checkpoint without it"
        )


def _correct_config(cfg: HookedTransformerConfig, hf_config: Any, n_ctx: int | None) -> None:
    head = getattr(hf_config, "head_dim", None)
    if head and head != cfg.d_head:  # TransformerLens takes hidden_size / heads for granted
        cfg.d_head, cfg.rotary_dim = head, head
        cfg.attn_scale = head**0.5
    if getattr(hf_config, "n_inner", None):
        cfg.d_mlp = hf_config.n_inner
    if n_ctx is not None and n_ctx < 1:
        raise ValueError(f"n_ctx = {n_ctx}: expected at least 1 token")
    own = getattr(hf_config, "max_position_embeddings", None) or cfg.n_ctx
    learnt_positions = cfg.positional_embedding_type == "standard"  # W_pos has just that many rows
    cfg.n_ctx = own if learnt_positions else min(n_ctx or MAX_CONTEXT, own)
    cfg.tokenizer_name = None
    cfg.init_weights = False


def _gemma_config(hf_config: Any) -> dict[str, Any]:
    """Gemma 1 of any size: TransformerLens knows only the two that Google released, by name."""
    return {
        "d_model": hf_config.hidden_size,
        "d_head": hf_config.head_dim,
        "n_heads": hf_config.num_attention_heads,
        "n_key_value_heads": hf_config.num_key_value_heads,
        "d_mlp": hf_config.intermediate_size,
        "n_layers": hf_config.num_hidden_layers,
        "n_ctx": hf_config.max_position_embeddings,
        "eps": hf_config.rms_norm_eps,
        "d_vocab": hf_config.vocab_size,
        # Gemma was trained with the tanh form, also where an old config says "gelu".
        "act_fn": "gelu_pytorch_tanh",
        "normalization_type": "RMS",
        "positional_embedding_type": "rotary",
        "rotary_base": int((hf_config.rope_parameters or {}).get("rope_theta", 10000)),
        "rotary_dim": hf_config.head_dim,
        "use_attn_scale": True,
        "gated_mlp": True,
        "final_rms": True,
        "original_architecture": "GemmaForCausalLM",
        "init_weights": False,
    }


def restore_linear_layout(model: nn.Module) -> None:
    """Lay each weight out in memory as the product that reads it wants it; values and shapes stay.

    TransformerLens stores transposes (`W_in[d_model, d_mlp]`) and calls `.T.contiguous()` in every forward:
    a copy of all weights a pass, among them the unembedding's. With the checkpoint's own layout behind the
    same shape that call copies nothing. Measured in experiments/benchmarks/residuals.py.
    """
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("W_in", "W_gate", "W_out", "W_U") and parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
        elif leaf in ("W_Q", "_W_K", "_W_V", "W_K", "W_V") and parameter.ndim == 3:
            parameter.data = parameter.data.transpose(1, 2).contiguous().transpose(1, 2)
        elif leaf == "W_O" and parameter.ndim == 3:  # stored [head d_head d_model], read [d_model (head d_head)]
            parameter.data = parameter.data.permute(2, 0, 1).contiguous().permute(1, 2, 0)


def _attach_tokenizer(model: HookedTransformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the tokenizer as it came: TransformerLens' own setter would load it again, with a BOS forced on."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    model.tokenizer = tokenizer
    prepends = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    model.cfg.tokenizer_prepends_bos = prepends
    model.cfg.default_prepend_bos = prepends
