"""The run of `ranges.py`: one search per condition, and how well the answers agree."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import safety_mech as sm
from safety_mech.commands.cells import LOCATOR_MODULES, base_of
from safety_mech.commands.publish import publish
from safety_mech.commands.ranges import RangesConfig
from safety_mech.models.sources import model_fingerprint
from safety_mech.prompts import Drawn, prompt_hash
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section
from safety_mech.reporting.plots import BLUE, GREY, ORANGE, layer_axis, new_figure
from safety_mech.reporting.runs import cached_json, cell_path
from safety_mech.reporting.tables import rows_table


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
    """`found`: the located range, None where nothing was located (`reason` says why); `best`: the best range, located
    or not."""

    found: sm.LayerRange | None = None
    best: sm.LayerRange | None = None
    initial: sm.LayerRange | None = None
    alpha: float | None = None
    start_interval: tuple[int, int] | None = None
    end_interval: tuple[int, int] | None = None
    agreement: float = 0.0
    """Share of bootstrap samples with the same answer."""
    baseline: float | None = None
    """Refused share of the prompts, unscaled; `effect`: what scaling the range adds to it."""
    effect: float | None = None
    reason: str = ""


def run_ranges(config: RangesConfig, sets: dict[str, Drawn]) -> Path:
    """Search under every condition, in one order; returns the run's folder."""
    base_name = base_of(config.model, config.base)
    conditions = list_conditions(config, base_name, list(sets))
    models = {name: sm.load_model(name) for name in filter(None, (config.model, base_name))}
    starts = {template: Start.measure(models, config, base_name, template) for template in config.templates}
    answers = {}
    for number, condition in enumerate(conditions, 1):
        start, drawn = starts[condition.template], sets[condition.prompts]
        answers[condition] = cached_search(models[condition.model], condition, start, drawn, config)
        progress = "  ".join(str(value) for value in row_of(condition, answers[condition]).values())
        print(f"{number}/{len(conditions)} {progress}", flush=True)
    agreement = overlaps(answers, config.model)
    own = [answer for condition, answer in answers.items() if condition.model == config.model]
    of_conditions, of_pairs = rows_table(map(row_of, answers, answers.values())), overlap_table(agreement, own)
    figure = plot_answers(answers, models[config.model].cfg.n_layers)
    alt = "One bar per condition from start to end of the range, with the 90 % intervals of both; see the table"
    return publish(
        "ranges",
        config,
        f"{of_conditions}\n\n{of_pairs}",
        title=f"Located ranges of {config.model}",
        lead=lead_of(own, agreement),
        sections=[
            Section("Answers", [report.figure(figure, alt, wide=True), report.fixed_width(of_conditions)]),
            Section("Agreement", [report.fixed_width(of_pairs)]),
        ],
        metrics={
            "answers": [{"condition": c, "answer": a} for c, a in answers.items()],
            "overlap": agreement,
            "drawn_ids": {name: drawn.ids for name, drawn in sets.items()},
        },
        prompt_hashes={name: prompt_hash(drawn.prompts) for name, drawn in sets.items()},
        figures={"ranges": figure},
    )


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


def cached_search(model: Any, condition: Condition, start: Start, drawn: Drawn, config: RangesConfig) -> Answer:
    """From its file if it is there, which is named by all that the answer depends on."""
    hashes = [prompt_hash(prompts) for prompts in (drawn.prompts, *map(sm.load_prompts, GAP_SETS))]
    numbers = (config.window, config.samples, config.seed)
    key = (condition, model_fingerprint(condition.model), str(start.initial), hashes, drawn.clusters, numbers)
    label = f"{condition.recipe}-{condition.alpha}-{condition.measure}"
    path = cell_path(config.out, "ranges", config.model, label, *key, modules=LOCATOR_MODULES)
    make = partial(search, model, condition, start, drawn, config)
    record = cached_json(path, lambda: {"condition": condition, "answer": make()})
    found = {name: value for name, value in record["answer"].items() if value is not None}
    ranges = {name: sm.LayerRange(**found[name]) for name in ("found", "best", "initial") if name in found}
    intervals = {name: tuple(found[name]) for name in ("start_interval", "end_interval") if name in found}
    return Answer(**{**found, **ranges, **intervals})


