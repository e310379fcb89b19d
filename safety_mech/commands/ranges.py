"""How much does the located range depend on how one looks? One search a condition, one table, pairwise IoU.

Conditions: what is scaled (attention output or the paper's weights) x alpha above or below 1 x text R_o or refusal
probability x template x prompt set. The base model, which hardly refuses, is searched from the same initial range:
what it answers is what the search says where there is nothing to find.

    python experiments/ranges.py --sets over_rejection:test my_over_rejection.csv

A killed run goes on where it was: every finished condition is a file in OUT/ranges/MODEL/cells.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import safety_mech as sm
from safety_mech.commands.cells import LOCATOR_MODULES, base_of
from safety_mech.models.sources import find_source, model_fingerprint
from safety_mech.prompts import Drawn, draw, prompt_hash
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.reporting.plots import BLUE, GREY, ORANGE, layer_axis, new_figure
from safety_mech.reporting.runs import cached_json, cell_path, check_writable, write_run


@dataclass(frozen=True)
class RangesConfig:
    """Locate the safety layers under many conditions, and say how well the answers agree."""

    model: str = "smollm2-135m-aligned"
    base: str | None = "auto"
    """The model before alignment: its difference gives the initial range, and it is searched as the control."""
    sets: tuple[str, ...] = ("over_rejection:test",)
    """Sets of harmless prompts that a scaled model may refuse."""
    recipes: tuple[str, ...] = ("attn_out", "weights")
    templates: tuple[str, ...] = ("own", "alpaca")
    initial: str | None = None
    """START-END to start every search from; default: by rule, as in `locate.py`."""
    n_prompts: int = 50
    """Prompts of each set."""
    window: int = 2
    """Layers that a sweep goes to both sides: the paper's five ranges; wider where the best is at an edge."""
    samples: int = 200
    """Bootstrap samples of the prompts, for the interval."""
    seed: int = 0
    out: str = "results"


@dataclass(frozen=True)
class Condition:
    model: str
    recipe: str
    alpha: str
    """above or below 1"""
    measure: str
    """text or probability"""
    template: str
    prompts: str


FACTORS = tuple(field.name for field in fields(Condition) if field.name != "model")


@dataclass(frozen=True)
class Answer:
    """`found`: the search's answer, None where there is nothing to find (`reason` says why); `best`: without asking."""

    found: sm.LayerRange | None
    best: sm.LayerRange | None
    initial: sm.LayerRange | None
    alpha: float | None
    start_interval: tuple[int, int] | None
    end_interval: tuple[int, int] | None
    agreement: float
    """Share of bootstrap samples with the same answer."""
    baseline: float | None
    """Refused share of the prompts, unscaled; `effect`: what scaling the range adds to it."""
    effect: float | None
    reason: str


def main(config: RangesConfig) -> Path:
    for name in ("n_prompts", "samples"):
        if getattr(config, name) < 2:
            raise ValueError(f"{name} = {getattr(config, name)}: expected at least 2")
    sets = {Path(name).name: draw(name, config.n_prompts, config.seed) for name in config.sets}
    base_name = base_of(config.model, config.base)
    for name in filter(None, (config.model, base_name)):
        find_source(name)
    check_writable(config.out)
    conditions = list_conditions(config, base_name, list(sets))
    models = {name: sm.load_model(name) for name in filter(None, (config.model, base_name))}
    starts = {template: Start.measure(models, config, base_name, template) for template in config.templates}
    answers = {}
    for number, condition in enumerate(conditions, 1):
        start = starts[condition.template]
        path = path_of(condition, config, start.initial, sets[condition.prompts])
        answers[condition] = answer_of(cached_json(path, partial(search_once, models, condition, start, sets, config)))
        print(f"{number}/{len(conditions)} {line_of(condition, answers[condition])}", flush=True)
    text = "\n".join([table(answers), "", overlap_table(answers, config.model)])
    print(f"\n{text}")
    prompt_hashes = {name: prompt_hash(drawn.prompts) for name, drawn in sets.items()}
    figure = plot_answers(answers, models[config.model].cfg.n_layers)
    written = write_run(
        config.out,
        "ranges",
        config.model,
        config=config,
        metrics={
            "answers": [{"condition": c, "answer": a} for c, a in answers.items()],
            "overlap": overlaps(answers, config.model),
            "prompt_hashes": prompt_hashes,
            "drawn_ids": {name: drawn.ids for name, drawn in sets.items()},
        },
        texts={"table.txt": text + "\n", "report.html": page_of(config, answers, figure, prompt_hashes)},
        figures={"ranges": figure},
    )
    print(f"written: {written}/ (report.html, table.txt, metrics.json, config.json, ranges.png)")
    return written


