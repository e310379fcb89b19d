"""What the benchmarks share: a process for each method, timing, and padded batches."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import benchmark

from safety_mech.models.chat import ChatTokens

Returned = TypeVar("Returned")
Padded = tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]]
"""Tokens and attention mask; token 0 stands where the mask hides it."""


def in_own_process(function: Callable[..., Returned], *arguments: Any) -> Returned:
    """Call a function in a fresh process: no method inherits another's memory or threads."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            name = " ".join(str(part) for part in arguments if isinstance(part, str))
            raise ValueError(f"{function.__name__} {name}: its process was ended, perhaps for memory") from error


def timed(call: Callable[[], Returned]) -> tuple[float, Returned]:
    """Seconds of one call, and what it returned."""
    start = benchmark.timer()
    returned = call()
    return benchmark.timer() - start, returned


def best_time(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, each after a warm-up."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return min(timer.timeit(1).mean for _ in range(repeats))


def pad_left(chats: Sequence[ChatTokens]) -> Padded:
    """A batch for transformers."""
    rows = [chat.tokens for chat in chats]
    masks = [torch.ones_like(chat.tokens) for chat in chats]
    tokens, mask = (pad_sequence(side, batch_first=True, padding_side="left") for side in (rows, masks))
    return tokens, mask


def padded_batches(chats: Sequence[ChatTokens], size: int) -> Iterator[Padded]:
    """Batches in the given order, padded on the left."""
    return (pad_left(chats[first : first + size]) for first in range(0, len(chats), size))


def check_at_least_one(config: object, names: str) -> None:
    """Raise ValueError for the first of these settings that is below 1."""
    for name in names.split():
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}: expected at least 1")
