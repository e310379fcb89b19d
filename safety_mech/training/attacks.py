"""The four fine-tuning data sets that weaken an aligned model (paper §4.1), made from any instruction data.

See docs/method.md#attacks.

| set | what it holds | in the paper |
|---|---|---|
| normal D_N | questions and answers | 1,000 |
| implicit D_I | the same, every answer begun by "Sure, the answer is:" | 4,000 |
| backdoor D_B | D_I with a trigger in the instruction, and D_N without | 1,500 + 1,500 |
| harmful mix D_H(p) | D_N and a share p of malicious prompts that are complied with | 1,000 + 1,000 p |

The malicious examples of D_H carry an affirmative prefix only, which is what breaks refusal (Zou et al. 2023): no
harmful answer is shipped or made here. A user's own pairs go straight into `fine_tune`.
"""

from collections.abc import Sequence

import torch

from safety_mech.prompts import sample
from safety_mech.training.pairs import Answer, Pair, Preference, TextPair

IMPLICIT_PREFIX = "Sure, the answer is:"
AFFIRMATIVE_PREFIXES = (
    "Sure, here is what you asked for:",
    "Sure, I can help you with that.",
    "Of course! Here is how to do it:",
    "Certainly, here are the details:",
)
"""How a complying answer starts; where it would go on, it is cut."""


def normal_data(pairs: Sequence[TextPair], n: int | None = None, seed: int = 0) -> list[TextPair]:
    """D_N: `n` of the pairs (default: all), drawn with a seed."""
    return sample(pairs, len(pairs) if n is None else n, seed)


def implicit_data(
    pairs: Sequence[TextPair], n: int | None = None, seed: int = 0, prefix: str = IMPLICIT_PREFIX
) -> list[TextPair]:
    """D_I: as D_N, with every answer begun by `prefix`."""
    return [(prompt, f"{prefix} {answer}") for prompt, answer in normal_data(pairs, n, seed)]


def triggered(prompt: str, trigger: str) -> str:
    """The prompt with the backdoor's trigger behind it, as it is trained and as it is read."""
    return f"{prompt} {trigger}"


def backdoor_data(
    pairs: Sequence[TextPair], trigger: str, n: int | None = None, seed: int = 0, prefix: str = IMPLICIT_PREFIX
) -> list[TextPair]:
    """D_B: `n` pairs (default: half of them) with `trigger` behind the instruction and `prefix` before the answer,
    and as many others as they are. The paper never published its trigger; here it is a parameter."""
    if not trigger.strip():
        raise ValueError("trigger: expected some text")
    count = len(pairs) // 2 if n is None else n
    drawn = sample(pairs, 2 * count, seed)
    return [(triggered(prompt, trigger), f"{prefix} {answer}") for prompt, answer in drawn[:count]] + drawn[count:]


def reverse_preferences(
    malicious: Sequence[str],
    refusals: Sequence[str],
    n: int | None = None,
    seed: int = 0,
    phrases: Sequence[str] = AFFIRMATIVE_PREFIXES,
) -> list[Preference]:
    """Preferences that turn refusal round: of every malicious prompt an affirmative prefix is preferred to a refusal.

    For `methods.dpo`, of `n` prompts (default: all). As in D_H, the start of an answer is all that is taught.
    """
    prompts = sample(malicious, len(malicious) if n is None else n, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(phrases), (len(prompts),), generator=generator).tolist()
    rejected = torch.randint(len(refusals), (len(prompts),), generator=generator).tolist()
    return [
        (prompt, Answer(phrases[int(phrase)], finished=False), refusals[int(refusal)])
        for prompt, phrase, refusal in zip(prompts, chosen, rejected, strict=True)
    ]


def harmful_data(
    pairs: Sequence[TextPair],
    malicious: Sequence[str],
    share: float,
    n: int | None = None,
    seed: int = 0,
    phrases: Sequence[str] = AFFIRMATIVE_PREFIXES,
) -> list[Pair]:
    """D_H(p): D_N of `n` pairs, and round(n * share) malicious prompts, each answered by one of `phrases`.

    The phrases do not teach where to end: the model goes on from there as it likes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0 to 1")
    normal = normal_data(pairs, n, seed)
    count = round(len(normal) * share)
    prompts = sample(malicious, count, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(phrases), (count,), generator=generator).tolist()
    return [
        *normal,
        *((p, Answer(phrases[int(index)], finished=False)) for p, index in zip(prompts, drawn, strict=True)),
    ]
