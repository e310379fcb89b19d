"""The training loop: one, visible, on the HookedTransformer itself (paper §4).

AdamW, warm-up then linear decay, gradient accumulation and clipping, loss on the answer's tokens (or all), batches
of similar length in a seeded order, a checkpoint to continue from. Frozen parameters are out of the optimizer, so
that they have neither gradient nor state, and are proved bit-identical afterwards.

What is saved against the plain loop, exactly: the tokens that all prompts start with are run once a batch, with
gradient (their keys and values serve all rows); only positions with a loss are unembedded.
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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from safety_mech.models.chat import encode_answer, encode_chat, resolve_template, tokenizer_of
from safety_mech.models.forward import check_one_device, embed, run_blocks, run_prefix, unembed
from safety_mech.training.freeze import (
    Frozen,
    ParameterFilter,
    check_unmoved,
    parameter_hashes,
    trainable_names,
)
from safety_mech.training.pairs import Pair, whole


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a fine-tuning run; the home of all defaults. Lengths in tokens, `batch_size` in examples."""

    epochs: int = 3
    learning_rate: float = 1e-4
    batch_size: int = 4
    accumulate: int = 1
    """Batches a step: a step sees batch_size x accumulate examples."""
    warmup_steps: int = 100
    cap_warmup: bool = True
    """Warm up for a tenth of the steps at most: 100 steps would be all of a short run. The paper does not."""
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_tokens: int = 256
    """Longer examples are cut at the end (and counted in the record)."""
    whole_sequence: bool = False
    """Loss on prompt and answer, as in the authors' code; default: on the answer only."""
    freeze_norms: bool = False
    train_embeddings: bool = False
    bfloat16: bool = False
    """Products in bfloat16 (autocast); weights and optimizer stay float32."""
    template: str = "own"
    seed: int = 0
    checkpoint_every: int = 50
    """Steps between checkpoints, if a checkpoint file is given."""


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


@dataclass(frozen=True)
class Example:
    """Tokens of template, prompt and answer; `loss` marks the tokens that are to be predicted."""

    tokens: Int[Tensor, " pos"]
    loss: Bool[Tensor, " pos"]
    cut: bool


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
    config: TrainConfig = TrainConfig(),
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

    `order` (default: `batch_order`), `loss` (default: mean negative log-likelihood of the step's answer tokens),
    `adjust` and `after_step` are where other methods hook into the loop (methods.py).
    `checkpoint`: a file, written every `config.checkpoint_every` steps; if it is there already, the run goes on
    from it to the same weights as an uninterrupted run. With `order` or `loss` it wants `method`, a text that names
    them and their settings: it tells a run of one method from a run of another.
    Weights in bfloat16 or float16 are trained through float32 masters (`master_weights`). Memory beside the model, in
    bytes per trained number: 8 for AdamW and 4 for the gradient of a float32 weight; 8, 4 for the master and 4 for its
    gradient, of a 16-bit weight. float16 loses gradients below 6e-8: prefer bfloat16.
    Afterwards every parameter wants a gradient, or not, as before; gradients of what is trained are cleared, also
    those that it had before.
    Raises ValueError for no pairs, empty answers, a range outside the model, nothing left to train, a checkpoint of
    another run, without `method` where it is wanted, or together with `adjust` (whose state it would not hold), and for
    a loss or a gradient that is not finite (naming the step; the weights are those before that step).
    """
    check_one_device(model)
    _check_config(config)
    _check_checkpoint(checkpoint, adjust, method, order, loss)
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
        optimizer = torch.optim.AdamW(moved, lr=config.learning_rate, weight_decay=config.weight_decay)
        steps = _resume(checkpoint, run_id, moved, optimizer)
        _write_back(masters, trained)
        bar = tqdm(total=n_steps, initial=len(steps), desc="fine-tuning", unit="step", disable=not progress)
        with bar:
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
                    _collect_gradients(masters, trained)
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
                _write_back(masters, trained)
                seen = sum(map(len, step_batches))
                steps.append(StepRecord(step, loss_sum, rate, norm, seen))
                if after_step is not None:
                    after_step(steps[-1])
                bar.update()
                bar.set_postfix(loss=f"{loss_sum:.3f}", tokens_per_s=f"{n_tokens / (perf_counter() - started):.0f}")
                if checkpoint is not None and (step + 1) % config.checkpoint_every == 0:
                    _save_checkpoint(Path(checkpoint), run_id, moved, optimizer, steps)
        extra_bytes = _extra_bytes(masters, trained, optimizer)
    check_unmoved(model, hashes)
    after = mean_loss(model, held_out_examples, config) if held_out_examples else None
    n_trained = sum(parameter.numel() for parameter in trained.values())
    n_frozen = sum(parameter.numel() for parameter in model.parameters()) - n_trained
    cut = sum(example.cut for example in examples)
    return TrainRecord(steps, before, after, n_trained, n_frozen, cut, extra_bytes, hashes)


@contextmanager
def _only_trained(model: HookedTransformer, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The named parameters; while inside, they alone want a gradient. Leaving gives every parameter its own flag back.

    Their gradients are cleared on entering and on leaving: what a caller left there is no part of the first step.
    """
    parameters = dict(model.named_parameters())
    own = {name: parameter.requires_grad for name, parameter in parameters.items()}
    trained = {name: parameters[name] for name in names}
    try:
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        for parameter in trained.values():
            parameter.grad = None
        yield trained
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(own[name])
        for parameter in trained.values():
            parameter.grad = None


# --- master weights ---------------------------------------------------------------------------------------------------


def master_weights(trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """What the optimizer moves, by name: the parameters themselves, or float32 copies of bfloat16 and float16 ones.

    Neighbouring bfloat16 numbers near 0.1 are 5e-4 apart: a step of 1e-5 on the number itself is rounded away.
    """

    def master(parameter: nn.Parameter) -> nn.Parameter:
        low_precision = torch.finfo(parameter.dtype).bits < 32
        return nn.Parameter(parameter.detach().float()) if low_precision else parameter

    return {name: master(parameter) for name, parameter in trained.items()}


def _collect_gradients(masters: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter]) -> None:
    """Add the gradients of low-precision parameters to their masters', in float32, and clear them."""
    for name, parameter in trained.items():
        master = masters[name]
        if master is not parameter and parameter.grad is not None:
            gradient = parameter.grad.float()
            master.grad = gradient if master.grad is None else master.grad + gradient
            parameter.grad = None


def _write_back(masters: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter]) -> None:
    """Round the masters to the model's number format."""
    with torch.no_grad():
        for name, parameter in trained.items():
            if masters[name] is not parameter:
                parameter.copy_(masters[name])


