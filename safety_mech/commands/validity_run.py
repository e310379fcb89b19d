"""The run of `validity.py`: the gap of the model and of its base, under every control."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.commands.cells import base_of
from safety_mech.commands.publish import publish
from safety_mech.commands.validity import Sets, ValidityConfig
from safety_mech.divergence.angles import GapStatistic, chosen
from safety_mech.divergence.controls import Matched, match_prompts, single_topics, topic_halves
from safety_mech.divergence.resampling import Statistic, angle_matrix, labelled_means
from safety_mech.models.chat import encode_chat, tokenizer_of
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section
from safety_mech.reporting.plots import SKY, STYLES, layer_axis, line_with_band, new_figure
from safety_mech.reporting.tables import rows_table
from safety_mech.stats import Estimate, percentiles

CURVES = {"raw": "all prompts", "pairs": "contrastive pairs", "matched": "equal length, similar words"}
"""Fields of ModelCurves that have a curve with its interval, and what they are measured on."""
NULL_OF: dict[Statistic, str] = {"paper": "shuffled labels", "symmetric": "spread alone (reflected prompts)"}
"""What `GapStatistic.null` holds."""


@dataclass(frozen=True)
class ModelCurves:
    """Gaps of one model by one statistic, and those of harmless topics."""

    raw: GapStatistic
    pairs: GapStatistic
    matched: GapStatistic
    halves: Float[Tensor, "split layer"]
    single: Float[Tensor, "topic layer"]


@dataclass(frozen=True)
class Survival:
    """What is left of the raw gap at one layer after one control, in degrees and as a share."""

    control: str
    left: Estimate
    share: Estimate


def run_validity(config: ValidityConfig, sets: Sets) -> Path:
    base_name = base_of(config.model, config.base)
    names = {config.model: config.adapter} | ({base_name: None} if base_name else {})
    curves: dict[str, ModelCurves] = {}
    matched: Matched | None = None
    for name, adapter in names.items():
        model = sm.load_model(name, config.device, config.dtype, adapter=adapter)
        matched = matched or matched_prompts(model, sets, config)
        curves[name] = measure(model, sets, matched, config)
    assert matched is not None
    own = curves[config.model]
    layer = int(own.raw.gap.argmax())
    rows = survivals(own, curves[base_name] if base_name else None, layer, config.statistic)
    text = table(rows, own.raw, layer, matched, config.statistic)
    figure = plot_controls(curves, config.statistic)
    alt = "Gap by layer, one panel per model: all prompts, contrastive pairs, matched words, and bands without harm"
    raw, least = rows[0], rows[-1]
    return publish(
        "validity",
        config,
        text,
        title=f"How much of the gap of {config.model} is harm?",
        lead=f"Of a raw gap of {raw.left} degrees, the control that leaves least leaves {least.left} ({least.share} of "
        "it); 95 % intervals.",
        sections=[
            Section("The gap under its controls", [report.figure(figure, alt, wide=True), report.fixed_width(text)])
        ],
        metrics={
            "layer": layer,
            "survival": rows,
            "matched": matched,
            "p_any": {name: {part: getattr(c, part).p_any for part in CURVES} for name, c in curves.items()},
        },
        prompt_hashes=sets.hashes(),
        tensors=tensors_of(curves),
        figures={"controls": figure},
    )


def tensors_of(curves: Mapping[str, ModelCurves]) -> dict[str, Tensor]:
    """Every curve with its bounds, bootstrap samples and null; and the gaps of topics."""
    tensors = {}
    for name, of_model in curves.items():
        for part, leaf in product(CURVES, ("gap", "low", "high", "samples", "null")):
            tensors[f"{name}.{part}.{leaf}"] = getattr(getattr(of_model, part), leaf)
        tensors |= {f"{name}.topics.halves": of_model.halves, f"{name}.topics.single": of_model.single}
    return tensors


def matched_prompts(model: HookedTransformer, sets: Sets, config: ValidityConfig) -> Matched:
    lengths = [
        [len(chat) for chat in encode_chat(tokenizer_of(model), prompts, config.template)]
        for prompts in (sets.malicious, sets.normal)
    ]
    return match_prompts(sets.malicious, sets.normal, lengths[0], lengths[1], config.n_matched)


def measure(model: HookedTransformer, sets: Sets, matched: Matched, config: ValidityConfig) -> ModelCurves:
    """Run every prompt once; all curves are computed from the same residual streams."""
    pairs_n, pairs_m = [pair.normal for pair in sets.pairs], [pair.malicious for pair in sets.pairs]
    normal, malicious, topics, pairs_n, pairs_m = (
        sm.last_token_residuals(model, prompts, config.template, progress=True)
        for prompts in (sets.normal, sets.malicious, sets.topic_prompts, pairs_n, pairs_m)
    )
    options: dict[str, Any] = {"bootstrap": config.bootstrap, "permutations": config.permutations, "seed": config.seed}

    def curve(first: Tensor, second: Tensor, paired: bool = False) -> GapStatistic:
        return chosen(sm.gap_curve(first, second, paired=paired, **options), config.statistic)

    rows_m, rows_n = (list(side) for side in zip(*matched.pairs, strict=True))
    angles = angle_matrix(topics)
    halves = topic_halves(sets.topics, config.splits, config.seed)
    return ModelCurves(
        curve(normal, malicious),
        curve(pairs_n, pairs_m, paired=True),
        curve(normal[rows_n], malicious[rows_m], paired=True),
        getattr(labelled_means(angles, halves.double()), config.statistic),
        getattr(labelled_means(angles, single_topics(sets.topics).double()), config.statistic),
    )


def survivals(own: ModelCurves, base: ModelCurves | None, layer: int, statistic: Statistic = "paper") -> list[Survival]:
    """What every control leaves of the raw gap at `layer`; the last row repeats the one that leaves least.

    Nulls (topics, shuffled labels; for the symmetric statistic, what spread alone gives) are subtracted at their
    97.5 % quantile; of single topics, the largest gap. The base is subtracted draw by draw: both models see the same
    prompts.
    """

    def at_layer(part: GapStatistic, null: float | Tensor = 0.0) -> tuple[float, Float[Tensor, " sample"]]:
        return float(part.gap[layer] - null), part.samples[:, layer] - null

    def minus_base(name: str) -> tuple[float, Float[Tensor, " sample"]]:
        (after, drawn_after), (before, drawn_before) = at_layer(getattr(own, name)), at_layer(getattr(base, name))
        return after - before, drawn_after - drawn_before

    raw = at_layer(own.raw)
    rows = {
        "none: the raw gap": raw,
        NULL_OF[statistic]: at_layer(own.raw, percentiles(own.raw.null[:, layer])[1]),
        "two halves of the harmless topics": at_layer(own.raw, percentiles(own.halves[:, layer])[1]),
        "one harmless topic against the rest": at_layer(own.raw, own.single[:, layer].max()),
        "contrastive pairs": at_layer(own.pairs),
        "equal length, similar words": at_layer(own.matched),
    }
    if base is not None:
        rows["the base's gap"] = minus_base("raw")
        rows |= {f"the base's gap, {CURVES[name]}": minus_base(name) for name in ("pairs", "matched")}
    least = min(rows, key=lambda name: rows[name][0])
    rows[f"all of them (the least: {least})"] = rows[least]
    return [
        Survival(name, interval(value, samples), interval(value / raw[0], samples / raw[1]))
        for name, (value, samples) in rows.items()
    ]


def interval(value: float, samples: Float[Tensor, " sample"]) -> Estimate:
    return Estimate(value, *(float(bound) for bound in percentiles(samples)))


def table(rows: Sequence[Survival], raw: GapStatistic, layer: int, matched: Matched, statistic: Statistic) -> str:
    name = "raw gap" if statistic == "paper" else "symmetric raw gap"
    cells = ({"control": row.control, "degrees": row.left, "share of the raw gap": row.share} for row in rows)
    return (
        f"the {name} is largest at layer {layer} (p over all layers {raw.p_any:.3f}); what is left of it there:\n"
        f"{rows_table(cells)}\n"
        f"matched: {len(matched.pairs)} pairs of equal token length (sets: {matched.length_difference_before:+.1f}), "
        f"share of words in common {matched.shared_words:.2f} (sets: {matched.shared_words_before:.2f})"
    )


def plot_controls(curves: Mapping[str, ModelCurves], statistic: Statistic = "paper") -> Figure:
    """One panel per model: the raw gap with its interval, curves of the matched sets, and the null bands."""
    figure, axes = new_figure(columns=len(curves), width=6.5, height=4.6)
    for ax, (name, of_model) in zip(axes, curves.items(), strict=True):
        layers, topics = range(of_model.raw.n_layers), percentiles(of_model.halves)
        look: dict[str, Any] = {"alpha": 0.3, "linewidth": 0}
        null = f"{NULL_OF[statistic]}, 95 %"
        ax.fill_between(layers, *percentiles(of_model.raw.null), label=null, color="#999999", **look)
        ax.fill_between(layers, *topics, label="harmless topics in halves, 95 %", color=SKY, hatch="\\\\", **look)
        largest, dotted = of_model.single.max(0).values.numpy(), (0, (1, 1))
        ax.plot(largest, color="black", linewidth=0.8, linestyle=dotted, label="one harmless topic, the largest")
        for (part, label), style in zip(CURVES.items(), STYLES, strict=False):
            curve: GapStatistic = getattr(of_model, part)
            line_with_band(ax, curve.gap, curve.low, curve.high, label, style, shade=0.15)
        ax.axhline(0, color="black", linewidth=0.8)
        label = "angle gap (degrees)" if statistic == "paper" else "symmetric gap (degrees)"
        layer_axis(ax, of_model.raw.n_layers, label, Path(name).name)
    axes[0].legend(fontsize=7, frameon=False)
    limits = [bound for ax in axes for bound in ax.get_ylim()]
    for ax in axes:
        ax.set_ylim(min(limits), max(limits))
    return figure
