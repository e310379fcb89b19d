"""The report of a locate run (experiments/locate.py): what it measured in, the page out.

The order is a reader's: what was found and how sure it is, the curves, the controls, the search, examples, where the
model looks, and what it all was measured with.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from safety_mech.divergence.angles import STATISTICS, GapCurve, GapDifference, chosen
from safety_mech.divergence.onset import initial_range
from safety_mech.divergence.resampling import Statistic
from safety_mech.interventions.scaling import Recipe, scaled
from safety_mech.layers import LayerRange
from safety_mech.localization.safety_layers import SafetyLayers
from safety_mech.models.chat import Template
from safety_mech.models.generation import generate
from safety_mech.prompts import prompt_hash
from safety_mech.reporting import html as report
from safety_mech.reporting.grid import grid_picture
from safety_mech.reporting.html import Example, Section
from safety_mech.reporting.tables import (
    alpha_sentence,
    alpha_table,
    bootstrap_text,
    difference_sentence,
    gap_cells,
    gap_sentence,
    gap_table,
    search_sentence,
    sweep_table,
)
from safety_mech.reporting.token_views import View

EXAMPLE_TOKENS = 24
"""Enough to see a refusal or an answer begin."""

CONVENTIONS = "Layer 0 is the first block; a range includes both of its ends."
CAVEAT = (
    "That refusals move when a range is scaled does not prove that safety sits there, and a gap is a difference "
    "between two sets of prompts: compare the controls."
)


@dataclass(frozen=True)
class Start:
    """Where the search starts, and what says so."""

    range: LayerRange | None
    source: str

    def __str__(self) -> str:
        return f"the search starts from {self.range}: {self.source}" if self.range else self.source


@dataclass(frozen=True)
class LocateResult:
    """`curves`: by prompt set, of the model; `base_curves`: of its base, where there is one. `statistic`: the one that
    `initial` was read off. `folder`: the run's."""

    curves: dict[str, GapCurve]
    base_name: str | None
    base_curves: dict[str, GapCurve]
    statistic: Statistic
    initial: dict[str, LayerRange | None]
    initial_samples: dict[str, Counter[LayerRange | None]]
    differences: dict[str, GapDifference]
    start: Start
    found: SafetyLayers | None = None
    folder: Path = Path()

    def gap_sentence(self, name: str) -> str:
        """The largest gap on this prompt set, and its initial range."""
        return gap_sentence(self.curves[name], self.initial[name], self.initial_samples[name], self.statistic)

    def gap_sentences(self) -> list[str]:
        return [f"{name}: {self.gap_sentence(name)}" for name in self.curves]

    def difference_sentences(self) -> list[str]:
        minus = f"gap minus the gap of {self.base_name} peaks at"
        return [f"{name}: {minus} {difference_sentence(part)}" for name, part in self.differences.items()]


def locate_report(
    config: Any,
    result: LocateResult,
    *,
    figures: Mapping[str, Figure],
    examples: Sequence[Example],
    views: Sequence[View],
    prompt_sets: Mapping[str, Sequence[str]],
) -> str:
    """The page of a run.

    Args:
        config: a LocateConfig.
        figures: "gap" and, where there are any, "alpha", "sweeps" and "attention".
    """
    found = result.found
    drawn = _curves(result.curves["prompts"], result.initial["prompts"], figures["gap"])
    hashes = {name: prompt_hash(prompts) for name, prompts in prompt_sets.items()}
    sizes = {name: len(prompts) for name, prompts in prompt_sets.items()}
    sections = [
        Section("What was found", _findings(result)),
        Section("How far malicious prompts part from normal ones", drawn),
        Section("Controls", _controls(config.model, result)),
        Section("What scaling a range does to refusals", _search(found, config.unit, figures)),
        Section("Answers before and while scaling", _examples(found, config.recipe, examples)),
        Section("Where the model looks, and which tokens move its refusal", _pictures(figures.get("attention"), views)),
        report.settings_section(config, hashes, sizes),
    ]
    lead = search_sentence(found) if found else result.gap_sentence("prompts")
    return report.report_page(f"Safety layers of {config.model}", _sentence(lead), sections)


def scaling_examples(
    model: HookedTransformer,
    prompts: Sequence[str],
    layers: LayerRange,
    alpha: float,
    recipe: str | Recipe = "attn_out",
    template: str | Template = "own",
) -> list[Example]:
    """Greedy answers of EXAMPLE_TOKENS tokens to each prompt, of the model as it is and of the scaled one."""
    before = generate(model, prompts, EXAMPLE_TOKENS, template)
    with scaled(model, layers, alpha, recipe):
        after = generate(model, prompts, EXAMPLE_TOKENS, template)
    return [Example(*row) for row in zip(prompts, before, after, strict=True)]


def _sentence(text: str) -> str:
    """What the terminal prints, as a sentence."""
    return f"{text[0].upper()}{text[1:]}."


