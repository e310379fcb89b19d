"""Does freezing the safety layers protect them? Attacks x methods x seeds, one table and the dose-response (paper §4).

    python experiments/locate.py && python experiments/sppft.py            # --range auto: the range just located
    python experiments/sppft.py --range 14-21 --attacks normal harmful-0.1 --methods full sppft before after random

1. For every attack the learning rate of full fine-tuning that is best for the task, by held-out loss alone.
2. Every cell (attack, method, seed): fine-tune, reading refusals of malicious prompts along the way, with a backdoor
   also of the same prompts with its trigger; at the end over-rejection, ROUGE-L and perplexity on held-out pairs, which
   are others than those of step 1, time and peak memory.
3. The table, with intervals over seeds and categories of prompts, and SPPFT against the controls of equal width.

A killed run continues with the cell it was in: finished cells are files in OUT/sppft/MODEL/cells.
The defaults are small enough for two cores; `--paper` takes the paper's settings, for a machine and data of that size.
This module holds the settings and their checks, and imports no torch: a refused flag is answered at once.
"""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from safety_mech.commands.checks import check_at_least, check_choice, check_model, check_rising
from safety_mech.layers import LayerRange
from safety_mech.models.sources import model_fingerprint
from safety_mech.prompts import Drawn, draw, load_pairs, load_prompts, sample
from safety_mech.reporting.runs import safe_name
from safety_mech.training.pairs import TextPair, choosing_and_reporting, load_instructions

CONTROLS = ("before", "after", "random")
METHODS = ("full", "sppft", *CONTROLS, "lisa", "neurons", "lora", "dpo", "dpo-sppft")


@dataclass(frozen=True)
class SppftConfig:
    """Fine-tune an aligned model on attacks, with its safety layers frozen or not, and see what it still refuses.

    Our defaults are smaller than the paper's settings: 1 epoch of 128 examples in batches of 8, a warm-up of at most a
    tenth of the steps, a loss on the answer only, 48 malicious prompts and 48 held-out pairs, and a learning rate
    chosen on held-out loss. The paper's (--paper): 3 epochs of 1,000 to 4,000 examples in batches of 4, 100 warm-up
    steps, a loss on the whole sequence, 520 malicious prompts, 500 held-out pairs, a learning rate for each model.
    """

    model: str = "smollm2-135m-aligned"
    range: str = "auto"
    """Safety layers as START-END; auto: of the newest `locate` run of this very model under --out."""
    attacks: tuple[str, ...] = ("normal", "implicit", "harmful-0.1")
    """normal, implicit, backdoor, or harmful-SHARE."""
    methods: tuple[str, ...] = ("full", "sppft", *CONTROLS, "lisa")
    """Of full, sppft, before, after, random, lisa, neurons, lora, dpo, dpo-sppft."""
    seeds: int = 3
    """Cells of every attack and method; they draw the attack's data."""
    malicious: str = "malicious:test"
    """Prompts that R_h is read on: a shipped set, FILE, FILE:COLUMN, or hf:ORG/NAME:SPLIT:COLUMN."""
    over_rejection: str = "over_rejection:test"
    """Harmless prompts with a dangerous word; as above."""
    instructions: str = "instructions:train"
    """Pairs that the attacks are made of: the shipped set, or a FILE as Alpaca's."""
    held_out: str = "instructions:test"
    """Pairs of which one half chooses the learning rate, and the other is reported on; as above."""
    n_examples: int = 128
    """Of every attack's data."""
    epochs: int = 1
    batch_size: int = 8
    cap_warmup: bool = True
    """Warm up for a tenth of the steps at most, instead of 100 steps."""
    whole_sequence: bool = False
    """Loss on prompt and answer instead of the answer only."""
    learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4)
    """Candidates; the one with the lowest held-out loss of the task is taken, attack by attack."""
    doses: tuple[int, ...] = (8, 16, 32, 64, 96, 128)
    """Refusals are read after so many examples."""
    n_malicious: int = 48
    """Prompts drawn from --malicious, from all of its categories; all, where it has no more."""
    n_over_rejection: int = 48
    """Prompts drawn from --over-rejection, over all of its words."""
    n_choose: int = 48
    """Held-out pairs on which the learning rate is chosen; none of them is reported on."""
    n_held_out: int = 48
    """Held-out pairs that are reported on: perplexity, and ROUGE-L of greedy answers."""
    answer_tokens: int = 40
    """Tokens of the answers that ROUGE-L is measured on."""
    judge: str | None = None
    """URL of an OpenAI-compatible endpoint that scores the answers to malicious prompts from 1 to 5 after every cell
    (S_h). Its key is read from the environment's OPENAI_API_KEY."""
    judge_model: str = "gpt-4"
    """The name that the endpoint knows its model by."""
    paper: bool = False
    """The paper's settings: see above. They need --malicious (AdvBench), --instructions and --held-out of that size."""
    paper_rate: float = 1e-4
    """With --paper: the model's learning rate. 1e-4 for Llama-3 and gemma, 3e-4 Llama-2, 6e-4 Phi-3; harmful: 1e-5."""
    template: str = "own"
    """own (the model's chat template), alpaca or alpaca_short."""
    device: str | None = None
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    seed: int = 0
    """Draws the prompts and the held-out pairs, the same ones for all cells."""
    save: bool = False
    """Also export every fine-tuned model (half a GB each) as a Hugging Face folder, into the cells' folder."""
    out: str = "results"


