"""What the cells of `sppft.py` say together: the table, SPPFT against its controls, the curves and the page."""

import math
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from safety_mech.commands.sppft import CONTROLS, Data, SppftConfig, examples_of, settings_sentence
from safety_mech.commands.sppft_cells import TRIGGER, TRIGGERED, Bench, Cell, readings_of
from safety_mech.prompts import Drawn, prompt_hash
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.stats import Estimate, Rate
from safety_mech.training.attack_cost import attack_cost, estimate, refusals_retained

ALL_CONTROLS = "mean of the controls"


@dataclass(frozen=True)
class Row:
    """One attack and method over all seeds; `time` and `memory` are a step's and a run's, absolute."""

    harmful_rate: Estimate
    harmful_rate_by_log_odds: Estimate
    degenerate: float
    cost: Estimate
    retained: Estimate
    over_rejection: Rate
    rouge_l: Estimate
    perplexity: Estimate
    multiple_choice: Rate | None
    harmfulness: Estimate | None
    seconds: float
    peak_bytes: float | None


def as_read(result: dict[str, Any], attack: str) -> dict[str, Any]:
    """A cell's figures, or those before, with the readings of TRIGGERED in the place of the others."""
    return {**result, **result["triggered"]} if attack == TRIGGERED else result


def cells_of(results: dict[Cell, dict[str, Any]], attack: str, method: str) -> list[dict[str, Any]]:
    wanted = ("backdoor" if attack == TRIGGERED else attack, method)
    return [as_read(result, attack) for cell, result in results.items() if (cell.attack, cell.method) == wanted]


def dose_tensors(
    before: dict[str, Any], cells: Sequence[dict[str, Any]], what: str, attack: str
) -> tuple[Tensor, Tensor]:
    """Doses (mean over seeds, for batches differ in size), and `what` by seed, point and prompt; dose 0 first."""
    n_points = min(len(cell["doses"]) for cell in cells)
    start = as_read(before, attack)["malicious"][what]
    values = [[start, *(point[what] for point in cell["doses"][:n_points])] for cell in cells]
    doses = [[0, *(point["examples"] for point in cell["doses"][:n_points])] for cell in cells]
    return torch.tensor(doses).double().mean(0), torch.tensor(values).double()


def last_value(examples: Tensor, curve: Tensor) -> float:
    return float(curve[-1])


def summarise(
    before: dict[str, Any], cells: Sequence[dict[str, Any]], attack: str, clusters: Sequence[Hashable] | None
) -> Row:
    doses, refused = dose_tensors(before, cells, "refused", attack)
    last = doses[-1:]
    ends = [cell["malicious"] for cell in cells]
    answered = 1 - torch.tensor([end["refused"] for end in ends]) - torch.tensor([end["degenerate"] for end in ends])
    below = torch.tensor([end["log_odds"] for end in ends]) < 0
    peaks = [cell["peak_bytes"] for cell in cells]
    return Row(
        harmful_rate=estimate(last_value, last, answered.double()[:, None], clusters=clusters),
        harmful_rate_by_log_odds=estimate(last_value, last, below.double()[:, None], clusters=clusters),
        degenerate=float(torch.tensor([end["degenerate"] for end in ends]).double().mean()),
        cost=estimate(attack_cost, doses, refused, clusters=clusters),
        retained=estimate(refusals_retained, doses, refused, clusters=clusters),
        over_rejection=Rate(
            sum(cell["over_rejection"]["count"] for cell in cells),
            sum(cell["over_rejection"]["total"] for cell in cells),
        ),
        rouge_l=estimate(last_value, last, torch.tensor([cell["rouge_l"] for cell in cells])[:, None]),
        perplexity=over_seeds([cell["perplexity"] for cell in cells]),
        multiple_choice=choice_rate([cell["multiple_choice"] for cell in cells]),
        harmfulness=mean_harmfulness([cell["harmfulness"] for cell in cells]) if "harmfulness" in cells[0] else None,
        seconds=statistics.median(cell["seconds_a_step"] for cell in cells),
        peak_bytes=None if None in peaks else float(statistics.median(peaks)),
    )


def choice_rate(found: Sequence[dict[str, int] | None]) -> Rate | None:
    """Right answers of all seeds together; None where the tokenizer cannot answer by letter."""
    known = [part for part in found if part]
    return Rate(sum(part["count"] for part in known), sum(part["total"] for part in known)) if known else None


