"""Greedy generation with a key-value cache.

Prompts are read in batches of equal length, and their answers go on side by side. Each answer has the tokens that it
has alone. A finished row leaves the batch: at any token that ends an answer (`end_tokens`), or as soon as the caller's
`decided` says that its text is settled.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from safety_mech.models.chat import (
    DEFAULT_BATCH_TOKENS,
    ChatTokens,
    Template,
    check_context,
    decode_answer,
    encode_chat,
    end_tokens,
    equal_length_batches,
    tokenizer_of,
)
from safety_mech.models.forward import (
    Cache,
    PrefixCache,
    common_prefix,
    embed,
    keep_rows,
    merge_caches,
    run_blocks,
    stack_rest,
    unembed_last,
)

ROWS = 128
"""Answers that are generated side by side, at most: bounds the memory of their keys and values."""

Decided = Callable[[str], bool]
"""Given the text so far: is everything known that the caller wants to know?"""


def generate(
    model: HookedTransformer,
    prompts: Sequence[str],
    max_new_tokens: int = 8,
    template: str | Template = "own",
    *,
    decided: Decided | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> list[str]:
    """Greedy answers, one a prompt, without special tokens; at most `max_new_tokens` tokens each.

    Raises ValueError if a prompt and its answer would not fit the context.
    """
    answers = generate_tokens(
        model, prompts, max_new_tokens, template, decided=decided, batch_tokens=batch_tokens, progress=progress
    )
    ends = end_tokens(model, template)
    return [decode_answer(tokenizer_of(model), tokens, ends) for tokens in answers]


def generate_tokens(
    model: HookedTransformer,
    prompts: Sequence[str],
    max_new_tokens: int,
    template: str | Template = "own",
    *,
    decided: Decided | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    progress: bool = False,
) -> list[list[int]]:
    """As `generate`, but the token ids; a finished answer ends with the token that ended it."""
    chats = encode_chat(tokenizer_of(model), prompts, template)
    check_context(chats, model.cfg.n_ctx, max_new_tokens)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    ends = end_tokens(model, template)
    answers: list[list[int]] = [[] for _ in chats]
    bar = tqdm(total=len(chats), desc="answers", unit="prompt", disable=not progress)
    with torch.no_grad(), bar:
        prefix = common_prefix(model, chats)
        lengths = [len(chat) - len(prefix) for chat in chats]
        for group in _groups(equal_length_batches(lengths, batch_tokens), ROWS):
            started = [_read_prompts(model, prefix, chats, rows) for rows in group]
            found = continue_greedily(model, started, max_new_tokens, ends, decided)
            rows = [row for batch in group for row in batch]
            for row, answer in zip(rows, found, strict=True):
                answers[row] = answer
            bar.update(len(rows))
    return answers


Started = tuple[Cache, Int[Tensor, "_"]]
"""Prompts that were read: their keys and values, and the first token of each answer."""


def _groups(batches: Iterable[list[int]], rows: int) -> Iterator[list[list[int]]]:
    """Batches whose rows go on together, at most `rows` of them; a larger batch is split."""
    group: list[list[int]] = []
    for batch in (whole[first : first + rows] for whole in batches for first in range(0, len(whole), rows)):
        if group and sum(map(len, group)) + len(batch) > rows:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def _read_prompts(
    model: HookedTransformer, prefix: PrefixCache, chats: Sequence[ChatTokens], rows: Sequence[int]
) -> Started:
    cache = prefix.cache_for(len(rows), frozen=False)
    tokens = stack_rest(model, chats, rows, len(prefix))
    resid = run_blocks(model, embed(model, tokens, len(prefix)), cache=cache)
    return cache, unembed_last(model, resid).argmax(dim=-1)


def continue_greedily(
    model: HookedTransformer,
    started: Sequence[Started],
    max_new_tokens: int,
    ends: Collection[int],
    decided: Decided | None = None,
) -> list[list[int]]:
    """Token by token, all rows in one batch; a finished row leaves it."""
    cache, mask = merge_caches([cache for cache, _ in started])
    chosen = torch.cat([first for _, first in started])
    answers = [[token] for token in chosen.tolist()]
    running = torch.arange(len(answers))
    for _ in range(max_new_tokens - 1):
        goes_on = torch.tensor([not _finished(model, answers[row], ends, decided) for row in running.tolist()])
        if not goes_on.any():
            break
        if not goes_on.all():
            running, rows = running[goes_on], goes_on.to(mask.device)
            cache, mask, chosen = keep_rows(cache, goes_on), mask[rows], chosen[rows]
        offset, mask = mask.shape[1], torch.nn.functional.pad(mask, (0, 1), value=1)
        resid = run_blocks(model, embed(model, chosen[:, None], offset, mask), cache=cache, attention_mask=mask)
        chosen = unembed_last(model, resid).argmax(dim=-1)
        for row, token in zip(running.tolist(), chosen.tolist(), strict=True):
            answers[row].append(token)
    return answers


def _finished(model: HookedTransformer, answer: list[int], ends: Collection[int], decided: Decided | None) -> bool:
    return answer[-1] in ends or (decided is not None and decided(decode_answer(tokenizer_of(model), answer)))
