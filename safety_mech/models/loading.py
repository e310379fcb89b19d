"""`load_model`: a hub id, a local folder, a GGUF file or a built-in name -> HookedTransformer.

This room alone builds models: TransformerLens 4 drops HookedTransformer, and what replaces it goes in here.

No weight is folded or centred unless asked: what is hooked, scaled and trained is what the checkpoint holds.
Nothing unsafe is executed: safetensors, GGUF or `weights_only` pickles; `trust_remote_code` off unless asked.
"""

import copy
import os
import warnings
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformer_lens import HookedTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from safety_mech.models.conversion import to_hooked
from safety_mech.models.sources import DTYPES, Source, built_in_folder, find_source


def load_model(
    name: str | Path,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    adapter: str | Path | None = None,
    process_weights: bool = False,
    n_ctx: int | None = None,
    trust_remote_code: bool = False,
) -> HookedTransformer:
    """Load a causal language model as a HookedTransformer, with `model.tokenizer` and its chat template.

    `name`: a built-in name, a local folder in Hugging Face format, a `.gguf` file, or a hub id.
    `device`: default "cuda" where there is one, else "cpu". `dtype`: "float32" (default), "bfloat16", "float16".
    `adapter`: a PEFT folder (LoRA) that is merged into the weights.
    `process_weights`: TransformerLens' usual folding and centring; off by default, see the module's docstring.
    `n_ctx`: context in tokens; default the model's own, at most 2,048.

    The logits equal those of transformers. Grouped-query attention stays grouped. Tied embeddings become two tensors.
    Raises ValueError, in one line, for a name that leads nowhere, a bad dtype, or an unsupported architecture.
    """
    torch_dtype = _parse_dtype(dtype)
    device = check_device(device)
    hf_model, tokenizer = load_transformers(name, torch_dtype, adapter=adapter, trust_remote_code=trust_remote_code)
    model = to_hooked(hf_model, tokenizer, device, torch_dtype, process_weights, n_ctx)
    model.cfg.model_name = str(name)
    return model


def check_device(device: str | None) -> str:
    """The device to load to: the one given, or "cuda" where there is one, else "cpu"; ValueError if it is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} cannot be used here: {reason}") from error
    return device


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return getattr(torch, dtype)


def load_transformers(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    *,
    adapter: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The same model as `load_model`, left in transformers (a PreTrainedModel): for comparisons and for export."""
    source, torch_dtype = find_source(name, adapter), _parse_dtype(dtype)
    if source.gguf_file and source.folder == built_in_folder():
        model, tokenizer = copy.deepcopy(_read_built_in(Source(source.folder, source.gguf_file), torch_dtype))
    else:
        model, tokenizer = _read_files(source, torch_dtype, trust_remote_code)
    if source.adapter is not None:
        model = _merge_adapter(model, source.adapter)
    return model.eval().requires_grad_(False), tokenizer


_HARMLESS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".position_ids",
    "lm_head.weight",
)
"""Endings of names that old checkpoints hold beside the weights: rotation frequencies, causal masks, positions, a tied
unembedding. transformers computes them itself."""


def _read_files(
    source: Source, dtype: torch.dtype, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": source.local}
    if source.gguf_file:
        kwargs["gguf_file"] = source.gguf_file
    try:
        with _QuietTransformers():
            tokenizer = AutoTokenizer.from_pretrained(source.folder, **kwargs)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder, dtype=dtype, output_loading_info=True, **kwargs
            )
        model, report = loaded
        if missing := sorted(report["missing_keys"]):
            raise ValueError(f"{len(missing)} weights are missing from the files, among them {missing[0]}")
        if extra := sorted(name for name in report["unexpected_keys"] if not name.endswith(_HARMLESS)):
            raise ValueError(
                f"{len(extra)} weights of the files have no place in the model of config.json, among them {extra[0]}: "
                "expected the config that belongs to these weights"
            )
    except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise ValueError(_why_not_loaded(source, error)) from error
    # A GGUF is de-quantised while loading, but its config goes on saying that it is quantised.
    if hasattr(model.config, "quantization_config") and source.gguf_file:
        del model.config.quantization_config
        model.hf_quantizer = None
    return model, tokenizer


_read_built_in = lru_cache(maxsize=1)(_read_files)
"""Cached in memory (half a gigabyte): unpacking takes far longer than a copy, and base and aligned share it."""


def _why_not_loaded(source: Source, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.local:
        return f"model {source.folder!r} could not be loaded: {first_line}"
    offline = ", and HF_HUB_OFFLINE is set: unset it to download" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"model {source.folder!r} could not be loaded from the hub (no such folder here{offline}): {first_line}"


def _merge_adapter(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict  # slow, and most runs need no adapter

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
        # peft drops what it finds no place for, and tells only who loads the weights once more.
        extra = set_peft_model_state_dict(adapted, load_peft_weights(str(adapter), device="cpu")).unexpected_keys
        if extra:
            raise ValueError(f"{len(extra)} of its weights have no place in the model, the first is {extra[0]}")
        return adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning) as error:
        raise ValueError(f"adapter {str(adapter)!r} does not fit this model: {str(error).splitlines()[0]}") from error


class _QuietTransformers:
    """transformers without its progress bars and loading reports: ours are the ones a user sees."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        self._bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        if self._bars:
            transformers_logging.enable_progress_bar()
