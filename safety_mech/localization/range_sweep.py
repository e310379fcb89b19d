"""What scaling a range does to refusals: many ranges of one model, whose common work is done once
(docs/method.md#prefix-sharing). The results are those of the full forward.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache_entry import TransformerLensKeyValueCacheEntry as CacheEntry

from safety_mech.interventions.scaling import Recipe, check_alpha, find_recipe, scaled
from safety_mech.layers import LayerRange
from safety_mech.models.chat import (
    DEFAULT_BATCH_TOKENS,
    ChatTokens,
    Template,
    check_context,
    decode_answer,
    encode_chat,
    end_tokens,
    equal_length_batches,
    shared_prefix_length,
    tokenizer_of,
)
from safety_mech.models.forward import embed, stack_rest, unembed_last
from safety_mech.models.generation import Decided, continue_greedily
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, Chain, append_chain, chain_log_prob, log_odds, phrase_chains
from safety_mech.refusal.text import JUDGED_TOKENS, cannot_refuse, refuses

MEMORY_BUDGET = 2**30
"""Bytes of unscaled residual stream to store at most; beyond it only every second, third, ... layer is stored."""

Entries = list[CacheEntry]
"""Keys and values of one layer, one entry a batch."""


@dataclass(frozen=True)
class _Batch:
    """Rows of equal length: which prompts, and (for log-odds) the chain of phrases at their end."""

    prompts: list[int]
    chain: Chain | None
    tokens: Tensor


@dataclass
class _State:
    """The residual stream before one layer: of the shared prefix (batch of one) and of every batch."""

    prefix: Tensor
    batches: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(resid.numel() * resid.element_size() for resid in [self.prefix, *self.batches])


@dataclass
class ScaledRanges:
    """Measures ranges of one model on one prompt set, under one intervention; every range is measured once.

    The intervention: scale by `alpha` what `recipe` names; or `intervene`, a context manager for a range, instead.
    It is entered layer by layer, so it may change the layers of its range only.
    `evaluations` counts blocks run, to compare with `layer_evaluations`. Change neither model nor hooks while one of
    these is in use: results are cached.
    """

    model: HookedTransformer
    prompts: Sequence[str]
    alpha: float | None = None
    recipe: str | Recipe = "attn_out"
    template: str | Template = "own"
    phrases: Sequence[str] = REFUSAL_PHRASES
    batch_tokens: int = DEFAULT_BATCH_TOKENS
    memory_budget: int = MEMORY_BUDGET
    intervene: Callable[[LayerRange], AbstractContextManager[object]] | None = None
    evaluations: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.alpha is not None and self.intervene is None:
            check_alpha(self.alpha)
            self._intervention = partial(scaled, self.model, alpha=self.alpha, recipe=self.recipe)
        elif self.intervene is not None and self.alpha is None:
            self._intervention = self.intervene
        else:
            raise ValueError("alpha and intervene: expected one of them, a scale or what is done to a range")
        find_recipe(self.recipe)
        chats = encode_chat(tokenizer_of(self.model), self.prompts, self.template)
        chains = phrase_chains(tokenizer_of(self.model), self.template, self.phrases)
        longest = max(JUDGED_TOKENS, *(len(chain.tokens) for chain in chains))
        check_context(chats, self.model.cfg.n_ctx, longest)
        self._ends = end_tokens(self.model, self.template)
        self._chats, self._chains = chats, chains
        self._shared: dict[str, _States] = {}
        self._cells: dict[LayerRange | None, Tensor] = {}
        self._texts: dict[tuple[LayerRange | None, bool], list[str]] = {}

    def log_odds(self, layers: LayerRange | None) -> Float[Tensor, " prompt"]:
        """Refusal log-odds (nats, float64) of every prompt with `layers` scaled; None: unscaled. No generation."""
        if layers not in self._cells:
            self._cells[layers] = self._states("log-odds").log_odds(layers)
        return self._cells[layers]

    def probability(self, layers: LayerRange | None) -> Float[Tensor, " prompt"]:
        """Probability (float64) that each prompt is answered with a refusal; its sum is the expected R_o."""
        return self.log_odds(layers).sigmoid()

    def refuses(self, layers: LayerRange | None) -> Bool[Tensor, " prompt"]:
        """Whether each prompt is refused in text (refusal/text.py); its sum is the paper's R_o."""
        return torch.tensor([refuses(text) for text in self.answers(layers)])

    def refusal(self, layers: LayerRange | None, text: bool = False) -> Float[Tensor, " prompt"]:
        """`probability`, or (`text`) `refuses` as 0 and 1. float64."""
        return self.refuses(layers).double() if text else self.probability(layers)

    def answers(self, layers: LayerRange | None, *, whole: bool = False) -> list[str]:
        """The first JUDGED_TOKENS greedy tokens of every answer; one that can no longer become a refusal is left where
        that showed, unless `whole`."""
        if (layers, whole) not in self._texts:
            self._texts[layers, whole] = self._states("text").answers(layers, None if whole else cannot_refuse)
        return self._texts[layers, whole]

    def release(self) -> None:
        """Forget all states. What was measured stays; what is measured next runs the model from its start."""
        self._shared.clear()

    def _states(self, measure: Literal["log-odds", "text"]) -> "_States":
        if measure not in self._shared:
            self._shared[measure] = _States(self, self._chats, self._chains if measure == "log-odds" else [None])
        return self._shared[measure]

    def grid(self, progress: bool = False, text: bool = False) -> Float[Tensor, "start end prompt"]:
        """Refusal probability (`text`: refusals, 0 or 1) of every range [start, end]; NaN where end < start."""
        n = self.model.cfg.n_layers
        cells = torch.full((n, n, len(self.prompts)), torch.nan, dtype=torch.float64)
        ends = torch.triu_indices(n, n).T.tolist()
        for start, end in tqdm(ends, desc="grid", unit="range", disable=not progress):
            cells[start, end] = self.refusal(LayerRange(start, end), text)
        return cells


