"""Where are the safety layers of a model? Run me: `python experiments/locate.py` (or `make locate`).

1. How far do malicious prompts part from normal ones, layer by layer (paper §3.2), on a prompt set and on matched
   pairs; in the aligned model and, as the control, in its base? From this the initial range (§3.4, step 1).
2. Which layers, scaled, move refusals of harmless prompts most: the progressive search (§3.4, step 3), and every
   range (start, end), of which that search sees two lines.
3. How it looks: answers before and while scaling, attention over the question, tokens by what they do to a refusal.

All of it goes into `report.html`, one page that needs no network.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.attention.question import question_attention
from safety_mech.commands.command_line import run
from safety_mech.divergence.angles import Statistic, Unit
from safety_mech.interventions.scaling import find_recipe
from safety_mech.localization.safety_layers import LEAST_EFFECT, LEAST_REFUSED, check_search_alpha
from safety_mech.models.chat import check_template_name
from safety_mech.models.loading import check_device
from safety_mech.models.sources import BASE_OF, find_source, model_fingerprint
from safety_mech.prompts import Drawn, draw, prompt_hash
from safety_mech.reporting.html import Example
from safety_mech.reporting.locate_report import locate_report, scaling_examples
from safety_mech.reporting.plots import plot_alpha, plot_attention, plot_contrastive_pair
from safety_mech.reporting.runs import check_writable, write_run
from safety_mech.reporting.tables import (
    alpha_sentence,
    alpha_table,
    difference_sentence,
    gap_sentence,
    gap_table,
    search_sentence,
    sweep_table,
)
from safety_mech.reporting.token_views import View, attention_heads_view, refusal_attribution_view

SHOWN = 3
"""Prompts of each kind whose answers the report shows: the first ones, so that nobody has chosen them."""


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
    least_refused: float = LEAST_REFUSED
    """Share of malicious prompts that the model must refuse for a range to be an answer; 0: any."""
    least_effect: float = LEAST_EFFECT
    """Share of the over-rejection prompts by which a range must change refusals to be an answer."""
    grid: bool = True
    """Also measure every range (start, end): most of the time."""
    quick: bool = False
    """Curves only, no search."""
    device: str | None = None
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    statistic: Statistic = "paper"
    """Where the initial range is read: paper (gap N-M minus N-N) or symmetric (N-M minus the mean of N-N and M-M)."""
    bootstrap_over: Unit = "prompts"
    """What the gap's bootstrap draws: prompts, or whole topics, known for the shipped sets."""
    r: int | None = None
    """Cosines and angles from this many sampled pairs of each kind, as in the paper (500); default: all pairs."""
    bootstrap: int = 1000
    permutations: int = 1000
    seed: int = 0
    out: str = "results"


Sets = dict[str, tuple[list[str], list[str]]]
Topics = dict[str, tuple[list[str], list[str]]]
"""Of every prompt of the sets, for the bootstrap; empty where it draws prompts."""


@dataclass(frozen=True)
class LocateResult:
    """`curves`: by prompt set, of the model; `base_curves`: of its base, where there is one."""

    curves: dict[str, sm.GapCurve]
    base_curves: dict[str, sm.GapCurve]
    initial: dict[str, sm.LayerRange | None]
    initial_samples: dict[str, Counter[sm.LayerRange | None]]
    differences: dict[str, sm.GapDifference]
    found: sm.SafetyLayers | None
    folder: Path


@dataclass(frozen=True)
class Start:
    """Where the search starts, and what says so."""

    range: sm.LayerRange | None
    source: str

    def __str__(self) -> str:
        return f"the search starts from {self.range}: {self.source}" if self.range else self.source


