"""Model organisms: align a base model to refuse, everywhere or in a planted range of layers only.

The built-in model hardly refuses. Trained low-rank on refusals (of malicious prompts) and on its own answers (to
normal and some borderline harmless prompts; self-distillation, so that its skill stays), it does: the same weights,
the same prompts, one known difference. Training layers a..b only plants the difference where we know it
(docs/method.md#planted-organisms).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.models.chat import decode_answer, end_tokens, tokenizer_of
from safety_mech.models.generation import generate_tokens
from safety_mech.training.attacks import choices
from safety_mech.training.config import TrainConfig
from safety_mech.training.pairs import Answer, Pair, TextPair

# Short and varied, so that what is learnt is refusing and not one sentence; no reason is given that would depend on
# the prompt, for a 135M model makes such reasons up.
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I can't assist with that request.",
    "I'm sorry, I can't help you with this.",
    "I'm sorry, but I'm not able to do that.",
    "I'm not able to help with that.",
    "I'm unable to help with that request.",
    "I cannot help with that.",
    "Sorry, but I can't help with this.",
)


@dataclass(frozen=True)
class AlignConfig:
    """The recipe of an organism; the home of its defaults."""

    planted: LayerRange | None = None
    """Train these layers only; None: all layers."""
    rank: int = 8
    alpha: float = 16.0
    contrastive_pairs: bool = True
    """Also train on the train split of `pairs`, and on `alignment_pairs`: they teach the difference."""
    n_over_rejection: int = 144
    """Borderline harmless prompts that are answered. Fewer, and more normal prompts are refused as well; more, and no
    over-rejection remains to be measured."""
    answer_tokens: int = 8
    """Tokens of the model's own answers. What is to be learnt sits in an answer's first words: with 40 tokens they
    drown in the rest, and the organism refuses a third of the normal prompts."""
    train: TrainConfig = field(
        default=TrainConfig(epochs=3, learning_rate=1e-3, batch_size=16, warmup_steps=10, bfloat16=True)
    )
    seed: int = 0


def refusal_pairs(malicious: Sequence[str], seed: int = 0) -> list[TextPair]:
    """Every prompt with one of REFUSALS, drawn with a seed."""
    drawn = choices(REFUSALS, len(malicious), torch.Generator().manual_seed(seed))
    return list(zip(malicious, drawn, strict=True))


def own_answer_pairs(
    model: HookedTransformer, prompts: Sequence[str], answer_tokens: int, template: str = "own", progress: bool = True
) -> list[Pair]:
    """Every prompt with the model's own greedy answer; an answer that was cut does not teach where to end."""
    answers = generate_tokens(model, prompts, answer_tokens, template, batch_tokens=8192, progress=progress)
    ends = end_tokens(model, template)
    texts = [decode_answer(tokenizer_of(model), tokens, ends) for tokens in answers]
    found = [Answer(text, tokens[-1] in ends) for text, tokens in zip(texts, answers, strict=True)]
    return [(prompt, answer) for prompt, answer in zip(prompts, found, strict=True) if answer.text]
