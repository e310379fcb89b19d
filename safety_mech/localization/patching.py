"""Activation patching within contrastive pairs: a layer's output for the harmless prompt in the harmful run, and back
(docs/method.md#locators).

Where the two prompts of a pair have equally many tokens, they are lined up position by position. One layer's output in
one run then replaces its output in the other, and the refusal log-odds are read again. A layer whose output alone
carries "this is harmful" lowers them in the harmful run and raises them in the harmless one.

What is patched is a layer's CONTRIBUTION to the residual stream: attention output, MLP output, or both, which is
resid_post - resid_pre. The stream itself ("resid") holds all layers before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.models.chat import ChatTokens, Template, check_context, encode_chat, equal_length_batches, tokenizer_of
from safety_mech.models.forward import Cache, common_prefix, embed, run_blocks, stack_rest
from safety_mech.prompts import PromptPair
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, Chain, append_chain, chain_log_prob, log_odds, phrase_chains

PATCHES: dict[str, tuple[str, ...]] = {
    "layer": ("hook_attn_out", "hook_mlp_out"),
    "attn_out": ("hook_attn_out",),
    "mlp_out": ("hook_mlp_out",),
    "resid": ("hook_resid_post",),
}
"""Hook points of a block whose activation is exchanged."""

Positions = Literal["last", "answer", "all"]
"""last: the prompt's last token. answer: that one and the refusal phrase's tokens behind it, which both runs share.
all: every position after the shared prefix (in which the runs are equal anyway)."""

PATCH_BATCH_TOKENS = 2048
"""Tokens of both prompts a batch; residual stream and output of every layer are stored for each."""


@dataclass(frozen=True)
class Patching:
    """Refusal log-odds (nats) of contrastive pairs as they are, and with one layer's output exchanged.

    `lost`: what the harmful prompt loses by the harmless one's output; `gained`: the reverse; `effect`: their mean.
    """

    malicious: Float[Tensor, " pair"]
    normal: Float[Tensor, " pair"]
    into_malicious: Float[Tensor, "layer pair"]
    into_normal: Float[Tensor, "layer pair"]

    @property
    def lost(self) -> Float[Tensor, "layer pair"]:
        return self.malicious - self.into_malicious

    @property
    def gained(self) -> Float[Tensor, "layer pair"]:
        return self.into_normal - self.normal

    @property
    def effect(self) -> Float[Tensor, "layer pair"]:
        return (self.lost + self.gained) / 2


def equal_length_pairs(
    model: HookedTransformer, pairs: Sequence[PromptPair], template: str | Template = "own"
) -> list[PromptPair]:
    """Those pairs whose two prompts have the same number of tokens: only they can be lined up."""
    malicious, normal = _encode_sides(model, pairs, template)
    return [pair for pair, m, n in zip(pairs, malicious, normal, strict=True) if len(m) == len(n)]


def _encode_sides(
    model: HookedTransformer, pairs: Sequence[PromptPair], template: str | Template
) -> list[list[ChatTokens]]:
    """The malicious prompts of all pairs, and the normal ones."""
    sides = [[pair.malicious for pair in pairs], [pair.normal for pair in pairs]]
    return [encode_chat(tokenizer_of(model), side, template) for side in sides]


def patch_pairs(
    model: HookedTransformer,
    pairs: Sequence[PromptPair],
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
    *,
    what: str = "layer",
    positions: Positions = "last",
    batch_tokens: int = PATCH_BATCH_TOKENS,
    progress: bool = False,
) -> Patching:
    """Exchange one layer's output within contrastive pairs, layer by layer, both ways.

    1. run both prompts once, over the cached keys and values of the shared prefix; store the residual stream before,
       and the output of, every layer;
    2. for every layer k: run block k on the stored stream with the other prompt's output, then blocks k+1..end.

    Layers before k are never run again: n (n + 1) / 2 blocks instead of n^2. Positions before the first that is
    exchanged do not change; their keys and values are cached. float64, on the CPU.
    Raises ValueError for no pairs, pairs of unequal token length (naming the first), or an unknown `what`.
    """
    if what not in PATCHES:
        raise ValueError(f"what = {what!r}: expected one of {', '.join(PATCHES)}")
    if positions not in get_args(Positions):
        raise ValueError(f"positions {positions!r}: expected last, answer or all")
    malicious, normal = _encode_sides(model, pairs, template)
    for index, (m, n) in enumerate(zip(malicious, normal, strict=True)):
        if len(m) != len(n):
            raise ValueError(f"pair {index}: {len(m)} and {len(n)} tokens; take equal_length_pairs(model, pairs)")
    chains = phrase_chains(tokenizer_of(model), template, phrases)
    check_context(malicious, model.cfg.n_ctx, max(len(chain.tokens) for chain in chains))
    log_p = torch.full((1 + model.cfg.n_layers, 2, len(pairs)), -torch.inf, dtype=torch.float64)
    bar = tqdm(total=len(pairs) * len(chains), desc="patching", unit="pair", disable=not progress)
    with torch.no_grad(), bar:
        prefix = common_prefix(model, [*malicious, *normal])
        for chain in chains:
            sides = [append_chain(side, chain) for side in (malicious, normal)]
            lengths = [2 * (len(chat) - len(prefix)) for chat in sides[0]]
            for rows in equal_length_batches(lengths, batch_tokens):
                tokens = torch.cat([stack_rest(model, side, rows, len(prefix)) for side in sides])
                cache = prefix.cache_for(len(tokens), frozen=False)
                found = _patched_batch(model, tokens, len(prefix), cache, chain, PATCHES[what], positions)
                log_p[:, :, rows] = torch.logaddexp(log_p[:, :, rows], found.unflatten(1, (2, -1)))
                bar.update(len(rows))
    values = log_odds(log_p)
    return Patching(values[0, 0], values[0, 1], values[1:, 0], values[1:, 1])


def _patched_batch(
    model: HookedTransformer,
    tokens: Int[Tensor, "prompt pos"],
    offset: int,
    cache: Cache,
    chain: Chain,
    points: Sequence[str],
    positions: Positions,
) -> Float[Tensor, "row prompt"]:
    """log p of the chain's phrases: row 0 unpatched, row 1 + k with layer k exchanged. Pairs: rows i, i + half.

    `cache`: the shared prefix's, unfrozen; it is extended by the positions before the first that is exchanged.
    """
    n_read = 1 + len(chain.tokens)
    first = 0 if positions == "all" else tokens.shape[1] - n_read
    where = slice(0, 1) if positions == "last" else slice(None)
    if first:
        run_blocks(model, embed(model, tokens[:, :first], offset), cache=cache)
    for entry in cache:
        entry.frozen = True
    tokens, offset = tokens[:, first:], offset + first
    half = len(tokens) // 2
    outputs: dict[str, Tensor] = {}

    def store(activation: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> None:
        outputs[str(hook.name)] = activation

    def exchange(x: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> Float[Tensor, "prompt pos d_model"]:
        new = x.clone()
        new[:, where] = outputs[str(hook.name)].roll(half, 0)[:, where]
        return new

    def read(resid: Float[Tensor, "prompt pos d_model"]) -> Float[Tensor, " prompt"]:
        return chain_log_prob(model, resid[:, -n_read:], chain).cpu()

    n_layers = model.cfg.n_layers
    names = [[f"blocks.{layer}.{point}" for point in points] for layer in range(n_layers)]
    before = [embed(model, tokens, offset)]
    with model.hooks(fwd_hooks=[(name, store) for of_layer in names for name in of_layer]):
        for layer in range(n_layers):
            before.append(run_blocks(model, before[-1], layer, layer + 1, cache))
    rows = [read(before[-1])]
    for layer in range(n_layers):
        with model.hooks(fwd_hooks=[(name, exchange) for name in names[layer]]):
            resid = run_blocks(model, before[layer], layer, layer + 1, cache)
        rows.append(read(run_blocks(model, resid, layer + 1, cache=cache)))
    return torch.stack(rows)
