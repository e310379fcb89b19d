"""For benchmarks: a function in a process of its own, this process's peak of resident memory, padded batches."""

import ctypes.util
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from safety_mech.models.chat import ChatTokens

Returned = TypeVar("Returned")


def in_own_process(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Call a function of this module in a fresh process: no method inherits another's memory or threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            name = " ".join(str(part) for part in arguments if isinstance(part, str))
            raise ValueError(f"{function.__name__} {name}: its process was ended, perhaps for memory") from error


def start_of_peak() -> int | None:
    """Give freed memory back, set the kernel's high-water mark to what is resident now, and return that, in bytes.

    None where there is no such mark to set (it is Linux').
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


def pad_left(chats: Sequence[ChatTokens]) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]]:
    """A batch for transformers: tokens and attention mask; token 0 stands where the mask hides it."""
    longest = max(len(chat) for chat in chats)
    tokens = torch.zeros(len(chats), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, chat in enumerate(chats):
        tokens[row, longest - len(chat) :] = chat.tokens
        mask[row, longest - len(chat) :] = 1
    return tokens, mask
