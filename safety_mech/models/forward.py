"""Run a HookedTransformer's blocks from one layer to another, on top of the cached keys and values of a shared prefix.

`HookedTransformer.forward` does the same and more: it wants an attention mask with every cache, unembeds every
position, and checks that the cache's batch is the input's. Here nothing is padded (chat.py). No mask is needed, one
cached prefix serves a batch of any size, and only the last position is unembedded. Every hook point of the blocks
fires as usual; on top of a shared prefix it sees only the positions after the prefix. docs/method.md#prefix-sharing
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as CacheEntry
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.activation_functions import apply_softcap

from safety_mech.models.chat import ChatTokens, equal_length_batches, shared_prefix_length

Hooks = list[tuple[str | Callable[..., Any], Callable[..., Any]]]
"""(hook point, function) pairs, as `HookedTransformer.hooks(fwd_hooks=...)` takes them."""

Cache = list[CacheEntry]
"""Keys (before rotation) and values, one entry a layer."""


@dataclass(frozen=True)
class PrefixCache:
    """The tokens that all prompts start with, and their keys and values in every layer (batch of one)."""

    tokens: Int[Tensor, " pos"]
    cache: Cache

    def __len__(self) -> int:
        return len(self.tokens)

    def cache_for(self, batch: int, frozen: bool = True) -> Cache:
        """Entries for a batch: views, no copy. `frozen` entries are not extended by the tokens that run on them."""
        return [
            CacheEntry(entry.past_keys.expand(batch, -1, -1, -1), entry.past_values.expand(batch, -1, -1, -1), frozen)
            for entry in self.cache
        ]


def check_one_device(model: HookedTransformer) -> None:
    """Raise ValueError for a model that is spread over several devices: activations are held on one."""
    if model.cfg.n_devices > 1:
        raise ValueError(f"n_devices = {model.cfg.n_devices}: expected a model on one device; load it with n_devices=1")


def embed(
    model: HookedTransformer,
    tokens: Int[Tensor, "prompt pos"],
    offset: int = 0,
    attention_mask: Int[Tensor, "prompt all_pos"] | None = None,
) -> Float[Tensor, "prompt pos d_model"]:
    """The residual stream before layer 0, of tokens that stand at positions offset, offset+1, ...

    `attention_mask`: only where rows of a merged cache are padded on the left (see `merge_caches`).
    """
    check_one_device(model)
    resid = model.hook_embed(model.embed(tokens))
    kind = model.cfg.positional_embedding_type
    if kind == "standard":
        return resid + model.hook_pos_embed(model.pos_embed(tokens, offset, attention_mask))
    if kind != "rotary":
        raise ValueError(f"positional embedding {kind!r} is not supported: expected standard or rotary")
    return resid


def run_blocks(
    model: HookedTransformer,
    resid: Float[Tensor, "prompt pos d_model"],
    start: int = 0,
    stop: int | None = None,
    cache: Cache | None = None,
    attention_mask: Int[Tensor, "prompt all_pos"] | None = None,
) -> Float[Tensor, "prompt pos d_model"]:
    """Run blocks start..stop-1 (stop is NOT included, as in TransformerLens' `stop_at_layer`).

    `cache` has one entry for EVERY layer of the model; unfrozen entries grow by these tokens.
    """
    for layer in range(start, model.cfg.n_layers if stop is None else stop):
        entry = cache[layer] if cache else None
        resid = model.blocks[layer](resid, past_kv_cache_entry=entry, attention_mask=attention_mask)
    return resid


def unembed(model: HookedTransformer, resid: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt pos vocab"]:
    """Logits of the token after every position: final norm, unembedding, and the soft cap of a model that has one."""
    final = model.ln_final(resid) if model.cfg.normalization_type is not None else resid
    return apply_softcap(model.unembed(final), model.cfg.output_logits_soft_cap)


def unembed_last(model: HookedTransformer, resid: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, "prompt vocab"]:
    """Logits of the token after the last position, and of no other position."""
    return unembed(model, resid[:, -1:])[:, 0]


def empty_cache(model: HookedTransformer, batch: int) -> Cache:
    """Unfrozen, empty entries for every layer."""
    device = model.embed.W_E.device
    return [CacheEntry.init_cache_entry(model.cfg, device, batch) for _ in range(model.cfg.n_layers)]


def run_prefix(model: HookedTransformer, tokens: Int[Tensor, " pos"]) -> PrefixCache:
    """Run the tokens that all prompts share once, with whatever hooks the model has now; cache keys and values."""
    cache = empty_cache(model, 1)
    if len(tokens):
        run_blocks(model, embed(model, tokens[None].to(model.embed.W_E.device)), cache=cache)
    return PrefixCache(tokens, cache)


def common_prefix(model: HookedTransformer, chats: Sequence[ChatTokens], share: bool = True) -> PrefixCache:
    """The shared prefix of these prompts; empty if `share` is False (then hooks see every position)."""
    return run_prefix(model, chats[0].tokens[: shared_prefix_length(chats) if share else 0])


def stack_rest(
    model: HookedTransformer, chats: Sequence[ChatTokens], indices: Sequence[int], offset: int
) -> Int[Tensor, "prompt pos"]:
    """Tokens after the shared prefix, of prompts of equal length, on the model's device."""
    return torch.stack([chats[index].tokens[offset:] for index in indices]).to(model.embed.W_E.device)


def merge_caches(caches: Sequence[Cache]) -> tuple[Cache, Int[Tensor, "prompt all_pos"]]:
    """One cache of many, and its attention mask: shorter ones are padded on the LEFT and masked.

    For generation only: rows of different length then go on token by token in one batch. Keys are cached before
    rotation, and the blocks number positions by the mask, so that every row goes on as it would alone.
    """
    lengths = [cache[0].past_keys.shape[1] for cache in caches]
    longest = max(lengths)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, 0, longest - tensor.shape[1], 0))

    merged = [
        CacheEntry(
            torch.cat([padded(entry.past_keys) for entry in entries]),
            torch.cat([padded(entry.past_values) for entry in entries]),
        )
        for entries in zip(*caches, strict=True)
    ]
    rows = [cache[0].past_keys.shape[0] for cache in caches]
    real = torch.tensor(lengths).repeat_interleave(torch.tensor(rows))
    mask = (torch.arange(longest) >= longest - real[:, None]).long()
    return merged, mask.to(merged[0].past_keys.device)


