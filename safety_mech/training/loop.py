"""The training loop: one, visible, on the HookedTransformer itself (paper §4).

AdamW, warm-up then linear decay, gradient accumulation and clipping, a checkpoint to continue from. Frozen parameters
stay out of the optimizer, so they have neither gradient nor state; afterwards hashes prove that no bit of them changed.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from safety_mech.models.forward import check_one_device
from safety_mech.training.config import DEFAULTS, TrainConfig
from safety_mech.training.examples import Example, batch_loss, batch_order, encode_examples, mean_loss
from safety_mech.training.freeze import Frozen, ParameterFilter, check_unmoved, parameter_hashes, trainable_names
from safety_mech.training.pairs import Pair


@dataclass(frozen=True)
class StepRecord:
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int


@dataclass(frozen=True)
class TrainRecord:
    """What happened: one record a step; losses in nats per token; hashes of all that was frozen."""

    steps: list[StepRecord]
    held_out_before: float | None
    held_out_after: float | None
    n_trained: int
    n_frozen: int
    cut_examples: int
    extra_bytes: int
    """Memory of AdamW's state and of float32 masters, without gradients and activations."""
    frozen_hashes: dict[str, str] = field(repr=False)


Order = Callable[[Sequence[Example], TrainConfig], list[list[int]]]
"""Batches of all epochs, as indices of examples."""
Loss = Callable[[Sequence[int]], Float[Tensor, ""]]
"""The mean loss of a batch, given as indices of examples."""
Adjust = Callable[[int, Mapping[str, nn.Parameter]], None]
"""Changes the gradients of what is trained (of 16-bit weights: their float32 masters), by name, before they are clipped
and applied; `int`: the step."""


def fine_tune(
    model: HookedTransformer,
    pairs: Sequence[Pair],
    config: TrainConfig = DEFAULTS,
    frozen: Frozen = None,
    trainable: ParameterFilter | None = None,
    *,
    held_out: Sequence[Pair] = (),
    checkpoint: str | Path | None = None,
    order: Order | None = None,
    loss: Loss | None = None,
    adjust: Adjust | None = None,
    method: str | None = None,
    after_step: Callable[[StepRecord], None] | None = None,
    progress: bool = True,
) -> TrainRecord:
    """Fine-tune `model` IN PLACE on (prompt, answer) pairs.

    1. encode the pairs; decide what is trained: all projections and norms but those of `frozen` layers (a
       LayerRange or several, both ends included), and only what `trainable(name)` accepts, if given;
    2. for every step: forward, loss on answer tokens, backward, clip, AdamW at the scheduled rate;
    3. check that what was frozen is bit-identical.

    Other methods hook into the loop through `order` (default: `batch_order`), `loss` (default: mean negative
    log-likelihood of the step's answer tokens), `adjust` and `after_step`; see methods.py.
    `checkpoint`: a file, written every `config.checkpoint_every` steps. If it exists, the run continues from it and
    ends with the weights of an uninterrupted run. With `order` or `loss`, `method` must name them and their settings:
    it tells the runs of two methods apart.
    Weights in bfloat16 or float16 are trained through float32 masters (`master_weights`). Memory beside the model, in
    bytes per trained number: 12 for a float32 weight (AdamW 8, gradient 4), 16 for a 16-bit weight (and 4 for the
    master). float16 loses gradients below 6e-8: prefer bfloat16.
    Afterwards every parameter's `requires_grad` is what it was; gradients of trained parameters are cleared.
    Raises ValueError for no pairs, empty answers, a range outside the model, nothing left to train, a checkpoint of
    another run, a checkpoint without `method` where it is needed or together with `adjust` (whose state it would not
    hold), and a loss or gradient that is not finite (it names the step; the weights are those before that step).
    """
    check_one_device(model)
    _check_config(config)
    if checkpoint is not None and adjust is not None:
        raise ValueError("checkpoint and adjust: a checkpoint does not hold what `adjust` remembers; give one of them")
    if checkpoint is not None and not method and (order is not None or loss is not None):
        raise ValueError("checkpoint with `order` or `loss`: give `method`, a text that names them and their settings")
    examples = encode_examples(model, pairs, config)
    held_out_examples = encode_examples(model, held_out, config) if held_out else []
    names = trainable_names(
        model, frozen, trainable, freeze_norms=config.freeze_norms, embeddings=config.train_embeddings
    )
    if not names:
        raise ValueError("nothing is left to train: loosen `frozen` or `trainable`")
    batches = (order or batch_order)(examples, config)
    n_steps = len(batches) // config.accumulate
    if not n_steps:
        raise ValueError(f"{len(batches)} batches make no step of {config.accumulate}: lower `accumulate`")
    hashes = parameter_hashes(model, (name for name, _ in model.named_parameters() if name not in set(names)))
    run_id = _run_id(parameter_hashes(model, names) | hashes, names, examples, config, method)
    before = mean_loss(model, held_out_examples, config) if held_out_examples else None

    with _only_trained(model, names) as trained:
        masters = master_weights(trained)
        moved = list(masters.values())
        copies = [(masters[name], own) for name, own in trained.items() if masters[name] is not own]
        optimizer = torch.optim.AdamW(moved, lr=config.learning_rate, weight_decay=config.weight_decay)
        steps = _resume(checkpoint, run_id, moved, optimizer)
        _write_back(copies)
        with tqdm(total=n_steps, initial=len(steps), desc="fine-tuning", unit="step", disable=not progress) as bar:
            for step in range(len(steps), n_steps):
                rate = config.learning_rate * _schedule(step, config.warmup_steps, n_steps, config.cap_warmup)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                started, loss_sum, n_tokens = perf_counter(), 0.0, 0
                step_batches = batches[step * config.accumulate : (step + 1) * config.accumulate]
                n_loss = sum(int(examples[index].loss.sum()) for batch in step_batches for index in batch)
                for batch in step_batches:
                    if loss is None:
                        part = batch_loss(model, [examples[index] for index in batch], config) / n_loss
                    else:
                        part = loss(batch) / len(step_batches)
                    part.backward()
                    _collect_gradients(copies)
                    loss_sum += part.item()
                    n_tokens += sum(len(examples[index].tokens) for index in batch)
                if not math.isfinite(loss_sum):
                    raise ValueError(f"the loss is not finite at step {step}: try a lower learning rate")
                if adjust is not None:
                    adjust(step, masters)
                norm = float(torch.nn.utils.clip_grad_norm_(moved, config.clip_norm))
                if not math.isfinite(norm):  # clipping has made nan of it: no weight may see that
                    raise ValueError(f"the gradient is not finite at step {step}: try a lower learning rate")
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                _write_back(copies)
                steps.append(StepRecord(step, loss_sum, rate, norm, sum(map(len, step_batches))))
                if after_step is not None:
                    after_step(steps[-1])
                bar.update()
                bar.set_postfix(loss=f"{loss_sum:.3f}", tokens_per_s=f"{n_tokens / (perf_counter() - started):.0f}")
                if checkpoint is not None and (step + 1) % config.checkpoint_every == 0:
                    _save_checkpoint(Path(checkpoint), run_id, moved, optimizer, steps)
        states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        extra_bytes = sum(tensor.nbytes for tensor in [*states, *(master for master, _ in copies)])
    check_unmoved(model, hashes)
    after = mean_loss(model, held_out_examples, config) if held_out_examples else None
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_frozen = sum(parameter.numel() for parameter in model.parameters()) - n_trained
    cut = sum(example.cut for example in examples)
    return TrainRecord(steps, before, after, n_trained, n_frozen, cut, extra_bytes, hashes)


