"""Export a fine-tuned model to a folder that transformers loads: config and tokenizer of the base, and the weights of
the HookedTransformer (Llama family).

Tied embeddings are two tensors in a HookedTransformer, and training may move them apart: an export stays tied only
while they are equal, and says `tie_word_embeddings: false` otherwise.
Everything is written under a temporary name first: a kill leaves no half file or folder under the name given.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from safety_mech.models.loading import load_transformers
from safety_mech.models.parameters import as_linear, block_projections
from safety_mech.training.lora import is_adapter_parameter

LLAMA_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
"""Architectures with the same names for everything that is exported; SmolLM2 is a Llama."""


def export_transformers(
    model: HookedTransformer, base: str | Path, folder: str | Path, *, overwrite: bool = False
) -> Path:
    """Write `model` as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` loads; return the folder.

    1. config and tokenizer come from `base`: what `model` was loaded from, a name that `load_model` understands;
    2. weights come from `model`: projections, norms, embedding, unembedding, Qwen2's biases of q, k and v;
    3. all of it goes to a temporary folder beside `folder`, which is renamed at the end.

    `overwrite`: replace a model that is in `folder` already. Weights keep the model's number format, in one file.
    Raises ValueError for a base outside the Llama family or of another shape than `model`, for folded weights, for
    weights that the architecture has no place for, for low-rank updates that are still on the model, and for a
    folder that is not empty.
    """
    folder = Path(folder).expanduser().resolve()
    _check_folder(folder, overwrite)
    _check_exportable(model)
    hf_model, tokenizer = load_transformers(base, model.embed.W_E.dtype)
    config = hf_model.config
    config.architectures = config.architectures or [type(hf_model).__name__]  # a GGUF file does not name it
    _check_same_kind(model, config, str(base))
    config.tie_word_embeddings = bool(config.tie_word_embeddings) and torch.equal(model.embed.W_E, model.unembed.W_U.T)
    weights = _linear_weights(model, biases=config.architectures[0] == "Qwen2ForCausalLM")
    _check_shapes(str(base), hf_model.state_dict(), weights)
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    try:
        partial.chmod(0o755)
        _write_folder(partial, hf_model, tokenizer, weights)
        _put_in_place(partial, folder, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _linear_weights(model: HookedTransformer, biases: bool) -> dict[str, Tensor]:
    """All weights under transformers' names; ValueError for one that is not zero and has no name there."""
    left = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights = {
        "model.embed_tokens.weight": left.pop("embed.W_E"),
        "model.norm.weight": left.pop("ln_final.w"),
        "lm_head.weight": left.pop("unembed.W_U").T,
    }
    projections = block_projections(model)
    for layer in range(model.cfg.n_layers):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        weights[f"{there}.input_layernorm.weight"] = left.pop(f"{here}.ln1.w")
        weights[f"{there}.post_attention_layernorm.weight"] = left.pop(f"{here}.ln2.w")
        for projection in projections:
            weight = left.pop(f"{here}.{projection.hooked}")
            weights[f"{there}.{projection.module}.weight"] = as_linear(projection, weight, model)
        for projection in projections[:3] if biases else ():
            bias = left.pop(f"{here}.{projection.hooked}".replace("W_", "b_"))
            weights[f"{there}.{projection.module}.bias"] = rearrange(bias, "head d_head -> (head d_head)")
    lost = [name for name, parameter in left.items() if parameter.any()]
    if lost:
        raise ValueError(
            f"{lost[0]} is not zero, and the base's architecture has no place for it ({len(lost)} such weights): "
            "set it to zero before the export"
        )
    return weights


def _check_exportable(model: HookedTransformer) -> None:
    if any(is_adapter_parameter(name) for name, _ in model.named_parameters()):
        raise ValueError(
            "low-rank updates are still on the model: save them with save_adapter, and export without them"
        )
    if model.cfg.normalization_type != "RMS":
        raise ValueError(
            f"normalization {model.cfg.normalization_type!r}: expected 'RMS', a Llama-like model with its norms; "
            "load it with process_weights=False, folded weights cannot be exported"
        )


def _check_same_kind(model: HookedTransformer, config: Any, base: str) -> None:
    """What the shapes do not show, too: the same weights under another eps or rotary base give other logits."""
    architecture = config.architectures[0]
    if architecture not in LLAMA_FAMILY:
        raise ValueError(f"base {base!r} is a {architecture}: export knows {', '.join(LLAMA_FAMILY)} only")
    cfg, rope = model.cfg, getattr(config, "rope_parameters", None) or {}
    pairs = {
        "architecture": (architecture, cfg.original_architecture or architecture),
        "layers": (config.num_hidden_layers, cfg.n_layers),
        "width": (config.hidden_size, cfg.d_model),
        "MLP width": (config.intermediate_size, cfg.d_mlp),
        "heads": (config.num_attention_heads, cfg.n_heads),
        "key-value heads": (config.num_key_value_heads, cfg.n_key_value_heads or cfg.n_heads),
        "vocabulary": (config.vocab_size, cfg.d_vocab),
        "activation": (config.hidden_act, cfg.act_fn),
        "norm eps": (config.rms_norm_eps, cfg.eps),
        "rotary base": (float(rope.get("rope_theta", cfg.rotary_base)), float(cfg.rotary_base)),
    }
    for name, (expected, given) in pairs.items():
        if expected != given:
            raise ValueError(
                f"base {base!r} has {name} {expected}, the model {given}: name the base that the model was loaded from"
            )


def _check_shapes(base: str, given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names and shapes, or a ValueError that names the first difference."""
    if missing := [name for name in expected if name not in given]:
        raise ValueError(f"base {base!r} lacks {len(missing)} weights of the model, the first is {missing[0]}")
    if extra := [name for name in given if name not in expected]:
        raise ValueError(f"base {base!r} has {len(extra)} weights that the model lacks, the first is {extra[0]}")
    for name, weight in expected.items():
        found, wanted = tuple(given[name].shape), tuple(weight.shape)
        if found != wanted:
            raise ValueError(f"base {base!r}: {name} has shape {found}, expected {wanted} as in the model")


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Only a model is ever replaced: `overwrite` must not delete what else somebody keeps in a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is a file: expected a folder to export to")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"folder {str(folder)!r} is not empty: name another, or pass overwrite=True to replace a model"
        )
    if not (folder / "config.json").is_file() or any(path.is_dir() for path in folder.iterdir()):
        raise ValueError(f"folder {str(folder)!r} holds other things than a model: it is not overwritten, name another")


def _write_folder(folder: Path, hf_model: Any, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor]) -> None:
    hf_model.config.dtype = weights["model.embed_tokens.weight"].dtype
    hf_model.config.save_pretrained(folder)
    if hf_model.generation_config is not None:  # as it is: save_pretrained refuses what some checkpoints hold
        hf_model.generation_config.to_json_file(folder / "generation_config.json")
    tokenizer.save_pretrained(folder)
    tensors = {name: weight.cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _put_in_place(partial: Path, folder: Path, overwrite: bool) -> None:
    """Rename, with the old model set aside until the new one stands."""
    _check_folder(folder, overwrite)  # again: writing took a while
    if not folder.exists() or not any(folder.iterdir()):
        partial.replace(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=".old-", dir=folder.parent))
    folder.replace(old)
    try:
        partial.replace(folder)
    except OSError:
        old.replace(folder)
        raise
    shutil.rmtree(old)