def _findings(result: LocateResult) -> list[Markup]:
    found = result.found
    sentences = [_sentence(text) for text in (*result.gap_sentences(), str(result.start))]
    if found is not None and found.samples and found.baseline is not None:
        total = sum(found.samples.values())
        counted = ", ".join(f"{layers} {count / total:.0%}" for layers, count in found.samples.most_common(6))
        sentences.append(
            f"The search measures refusals on {len(found.baseline)} harmless prompts; over {total} bootstrap samples "
            f"of them it answers most often {counted}."
        )
    return [*map(report.text, sentences), report.text(f"{CONVENTIONS} {CAVEAT}", "note")]


def _curves(curve: GapCurve, initial: LayerRange | None, drawn: Figure) -> list[Markup]:
    peak = int(curve.gap.argmax())
    alt = (
        "Three panels by layer: cosine similarities of prompt pairs, the angle gap and the symmetric gap in degrees; "
        f"the gap is largest, {float(curve.gap[peak]):.2f} degrees, at layer {peak} of {curve.n_layers}"
    )
    caption = (
        "Left: how alike the last token's residual streams of two prompts are. Middle: mean angle of normal-malicious "
        "pairs minus that of normal-normal pairs; a band that stays above 0 is a gap beyond noise. Right: minus the "
        "mean of both kinds of pairs within a set, which a wider set hardly moves; dotted, what spread alone makes of "
        f"it. Intervals: {bootstrap_text(curve)}."
    )
    lines = gap_table(curve, initial)
    return [report.figure(drawn, alt, caption, wide=True), report.folded("By layer", report.fixed_width(lines))]


def _controls(model: str, result: LocateResult) -> list[Markup]:
    rows = []
    for name, curve in result.curves.items():
        rows += _largest(name, model, curve)
        if name in result.base_curves:
            rows += _largest(name, f"{result.base_name} (base)", result.base_curves[name])
            rows += _largest(name, "model minus base", result.differences[name])
    head = ["prompts", "of", "statistic", "largest gap", "interval", "layer", "p, all layers", "initial range"]
    caption = (
        "Gaps in degrees. One that the base has too, or that contrastive pairs (same frame, one harmful and one "
        "harmless) do not have, belongs to the prompts and not to alignment. Paper: normal-malicious minus "
        "normal-normal, which a wider or narrower set moves too. Symmetric: minus the mean of both within, for place "
        f"alone; its p-value keeps each set's spread. The search uses the initial range of the {result.statistic} one. "
        f"Intervals: {bootstrap_text(result.curves['prompts'])}; p-values are over prompts."
    )
    sentences = [report.text(_sentence(text)) for text in result.difference_sentences()]
    return [report.table(head, rows, caption), *sentences]


def _largest(name: str, of: str, curve: GapCurve | GapDifference) -> list[list[str]]:
    """A row for each of the two statistics."""
    rows = []
    for statistic in STATISTICS:
        part, layers = chosen(curve, statistic), initial_range(curve, statistic=statistic)
        peak = int(part.gap.argmax())
        values = [*gap_cells(part, peak), str(peak), f"{part.p_any:.3f}", str(layers or "none")]
        rows.append([name, of, statistic, *values])
    return rows


def _search(found: SafetyLayers | None, unit: str, figures: Mapping[str, Figure]) -> list[Markup]:
    if found is None or found.sweeps is None or found.alpha is None:
        return []
    alt = "Two panels: " + "; ".join(f"{sweep.bound} bound, best {sweep.best}" for sweep in found.sweeps)
    caption = "The progressive search: the end of the range is swept with its start held, then the start."
    tables = "\n\n".join(sweep_table(sweep, "value") for sweep in found.sweeps)
    blocks = [report.text(_sentence(alpha_sentence(found.alpha)))]
    if "alpha" in figures:
        of_alpha = "By alpha: refused with the best range scaled, spread between ranges, share of degenerate answers"
        blocks.append(report.figure(figures["alpha"], of_alpha, "How alpha was chosen (paper A.3.4)."))
        blocks.append(report.folded("The curve over alpha as a table", report.fixed_width(alpha_table(found.alpha))))
    blocks.append(report.figure(figures["sweeps"], alt, caption, wide=True))
    blocks.append(report.folded("Sweeps as tables", report.fixed_width(tables)))
    if found.grid is not None:
        blocks.append(grid_picture(found.grid.mean(-1), unit, found.range, found.best_of_grid))
    return blocks


def _examples(found: SafetyLayers | None, recipe: str, shown: Sequence[Example]) -> list[Markup]:
    if found is None or found.alpha is None or not shown:
        return []
    layers = found.range or found.initial
    what = f"{recipe} of layers {layers} times {found.alpha.alpha}; greedy, {EXAMPLE_TOKENS} tokens"
    note = f"Prompts drawn by the seed. Scaled: {what}. Verdicts are the text judge's."
    return [report.text(note, "note"), report.examples(shown)]


def _pictures(attention: Figure | None, views: Sequence[View]) -> list[Markup]:
    blocks = []
    if attention is not None:
        alt = "Heatmap, a row a layer and a column a token of the question: attention of the prompt's last token"
        caption = "Attention of the last token over the question, mean over heads, each row scaled to its own range."
        blocks.append(report.figure(attention, alt, caption, wide=True))
    return [*blocks, report.views(views)] if views else blocks
