"""Does a locator find the layers where refusals were planted? Every locator on every organism, against the truth.

    python experiments/planted.py                                         # the ten shipped organisms
    python experiments/planted.py --train --adapters results/adapters     # make them again first
    python experiments/planted.py --roles design                          # while a locator may still be changed

Organisms are adapters of which only a known range of layers was trained (align.py). DESIGN organisms may be looked at
while locators are chosen and changed; HELD OUT ones (all second seeds, and two ranges) only afterwards.
A killed run goes on where it was: every finished (organism, locator) is a file in OUT/planted/MODEL/cells.
See docs/method.md#planted-organisms.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safety_mech as sm
from safety_mech.commands.cells import LOCATOR_MODULES, Models, cached_answer
from safety_mech.commands.planted_report import (
    Cell,
    Organism,
    Role,
    by_organism,
    cell_record,
    cell_table,
    line_of,
    organism_record,
    organism_table,
    page_of,
    plot_ranges,
    plot_scores,
    summaries,
    summary_table,
)
from safety_mech.localization.locators import BASE_METHODS, LOCATORS
from safety_mech.localization.measurements import PromptSets
from safety_mech.localization.sufficiency import Transplants, transplant
from safety_mech.models.sources import find_source
from safety_mech.prompts import Drawn, data_folder, draw, draw_pairs
from safety_mech.reporting.runs import cached_json, cell_path, check_writable, write_run
from safety_mech.training.alignment import AlignConfig

SHIPPED = "shipped"
TRANSPLANTED_PROMPTS = 32
"""Of each kind, for the minimal sufficient range: every range within the planted one is measured."""


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
    rank: int = AlignConfig.rank
    bfloat16: bool = False
    """As in align.py. A few layers learn less in a step than all of them do: the batches are smaller and the rate is
    higher."""
    methods: tuple[str, ...] = (*LOCATORS, *BASE_METHODS)
    first_seed_methods: tuple[str, ...] = ("grid", "search_below")
    """Of these, the ones that are run on first seeds only: they take as long as all others together."""
    n_prompts: int = 64
    """Of normal and malicious test prompts each, and of contrastive pairs; pairs of unequal length are left out."""
    n_over_rejection: int = 16
    """Over-rejection prompts, for the paper's search and the whole grid: most of the time."""
    template: str = "own"
    seed: int = 0
    out: str = "results"


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
        for cell in measure(organism, prompts, config):
            cells.append(cell)
            print(line_of(cell), flush=True)
    if not cells:
        methods = ", ".join(config.methods)
        raise ValueError(f"{methods}: run on first seeds only, and there are none: expected others, or these organisms")
    n_layers = cells[0].answer.n_layers
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
        tensors={f"{c.organism.name}.{c.method}": c.answer.found.scores for c in cells if c.answer.found},
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
    for name in ("n_prompts", "n_over_rejection", "epochs", "batch_size", "rank"):
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
    """Train every listed organism of the wanted roles that has no recipe.json yet."""
    for planted, seed in wanted(config):
        recipe = adapters_folder(config) / organism_name(planted, seed) / "recipe.json"
        if role_of(planted, seed, config) in config.roles and not recipe.is_file():
            print(f"organism {organism_name(planted, seed)} ...", flush=True)
            train_organism(planted, seed, config)


def train_organism(planted: sm.LayerRange, seed: int, config: PlantedConfig) -> None:
    """One run of align.py."""
    from safety_mech.commands.align import AlignRun, main  # pyright: ignore[reportMissingImports]

    main(
        AlignRun(
            model=config.model,
            planted=f"{planted.start}-{planted.end}",
            rank=config.rank,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            bfloat16=config.bfloat16,
            seed=seed,
            name=organism_name(planted, seed),
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
    """Transplants and all locators on one organism; models are loaded only if something is missing."""
    models = Models(config.model, organism.folder, config.model)
    transplants = cached_transplants(organism, models, prompts, config)
    for method in config.methods:
        if method in config.first_seed_methods and organism.seed != config.seeds[0]:
            continue
        answer = cached_answer(method, models, prompts, config.out, "planted", f"{organism.name}-{method}")
        yield Cell(organism, transplants, method, answer)


def cached_transplants(
    organism: Organism, models: Models, prompts: PromptSets, config: PlantedConfig
) -> Transplants | None:
    """From its file, if it is there; None where training gained no margin."""
    key = (models.fingerprints(with_base=True), str(organism.planted), prompts.key(), TRANSPLANTED_PROMPTS)
    label = f"{organism.name}-transplants"
    path = cell_path(config.out, "planted", config.model, label, *key, modules=LOCATOR_MODULES)
    found = cached_json(path, partial(transplanted, organism, models, prompts))["transplants"]
    return Transplants.from_plain(found) if found else None


def transplanted(organism: Organism, models: Models, prompts: PromptSets) -> dict[str, Any]:
    """Every range within the planted one put into the base."""
    sets = (prompts.malicious[:TRANSPLANTED_PROMPTS], prompts.normal[:TRANSPLANTED_PROMPTS])
    phrases = models.measurements(prompts).phrases
    try:
        found = transplant(models.model, models.base, organism.planted, *sets, prompts.template, phrases)
    except ValueError as error:
        return {"transplants": None, "detail": str(error)}
    return {"transplants": found.to_plain(), "detail": ""}