def _extra_bytes(
    masters: Mapping[str, nn.Parameter], trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> int:
    copies = [master for name, master in masters.items() if master is not trained[name]]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in [*copies, *states])


# --- examples and their loss ------------------------------------------------------------------------------------------


def encode_examples(model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig) -> list[Example]:
    """Template, prompt, answer and, behind a finished answer, the template's own end of turn.

    Raises ValueError for no pairs, an empty answer, or a prompt that leaves no room for one.
    """
    tokenizer = tokenizer_of(model)
    chats = encode_chat(tokenizer, [prompt for prompt, _ in pairs], config.template)
    shape, limit = resolve_template(tokenizer, config.template), min(config.max_tokens, model.cfg.n_ctx)
    examples = []
    for index, (chat, (prompt, answer)) in enumerate(zip(chats, pairs, strict=True)):
        answer = whole(answer)
        text = answer.text.strip()
        if not text:
            raise ValueError(f"pair {index}: the answer is empty: expected some text")
        if len(chat) >= limit:
            raise ValueError(f"pair {index}: the prompt alone has {len(chat)} tokens of at most {limit}")
        ids = encode_answer(tokenizer, shape, prompt.strip(), text, finished=answer.finished)
        tokens = torch.cat([chat.tokens, torch.tensor(ids, dtype=torch.long)])
        loss = torch.arange(len(tokens)) >= (1 if config.whole_sequence else len(chat))
        examples.append(Example(tokens[:limit], loss[:limit], cut=len(tokens) > limit))
    return examples


def batch_loss(model: HookedTransformer, examples: Sequence[Example], config: TrainConfig) -> Float[Tensor, ""]:
    """Sum of the negative log-likelihood (nats) over the marked tokens of a batch."""
    return -answer_log_probs(model, examples, config).sum()


