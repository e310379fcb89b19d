"""safety_mech: find, measure and protect the layers of an aligned language model that carry its safety.

After "Safety Layers in Aligned Large Language Models" (ICLR 2025, arXiv 2408.17003), on TransformerLens'
HookedTransformer. The package reads in the order of the paper: layers, models, chat, prompts, forward,
residuals, divergence, onset, judge, refusal, scaling, overrejection, search, alpha, locate; segments, directions,
patching, margin, locators; attention, words; freeze, finetune, adapters, attacks, methods, organisms; results, plots.
A file imports only from files above it.

Axes of every tensor: `prompt layer pos d_model d_mlp head vocab`, and `sample` for bootstrap draws and
permutations. Angles are in degrees, log-odds in nats, lengths in tokens.
Layer 0 is the first block; a LayerRange includes both of its ends; the residual stream of layer k is
`blocks.k.hook_resid_post`, what block k leaves behind.
"""

from safety_mech.attention.question import QuestionAttention, min_max, question_attention
from safety_mech.attention.word_classes import WordShares, by_word, word_shares
from safety_mech.divergence.angles import GapCurve, GapDifference, PairStats, gap_curve, gap_difference
from safety_mech.divergence.onset import OnsetRule, initial_range, initial_range_samples
from safety_mech.divergence.residuals import last_token_residuals
from safety_mech.interventions.scaling import RECIPES, Recipe, scaled
from safety_mech.layers import LayerRange
from safety_mech.localization.locators import LOCATORS, locate
from safety_mech.localization.measurements import Located, PromptSets
from safety_mech.localization.safety_layers import SafetyLayers
from safety_mech.localization.search import progressive_search
from safety_mech.models.chat import Template, encode_chat
from safety_mech.models.generation import generate
from safety_mech.models.loading import load_model
from safety_mech.prompts import PromptPair, load_pairs, load_prompts
from safety_mech.refusal.log_odds import refusal_log_odds
from safety_mech.refusal.text import is_degenerate, is_refusal
from safety_mech.reporting.plots import (
    plot_attention,
    plot_contrastive_pair,
    plot_gap,
    plot_grid,
    plot_sweeps,
    plot_word_shares,
)
from safety_mech.training.loop import TrainConfig, TrainRecord, fine_tune

__all__ = [
    "LOCATORS",
    "RECIPES",
    "GapCurve",
    "GapDifference",
    "LayerRange",
    "Located",
    "OnsetRule",
    "PairStats",
    "PromptPair",
    "PromptSets",
    "QuestionAttention",
    "Recipe",
    "SafetyLayers",
    "Template",
    "TrainConfig",
    "TrainRecord",
    "WordShares",
    "by_word",
    "encode_chat",
    "fine_tune",
    "gap_curve",
    "gap_difference",
    "generate",
    "initial_range",
    "initial_range_samples",
    "is_degenerate",
    "is_refusal",
    "last_token_residuals",
    "load_model",
    "load_pairs",
    "load_prompts",
    "locate",
    "min_max",
    "plot_attention",
    "plot_contrastive_pair",
    "plot_gap",
    "plot_grid",
    "plot_sweeps",
    "plot_word_shares",
    "progressive_search",
    "question_attention",
    "refusal_log_odds",
    "scaled",
    "word_shares",
]