def search(model: Any, condition: Condition, start: Start, drawn: Drawn, config: RangesConfig) -> Answer:
    if start.initial is None:
        return Answer(reason="no gap that the rule accepts")
    normal, malicious = map(sm.load_prompts, GAP_SETS)
    found = sm.locate(
        model,
        normal,
        malicious,
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
    answer = Answer(initial=found.initial, alpha=found.alpha.alpha, reason=found.reason)
    if best is None:
        return answer
    start_interval, end_interval = found.interval() or (None, None)
    return replace(
        answer,
        found=found.range,
        best=best,
        start_interval=start_interval,
        end_interval=end_interval,
        agreement=found.samples[best] / found.samples.total(),
        baseline=float(found.baseline.mean()),
        effect=found.effect.value if found.effect else None,
    )


def row_of(condition: Condition, answer: Answer) -> dict[str, object]:
    """A line of the table; where no range was found, with the reason alone."""
    if answer.best is None:
        return {**asdict(condition), "note": answer.reason}
    return {
        **asdict(condition),
        "scaled by": str(answer.alpha),
        "range": answer.best,
        "R_o": answer.baseline,
        "effect": f"{answer.effect:+.2f}",
        "start 90%": answer.start_interval or "",
        "end 90%": answer.end_interval or "",
        "same": f"{answer.agreement:.0%}",
        "note": "" if answer.found else answer.reason,
    }


def overlaps(answers: dict[Condition, Answer], model: str) -> dict[str, dict[str, float]]:
    """Mean IoU of the located ranges of all pairs of conditions, and of those that differ in one factor only; of the
    base's answers, with those of the model under the same condition."""
    located = {c: a.found for c, a in answers.items() if c.model == model and a.found is not None}
    of_base = {c: a.best for c, a in answers.items() if c.model != model and a.best is not None}
    pairs: list[tuple[str, float]] = []
    for (c, first), (d, second) in combinations(located.items(), 2):
        pairs.append(("all pairs", first.iou(second)))
        differing = differing_factors(c, d)
        if len(differing) == 1:
            pairs.append((f"only {differing[0]} differs", first.iou(second)))
    for (c, first), (d, second) in product(of_base.items(), located.items()):
        if not differing_factors(c, d):
            pairs.append(("the base's answer", first.iou(second)))
    ious = pd.DataFrame(pairs, columns=pd.Index(["pair", "iou"])).groupby("pair", sort=False)["iou"]
    summary = pd.DataFrame(ious.agg(mean="mean", least="min", greatest="max", pairs="count"))
    return {str(name): dict(part) for name, part in summary.to_dict(orient="index").items()}


def differing_factors(first: Condition, second: Condition) -> list[str]:
    return [name for name in FACTORS if getattr(first, name) != getattr(second, name)]


def overlap_table(agreement: dict[str, dict[str, float]], own: list[Answer]) -> str:
    rows = [{"pairwise IoU of the located ranges": name, **part} for name, part in agreement.items()]
    counted = Counter(str(answer.found) for answer in own)
    listed = "answers: " + ", ".join(f"{layers} x{count}" for layers, count in counted.most_common())
    return f"{rows_table(rows)}\n{listed}" if rows else listed


def lead_of(own: list[Answer], agreement: dict[str, dict[str, float]]) -> str:
    located = sum(answer.found is not None for answer in own)
    lead = f"{located} of {len(own)} searches locate a range; the table says why the others do not."
    if "all pairs" in agreement:
        lead += f" Two of the located ranges overlap by {agreement['all pairs']['mean']:.2f} on average (IoU)."
    return lead


def plot_answers(answers: dict[Condition, Answer], n_layers: int) -> Figure:
    """One bar a condition, from start to end, with the 90 % intervals of both."""
    figure, (ax,) = new_figure(width=9.0, height=1.2 + 0.22 * len(answers))
    labels = [" · ".join(map(str, vars(condition).values())) for condition in answers]
    model = next(iter(answers)).model
    for row, (condition, answer) in enumerate(answers.items()):
        color = ORANGE if condition.model == model else BLUE
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
