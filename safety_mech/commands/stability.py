"""Does a locator give the same range again? Pairwise IoU over resampled, halved and other prompts, and templates.

    python experiments/stability.py
    python experiments/stability.py --methods margin_attn gap search --normal-sets normal:test alpaca.json \\
        --malicious-sets malicious:test advbench.csv:goal

- bootstrap: the same prompts, drawn with replacement (methods with a value for every prompt);
- halves: disjoint halves of the prompts, located anew in each;
- prompt sets: the i-th of --normal-sets with the i-th of --malicious-sets;
- templates.

As arXiv 2602.17696 does for other methods: regions found from different prompt sets overlapped little there.
A killed run goes on where it was: every finished location is a file in OUT/stability/MODEL/cells.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

import safety_mech as sm
from safety_mech.commands.cells import Answer, Models, base_of, cached_answer
from safety_mech.localization.locators import LOCATORS
from safety_mech.localization.measurements import PromptSets
from safety_mech.models.chat import check_template_name
from safety_mech.models.sources import find_source
from safety_mech.prompts import draw, draw_pairs
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.reporting.runs import check_writable, write_run
from safety_mech.stats import Estimate, mean_estimate, mean_pairwise_iou, overlap

BASE_METHODS = ("gap_difference", "swap")
"""Those of `base_locators` that look at prompts."""


@dataclass(frozen=True)
class StabilityConfig:
    """Locate again and again, and say how well the answers overlap."""

    model: str = "smollm2-135m-aligned"
    adapter: str | None = None
    base: str | None = "auto"
    """For the methods that compare with it (gap_difference, swap); auto: known for built-in models."""
    methods: tuple[str, ...] = ("gap", "gap_difference", "search", "direction", "patching", "margin_attn")
    normal_sets: tuple[str, ...] = ("normal:test",)
    malicious_sets: tuple[str, ...] = ("malicious:test",)
    """As many as --normal-sets: they go together one by one."""
    over_rejection: str = "over_rejection:test"
    templates: tuple[str, ...] = ("own", "alpaca")
    """The first is the one of all other comparisons."""
    n_prompts: int = 100
    """Of each normal and malicious set."""
    n_over_rejection: int = 24
    halvings: int = 3
    """Random ways to split the first sets in halves."""
    seed: int = 0
    out: str = "results"


@dataclass(frozen=True)
class Place:
    """What a method looks at in one location: a name for the table, and the prompts."""

    name: str
    prompts: PromptSets


@dataclass(frozen=True)
class Overlap:
    """Mean IoU of `pairs` pairs of answers, with its 95 % interval where there are enough of them."""

    method: str
    comparison: str
    iou: Estimate
    pairs: int
    answers: tuple[str, ...]


def main(config: StabilityConfig) -> Path:
    check_config(config)
    places = list_places(config)
    base_name = base_of(config.model, config.base)
    for name, adapter in ((config.model, config.adapter), *([(base_name, None)] if base_name else [])):
        find_source(name, adapter)
    methods = [method for method in config.methods if method in LOCATORS or base_name]
    models = Models(config.model, config.adapter, base_name)
    answers: dict[tuple[str, str], Answer] = {}
    for method in methods:
        for place in places:
            answer = cached_answer(method, models, place.prompts, config.out, "stability", method)
            answers[method, place.name] = answer
            shown = str(answer.range) if answer.found else "not run"
            print(f"{method:<16}{place.name:<40} {shown:<10}{answer.detail}", flush=True)
    rows = [row for method in methods for row in overlaps(method, answers, places, config)]
    text = table(rows)
    print(f"\n{text}")
    prompt_hashes = {place.name: place.prompts.hashes() for place in places}
    written = write_run(
        config.out,
        "stability",
        config.model,
        config=config,
        metrics={
            "answers": {
                f"{m}, {place}": answer.found.to_plain() if answer.found else None
                for (m, place), answer in answers.items()
            },
            "overlaps": rows,
            "prompt_hashes": prompt_hashes,
            "drawn_ids": drawn_ids(config),
        },
        texts={"table.txt": text + "\n", "report.html": page_of(config, rows, text, prompt_hashes)},
    )
    print(f"written: {written}/ (report.html, table.txt, metrics.json)")
    return written


def check_config(config: StabilityConfig) -> None:
    for method in config.methods:
        if method not in (*LOCATORS, *BASE_METHODS):
            raise ValueError(f"method {method!r}: expected some of {', '.join((*LOCATORS, *BASE_METHODS))}")
    if len(config.normal_sets) != len(config.malicious_sets) or not config.normal_sets:
        raise ValueError(
            f"{len(config.normal_sets)} normal and {len(config.malicious_sets)} malicious sets: they go together one "
            "by one, so give as many of each"
        )
    if config.n_prompts < 8 or config.n_over_rejection < 2 or config.halvings < 1 or not config.templates:
        raise ValueError("expected n_prompts >= 8, n_over_rejection >= 2, halvings >= 1 and at least one template")
    for template in config.templates:
        check_template_name(template)
    check_writable(config.out)


def list_places(config: StabilityConfig) -> list[Place]:
    """All locations of one method: whole sets, other templates, halves of the first set."""
    over_rejection = draw(config.over_rejection, config.n_over_rejection, config.seed)
    pairs, _ = draw_pairs("test", config.n_prompts, config.seed)
    places = []
    for normal, malicious in zip(config.normal_sets, config.malicious_sets, strict=True):
        prompts = PromptSets(
            draw(normal, config.n_prompts, config.seed).prompts,
            draw(malicious, config.n_prompts, config.seed).prompts,
            over_rejection.prompts,
            pairs,
            over_rejection.clusters,
            config.templates[0],
            seed=config.seed,
        )
        places.append(Place(f"set {Path(normal).name} {Path(malicious).name}", prompts))
    first = places[0].prompts
    places += [Place(f"template {name}", replace(first, template=name)) for name in config.templates[1:]]
    for number in range(config.halvings):
        places += [
            Place(f"half {number + 1}{'ab'[side]}", half_of(first, config.seed + number, side)) for side in (0, 1)
        ]
    return places


def drawn_ids(config: StabilityConfig) -> dict[str, list[int]]:
    """Rows of every set that was drawn from."""
    sets = dict.fromkeys((*config.normal_sets, *config.malicious_sets), config.n_prompts)
    sets |= {config.over_rejection: config.n_over_rejection}
    ids = {name: draw(name, count, config.seed).ids for name, count in sets.items()}
    return ids | {"pairs": draw_pairs("test", config.n_prompts, config.seed)[1]}


def half_of(prompts: PromptSets, seed: int, side: int) -> PromptSets:
    """One of two disjoint halves of every set."""

    def half(items: Sequence[Any]) -> list[Any]:
        order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
        return [items[index] for index in sorted(order[side::2])]

    parts = {name: half(getattr(prompts, name)) for name in ("normal", "malicious", "over_rejection", "pairs")}
    clusters = half(prompts.clusters) if prompts.clusters else None  # as many as over-rejection prompts: the same half
    return replace(prompts, **parts, clusters=clusters)


# --- what is shown ----------------------------------------------------------------------------------------------------


def overlaps(
    method: str, answers: dict[tuple[str, str], Answer], places: Sequence[Place], config: StabilityConfig
) -> list[Overlap]:
    """The comparisons of one method. No answer overlaps with nothing (IoU 0)."""

    def located(kind: str) -> list[sm.LayerRange | None]:
        return [answers[method, place.name].range for place in places if place.name.startswith(kind)]

    first = answers[method, places[0].name]
    rows = []
    if first.found and first.found.samples:
        drawn = list(first.found.samples.elements())
        n_pairs = len(drawn) * (len(drawn) - 1) // 2
        rows.append(Overlap(method, "bootstrap of the prompts", mean_pairwise_iou(drawn), n_pairs, counted(drawn)))
    halves = located("half ")
    ious = [overlap(a, b) for a, b in zip(halves[::2], halves[1::2], strict=True)]
    rows.append(Overlap(method, "disjoint halves", mean_estimate(ious), len(ious), counted(halves)))
    for kind, name in (("set ", "prompt sets"), ("template ", "templates")):
        ranges = located(kind) if kind == "set " else [first.range, *located(kind)]
        if len(ranges) > 1:
            pairs = list(combinations(ranges, 2))
            rows.append(Overlap(method, name, mean_pairwise_iou(ranges), len(pairs), counted(ranges)))
    return rows


def counted(ranges: Sequence[sm.LayerRange | None]) -> tuple[str, ...]:
    """Every answer with how often it was given, the most frequent first."""
    texts = Counter(str(layers) if layers else "none" for layers in ranges)
    return tuple(f"{text} x{count}" for text, count in texts.most_common())


def table(rows: Sequence[Overlap]) -> str:
    lines = [f"{'method':<16}{'answers differ by':<26}{'IoU, mean and 95 %':<22}{'pairs':>6}  answers"]
    for row in rows:
        more = f", and {len(row.answers) - 5} others" if len(row.answers) > 5 else ""
        answers = ", ".join(row.answers[:5]) + more
        lines.append(f"{row.method:<16}{row.comparison:<26}{row.iou!s:<22}{row.pairs:>6}  {answers}")
    return "\n".join(lines)


def page_of(
    config: StabilityConfig, rows: Sequence[Overlap], text: str, prompt_hashes: dict[str, dict[str, str]]
) -> str:
    halves = [row for row in rows if row.comparison == "disjoint halves"]
    parts = "; ".join(f"{row.method} {row.iou}" for row in halves)
    lead = f"IoU of the ranges found from disjoint halves of the prompts, mean and 95 % interval: {parts}."
    shown = {f"{place}: {name}": digest for place, of_sets in prompt_hashes.items() for name, digest in of_sets.items()}
    sections = [Section("Overlaps", [report.fixed_width(text)]), report.settings_section(config, shown)]
    return report_page(f"Does a locator answer the same again on {config.model}?", lead, sections)
