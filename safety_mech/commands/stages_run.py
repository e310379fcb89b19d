"""What `python experiments/stages.py` measures, and the folder that it writes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.attention.word_classes import KINDS, WordShares
from safety_mech.commands.stages import StagesConfig
from safety_mech.models.sources import BASE_OF
from safety_mech.prompts import Drawn, prompt_hash
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section, report_page
from safety_mech.reporting.plots import plot_attention, plot_contrastive_pair, plot_word_shares
from safety_mech.reporting.runs import write_run
from safety_mech.reporting.tables import text_table
from safety_mech.stats import bootstrap_mean


@dataclass(frozen=True)
class Change:
    """Mean share of one kind of word before and after the range, and the difference with its 95 % interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    uniform: float


@dataclass(frozen=True)
class StagesResult:
    shares: dict[str, WordShares]
    changes: dict[str, dict[str, Change]]
    folder: Path


def run_stages(
    config: StagesConfig, drawn: dict[str, Drawn], pair: sm.PromptPair, marked: sm.LayerRange | None
) -> StagesResult:
    """Shares by layer of every set, their change across the range, the pictures; then the page and the run's folder."""
    sets = {name: part.prompts for name, part in drawn.items()}
    model = load(config.model, config.adapter, config)
    before, after = compared_layers(marked, model.cfg.n_layers)
    attentions = {name: attend(model, prompts, config) for name, prompts in sets.items()}
    shares = {name: sm.word_shares(found) for name, found in attentions.items()}
    compared = shares | variants(attentions, config)
    base_name = BASE_OF.get(config.model) if config.base == "auto" else config.base
    if base_name:
        base = load(base_name, None, config)
        compared |= {f"{name}, base model": sm.word_shares(attend(base, sets[name], config)) for name in sets}
    changes = {name: changes_of(part, before, after, config) for name, part in compared.items()}
    tables = [share_table(name, part) for name, part in shares.items()]
    lead = change_sentence(changes["malicious"]["content of words"], before, after)
    if base_name:
        lead += f"; in the base model {interval_of(changes['malicious, base model']['content of words'])}"
    text = "\n".join([*tables, change_table(changes, before, after), lead])
    print(text)
    harmful, harmless = attend(model, [pair.malicious, pair.normal], config)
    figures = {
        "words": plot_word_shares(shares, marked),
        "attention": plot_attention(attentions["malicious"][0], marked),
        "contrastive_pair": plot_contrastive_pair(harmful, harmless, marked),
    }
    prompt_hashes = {name: prompt_hash(prompts) for name, prompts in sets.items()}
    folder = write_run(
        config.out,
        "stages",
        config.model,
        config=config,
        metrics={
            "shares": {name: share_metrics(part, config) for name, part in shares.items()},
            "changes": changes,
            "before": before,
            "after": after,
            "prompt_hashes": prompt_hashes,
            "prompt_ids": {name: part.ids for name, part in drawn.items()},
        },
        tensors={f"{name}.shares": part.shares for name, part in shares.items()},
        figures=figures,
        texts={"table.txt": text + "\n", "report.html": page_of(config, lead, text, figures, prompt_hashes)},
    )
    print(f"written: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    return StagesResult(shares, changes, folder)


def load(name: str, adapter: str | None, config: StagesConfig) -> HookedTransformer:
    print(f"loading {name} ...", flush=True)
    return sm.load_model(name, config.device, config.dtype, adapter=adapter)


def variants(attentions: dict[str, list[sm.QuestionAttention]], config: StagesConfig) -> dict[str, WordShares]:
    """The shares again without what is looked at for its place, or whatever the question is about."""
    found = {f"{name}, first token left out": sm.word_shares(a, skip_first=True) for name, a in attentions.items()}
    if config.skip_words:
        words = " ".join(config.skip_words)
        skipped = {name: sm.word_shares(a, skip_words=config.skip_words) for name, a in attentions.items()}
        found |= {f"{name}, without: {words}": part for name, part in skipped.items()}
    return found


def compared_layers(marked: sm.LayerRange | None, n_layers: int) -> tuple[sm.LayerRange, sm.LayerRange]:
    """The layers before and after the marked range; without one, the first and the last third."""
    if marked is None:
        third = max(1, n_layers // 3)
        return sm.LayerRange(0, third - 1), sm.LayerRange(n_layers - third, n_layers - 1)
    marked.check_inside(n_layers)
    if marked.start == 0 or marked.end == n_layers - 1:
        raise ValueError(f"range {marked}: expected a layer before it and one after it (the model has {n_layers})")
    return sm.LayerRange(0, marked.start - 1), sm.LayerRange(marked.end + 1, n_layers - 1)


def attend(model: HookedTransformer, prompts: list[str], config: StagesConfig) -> list[sm.QuestionAttention]:
    return sm.question_attention(model, prompts, config.template, head=config.head, progress=len(prompts) > 2)


def changes_of(
    shares: WordShares, before: sm.LayerRange, after: sm.LayerRange, config: StagesConfig
) -> dict[str, Change]:
    """Of each kind's share, and of the content words' part of what falls on words."""
    parts = {kind: (shares.shares[..., index], shares.uniform[:, index]) for index, kind in enumerate(KINDS)}
    parts["content of words"] = (shares.of_words(), shares.uniform[:, 1] / shares.uniform[:, :2].sum(dim=1))
    return {name: change_of(values, uniform, before, after, config) for name, (values, uniform) in parts.items()}


def change_of(
    values: Tensor, uniform: Tensor, before: sm.LayerRange, after: sm.LayerRange, config: StagesConfig
) -> Change:
    early, late = (values[:, layers.start : layers.end + 1].mean(dim=1) for layers in (before, after))
    mean, low, high = bootstrap_mean(late - early, samples=config.bootstrap, seed=config.seed)
    return Change(float(early.mean()), float(late.mean()), float(mean), float(low), float(high), float(uniform.mean()))


# --- what is shown ----------------------------------------------------------------------------------------------------


def share_table(name: str, shares: WordShares) -> str:
    """One line a layer, in per cent of the attention over the question; last column: of all attention."""

    def row(label: str, values: Iterable[Tensor]) -> list[str]:
        return [label, *(f"{float(value):.1%}" for value in values)]

    rows = [
        row(str(layer), [*shares.shares[:, layer].mean(0), shares.first[:, layer].mean(), question])
        for layer, question in enumerate(shares.question.mean(0))
    ]
    rows.append([*row("equal", [*shares.uniform.mean(0), shares.first_uniform.mean()]), ""])
    head = f"{name}: {len(shares.shares)} prompts, share of the attention over the question (%)\n"
    return head + text_table(["layer", *KINDS, "first token", "question"], rows) + "\n"


def change_table(changes: dict[str, dict[str, Change]], before: sm.LayerRange, after: sm.LayerRange) -> str:
    """Every kind for the prompt sets as they are; for the variants and the base only content words among words."""
    rows = [
        [name, kind, *(f"{share:.1%}" for share in (part.before, part.after, part.uniform)), interval_of(part)]
        for name, kinds in changes.items()
        for kind, part in kinds.items()
        if "," not in name or kind == "content of words"
    ]
    head = ["prompts", "kind", f"layers {before}", f"layers {after}", "equal", "change, 95 % interval"]
    return text_table(head, rows) + "\n"


def change_sentence(change: Change, before: sm.LayerRange, after: sm.LayerRange) -> str:
    """The claim in one line: do content words get more of what falls on words, late than early?"""
    side = "more" if change.low > 0 else "less" if change.high < 0 else "neither more nor less"
    return (
        f"of the attention that falls on words of malicious questions, content words get {change.before:.1%} in layers "
        f"{before} and {change.after:.1%} in layers {after}: {side} "
        f"({interval_of(change)}; equal attention: {change.uniform:.1%})"
    )


def interval_of(change: Change) -> str:
    return f"{change.difference:+.1%} [{change.low:+.1%}, {change.high:+.1%}]"


def page_of(
    config: StagesConfig, lead: str, tables: str, figures: dict[str, Figure], prompt_hashes: dict[str, str]
) -> str:
    words = "Share of attention on function words, content words and punctuation by layer; the table has the numbers"
    one = "Attention over the first malicious question, a row a layer, a column a token"
    pair = "Attention over the harmful and the harmless prompt of a contrastive pair, side by side"
    sections = [
        Section("Kinds of words", [report.figure(figures["words"], words, wide=True), report.fixed_width(tables)]),
        Section(
            "Pictures",
            [report.figure(figures["attention"], one), report.figure(figures["contrastive_pair"], pair, wide=True)],
        ),
        report.settings_section(config, prompt_hashes),
    ]
    return report_page(f"What {config.model} attends to", lead[0].upper() + lead[1:] + ".", sections)


def share_metrics(shares: WordShares, config: StagesConfig) -> dict[str, Any]:
    mean, low, high = bootstrap_mean(shares.shares, samples=config.bootstrap, seed=config.seed)
    return {
        "kinds": KINDS,
        "mean": mean,
        "low": low,
        "high": high,
        "uniform": shares.uniform.mean(dim=0),
        "first": shares.first.mean(dim=0),
        "first_uniform": shares.first_uniform.mean(),
        "question": shares.question.mean(dim=0),
        "n_prompts": len(shares.shares),
    }
