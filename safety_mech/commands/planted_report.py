"""What planted.py shows: tables, summary, figures and page of every locator on every organism."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from safety_mech.attention.question import min_max
from safety_mech.commands.cells import Answer
from safety_mech.commands.checks import BASE_METHODS, LOCATORS
from safety_mech.commands.planted import Organism
from safety_mech.layers import LayerRange
from safety_mech.localization.sufficiency import SUFFICIENT_SHARE, Transplants
from safety_mech.reporting.plots import BLUE, ORANGE, edges, new_figure
from safety_mech.reporting.tables import rows_table
from safety_mech.stats import (
    Estimate,
    RangeScore,
    correlation,
    mean_estimate,
    middle_third,
    overlap,
    random_iou,
    score_range,
    slope,
)

ORACLES = {f"sufficient {share:.0%}": share for share in (SUFFICIENT_SHARE, 0.95)}
"""Locators that know the minimal sufficient range for this share, and not what was trained."""

Summary = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One locator's answer on one organism; `score` against the truth, `sufficient_iou` against what does the work."""

    organism: Organism
    transplants: Transplants | None
    """None where training gained no margin: then nothing does the work."""
    method: str
    answer: Answer

    @property
    def range(self) -> LayerRange | None:
        return self.answer.range

    @property
    def score(self) -> RangeScore:
        return score_range(self.range, self.organism.planted)

    @property
    def sufficient_iou(self) -> float:
        return overlap(self.range, self.sufficient_range())

    def sufficient_range(self, share: float = SUFFICIENT_SHARE) -> LayerRange | None:
        return self.transplants.minimal_sufficient_range(share) if self.transplants else None

    @property
    def baselines(self) -> dict[str, float]:
        """IoU of guesses, which do not look at the model, and of ORACLES."""
        planted, n_layers = self.organism.planted, self.answer.n_layers
        guesses = {"middle third": middle_third(n_layers).iou(planted), "random range": random_iou(planted, n_layers)}
        return guesses | {name: overlap(self.sufficient_range(share), planted) for name, share in ORACLES.items()}


def cell_record(cell: Cell) -> dict[str, Any]:
    named = {"organism": cell.organism.name, "method": cell.method, "range": str(cell.range) if cell.range else None}
    spent = {"detail": cell.answer.detail, "seconds": cell.answer.seconds}
    return {**named, **vars(cell.score), "sufficient_iou": cell.sufficient_iou, **spent}


def line_of(cell: Cell) -> str:
    score = cell.score
    errors = "" if score.start_error is None else f"  ends off by {score.start_error:+d}, {score.end_error:+d}"
    head = f"{cell.organism.name:<24}{cell.method:<16}{cell.range!s:<10}IoU {score.iou:.2f}{errors}"
    return f"{head}  ({cell.answer.seconds:.0f} s) {cell.answer.detail}"


def by_organism(cells: Sequence[Cell]) -> dict[Organism, Cell]:
    """A cell of each: all cells of one organism know the same of it."""
    return {cell.organism: cell for cell in cells}


def organism_record(cell: Cell) -> dict[str, Any]:
    sufficient = {name: cell.sufficient_range(share) for name, share in ORACLES.items()}
    transplants = cell.transplants.to_plain() if cell.transplants else None
    return {**vars(cell.organism), "passes": cell.organism.passes, **sufficient, "transplants": transplants}


def organism_table(cells: Sequence[Cell]) -> str:
    """How every organism refuses, and which part of the planted range suffices."""
    rows = []
    for organism, cell in by_organism(cells).items():
        row: dict[str, object] = {"organism": organism.name, "planted": organism.planted, "seed": organism.seed}
        row |= {"role": organism.role, "malicious": f"{organism.malicious:.1%}", "normal": f"{organism.normal:.1%}"}
        if cell.transplants:
            layer, share = cell.transplants.best_single
            row |= {name: cell.sufficient_range(share) for name, share in ORACLES.items()}
            row["best layer alone"] = f"{layer} ({share:.0%} of {cell.transplants.gained:.1f} nats)"
        rows.append(row if organism.passes else row | {"": "does not pass: not in the summary"})
    sufficient = "the narrowest range of its layers that alone gives the base this share of the margin"
    return f"{rows_table(rows)}\nsufficient: {sufficient}"


