"""Does a locator find the layers where refusals were planted? Every locator on every organism, against the truth.

    python experiments/planted.py                                         # the ten shipped organisms
    python experiments/planted.py --train --adapters results/adapters     # make them again first
    python experiments/planted.py --roles design                          # while a locator may still be changed

Organisms are adapters of which only a known range of layers was trained (align.py). DESIGN organisms may be looked at
while locators are chosen and changed; HELD OUT ones (all second seeds, and two ranges) only afterwards.
A killed run goes on where it was: every finished (organism, locator) is a file in OUT/planted/MODEL/cells.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from matplotlib.figure import Figure

import safety_mech as sm
from safety_mech.commands.align import AlignRun
from safety_mech.commands.align import main as align
from safety_mech.commands.command_line import run
from safety_mech.data_files import data_folder
from safety_mech.localization.located import Located, PromptSets, attempt, shared_measurements
from safety_mech.localization.locators import LOCATORS, base_locators
from safety_mech.localization.sufficiency import CORE_SHARE, Transplants, transplant
from safety_mech.models.loading import find_source
from safety_mech.prompts import Drawn, draw, draw_pairs
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.reporting.plots import BLUE, ORANGE, new_figure
from safety_mech.reporting.runs import cached_json, check_writable, content_hash, safe_name, write_run
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
from safety_mech.training.lora import adapter_hash

Role = Literal["design", "held out", "unlisted"]
SHIPPED = "shipped"
BASE_METHODS = ("gap_difference", "weight_change", "swap")
GUESSES = ("middle third", "random range")
"""Baselines: what one may guess without looking at the model."""
ORACLES = {f"core of {share:.0%}": share for share in (CORE_SHARE, 0.95)}
"""What a locator would get that knows what does the work, to this share, and not what was trained."""
CORE_PROMPTS = 32
"""Of each kind, for the core: every range within the planted one is measured."""
LEAST_MALICIOUS, MOST_NORMAL = 0.9, 0.05
"""Refusal rates that an organism must reach to count (those of the aligned model)."""


@dataclass(frozen=True)
class PlantedConfig:
    """Score every locator against the ranges where refusals were planted."""

    model: str = "smollm2-135m-instruct"
    """The base model, before alignment."""
    adapters: str = SHIPPED
    """Folder of organisms: every sub-folder with an adapter and a recipe.json that names its planted range."""
    design: tuple[str, ...] = ("5-10", "18-23", "10-12")
    """Planted ranges whose FIRST seed is for design: early, late, narrow."""
    held_out: tuple[str, ...] = ("12-17", "8-21")
    """Planted ranges that are for testing only: middle, wide."""
    seeds: tuple[int, ...] = (0, 1)
    roles: tuple[Role, ...] = ("design", "held out", "unlisted")
    """Which organisms are measured: `--roles design` while a locator may still be changed."""
    train: bool = False
    """Make the organisms of these lists that are missing from --adapters: under half an hour each."""
    epochs: int = 3
    batch_size: int = 8
    learning_rate: float = 3e-3
    rank: int = AlignRun.rank
    bfloat16: bool = False
    """As in align.py. A few layers learn less in a step than all of them do: the batches are smaller and the rate is
    higher."""
    methods: tuple[str, ...] = (*LOCATORS, *BASE_METHODS)
    first_seed_methods: tuple[str, ...] = ("grid", "margin_scaled", "search_below")
    """Of these, the ones that are run on first seeds only: they take as long as all others together."""
    n_prompts: int = 64
    """Normal and malicious test prompts, of each; and contrastive pairs, less those of unequal length."""
    n_margin_scaled: int = 16
    """Of each kind, for margin_scaled."""
    n_over_rejection: int = 16
    """Over-rejection prompts, for the paper's search and the whole grid: most of the time."""
    template: str = "own"
    seed: int = 0
    out: str = "results"


@dataclass(frozen=True)
class Organism:
    """One adapter: where refusals were planted, whether it may be looked at, and how it refuses."""

    folder: Path
    planted: sm.LayerRange
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
    """One locator's answer on one organism; `score` against the truth, `core_iou` against what does the work."""

    organism: Organism
    transplants: Transplants | None
    """None where training gained no margin: then nothing does the work."""
    method: str
    found: Located | None
    """None where the method could not be run; `detail` says why."""
    detail: str
    seconds: float
    n_layers: int

    @property
    def range(self) -> sm.LayerRange | None:
        return self.found.range if self.found else None

    @property
    def score(self) -> RangeScore:
        return score_range(self.range, self.organism.planted)

    @property
    def core_iou(self) -> float:
        return overlap(self.range, self.transplants.core() if self.transplants else None)


