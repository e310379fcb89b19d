"""How much of the gap is harm? Controls: topics, shuffled labels, the base, contrastive pairs, matched words.

    python experiments/validity.py
    python experiments/validity.py --model ./my-model --base ./my-model-before-alignment

Some controls measure a gap without harm (another topic, shuffled labels, no alignment); others measure what is left
when both sets have the same form (contrastive pairs; equal length and similar words). All are read at the layer where
the raw gap is largest, with bootstrap intervals over prompts. stability.py measures how stable RANGES are.
See docs/method.md#controls.
This module holds the settings and their checks, and imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safety_mech.commands.checks import check_at_least, check_model
from safety_mech.prompts import PromptPair, load_pairs, load_prompts, prompt_hash, shipped_rows


@dataclass(frozen=True)
class ValidityConfig:
    """Measure how much of the gap between malicious and normal prompts survives its controls."""

    model: str = "smollm2-135m-aligned"
    adapter: str | None = None
    base: str | None = "auto"
    """The model before alignment; auto: known for built-in models, none for others."""
    normal: str = "normal:test"
    malicious: str = "malicious:test"
    pairs: str = "test"
    """Split of the shipped contrastive pairs."""
    topics: str = "test"
    """Split of the shipped normal prompts, whose topics are the control for topic."""
    n_matched: int = 48
    """Pairs of equal token length and most similar words, picked out of `normal` and `malicious`."""
    statistic: Literal["paper", "symmetric"] = "paper"
    """The gap that is controlled: paper (N-M minus N-N) or symmetric (N-M minus the mean of N-N and M-M)."""
    template: str = "own"
    splits: int = 500
    """Random splits of the topics in halves."""
    bootstrap: int = 1000
    permutations: int = 1000
    device: str | None = None
    dtype: str = "float32"
    seed: int = 0
    out: str = "results"


@dataclass(frozen=True)
class Sets:
    """Prompts of a run. `topics`: the topic of each of `topic_prompts`."""

    normal: list[str]
    malicious: list[str]
    pairs: list[PromptPair]
    topic_prompts: list[str]
    topics: list[str]

    def hashes(self) -> dict[str, str]:
        paired = [text for pair in self.pairs for text in (pair.malicious, pair.normal)]
        sets = {"normal": self.normal, "malicious": self.malicious, "pairs": paired, "topics": self.topic_prompts}
        return {name: prompt_hash(prompts) for name, prompts in sets.items()}


def main(config: ValidityConfig) -> Path:
    sets = check_and_load(config)
    from safety_mech.commands.validity_run import run_validity  # imports torch

    return run_validity(config, sets)


def check_and_load(config: ValidityConfig) -> Sets:
    counts = ("n_matched", "splits", "bootstrap", "permutations")
    check_at_least(3, **{name: getattr(config, name) for name in counts})
    names = ("model", "adapter", "base", "template", "device", "dtype", "out")
    check_model(**{name: getattr(config, name) for name in names})
    rows = shipped_rows("normal", config.topics)
    return Sets(
        load_prompts(config.normal),
        load_prompts(config.malicious),
        load_pairs(config.pairs),
        [row["prompt"] for row in rows],
        [row["category"] for row in rows],
    )
