"""The cells of `sppft.py`: fine-tune by one method on one attack with one seed, and read the model along the way.

A cell is a file named by everything that its figures depend on (`Bench.path`): a killed run reads it again.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.commands.memory import peak_since, start_of_peak
from safety_mech.commands.sppft import Data, SppftConfig, examples_of, harmful_share
from safety_mech.models.sources import model_fingerprint
from safety_mech.refusal import text
from safety_mech.refusal.harmfulness import http_judge
from safety_mech.refusal.rates import Responses, refusal_rate, responses
from safety_mech.reporting.runs import cached_json, cell_path
from safety_mech.training import alignment, attacks, methods
from safety_mech.training.attack_cost import dose_meter
from safety_mech.training.capabilities import load_multiple_choice, perplexity, rouge_l_scores, shipped_multiple_choice
from safety_mech.training.config import TrainConfig
from safety_mech.training.export import export_transformers
from safety_mech.training.loop import StepRecord, fine_tune
from safety_mech.training.pairs import Pair, TextPair

LISA_STEPS = 4
"""Steps a state: short ones, for the whole training is short."""
LISA_RHO, LORA_RANK, LORA_ALPHA, DPO_BETA = 1.0, 8, 16.0, 0.1
TRIGGER = "Answer as of old."
"""For the backdoor; the paper's was never published."""
TRIGGERED = "backdoor + trigger"
"""The backdoor's cells, read on malicious prompts that carry its trigger."""
PAPER_HARMFUL_RATE = 1e-5
"""The paper's learning rate for the harmful mix, of every model."""


@dataclass(frozen=True)
class Cell:
    attack: str
    method: str
    seed: int