def cell_table(cells: Sequence[Cell]) -> str:
    """Range and IoU of every locator on every organism, and the IoU of guesses and oracles; empty where not run."""
    rows: dict[str, dict[str, object]] = defaultdict(dict)
    for cell in cells:
        rows[cell.method][column_of(cell.organism)] = f"{cell.range} {cell.score.iou:.2f}"
    for organism, cell in by_organism(cells).items():
        for name, iou in cell.baselines.items():
            rows[name][column_of(organism)] = iou
    return rows_table({"found, IoU": name, **row} for name, row in rows.items())


def column_of(organism: Organism) -> str:
    return f"{organism.planted} s{organism.seed}"


def summaries(cells: Sequence[Cell]) -> dict[str, dict[str, Summary]]:
    """By role, then by method; organisms that do not refuse as the aligned model does are left out."""
    passing = [cell for cell in cells if cell.organism.passes]
    roles = sorted({cell.organism.role for cell in passing})
    groups = {role: [cell for cell in passing if cell.organism.role == role] for role in roles}
    return {name: summary_of(part) for name, part in {**groups, "all": passing}.items() if part}


def summary_of(cells: Sequence[Cell]) -> dict[str, Summary]:
    """Means with 95 % intervals over planted ranges: two seeds of one range are drawn together, as one."""
    table: dict[str, Summary] = {}
    for method in methods_of(cells):
        row = [cell for cell in cells if cell.method == method]
        planted = [str(cell.organism.planted) for cell in row]
        answered = [(cell, cell.range) for cell in row if cell.range is not None]
        table[method] = {
            "organisms": len(row),
            "answered": len(answered),
            "iou": mean_estimate([cell.score.iou for cell in row], planted),
            "start_error": mean_abs([cell.score.start_error for cell in row]),
            "end_error": mean_abs([cell.score.end_error for cell in row]),
            "centre_hits": sum(cell.score.centre_hit for cell in row),
            "sufficient_iou": mean_estimate([cell.sufficient_iou for cell in row], planted),
            **centre_figures(answered),
        }
    planted = [str(organism.planted) for organism in by_organism(cells)]
    for name, ious in pd.DataFrame([cell.baselines for cell in by_organism(cells).values()]).items():
        table[str(name)] = {"organisms": len(ious), "iou": mean_estimate(ious.tolist(), planted)}
    return table


def methods_of(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.method for cell in cells))


def centre_figures(answered: Sequence[tuple[Cell, LayerRange]]) -> dict[str, Estimate]:
    """Does the found centre move with the planted one? r is undefined for a locator that always gives one answer; the
    slope is then 0."""
    if len(answered) < 2:
        return {}
    truth = [cell.organism.planted.centre for cell, _ in answered]
    found = [layers.centre for _, layers in answered]
    groups = [str(cell.organism.planted) for cell, _ in answered]
    return {"correlation": correlation(truth, found, groups), "slope": slope(truth, found, groups)}


def mean_abs(errors: Sequence[int | None]) -> float | None:
    known = [abs(error) for error in errors if error is not None]
    return sum(known) / len(known) if known else None


def summary_table(found: dict[str, dict[str, Summary]]) -> str:
    return "\n\n".join(
        f"{role} organisms: mean with 95 % interval over planted ranges\n"
        + rows_table(summary_row(name, row) for name, row in table.items())
        for role, table in found.items()
    )


def summary_row(name: str, row: Summary) -> dict[str, object]:
    """Guesses and oracles have an IoU only; a locator's errors are in layers."""
    start, end = (None if row.get(key) is None else f"{row[key]:.1f}" for key in ("start_error", "end_error"))
    return {
        "locator": name,
        "n": row["organisms"],
        "IoU": row["iou"],
        "|start|": start,
        "|end|": end,
        "centre": f"{row['centre_hits']}/{row['organisms']}" if "centre_hits" in row else None,
        "IoU, sufficient": row.get("sufficient_iou"),
        "r of centres": row.get("correlation"),
        "slope of centres": row.get("slope"),
    }


