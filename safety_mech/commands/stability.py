"""Does a locator give the same range again? Pairwise IoU over resampled, halved and other prompts, and templates.

    python experiments/stability.py
    python experiments/stability.py --methods margin_attn gap search --normal-sets normal:test alpaca.json \\
        --malicious-sets malicious:test advbench.csv:goal

- bootstrap: the same prompts, drawn with replacement (methods with a value for every prompt);
- halves: disjoint halves of the prompts, each located separately;
- prompt sets: the i-th of --normal-sets with the i-th of --malicious-sets;
- templates.

arXiv 2602.17696 makes the same comparison for other methods, whose regions overlap little between prompt sets.
A killed run resumes: every finished location is a file in OUT/stability/MODEL/cells.
This module holds the settings and their checks, and imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from safety_mech.commands.checks import LOCATORS, TEMPLATES, check_at_least, check_choice, check_methods, check_model
from safety_mech.prompts import load_prompts

BASE_METHODS = ("gap_difference", "swap")
"""Those of `base_locators` that look at prompts."""


@dataclass(frozen=True)
class StabilityConfig:
    """Locate again and again, and measure how well the answers overlap."""

    model: str = "smollm2-135m-aligned"
    adapter: str | None = None
    base: str | None = "auto"
    """For the methods that compare with it (gap_difference, swap); auto: known for built-in models."""
    methods: tuple[str, ...] = ("gap", "gap_difference", "search", "direction", "patching", "margin_attn")
    normal_sets: tuple[str, ...] = ("normal:test",)
    malicious_sets: tuple[str, ...] = ("malicious:test",)
    """As many as --normal-sets: the i-th of each go together."""
    over_rejection: str = "over_rejection:test"
    templates: tuple[str, ...] = ("own", "alpaca")
    """All other comparisons use the first."""
    n_prompts: int = 100
    """Of each normal and malicious set."""
    n_over_rejection: int = 24
    halvings: int = 3
    """Random ways to split the first sets in halves."""
    seed: int = 0
    out: str = "results"


def main(config: StabilityConfig) -> Path:
    check_config(config)
    from safety_mech.commands.stability_run import run_stability  # imports torch

    return run_stability(config)


def check_config(config: StabilityConfig) -> None:
    check_methods(config.methods, (*LOCATORS, *BASE_METHODS))
    normal, malicious = len(config.normal_sets), len(config.malicious_sets)
    if normal != malicious or not normal:
        raise ValueError(f"{normal} normal and {malicious} malicious sets: expected as many of each, at least one")
    check_at_least(8, n_prompts=config.n_prompts)
    check_at_least(2, n_over_rejection=config.n_over_rejection)
    check_at_least(1, halvings=config.halvings, templates=len(config.templates))
    for template in config.templates:
        check_choice("template", template, TEMPLATES)
    check_model(model=config.model, adapter=config.adapter, base=config.base, out=config.out)
    for source in (*config.normal_sets, *config.malicious_sets, config.over_rejection):
        load_prompts(source)
