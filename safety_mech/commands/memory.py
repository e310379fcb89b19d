"""Resident memory of this process, and its peak over a part of the run."""

import gc
import re
from pathlib import Path

import psutil


def start_of_peak() -> int | None:
    """Free what can be freed, and set the kernel's high-water mark to what is resident now; returns that, in bytes.

    None where the kernel has no such mark (only Linux has).
    """
    gc.collect()
    if hasattr(psutil, "heap_trim"):  # not on every platform
        psutil.heap_trim()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return psutil.Process().memory_info().rss


def peak_since(start: int | None) -> int | None:
    """Bytes by which the high-water mark, which psutil does not read, lies above `start`; None where that is None."""
    if start is None:
        return None
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 - start
