"""The report of a locate run (experiments/locate.py): what it measured in, the page out.

The order is a reader's: what was found and how sure it is, the curves, the controls, the search, examples, where the
model looks, and what it all was measured with.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from transformer_lens import HookedTransformer

from safety_mech import report
from safety_mech.chat import Template
from safety_mech.divergence import GapCurve, GapDifference
from safety_mech.generation import generate
from safety_mech.grid_html import grid_picture
from safety_mech.layers import LayerRange
from safety_mech.locate import SafetyLayers
from safety_mech.onset import initial_range
from safety_mech.report import Example, Section
from safety_mech.scaling import Recipe, scaled
from safety_mech.tables import (
    alpha_sentence,
    alpha_table,
    difference_sentence,
    gap_sentence,
    gap_table,
    interval_text,
    search_sentence,
    sweep_table,
)
from safety_mech.views import View

Initial = Mapping[str, LayerRange | None]
Samples = Mapping[str, Counter[LayerRange | None]]

EXAMPLE_TOKENS = 24
"""Enough to see a refusal or an answer begin."""

CONVENTIONS = "Layer 0 is the first block; a range includes both of its ends."
CAVEAT = (
    "That refusals move when a range is scaled does not prove that safety sits there, and a gap is a difference "
    "between two sets of prompts: compare the controls."
)


def locate_report(
    config: Any,
    *,
    base_name: str | None,
    curves: Mapping[str, GapCurve],
    base_curves: Mapping[str, GapCurve],
    initial: Initial,
    samples: Samples,
    differences: Mapping[str, GapDifference],
    start: str,
    found: SafetyLayers | None,
    unit: str,
    figures: Mapping[str, Figure],
    examples: Sequence[Example],
    views: Sequence[View],
    prompt_hashes: Mapping[str, str],
    sizes: Mapping[str, int],
) -> str:
    """`config`: a LocateConfig. By prompt set: curves, those of the base, initial ranges, their bootstrap samples.

    `start`: where the search starts and why; `unit`: of the measure that is swept; `figures`: "gap" and, where there
    are any, "sweeps" and "attention"; `sizes`: of the prompt sets, by name.
    """
    sections = [
        Section("What was found", _findings(curves, initial, samples, start, found)),
        Section("How far malicious prompts part from normal ones", _curves(curves["prompts"], initial, figures["gap"])),
        Section("Controls", _controls(config.model, base_name, curves, base_curves, initial, differences)),
        Section("What scaling a range does to refusals", _search(found, unit, figures)),
        Section("Answers before and while scaling", _examples(found, config.recipe, examples)),
        Section("Where the model looks, and which tokens move its refusal", _pictures(figures.get("attention"), views)),
        report.settings_section(config, prompt_hashes, sizes),
    ]
    lead = search_sentence(found) if found else gap_sentence(curves["prompts"], initial["prompts"], samples["prompts"])
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


def _findings(
    curves: Mapping[str, GapCurve], initial: Initial, samples: Samples, start: str, found: SafetyLayers | None
) -> list[Markup]:
    sentences = [
        _sentence(f"{name}: {gap_sentence(curve, initial[name], samples[name])}") for name, curve in curves.items()
    ]
    sentences.append(_sentence(start))
    if found is not None and found.samples and found.baseline is not None:
        total = sum(found.samples.values())
        counted = ", ".join(f"{layers} {count / total:.0%}" for layers, count in found.samples.most_common(6))
        sentences.append(
            f"The search measures refusals on {len(found.baseline)} harmless prompts; over {total} bootstrap samples "
            f"of them it answers most often {counted}."
        )
    return [*map(report.text, sentences), report.text(f"{CONVENTIONS} {CAVEAT}", "note")]


def _curves(curve: GapCurve, initial: Initial, drawn: Figure) -> list[Markup]:
    peak = int(curve.gap.argmax())
    alt = (
        f"Two panels by layer: cosine similarities of prompt pairs, and the angle gap in degrees with its interval; "
        f"the gap is largest, {float(curve.gap[peak]):.2f} degrees, at layer {peak} of {curve.n_layers}"
    )
    caption = (
        "Left: how alike the last token's residual streams of two prompts are. Right: mean angle of normal-malicious "
        "pairs minus that of normal-normal pairs; a band that stays above 0 is a gap beyond noise."
    )
    lines = gap_table(curve, initial["prompts"])
    return [report.figure(drawn, alt, caption, wide=True), report.folded("By layer", report.fixed_width(lines))]


def _controls(
    model: str,
    base_name: str | None,
    curves: Mapping[str, GapCurve],
    base_curves: Mapping[str, GapCurve],
    initial: Initial,
    differences: Mapping[str, GapDifference],
) -> list[Markup]:
    rows = []
    for name, curve in curves.items():
        rows.append([name, model, *_largest(curve, initial[name])])
        if name in base_curves:
            rows.append([name, f"{base_name} (base)", *_largest(base_curves[name], initial_range(base_curves[name]))])
            rows.append([name, "model minus base", *_largest(differences[name], initial_range(differences[name]))])
    head = ["prompts", "of", "largest gap", "interval", "layer", "p, all layers", "initial range"]
    caption = (
        "Gaps in degrees. One that the base has too, or that matched pairs (same frame, one harmful and one harmless) "
        "do not have, belongs to the prompts and not to alignment."
    )
    sentences = [
        _sentence(f"{name}, larger than in {base_name} by at most {difference_sentence(difference)}")
        for name, difference in differences.items()
    ]
    return [report.table(head, rows, caption), *(report.text(sentence) for sentence in sentences)]


def _largest(curve: GapCurve | GapDifference, layers: LayerRange | None) -> list[str]:
    peak = int(curve.gap.argmax())
    interval = interval_text(float(curve.low[peak]), float(curve.high[peak]))
    return [f"{float(curve.gap[peak]):.2f}", interval, str(peak), f"{curve.p_any:.3f}", str(layers or "none")]


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
