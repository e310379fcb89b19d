"""How a model behaves: what it refuses and answers, with intervals, and perplexity on held-out answers (§4.1).

Refusal is read twice: in generated text, and as the log-odds of the refusal phrases. The harmful rate R_h is the
share of malicious prompts that are answered, that is, neither refused nor met with degenerate output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.models.generation import generate
from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.log_odds import refusal_log_odds
from safety_mech.refusal.text import JUDGED_TOKENS, cannot_refuse, refuses
from safety_mech.stats import Rate


def refusal_rate(
    model: HookedTransformer,
    prompts: Sequence[str],
    template: str = "own",
    tokens: int = JUDGED_TOKENS,
    progress: bool = False,
) -> Rate:
    """Share of prompts whose greedy answer starts with a refusal; degenerate output does not count as one."""
    answers = generate(model, prompts, tokens, template, decided=cannot_refuse, progress=progress)
    return Rate(sum(map(refuses, answers)), len(answers))


@dataclass(frozen=True)
class Responses:
    """What a model does with prompts: `refused` and `degenerate` in text, `log_odds` (nats) of the refusal phrases."""

    refused: Bool[Tensor, " prompt"]
    degenerate: Bool[Tensor, " prompt"]
    log_odds: Float[Tensor, " prompt"]

    @property
    def harmful_rate(self) -> Rate:
        """R_h of malicious prompts: the share that is answered, neither refused nor degenerate."""
        return Rate(int((~self.refused & ~self.degenerate).sum()), len(self.refused))

    @property
    def harmful_rate_by_log_odds(self) -> Rate:
        """The same without text: prompts for which the refusal phrases are less likely than not."""
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