def keep_rows(cache: Cache, rows: Bool[Tensor, " prompt"]) -> Cache:
    """The cache of some rows of a batch."""
    chosen = rows.to(cache[0].past_keys.device)
    return [CacheEntry(entry.past_keys[chosen], entry.past_values[chosen]) for entry in cache]


def read_activations(
    model: HookedTransformer,
    chats: Sequence[ChatTokens],
    point: str,
    read: Callable[[Tensor, int, list[int]], None],
    batch_tokens: int,
    share_prefix: bool,
    bar_name: str | None,
) -> None:
    """Run all prompts, and call `read` with the activation at hook point `point` of every block: (activation, layer,
    which prompts its rows are).

    The shared prefix runs once (`share_prefix=False`: with every prompt); the rest runs in batches of equal length,
    and only its positions are read. `bar_name`: what its progress bar says; None: no bar.
    """
    rows: list[int] = []

    def read_here(activation: Tensor, hook: HookPoint) -> None:
        read(activation, hook.layer(), rows)

    bar = tqdm(total=len(chats), desc=bar_name, unit="prompt", disable=bar_name is None)
    with torch.no_grad(), bar:
        prefix = common_prefix(model, chats, share_prefix)
        with model.hooks(fwd_hooks=[(f"blocks.{layer}.{point}", read_here) for layer in range(model.cfg.n_layers)]):
            for rows in equal_length_batches([len(chat) - len(prefix) for chat in chats], batch_tokens):
                tokens = stack_rest(model, chats, rows, len(prefix))
                run_blocks(model, embed(model, tokens, len(prefix)), cache=prefix.cache_for(len(rows)))
                bar.update(len(rows))
