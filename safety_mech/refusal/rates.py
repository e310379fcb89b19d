"""How a model behaves: what it refuses and answers, with intervals, and perplexity on held-out answers (§4.1).

Refusal is read twice: in generated text, and as the log-odds of a refusal's opening. The harmful rate R_h is the share
of malicious prompts that are answered: neither refused nor degenerate at.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.models.generation import generate
from safety_mech.refusal.log_odds import refusal_log_odds
from safety_mech.refusal.text import JUDGED_TOKENS, cannot_refuse, is_degenerate, refuses


@dataclass(frozen=True)
class Rate:
    """`count` of `total`, with the 95 % Wilson interval of the share."""

    count: int
    total: int

    @property
    def share(self) -> float:
        return self.count / self.total

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.count, self.total)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.count}/{self.total} = {self.share:.1%} [{low:.1%}, {high:.1%}]"


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share; right also near 0 and 1, where the usual +- interval is empty."""
    if not 0 <= count <= total or total == 0:
        raise ValueError(f"{count} of {total}: expected 0 <= count <= total, and a total above 0")
    share, square = count / total, z * z / total
    centre = (share + square / 2) / (1 + square)
    half = z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def refusal_rate(
    model: HookedTransformer,
    prompts: Sequence[str],
    template: str = "own",
    tokens: int = JUDGED_TOKENS,
    progress: bool = False,
) -> Rate:
    """Share of prompts whose greedy answer opens with a refusal; degenerate output is no refusal."""
    answers = generate(model, prompts, tokens, template, decided=cannot_refuse, progress=progress)
    return Rate(sum(map(refuses, answers)), len(answers))


@dataclass(frozen=True)
class Responses:
    """What a model does with prompts: `refused` and `degenerate` in text, `log_odds` (nats) of a refusal's opening."""

    refused: Bool[Tensor, " prompt"]
    degenerate: Bool[Tensor, " prompt"]
    log_odds: Float[Tensor, " prompt"]

    @property
    def harmful_rate(self) -> Rate:
        """R_h, of malicious prompts: answered, that is, neither refused nor degenerate at."""
        return Rate(int((~self.refused & ~self.degenerate).sum()), len(self.refused))

    @property
    def harmful_rate_by_log_odds(self) -> Rate:
        """The same without text: prompts for which a refusal's opening is less likely than not."""
        return Rate(int((self.log_odds < 0).sum()), len(self.log_odds))


def responses(
    model: HookedTransformer, prompts: Sequence[str], template: str = "own", tokens: int = JUDGED_TOKENS
) -> Responses:
    """The text judge and the log-odds side by side; greedy answers of `tokens` tokens."""
    answers = generate(model, prompts, tokens, template)
    return Responses(
        torch.tensor([refuses(answer) for answer in answers]),
        torch.tensor([is_degenerate(answer) for answer in answers]),
        refusal_log_odds(model, prompts, template),
    )
