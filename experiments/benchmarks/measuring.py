"""What the benchmarks share: a function in a process of its own, and padded batches."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
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


def pad_left(chats: Sequence[ChatTokens]) -> tuple[Int[Tensor, "prompt pos"], Int[Tensor, "prompt pos"]]:
    """A batch for transformers: tokens and attention mask; token 0 stands where the mask hides it."""
    longest = max(len(chat) for chat in chats)
    tokens = torch.zeros(len(chats), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, chat in enumerate(chats):
        tokens[row, longest - len(chat) :] = chat.tokens
        mask[row, longest - len(chat) :] = 1
    return tokens, mask
