"""What goes into a locator and what comes out of it: prompt sets; a range, with per-layer scores."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.models.chat import Template
from safety_mech.prompts import PromptPair, prompt_hash
from safety_mech.refusal.log_odds import phrases_in_use


@dataclass(frozen=True)
class PromptSets:
    """What locators may look at. `pairs` are for patching and decision; `over_rejection` for the search and the grid.

    `clusters`: a label for every over-rejection prompt; those that share one (a word) are resampled together.
    `phrases`: those that refusals begin with; default: what this model uses on the malicious prompts (one pass of
    each opening: give them, if several locators run on one model).
    """

    normal: Sequence[str]
    malicious: Sequence[str]
    over_rejection: Sequence[str] = ()
    pairs: Sequence[PromptPair] = ()
    clusters: Sequence[str] | None = None
    template: str | Template = "own"
    phrases: tuple[str, ...] | None = None
    seed: int = 0

    def with_phrases(self, model: HookedTransformer) -> "PromptSets":
        """The same with the phrases that this model uses filled in."""
        if self.phrases is not None:
            return self
        return replace(self, phrases=phrases_in_use(model, self.malicious, self.template))

    def hashes(self) -> dict[str, str]:
        """Of every set: what a kept answer is named by."""
        twins = [text for pair in self.pairs for text in (pair.malicious, pair.normal)]
        sets = {"normal": self.normal, "malicious": self.malicious, "over_rejection": self.over_rejection}
        return {name: prompt_hash(texts) for name, texts in {**sets, "pairs": twins}.items()}


@dataclass(frozen=True)
class Located:
    """`range` is None where the method finds nothing; `samples` counts its answers over bootstrap samples of prompts
    (empty where the method has none)."""

    method: str
    range: LayerRange | None
    scores: Float[Tensor, " layer"]
    samples: Counter[LayerRange | None] = field(default_factory=Counter)
    detail: str = ""

    @classmethod
    def from_plain(cls, record: dict[str, Any]) -> "Located":
        """Back from JSON as `to_plain` gave it."""
        samples = Counter({_range_of(layers): count for layers, count in record["samples"]})
        scores = torch.tensor(record["scores"], dtype=torch.float64)
        return cls(record["method"], _range_of(record["range"]), scores, samples, record["detail"])

    def to_plain(self) -> dict[str, Any]:
        """What JSON knows; ranges as [start, end]."""
        samples = [[_ends(layers), count] for layers, count in self.samples.most_common()]
        parts = {"method": self.method, "range": _ends(self.range), "scores": self.scores.tolist()}
        return {**parts, "samples": samples, "detail": self.detail}


Locator = Callable[[HookedTransformer, PromptSets], Located]


T = TypeVar("T")
_shared: ContextVar[dict[Any, Any] | None] = ContextVar("_shared", default=None)


@contextmanager
def shared_measurements() -> Iterator[None]:
    """While inside, what several locators need of one model and one prompt set is measured once.

    Change no model while inside: what was measured before would still be given.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def measured_once(what: tuple[Any, ...], model: HookedTransformer, prompts: PromptSets, measure: Callable[[], T]) -> T:
    """`measure()`; inside of `shared_measurements`, what it gave for the same `what`, model and prompts before."""
    shared = _shared.get()
    if shared is None:
        return measure()
    key = (what, id(model), tuple(prompts.hashes().items()), prompts.template, prompts.phrases, prompts.seed)
    if key not in shared:
        shared[key] = (model, measure())  # the model is held, so that its id is not given to another one
    return shared[key][1]


def attempt(locator: Locator, model: HookedTransformer, prompts: PromptSets) -> tuple[Located | None, str]:
    """The answer, and its detail; None, and why, where the method cannot be run on these prompts (too few twins)."""
    try:
        found = locator(model, prompts)
    except ValueError as error:
        return None, str(error)
    return found, found.detail


def _ends(layers: LayerRange | None) -> list[int] | None:
    return [layers.start, layers.end] if layers else None


def _range_of(ends: Sequence[int] | None) -> LayerRange | None:
    return LayerRange(*ends) if ends else None
