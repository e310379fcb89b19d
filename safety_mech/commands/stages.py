"""What does the last token read before, in and after the safety layers? (paper §3.6, A.5)

1. Over many prompts: the share of attention over the question that falls on function words, content words and
   punctuation, layer by layer, with intervals; and how it changes from before a range of layers to after it. The same
   without the question's first token, without attention sinks, and, as the control, in the model's base.
2. Pictures: one malicious prompt, and both prompts of a contrastive pair.

    python experiments/stages.py --range 14-21

This module holds the settings and their checks, and imports no torch: a refused flag is answered at once.
"""

from dataclasses import dataclass
from pathlib import Path

from safety_mech.commands.checks import check_model
from safety_mech.layers import LayerRange
from safety_mech.prompts import Drawn, PromptPair, draw, load_pairs

QUICK_PROMPTS = 16


@dataclass(frozen=True)
class StagesConfig:
    """Which kinds of words does the last token attend to, layer by layer?"""

    model: str = "smollm2-135m-aligned"
    """A built-in name, a local folder, a .gguf file, or a hub id."""
    adapter: str | None = None
    """A PEFT folder to merge into the model."""
    normal: str = "normal:test"
    """Prompt set: a shipped one, FILE, FILE:COLUMN, or hf:ORG/NAME:SPLIT:COLUMN."""
    malicious: str = "malicious:test"
    """Prompt set, as above; the first prompt is the one of the picture."""
    template: str = "alpaca_short"
    """own, alpaca or alpaca_short (the paper's for these pictures)."""
    range: str | None = None
    """START-END to mark and to compare across; default: nothing is marked, the outer thirds are compared."""
    base: str | None = "auto"
    """The model before alignment, as the control; auto: known for built-in models, none for others."""
    skip_words: tuple[str, ...] = ("the",)
    """Words to leave out in one of the comparisons: a "the" is an attention sink in many models."""
    head: int | None = None
    """One attention head; default: the mean over heads."""
    pair: int = 0
    """Which contrastive pair of the test split is drawn."""
    n_prompts: int = 144
    """Prompts of each set, at most: drawn with the seed, over all topics of a shipped set."""
    quick: bool = False
    """16 prompts of each set."""
    device: str | None = None
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    bootstrap: int = 1000
    seed: int = 0
    out: str = "results"


def main(config: StagesConfig) -> Path:
    drawn, pair, marked = check_config(config)
    from safety_mech.commands.stages_run import run_stages  # imports torch

    return run_stages(config, drawn, pair, marked)


def check_config(config: StagesConfig) -> tuple[dict[str, Drawn], PromptPair, LayerRange | None]:
    """Prompts of both sets, the contrastive pair and the range to mark; ValueError for what can be refused by then."""
    if config.n_prompts < 2:
        raise ValueError(f"n_prompts = {config.n_prompts}: expected at least 2 of each set")
    if config.bootstrap < 100:
        raise ValueError(f"bootstrap = {config.bootstrap}: expected at least 100, or the tails are guesses")
    pairs = load_pairs("test")
    if not 0 <= config.pair < len(pairs):
        raise ValueError(f"pair {config.pair}: the test split has pairs 0 to {len(pairs) - 1}")
    marked = LayerRange.parse(config.range) if config.range else None
    names = ("model", "adapter", "base", "template", "device", "dtype", "out")
    check_model(**{name: getattr(config, name) for name in names})
    count = min(config.n_prompts, QUICK_PROMPTS) if config.quick else config.n_prompts
    sets = {name: draw(getattr(config, name), count, config.seed) for name in ("malicious", "normal")}
    for name, drawn in sets.items():
        if len(drawn) < 2:
            raise ValueError(f"{name}: {len(drawn)} prompt: expected at least 2 for an interval")
    return sets, pairs[config.pair], marked