def lead_of(found: dict[str, dict[str, Summary]]) -> str:
    """The best locator that needs no base, against a guess and an oracle; of held-out organisms, if there are any."""
    role = "held out" if "held out" in found else next(iter(found), None)
    if role is None:
        return "No organism refuses as the aligned model does: there is no summary."
    table = found[role]
    without_base = [name for name in table if name in LOCATORS] or [n for n in table if n in BASE_METHODS]
    best = max(without_base, key=lambda name: table[name]["iou"].value)
    others = "; ".join(f"{name} {table[name]['iou']}" for name in ("middle third", *ORACLES))
    return f"On {role} organisms the greatest mean IoU is that of {best}: {table[best]['iou']}. To compare: {others}."


def plot_ranges(cells: Sequence[Cell], n_layers: int) -> Figure:
    """One panel per locator, one column per organism: the planted range (wide, grey) and the found one (narrow)."""
    methods = methods_of(cells)
    organisms = sorted({cell.organism for cell in cells}, key=lambda o: (o.planted.centre, o.planted.width, o.seed))
    columns = min(4, len(methods))
    figure, axes = new_figure(columns, -(-len(methods) // columns), width=3.2, height=2.6)
    for ax in axes[len(methods) :]:
        ax.set_visible(False)
    for ax, method in zip(axes, methods, strict=False):
        found = {cell.organism: cell.range for cell in cells if cell.method == method}
        for x, organism in enumerate(organisms):
            bottom, width = organism.planted.start - 0.5, organism.planted.width
            ax.bar(x, width, bottom=bottom, color="#CCCCCC", width=0.9, linewidth=0, hatch="///", edgecolor="white")
            layers = found.get(organism)
            if layers is not None:
                color = BLUE if organism.role == "design" else ORANGE
                ax.bar(x, layers.width, bottom=layers.start - 0.5, color=color, width=0.45, edgecolor="black")
            elif organism in found:
                ax.text(x, -0.3, "none", rotation=90, ha="center", va="bottom", fontsize=6)
        ax.set_title(method, fontsize=9)
        ax.set_xticks(range(len(organisms)), [column_of(o) for o in organisms], rotation=90, fontsize=6)
        ax.set_ylim(-0.6, n_layers - 0.4)
        ax.set_ylabel("layer", fontsize=8)
    legend = "hatched grey: planted; bar: found (blue: design, orange: held out); no bar: not run on second seeds"
    figure.suptitle(legend, fontsize=9)
    return figure


def plot_scores(cells: Sequence[Cell]) -> Figure:
    """Per-layer scores of every organism (row) by every locator (column), scaled to 0..1; planted ranges are shaded."""
    methods, organisms = methods_of(cells), list(by_organism(cells))
    figure, axes = new_figure(len(methods), len(organisms), width=1.8, height=1.2)
    by_key = {(cell.organism, cell.method): cell for cell in cells}
    for ax, (organism, method) in zip(axes, product(organisms, methods), strict=True):
        cell = by_key.get((organism, method))
        if cell is None:
            ax.set_visible(False)
            continue
        ax.axvspan(*edges(organism.planted), color="#F0E442", alpha=0.4, linewidth=0)
        if cell.answer.found:
            ax.plot(min_max(cell.answer.found.scores[None])[0].numpy(), color=BLUE, linewidth=1)
        if cell.range:
            ax.plot(edges(cell.range), (-0.08, -0.08), color=ORANGE, linewidth=3, solid_capstyle="butt")
        ax.set(ylim=(-0.15, 1.05), yticks=[])
        ax.tick_params(labelsize=5)
        if organism == organisms[0]:
            ax.set_title(method, fontsize=7)
        if method == methods[0]:
            ax.set_ylabel(column_of(organism), fontsize=6)
    legend = "scores by layer (each from its least to its greatest); shaded: planted; bar below: found"
    figure.suptitle(legend, fontsize=8)
    return figure