class _States:
    """What ranges share: stored unscaled states, and the scaled state of the last range."""

    def __init__(self, owner: ScaledRanges, chats: Sequence[ChatTokens], chains: Sequence[Chain | None]):
        self.owner, self.model, self.n_layers = owner, owner.model, owner.model.cfg.n_layers
        self.text = list(chains) == [None]
        extended = {chain: append_chain(chats, chain) if chain else list(chats) for chain in chains}
        self.prefix_length = shared_prefix_length(chats)
        self.batches: list[_Batch] = []
        for chain in chains:
            lengths = [len(chat) - self.prefix_length for chat in extended[chain]]
            for prompts in equal_length_batches(lengths, owner.batch_tokens):
                tokens = stack_rest(self.model, extended[chain], prompts, self.prefix_length)
                self.batches.append(_Batch(prompts, chain, tokens))
        self.prefix_tokens = chats[0].tokens[: self.prefix_length][None].to(self.model.embed.W_E.device)
        self.unscaled: dict[int, _State] = {}
        self.unscaled_entries: list[Entries] = []
        self.scaled: tuple[LayerRange, _State, list[Entries]] | None = None
        with torch.no_grad():
            self._run_unscaled()

    def _run_unscaled(self) -> None:
        """Embed, then run all layers once, storing every `stride`-th state (and, for text, keys and values)."""
        offset = self.prefix_length
        state = _State(
            embed(self.model, self.prefix_tokens), [embed(self.model, batch.tokens, offset) for batch in self.batches]
        )
        self.stride = max(1, -(-state.bytes * self.n_layers // self.owner.memory_budget))
        for layer in range(self.n_layers):
            if layer % self.stride == 0:
                self.unscaled[layer] = state
            state, entries = self._step(state, layer)
            if self.text:
                self.unscaled_entries.append(entries)
        self.final_unscaled = state

    def _step(self, state: _State, layer: int) -> tuple[_State, Entries]:
        """One block on the shared prefix, then on every batch over the prefix's keys and values."""
        self.owner.evaluations += 1
        block, cfg = self.model.blocks[layer], self.model.cfg
        shared = CacheEntry.init_cache_entry(cfg, self.prefix_tokens.device, 1)
        prefix = block(state.prefix, past_kv_cache_entry=shared) if self.prefix_length else state.prefix
        batches, entries = [], []
        for resid in state.batches:
            rows = len(resid)
            entry = CacheEntry(
                shared.past_keys.expand(rows, -1, -1, -1), shared.past_values.expand(rows, -1, -1, -1), not self.text
            )
            batches.append(block(resid, past_kv_cache_entry=entry))
            entries.append(entry)
        return _State(prefix, batches), entries

    def _run(self, state: _State, layers: Iterable[int], scale: bool = False) -> tuple[_State, list[Entries]]:
        entries = []
        for layer in layers:
            with self.owner._intervention(LayerRange(layer, layer)) if scale else nullcontext():
                state, new = self._step(state, layer)
            entries.append(new)
        return state, entries

    def _run_range(self, layers: LayerRange | None) -> tuple[_State, list[Entries]]:
        """The state after the last layer; for text also the keys and values of all layers.

        It extends the last range, if that has the same start; else it runs on from the nearest unscaled state.
        """
        if layers is None:
            return self.final_unscaled, self.unscaled_entries
        layers.check_inside(self.n_layers)
        if self.scaled and self.scaled[0].start == layers.start and self.scaled[0].end <= layers.end:
            done, state, entries = self.scaled
            first = done.end + 1
        else:
            first, entries = layers.start, []
            nearest = first - first % self.stride
            state, _ = self._run(self.unscaled[nearest], range(nearest, first))
        state, new = self._run(state, range(first, layers.end + 1), scale=True)
        entries = [*entries, *new]
        self.scaled = (layers, state, entries)
        state, behind = self._run(state, range(layers.end + 1, self.n_layers))
        return state, [*self.unscaled_entries[: layers.start], *entries, *behind]

    def log_odds(self, layers: LayerRange | None) -> Float[Tensor, " prompt"]:
        """From the last positions of all batches; those of one chain are unembedded together."""
        with torch.no_grad():
            state, _ = self._run_range(layers)
            log_p = torch.full((len(self.owner.prompts),), -torch.inf, dtype=torch.float64)
            for chain in {batch.chain for batch in self.batches if batch.chain}:
                chosen = [index for index, batch in enumerate(self.batches) if batch.chain == chain]
                scored = torch.cat([state.batches[index][:, -len(chain.tokens) - 1 :] for index in chosen])
                rows = [row for index in chosen for row in self.batches[index].prompts]
                log_p[rows] = torch.logaddexp(log_p[rows], chain_log_prob(self.model, scored, chain).cpu())
        return log_odds(log_p)

    def answers(self, layers: LayerRange | None, decided: Decided | None) -> list[str]:
        """Every prompt's answer, left where it is `decided`."""
        with torch.no_grad():
            state, entries = self._run_range(layers)
            # All batches at once: each call reads the whole unembedding matrix.
            last = torch.cat([resid[:, -1:] for resid in state.batches])
            first = unembed_last(self.model, last).argmax(dim=-1).split([len(resid) for resid in state.batches])
            started = [([layer[index] for layer in entries], tokens) for index, tokens in enumerate(first)]
            with self.owner._intervention(layers) if layers else nullcontext():
                found = continue_greedily(self.model, started, JUDGED_TOKENS, self.owner._ends, decided)
        texts = [""] * len(self.owner.prompts)
        for row, tokens in zip((row for batch in self.batches for row in batch.prompts), found, strict=True):
            texts[row] = decode_answer(tokenizer_of(self.model), tokens, self.owner._ends)
        return texts


def layer_evaluations(ranges: Iterable[LayerRange], n_layers: int) -> dict[str, int]:
    """Blocks that a list of ranges costs: whole forwards, and with common work shared."""
    shared, count = n_layers, 0  # the unscaled pass
    previous: LayerRange | None = None
    for layers in ranges:
        extends = previous is not None and previous.start == layers.start and previous.end <= layers.end
        new_scaled = layers.end - previous.end if previous and extends else layers.width
        shared += new_scaled + n_layers - 1 - layers.end
        previous, count = layers, count + 1
    return {"whole": n_layers * count, "shared": shared}
