"""What a locate run leaves behind: figures, report, metrics and tensors."""

from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.attention.question import question_attention
from safety_mech.commands.locate import LocateConfig, LocateData, PromptSets
from safety_mech.models.sources import model_fingerprint
from safety_mech.prompts import draw, prompt_hash
from safety_mech.reporting.locate_report import LocateResult, locate_report, scaling_examples
from safety_mech.reporting.plots import plot_alpha, plot_attention, plot_contrastive_pair
from safety_mech.reporting.runs import write_run
from safety_mech.reporting.token_views import View, attention_heads_view, refusal_attribution_view

SHOWN = 3
"""Prompts of each kind whose answers the report shows: the first ones, so that nobody has chosen them."""


def write_locate_run(model: HookedTransformer, data: LocateData, result: LocateResult, config: LocateConfig) -> Path:
    found, over_rejection = result.found, data.over_rejection.prompts if data.over_rejection else []
    layers = found.range if found and found.range else result.start.range  # what examples and pictures are of
    figures = figures_of(result, config)
    figures["attention"] = attention_figure(model, data.sets, layers, config)
    shown = [*over_rejection[:SHOWN], *draw(config.malicious, SHOWN, config.seed).prompts]
    examples = []
    if found and found.alpha and layers:
        examples = scaling_examples(model, shown, layers, found.alpha.alpha, config.recipe, config.template)
    prompt_sets: dict[str, list[str]] = {}
    for name, (normal, malicious) in data.sets.items():
        prompt_sets |= {f"{name} normal": normal, f"{name} malicious": malicious}
    prompt_sets["over_rejection"] = over_rejection
    report = locate_report(
        config,
        result,
        figures=figures,
        examples=examples,
        views=views(model, shown, layers, config),
        prompt_sets=prompt_sets,
    )
    metrics = {
        **metrics_of(result),
        "prompt_hashes": {name: prompt_hash(prompts) for name, prompts in prompt_sets.items()},
        "drawn_ids": {"over_rejection": data.over_rejection.ids} if data.over_rejection else {},
        "model_fingerprint": model_fingerprint(config.model, config.adapter),
        "device": str(model.cfg.device),
        "seed": config.seed,
    }
    return write_run(
        config.out,
        "locate",
        config.model,
        config=config,
        metrics=metrics,
        tensors=tensors_of(result),
        figures=figures,
        texts={"report.html": report},
    )


def figures_of(result: LocateResult, config: LocateConfig) -> dict[str, Figure]:
    """The gap of the model, of its base and on the contrastive pairs; what the search saw."""
    drawn = {config.model: result.curves["prompts"]}
    if result.base_curves:
        drawn[f"{result.base_name} (base)"] = result.base_curves["prompts"]
    if config.pairs:
        drawn["contrastive pairs"] = result.curves["contrastive pairs"]
    figures = {"gap": sm.plot_gap(drawn, {config.model: result.start.range}, f"template {config.template}")}
    found = result.found
    if found and found.alpha and len(found.alpha.points) > 1 and found.baseline is not None:
        figures["alpha"] = plot_alpha(found.alpha, float(found.baseline.mean()))
    if found and found.sweeps:
        figures["sweeps"] = sm.plot_sweeps(found.sweeps, found.baseline, config.unit)
    if found and found.grid is not None:
        figures["grid"] = sm.plot_grid(found.grid, found.range, config.unit, found.best_of_grid)
    return figures


def attention_figure(
    model: HookedTransformer, sets: PromptSets, layers: sm.LayerRange | None, config: LocateConfig
) -> Figure:
    """Where the last token looks in the first contrastive pair; without pairs, in the first malicious prompt."""
    if config.pairs:
        normal, malicious = sets["contrastive pairs"]
        harmful, harmless = question_attention(model, [malicious[0], normal[0]], config.template)
        return plot_contrastive_pair(harmful, harmless, layers)
    (attention,) = question_attention(model, sets["prompts"][1][:1], config.template)
    return plot_attention(attention, layers)


def views(
    model: HookedTransformer, prompts: list[str], layers: sm.LayerRange | None, config: LocateConfig
) -> list[View]:
    """Tokens by what they do to the refusal, of the first and the last prompt; attention heads amid the range."""
    found = [refusal_attribution_view(model, prompt, config.template) for prompt in (prompts[0], prompts[-1])]
    if layers is None:
        return found
    return [*found, attention_heads_view(model, prompts[-1], int(layers.centre), config.template)]


def tensors_of(result: LocateResult) -> dict[str, Tensor]:
    tensors = {}
    for name, curve in result.curves.items():
        tensors |= {f"{name}.{part}": getattr(curve, part) for part in ("gap", "low", "high", "p_values", "samples")}
        tensors[f"{name}.symmetric"] = curve.symmetric.gap
    if result.found and result.found.grid is not None:
        tensors["grid"] = result.found.grid
    return {name.replace(" ", "_"): tensor for name, tensor in tensors.items()}


def metrics_of(result: LocateResult) -> dict[str, Any]:
    initial, samples = result.initial, result.initial_samples
    differences = result.differences.items()
    return {
        "curves": {name: curve_metrics(curve, initial[name], samples[name]) for name, curve in result.curves.items()},
        "base_curves": {name: curve_metrics(curve, None, Counter()) for name, curve in result.base_curves.items()},
        "differences": {name: gap_metrics(of) | {"initial_range": sm.initial_range(of)} for name, of in differences},
        "start": result.start,
        "search": search_metrics(result.found) if result.found else None,
    }


def curve_metrics(
    curve: sm.GapCurve, initial: sm.LayerRange | None, samples: Counter[sm.LayerRange | None]
) -> dict[str, Any]:
    kinds = ("normal_normal", "normal_malicious", "malicious_malicious")
    return gap_metrics(curve) | {
        "sampled_gap": curve.sampled_gap if curve.r else None,
        "bootstrap_over": {"unit": curve.resampled, "normal": curve.n_resampled[0], "malicious": curve.n_resampled[1]},
        "cosine_mean": {kind: getattr(curve, kind).cosine_mean for kind in kinds},
        "initial_range": initial,
        "initial_range_samples": dict(samples.most_common()),
    }


def gap_metrics(curve: sm.GapCurve | sm.GapDifference) -> dict[str, Any]:
    """By both statistics."""
    names = ("gap", "low", "high", "p_values", "p_any")
    symmetric = fields_of(curve.symmetric, *names, "spread_alone", "p_same_distribution")
    symmetric["initial_range"] = sm.initial_range(curve, statistic="symmetric")
    return fields_of(curve, *names) | {"symmetric": symmetric}


def search_metrics(found: sm.SafetyLayers) -> dict[str, Any]:
    names = ("range", "reason", "refused", "initial", "alpha", "phrases", "sweeps")
    return fields_of(found, *names, "effect", "best_of_grid", "is_best_of_grid") | {
        "interval_90": found.interval(),
        "samples": dict(found.samples.most_common()),
        "baseline_mean": None if found.baseline is None else found.baseline.mean(),
    }


def fields_of(record: object, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}