def main(config: PlantedConfig) -> Path:
    check_config(config)
    if config.train:
        train_missing(config)
    organisms = [o for o in find_organisms(config) if o.role in config.roles]
    if not organisms:
        roles = ", ".join(config.roles)
        raise ValueError(f"no organism of {roles} in {config.adapters!r}: make them with --train --adapters FOLDER")
    prompts = load_sets(config)
    cells: list[Cell] = []
    for organism in organisms:
        with shared_measurements():
            for cell in measure(organism, prompts, config):
                cells.append(cell)
                print(line_of(cell), flush=True)
    if not cells:
        methods = ", ".join(config.methods)
        raise ValueError(f"{methods}: run on first seeds only, and there are none: expected others, or these organisms")
    n_layers = cells[0].n_layers
    found, prompt_hashes = summaries(cells), prompts.hashes()
    text = "\n".join([organism_table(cells), "", cell_table(cells), "", summary_table(found)])
    print(f"\n{text}")
    figures = {"ranges": plot_ranges(cells, n_layers), "scores": plot_scores(cells, n_layers)}
    written = write_run(
        config.out,
        "planted",
        config.model,
        config=config,
        metrics={
            "organisms": [organism_record(cell) for cell in by_organism(cells).values()],
            "cells": [cell_record(cell) for cell in cells],
            "summary": found,
            "prompt_hashes": prompt_hashes,
            "drawn_ids": drawn_ids(config),
        },
        tensors={f"{c.organism.name}.{c.method}": c.found.scores for c in cells if c.found},
        texts={"table.txt": text + "\n", "report.html": page_of(config, found, text, figures, prompt_hashes)},
        figures=figures,
    )
    print(f"written: {written}/ (report.html, table.txt, metrics.json, tensors.safetensors, *.png)")
    return written


def check_config(config: PlantedConfig) -> None:
    known = (*LOCATORS, *BASE_METHODS)
    for method in (*config.methods, *config.first_seed_methods):
        if method not in known:
            raise ValueError(f"method {method!r}: expected some of {', '.join(known)}")
    for name in ("n_prompts", "n_over_rejection", "n_margin_scaled", "epochs", "batch_size", "rank"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}: expected at least 1")
    for text in (*config.design, *config.held_out):
        sm.LayerRange.parse(text)
    if set(config.design) & set(config.held_out):
        raise ValueError("a planted range is in both lists, design and held_out: expected each in one")
    if config.train and config.adapters == SHIPPED:
        raise ValueError("--train makes organisms in a folder of yours: name one, like --adapters results/adapters")
    find_source(config.model)
    check_writable(config.out)


# --- organisms --------------------------------------------------------------------------------------------------------


def wanted(config: PlantedConfig) -> list[tuple[sm.LayerRange, int]]:
    """(planted range, seed) of all listed organisms, first seeds first: a run that is cut short has most ranges."""
    texts = (*config.design, *config.held_out)
    return [(sm.LayerRange.parse(text), seed) for seed in config.seeds for text in texts]


def role_of(planted: sm.LayerRange, seed: int, config: PlantedConfig) -> Role:
    if (planted, seed) not in wanted(config):
        return "unlisted"
    is_design = planted in [sm.LayerRange.parse(text) for text in config.design] and seed == config.seeds[0]
    return "design" if is_design else "held out"


def organism_name(planted: sm.LayerRange, seed: int) -> str:
    return f"planted-{planted.start}-{planted.end}-seed{seed}"


def adapters_folder(config: PlantedConfig) -> Path:
    return data_folder() / "adapters" / "organisms" if config.adapters == SHIPPED else Path(config.adapters)


def train_missing(config: PlantedConfig) -> None:
    """Run align.py for every listed organism of the wanted roles that has no recipe.json yet."""
    for planted, seed in wanted(config):
        name = organism_name(planted, seed)
        if (
            role_of(planted, seed, config) not in config.roles
            or (adapters_folder(config) / name / "recipe.json").is_file()
        ):
            continue
        print(f"organism {name} ...", flush=True)
        layers = f"{planted.start}-{planted.end}"
        align(
            AlignRun(
                model=config.model,
                planted=layers,
                rank=config.rank,
                epochs=config.epochs,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                bfloat16=config.bfloat16,
                seed=seed,
                name=name,
                out=config.adapters,
            )
        )


