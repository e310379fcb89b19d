"""safety_mech: find, measure and protect the layers of an aligned language model that carry its safety.

After "Safety Layers in Aligned Large Language Models" (ICLR 2025, arXiv 2408.17003), on TransformerLens'
HookedTransformer. The rooms follow the paper, and data flows down this list:

    layers, stats, prompts, models, refusal, divergence, interventions, localization, attention,
    training, reporting, commands

A room imports only from rooms above it.

Axes of every tensor: `prompt layer pos d_model d_mlp head vocab`, and `sample` for bootstrap draws and
permutations. Angles are in degrees, log-odds in nats, lengths in tokens.
Layer 0 is the first block; a LayerRange includes both of its ends; the residual stream of layer k is
`blocks.k.hook_resid_post`, what block k leaves behind.

The names below are imported when they are first asked for, so that `import safety_mech` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; tests/test_package.py compares it with the table
    from safety_mech.attention.question import QuestionAttention, min_max, question_attention
    from safety_mech.attention.word_classes import WordShares, by_word, word_shares
    from safety_mech.divergence.angles import GapCurve, GapDifference, PairStats, gap_curve, gap_difference
    from safety_mech.divergence.onset import OnsetRule, initial_range, initial_range_samples
    from safety_mech.divergence.residuals import last_token_residuals
    from safety_mech.interventions.directions import ablated, added, difference_of_means
    from safety_mech.interventions.scaling import RECIPES, Recipe, scaled
    from safety_mech.layers import LayerRange
    from safety_mech.localization.locators import LOCATORS, locate
    from safety_mech.localization.measurements import Located, PromptSets
    from safety_mech.localization.patching import patch_pairs
    from safety_mech.localization.safety_layers import SafetyLayers
    from safety_mech.localization.search import progressive_search
    from safety_mech.models.chat import Template, encode_chat
    from safety_mech.models.generation import generate
    from safety_mech.models.loading import load_model
    from safety_mech.prompts import PromptPair, load_pairs, load_prompts
    from safety_mech.refusal.attribution import refusal_attribution
    from safety_mech.refusal.degenerate import is_degenerate
    from safety_mech.refusal.log_odds import refusal_log_odds
    from safety_mech.refusal.text import is_refusal
    from safety_mech.reporting.plots import (
        plot_attention,
        plot_contrastive_pair,
        plot_gap,
        plot_grid,
        plot_sweeps,
        plot_word_shares,
    )
    from safety_mech.training.config import TrainConfig
    from safety_mech.training.loop import TrainRecord, fine_tune
    from safety_mech.training.methods import sppft

_NAMES = {
    "attention.question": "QuestionAttention min_max question_attention",
    "attention.word_classes": "WordShares by_word word_shares",
    "divergence.angles": "GapCurve GapDifference PairStats gap_curve gap_difference",
    "divergence.onset": "OnsetRule initial_range initial_range_samples",
    "divergence.residuals": "last_token_residuals",
    "interventions.directions": "ablated added difference_of_means",
    "interventions.scaling": "RECIPES Recipe scaled",
    "layers": "LayerRange",
    "localization.locators": "LOCATORS locate",
    "localization.measurements": "Located PromptSets",
    "localization.patching": "patch_pairs",
    "localization.safety_layers": "SafetyLayers",
    "localization.search": "progressive_search",
    "models.chat": "Template encode_chat",
    "models.generation": "generate",
    "models.loading": "load_model",
    "prompts": "PromptPair load_pairs load_prompts",
    "refusal.attribution": "refusal_attribution",
    "refusal.degenerate": "is_degenerate",
    "refusal.log_odds": "refusal_log_odds",
    "refusal.text": "is_refusal",
    "reporting.plots": "plot_attention plot_contrastive_pair plot_gap plot_grid plot_sweeps plot_word_shares",
    "training.config": "TrainConfig",
    "training.loop": "TrainRecord fine_tune",
    "training.methods": "sppft",
}
"""By file: the names that the package offers."""

_HOME = {name: file for file, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'safety_mech' has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f"safety_mech.{_HOME[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
