"""How much of the gap is harm? Controls: topics, shuffled labels, the base, contrastive pairs, matched words.

    python experiments/validity.py
    python experiments/validity.py --model ./my-model --base ./my-model-before-alignment

Each control says how much gap there is without harm (another topic, shuffled labels, no alignment), or how much is left
when form is the same in both sets (contrastive pairs; equal length and similar words). What remains of the raw gap is
given at the layer where the raw gap is largest, with bootstrap intervals over prompts. stability.py says how stable
RANGES are. See docs/method.md#controls.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.commands.cells import base_of
from safety_mech.divergence.angles import GapStatistic, chosen
from safety_mech.divergence.controls import Matched, match_prompts, single_topics, topic_halves
from safety_mech.divergence.resampling import Statistic, angle_matrix, labelled_gaps
from safety_mech.models.chat import check_template_name, encode_chat, tokenizer_of
from safety_mech.models.sources import find_source
from safety_mech.prompts import prompt_hash, shipped_rows
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.reporting.plots import STYLES, layer_axis, new_figure
from safety_mech.reporting.runs import check_writable, write_run
from safety_mech.stats import Estimate

Samples = Float[Tensor, " sample"]


@dataclass(frozen=True)
class ValidityConfig:
    """Measure how much of the gap between malicious and normal prompts survives its controls."""

    model: str = "smollm2-135m-aligned"
    adapter: str | None = None
    base: str | None = "auto"
    """The model before alignment; auto: known for built-in models, none for others."""
    normal: str = "normal:test"
    malicious: str = "malicious:test"
    pairs: str = "test"
    """Split of the shipped contrastive pairs."""
    topics: str = "test"
    """Split of the shipped normal prompts, whose topics are the control for topic."""
    n_matched: int = 48
    """Pairs of equal token length and most similar words, picked out of `normal` and `malicious`."""
    statistic: Statistic = "paper"
    """The gap that is controlled: paper (N-M minus N-N) or symmetric (N-M minus the mean of N-N and M-M)."""
    template: str = "own"
    splits: int = 500
    """Random splits of the topics in halves."""
    bootstrap: int = 1000
    permutations: int = 1000
    device: str | None = None
    dtype: str = "float32"
    seed: int = 0
    out: str = "results"


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
    """What is left of the raw gap (degrees, and its share) at one layer after one control."""

    control: str
    left: Estimate
    share: Estimate


@dataclass(frozen=True)
class Sets:
    normal: list[str]
    malicious: list[str]
    pairs: list[sm.PromptPair]
    topic_prompts: list[str]
    topics: list[str]

    def hashes(self) -> dict[str, str]:
        paired = [text for pair in self.pairs for text in (pair.malicious, pair.normal)]
        sets = {"normal": self.normal, "malicious": self.malicious, "pairs": paired, "topics": self.topic_prompts}
        return {name: prompt_hash(prompts) for name, prompts in sets.items()}


def main(config: ValidityConfig) -> Path:
    sets = check_and_load(config)
    base_name = base_of(config.model, config.base)
    names = {config.model: config.adapter} | ({base_name: None} if base_name else {})
    for name, adapter in names.items():
        find_source(name, adapter)
    curves: dict[str, ModelCurves] = {}
    matched: Matched | None = None
    for name, adapter in names.items():
        model = sm.load_model(name, config.device, config.dtype, adapter=adapter)
        matched = matched or matched_prompts(model, sets, config)
        curves[name] = measure(model, sets, matched, config)
    assert matched is not None
    own, base = curves[config.model], curves[base_name] if base_name else None
    layer = int(own.raw.gap.argmax())
    rows = survivals(own, base, layer, config.statistic)
    text = table(rows, own.raw, layer, matched, config.statistic)
    print(text)
    figure, prompt_hashes = plot_controls(curves, config.statistic), sets.hashes()
    written = write_run(
        config.out,
        "validity",
        config.model,
        config=config,
        metrics={
            "layer": layer,
            "survival": rows,
            "matched": matched,
            "p_any": {name: {part: getattr(c, part).p_any for part in CURVES} for name, c in curves.items()},
            "prompt_hashes": prompt_hashes,
        },
        tensors={
            f"{name}.{part}.{leaf}": getattr(getattr(c, part), leaf)
            for name, c in curves.items()
            for part in CURVES
            for leaf in ("gap", "low", "high", "samples", "null")
        }
        | {f"{name}.topics.{part}": getattr(c, part) for name, c in curves.items() for part in ("halves", "single")},
        texts={"table.txt": text + "\n", "report.html": page_of(config, rows, text, figure, prompt_hashes)},
        figures={"controls": figure},
    )
    print(f"written: {written}/ (report.html, table.txt, metrics.json, tensors.safetensors, controls.png)")
    return written


CURVES = ("raw", "pairs", "matched")
NULL_OF: dict[Statistic, str] = {"paper": "shuffled labels", "symmetric": "spread alone (reflected prompts)"}
"""What `GapStatistic.null` holds."""


def check_and_load(config: ValidityConfig) -> Sets:
    check_template_name(config.template)
    if min(config.n_matched, config.splits, config.bootstrap, config.permutations) < 3:
        raise ValueError("n_matched, splits, bootstrap and permutations: expected at least 3 of each")
    rows = shipped_rows("normal", config.topics)
    sets = Sets(
        sm.load_prompts(config.normal),
        sm.load_prompts(config.malicious),
        sm.load_pairs(config.pairs),
        [row["prompt"] for row in rows],
        [row["category"] for row in rows],
    )
    check_writable(config.out)
    return sets


def matched_prompts(model: HookedTransformer, sets: Sets, config: ValidityConfig) -> Matched:
    lengths = [
        [len(chat) for chat in encode_chat(tokenizer_of(model), prompts, config.template)]
        for prompts in (sets.malicious, sets.normal)
    ]
    return match_prompts(sets.malicious, sets.normal, lengths[0], lengths[1], config.n_matched)


def measure(model: HookedTransformer, sets: Sets, matched: Matched, config: ValidityConfig) -> ModelCurves:
    """One forward pass a prompt; every curve is maths on the same residual streams."""
    normal, malicious, topics, pairs_n, pairs_m = (
        sm.last_token_residuals(model, prompts, config.template, progress=True)
        for prompts in (
            sets.normal,
            sets.malicious,
            sets.topic_prompts,
            [pair.normal for pair in sets.pairs],
            [pair.malicious for pair in sets.pairs],
        )
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
        labelled_gaps(angles, halves.double(), statistic=config.statistic),
        labelled_gaps(angles, single_topics(sets.topics).double(), statistic=config.statistic),
    )


# --- what survives ----------------------------------------------------------------------------------------------------


def survivals(own: ModelCurves, base: ModelCurves | None, layer: int, statistic: Statistic = "paper") -> list[Survival]:
    """Every control's rest of the raw gap at `layer`; last, the least of all of them.

    Nulls (topics, shuffled labels; for the symmetric statistic, what spread alone makes) are subtracted at their
    97.5 % quantile, the topic that parts most at its gap. The base is subtracted draw by draw, for both models are
    measured on the same prompts.
    """
    raw, at = own.raw.samples[:, layer], float(own.raw.gap[layer])

    def null(values: Float[Tensor, "sample layer"], quantile: float) -> float:
        return float(torch.quantile(values[:, layer].double(), quantile))

    rows = {
        "none: the raw gap": (at, raw),
        NULL_OF[statistic]: minus(at, raw, null(own.raw.null, 0.975)),
        "two halves of the harmless topics": minus(at, raw, null(own.halves, 0.975)),
        "one harmless topic against the rest": minus(at, raw, null(own.single, 1.0)),
        "contrastive pairs": (float(own.pairs.gap[layer]), own.pairs.samples[:, layer]),
        "equal length, similar words": (float(own.matched.gap[layer]), own.matched.samples[:, layer]),
    }
    if base is not None:
        for name, part in (("", "raw"), (", contrastive pairs", "pairs"), (", equal length, similar words", "matched")):
            after, before = getattr(own, part), getattr(base, part)
            difference = after.samples[:, layer] - before.samples[:, layer]
            rows[f"the base's gap{name}"] = (float(after.gap[layer] - before.gap[layer]), difference)
    least = min(rows, key=lambda name: rows[name][0])
    rows[f"all of them (the least: {least})"] = rows[least]
    return [
        Survival(name, interval(value, samples), interval(value / at, samples / raw))
        for name, (value, samples) in rows.items()
    ]


def minus(value: float, samples: Samples, null: float) -> tuple[float, Samples]:
    return value - null, samples - null


def interval(value: float, samples: Samples) -> Estimate:
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype))
    return Estimate(value, float(low), float(high))


def table(rows: list[Survival], raw: GapStatistic, layer: int, matched: Matched, statistic: Statistic) -> str:
    name = "raw gap" if statistic == "paper" else "symmetric raw gap"
    lines = [
        f"the {name} is largest at layer {layer} (p over all layers {raw.p_any:.3f}); what is left of it there:",
        f"{'control':<64}{'degrees':<22}share of the raw gap",
    ]
    lines += [f"{row.control:<64}{row.left!s:<22}{row.share}" for row in rows]
    lines.append(
        f"matched: {len(matched.pairs)} pairs of equal token length (sets: {matched.length_difference_before:+.1f}), "
        f"share of words in common {matched.shared_words:.2f} (sets: {matched.shared_words_before:.2f})"
    )
    return "\n".join(lines)


def page_of(
    config: ValidityConfig, rows: list[Survival], text: str, drawn: Figure, prompt_hashes: Mapping[str, str]
) -> str:
    raw, least = rows[0], rows[-1]
    lead = (
        f"Of a raw gap of {raw.left} degrees, the control that leaves least leaves {least.left} ({least.share} of it); "
        "95 % intervals."
    )
    alt = "Gap by layer, a panel a model: all prompts, contrastive pairs, matched words, and bands without harm"
    sections = [
        Section("The gap under its controls", [report.figure(drawn, alt, wide=True), report.fixed_width(text)]),
        report.settings_section(config, prompt_hashes),
    ]
    return report_page(f"How much of the gap of {config.model} is harm?", lead, sections)


def plot_controls(curves: Mapping[str, ModelCurves], statistic: Statistic = "paper") -> Figure:
    """One panel a model: raw gap with its interval, curves of the matched sets, and the null bands."""
    figure, axes = new_figure(columns=len(curves), width=6.5, height=4.6)
    lines = (("raw", "all prompts"), ("pairs", "contrastive pairs"), ("matched", "equal length, similar words"))
    for ax, (name, part) in zip(axes, curves.items(), strict=True):
        band(ax, part.raw.null, f"{NULL_OF[statistic]}, 95 %", color="#999999", hatch=None)
        band(ax, part.halves, "harmless topics in halves, 95 %", color="#56B4E9", hatch="\\\\")
        layers = range(part.raw.n_layers)
        ax.plot(layers, part.single.max(0).values.numpy(), color="black", linewidth=0.8, linestyle=(0, (1, 1)))
        ax.plot([], [], color="black", linewidth=0.8, linestyle=(0, (1, 1)), label="one harmless topic, the largest")
        for (leaf, label), style in zip(lines, STYLES, strict=False):
            curve = getattr(part, leaf)
            ax.plot(layers, curve.gap.numpy(), label=label, markersize=3, linewidth=1.4, **style)
            ax.fill_between(layers, curve.low, curve.high, color=style["color"], alpha=0.15, linewidth=0)
        ax.axhline(0, color="black", linewidth=0.8)
        layer_axis(ax, part.raw.n_layers)
        ax.set_title(Path(name).name, fontsize=10)
        ax.set_ylabel("angle gap (degrees)" if statistic == "paper" else "symmetric gap (degrees)")
    axes[0].legend(fontsize=7, frameon=False)
    limits = [bound for ax in axes for bound in ax.get_ylim()]
    for ax in axes:
        ax.set_ylim(min(limits), max(limits))
    return figure


def band(ax: Axes, values: Float[Tensor, "sample layer"], label: str, color: str, hatch: str | None) -> None:
    low, high = torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    layers = range(values.shape[1])
    ax.fill_between(
        layers, low, high, facecolor=color, alpha=0.3, hatch=hatch, edgecolor=color, linewidth=0, label=label
    )