def main(config: LocateConfig) -> LocateResult:
    check_config(config)
    sets, topics = load_sets(config), load_topics(config)
    drawn_prompts = None if config.quick else draw(config.over_rejection, config.max_over_rejection, config.seed)
    over_rejection = drawn_prompts.prompts if drawn_prompts else []
    base_curves: dict[str, sm.GapCurve] = {}
    base_name = BASE_OF.get(config.model) if config.base == "auto" else config.base
    if base_name:
        base_curves = measure_all(load(base_name, None, config), sets, topics, config)
    model = load(config.model, config.adapter, config)
    curves = measure_all(model, sets, topics, config)
    by = config.statistic
    initial = {name: sm.initial_range(curve, statistic=by) for name, curve in curves.items()}
    samples = {name: sm.initial_range_samples(curve, statistic=by) for name, curve in curves.items()}
    print(gap_table(curves["prompts"], initial["prompts"]))
    for name, curve in curves.items():
        print(f"{name}: {gap_sentence(curve, initial[name], samples[name], by)}")
    differences = {name: sm.gap_difference(curves[name], base_curves[name]) for name in base_curves}
    for name, difference in differences.items():
        print(f"{name}, larger than in {base_name} by at most {difference_sentence(difference)}")
    start = starting_range(config, initial["prompts"], differences.get("prompts"))
    print(start)
    found = None
    if drawn_prompts is not None:
        found = search(model, sets["prompts"], curves["prompts"], drawn_prompts, start, config)
    prompt_sets = named_sets(sets, over_rejection)
    prompt_hashes = {name: prompt_hash(prompts) for name, prompts in prompt_sets.items()}
    metrics: dict[str, Any] = {
        "curves": {name: curve_metrics(curves[name], initial[name], samples[name]) for name in curves},
        "base_curves": {name: curve_metrics(curve, None, Counter()) for name, curve in base_curves.items()},
        "differences": {name: difference_metrics(difference) for name, difference in differences.items()},
        "start": start,
        "search": search_metrics(found) if found else None,
        "prompt_hashes": prompt_hashes,
        "drawn_ids": {"over_rejection": drawn_prompts.ids} if drawn_prompts else {},
        "model_fingerprint": model_fingerprint(config.model, config.adapter),
        "device": str(model.cfg.device),
        "seed": config.seed,
    }
    drawn = {config.model: curves["prompts"]}
    if base_curves:
        drawn[f"{base_name} (base)"] = base_curves["prompts"]
    if config.pairs:
        drawn["contrastive pairs"] = curves["contrastive pairs"]
    layers = found.range if found and found.range else start.range
    figures = {"gap": sm.plot_gap(drawn, {config.model: start.range}, f"template {config.template}")}
    figures |= search_figures(found, measure_unit(config))
    figures["attention"] = attention_figure(model, sets, layers, config)
    tensors = {
        f"{name}.{part}".replace(" ", "_"): getattr(curve, part)
        for name, curve in curves.items()
        for part in ("gap", "low", "high", "p_values", "samples")
    }
    tensors |= {f"{name}.symmetric".replace(" ", "_"): curve.symmetric.gap for name, curve in curves.items()}
    if found and found.grid is not None:
        tensors["grid"] = found.grid
    shown = [*over_rejection[:SHOWN], *draw(config.malicious, SHOWN, config.seed).prompts]
    report = locate_report(
        config,
        base_name=base_name,
        curves=curves,
        base_curves=base_curves,
        initial=initial,
        samples=samples,
        differences=differences,
        start=str(start),
        statistic=by,
        found=found,
        unit=measure_unit(config),
        figures=figures,
        examples=examples(model, shown, layers, found, config),
        views=views(model, shown, layers, config),
        prompt_hashes=prompt_hashes,
        sizes={name: len(prompts) for name, prompts in prompt_sets.items()},
    )
    folder = write_run(
        config.out,
        "locate",
        config.model,
        config=config,
        metrics=metrics,
        tensors=tensors,
        figures=figures,
        texts={"report.html": report},
    )
    names = ", ".join(sorted(path.name for path in folder.iterdir()))
    print(f"written: {folder}/ ({names})")
    return LocateResult(curves, base_curves, initial, samples, differences, found, folder)


def check_config(config: LocateConfig) -> None:
    """All that can be refused before a model is loaded."""
    if min(config.bootstrap, config.permutations) < 100:
        raise ValueError("bootstrap and permutations: expected at least 100 each, or the tails are guesses")
    if config.r is not None and config.r < 2:
        raise ValueError(f"r = {config.r}: expected at least 2 pairs of each kind")
    if config.max_over_rejection < 2:
        raise ValueError(f"max_over_rejection = {config.max_over_rejection}: expected at least 2 prompts")
    check_search_alpha(config.alpha)
    if not 0 <= config.least_effect <= 1 or not 0 <= config.least_refused <= 1:
        raise ValueError(
            f"least_effect = {config.least_effect}, least_refused = {config.least_refused}: expected shares"
        )
    if config.initial is not None:
        sm.LayerRange.parse(config.initial)
    find_recipe(config.recipe)
    check_template_name(config.template)
    check_device(config.device)
    find_source(config.model, config.adapter)
    if config.base not in (None, "auto"):
        find_source(config.base)
    check_writable(config.out)