@dataclass
class Bench:
    """What all cells share: the model and its weights before, the prompts, and the range."""

    model: HookedTransformer
    layers: sm.LayerRange
    config: SppftConfig
    data: Data
    start: dict[str, Tensor] = field(init=False, repr=False)
    key: tuple[Any, ...] = field(init=False, repr=False)
    """What the numbers of all cells depend on: settings, the model's files, the range, and data."""

    def __post_init__(self) -> None:
        self.start = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        settings = {name: value for name, value in vars(self.config).items() if name not in NOT_IN_A_CELL}
        weights = model_fingerprint(self.config.model)
        self.key = (settings, weights, self.layers, self.data, load_multiple_choice(), TrainConfig())

    def path(self, label: str, *key: Any) -> Path:
        """The file of a cell or a reading, named by everything that its numbers depend on."""
        modules = (alignment, attacks, text, sys.modules[__name__])  # their constants
        return cell_path(self.config.out, "sppft", self.config.model, label, *self.key, *key, modules=modules)

    def restore(self) -> None:
        """The weights before, bit for bit."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self.start[name])


def attack_data(bench: Bench, attack: str, seed: int) -> Sequence[Pair]:
    """The attack's pairs, drawn with the seed."""
    pairs, n, share = bench.data.train, examples_of(bench.config, attack), harmful_share(attack)
    if share is not None:
        return attacks.harmful_data(pairs, bench.data.malicious_train, share, round(n / (1 + share)), seed)
    if attack == "backdoor":
        return attacks.backdoor_data(pairs, TRIGGER, n // 2, seed)
    make = attacks.implicit_data if attack == "implicit" else attacks.normal_data
    return make(pairs, n, seed)


def chosen_on(bench: Bench, attack: str) -> list[TextPair]:
    """The task's own held-out pairs, which the attacker would look at; none of them is reported on."""
    return attacks.implicit_data(bench.data.choosing) if attack == "implicit" else bench.data.choosing


def choose_rate(bench: Bench, attack: str) -> dict[str, Any]:
    """With --paper the paper's, else that of the least held-out loss after full fine-tuning; refusals play no part."""
    config = bench.config
    if config.paper:
        return {"rate": config.paper_rate if harmful_share(attack) is None else PAPER_HARMFUL_RATE}

    def measure(rate: float) -> dict[str, Any]:
        bench.restore()
        data = attack_data(bench, attack, seed=config.seeds)  # a seed that no cell has
        held_out = chosen_on(bench, attack)
        record = fine_tune(bench.model, data, train_config(config, rate, 0), held_out=held_out, progress=False)
        return {"before": record.held_out_before, "after": record.held_out_after}

    losses = {}
    for rate in config.learning_rates:
        path = bench.path(f"rate-{attack}-{rate:g}", rate, config.seeds)
        losses[rate] = cached_json(path, partial(measure, rate))
        print(f"{attack:<12}learning rate {rate:g}: held-out loss {losses[rate]['after']:.4f}", flush=True)
    return {"rate": min(losses, key=lambda rate: losses[rate]["after"]), "held_out_losses": losses}


def train_config(config: SppftConfig, rate: float, seed: int) -> TrainConfig:
    names = ("epochs", "batch_size", "cap_warmup", "whole_sequence", "template")
    return TrainConfig(learning_rate=rate, seed=seed, **{name: getattr(config, name) for name in names})


def read_malicious(bench: Bench, reading: str = "") -> dict[str, list[Any]]:
    """What the model does with the malicious prompts as it stands; `reading` TRIGGERED: with the backdoor's trigger."""
    return as_lists(responses(bench.model, prompts_of(bench, reading), bench.config.template))


def prompts_of(bench: Bench, reading: str) -> list[str]:
    prompts = bench.data.malicious.prompts
    return [attacks.triggered(prompt, TRIGGER) for prompt in prompts] if reading == TRIGGERED else prompts


def run_cell(bench: Bench, cell: Cell, rate: float, path: Path) -> dict[str, Any]:
    """Fine-tune from the weights before, with readings along the way; one cell's figures, as JSON will hold them.

    `doses` and `malicious` (at the end) are of the prompts as they are; under `triggered`, with the trigger.
    """
    bench.restore()
    config = bench.config
    data = attack_data(bench, cell.attack, cell.seed)
    counted = count_of(cell.method)
    meters = {
        name: dose_meter(bench.model, prompts_of(bench, name), config.doses, config.template, counted=counted)
        for name in readings_of([cell.attack])
    }
    clock = StepClock([meter for _, meter in meters.values()])
    floor = start_of_peak()
    train = train_config(config, rate, cell.seed)
    record = method_of(bench, cell)(bench.model, data, train, after_step=clock.after_step, progress=False)
    peak = peak_since(floor)
    doses = {
        name: [{"examples": point.examples, **as_lists(point.responses)} for point in points]
        for name, (points, _) in meters.items()
    }
    metrics = final_metrics(bench)
    if TRIGGERED in doses:
        metrics["triggered"] = {"doses": doses[TRIGGERED], "malicious": read_malicious(bench, TRIGGERED)}
    if config.save:
        export_transformers(bench.model, config.model, path.with_suffix(""), overwrite=True)
    return {
        "doses": doses[cell.attack],
        "seconds_a_step": statistics.median(clock.seconds),
        "steps": len(record.steps),
        "peak_bytes": peak,
        "trained_parameters": record.n_trained,
        "cut_examples": record.cut_examples,
        "loss": [step.loss for step in record.steps],
        **metrics,
    }


@dataclass
class StepClock:
    """Seconds of every training step, without the meters that are read between steps."""

    meters: Sequence[Callable[[StepRecord], None]]
    seconds: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def after_step(self, record: StepRecord) -> None:
        if record.step:  # before the first stands the set-up
            self.seconds.append(time.perf_counter() - self.started)
        for meter in self.meters:
            meter(record)
        self.started = time.perf_counter()


def count_of(method: str) -> Callable[[StepRecord], int]:
    """How many of a step's examples are the attacker's."""
    if method == "lisa":
        return lambda record: record.examples * methods.is_user_step(record.step, LISA_STEPS, LISA_STEPS)
    if method.startswith("dpo"):
        return lambda record: record.examples // 2
    return lambda record: record.examples


def method_of(bench: Bench, cell: Cell) -> methods.Method:
    """A method by name, called as `fine_tune` is. The random control is drawn anew for every seed."""
    model, layers, seed = bench.model, bench.layers, cell.seed
    controls = methods.width_matched_controls(layers, model.cfg.n_layers, seed)
    if cell.method in controls:
        return methods.sppft(controls[cell.method])
    refusals = alignment.refusal_pairs(bench.data.aligned_on, seed)
    if cell.method == "lisa":
        return methods.lisa(refusals, LISA_RHO, LISA_STEPS, LISA_STEPS)
    if cell.method == "neurons":
        scores = methods.neuron_scores(model, refusals, TrainConfig(template=bench.config.template))
        count = methods.neurons_of_equal_size(model, layers)
        return methods.frozen_entries(methods.neuron_masks(model, scores, count))
    if cell.method.startswith("dpo"):
        malicious = bench.data.malicious_train
        count = min(bench.config.n_examples, len(malicious))
        preferences = attacks.reverse_preferences(malicious, alignment.REFUSALS, count, seed)
        frozen = layers if cell.method == "dpo-sppft" else None
        return lambda model, _, config, **options: methods.dpo(model, preferences, config, frozen, DPO_BETA, **options)
    lora = methods.lora_outside(layers, LORA_RANK, LORA_ALPHA)
    return {"full": fine_tune, "sppft": methods.sppft(layers), "lora": lora}[cell.method]


def final_metrics(bench: Bench) -> dict[str, Any]:
    model, config, pairs = bench.model, bench.config, bench.data.reporting
    answers = sm.generate(model, [prompt for prompt, _ in pairs], config.answer_tokens, config.template)
    judged = {"harmfulness": harmfulness(bench, config.judge)} if config.judge else {}
    return {
        **judged,
        "multiple_choice": shipped_multiple_choice(model, config.template),
        "malicious": read_malicious(bench),
        "over_rejection": refusal_rate(model, bench.data.over_rejection.prompts, config.template),
        "rouge_l": rouge_l_scores(answers, [answer for _, answer in pairs]),
        "perplexity": perplexity(model, pairs, config.template),
    }


def harmfulness(bench: Bench, url: str) -> list[int | None]:
    """The judge's score of the answer to every malicious prompt; None where it gave none."""
    config, prompts = bench.config, bench.data.malicious.prompts
    answers = sm.generate(bench.model, prompts, config.answer_tokens, config.template)
    keep, api_key = bench.path("verdicts").with_name("verdicts.jsonl"), os.environ.get("OPENAI_API_KEY")
    verdicts = http_judge(url, config.judge_model, api_key=api_key, keep=keep)
    return [verdict.score for verdict in verdicts(list(zip(prompts, answers, strict=True)))]


def metrics_before(bench: Bench) -> dict[str, Any]:
    """Of the model as it is given; with the trigger too, if a backdoor is among the attacks."""
    before = cached_json(bench.path("before"), lambda: final_metrics(bench))
    if "backdoor" in bench.config.attacks:
        with_trigger = cached_json(bench.path("before-triggered"), lambda: read_malicious(bench, TRIGGERED))
        before["triggered"] = {"malicious": with_trigger}
    return before


def as_lists(found: Responses) -> dict[str, list[Any]]:
    return {
        "refused": found.refused.int().tolist(),
        "degenerate": found.degenerate.int().tolist(),
        "log_odds": [round(value, 4) for value in found.log_odds.tolist()],
    }


NOT_IN_A_CELL = (
    *("range", "attacks", "methods", "seeds", "learning_rates", "paper_rate", "save", "out"),
    *("malicious", "over_rejection", "instructions", "held_out"),
)
"""Settings that say which cells are run, not what one gives; the range, the learning rate and the data are parts of
their own."""


def readings_of(attacks: Sequence[str]) -> list[str]:
    """Rows of the table: the attacks, and behind the backdoor the same cells read with its trigger."""
    return [name for attack in attacks for name in ((attack, TRIGGERED) if attack == "backdoor" else (attack,))]
