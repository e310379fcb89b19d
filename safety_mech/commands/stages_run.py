"""What `python experiments/stages.py` measures, and the folder that it writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.attention.word_classes import KINDS, WordShares
from safety_mech.commands.cells import base_of, load
from safety_mech.commands.publish import publish
from safety_mech.commands.stages import StagesConfig
from safety_mech.layers import LayerRange
from safety_mech.prompts import Drawn, prompt_hash
from safety_mech.reporting import html as report
from safety_mech.reporting.html import Section
from safety_mech.reporting.plots import plot_attention, plot_contrastive_pair, plot_word_shares
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

    def __str__(self) -> str:
        return f"{self.difference:+.1%} [{self.low:+.1%}, {self.high:+.1%}]"


def run_stages(config: StagesConfig, drawn: dict[str, Drawn], pair: sm.PromptPair, marked: LayerRange | None) -> Path:
    """Shares by layer of every set, their change across the range, the pictures; then the page and the run's folder."""
    sets = {name: part.prompts for name, part in drawn.items()}
    model = load(config.model, config.adapter, config)
    before, after = compared_layers(marked, model.cfg.n_layers)
    attentions = {name: attend(model, prompts, config) for name, prompts in sets.items()}
    shares = {name: sm.word_shares(found) for name, found in attentions.items()}
    compared = shares | variants(attentions, config)
    if base_name := base_of(config.model, config.base):
        base = load(base_name, None, config)
        compared |= {f"{name}, base model": sm.word_shares(attend(base, sets[name], config)) for name in sets}
    changes = {name: changes_of(part, before, after, config) for name, part in compared.items()}
    lead = change_sentence(changes["malicious"]["content of words"], before, after)
    if base_name:
        lead += f"; in the base model {changes['malicious, base model']['content of words']}"
    tables = [share_table(name, part) for name, part in shares.items()]
    text = "\n".join([*tables, change_table(changes, before, after), lead])
    harmful, harmless = attend(model, [pair.malicious, pair.normal], config)
    figures = {
        "words": plot_word_shares(shares, marked),
        "attention": plot_attention(attentions["malicious"][0], marked),
        "contrastive_pair": plot_contrastive_pair(harmful, harmless, marked),
    }
    words = "Share of attention on function words, content words and punctuation by layer; the table has the numbers"
    one = "Attention over the first malicious question, a row a layer, a column a token"
    two = "Attention over the harmful and the harmless prompt of a contrastive pair, side by side"
    pictures = [report.figure(figures["attention"], one), report.figure(figures["contrastive_pair"], two, wide=True)]
    return publish(
        "stages",
        config,
        text,
        title=f"What {config.model} attends to",
        lead=lead[0].upper() + lead[1:] + ".",
        sections=[
            Section("Kinds of words", [report.figure(figures["words"], words, wide=True), report.fixed_width(text)]),
            Section("Pictures", pictures),
        ],
        metrics={
            "shares": {name: share_metrics(part, config) for name, part in shares.items()},
            "changes": changes,
            "before": before,
            "after": after,
            "prompt_ids": {name: part.ids for name, part in drawn.items()},
        },
        prompt_hashes={name: prompt_hash(prompts) for name, prompts in sets.items()},
        tensors={f"{name}.shares": part.shares for name, part in shares.items()},
        figures=figures,
    )


def variants(attentions: dict[str, list[sm.QuestionAttention]], config: StagesConfig) -> dict[str, WordShares]:
    """The shares again without what is looked at for its place, or whatever the question is about."""
    left_out: dict[str, dict[str, Any]] = {"first token left out": {"skip_first": True}}
    if config.skip_words:
        left_out[f"without: {' '.join(config.skip_words)}"] = {"skip_words": config.skip_words}
    return {
        f"{name}, {what}": sm.word_shares(attention, **options)
        for what, options in left_out.items()
        for name, attention in attentions.items()
    }


