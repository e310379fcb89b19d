"""Resident memory of this process, and the peak of a part of its run, as Linux counts them."""

import ctypes.util
import gc
from pathlib import Path


def start_of_peak() -> int | None:
    """Free what can be freed, and set the kernel's high-water mark to what is resident now; returns that, in bytes.

    None where the kernel has no such mark (only Linux has).
    """
    gc.collect()
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except OSError:
        return None


def resident(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its peak since the mark was set) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