@contextmanager
def _only_trained(model: HookedTransformer, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The named parameters; inside the context, they alone require a gradient. Leaving restores every flag.

    Their gradients are cleared on entering, so that a caller's do not enter the first step, and on leaving.
    """
    parameters = dict(model.named_parameters())
    own = {name: parameter.requires_grad for name, parameter in parameters.items()}
    trained = {name: parameters[name] for name in names}

    def set_flags(flags: Mapping[str, bool]) -> None:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags.get(name, False))
            parameter.grad = None if name in trained else parameter.grad

    try:
        set_flags(dict.fromkeys(trained, True))
        yield trained
    finally:
        set_flags(own)


Copies = Sequence[tuple[nn.Parameter, nn.Parameter]]
"""Masters that are copies, each with its 16-bit parameter."""


def master_weights(trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What the optimizer updates, by name: float32 parameters themselves, and float32 copies of 16-bit ones.

    Neighbouring bfloat16 numbers near 0.1 are 5e-4 apart, so a step of 1e-5 on the number itself is rounded away.
    """
    return {
        name: nn.Parameter(own.detach().float()) if torch.finfo(own.dtype).bits < 32 else own
        for name, own in trained.items()
    }


def _collect_gradients(copies: Copies) -> None:
    """Add the gradients of low-precision parameters to their masters', in float32, and clear them."""
    for master, parameter in copies:
        if parameter.grad is not None:
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None


def _write_back(copies: Copies) -> None:
    """Round the masters to the model's number format."""
    with torch.no_grad():
        for master, parameter in copies:
            parameter.copy_(master)


def _schedule(step: int, warmup_steps: int, n_steps: int, cap: bool = True) -> float:
    """Share of the full learning rate: up over the warm-up (with `cap` a tenth of the run, at most), then down to 0."""
    warmup = max(1, min(warmup_steps, n_steps // 10) if cap else warmup_steps)
    return min((step + 1) / warmup, (n_steps - step) / max(1, n_steps - warmup))


def _check_config(config: TrainConfig) -> None:
    for name in ("epochs", "batch_size", "accumulate", "learning_rate", "clip_norm", "checkpoint_every"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} = {getattr(config, name)}: expected a number above 0")


def _run_id(
    start: dict[str, str], names: list[str], examples: Sequence[Example], config: TrainConfig, method: str | None
) -> str:
    """Hash of method, settings, weights at the start, names of what is trained, and every token of the data."""
    digest = hashlib.sha256(repr((method, config, names, sorted(start.items()))).encode())
    for example in examples:
        digest.update(example.tokens.numpy().tobytes() + example.loss.numpy().tobytes())
    return digest.hexdigest()


def _save_checkpoint(
    path: Path, run_id: str, trained: Sequence[Tensor], optimizer: torch.optim.Optimizer, steps: list[StepRecord]
) -> None:
    """Write weights, optimizer and records under a temporary name first: a kill leaves the last checkpoint intact."""
    state = {
        "run_id": run_id,
        "parameters": [parameter.detach() for parameter in trained],
        "optimizer": optimizer.state_dict(),
        "steps": [vars(record) for record in steps],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    partial.replace(path)


def _resume(
    checkpoint: str | Path | None, run_id: str, trained: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> list[StepRecord]:
    """Restore weights and optimizer from a checkpoint, if it exists; return the records of its steps."""
    if checkpoint is None or not Path(checkpoint).is_file():
        return []
    state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
    if state["run_id"] != run_id:
        raise ValueError(
            f"checkpoint {str(checkpoint)!r} is of a run with other data or settings: remove it, or name another"
        )
    with torch.no_grad():
        for parameter, saved in zip(trained, state["parameters"], strict=True):
            parameter.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return [StepRecord(**record) for record in state["steps"]]