def compared_layers(marked: LayerRange | None, n_layers: int) -> tuple[LayerRange, LayerRange]:
    """The layers before and after the marked range; without one, the first and the last third."""
    if marked is None:
        third = max(1, n_layers // 3)
        return LayerRange(0, third - 1), LayerRange(n_layers - third, n_layers - 1)
    marked.check_inside(n_layers)
    if marked.start == 0 or marked.end == n_layers - 1:
        raise ValueError(f"range {marked}: expected a layer before it and one after it (the model has {n_layers})")
    return LayerRange(0, marked.start - 1), LayerRange(marked.end + 1, n_layers - 1)


def attend(model: HookedTransformer, prompts: list[str], config: StagesConfig) -> list[sm.QuestionAttention]:
    return sm.question_attention(model, prompts, config.template, head=config.head, progress=len(prompts) > 2)


def changes_of(shares: WordShares, before: LayerRange, after: LayerRange, config: StagesConfig) -> dict[str, Change]:
    """Of each kind's share, and of the content words' part of what falls on words."""
    parts = {kind: (shares.shares[..., index], shares.uniform[:, index]) for index, kind in enumerate(KINDS)}
    parts["content of words"] = (shares.of_words(), shares.uniform[:, 1] / shares.uniform[:, :2].sum(dim=1))
    changes = {}
    for name, (values, uniform) in parts.items():
        early, late = (values[:, layers.start : layers.end + 1].mean(dim=1) for layers in (before, after))
        change = bootstrap_mean(late - early, samples=config.bootstrap, seed=config.seed)
        changes[name] = Change(*(float(value) for value in (early.mean(), late.mean(), *change, uniform.mean())))
    return changes


# --- what is shown ----------------------------------------------------------------------------------------------------


def share_table(name: str, shares: WordShares) -> str:
    """One line a layer, in per cent of the attention over the question; last column: of all attention."""
    of_layers = torch.column_stack([shares.shares.mean(0), shares.first.mean(0), shares.question.mean(0)]).tolist()
    equal = [*shares.uniform.mean(0).tolist(), float(shares.first_uniform.mean())]
    lines = [*enumerate(of_layers), ("equal", equal)]
    rows = [[str(label), *(f"{value:.1%}" for value in values)] for label, values in lines]
    rows[-1].append("")
    head = f"{name}: {len(shares.shares)} prompts, share of the attention over the question (%)\n"
    return head + text_table(["layer", *KINDS, "first token", "question"], rows) + "\n"


def change_table(changes: dict[str, dict[str, Change]], before: LayerRange, after: LayerRange) -> str:
    """Every kind for the prompt sets as they are; for the variants and the base only content words among words."""
    rows = [
        [name, kind, *(f"{share:.1%}" for share in (part.before, part.after, part.uniform)), str(part)]
        for name, kinds in changes.items()
        for kind, part in kinds.items()
        if "," not in name or kind == "content of words"
    ]
    head = ["prompts", "kind", f"layers {before}", f"layers {after}", "equal", "change, 95 % interval"]
    return text_table(head, rows) + "\n"


def change_sentence(change: Change, before: LayerRange, after: LayerRange) -> str:
    """The claim in one line: do content words get more of what falls on words, late than early?"""
    side = "more" if change.low > 0 else "less" if change.high < 0 else "neither more nor less"
    return (
        f"of the attention that falls on words of malicious questions, content words get {change.before:.1%} in layers "
        f"{before} and {change.after:.1%} in layers {after}: {side} "
        f"({change}; equal attention: {change.uniform:.1%})"
    )


def share_metrics(shares: WordShares, config: StagesConfig) -> dict[str, Any]:
    mean, low, high = bootstrap_mean(shares.shares, samples=config.bootstrap, seed=config.seed)
    others = {name: values.mean(dim=0) for name, values in vars(shares).items() if name != "shares"}
    return {"kinds": KINDS, "mean": mean, "low": low, "high": high, **others, "n_prompts": len(shares.shares)}
