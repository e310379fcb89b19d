"""Align the built-in model to refuse, and save what was learnt as a small adapter.

    python experiments/align.py                              # all layers: data/adapters/smollm2-135m-aligned again
    python experiments/align.py --planted 5-10 --name p5-10  # layers 5..10 only, both included

Malicious prompts are answered by short refusals, normal and a few borderline prompts by the base model's own greedy
answers; low-rank updates of the chosen layers are all that is trained. Figures are on test splits never trained on.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.models.sources import find_source
from safety_mech.prompts import prompt_hash, sample
from safety_mech.refusal.rates import refusal_rate
from safety_mech.reporting.runs import (
    cached_json,
    check_writable,
    content_hash,
    environment,
    package_version,
    plain,
    write_json,
)
from safety_mech.stats import Rate
from safety_mech.training.alignment import AlignConfig, own_answer_pairs, refusal_pairs
from safety_mech.training.capabilities import perplexity, shipped_multiple_choice
from safety_mech.training.loop import TrainRecord, fine_tune
from safety_mech.training.lora import is_adapter_parameter, low_rank_adapters, matrices_in_bfloat16, save_adapter
from safety_mech.training.pairs import Answer, Pair, whole

DEFAULTS = AlignConfig()
HELD_OUT_TOKENS = 32
"""Length of the base's own answers on which perplexity is measured: longer than what was trained on."""


@dataclass(frozen=True)
class AlignRun:
    """Make an organism: a model that refuses because these layers were trained to."""

    model: str = "smollm2-135m-instruct"
    planted: str | None = None
    """Layers to train, as START-END (both included); default: all."""
    rank: int = DEFAULTS.rank
    n_over_rejection: int = DEFAULTS.n_over_rejection
    """Borderline harmless prompts that are answered in training."""
    epochs: int = DEFAULTS.train.epochs
    batch_size: int = DEFAULTS.train.batch_size
    learning_rate: float = DEFAULTS.train.learning_rate
    bfloat16: bool = DEFAULTS.train.bfloat16
    """Train in bfloat16: faster only where its matrix products are (`lscpu` names amx_bf16, or a GPU)."""
    seed: int = 0
    extra: tuple[str, ...] = ()
    """More prompt sets to report refusals on, as in `locate.py --normal`."""
    name: str = "smollm2-135m-aligned"
    out: str = "results/adapters"
    """The adapter goes to OUT/NAME, with its recipe and figures; a killed run continues from OUT/NAME.checkpoint.
    What the base model says is stored in OUT/base, for the next organism of the same base."""


def main(config: AlignRun) -> Path:
    recipe = recipe_of(config)
    extra = {name: sm.load_prompts(name) for name in config.extra}
    find_source(config.model)
    check_writable(config.out)
    folder = Path(config.out) / config.name
    checkpoint = folder.with_name(folder.name + ".checkpoint")
    model = sm.load_model(config.model)
    tests = {name: sm.load_prompts(f"{name}:test") for name in ("malicious", "normal", "over_rejection")} | extra
    print("the base model's own answers ...")
    pairs = training_pairs(model, recipe, config)
    held_out = own_answers(model, tests["normal"], HELD_OUT_TOKENS, config)
    before = {"refused": base_rates(model, tests, config), **skill(model, held_out)}
    with low_rank_adapters(model, recipe.planted, recipe.rank, recipe.alpha, recipe.seed) as placed:
        with matrices_in_bfloat16(model) if recipe.train.bfloat16 else nullcontext():
            record = fine_tune(model, pairs, recipe.train, trainable=is_adapter_parameter, checkpoint=checkpoint)
        save_adapter(placed, folder, config.model)
    aligned = sm.load_model(config.model, adapter=folder)  # as users will have it: stored in float16, merged
    after = {"refused": rates(aligned, tests), **skill(aligned, held_out)}
    write_json(folder / "recipe.json", report(config, recipe, record, before, after, pairs))
    checkpoint.unlink(missing_ok=True)
    print(table(before, after))
    print(f"written: {folder}/ (adapter_model.safetensors, adapter_config.json, recipe.json)")
    return folder


def recipe_of(config: AlignRun) -> AlignConfig:
    train = replace(
        DEFAULTS.train,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        bfloat16=config.bfloat16,
        seed=config.seed,
    )
    planted = sm.LayerRange.parse(config.planted) if config.planted else None
    return replace(
        DEFAULTS,
        planted=planted,
        rank=config.rank,
        n_over_rejection=config.n_over_rejection,
        seed=config.seed,
        train=train,
    )