def list_conditions(config: RangesConfig, base: str | None, sets: Sequence[str]) -> list[Condition]:
    """All combinations for the model; for the base, the control, those of the first template and set."""
    sides, measures = ("above", "below"), ("probability", "text")
    of_model = product((config.model,), config.recipes, sides, measures, config.templates, sets)
    of_base = product((base,) if base else (), config.recipes, sides, measures, config.templates[:1], sets[:1])
    return [Condition(*values) for values in (*of_model, *of_base)]


@dataclass(frozen=True)
class Start:
    """Gap curves of both models under one template, and the initial range that they give."""

    curves: dict[str, sm.GapCurve]
    initial: sm.LayerRange | None

    @classmethod
    def measure(cls, models: dict[str, Any], config: RangesConfig, base: str | None, template: str) -> "Start":
        sets = [sm.load_prompts(name) for name in GAP_SETS]
        curves = {
            name: sm.gap_curve(*(sm.last_token_residuals(model, p, template) for p in sets), seed=config.seed)
            for name, model in models.items()
        }
        initial = sm.LayerRange.parse(config.initial) if config.initial else sm.initial_range(curves[config.model])
        if initial is None and base:
            initial = sm.initial_range(sm.gap_difference(curves[config.model], curves[base]))
        print(f"template {template}: the search starts from {initial}", flush=True)
        return cls(curves, initial)


GAP_SETS = ("normal:test", "malicious:test")
"""Where the gap is measured that the search starts from."""


def path_of(condition: Condition, config: RangesConfig, initial: sm.LayerRange | None, drawn: Drawn) -> Path:
    """A search's file, named by all that its answer depends on."""
    hashes = [prompt_hash(prompts) for prompts in (drawn.prompts, *map(sm.load_prompts, GAP_SETS))]
    numbers = (config.window, config.samples, config.seed)
    key = (condition, model_fingerprint(condition.model), str(initial), hashes, drawn.clusters, numbers)
    label = f"{condition.recipe}-{condition.alpha}-{condition.measure}"
    return cell_path(config.out, "ranges", config.model, label, *key, modules=LOCATOR_MODULES)


def search_once(
    models: dict[str, Any], condition: Condition, start: Start, sets: dict[str, Drawn], config: RangesConfig
) -> dict[str, Any]:
    """One search, with what it was for: a file of its own should say so."""
    return {"condition": condition, "answer": search(models[condition.model], condition, start, sets, config)}


def search(model: Any, condition: Condition, start: Start, sets: dict[str, Drawn], config: RangesConfig) -> Answer:
    if start.initial is None:
        return Answer(None, None, None, None, None, None, 0.0, None, None, "no gap that the rule accepts")
    drawn = sets[condition.prompts]
    found = sm.locate(
        model,
        sm.load_prompts(GAP_SETS[0]),
        sm.load_prompts(GAP_SETS[1]),
        drawn.prompts,
        clusters=drawn.clusters,
        curve=start.curves[condition.model],
        initial=start.initial,
        recipe=condition.recipe,
        above=condition.alpha == "above",
        template=condition.template,
        text=condition.measure == "text",
        window=config.window,
        samples=config.samples,
        seed=config.seed,
    )
    assert found.alpha is not None
    assert found.baseline is not None
    best = found.alpha.point.range
    if best is None:
        return Answer(None, None, found.initial, found.alpha.alpha, None, None, 0.0, None, None, found.reason)
    interval = found.interval()
    return Answer(
        found.range,
        best,
        found.initial,
        found.alpha.alpha,
        interval[0] if interval else None,
        interval[1] if interval else None,
        found.samples[best] / found.samples.total(),
        float(found.baseline.mean()),
        found.effect.value if found.effect else None,
        found.reason,
    )


def answer_of(record: dict[str, Any]) -> Answer:
    """From a cached file."""
    values = record["answer"]
    for name in ("found", "best", "initial"):
        values[name] = sm.LayerRange(**values[name]) if values[name] else None
    for name in ("start_interval", "end_interval"):
        values[name] = tuple(values[name]) if values[name] else None
    return Answer(**values)


# --- what is shown ----------------------------------------------------------------------------------------------------


def line_of(condition: Condition, answer: Answer) -> str:
    head = f"{condition.model:<23}{condition.recipe:<10}{condition.alpha:<7}{condition.measure:<12}"
    head += f"{condition.template:<10}{condition.prompts:<22}"
    if answer.best is None:
        return f"{head}{answer.reason}"
    spans = f"{list(answer.start_interval or ())!s:<10}{list(answer.end_interval or ())!s:<10}"
    weak = "" if answer.found else f"  ({answer.reason})"
    rates = f"{answer.baseline:>6.2f}{answer.effect:>+7.2f}"
    return f"{head}{answer.alpha:<7}{answer.best!s:<10}{rates}  {spans}{answer.agreement:>5.0%}{weak}"


