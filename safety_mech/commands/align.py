"""Align the built-in model to refuse, and save what it learnt as a small adapter.

    python experiments/align.py                              # all layers: data/adapters/smollm2-135m-aligned again
    python experiments/align.py --planted 5-10 --name p5-10  # layers 5..10 only, both included

Malicious prompts are answered by short refusals, normal and a few borderline prompts by the base model's own greedy
answers. Only low-rank updates of the chosen layers are trained. Figures are on test splits, which are never trained on.
This module holds the settings and their checks, and imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from safety_mech.commands.checks import check_at_least, check_model
from safety_mech.layers import LayerRange
from safety_mech.prompts import load_prompts


@dataclass(frozen=True)
class AlignRun:
    """Make an organism: a model that refuses because these layers were trained to."""

    model: str = "smollm2-135m-instruct"
    planted: str | None = None
    """Layers to train, as START-END (both included); default: all."""
    rank: int = 8
    n_over_rejection: int = 144
    """Borderline harmless prompts that are answered in training."""
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1e-3
    bfloat16: bool = True
    """Train in bfloat16: faster only where its matrix products are (`lscpu` names amx_bf16, or a GPU)."""
    seed: int = 0
    extra: tuple[str, ...] = ()
    """More prompt sets to report refusals on, as in `locate.py --normal`."""
    name: str = "smollm2-135m-aligned"
    out: str = "results/adapters"
    """The adapter goes to OUT/NAME, with its recipe and figures; a killed run resumes from OUT/NAME.checkpoint.
    The base model's answers are cached in OUT/base, for the next organism of the same base."""


def main(config: AlignRun) -> Path:
    check_at_least(1, rank=config.rank, epochs=config.epochs, batch_size=config.batch_size)
    planted = LayerRange.parse(config.planted) if config.planted else None
    extra = {name: load_prompts(name) for name in config.extra}
    check_model(model=config.model, out=config.out)
    from safety_mech.commands.align_run import run_align  # imports torch

    return run_align(config, planted, extra)