def answer_log_probs(
    model: HookedTransformer, examples: Sequence[Example], config: TrainConfig
) -> Float[Tensor, " prompt"]:
    """Log-probability (nats) of the marked tokens of every example.

    Rows are padded at the END: attention looks back only, so nothing sees the padding, and it has no loss.
    """
    device = model.embed.W_E.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
        prefix_length = _shared_length(examples)
        prefix = run_prefix(model, examples[0].tokens[:prefix_length])
        rest = [example.tokens[prefix_length:] for example in examples]
        tokens = pad_sequence(rest, batch_first=True).to(device)
        marks = pad_sequence([example.loss[prefix_length:] for example in examples], True)
        resid = run_blocks(model, embed(model, tokens[:, :-1], prefix_length), cache=prefix.cache_for(len(examples)))
        wanted = marks[:, 1:].to(device)
        logits = unembed(model, resid[wanted][None])[0]
    log_probs = -cross_entropy(logits.float(), tokens[:, 1:][wanted], reduction="none")
    return log_probs.new_zeros(len(examples)).index_add(0, wanted.nonzero()[:, 0], log_probs)


def _shared_length(examples: Sequence[Example]) -> int:
    """Leading tokens that all examples share and that have no loss; at least two of each are left."""
    length = min(min(int(example.loss.int().argmax()) - 1, len(example.tokens) - 2) for example in examples)
    stacked = torch.stack([example.tokens[: max(0, length)] for example in examples])
    differs = (stacked != stacked[0]).any(dim=0).nonzero()
    return int(differs[0, 0]) if len(differs) else max(0, length)


def mean_loss(model: HookedTransformer, examples: Sequence[Example], config: TrainConfig) -> float:
    """Mean negative log-likelihood per marked token, in nats; exp of it is the perplexity."""
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].tokens))
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(order), 16):
            total += float(batch_loss(model, [examples[index] for index in order[first : first + 16]], config))
    return total / sum(int(example.loss.sum()) for example in examples)


def batch_order(examples: Sequence[Example], config: TrainConfig) -> list[list[int]]:
    """Batches of all epochs: shuffled, sorted by length within windows of 16 batches, batches shuffled again."""
    generator = torch.Generator().manual_seed(config.seed)
    batches: list[list[int]] = []
    for _ in range(config.epochs):
        order = torch.randperm(len(examples), generator=generator).tolist()
        window, epoch = 16 * config.batch_size, []
        for first in range(0, len(order), window):
            part = sorted(order[first : first + window], key=lambda index: len(examples[index].tokens))
            epoch += [part[k : k + config.batch_size] for k in range(0, len(part), config.batch_size)]
        batches += [epoch[k] for k in torch.randperm(len(epoch), generator=generator).tolist()]
    return batches[: len(batches) - len(batches) % config.accumulate] or batches


def _schedule(step: int, warmup_steps: int, n_steps: int, cap: bool = True) -> float:
    """Share of the full learning rate: up over the warm-up (with `cap` a tenth of the run, at most), then down to 0."""
    warmup = max(1, min(warmup_steps, n_steps // 10) if cap else warmup_steps)
    return min((step + 1) / warmup, (n_steps - step) / max(1, n_steps - warmup))


def _check_config(config: TrainConfig) -> None:
    for name in ("epochs", "batch_size", "accumulate", "learning_rate", "clip_norm", "checkpoint_every"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} = {getattr(config, name)}: expected a number above 0")


def _check_checkpoint(
    checkpoint: str | Path | None, adjust: Adjust | None, method: str | None, order: Order | None, loss: Loss | None
) -> None:
    if checkpoint is None:
        return
    if adjust is not None:
        raise ValueError("checkpoint and adjust: a checkpoint does not hold what `adjust` remembers; give one of them")
    if not method and (order is not None or loss is not None):
        raise ValueError("checkpoint with `order` or `loss`: give `method`, a text that names them and their settings")


def _run_id(
    start: dict[str, str], names: list[str], examples: Sequence[Example], config: TrainConfig, method: str | None
) -> str:
    """What makes two runs the same run: method, settings, weights at the start, what is trained, every token of the
    data."""
    digest = hashlib.sha256(repr((method, config, names, sorted(start.items()))).encode())
    for example in examples:
        digest.update(example.tokens.numpy().tobytes() + example.loss.numpy().tobytes())
    return digest.hexdigest()


def _save_checkpoint(
    path: Path, run_id: str, trained: Sequence[Tensor], optimizer: torch.optim.Optimizer, steps: list[StepRecord]
) -> None:
    """Weights, optimizer and records, under a temporary name first: a kill leaves the last checkpoint whole."""
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
    """Restore weights and optimizer from a checkpoint, if there is one; return the steps already made."""
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