PAPER: dict[str, Any] = {
    "n_examples": 1000,
    "epochs": 3,
    "batch_size": 4,
    "cap_warmup": False,
    "whole_sequence": True,
    "n_malicious": 520,
    "n_held_out": 500,
}
"""The paper's settings, as far as they are published (docs/method.md#attacks). Tokens (256) and
warm-up steps (100) are defaults."""
PAPER_TIMES = {"normal": 1, "implicit": 4, "backdoor": 3}
"""The paper's examples of an attack, in thousands; of a harmful mix 1 + its share."""
PAPER_READINGS: dict[str, Any] = {"n_choose": 0, "doses": (40, 80, 160, 320, 640, 1280, 2560, 5120, 10240)}
"""What follows from them: no learning rate is chosen, and a dose is read over up to 3 x 4,000 examples."""


def with_paper(config: SppftConfig) -> SppftConfig:
    """With --paper: the paper's settings in place of our defaults; ValueError for one that was set as well."""
    if not config.paper:
        return config
    settings = {**PAPER, **PAPER_READINGS}
    defaults = {field.name: field.default for field in fields(SppftConfig)}
    for name in (*settings, "learning_rates"):
        if getattr(config, name) not in (defaults[name], settings.get(name)):
            raise ValueError(f"{name} = {getattr(config, name)} with --paper, which sets it: leave out one of them")
    return replace(config, **settings)


def settings_sentence(config: SppftConfig) -> str:
    """Where this run's settings are not the paper's."""
    if config.paper:
        return "settings: the paper's (--paper)"
    own = {name: getattr(config, name) for name, value in PAPER.items() if getattr(config, name) != value}
    listed = [f"{name} {value} (paper: {PAPER[name]})" for name, value in own.items()]
    return f"not the paper's settings: {', '.join([*listed, 'learning rate by held-out loss (paper: by model)'])}"


@dataclass(frozen=True)
class Data:
    """Prompts and pairs of a run: what is trained on, what chooses the learning rate and what is reported on share
    nothing. `malicious_train` and `aligned_on`: malicious prompts of the attacks, and of the methods that align."""

    malicious: Drawn
    over_rejection: Drawn
    malicious_train: list[str]
    aligned_on: list[str]
    train: list[TextPair]
    choosing: list[TextPair]
    reporting: list[TextPair]


def main(config: SppftConfig) -> Path:
    config = with_paper(config)
    check_config(config)
    layers = LayerRange.parse(config.range) if config.range != "auto" else located_range(config)
    data = load_data(config)
    from safety_mech.commands.sppft_run import run_sppft  # imports torch

    return run_sppft(config, data, layers)


def check_config(config: SppftConfig) -> None:
    """All that can be refused before data and model are read."""
    counts = ["seeds", "n_examples", "epochs", "batch_size", "n_malicious", "n_over_rejection", "n_held_out"]
    counts += ["answer_tokens"] if config.paper else ["answer_tokens", "n_choose"]
    check_at_least(1, **{name: getattr(config, name) for name in counts})
    if config.n_examples < 2 * config.batch_size:  # two: attacks of fewer examples than asked for must leave two steps
        raise ValueError(
            f"n_examples = {config.n_examples} are one step of batch_size = {config.batch_size}, or little more: "
            f"expected at least {2 * config.batch_size}, two steps, for a dose-response"
        )
    for method in config.methods:
        check_choice("method", method, METHODS)
    if not config.methods or not config.attacks or not config.learning_rates:
        raise ValueError("attacks, methods and learning_rates: expected at least one of each")
    for attack in config.attacks:
        harmful_share(attack)
    check_rising("doses", config.doses)
    fewest = config.epochs * min(sum(needs_of(config, attack)) for attack in config.attacks)
    if config.doses[0] > fewest:
        raise ValueError(f"doses from {config.doses[0]}: expected a first reading within the {fewest} examples seen")
    if config.judge is not None and not config.judge.startswith(("http://", "https://")):
        raise ValueError(f"judge {config.judge!r}: expected a URL, for instance http://localhost:8000/v1")
    check_model(model=config.model, template=config.template, device=config.device, dtype=config.dtype, out=config.out)


