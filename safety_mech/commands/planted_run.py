"""The run of `planted.py`: every locator on every organism, and the run's folder."""

from functools import partial
from pathlib import Path
from typing import Any

from safety_mech.commands import planted_report as shown
from safety_mech.commands.cells import LOCATOR_MODULES, Models, cached_answer, draw_sets
from safety_mech.commands.planted import Organism, PlantedConfig, methods_of
from safety_mech.commands.publish import publish
from safety_mech.localization.measurements import PromptSets
from safety_mech.localization.sufficiency import Transplants, transplant
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section
from safety_mech.reporting.runs import cached_json, cell_path

TRANSPLANTED_PROMPTS = 32
"""Of each kind, for the minimal sufficient range: every range within the planted one is measured."""


def run_planted(config: PlantedConfig, organisms: list[Organism]) -> Path:
    sources = ("normal:test", "malicious:test", "over_rejection:test")
    counts = (config.n_prompts, config.n_over_rejection)
    prompts, drawn_ids = draw_sets(*sources, *counts, config.template, config.seed)
    cells = [cell for organism in organisms for cell in measure(organism, prompts, config)]
    found = shown.summaries(cells)
    text = "\n\n".join([shown.organism_table(cells), shown.cell_table(cells), shown.summary_table(found)])
    figures = {"ranges": shown.plot_ranges(cells, cells[0].answer.n_layers), "scores": shown.plot_scores(cells)}
    ranges = "Found and planted layers: one panel per locator, one column per organism"
    scores = "Scores by layer: one row per organism, one column per locator; the planted range is shaded"
    return publish(
        "planted",
        config,
        text,
        title="Do locators find the layers where refusals were planted?",
        lead=shown.lead_of(found),
        sections=[
            Section("Found against planted", [report.figure(figures["ranges"], ranges, wide=True)]),
            Section("Tables", [report.fixed_width(text)]),
            Section("Scores", [report.figure(figures["scores"], scores, wide=True)]),
        ],
        metrics={
            "organisms": [shown.organism_record(cell) for cell in shown.by_organism(cells).values()],
            "cells": [shown.cell_record(cell) for cell in cells],
            "summary": found,
            "drawn_ids": {source.removesuffix(":test"): rows for source, rows in drawn_ids.items()},
        },
        prompt_hashes=prompts.hashes(),
        tensors={f"{c.organism.name}.{c.method}": c.answer.found.scores for c in cells if c.answer.found},
        figures=figures,
    )


def measure(organism: Organism, prompts: PromptSets, config: PlantedConfig) -> list[shown.Cell]:
    """Transplants and all locators on one organism. Models are loaded only if a cell is missing."""
    models, cells = Models(config.model, organism.folder, config.model), []
    transplants = cached_transplants(organism, models, prompts, config.out)
    for method in methods_of(organism, config):
        answer = cached_answer(method, models, prompts, config.out, "planted", f"{organism.name}-{method}")
        cells.append(shown.Cell(organism, transplants, method, answer))
        print(shown.line_of(cells[-1]), flush=True)
    return cells


def cached_transplants(organism: Organism, models: Models, prompts: PromptSets, out: str) -> Transplants | None:
    """From its file, if it is there; None where training gained no margin."""
    key = (models.fingerprints(with_base=True), str(organism.planted), prompts.key(), TRANSPLANTED_PROMPTS)
    label = f"{organism.name}-transplants"
    path = cell_path(out, "planted", models.name, label, *key, modules=LOCATOR_MODULES)
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
