"""What locators look at, what they measure, and what they answer: PromptSets, Measurements, Located."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.divergence.angles import GapCurve, gap_curve
from safety_mech.divergence.residuals import last_token_residuals
from safety_mech.layers import LayerRange
from safety_mech.localization.patching import Patching, Positions, equal_length_pairs, patch_pairs
from safety_mech.models.chat import Template
from safety_mech.prompts import PromptPair, prompt_hash
from safety_mech.refusal.log_odds import phrases_in_use


@dataclass(frozen=True)
class PromptSets:
    """What locators may look at. `pairs` are for patching and decision; `over_rejection` for the search and the grid.

    `clusters`: a label for every over-rejection prompt; those that share one (a word) are resampled together.
    `phrases`: what refusals begin with; default: the phrases that this model uses on the malicious prompts.
    """

    normal: Sequence[str]
    malicious: Sequence[str]
    over_rejection: Sequence[str] = ()
    pairs: Sequence[PromptPair] = ()
    clusters: Sequence[str] | None = None
    template: str | Template = "own"
    phrases: tuple[str, ...] | None = None
    seed: int = 0

    def hashes(self) -> dict[str, str]:
        """A short hash of every set."""
        paired = [text for pair in self.pairs for text in (pair.malicious, pair.normal)]
        sets = {"normal": self.normal, "malicious": self.malicious, "over_rejection": self.over_rejection}
        return {name: prompt_hash(texts) for name, texts in {**sets, "pairs": paired}.items()}

    def key(self) -> tuple[Any, ...]:
        """All that answers depend on: names a cached answer."""
        return self.hashes(), self.template, self.clusters, self.phrases, self.seed


@dataclass(frozen=True, eq=False)
class Measurements:
    """What locators need of one model on its prompts; each is measured when first asked for, and then cached.

    Change neither the model nor its hooks while one of these is in use.
    """

    model: HookedTransformer
    prompts: PromptSets
    _patched: dict[tuple[str, Positions], Patching] = field(default_factory=dict, init=False)

    @property
    def n_layers(self) -> int:
        return self.model.cfg.n_layers

    @cached_property
    def phrases(self) -> tuple[str, ...]:
        """Those given, or those that the model begins its refusals with."""
        given = self.prompts.phrases
        return given if given is not None else phrases_in_use(self.model, self.prompts.malicious, self.prompts.template)

    @cached_property
    def residuals(self) -> tuple[Float[Tensor, "normal layer d_model"], Float[Tensor, "malicious layer d_model"]]:
        """Residual stream at the last token: of normal, then of malicious prompts."""
        normal, malicious, template = self.prompts.normal, self.prompts.malicious, self.prompts.template
        return last_token_residuals(self.model, normal, template), last_token_residuals(self.model, malicious, template)

    @cached_property
    def curve(self) -> GapCurve:
        return gap_curve(*self.residuals, seed=self.prompts.seed)

    @cached_property
    def pairs(self) -> list[PromptPair]:
        """Contrastive pairs of equal token length; ValueError for fewer than two."""
        pairs = self.prompts.pairs
        found = equal_length_pairs(self.model, pairs, self.prompts.template) if pairs else []
        if len(found) < 2:
            raise ValueError(f"patching: {len(found)} contrastive pairs of equal token length: expected at least 2")
        return found

    def patched(self, what: str, positions: Positions = "last") -> Patching:
        """`patch_pairs` on the pairs of equal token length."""
        if (what, positions) not in self._patched:
            self._patched[what, positions] = patch_pairs(
                self.model, self.pairs, self.prompts.template, self.phrases, what=what, positions=positions
            )
        return self._patched[what, positions]


@dataclass(frozen=True)
class Located:
    """A locator's answer. `range` is None where the method finds nothing.

    `samples` counts its answers over bootstrap samples of prompts; it is empty where the method has none.
    """

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
        return cls(**record | {"range": _range_of(record["range"]), "scores": scores, "samples": samples})

    def to_plain(self) -> dict[str, Any]:
        """What JSON knows; ranges as [start, end]."""
        samples = [[_ends(layers), count] for layers, count in self.samples.most_common()]
        return {**vars(self), "range": _ends(self.range), "scores": self.scores.tolist(), "samples": samples}


@dataclass(frozen=True)
class Locator:
    """A way to locate: `answer` takes measurements, which several locators may share.

    Called with a model and prompt sets it measures anew. A plain function of these two is a locator as well.
    """

    answer: Callable[[Measurements], Located]

    def __call__(self, model: HookedTransformer, prompts: PromptSets) -> Located:
        return self.answer(Measurements(model, prompts))


AnyLocator = Callable[[HookedTransformer, PromptSets], Located]


def attempt(locator: AnyLocator, measured: Measurements) -> tuple[Located | None, str]:
    """The answer and its detail; None and the reason where the prompts do not suffice for the method."""
    try:
        shares = isinstance(locator, Locator)
        found = locator.answer(measured) if shares else locator(measured.model, measured.prompts)
    except ValueError as error:
        return None, str(error)
    return found, found.detail


def _ends(layers: LayerRange | None) -> list[int] | None:
    return [layers.start, layers.end] if layers else None


def _range_of(ends: Sequence[int] | None) -> LayerRange | None:
    return LayerRange(*ends) if ends else None