def training_pairs(model: HookedTransformer, recipe: AlignConfig, config: AlignRun) -> list[Pair]:
    """Refusals for malicious prompts; the model's own answers for normal and borderline ones. Train splits only."""
    contrastive = sm.load_pairs("train") + sm.load_pairs("train", "alignment_pairs") if recipe.contrastive_pairs else []
    malicious = sm.load_prompts("malicious:train") + [pair.malicious for pair in contrastive]
    normal = sm.load_prompts("normal:train") + [pair.normal for pair in contrastive]
    borderline = sample(sm.load_prompts("over_rejection:train"), recipe.n_over_rejection, recipe.seed)
    answered = own_answers(model, normal + borderline, recipe.answer_tokens, config)
    return [*refusal_pairs(malicious, recipe.seed), *answered]


def own_answers(model: HookedTransformer, prompts: list[str], tokens: int, config: AlignRun) -> list[Pair]:
    """The base model's own answers; minutes of work that organisms of one base share."""
    path = base_file("answers", prompts, [tokens], config)
    found = cached_json(path, lambda: [(p, whole(a)) for p, a in own_answer_pairs(model, prompts, tokens)])
    return [(prompt, Answer(**answer)) for prompt, answer in found]


def base_rates(model: HookedTransformer, tests: dict[str, list[str]], config: AlignRun) -> dict[str, Rate]:
    """What the base model refuses; stored as its answers are."""
    path = base_file("rates", [text for prompts in tests.values() for text in prompts], list(tests), config)
    return {name: Rate(**rate) for name, rate in cached_json(path, lambda: rates(model, tests)).items()}


def base_file(what: str, prompts: list[str], settings: Sequence[object], config: AlignRun) -> Path:
    """Named by the model, the prompts and what else the content depends on."""
    key = content_hash(package_version("safety-mech"), config.model, prompt_hash(prompts), *map(str, settings))
    return Path(config.out) / "base" / f"{what}-{key}.json"


def skill(model: HookedTransformer, held_out: list[Pair]) -> dict[str, Any]:
    """Perplexity of the base's own answers, and accuracy on the shipped multiple-choice questions."""
    return {"perplexity": perplexity(model, held_out), "multiple_choice": shipped_multiple_choice(model)}


def rates(model: HookedTransformer, tests: dict[str, list[str]]) -> dict[str, Rate]:
    return {name: refusal_rate(model, prompts, progress=True) for name, prompts in tests.items()}


def report(
    config: AlignRun,
    recipe: AlignConfig,
    record: TrainRecord,
    before: dict[str, Any],
    after: dict[str, Any],
    pairs: list[Pair],
) -> dict[str, Any]:
    """What stands beside the adapter: recipe, seed, and figures before and after."""

    def with_interval(rate: Rate) -> dict[str, Any]:
        return {**asdict(rate), "interval": rate.interval}

    def figures(part: dict[str, Any]) -> dict[str, Any]:
        choice = part["multiple_choice"]
        return {
            "refused": {name: with_interval(rate) for name, rate in part["refused"].items()},
            "perplexity_of_base_answers": part["perplexity"],
            "multiple_choice": with_interval(choice) if choice else None,
        }

    return {
        "base_model": config.model,
        "recipe": plain(recipe),
        "examples": len(pairs),
        "examples_hash": prompt_hash([prompt + whole(answer).text for prompt, answer in pairs]),
        "trained_parameters": record.n_trained,
        "losses": [round(step.loss, 4) for step in record.steps],
        "base": figures(before),
        "aligned": figures(after),
        "environment": environment(),
    }


def table(before: dict[str, Any], after: dict[str, Any]) -> str:
    lines = [f"{'refused':<24} {'base':<34} aligned"]
    for name, rate in before["refused"].items():
        lines.append(f"{Path(name).name:<24} {rate!s:<34} {after['refused'][name]}")
    lines.append(f"{'multiple choice':<24} {before['multiple_choice']!s:<34} {after['multiple_choice']}")
    ratio = after["perplexity"] / before["perplexity"] - 1
    lines.append(
        f"perplexity of the base's answers to normal test prompts: {before['perplexity']:.3f} -> "
        f"{after['perplexity']:.3f} ({ratio:+.1%})"
    )
    return "\n".join(lines)
