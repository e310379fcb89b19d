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
from safety_mech.reporting.html import Example
from safety_mech.reporting.locate_report import LocateResult, locate_report, scaling_examples
from safety_mech.reporting.plots import plot_alpha, plot_attention, plot_contrastive_pair
from safety_mech.reporting.runs import write_run
from safety_mech.reporting.token_views import View, attention_heads_view, refusal_attribution_view

SHOWN = 3
"""Prompts of each kind whose answers the report shows: the first ones, so that nobody has chosen them."""


def write_locate_run(
    model: HookedTransformer, base_name: str | None, data: LocateData, result: LocateResult, config: LocateConfig
) -> Path:
    """Figures, report, metrics and tensors of a run; returns its folder."""
    found, over_rejection = result.found, data.over_rejection.prompts if data.over_rejection else []
    layers = found.range if found and found.range else result.start.range
    figures = figures_of(base_name, result, config)
    figures["attention"] = attention_figure(model, data.sets, layers, config)
    shown = [*over_rejection[:SHOWN], *draw(config.malicious, SHOWN, config.seed).prompts]
    prompt_sets = named_sets(data.sets, over_rejection)
    prompt_hashes = {name: prompt_hash(prompts) for name, prompts in prompt_sets.items()}
    report = locate_report(
        config,
        result,
        base_name=base_name,
        unit=measure_unit(config),
        figures=figures,
        examples=examples(model, shown, layers, found, config),
        views=views(model, shown, layers, config),
        prompt_hashes=prompt_hashes,
        sizes={name: len(prompts) for name, prompts in prompt_sets.items()},
    )
    metrics = {
        **metrics_of(result),
        "prompt_hashes": prompt_hashes,
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


def figures_of(base_name: str | None, result: LocateResult, config: LocateConfig) -> dict[str, Figure]:
    """The gap of the model, of its base and on the contrastive pairs; what the search saw."""
    drawn = {config.model: result.curves["prompts"]}
    if result.base_curves:
        drawn[f"{base_name} (base)"] = result.base_curves["prompts"]
    if config.pairs:
        drawn["contrastive pairs"] = result.curves["contrastive pairs"]
    gap = sm.plot_gap(drawn, {config.model: result.start.range}, f"template {config.template}")
    return {"gap": gap} | search_figures(result.found, measure_unit(config))


def search_figures(found: sm.SafetyLayers | None, unit: str) -> dict[str, Figure]:
    figures = {}
    if found and found.alpha and len(found.alpha.points) > 1 and found.baseline is not None:
        figures["alpha"] = plot_alpha(found.alpha, float(found.baseline.mean()))
    if found and found.sweeps:
        figures["sweeps"] = sm.plot_sweeps(found.sweeps, found.baseline, unit)
    if found and found.grid is not None:
        figures["grid"] = sm.plot_grid(found.grid, found.range, unit, found.best_of_grid)
    return figures


def attention_figure(
    model: HookedTransformer,
    sets: PromptSets,
    layers: sm.LayerRange | None,
    config: LocateConfig,
) -> Figure:
    """Where the last token looks in the first contrastive pair; without pairs, in the first malicious prompt."""
    if config.pairs:
        normal, malicious = sets["contrastive pairs"]
        harmful, harmless = question_attention(model, [malicious[0], normal[0]], config.template)
        return plot_contrastive_pair(harmful, harmless, layers)
    (attention,) = question_attention(model, sets["prompts"][1][:1], config.template)
    return plot_attention(attention, layers)


def examples(
    model: HookedTransformer,
    prompts: list[str],
    layers: sm.LayerRange | None,
    found: sm.SafetyLayers | None,
    config: LocateConfig,
) -> list[Example]:
    """Answers before and while the located range is scaled (where none is, the range that the search started from)."""
    if found is None or found.alpha is None or layers is None:
        return []
    return scaling_examples(model, prompts, layers, found.alpha.alpha, config.recipe, config.template)


def views(
    model: HookedTransformer, prompts: list[str], layers: sm.LayerRange | None, config: LocateConfig
) -> list[View]:
    """Tokens by what they do to the refusal, of the first and the last prompt; attention heads amid the range."""
    found = [refusal_attribution_view(model, prompt, config.template) for prompt in (prompts[0], prompts[-1])]
    if layers is None:
        return found
    return [*found, attention_heads_view(model, prompts[-1], int(layers.centre), config.template)]


def measure_unit(config: LocateConfig) -> str:
    return "share of prompts refused" if config.text else "mean refusal probability"


def named_sets(sets: PromptSets, over_rejection: list[str]) -> dict[str, list[str]]:
    kinds = ("normal", "malicious")
    found = {f"{name} {kind}": p for name in sets for kind, p in zip(kinds, sets[name], strict=True)}
    return found | {"over_rejection": over_rejection}


def tensors_of(result: LocateResult) -> dict[str, Tensor]:
    tensors = {
        f"{name}.{part}".replace(" ", "_"): getattr(curve, part)
        for name, curve in result.curves.items()
        for part in ("gap", "low", "high", "p_values", "samples")
    }
    tensors |= {f"{name}.symmetric".replace(" ", "_"): curve.symmetric.gap for name, curve in result.curves.items()}
    if result.found and result.found.grid is not None:
        tensors["grid"] = result.found.grid
    return tensors


def metrics_of(result: LocateResult) -> dict[str, Any]:
    curves, initial, samples = result.curves, result.initial, result.initial_samples
    return {
        "curves": {name: curve_metrics(curves[name], initial[name], samples[name]) for name in curves},
        "base_curves": {name: curve_metrics(curve, None, Counter()) for name, curve in result.base_curves.items()},
        "differences": {name: difference_metrics(difference) for name, difference in result.differences.items()},
        "start": result.start,
        "search": search_metrics(result.found) if result.found else None,
    }


def curve_metrics(
    curve: sm.GapCurve, initial: sm.LayerRange | None, samples: Counter[sm.LayerRange | None]
) -> dict[str, Any]:
    return {
        "gap": curve.gap,
        "low": curve.low,
        "high": curve.high,
        "p_values": curve.p_values,
        "p_any": curve.p_any,
        "symmetric": symmetric_metrics(curve),
        "sampled_gap": curve.sampled_gap if curve.r else None,
        "bootstrap_over": {"unit": curve.resampled, "normal": curve.n_resampled[0], "malicious": curve.n_resampled[1]},
        "cosine_mean": {
            "normal_normal": curve.normal_normal.cosine_mean,
            "normal_malicious": curve.normal_malicious.cosine_mean,
            "malicious_malicious": curve.malicious_malicious.cosine_mean,
        },
        "initial_range": initial,
        "initial_range_samples": {str(layers): count for layers, count in samples.most_common()},
    }


def symmetric_metrics(curve: sm.GapCurve | sm.GapDifference) -> dict[str, Any]:
    names = ("gap", "low", "high", "p_values", "p_any", "spread_alone", "p_same_distribution")
    found = {name: getattr(curve.symmetric, name) for name in names}
    return found | {"initial_range": sm.initial_range(curve, statistic="symmetric")}


def difference_metrics(difference: sm.GapDifference) -> dict[str, Any]:
    fields = ("gap", "low", "high", "p_values", "p_any")
    found = {name: getattr(difference, name) for name in fields}
    return found | {"initial_range": sm.initial_range(difference), "symmetric": symmetric_metrics(difference)}


def search_metrics(found: sm.SafetyLayers) -> dict[str, Any]:
    return {
        "range": found.range,
        "reason": found.reason,
        "refused": found.refused,
        "initial": found.initial,
        "alpha": found.alpha,
        "phrases": found.phrases,
        "sweeps": found.sweeps,
        "interval_90": found.interval(),
        "samples": {str(layers): count for layers, count in found.samples.most_common()},
        "baseline_mean": None if found.baseline is None else found.baseline.mean(),
        "effect": found.effect,
        "best_of_grid": found.best_of_grid,
        "is_best_of_grid": found.is_best_of_grid,
    }
