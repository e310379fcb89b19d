"""What the benchmarks share: a process for each method, timing, padded batches, the weights that are scaled."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils import benchmark

from safety_mech.layers import LayerRange
from safety_mech.models.chat import ChatTokens
from safety_mech.models.parameters import PROJECTIONS
from safety_mech.training.loop import Example

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


def pad(rows: Sequence[ChatTokens | Example], side: str = "left") -> Padded:
    """A batch for transformers."""
    tokens = pad_sequence([row.tokens for row in rows], True, padding_side=side)
    return tokens, pad_sequence([torch.ones_like(row.tokens) for row in rows], True, padding_side=side)


def padded_batches(chats: Sequence[ChatTokens], size: int) -> Iterator[Padded]:
    """Batches in the given order, padded on the left."""
    return (pad(chats[first : first + size]) for first in range(0, len(chats), size))


def answer_greedily(model: Any, batch: Padded, tokens: int, **options: Any) -> Any:
    """What transformers' `generate` returns for a batch that is padded on the left."""
    rows, mask = batch
    settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0, "num_beams": 1, **options}
    return model.generate(rows, attention_mask=mask, **settings)


def projections(model: Any, layers: LayerRange) -> list[nn.Linear]:
    """The paper's seven of every layer of the range, in a Llama-like model of transformers."""
    blocks = model.model.layers[layers.start : layers.end + 1]
    return [block.get_submodule(projection.module) for block in blocks for projection in PROJECTIONS]
