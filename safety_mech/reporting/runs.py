"""The folder that a run leaves behind: config, metrics, tensors and figures.

`results/<experiment>/<model>/<stamp>/` is written under a temporary name and renamed at the end: a killed run leaves
nothing. Torch is imported only when a run is written, for every command checks its output folder first.
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import matplotlib.figure
    import torch

PACKAGES = ("safety-mech", "torch", "transformer-lens", "transformers", "numpy")


def write_run(
    out: str | Path,
    experiment: str,
    model_name: str,
    *,
    config: Any,
    metrics: Mapping[str, Any],
    tensors: Mapping[str, "torch.Tensor"] | None = None,
    figures: Mapping[str, "matplotlib.figure.Figure"] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Path:
    """Write one run and return its folder, OUT/EXPERIMENT/MODEL/STAMP.

    Args:
        config: a dataclass; becomes config.json.
        metrics: becomes metrics.json, with versions, machine and threads added.
        tensors: all in tensors.safetensors, under their names.
        figures: each becomes NAME.png.
        texts: files by name.
    """
    parent = Path(out) / experiment / safe_name(model_name)
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=parent))
    partial.chmod(0o755)
    try:
        write_json(partial / "config.json", plain(config))
        write_json(partial / "metrics.json", {**plain(metrics), "environment": environment()})
        if tensors:
            from safetensors.torch import save_file

            copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(copies, partial / "tensors.safetensors")
        for name, figure in (figures or {}).items():
            figure.savefig(partial / f"{name}.png", dpi=150)
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        return _rename_to_stamp(partial, parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_writable(out: str | Path) -> None:
    """Raise ValueError if runs cannot be written under `out`: before an hour of work, not after it."""
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output folder {str(out)!r} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise ValueError(f"output folder {str(out)!r} is not writable")


def safe_name(model_name: str) -> str:
    """A model's name as a folder's: the last part of a path, nothing but letters, digits, dot, dash, underscore."""
    last = Path(model_name).name or "model"
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", last)
    return cleaned if cleaned.strip(".") else "model"


def _rename_to_stamp(partial: Path, parent: Path) -> Path:
    """Rename to the time of now; with a number behind it where another run ended in the same second."""
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    for name in [stamp, *(f"{stamp}-{number}" for number in range(2, 1000))]:
        if (parent / name).exists():
            continue
        try:
            return partial.rename(parent / name)
        except OSError:  # made by another process since we looked
            if not (parent / name).exists():
                raise
    raise ValueError(f"{parent}: a thousand runs in one second")


def environment() -> dict[str, Any]:
    """Versions, machine and threads: what the same numbers need beside the same seed."""
    import torch

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def package_version(package: str) -> str | None:
    """The version of an installed package; None for one that is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """Dataclasses, tensors, paths and tuples as what JSON knows; numbers that JSON does not know become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(as_list := getattr(value, "tolist", None)):  # tensors, arrays and numbers of numpy
        return plain(as_list())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)


def content_hash(*parts: Any) -> str:
    """First 16 hex digits of the SHA-256 of what JSON knows: names a file by everything that its content depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def cell_path(
    out: str | Path, experiment: str, model_name: str, label: str, *key: Any, modules: Sequence[ModuleType] = ()
) -> Path:
    """OUT/EXPERIMENT/MODEL/cells/LABEL-DIGEST.json: where one cached answer of an experiment is.

    The digest is of the package's version, the constants of `modules` and `key`: everything that the answer depends on.
    So an old answer is never read as a new one.
    """
    digest = content_hash(package_version("safety-mech"), constants_of(*modules), plain(key))
    return Path(out) / experiment / safe_name(model_name) / "cells" / f"{label}-{digest}.json"


def constants_of(*modules: ModuleType) -> dict[str, Any]:
    """Upper-case names of modules that hold a number, a text, a dataclass, or a tuple of these."""
    return {
        f"{module.__name__}.{name}": plain(value)
        for module in modules
        for name, value in sorted(vars(module).items())
        if name.isupper() and _is_constant(value)
    }


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, (int, float, str)) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def cached_json(path: Path, make: Callable[[], Any]) -> Any:
    """Read the JSON file at `path`; where there is none, call `make`, write what it returns there, and return that.

    A killed run continues this way: its finished parts are read. The path has to name everything that the content
    depends on (`content_hash`), or an old file is taken for a new one.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, plain(make()))
    return json.loads(path.read_text("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write via a temporary name, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)