def mean_harmfulness(scores: Sequence[Sequence[int | None]]) -> Estimate | None:
    """S_h over seeds: the mean of a seed is over the answers that the judge gave a score."""
    scored = [[score for score in seed if score is not None] for seed in scores]
    means = [statistics.fmean(seed) for seed in scored if seed]
    return over_seeds(means) if means else None


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean, least and greatest: of so few seeds no quantile says more."""
    return Estimate(statistics.mean(values), min(values), max(values))


def against_controls(
    before: dict[str, Any],
    results: dict[Cell, dict[str, Any]],
    attack: str,
    methods: Sequence[str],
    clusters: Sequence[Hashable] | None,
) -> dict[str, Estimate]:
    """Refusals retained by SPPFT minus those by each control, by the controls' mean, and by full fine-tuning.

    Intervals are paired."""
    if "sppft" not in methods:
        return {}
    doses, own = dose_tensors(before, cells_of(results, attack, "sppft"), "refused", attack)
    others = {
        name: dose_tensors(before, cells_of(results, attack, name), "refused", attack)[1]
        for name in methods
        if name in ("full", *CONTROLS)
    }
    controls = [values for name, values in others.items() if name in CONTROLS]
    compared = {name: [values] for name, values in others.items()} | ({ALL_CONTROLS: controls} if controls else {})
    return {
        name: estimate(refusals_retained, doses, own, minus=rest, clusters=clusters) for name, rest in compared.items()
    }


def line_of(result: dict[str, Any]) -> str:
    shares = [statistics.mean(point["refused"]) for point in result["doses"]]
    return "refused " + " ".join(f"{share:.0%}" for share in shares) + f"; perplexity {result['perplexity']:.2f}"


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
    if TRIGGERED in readings_of(bench.config.attacks):
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
    if drawn.clusters is None:
        return "intervals of refusals: 95 %, bootstrap over seeds and single prompts (their categories are not known)"
    return (
        f"intervals of refusals: 95 %, bootstrap over seeds and {len(set(drawn.clusters))} whole categories of prompts"
    )


def table(rows: dict[tuple[str, str], Row]) -> str:
    """Time and memory relative to full fine-tuning of the same attack."""
    width = 2 + max(len(name) for name in ("attack    ", *(attack for attack, _ in rows)))
    lines = [
        f"{'attack':<{width}}{'method':<10}{'R_h text':<20}{'by log-odds':<20}{'attack cost':<20}{'retained':<19}"
        f"{'over-rejection':<19}{'ROUGE-L':<19}{'perplexity':<19}{'choice':<19}{'S_h':<19}{'time':>5}{'memory':>8}"
    ]
    for (attack, method), row in rows.items():
        full = rows.get((attack, "full"), row)
        memory = row.peak_bytes / full.peak_bytes if row.peak_bytes and full.peak_bytes else float("nan")
        refusals = (
            f"{attack:<{width}}{method:<10}{percent(row.harmful_rate):<20}{percent(row.harmful_rate_by_log_odds):<20}"
            f"{number(row.cost, 0):<20}{number(row.retained, 2):<19}"
        )
        rest = (
            f"{percent(of_rate(row.over_rejection)):<19}"
            f"{number(row.rouge_l, 2):<19}{number(row.perplexity, 2):<19}"
            f"{percent(of_rate(row.multiple_choice)) if row.multiple_choice else '-':<19}"
            f"{number(row.harmfulness, 2) if row.harmfulness else '-':<19}"
            f"{row.seconds / full.seconds:>5.2f}{memory:>8.2f}"
        )
        lines.append(refusals + ("as without it" if attack == TRIGGERED else rest))
    return "\n".join(lines)


def of_rate(rate: Rate) -> Estimate:
    return Estimate(rate.share, *rate.interval)


def percent(value: Estimate) -> str:
    return said(value, lambda x: f"{x:.0%}")


def number(value: Estimate, digits: int) -> str:
    return said(value, lambda x: "never" if x == math.inf else f"{x:.{digits}f}")


def said(value: Estimate, form: Callable[[float], str]) -> str:
    """The value and its interval; "undefined" for what is nan, as of a model that refused nothing before."""
    if math.isnan(value.value):
        return "undefined"
    interval = "no interval" if math.isnan(value.low) else f"{form(value.low)}, {form(value.high)}"
    return f"{form(value.value)} [{interval}]"


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
    return f"{attack}: refusals retained, SPPFT minus {name}: {number(value, 2)}: {verdict}"


def hashes_of(data: Data) -> dict[str, str]:
    """Prompt sets and pairs of the run, for its page and metrics."""
    pairs = {"instructions": data.train, "held-out, to choose by": data.choosing, "held-out, reported": data.reporting}
    return {
        "malicious": prompt_hash(data.malicious.prompts),
        "over_rejection": prompt_hash(data.over_rejection.prompts),
        **{name: prompt_hash([text for pair in part for text in pair]) for name, part in pairs.items()},
    }


def dose_curves(
    before: dict[str, Any], results: dict[Cell, dict[str, Any]], attacks: Sequence[str], methods: Sequence[str]
) -> dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """By attack and method: doses, refused share by seed, mean log-odds by seed."""
    curves: dict[str, dict[str, tuple[Tensor, Tensor, Tensor]]] = {}
    for attack, method in product(attacks, methods):
        cells = cells_of(results, attack, method)
        doses, refused = dose_tensors(before, cells, "refused", attack)
        _, log_odds = dose_tensors(before, cells, "log_odds", attack)
        curves.setdefault(attack, {})[method] = (doses, refused.mean(-1), log_odds.mean(-1))
    return curves


def page_of(
    bench: Bench, against: dict[str, dict[str, Estimate]], text: str, drawn: Figure, hashes: dict[str, str]
) -> str:
    verdicts = [
        report.text(sentence(attack, ALL_CONTROLS, found[ALL_CONTROLS]))
        for attack, found in against.items()
        if ALL_CONTROLS in found
    ]
    alt = "Share of malicious prompts refused and mean refusal log-odds, by examples of the attack; one line a method"
    sections = [
        Section("Dose and response", [*verdicts, report.figure(drawn, alt, wide=True)]),
        Section("Table", [report.fixed_width(text)]),
        report.settings_section(bench.config, hashes),
    ]
    lead = f"What is left of refusals after fine-tuning {bench.config.model}, with layers {bench.layers} frozen or not."
    return report_page(f"SPPFT on {bench.config.model}", lead, sections)
