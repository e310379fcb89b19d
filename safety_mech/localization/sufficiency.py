"""Layers exchanged between an aligned model and its base: which suffice for the refusals, and which are needed?

Training layers a..b to refuse does not mean that all of them refuse: a few may do all the work, while the others move
for nothing. docs/method.md#planted-organisms defines the MINIMAL SUFFICIENT RANGE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.interventions.weight_swap import paired_parameters, swapped
from safety_mech.layers import LayerRange
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.localization.slopes import margin
from safety_mech.models.chat import Template
from safety_mech.refusal.log_odds import REFUSAL_PHRASES

SUFFICIENT_SHARE = 0.8
"""Of the margin that alignment gave."""


@dataclass(frozen=True)
class Transplants:
    """`shares[i, j]`: share of the margin gained by alignment that layers i..j alone, put into the base, give it; it
    may exceed 1, or be negative. `refused[i, j]`: share of malicious prompts that are then more likely refused than
    not. Both NaN where not measured. `gained`: the margin, in nats."""

    shares: Float[Tensor, "start end"]
    refused: Float[Tensor, "start end"]
    gained: float

    @classmethod
    def from_plain(cls, record: dict[str, Any]) -> "Transplants":
        """Back from JSON as `to_plain` gave it."""
        tables = torch.full((2, record["n_layers"], record["n_layers"]), torch.nan, dtype=torch.float64)
        for start, end, *values in record["cells"]:
            tables[:, start, end] = torch.tensor(values, dtype=torch.float64)
        return cls(tables[0], tables[1], record["gained"])

    def to_plain(self) -> dict[str, Any]:
        """What JSON knows; of every measured range [start, end, share, refused]."""
        cells = [
            [start, end, float(self.shares[start, end]), float(self.refused[start, end])]
            for start, end in (~self.shares.isnan()).nonzero().tolist()
        ]
        return {"n_layers": len(self.shares), "gained": self.gained, "cells": cells}

    def minimal_sufficient_range(self, share: float = SUFFICIENT_SHARE) -> LayerRange | None:
        """The narrowest range with at least this share; of equally narrow ones that with the greatest share."""
        enough = [LayerRange(start, end) for start, end in (self.shares >= share).nonzero().tolist()]
        return min(enough, key=lambda part: (part.width, -float(self.shares[part.start, part.end])), default=None)

    @property
    def best_single(self) -> tuple[int, float]:
        """The layer that alone gives the largest share, and that share."""
        alone = self.shares.diagonal().nan_to_num(-torch.inf)
        return int(alone.argmax()), float(alone.max())


def transplant(
    model: HookedTransformer,
    base: HookedTransformer,
    layers: LayerRange,
    malicious: Sequence[str],
    normal: Sequence[str],
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
) -> Transplants:
    """Put every range within `layers` of the aligned model into the base, and measure the margin.

    Prefixes are shared between ranges (docs/method.md#prefix-sharing). Raises ValueError for models of different
    shapes, layers outside of them, or a model whose margin is not above the base's.
    """
    layers.check_inside(base.cfg.n_layers)
    sets = [
        ScaledRanges(base, texts, template=template, phrases=phrases, intervene=partial(swapped, base, model))
        for texts in (malicious, normal)
    ]

    def measured(part: LayerRange | None) -> tuple[float, float]:
        log_odds = [ranges.log_odds(part) for ranges in sets]
        return float(margin(*log_odds)), float((log_odds[0] > 0).double().mean())

    before, _ = measured(None)
    gained = measured(LayerRange(0, base.cfg.n_layers - 1))[0] - before
    if not gained > 0:
        raise ValueError(f"the margin is {gained:+.2f} nats above the base's: expected a model that was aligned")
    cells = []
    for start in layers:
        for end in range(start, layers.end + 1):
            after, refused = measured(LayerRange(start, end))
            cells.append([start, end, (after - before) / gained, refused])
    return Transplants.from_plain({"n_layers": base.cfg.n_layers, "gained": gained, "cells": cells})


def swap_losses(
    model: HookedTransformer,
    base: HookedTransformer,
    prompts: Sequence[str],
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
) -> Float[Tensor, "prompt layer"]:
    """What every prompt's refusal log-odds (nats) lose when one layer of the model is the base's.

    A layer that is the base's to the last bit loses nothing and is not run.
    """
    ranges = ScaledRanges(model, prompts, template=template, phrases=phrases, intervene=partial(swapped, model, base))
    unchanged = ranges.log_odds(None)
    lost = torch.zeros(len(prompts), model.cfg.n_layers, dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        if not all(torch.equal(ours, theirs) for ours, theirs in paired_parameters(model, base, layer)):
            lost[:, layer] = unchanged - ranges.log_odds(LayerRange(layer, layer))
    return lost
