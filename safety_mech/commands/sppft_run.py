"""The run of `sppft.py`: all cells, one after the other; then the table, the page and the run's folder."""

from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import safety_mech as sm
from safety_mech.commands.publish import publish
from safety_mech.commands.sppft import CONTROLS, Data, SppftConfig
from safety_mech.commands.sppft_cells import Bench, Cell, choose_rate, metrics_before, readings_of, run_cell
from safety_mech.commands.sppft_table import ALL_CONTROLS, Results, hashes_of, head_of, line_of, sentence, table
from safety_mech.models.sources import model_fingerprint
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section
from safety_mech.reporting.plots import plot_dose
from safety_mech.reporting.runs import cached_json
from safety_mech.training.methods import width_matched_controls


def run_sppft(config: SppftConfig, data: Data, layers: sm.LayerRange) -> Path:
    """Run what cells are missing, in the order attack, method, seed; returns the run's folder."""
    print(f"safety layers: {layers}", flush=True)
    model = sm.load_model(config.model, config.device, config.dtype)
    controls = [width_matched_controls(layers, model.cfg.n_layers, seed) for seed in range(config.seeds)]
    bench = Bench(model, layers, config, data)
    methods = [name for name in config.methods if name not in CONTROLS or name in controls[0]]
    for name in set(config.methods) - set(methods):
        print(f"no room for the control {name!r}: no (other) range of {layers.width} layers fits outside {layers}")
    before = metrics_before(bench)
    if not any(before["malicious"]["refused"]):
        raise ValueError(f"{config.model} refuses none of {len(data.malicious)} malicious prompts: nothing to protect")
    rates = {attack: choose_rate(bench, attack) for attack in config.attacks}
    found = Results(before, {}, data.malicious.clusters)
    cells = [Cell(*values) for values in product(config.attacks, methods, range(config.seeds))]
    for number, cell in enumerate(cells, 1):
        rate = rates[cell.attack]["rate"]
        path = bench.path(f"{cell.attack}-{cell.method}-{cell.seed}", rate)
        found.cells[cell] = cached_json(path, partial(run_cell, bench, cell, rate, path))
        print(f"{number}/{len(cells)} {line_of(cell, found.cells[cell])}", flush=True)
    attacks = readings_of(config.attacks)
    rows = {(attack, method): found.summary(attack, method) for attack, method in product(attacks, methods)}
    against = {attack: found.against_controls(attack, methods) for attack in attacks}
    verdicts = [sentence(attack, name, value) for attack, part in against.items() for name, value in part.items()]
    text = "\n".join([head_of(bench, before, rates), table(rows), "", *verdicts])
    figure = plot_dose({a: {m: found.curve(a, m) for m in methods} for a in attacks}, len(data.malicious))
    alt = "Share of malicious prompts refused and mean refusal log-odds, by examples of the attack; one line a method"
    compared = {attack: part[ALL_CONTROLS] for attack, part in against.items() if ALL_CONTROLS in part}
    shown = [report.text(sentence(attack, ALL_CONTROLS, value)) for attack, value in compared.items()]
    drawn = {"malicious": data.malicious, "over_rejection": data.over_rejection}
    return publish(
        "sppft",
        config,
        text,
        title=f"SPPFT on {config.model}",
        lead=f"What is left of refusals after fine-tuning {config.model}, with layers {layers} frozen or not.",
        sections=[
            Section("Dose and response", [*shown, report.figure(figure, alt, wide=True)]),
            Section("Table", [report.fixed_width(text)]),
        ],
        metrics={
            "range": layers,
            "model_fingerprint": model_fingerprint(config.model),
            "controls": {name: [of_seed[name] for of_seed in controls] for name in methods if name in CONTROLS},
            "learning_rates": rates,
            "before": before,
            "rows": {f"{attack} {method}": row for (attack, method), row in rows.items()},
            "sppft_minus_controls": against,
            "cells": [{**asdict(cell), **result} for cell, result in found.cells.items()],
            "drawn": {name: {"ids": part.ids, "clusters": part.clusters} for name, part in drawn.items()},
        },
        prompt_hashes=hashes_of(data),
        figures={"dose": figure},
    )
