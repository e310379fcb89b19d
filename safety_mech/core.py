"""Which part of the trained layers does the work? The base with some layers of the aligned model put into it.

Training layers a..b to refuse does not mean that all of them refuse: a few may carry it, and the rest may have moved
for nothing. The CORE is the narrowest range of the aligned model's layers that gives the base most of the margin
(margin.py) that alignment gave it. It needs the base, and says what a locator without one can hope to find.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.against_base import swapped
from safety_mech.chat import Template
from safety_mech.layers import LayerRange
from safety_mech.margin import margin
from safety_mech.overrejection import ScaledRanges
from safety_mech.refusal import REFUSAL_OPENINGS

CORE_SHARE = 0.8


@dataclass(frozen=True)
class Transplants:
    """`shares[i, j]`: share of the margin gained by alignment that layers i..j alone, put into the base, give it; NaN
    where not measured. It may exceed 1, or be negative. `gained`: that margin, in nats."""

    shares: Float[Tensor, "start end"]
    gained: float

    def core(self, share: float = CORE_SHARE) -> LayerRange | None:
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
    openings: Sequence[str] = REFUSAL_OPENINGS,
) -> Transplants:
    """Put every range within `layers` of the aligned model into the base, and measure the margin.

    Prefixes are kept and shared (METHOD 5). Raises ValueError for models of different shapes, layers outside of them,
    or a model whose margin is not above the base's.
    """
    layers.check_inside(base.cfg.n_layers)
    sets = [
        ScaledRanges(
            base, texts, 1.0, template=template, openings=openings, change=lambda part: swapped(base, model, part)
        )
        for texts in (malicious, normal)
    ]

    def measured(part: LayerRange | None) -> float:
        return float(margin(*(ranges.log_odds(part) for ranges in sets)))

    before = measured(None)
    gained = measured(LayerRange(0, base.cfg.n_layers - 1)) - before
    if not gained > 0:
        raise ValueError(f"the margin is {gained:+.2f} nats above the base's: expected a model that was aligned")
    shares = torch.full((base.cfg.n_layers, base.cfg.n_layers), torch.nan, dtype=torch.float64)
    for start in layers:
        for end in range(start, layers.end + 1):
            shares[start, end] = (measured(LayerRange(start, end)) - before) / gained
    return Transplants(shares, gained)