def find_organisms(config: PlantedConfig) -> list[Organism]:
    """All adapters of the folder whose recipe names a planted range, by role, then range, then seed."""
    found = []
    for path in sorted(adapters_folder(config).glob("*/recipe.json")):
        report = json.loads(path.read_text("utf-8"))
        planted = report["recipe"]["planted"]
        if planted is None or report["base_model"] != config.model:
            continue
        layers, seed = sm.LayerRange(**planted), report["recipe"]["seed"]
        refused = {name: part["count"] / part["total"] for name, part in report["aligned"]["refused"].items()}
        role = role_of(layers, seed, config)
        found.append(Organism(path.parent, layers, seed, role, refused["malicious"], refused["normal"]))
    return sorted(found, key=lambda o: (o.role, o.planted, o.seed))


# --- measuring --------------------------------------------------------------------------------------------------------


def load_sets(config: PlantedConfig) -> PromptSets:
    """Test splits only: what organisms were trained on is not what they are measured on."""
    drawn = draw_sets(config)
    over_rejection = drawn["over_rejection"]
    return PromptSets(
        drawn["normal"].prompts,
        drawn["malicious"].prompts,
        over_rejection.prompts,
        draw_pairs("test", config.n_prompts, config.seed)[0],
        over_rejection.clusters,
        config.template,
        seed=config.seed,
    )


def draw_sets(config: PlantedConfig) -> dict[str, Drawn]:
    counts = {
        "normal": config.n_prompts,
        "malicious": config.n_prompts,
        "over_rejection": config.n_over_rejection,
    }
    return {name: draw(f"{name}:test", count, config.seed) for name, count in counts.items()}


def drawn_ids(config: PlantedConfig) -> dict[str, list[int]]:
    """Rows of the test splits."""
    ids = {name: drawn.ids for name, drawn in draw_sets(config).items()}
    return ids | {"pairs": draw_pairs("test", config.n_prompts, config.seed)[1]}


def measure(organism: Organism, prompts: PromptSets, config: PlantedConfig) -> Iterator[Cell]:
    """The core and all locators on one organism; models are loaded only if something is missing."""
    models: dict[str, Any] = {}
    path = cell_path(organism, "core", prompts, config)
    core = cached_json(path, partial(core_once, organism, prompts, config, models))["core"]
    transplants = Transplants.from_plain(core) if core else None
    for method in config.methods:
        if method in config.first_seed_methods and organism.seed != config.seeds[0]:
            continue
        path = cell_path(organism, method, prompts_for(method, prompts, config), config)
        record = cached_json(path, partial(locate_once, organism, method, prompts, config, models))
        found = Located.from_plain(record["found"]) if record["found"] else None
        yield Cell(organism, transplants, method, found, record["detail"], record["seconds"], record["n_layers"])


def prompts_for(method: str, prompts: PromptSets, config: PlantedConfig) -> PromptSets:
    """All, but for margin_scaled, which runs the model twice a layer."""
    if method != "margin_scaled":
        return prompts
    few = config.n_margin_scaled
    return replace(prompts, normal=prompts.normal[:few], malicious=prompts.malicious[:few])


def cell_path(organism: Organism, method: str, prompts: PromptSets, config: PlantedConfig) -> Path:
    """Named by everything that the answer depends on, but for the code."""
    weights = adapter_hash(organism.folder)
    digest = content_hash(config.model, weights, method, prompts.hashes(), config.template, config.seed)
    return Path(config.out) / "planted" / safe_name(config.model) / "cells" / f"{organism.name}-{method}-{digest}.json"


def locate_once(
    organism: Organism, method: str, prompts: PromptSets, config: PlantedConfig, models: dict[str, Any]
) -> dict[str, Any]:
    """One cell, as it is kept."""
    load_models(organism, prompts, config, models, base=method in BASE_METHODS)
    locator = base_locators(models["base"])[method] if method in BASE_METHODS else LOCATORS[method]
    started = perf_counter()
    sets = replace(prompts_for(method, prompts, config), phrases=models["phrases"])
    found, detail = attempt(locator, models["model"], sets)
    answer = {"found": found.to_plain() if found else None, "detail": detail}
    return {**answer, "seconds": perf_counter() - started, "n_layers": models["model"].cfg.n_layers}


def core_once(organism: Organism, prompts: PromptSets, config: PlantedConfig, models: dict[str, Any]) -> dict[str, Any]:
    """The core, as it is kept."""
    load_models(organism, prompts, config, models, base=True)
    sets = (prompts.malicious[:CORE_PROMPTS], prompts.normal[:CORE_PROMPTS])
    pair = (models["model"], models["base"])
    try:
        found = transplant(*pair, organism.planted, *sets, config.template, models["phrases"])
    except ValueError as error:
        return {"core": None, "detail": str(error)}
    return {"core": found.to_plain(), "detail": ""}


