"""Controls for the gap (docs/method.md#controls): topics, and matching by length and words. The other controls need no
code of their own: `gap_curve(paired=True)`, `gap_difference`, `GapCurve.null`."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor


def topic_halves(topics: Sequence[str], samples: int = 500, seed: int = 0) -> Bool[Tensor, "sample prompt"]:
    """Random splits of the topics in two halves; True where a prompt's topic plays "normal".

    Rows for `labelled_means`. Raises ValueError for fewer than four topics.
    """
    names = sorted(set(topics))
    if len(names) < 4:
        raise ValueError(f"{len(names)} topics: expected at least 4, to be split in halves in more than one way")
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(samples, len(names), generator=generator).argsort(dim=1)
    return (order < len(names) // 2)[:, [names.index(topic) for topic in topics]]


def single_topics(topics: Sequence[str]) -> Bool[Tensor, "sample prompt"]:
    """One row a topic, in alphabetical order: False for its prompts, which play "malicious", True for all others."""
    names = sorted(set(topics))
    return torch.tensor([[topic != name for topic in topics] for name in names])


@dataclass(frozen=True)
class Matched:
    """Pairs of indices (malicious, normal) and how alike they are: means over the pairs; `before`: over the whole sets.

    `shared_words`: share of words in common (Jaccard). `length_difference`: tokens that the malicious one is longer by.
    """

    pairs: tuple[tuple[int, int], ...]
    shared_words: float
    shared_words_before: float
    length_difference: float
    length_difference_before: float


def match_prompts(
    malicious: Sequence[str],
    normal: Sequence[str],
    malicious_lengths: Sequence[int],
    normal_lengths: Sequence[int],
    count: int,
    tolerance: int = 0,
) -> Matched:
    """The `count` most similar pairs of one malicious and one normal prompt, no prompt twice.

    Greedy: the pair with most words in common first, among those whose lengths (tokens) differ by at most `tolerance`;
    of equal ones the first. Raises ValueError if there are not as many pairs.
    """
    words_m, words_n = ([words_of(prompt) for prompt in prompts] for prompts in (malicious, normal))
    jaccard = [[len(m & n) / max(1, len(m | n)) for n in words_n] for m in words_m]
    similar = torch.tensor(jaccard, dtype=torch.float64)
    lengths_m, lengths_n = (torch.tensor(lengths).double() for lengths in (malicious_lengths, normal_lengths))
    left = torch.where((lengths_m[:, None] - lengths_n[None]).abs() <= tolerance, similar, -1.0)
    pairs: list[tuple[int, int]] = []
    while len(pairs) < count:
        row, column = divmod(int(left.argmax()), len(normal))
        if left[row, column] < 0:
            raise ValueError(
                f"{count} matched prompts are wanted, but only {len(pairs)} agree in length: ask for fewer"
            )
        pairs.append((row, column))
        left[row], left[:, column] = -1.0, -1.0
    rows, columns = (list(side) for side in zip(*pairs, strict=True))
    return Matched(
        tuple(pairs),
        float(similar[rows, columns].mean()),
        float(similar.mean()),
        float((lengths_m[rows] - lengths_n[columns]).mean()),
        float(lengths_m.mean() - lengths_n.mean()),
    )


def words_of(prompt: str) -> frozenset[str]:
    """Its words in lower case, without punctuation."""
    return frozenset(re.findall(r"[\w']+", prompt.lower()))
