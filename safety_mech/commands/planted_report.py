"""What planted.py shows: tables, summary, figures and page of every locator on every organism."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from safety_mech.commands.cells import Answer
from safety_mech.layers import LayerRange
from safety_mech.localization.locators import BASE_METHODS, LOCATORS
from safety_mech.localization.sufficiency import SUFFICIENT_SHARE, Transplants
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.reporting.plots import BLUE, ORANGE, new_figure
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

Role = Literal["design", "held out", "unlisted"]
GUESSES = ("middle third", "random range")
"""Baselines: what one may guess without looking at the model."""
ORACLES = {f"sufficient {share:.0%}": share for share in (SUFFICIENT_SHARE, 0.95)}
"""What a locator would get that knows the minimal sufficient range for this share, and not what was trained."""
LEAST_MALICIOUS, MOST_NORMAL = 0.9, 0.05
"""Refusal rates that an organism must reach to count (those of the aligned model)."""


@dataclass(frozen=True)
class Organism:
    """One adapter: where refusals were planted, whether it may be looked at, and how it refuses."""

    folder: Path
    planted: LayerRange
    seed: int
    role: Role
    malicious: float
    normal: float

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def passes(self) -> bool:
        return self.malicious >= LEAST_MALICIOUS and self.normal <= MOST_NORMAL


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
        """With the minimal sufficient range."""
        return overlap(self.range, self.transplants.minimal_sufficient_range() if self.transplants else None)


def cell_record(cell: Cell) -> dict[str, Any]:
    parts = {"organism": cell.organism.name, "method": cell.method, "range": str(cell.range) if cell.range else None}
    return {
        **parts,
        **asdict(cell.score),
        "sufficient_iou": cell.sufficient_iou,
        "detail": cell.answer.detail,
        "seconds": cell.answer.seconds,
    }


def line_of(cell: Cell) -> str:
    score = cell.score
    errors = "" if score.start_error is None else f"  ends off by {score.start_error:+d}, {score.end_error:+d}"
    head = f"{cell.organism.name:<24}{cell.method:<16}{cell.range!s:<10}IoU {score.iou:.2f}{errors}"
    return f"{head}  ({cell.answer.seconds:.0f} s) {cell.answer.detail}"


def by_organism(cells: Sequence[Cell]) -> dict[Organism, Cell]:
    """A cell of each: all cells of one organism know the same of it."""
    return {cell.organism: cell for cell in cells}


def organism_record(cell: Cell) -> dict[str, Any]:
    organism, found = cell.organism, cell.transplants
    ranges = {name: found.minimal_sufficient_range(share) if found else None for name, share in ORACLES.items()}
    transplants = found.to_plain() if found else None
    return {**asdict(organism), "passes": organism.passes, **ranges, "transplants": transplants}


def organism_table(cells: Sequence[Cell]) -> str:
    """How every organism refuses, and which part of what was planted suffices."""
    lines = [
        f"{'organism':<24}{'planted':<10}{'seed':>4}  {'role':<10}{'refused: malicious':>18}{'normal':>8}"
        + "".join(f"{name:>16}" for name in ORACLES)
        + "  best layer alone",
    ]
    for o, cell in by_organism(cells).items():
        found = cell.transplants
        row = f"{o.name:<24}{o.planted!s:<10}{o.seed:>4}  {o.role:<10}{o.malicious:>18.1%}{o.normal:>8.1%}"
        if found:
            row += "".join(f"{found.minimal_sufficient_range(share)!s:>16}" for share in ORACLES.values())
            layer, share = found.best_single
            row += f"  {layer} ({share:.0%} of {found.gained:.1f} nats)"
        lines.append(row + ("" if o.passes else "  does not pass: not in the summary"))
    lines.append("sufficient: the narrowest range of its layers that alone gives the base this share of the margin")
    return "\n".join(lines)


def cell_table(cells: Sequence[Cell]) -> str:
    """Found range and IoU of every locator on every organism, and what guessing gets; empty where not run."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    of_organism = by_organism(cells)
    texts = {(cell.organism, cell.method): f"{cell.range} {cell.score.iou:.2f}" for cell in cells}
    lines = [f"{'found, IoU':<16}" + "".join(f"{f'{o.planted} s{o.seed}':>15}" for o in of_organism)]
    for method in methods:
        lines.append(f"{method:<16}" + "".join(f"{texts.get((o, method), ''):>15}" for o in of_organism))
    for name in (*GUESSES, *ORACLES):
        ious = (baseline_iou(name, cell) for cell in of_organism.values())
        lines.append(f"{name:<16}" + "".join(f"{iou:>15.2f}" for iou in ious))
    return "\n".join(lines)


def baseline_iou(name: str, cell: Cell) -> float:
    """What a guess or an oracle gets on a cell's organism."""
    planted, found = cell.organism.planted, cell.transplants
    if name == "middle third":
        return middle_third(cell.answer.n_layers).iou(planted)
    if name == "random range":
        return random_iou(planted, cell.answer.n_layers)
    return overlap(found.minimal_sufficient_range(ORACLES[name]) if found else None, planted)


Summary = dict[str, Any]


