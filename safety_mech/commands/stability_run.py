"""The run of `stability.py`: every method on every variant of the prompts, and how well its answers overlap."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from safety_mech.commands.cells import Answer, Models, base_of, cached_answer, draw_sets
from safety_mech.commands.checks import LOCATORS
from safety_mech.commands.publish import publish
from safety_mech.commands.stability import StabilityConfig
from safety_mech.layers import LayerRange
from safety_mech.localization.measurements import PromptSets
from safety_mech.reporting.html import Section, fixed_width
from safety_mech.reporting.tables import rows_table
from safety_mech.stats import Estimate, mean_estimate, mean_pairwise_iou, overlap

SHOWN = 5
"""Different answers that a row of the table lists."""


@dataclass(frozen=True)
class Overlap:
    """Mean IoU of `pairs` pairs of answers, with its 95 % interval where there are enough of them."""

    method: str
    comparison: str
    iou: Estimate
    pairs: int
    answers: tuple[str, ...]


def run_stability(config: StabilityConfig) -> Path:
    places, drawn_ids = list_places(config)
    models = Models(config.model, config.adapter, base_of(config.model, config.base))
    methods = [method for method in config.methods if method in LOCATORS or models.base_name]
    answers: dict[tuple[str, str], Answer] = {}
    for method, (place, prompts) in product(methods, places.items()):
        answer = cached_answer(method, models, prompts, config.out, "stability", method)
        answers[method, place] = answer
        shown = str(answer.range) if answer.found else "not run"
        print(f"{method:<16}{place:<40} {shown:<10}{answer.detail}", flush=True)
    rows = [row for method in methods for row in overlaps(method, {place: answers[method, place] for place in places})]
    text = table(rows)
    halves = "; ".join(f"{row.method} {row.iou}" for row in rows if row.comparison == "disjoint halves")
    hashes = {place: prompts.hashes() for place, prompts in places.items()}
    return publish(
        "stability",
        config,
        text,
        title=f"Does a locator give the same range again on {config.model}?",
        lead=f"IoU of the ranges found from disjoint halves of the prompts, mean and 95 % interval: {halves}.",
        sections=[Section("Overlaps", [fixed_width(text)])],
        metrics={
            "answers": {
                f"{method}, {place}": answer.found.to_plain() if answer.found else None
                for (method, place), answer in answers.items()
            },
            "overlaps": rows,
            "prompt_hashes": hashes,
            "drawn_ids": drawn_ids,
        },
        prompt_hashes={f"{place}: {name}": digest for place, sets in hashes.items() for name, digest in sets.items()},
    )


def list_places(config: StabilityConfig) -> tuple[dict[str, PromptSets], dict[str, list[int]]]:
    """The prompts of every location of one method, by name (whole sets, other templates, halves of the first set), and
    the rows that were drawn."""
    places: dict[str, PromptSets] = {}
    drawn_ids: dict[str, list[int]] = {}
    for normal, malicious in zip(config.normal_sets, config.malicious_sets, strict=True):
        counts = (config.n_prompts, config.n_over_rejection)
        drawn = draw_sets(normal, malicious, config.over_rejection, *counts, config.templates[0], config.seed)
        places[f"set {Path(normal).name} {Path(malicious).name}"] = drawn[0]
        drawn_ids |= drawn[1]
    first = next(iter(places.values()))
    places |= {f"template {name}": replace(first, template=name) for name in config.templates[1:]}
    for number in range(config.halvings):
        places |= {f"half {number + 1}{'ab'[side]}": half_of(first, config.seed + number, side) for side in (0, 1)}
    return places, drawn_ids


def half_of(prompts: PromptSets, seed: int, side: int) -> PromptSets:
    """One of two disjoint halves of every set."""

    def half(items: Sequence[Any]) -> list[Any]:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        return [items[index] for index in sorted(order[side::2])]

    names = ("normal", "malicious", "over_rejection", "pairs", "clusters")  # a prompt and its cluster: the same half
    return replace(prompts, **{name: half(items) for name in names if (items := getattr(prompts, name))})


def overlaps(method: str, answers: Mapping[str, Answer]) -> list[Overlap]:
    """The comparisons of one method, from its answers by place. A missing answer has IoU 0 with every other."""

    def located(kind: str) -> list[LayerRange | None]:
        return [answer.range for place, answer in answers.items() if place.startswith(kind)]

    def pairwise(comparison: str, ranges: Sequence[LayerRange | None]) -> Overlap:
        n_pairs = len(ranges) * (len(ranges) - 1) // 2
        return Overlap(method, comparison, mean_pairwise_iou(ranges), n_pairs, counted(ranges))

    first = next(iter(answers.values()))
    rows = []
    if first.found and first.found.samples:
        rows.append(pairwise("bootstrap of the prompts", list(first.found.samples.elements())))
    halves = located("half ")
    ious = [overlap(a, b) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    rows.append(Overlap(method, "disjoint halves", mean_estimate(ious), len(ious), counted(halves)))
    compared = {"prompt sets": located("set "), "templates": [first.range, *located("template ")]}
    return rows + [pairwise(name, ranges) for name, ranges in compared.items() if len(ranges) > 1]


def counted(ranges: Sequence[LayerRange | None]) -> tuple[str, ...]:
    """Every answer with its count, the most frequent first."""
    texts = Counter(str(layers) if layers else "none" for layers in ranges)
    return tuple(f"{text} x{count}" for text, count in texts.most_common())


def table(rows: Sequence[Overlap]) -> str:
    def listed(answers: Sequence[str]) -> str:
        others = f", and {len(answers) - SHOWN} others" if len(answers) > SHOWN else ""
        return ", ".join(answers[:SHOWN]) + others

    columns = ("method", "answers differ by", "IoU, mean and 95 %", "pairs", "answers")
    values = ((row.method, row.comparison, row.iou, row.pairs, listed(row.answers)) for row in rows)
    return rows_table(dict(zip(columns, part, strict=True)) for part in values)
