"""The run of `align.py`: train an organism, and measure it before and after."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.commands.align import AlignRun
from safety_mech.prompts import prompt_hash, sample
from safety_mech.refusal.rates import refusal_rate
from safety_mech.reporting.runs import cached_json, content_hash, environment, package_version, plain, write_json
from safety_mech.reporting.tables import rows_table
from safety_mech.stats import Rate
from safety_mech.training.alignment import AlignConfig, own_answer_pairs, refusal_pairs
from safety_mech.training.capabilities import perplexity, shipped_multiple_choice
from safety_mech.training.loop import fine_tune
from safety_mech.training.lora import is_adapter_parameter, low_rank_adapters, matrices_in_bfloat16, save_adapter
from safety_mech.training.pairs import Answer, Pair, whole

HELD_OUT_TOKENS = 32
"""Length of the base's own answers on which perplexity is measured: longer than what was trained on."""


def run_align(config: AlignRun, planted: sm.LayerRange | None, extra: dict[str, list[str]]) -> Path:
    """Train the adapter, and measure the model before and after; returns the adapter's folder."""
    recipe = recipe_of(config, planted)
    folder = Path(config.out) / config.name
    checkpoint = folder.with_name(folder.name + ".checkpoint")
    model = sm.load_model(config.model)
    tests = {name: sm.load_prompts(f"{name}:test") for name in ("malicious", "normal", "over_rejection")} | extra
    print("the base model's own answers ...")
    pairs = training_pairs(model, recipe, config)
    held_out = own_answers(model, tests["normal"], HELD_OUT_TOKENS, config)
    before = figures_of(model, base_rates(model, tests, config), held_out)
    with low_rank_adapters(model, recipe.planted, recipe.rank, recipe.alpha, recipe.seed) as placed:
        with matrices_in_bfloat16(model) if recipe.train.bfloat16 else nullcontext():
            record = fine_tune(model, pairs, recipe.train, trainable=is_adapter_parameter, checkpoint=checkpoint)
        save_adapter(placed, folder, config.model)
    aligned = sm.load_model(config.model, adapter=folder)  # as users will have it: stored in float16, merged
    after = figures_of(aligned, rates(aligned, tests), held_out)
    report = {
        "base_model": config.model,
        "recipe": plain(recipe),
        "examples": len(pairs),
        "examples_hash": prompt_hash([prompt + whole(answer).text for prompt, answer in pairs]),
        "trained_parameters": record.n_trained,
        "losses": [round(step.loss, 4) for step in record.steps],
        "base": with_intervals(before),
        "aligned": with_intervals(after),
        "environment": environment(),
    }
    write_json(folder / "recipe.json", report)
    checkpoint.unlink(missing_ok=True)
    print(table(before, after))
    print(f"written: {folder}/ (adapter_model.safetensors, adapter_config.json, recipe.json)")
    return folder


def recipe_of(config: AlignRun, planted: sm.LayerRange | None) -> AlignConfig:
    trained = ("epochs", "batch_size", "learning_rate", "bfloat16", "seed")
    train = replace(AlignConfig().train, **{name: getattr(config, name) for name in trained})
    own = {name: getattr(config, name) for name in ("rank", "n_over_rejection", "seed")}
    return AlignConfig(planted=planted, train=train, **own)


def training_pairs(model: HookedTransformer, recipe: AlignConfig, config: AlignRun) -> list[Pair]:
    """Refusals for malicious prompts; the model's own answers for normal and borderline ones. Train splits only."""
    contrastive = sm.load_pairs("train") + sm.load_pairs("train", "alignment_pairs") if recipe.contrastive_pairs else []
    malicious = sm.load_prompts("malicious:train") + [pair.malicious for pair in contrastive]
    normal = sm.load_prompts("normal:train") + [pair.normal for pair in contrastive]
    borderline = sample(sm.load_prompts("over_rejection:train"), recipe.n_over_rejection, recipe.seed)
    answered = own_answers(model, normal + borderline, recipe.answer_tokens, config)
    return [*refusal_pairs(malicious, recipe.seed), *answered]


def own_answers(model: HookedTransformer, prompts: list[str], tokens: int, config: AlignRun) -> list[Pair]:
    """The base model's own answers: minutes of work, cached for all organisms of one base."""
    path = base_file("answers", prompts, [tokens], config)
    found = cached_json(path, lambda: [(p, whole(a)) for p, a in own_answer_pairs(model, prompts, tokens)])
    return [(prompt, Answer(**answer)) for prompt, answer in found]


def base_rates(model: HookedTransformer, tests: dict[str, list[str]], config: AlignRun) -> dict[str, Rate]:
    """Refusal rates of the base model, cached as its answers are."""
    path = base_file("rates", [text for prompts in tests.values() for text in prompts], list(tests), config)
    return {name: Rate(**rate) for name, rate in cached_json(path, lambda: rates(model, tests)).items()}


def base_file(what: str, prompts: list[str], settings: Sequence[object], config: AlignRun) -> Path:
    """Named by the model, the prompts and what else the content depends on."""
    key = content_hash(package_version("safety-mech"), config.model, prompt_hash(prompts), *map(str, settings))
    return Path(config.out) / "base" / f"{what}-{key}.json"


def figures_of(model: HookedTransformer, refused: dict[str, Rate], held_out: list[Pair]) -> dict[str, Any]:
    """What recipe.json and the table say of a model; `held_out`: the base's own answers."""
    return {
        "refused": refused,
        "perplexity_of_base_answers": perplexity(model, held_out),
        "multiple_choice": shipped_multiple_choice(model),
    }


def with_intervals(part: Any) -> Any:
    """The same with every rate as a dictionary that holds its interval too."""
    if isinstance(part, dict):
        return {name: with_intervals(value) for name, value in part.items()}
    return {**asdict(part), "interval": part.interval} if isinstance(part, Rate) else part


def rates(model: HookedTransformer, tests: dict[str, list[str]]) -> dict[str, Rate]:
    return {name: refusal_rate(model, prompts, progress=True) for name, prompts in tests.items()}


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    rows = [
        {"refused": Path(name).name, "base": rate, "aligned": after["refused"][name]}
        for name, rate in before["refused"].items()
    ]
    rows.append({"refused": "multiple choice", "base": before["multiple_choice"], "aligned": after["multiple_choice"]})
    first, last = before["perplexity_of_base_answers"], after["perplexity_of_base_answers"]
    return (
        f"{rows_table(rows)}\nperplexity of the base's answers to normal test prompts: "
        f"{first:.3f} -> {last:.3f} ({last / first - 1:+.1%})"
    )