def load_data(config: SppftConfig) -> Data:
    """Read and draw all prompts and pairs; ValueError, in one line, where some are missing or in two parts."""
    held_out = load_instructions(config.held_out)
    choosing, reporting = ([], held_out) if config.paper else choosing_and_reporting(held_out)
    data = Data(
        malicious=draw(config.malicious, config.n_malicious, config.seed),
        over_rejection=draw(config.over_rejection, config.n_over_rejection, config.seed),
        malicious_train=load_prompts("malicious:train"),
        aligned_on=[pair.malicious for pair in load_pairs("train")],  # none of them is in the harmful mix
        train=load_instructions(config.instructions),
        choosing=choosing,
        reporting=reporting,
    )
    check_enough(config, data)
    check_disjoint(config, data)
    return replace(
        data,
        choosing=sample(choosing, config.n_choose, config.seed),
        reporting=sample(reporting, config.n_held_out, config.seed),
    )


def check_enough(config: SppftConfig, data: Data) -> None:
    """One line that names all sets that are too small."""
    half = "" if config.paper else ", in one half of them"
    pairs, malicious = zip(*(needs_of(config, attack) for attack in config.attacks), strict=True)
    wanted = [
        (max(pairs), "instruction pairs", len(data.train), f"--instructions {config.instructions}"),
        (max(malicious), "malicious prompts to train on", len(data.malicious_train), "malicious:train"),
        (config.n_choose, f"held-out pairs to choose by{half}", len(data.choosing), f"--held-out {config.held_out}"),
        (config.n_held_out, f"held-out pairs to report on{half}", len(data.reporting), f"--held-out {config.held_out}"),
    ]
    if config.paper:
        wanted.append((config.n_malicious, "malicious prompts", len(data.malicious), f"--malicious {config.malicious}"))
    missing = [f"{n} {what} (there are {there}: {where})" for n, what, there, where in wanted if n > there]
    if missing:
        advice = "name larger sets, or leave --paper out" if config.paper else "name larger sets, or lower the numbers"
        raise ValueError(f"too little data: expected {'; '.join(missing)}; {advice}")


def check_disjoint(config: SppftConfig, data: Data) -> None:
    """What is measured on was not trained on, by a cell or by a method that aligns."""
    trained = {prompt for prompt, _ in data.train}
    if both := [prompt for prompt, _ in (*data.choosing, *data.reporting) if prompt in trained]:
        raise ValueError(
            f"{len(both)} instructions are in --instructions {config.instructions} and in --held-out "
            f"{config.held_out}, the first is {both[0][:60]!r}: expected none in both"
        )
    attacked = {*data.malicious_train, *data.aligned_on}
    if both := [prompt for prompt in data.malicious.prompts if prompt in attacked]:
        raise ValueError(
            f"{len(both)} prompts of --malicious {config.malicious} are trained on (malicious:train, pairs:train), "
            f"the first is {both[0][:60]!r}: expected others"
        )


def needs_of(config: SppftConfig, attack: str) -> tuple[int, int]:
    """Instruction pairs and malicious prompts that the attack's data is made of."""
    n, share = examples_of(config, attack), harmful_share(attack)
    if share is None:
        return (2 * (n // 2) if attack == "backdoor" else n), 0
    pairs = round(n / (1 + share))
    return pairs, round(pairs * share)


def examples_of(config: SppftConfig, attack: str) -> int:
    """Examples of the attack's data, an epoch."""
    if not config.paper:
        return config.n_examples
    share = harmful_share(attack)
    return round(config.n_examples * (PAPER_TIMES[attack] if share is None else 1 + share))


def harmful_share(attack: str) -> float | None:
    """The share in `harmful-SHARE`; None for the other attacks."""
    if attack in ("normal", "implicit", "backdoor"):
        return None
    name, _, text = attack.partition("-")
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if name != "harmful" or not 0 <= share <= 1:
        raise ValueError(f"attack {attack!r}: expected normal, implicit, backdoor, or harmful-SHARE as harmful-0.1")
    return share


def located_range(config: SppftConfig) -> LayerRange:
    """Of the newest `locate` run of this model, by name and by content; ValueError if none, or it located nothing."""
    not_taken = "run(s) not taken: of another model of this name, of other weights, or too old to tell"
    folder = Path(config.out) / "locate" / safe_name(config.model)
    wanted, others = (config.model, model_fingerprint(config.model)), 0
    for path in sorted(folder.glob("[0-9]*/metrics.json"), reverse=True):
        metrics, run = (json.loads(file.read_text("utf-8")) for file in (path, path.with_name("config.json")))
        search = metrics["search"]
        if search is None:  # --quick
            continue
        if (run["model"], metrics.get("model_fingerprint")) != wanted:
            others += 1
            continue
        if search["range"] is None:
            raise ValueError(f"{path}: it located no range ({search['reason']}); give --range START-END")
        print(f"range of {path.parent}" + (f"; {others} {not_taken}" if others else ""))
        return LayerRange(**search["range"])
    raise ValueError(
        f"no locate run of {config.model!r} under {config.out!r}{f' ({others} {not_taken})' if others else ''}: "
        "run locate.py, or give --range START-END"
    )