def table(answers: dict[Condition, Answer]) -> str:
    head = f"{'model':<23}{'recipe':<10}{'side':<7}{'measure':<12}{'template':<10}{'prompts':<22}"
    head += f"{'alpha':<7}{'range':<10}{'R_o':>6}{'scaled':>7}  {'start 90%':<10}{'end 90%':<10}{'same':>5}"
    return "\n".join([head, *(line_of(condition, answer) for condition, answer in answers.items())])


def overlaps(answers: dict[Condition, Answer], model: str) -> dict[str, dict[str, float]]:
    """Mean IoU of the located ranges of all pairs of conditions, and of those that differ in one factor only."""
    ranges = {c: a.found for c, a in answers.items() if c.model == model and a.found is not None}
    pairs = [(c, d, ranges[c].iou(ranges[d])) for c, d in combinations(ranges, 2)]
    groups: dict[str, list[float]] = {"all pairs": [iou for _, _, iou in pairs]}
    for c, d, iou in pairs:
        differing = [name for name in FACTORS if getattr(c, name) != getattr(d, name)]
        if len(differing) == 1:
            groups.setdefault(f"only {differing[0]} differs", []).append(iou)
    controls = [(c, a.best) for c, a in answers.items() if c.model != model and a.best is not None]
    for c, best in controls:
        matching = [r for d, r in ranges.items() if all(getattr(c, name) == getattr(d, name) for name in FACTORS)]
        groups.setdefault("the base's answer", []).extend(best.iou(r) for r in matching)
    return {
        name: {"mean": float(np.mean(ious)), "least": min(ious), "greatest": max(ious), "pairs": len(ious)}
        for name, ious in groups.items()
        if ious
    }


def overlap_table(answers: dict[Condition, Answer], model: str) -> str:
    lines = [f"{'pairwise IoU of the located ranges':<36}{'mean':>6}{'least':>7}{'most':>6}{'pairs':>7}"]
    for name, part in overlaps(answers, model).items():
        lines.append(
            f"{name:<36}{part['mean']:>6.2f}{part['least']:>7.2f}{part['greatest']:>6.2f}{int(part['pairs']):>7}"
        )
    counted = Counter(str(a.found) for c, a in answers.items() if c.model == model)
    lines.append("answers: " + ", ".join(f"{layers} x{count}" for layers, count in counted.most_common()))
    return "\n".join(lines)


def page_of(
    config: RangesConfig, answers: dict[Condition, Answer], drawn: Figure, prompt_hashes: dict[str, str]
) -> str:
    own = {condition: answer for condition, answer in answers.items() if condition.model == config.model}
    located = sum(answer.found is not None for answer in own.values())
    lead = f"{located} of {len(own)} searches locate a range; the table says why the others do not."
    if "all pairs" in (agreement := overlaps(answers, config.model)):
        lead += f" Two of the located ranges overlap by {agreement['all pairs']['mean']:.2f} on average (IoU)."
    alt = "A bar a condition from start to end of the range, with the 90 % intervals of both; the table has the numbers"
    sections = [
        Section("Answers", [report.figure(drawn, alt, wide=True), report.fixed_width(table(answers))]),
        Section("Agreement", [report.fixed_width(overlap_table(answers, config.model))]),
        report.settings_section(config, prompt_hashes),
    ]
    return report_page(f"Located ranges of {config.model}", lead, sections)


def plot_answers(answers: dict[Condition, Answer], n_layers: int) -> Figure:
    """One bar a condition, from start to end, with the 90 % intervals of both."""
    figure, (ax,) = new_figure(width=9.0, height=1.2 + 0.22 * len(answers))
    models = list(dict.fromkeys(condition.model for condition in answers))
    labels = []
    for row, (condition, answer) in enumerate(answers.items()):
        color = ORANGE if condition.model == models[0] else BLUE
        labels.append(" · ".join(str(getattr(condition, name)) for name in ("model", *FACTORS)))
        if answer.best is None:
            continue
        if answer.initial is not None:
            ax.barh(row, answer.initial.width, left=answer.initial.start - 0.5, height=1.0, color=GREY, alpha=0.3)
        left, width = answer.best.start - 0.5, answer.best.width
        filled = color if answer.found else "white"
        ax.barh(row, width, left=left, height=0.6, color=filled, edgecolor=color, alpha=0.75)
        for interval in (answer.start_interval, answer.end_interval):
            if interval:
                ax.plot(interval, (row, row), color="black", linewidth=1.2, marker="|", markersize=5)
    ax.set_yticks(range(len(labels)), labels, fontsize=6)
    ax.set_ylim(len(labels) - 0.4, -0.6)
    layer_axis(ax, n_layers)
    legend = "white: nothing to find, see the table; grey: where the search starts"
    figure.suptitle(f"located range and 90 % bootstrap intervals of its ends\n{legend}", fontsize=9)
    return figure
