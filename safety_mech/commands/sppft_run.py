"""The run of `sppft.py`: all cells, one after the other; then the table, the page and the run's folder."""

from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import safety_mech as sm
from safety_mech.commands.sppft import CONTROLS, Data, SppftConfig
from safety_mech.commands.sppft_cells import (
    Bench,
    Cell,
    choose_rate,
    controls_of,
    digest,
    metrics_before,
    readings_of,
    run_cell,
)
from safety_mech.commands.sppft_table import (
    against_controls,
    cells_of,
    dose_curves,
    hashes_of,
    head_of,
    line_of,
    page_of,
    sentence,
    summarise,
    table,
)
from safety_mech.models.sources import model_fingerprint
from safety_mech.reporting.plots import plot_dose
from safety_mech.reporting.runs import cached_json, safe_name, write_run
from safety_mech.training.methods import width_matched_controls


def run_sppft(config: SppftConfig, data: Data, layers: sm.LayerRange) -> Path:
    """Run what cells are missing, in the order attack, method, seed; returns the run's folder."""
    print(f"safety layers: {layers}", flush=True)
    model = sm.load_model(config.model, config.device, config.dtype)
    layers.check_inside(model.cfg.n_layers)
    folder = Path(config.out) / "sppft" / safe_name(config.model) / "cells"
    bench = Bench(model, layers, config, folder, data)
    controls = width_matched_controls(layers, model.cfg.n_layers)
    methods = [name for name in config.methods if name not in CONTROLS or name in controls]
    for name in set(config.methods) - set(methods):
        print(f"no room for the control {name!r}: no (other) range of {layers.width} layers fits outside {layers}")
    before = metrics_before(bench)
    if not any(before["malicious"]["refused"]):
        raise ValueError(f"{config.model} refuses none of {len(data.malicious)} malicious prompts: nothing to protect")
    rates = {attack: choose_rate(bench, attack) for attack in config.attacks}
    cells = [Cell(*values) for values in product(config.attacks, methods, range(config.seeds))]
    results: dict[Cell, dict[str, Any]] = {}
    for number, cell in enumerate(cells, 1):
        rate = rates[cell.attack]["rate"]
        path = folder / f"{cell.attack}-{cell.method}-{cell.seed}-{digest(bench, cell, rate)}.json"
        results[cell] = cached_json(path, partial(run_cell, bench, cell, rate, path))
        print(f"{number}/{len(cells)} {cell}  {line_of(results[cell])}", flush=True)
    clusters, attacks = data.malicious.clusters, readings_of(config.attacks)
    rows = {(a, m): summarise(before, cells_of(results, a, m), a, clusters) for a, m in product(attacks, methods)}
    against = {a: against_controls(before, results, a, methods, clusters) for a in attacks}
    verdicts = [sentence(attack, name, value) for attack, found in against.items() for name, value in found.items()]
    text = "\n".join([head_of(bench, before, rates), table(rows), "", *verdicts])
    print(f"\n{text}")
    figure = plot_dose(dose_curves(before, results, attacks, methods), len(data.malicious))
    hashes = hashes_of(data)
    written = write_run(
        config.out,
        "sppft",
        config.model,
        config=config,
        metrics={
            "range": layers,
            "model_fingerprint": model_fingerprint(config.model),
            "controls": {name: controls_of(bench, name) for name in methods if name in CONTROLS},
            "learning_rates": rates,
            "before": before,
            "rows": {f"{attack} {method}": row for (attack, method), row in rows.items()},
            "sppft_minus_controls": against,
            "cells": [{**asdict(cell), **result} for cell, result in results.items()],
            "prompt_hashes": hashes,
            "drawn": {
                name: {"ids": drawn.ids, "clusters": drawn.clusters}
                for name, drawn in (("malicious", data.malicious), ("over_rejection", data.over_rejection))
            },
        },
        texts={"table.txt": text + "\n", "report.html": page_of(bench, against, text, figure, hashes)},
        figures={"dose": figure},
    )
    print(f"written: {written}/ (report.html, table.txt, metrics.json, config.json, dose.png)")
    return written
