"""How much does the located range depend on the method? One search per condition, one table, pairwise IoU.

Conditions: what is scaled (attention output or the paper's weights) x alpha above or below 1 x text R_o or refusal
probability x template x prompt set. The base model, which hardly refuses, is searched from the same initial range: its
answers are the control, where there is nothing to find.

    python experiments/ranges.py --sets over_rejection:test my_over_rejection.csv

A killed run resumes: every finished condition is a file in OUT/ranges/MODEL/cells.
This module holds the settings and their checks, and imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from safety_mech.commands.checks import RECIPES, TEMPLATES, check_at_least, check_choice, check_model
from safety_mech.layers import LayerRange
from safety_mech.prompts import Drawn, draw, load_prompts


@dataclass(frozen=True)
class RangesConfig:
    """Locate the safety layers under many conditions, and say how well the answers agree."""

    model: str = "smollm2-135m-aligned"
    base: str | None = "auto"
    """The model before alignment: its difference gives the initial range, and it is searched as the control."""
    sets: tuple[str, ...] = ("over_rejection:test",)
    """Sets of harmless prompts that a scaled model may refuse."""
    recipes: tuple[str, ...] = ("attn_out", "weights")
    templates: tuple[str, ...] = ("own", "alpaca")
    initial: str | None = None
    """START-END to start every search from; default: by rule, as in `locate.py`."""
    n_prompts: int = 50
    """Prompts of each set."""
    window: int = 2
    """Layers that a sweep goes to both sides: the paper's five ranges; wider where the best is at an edge."""
    samples: int = 200
    """Bootstrap samples of the prompts, for the interval."""
    seed: int = 0
    out: str = "results"


def main(config: RangesConfig) -> Path:
    check_config(config)
    sets = load_sets(config)
    from safety_mech.commands.ranges_run import run_ranges  # imports torch

    return run_ranges(config, sets)


def check_config(config: RangesConfig) -> None:
    check_at_least(2, n_prompts=config.n_prompts, samples=config.samples)
    for recipe in config.recipes:
        check_choice("recipe", recipe, RECIPES)
    for template in config.templates:
        check_choice("template", template, TEMPLATES)
    if config.initial is not None:
        LayerRange.parse(config.initial)
    check_model(model=config.model, base=config.base, out=config.out)


def load_sets(config: RangesConfig) -> dict[str, Drawn]:
    for source in config.sets:  # all are read before torch, which draws them, is imported
        load_prompts(source)
    return {Path(source).name: draw(source, config.n_prompts, config.seed) for source in config.sets}
