"""Where are the safety layers of a model? `python experiments/locate.py` (or `make locate`).

1. How far do malicious prompts part from normal ones, layer by layer (paper §3.2), on a prompt set and on
   contrastive pairs; in the aligned model and, as the control, in its base? From this the initial range (§3.4, step 1).
2. Which layers, scaled, move refusals of harmless prompts most: the progressive search (§3.4, step 3), and every
   range (start, end), of which that search sees two lines.
3. How it looks: answers before and while scaling, attention over the question, tokens by what they do to a refusal.

All of it goes into `report.html`, one page that needs no network.
This module holds the settings and their checks, and imports no torch: a refused flag is answered at once.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from safety_mech.commands.checks import RECIPES, check_alpha, check_choice, check_model
from safety_mech.layers import LayerRange
from safety_mech.prompts import Drawn, draw, load_pairs, load_prompts

if TYPE_CHECKING:
    import safety_mech.commands.locate_run


PromptSets = dict[str, tuple[list[str], list[str]]]
"""By name of a set: of its normal and of its malicious prompts."""


@dataclass(frozen=True)
class LocateConfig:
    """Find the layers that tell malicious prompts from normal ones."""

    model: str = "smollm2-135m-aligned"
    """A built-in name, a local folder, a .gguf file, or a hub id."""
    adapter: str | None = None
    """A PEFT folder to merge into the model."""
    base: str | None = "auto"
    """The model before alignment, as the control; auto: known for built-in models, none for others."""
    normal: str = "normal:test"
    """Prompt set: a shipped one, FILE, FILE:COLUMN, or hf:ORG/NAME:SPLIT:COLUMN."""
    malicious: str = "malicious:test"
    """Prompt set, as above."""
    over_rejection: str = "over_rejection:test"
    """Harmless prompts that a scaled model may refuse; as above."""
    max_over_rejection: int = 24
    """Use at most this many of them, drawn by the seed, of every word its share: they decide the search's time."""
    initial: str | None = None
    """START-END to start the search from; default: by rule from the gap, else from its difference to the base's."""
    pairs: bool = True
    """Also measure the shipped contrastive pairs (same frame, one harmful and one harmless)."""
    template: str = "own"
    """own (the model's chat template), alpaca or alpaca_short."""
    recipe: str = "attn_out"
    """What is scaled: attn_out, mlp_out, weights (the paper's) or weights_no_o."""
    alpha: float | Literal["auto", "paper"] = "auto"
    """What layers are scaled by. auto: the greatest spread between ranges whose answers are not degenerate; paper: the
    first alpha at which refusals move enough (A.3.4); or a number."""
    below: bool = False
    """Choose alpha below 1 (and search for the minimum) instead of above."""
    text: bool = False
    """Measure refusals in generated text (the paper's R_o) instead of their probability."""
    least_refused: float = 0.1
    """Share of malicious prompts that the model must refuse for a range to be an answer; 0: any."""
    least_effect: float = 0.1
    """Share of the over-rejection prompts by which a range must change refusals to be an answer."""
    grid: bool = True
    """Also measure every range (start, end): most of the time."""
    quick: bool = False
    """Curves only, no search."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; default: cuda where there is one."""
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    statistic: Literal["paper", "symmetric"] = "paper"
    """Where the initial range is read: paper (gap N-M minus N-N) or symmetric (N-M minus the mean of N-N and M-M)."""
    bootstrap_over: Literal["prompts", "topics"] = "prompts"
    """What the gap's bootstrap draws: prompts, or whole topics, known for the shipped sets."""
    r: int | None = None
    """Cosines and angles from this many sampled pairs of each kind, as in the paper (500); default: all pairs."""
    bootstrap: int = 1000
    permutations: int = 1000
    seed: int = 0
    out: str = "results"

    @property
    def unit(self) -> str:
        """Of the measure that is swept."""
        return "share of prompts refused" if self.text else "mean refusal probability"


@dataclass(frozen=True)
class LocateData:
    """Prompts of a run. `sets`: normal and malicious ones, by prompt set. `topics`: of each prompt, where the bootstrap
    draws topics.

    `over_rejection`: harmless prompts that a scaled model may refuse; None with --quick, which does not search.
    """

    sets: PromptSets
    topics: PromptSets
    over_rejection: Drawn | None


def main(config: LocateConfig) -> "safety_mech.commands.locate_run.LocateResult":
    check_config(config)
    sets, topics = load_sets(config), load_topics(config)
    drawn = None if config.quick else draw(config.over_rejection, config.max_over_rejection, config.seed)
    from safety_mech.commands.locate_run import run_locate  # imports torch

    return run_locate(config, LocateData(sets, topics, drawn))


def check_config(config: LocateConfig) -> None:
    """All that can be refused before a model is loaded."""
    if min(config.bootstrap, config.permutations) < 100:
        raise ValueError("bootstrap and permutations: expected at least 100 each, or the tails are guesses")
    if config.r is not None and config.r < 2:
        raise ValueError(f"r = {config.r}: expected at least 2 pairs of each kind")
    if config.max_over_rejection < 2:
        raise ValueError(f"max_over_rejection = {config.max_over_rejection}: expected at least 2 prompts")
    check_alpha(config.alpha)
    if not 0 <= config.least_effect <= 1 or not 0 <= config.least_refused <= 1:
        raise ValueError(
            f"least_effect = {config.least_effect}, least_refused = {config.least_refused}: expected shares"
        )
    if config.initial is not None:
        LayerRange.parse(config.initial)
    check_choice("recipe", config.recipe, RECIPES)
    settings = ("model", "adapter", "base", "template", "device", "dtype", "out")
    check_model(**{name: getattr(config, name) for name in settings})


def load_sets(config: LocateConfig) -> PromptSets:
    sets = {"prompts": (load_prompts(config.normal), load_prompts(config.malicious))}
    normal, malicious = sets["prompts"]
    if min(len(normal), len(malicious)) < 3:
        raise ValueError(f"{len(normal)} normal and {len(malicious)} malicious prompts: expected at least 3 of each")
    if config.pairs:
        pairs = load_pairs("test")
        sets["contrastive pairs"] = ([pair.normal for pair in pairs], [pair.malicious for pair in pairs])
    return sets


def load_topics(config: LocateConfig) -> PromptSets:
    """Before a model is loaded: that the topics of all prompts are known, where the bootstrap draws topics."""
    if config.bootstrap_over == "prompts":
        return {}
    known = {source: draw(source).clusters for source in (config.normal, config.malicious)}
    for source, clusters in known.items():
        if clusters is None:
            raise ValueError(f"bootstrap over topics: those of {source!r} are not known; use a shipped set, or prompts")
    pairs = [pair.category for pair in load_pairs("test")]
    return {
        "prompts": (known[config.normal] or [], known[config.malicious] or []),
        "contrastive pairs": (pairs, pairs),
    }
