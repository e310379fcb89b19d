"""How a model behaves: shares of refused prompts with their intervals, and perplexity on held-out answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformer_lens import HookedTransformer

from safety_mech.finetune import Pair, TrainConfig, encode_examples, mean_loss
from safety_mech.generation import generate
from safety_mech.judge import is_babble, is_refusal


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
    model: HookedTransformer, prompts: Sequence[str], template: str = "own", tokens: int = 16, progress: bool = False
) -> Rate:
    """Share of prompts whose greedy answer opens with a refusal; babble is no refusal.

    16 tokens, as the authors' script generates: 8 would cut "I'm sorry, but I'm not able to do that" before it is one.
    """
    answers = generate(model, prompts, tokens, template, progress=progress)
    return Rate(sum(is_refusal(answer) and not is_babble(answer) for answer in answers), len(answers))


def perplexity(model: HookedTransformer, pairs: Sequence[Pair], template: str = "own") -> float:
    """exp of the mean negative log-likelihood per answer token, over all (prompt, answer) pairs."""
    config = TrainConfig(template=template)
    return math.exp(mean_loss(model, encode_examples(model, pairs, config), config))