def load_sets(config: LocateConfig) -> Sets:
    sets = {"prompts": (sm.load_prompts(config.normal), sm.load_prompts(config.malicious))}
    normal, malicious = sets["prompts"]
    if min(len(normal), len(malicious)) < 3:
        raise ValueError(f"{len(normal)} normal and {len(malicious)} malicious prompts: expected at least 3 of each")
    if config.pairs:
        twins = sm.load_pairs("test")
        sets["contrastive pairs"] = ([twin.normal for twin in twins], [twin.malicious for twin in twins])
    return sets


def load_topics(config: LocateConfig) -> Topics:
    """Before a model is loaded: that the topics of all prompts are known, where the bootstrap draws topics."""
    if config.bootstrap_over == "prompts":
        return {}
    known = {source: draw(source).clusters for source in (config.normal, config.malicious)}
    for source, clusters in known.items():
        if clusters is None:
            raise ValueError(f"bootstrap over topics: those of {source!r} are not known; use a shipped set, or prompts")
    pairs = [pair.category for pair in sm.load_pairs("test")]
    return {
        "prompts": (known[config.normal] or [], known[config.malicious] or []),
        "contrastive pairs": (pairs, pairs),
    }


def load(name: str, adapter: str | None, config: LocateConfig) -> HookedTransformer:
    print(f"loading {name} ...", flush=True)
    return sm.load_model(name, config.device, config.dtype, adapter=adapter)


def measure_all(model: HookedTransformer, sets: Sets, topics: Topics, config: LocateConfig) -> dict[str, sm.GapCurve]:
    return {
        name: measure(model, *sets[name], *topics.get(name, (None, None)), name == "contrastive pairs", config)
        for name in sets
    }


def measure(
    model: HookedTransformer,
    normal: list[str],
    malicious: list[str],
    normal_topics: list[str] | None,
    malicious_topics: list[str] | None,
    paired: bool,
    config: LocateConfig,
) -> sm.GapCurve:
    residuals = [
        sm.last_token_residuals(model, prompts, config.template, progress=True) for prompts in (normal, malicious)
    ]
    return sm.gap_curve(
        residuals[0],
        residuals[1],
        paired=paired,
        normal_clusters=normal_topics,
        malicious_clusters=malicious_topics,
        r=config.r,
        seed=config.seed,
        bootstrap=config.bootstrap,
        permutations=config.permutations,
    )


def starting_range(config: LocateConfig, own: sm.LayerRange | None, difference: sm.GapDifference | None) -> Start:
    """The given range; else that of the model's own gap, as in the paper; else that of the difference to the base."""
    if config.initial is not None:
        return Start(sm.LayerRange.parse(config.initial), "given")
    if own is not None:
        return Start(own, "the gap of the model's own curve")
    layers = sm.initial_range(difference, statistic=config.statistic) if difference is not None else None
    if layers is not None:
        return Start(layers, "the gap of the difference to the base (the model's own curve has none)")
    compared = "nor of its difference to the base" if difference is not None else "and no base to compare it with"
    return Start(None, f"no initial range: no gap of the model's own curve, {compared}")


def search(
    model: HookedTransformer,
    prompts: tuple[list[str], list[str]],
    curve: sm.GapCurve,
    over_rejection: Drawn,
    start: Start,
    config: LocateConfig,
) -> sm.SafetyLayers:
    found = sm.locate(
        model,
        *prompts,
        over_rejection.prompts,
        clusters=over_rejection.clusters,
        curve=curve,
        initial=start.range,
        alpha=config.alpha,
        above=not config.below,
        recipe=config.recipe,
        template=config.template,
        text=config.text,
        whole_grid=config.grid,
        least_refused=config.least_refused,
        least_effect=config.least_effect,
        seed=config.seed,
        progress=True,
    )
    if found.alpha:
        print(alpha_table(found.alpha))
        print(alpha_sentence(found.alpha))
    for sweep in found.sweeps or ():
        print(sweep_table(sweep, "refused"))
    print(search_sentence(found))
    return found


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
    model: HookedTransformer, sets: Sets, layers: sm.LayerRange | None, config: LocateConfig
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


def named_sets(sets: Sets, over_rejection: list[str]) -> dict[str, list[str]]:
    kinds = ("normal", "malicious")
    found = {f"{name} {kind}": p for name in sets for kind, p in zip(kinds, sets[name], strict=True)}
    return found | {"over_rejection": over_rejection}


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


if __name__ == "__main__":
    run(main, LocateConfig)
