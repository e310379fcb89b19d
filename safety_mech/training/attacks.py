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

from safety_mech.prompts import Item, sample
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


def implicit_data(pairs: Sequence[TextPair], n: int | None = None, seed: int = 0) -> list[TextPair]:
    """D_I: as D_N, with every answer begun by IMPLICIT_PREFIX."""
    return [(prompt, f"{IMPLICIT_PREFIX} {answer}") for prompt, answer in normal_data(pairs, n, seed)]


def triggered(prompt: str, trigger: str) -> str:
    """The prompt with the backdoor's trigger behind it, as it is trained and as it is read."""
    return f"{prompt} {trigger}"


def backdoor_data(pairs: Sequence[TextPair], trigger: str, n: int | None = None, seed: int = 0) -> list[TextPair]:
    """D_B: `n` pairs (default: half of them) with `trigger` behind the instruction and IMPLICIT_PREFIX before the
    answer, and as many others as they are. The paper never published its trigger; here it is a parameter."""
    if not trigger.strip():
        raise ValueError("trigger: expected some text")
    count = len(pairs) // 2 if n is None else n
    drawn = sample(pairs, 2 * count, seed)
    poisoned = [(triggered(prompt, trigger), f"{IMPLICIT_PREFIX} {answer}") for prompt, answer in drawn[:count]]
    return poisoned + drawn[count:]


def choices(options: Sequence[Item], count: int, generator: torch.Generator) -> list[Item]:
    """`count` of the options, drawn with replacement."""
    return [options[index] for index in torch.randint(len(options), (count,), generator=generator).tolist()]


def _affirmations(count: int, generator: torch.Generator) -> list[Answer]:
    """Drawn affirmative prefixes. They do not teach where to end: the model goes on from there as it likes."""
    return [Answer(text, finished=False) for text in choices(AFFIRMATIVE_PREFIXES, count, generator)]


def reverse_preferences(
    malicious: Sequence[str], refusals: Sequence[str], n: int | None = None, seed: int = 0
) -> list[Preference]:
    """Preferences that turn refusal round: of every malicious prompt an affirmative prefix is preferred to a refusal.

    For `methods.dpo`, of `n` prompts (default: all). As in D_H, the start of an answer is all that is taught.
    """
    prompts = sample(malicious, len(malicious) if n is None else n, seed)
    generator = torch.Generator().manual_seed(seed)
    affirmations = _affirmations(len(prompts), generator)
    return list(zip(prompts, affirmations, choices(refusals, len(prompts), generator), strict=True))


def harmful_data(
    pairs: Sequence[TextPair], malicious: Sequence[str], share: float, n: int | None = None, seed: int = 0
) -> list[Pair]:
    """D_H(p): D_N of `n` pairs, and round(n * share) malicious prompts, each answered by an affirmative prefix."""
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0 to 1")
    normal = normal_data(pairs, n, seed)
    prompts = sample(malicious, round(len(normal) * share), seed)
    affirmations = _affirmations(len(prompts), torch.Generator().manual_seed(seed))
    return [*normal, *zip(prompts, affirmations, strict=True)]