def load_models(
    organism: Organism, prompts: PromptSets, config: PlantedConfig, models: dict[str, Any], base: bool
) -> None:
    """Into `models`, what is not there yet: the organism, the phrases that it uses, its base if asked for."""
    if "model" not in models:
        models["model"] = sm.load_model(config.model, adapter=organism.folder)
        models["phrases"] = prompts.with_phrases(models["model"]).phrases
    if base and "base" not in models:
        models["base"] = sm.load_model(config.model)


# --- what is shown ----------------------------------------------------------------------------------------------------


def cell_record(cell: Cell) -> dict[str, Any]:
    parts = {"organism": cell.organism.name, "method": cell.method, "range": str(cell.range) if cell.range else None}
    return {**parts, **asdict(cell.score), "core_iou": cell.core_iou, "detail": cell.detail, "seconds": cell.seconds}


def line_of(cell: Cell) -> str:
    score = cell.score
    errors = "" if score.start_error is None else f"  ends off by {score.start_error:+d}, {score.end_error:+d}"
    head = f"{cell.organism.name:<24}{cell.method:<16}{cell.range!s:<10}IoU {score.iou:.2f}{errors}"
    return f"{head}  ({cell.seconds:.0f} s) {cell.detail}"


def by_organism(cells: Sequence[Cell]) -> dict[Organism, Cell]:
    """A cell of each: all cells of one organism know the same of it."""
    return {cell.organism: cell for cell in cells}


def organism_record(cell: Cell) -> dict[str, Any]:
    organism, found = cell.organism, cell.transplants
    ranges = {name: found.core(share) if found else None for name, share in ORACLES.items()}
    transplants = found.to_plain() if found else None
    return {**asdict(organism), "passes": organism.passes, **ranges, "transplants": transplants}


def organism_table(cells: Sequence[Cell]) -> str:
    """How every organism refuses, and how little of what was planted does the work."""
    lines = [
        f"{'organism':<24}{'planted':<10}{'seed':>4}  {'role':<10}{'refused: malicious':>18}{'normal':>8}"
        + "".join(f"{name:>14}" for name in ORACLES)
        + "  best layer alone",
    ]
    for o, cell in by_organism(cells).items():
        found = cell.transplants
        row = f"{o.name:<24}{o.planted!s:<10}{o.seed:>4}  {o.role:<10}{o.malicious:>18.1%}{o.normal:>8.1%}"
        if found:
            row += "".join(f"{found.core(share)!s:>14}" for share in ORACLES.values())
            layer, share = found.best_single
            row += f"  {layer} ({share:.0%} of {found.gained:.1f} nats)"
        lines.append(row + ("" if o.passes else "  does not pass: not in the summary"))
    lines.append("core: the narrowest range of its layers that alone gives the base this share of the margin")
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
        return middle_third(cell.n_layers).iou(planted)
    if name == "random range":
        return random_iou(planted, cell.n_layers)
    return overlap(found.core(ORACLES[name]) if found else None, planted)


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
            "core_iou": mean_estimate([cell.core_iou for cell in row], planted),
            **centre_figures(answered),
        }
    of_organism = by_organism(cells)
    for name in (*GUESSES, *ORACLES):
        ious = [baseline_iou(name, cell) for cell in of_organism.values()]
        table[name] = {"organisms": len(ious), "iou": mean_estimate(ious, [str(o.planted) for o in of_organism])}
    return table


def centre_figures(answered: Sequence[tuple[Cell, sm.LayerRange]]) -> dict[str, Estimate]:
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
            f"{'locator':<16}{'n':>3}  {'IoU':<18}{'|start|':>8}{'|end|':>7}{'centre':>8}  {'IoU with core':<18}"
            f"{'r of centres':<21}{'slope of centres':<21}",
        ]
        for method, row in table.items():
            errors = [row.get("start_error"), row.get("end_error")]
            texts = ["" if error is None else f"{error:.1f}" for error in errors]
            hits = f"{row['centre_hits']}/{row['organisms']}" if "centre_hits" in row else ""
            centres = f"{row.get('core_iou', '')!s:<18}"
            centres += "".join(f"{row[name]!s:<21}" for name in ("correlation", "slope") if name in row)
            head = f"{method:<16}{row['organisms']:>3}  {row['iou']!s:<18}{texts[0]:>8}{texts[1]:>7}{hits:>8}  "
            lines.append((head + centres).rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def page_of(
    config: PlantedConfig,
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
        if cell.found:
            scores = cell.found.scores - cell.found.scores.min()
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


if __name__ == "__main__":
    run(main, PlantedConfig)