def summaries(cells: Sequence[Cell]) -> dict[str, dict[str, Summary]]:
    """By role, then by method; organisms that do not refuse as the aligned model does are left out."""
    groups = {
        role: [c for c in cells if c.organism.role == role and c.organism.passes] for role in sorted(roles(cells))
    }
    groups["all"] = [c for c in cells if c.organism.passes]
    return {name: summary_of(part) for name, part in groups.items() if part}


def roles(cells: Sequence[Cell]) -> set[Role]:
    return {cell.organism.role for cell in cells}


def summary_of(cells: Sequence[Cell]) -> dict[str, Summary]:
    """Means with 95 % intervals over planted ranges: two seeds of one range are drawn together, as one."""
    table: dict[str, Summary] = {}
    for method in dict.fromkeys(cell.method for cell in cells):
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
    of_organism = by_organism(cells)
    for name in (*GUESSES, *ORACLES):
        ious = [baseline_iou(name, cell) for cell in of_organism.values()]
        table[name] = {"organisms": len(ious), "iou": mean_estimate(ious, [str(o.planted) for o in of_organism])}
    return table


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
    lines = []
    for role, table in found.items():
        lines += [
            f"{role} organisms: mean with 95 % interval over planted ranges",
            f"{'locator':<16}{'n':>3}  {'IoU':<18}{'|start|':>8}{'|end|':>7}{'centre':>8}  {'IoU, sufficient':<18}"
            f"{'r of centres':<21}{'slope of centres':<21}",
        ]
        for method, row in table.items():
            errors = [row.get("start_error"), row.get("end_error")]
            texts = ["" if error is None else f"{error:.1f}" for error in errors]
            hits = f"{row['centre_hits']}/{row['organisms']}" if "centre_hits" in row else ""
            centres = f"{row.get('sufficient_iou', '')!s:<18}"
            centres += "".join(f"{row[name]!s:<21}" for name in ("correlation", "slope") if name in row)
            head = f"{method:<16}{row['organisms']:>3}  {row['iou']!s:<18}{texts[0]:>8}{texts[1]:>7}{hits:>8}  "
            lines.append((head + centres).rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def page_of(
    config: Any,
    found: dict[str, dict[str, Summary]],
    text: str,
    figures: dict[str, Figure],
    prompt_hashes: dict[str, str],
) -> str:
    ranges = "Found and planted layers, a panel a locator, a column an organism"
    scores = "Scores by layer, a row an organism, a column a locator; the planted range is shaded"
    sections = [
        Section("Found against planted", [report.figure(figures["ranges"], ranges, wide=True)]),
        Section("Tables", [report.fixed_width(text)]),
        Section("Scores", [report.figure(figures["scores"], scores, wide=True)]),
        report.settings_section(config, prompt_hashes),
    ]
    return report_page("Do locators find the layers where refusals were planted?", lead_of(found), sections)


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
    """One panel a locator: what was planted (wide, grey) and what was found (narrow), an organism a column."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
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
        ax.set_xticks(range(len(organisms)), [f"{o.planted} s{o.seed}" for o in organisms], rotation=90, fontsize=6)
        ax.set_ylim(-0.6, n_layers - 0.4)
        ax.set_ylabel("layer", fontsize=8)
    figure.suptitle(
        "hatched grey: planted; bar: found (blue: design, orange: held out); no bar: not run on second seeds",
        fontsize=9,
    )
    return figure


def plot_scores(cells: Sequence[Cell], n_layers: int) -> Figure:
    """Per-layer scores of every organism (row) by every locator (column), scaled to 0..1; planted ranges are shaded."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    organisms = list(dict.fromkeys(cell.organism for cell in cells))
    figure, axes = new_figure(len(methods), len(organisms), width=1.8, height=1.2)
    by_key = {(cell.organism, cell.method): cell for cell in cells}
    for index, ax in enumerate(axes):
        organism, method = organisms[index // len(methods)], methods[index % len(methods)]
        cell = by_key.get((organism, method))
        if cell is None:
            ax.set_visible(False)
            continue
        ax.axvspan(organism.planted.start - 0.5, organism.planted.end + 0.5, color="#F0E442", alpha=0.4, linewidth=0)
        if cell.answer.found:
            scores = cell.answer.found.scores - cell.answer.found.scores.min()
            ax.plot(range(n_layers), (scores / scores.max().clamp_min(1e-12)).numpy(), color=BLUE, linewidth=1)
        if cell.range:
            ends = (cell.range.start - 0.5, cell.range.end + 0.5)
            ax.plot(ends, (-0.08, -0.08), color=ORANGE, linewidth=3, solid_capstyle="butt")
        ax.set_ylim(-0.15, 1.05)
        ax.tick_params(labelsize=5)
        ax.set_yticks([])
        if index < len(methods):
            ax.set_title(method, fontsize=7)
        if index % len(methods) == 0:
            ax.set_ylabel(f"{organism.planted} s{organism.seed}", fontsize=6)
    figure.suptitle(
        "scores by layer (each from its least to its greatest); shaded: planted; bar below: found", fontsize=8
    )
    return figure
