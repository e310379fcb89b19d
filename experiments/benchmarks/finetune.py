"""What does a training step cost? Ours against transformers, full and with a third of the layers frozen.

The same model, examples, batch and precision in one run. Every variant runs in a process of its own, so that its
peak memory is its own. Read the RATIOS: seconds are this machine's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from measuring import in_own_process, pad, projections
from torch.nn.utils.rnn import pad_sequence
from torch.utils import benchmark

import safety_mech as sm
from safety_mech.commands.command_line import run
from safety_mech.commands.memory import peak_since, start_of_peak
from safety_mech.commands.publish import publish_table
from safety_mech.models.loading import load_transformers
from safety_mech.stats import middle_third
from safety_mech.training.alignment import refusal_pairs
from safety_mech.training.loop import Example, TrainConfig, encode_examples, fine_tune

SAME_LOSS = 0.05
"""Nats per token; in bfloat16 the variants round differently."""
VARIANTS = ("transformers full", "transformers frozen", "ours full", "ours frozen")


@dataclass(frozen=True)
class BenchConfig:
    """Time training steps."""

    model: str = "smollm2-135m-instruct"
    steps: int = 6
    """Steps that are timed, after one that is not."""
    batch_size: int = 8
    bfloat16: bool = False
    seed: int = 0
    out: str = "results"


@dataclass(frozen=True)
class Measured:
    seconds_per_step: float
    peak_mib: float | None
    """Above what was resident before the first step: activations, gradients, optimizer state."""
    first_loss: float


def main(config: BenchConfig) -> dict[str, Measured]:
    measured = {}
    for variant in VARIANTS:
        measured[variant] = in_own_process(measure, variant, config)
        print(f"{variant}: done", flush=True)
    losses = [one.first_loss for one in measured.values()]
    if max(losses) - min(losses) > SAME_LOSS:
        raise ValueError(f"first losses of {losses}: the variants do not do the same work")
    publish_table("bench_finetune", config, table(measured), metrics={"measured": measured})
    return measured


def measure(variant: str, config: BenchConfig) -> Measured:
    """The first step is the warm-up."""
    pairs = refusal_pairs(sm.load_prompts("malicious:train"), config.seed)
    pairs = pairs[: (config.steps + 1) * config.batch_size]
    settings = TrainConfig(
        epochs=1, batch_size=config.batch_size, learning_rate=1e-5, bfloat16=config.bfloat16, seed=config.seed
    )
    work = ours if variant.startswith("ours") else with_transformers
    ended, peak, first_loss = work(config, settings, pairs, frozen=variant.endswith("frozen"))
    return Measured((ended[-1] - ended[0]) / (len(ended) - 1), peak and peak / 2**20, first_loss)


Steps = tuple[list[float], int | None, float]
"""When each step ended, peak bytes, and the loss of the first."""


def ours(config: BenchConfig, settings: TrainConfig, pairs: list[tuple[str, str]], frozen: bool) -> Steps:
    model = sm.load_model(config.model)
    layers = middle_third(model.cfg.n_layers) if frozen else None
    ended: list[float] = []
    before = start_of_peak()
    record = fine_tune(
        model,
        pairs,
        settings,
        frozen=layers,
        order=in_order,
        after_step=lambda _: ended.append(benchmark.timer()),
        progress=False,
    )
    return ended, peak_since(before), record.steps[0].loss


def in_order(examples: Sequence[Example], config: TrainConfig) -> list[list[int]]:
    """The same batches for both: as the pairs come."""
    return [batch.tolist() for batch in torch.arange(len(examples)).split(config.batch_size)]


def with_transformers(config: BenchConfig, settings: TrainConfig, pairs: list[tuple[str, str]], frozen: bool) -> Steps:
    """A plain loop: right padding, labels on the answer, AdamW; embeddings fixed, as in ours."""
    examples = encode_examples(sm.load_model(config.model), pairs, settings)
    model, _ = load_transformers(config.model)
    model.requires_grad_(True)
    third = projections(model, middle_third(model.config.num_hidden_layers))
    for module in (model.get_input_embeddings(), model.get_output_embeddings(), *(third if frozen else ())):
        module.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-7, weight_decay=0.0)
    model.train()
    ended, losses, before = [], [], start_of_peak()
    for first in range(0, len(examples), config.batch_size):
        batch = examples[first : first + config.batch_size]
        tokens, mask = pad(batch, "right")
        marks = pad_sequence([example.loss for example in batch], batch_first=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(~marks, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ended.append(benchmark.timer())
        losses.append(loss.item())
    return ended, peak_since(before), losses[0]


def table(measured: dict[str, Measured]) -> str:
    """Ratios to a full step of transformers."""
    figures = pd.DataFrame(
        {name: (one.seconds_per_step, one.peak_mib) for name, one in measured.items()}, dtype=float
    ).T
    figures.columns = ["time of a step", "peak memory above the model"]
    return (figures / figures.loc["transformers full"]).to_string(float_format="{:.2f}x".format)


if __name__ == "__main__":
    run(main, BenchConfig)
