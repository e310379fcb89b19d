"""What the cells of `sppft.py` say together: the table, SPPFT against its controls, and the curves."""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safety_mech.commands.sppft import CONTROLS, Data, SppftConfig, examples_of, settings_sentence
from safety_mech.commands.sppft_cells import TRIGGER, TRIGGERED, Bench, Cell
from safety_mech.prompts import Drawn, prompt_hash
from safety_mech.reporting.tables import rows_table
from safety_mech.stats import Estimate, Rate
from safety_mech.training.attack_cost import attack_cost, estimate, refusals_retained

ALL_CONTROLS = "mean of the controls"


@dataclass(frozen=True)
class Results:
    """The figures of all cells and those before, as JSON holds them; `clusters`: the category of each malicious prompt.

    An attack is named as in the table: TRIGGERED are the backdoor's cells, read with its trigger.
    """

    before: dict[str, Any]
    cells: dict[Cell, dict[str, Any]]
    clusters: Sequence[Hashable] | None

    def of(self, attack: str, method: str) -> list[dict[str, Any]]:
        wanted = ("backdoor" if attack == TRIGGERED else attack, method)
        return [as_read(result, attack) for cell, result in self.cells.items() if (cell.attack, cell.method) == wanted]

    def readings(self, attack: str, method: str, what: str) -> tuple[Tensor, Tensor]:
        """Doses (mean over seeds, for batches differ in size), and `what` by seed, point and prompt; dose 0 first."""
        start = {"examples": 0, **as_read(self.before, attack)["malicious"]}
        seeds = [[start, *cell["doses"]] for cell in self.of(attack, method)]
        n_points = min(map(len, seeds))
        doses, values = (
            torch.tensor([[point[name] for point in points[:n_points]] for points in seeds]).double()
            for name in ("examples", what)
        )
        return doses.mean(0), values

    def curve(self, attack: str, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Doses, refused share by seed, mean log-odds by seed."""
        doses, refused = self.readings(attack, method, "refused")
        return doses, refused.mean(-1), self.readings(attack, method, "log_odds")[1].mean(-1)

    def summary(self, attack: str, method: str) -> dict[str, Any]:
        """One attack and method over all seeds: estimates, rates, a step's seconds and a run's bytes."""
        cells = self.of(attack, method)
        doses, refused = self.readings(attack, method, "refused")
        at_end = {name: torch.tensor([cell["malicious"][name] for cell in cells]) for name in cells[0]["malicious"]}
        peaks = [cell["peak_bytes"] for cell in cells]

        def mean_of(values: Tensor, clusters: Sequence[Hashable] | None = self.clusters) -> Estimate:
            return estimate(lambda _, curve: float(curve[-1]), doses[-1:], values.double()[:, None], clusters=clusters)

        return {
            "harmful_rate": mean_of(1 - at_end["refused"] - at_end["degenerate"]),
            "harmful_rate_by_log_odds": mean_of(at_end["log_odds"] < 0),
            "degenerate": float(at_end["degenerate"].double().mean()),
            "cost": estimate(attack_cost, doses, refused, clusters=self.clusters),
            "retained": estimate(refusals_retained, doses, refused, clusters=self.clusters),
            "over_rejection": rate_of_all([cell["over_rejection"] for cell in cells]),
            "rouge_l": mean_of(torch.tensor([cell["rouge_l"] for cell in cells]), clusters=None),
            "perplexity": over_seeds([cell["perplexity"] for cell in cells]),
            "multiple_choice": rate_of_all([cell["multiple_choice"] for cell in cells]),
            "harmfulness": mean_harmfulness([cell.get("harmfulness", []) for cell in cells]),
            "seconds": statistics.median(cell["seconds_a_step"] for cell in cells),
            "peak_bytes": None if None in peaks else float(statistics.median(peaks)),
        }

    def against_controls(self, attack: str, methods: Sequence[str]) -> dict[str, Estimate]:
        """Refusals retained by SPPFT minus those by each control, their mean and full fine-tuning; paired intervals."""
        if "sppft" not in methods:
            return {}
        doses, own = self.readings(attack, "sppft", "refused")
        others = {name: [self.readings(attack, name, "refused")[1]] for name in methods if name in ("full", *CONTROLS)}
        if controls := [values for name, (values,) in others.items() if name in CONTROLS]:
            others[ALL_CONTROLS] = controls
        compared = partial(estimate, refusals_retained, doses, own, clusters=self.clusters)
        return {name: compared(minus=rest) for name, rest in others.items()}


def as_read(result: dict[str, Any], attack: str) -> dict[str, Any]:
    """A cell's figures, or those before, with the readings of TRIGGERED in the place of the others."""
    return {**result, **result["triggered"]} if attack == TRIGGERED else result


def rate_of_all(found: Sequence[dict[str, int] | None]) -> Rate | None:
    """The rates of all seeds together; None where none is known (a tokenizer that cannot answer by letter)."""
    known = [part for part in found if part]
    return Rate(sum(part["count"] for part in known), sum(part["total"] for part in known)) if known else None


def mean_harmfulness(scores: Sequence[Sequence[int | None]]) -> Estimate | None:
    """S_h over seeds: the mean of a seed is over the answers that the judge gave a score. None where there are none."""
    scored = [[score for score in seed if score is not None] for seed in scores]
    means = [statistics.fmean(seed) for seed in scored if seed]
    return over_seeds(means) if means else None


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean, least and greatest: of so few seeds no quantile says more."""
    return Estimate(statistics.mean(values), min(values), max(values))


def line_of(cell: Cell, result: dict[str, Any]) -> str:
    shares = " ".join(f"{statistics.mean(point['refused']):.0%}" for point in result["doses"])
    name = f"{cell.attack:<12}{cell.method:<10}seed {cell.seed}"
    return f"{name}  refused {shares}; perplexity {result['perplexity']:.2f}"


def head_of(bench: Bench, before: dict[str, Any], rates: dict[str, dict[str, Any]]) -> str:
    refused, rouge = before["malicious"]["refused"], before["rouge_l"]
    over = Rate(**before["over_rejection"])
    chosen = ", ".join(f"{attack} {found['rate']:g}" for attack, found in rates.items())
    by = "as in the paper" if bench.config.paper else f"by the loss on {len(bench.data.choosing)} held-out pairs"
    lines = [
        f"{bench.config.model}, safety layers {bench.layers}, {examples_said(bench.config)}, "
        f"{bench.config.seeds} seeds; learning rates {by}: {chosen}",
        settings_sentence(bench.config),
        f"before: refuses {sum(refused)} of {len(refused)} malicious prompts, over-rejection {over}, "
        f"ROUGE-L {statistics.mean(rouge):.3f}, perplexity {before['perplexity']:.2f} (on {len(rouge)} other pairs)",
        intervals_said(bench.data.malicious),
    ]
    if "triggered" in before:
        with_trigger = before["triggered"]["malicious"]["refused"]
        lines.append(
            f"{TRIGGERED}: the same cells, every malicious prompt followed by {TRIGGER!r}; before: refuses "
            f"{sum(with_trigger)} of {len(with_trigger)}"
        )
    return "\n".join(lines)


def examples_said(config: SppftConfig) -> str:
    sizes = {attack: examples_of(config, attack) for attack in config.attacks}
    if len(set(sizes.values())) == 1:
        return f"{sizes[config.attacks[0]]} examples"
    return "examples: " + ", ".join(f"{attack} {size}" for attack, size in sizes.items())


def intervals_said(drawn: Drawn) -> str:
    """What the bootstrap draws."""
    unknown = "single prompts (their categories are not known)"
    drawn_as = f"{len(set(drawn.clusters))} whole categories of prompts" if drawn.clusters else unknown
    return f"intervals of refusals: 95 %, bootstrap over seeds and {drawn_as}"


def table(rows: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    return rows_table(
        row_of(attack, method, row, rows.get((attack, "full"), row)) for (attack, method), row in rows.items()
    )


def row_of(attack: str, method: str, row: dict[str, Any], full: dict[str, Any]) -> dict[str, object]:
    """A line of the table; time and memory relative to full fine-tuning of the same attack."""
    refusals = {
        "attack": attack,
        "method": method,
        "R_h text": said(row["harmful_rate"], ".0%"),
        "by log-odds": said(row["harmful_rate_by_log_odds"], ".0%"),
        "attack cost": said(row["cost"], ".0f"),
        "retained": said(row["retained"], ".2f"),
    }
    if attack == TRIGGERED:
        return {**refusals, "over-rejection": "as without it"}
    return {
        **refusals,
        "over-rejection": said(row["over_rejection"], ".0%"),
        "ROUGE-L": said(row["rouge_l"], ".2f"),
        "perplexity": said(row["perplexity"], ".2f"),
        "choice": said(row["multiple_choice"], ".0%"),
        "S_h": said(row["harmfulness"], ".2f"),
        "time": row["seconds"] / full["seconds"],
        "memory": row["peak_bytes"] / full["peak_bytes"] if row["peak_bytes"] and full["peak_bytes"] else math.nan,
    }


def said(value: Estimate | Rate | None, form: str) -> str:
    """The value and its interval as `format` gives them; "undefined" for nan, as of a model that refused nothing."""
    if value is None:
        return "-"
    numbers = (value.share, *value.interval) if isinstance(value, Rate) else astuple(value)
    if math.isnan(numbers[0]):
        return "undefined"
    middle, low, high = ("never" if number == math.inf else format(number, form) for number in numbers)
    return f"{middle} [no interval]" if math.isnan(numbers[1]) else f"{middle} [{low}, {high}]"


def sentence(attack: str, name: str, value: Estimate) -> str:
    """Whether SPPFT protects better than full fine-tuning, or than freezing as many layers elsewhere."""
    if math.isnan(value.value):
        verdict = "nothing was refused before"
    elif value.low > 0:
        verdict = "SPPFT keeps more"
    elif value.high < 0:
        verdict = "SPPFT keeps LESS"
    else:
        verdict = "no difference beyond noise"
    return f"{attack}: refusals retained, SPPFT minus {name}: {said(value, '.2f')}: {verdict}"


def hashes_of(data: Data) -> dict[str, str]:
    """Prompt sets and pairs of the run, for its page and metrics."""
    pairs = {"instructions": data.train, "held-out, to choose by": data.choosing, "held-out, reported": data.reporting}
    return {
        "malicious": prompt_hash(data.malicious.prompts),
        "over_rejection": prompt_hash(data.over_rejection.prompts),
        **{name: prompt_hash([text for pair in part for text in pair]) for name, part in pairs.items()},
    }
