"""Ways to fine-tune, each a few lines on the one loop: the attack, the defence, and its controls (paper §4.2,
docs/method.md#sppft).

A method is called as `fine_tune` is, (model, pairs, config, **options) -> TrainRecord; `fine_tune` itself is full
fine-tuning, the attack without a defence:

    methods = {"full": fine_tune, "SPPFT": sppft(found.range), "Lisa": lisa(alignment_pairs)}
    record = methods["SPPFT"](model, pairs, TrainConfig(learning_rate=1e-4))
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.layers import LayerRange
from safety_mech.models.forward import Hooks
from safety_mech.models.parameters import as_hooked, block_projections
from safety_mech.training.config import DEFAULTS, TrainConfig
from safety_mech.training.examples import Example, answer_log_probs, batch_order, encode_examples
from safety_mech.training.freeze import Frozen, layer_of
from safety_mech.training.loop import TrainRecord, fine_tune
from safety_mech.training.lora import is_adapter_parameter, low_rank_adapters
from safety_mech.training.pairs import Pair, Preference

Method = Callable[..., TrainRecord]


def sppft(layers: Frozen) -> Method:
    """Safely partial-parameter fine-tuning: these layers, a range or several, are frozen."""
    return partial(fine_tune, frozen=layers)


def width_matched_controls(layers: LayerRange, n_layers: int, seed: int = 0) -> dict[str, list[LayerRange]]:
    """What to freeze instead, of the same width and so (all layers being alike) of the same number of parameters.

    "before" and "after": the nearest ranges that do not overlap `layers`; "random": another contiguous range that does
    not, drawn with the seed, for layers that lie together may matter more than scattered ones. A control without room
    is left out. The paper froze ranges of other widths, which compares two things at once.
    Raises ValueError for layers that the model does not have.
    """
    layers.check_inside(n_layers)
    starts = range(n_layers - layers.width + 1)
    apart = [start for start in starts if abs(start - layers.start) >= layers.width]
    nearest = {"before": layers.start - layers.width, "after": layers.end + 1}
    others = [start for start in apart if start not in nearest.values()]
    drawn = {name: start for name, start in nearest.items() if start in apart}
    if others:
        index = torch.randint(len(others), (1,), generator=torch.Generator().manual_seed(seed)).item()
        drawn["random"] = others[int(index)]
    return {name: [LayerRange(start, start + layers.width - 1)] for name, start in drawn.items()}


# --- Lisa -------------------------------------------------------------------------------------------------------------


def lisa(alignment: Sequence[Pair], rho: float = 1.0, alignment_steps: int = 10, user_steps: int = 10) -> Method:
    """Lisa (Huang et al. 2024): states alternate between alignment data and the user's, each held near its start.

    In every state, rho / 2 |w - w_start of the state|^2 is added to the loss: its gradient, rho (w - w_start), is
    added here. Learning rate and optimizer run on through the states.
    Raises ValueError for a rho that is not above 0 or no alignment data.
    """
    if not rho > 0 or min(alignment_steps, user_steps) < 1 or not alignment:
        raise ValueError("Lisa: expected rho above 0, at least one step a state, and some alignment data")

    def method(model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig, **options: Any) -> TrainRecord:
        if config.accumulate != 1:
            raise ValueError("Lisa: expected accumulate = 1, for a state is counted in batches")
        anchors: dict[str, Tensor] = {}

        def order(examples: Sequence[Example], config: TrainConfig) -> list[list[int]]:
            return alternate(
                batch_order(examples[: len(pairs)], config),
                [[index + len(pairs) for index in b] for b in batch_order(examples[len(pairs) :], config)],
                user_steps,
                alignment_steps,
            )

        def adjust(step: int, parameters: Mapping[str, nn.Parameter]) -> None:
            if step % (user_steps + alignment_steps) in (0, user_steps):  # a state begins
                anchors.update({name: parameter.detach().clone() for name, parameter in parameters.items()})
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - anchors[name], alpha=rho)

        return fine_tune(model, [*pairs, *alignment], config, order=order, adjust=adjust, **options)

    return method


def is_user_step(step: int, user_steps: int = 10, alignment_steps: int = 10) -> bool:
    """Whether step `step` (from 0) of Lisa sees the user's data."""
    return step % (user_steps + alignment_steps) < user_steps


def alternate(
    user: Sequence[list[int]], alignment: Sequence[list[int]], user_steps: int, alignment_steps: int
) -> list[list[int]]:
    """All user batches once, `user_steps` at a time; between them `alignment_steps` batches of the others, from the
    start again when they are used up."""
    batches, others = [], cycle(alignment)
    for first in range(0, len(user), user_steps):
        batches += user[first : first + user_steps]
        if len(user) - first > user_steps:
            batches += islice(others, alignment_steps)
    return batches


# --- preferences ------------------------------------------------------------------------------------------------------


def dpo(
    model: HookedTransformer,
    preferences: Sequence[Preference],
    config: TrainConfig,
    frozen: Frozen = None,
    beta: float = 0.1,
    **options: Any,
) -> TrainRecord:
    """Direct preference optimisation (Rafailov et al. 2023), with or without frozen layers.

        loss = -log sigmoid(beta ((log p - log p_before)(preferred) - (log p - log p_before)(other)))

    `log p`: of the whole answer; `p_before`: of the model as it is given. With `attacks.reverse_preferences` this is
    an attack; with refusals preferred, a defence. A batch holds `batch_size` preferences, both answers of each, and a
    step record counts the answers. Raises ValueError for a beta that is not above 0.
    """
    if not beta > 0:
        raise ValueError(f"beta {beta}: expected a number above 0")
    pairs = [(prompt, preferred) for prompt, preferred, _ in preferences]
    pairs += [(prompt, other) for prompt, _, other in preferences]
    examples = encode_examples(model, pairs, config)
    count = len(preferences)

    def order(examples: Sequence[Example], config: TrainConfig) -> list[list[int]]:
        return [[*batch, *(index + count for index in batch)] for batch in batch_order(examples[:count], config)]

    def log_probs(batch: Sequence[int]) -> Float[Tensor, " prompt"]:
        return answer_log_probs(model, [examples[index] for index in batch], config)

    with torch.no_grad():
        chunks = [range(first, min(first + 16, len(examples))) for first in range(0, len(examples), 16)]
        before = torch.cat([log_probs(chunk) for chunk in chunks])

    def loss(batch: Sequence[int]) -> Float[Tensor, ""]:
        gained = log_probs(batch) - before[list(batch)]
        preferred, other = gained.chunk(2)
        return -logsigmoid(beta * (preferred - other)).mean()

    return fine_tune(model, pairs, config, frozen, order=order, loss=loss, method=f"DPO, beta {beta}", **options)


# --- neurons, adapters ------------------------------------------------------------------------------------------------

Masks = Mapping[str, Float[Tensor, "..."]]
"""By parameter name: 1 where it may move, 0 where it is frozen."""


def frozen_entries(masks: Masks) -> Method:
    """Freeze parts of parameters, as single neurons: their gradient is zero, and AdamW without decay leaves them bit
    for bit. (Their optimizer state exists, and is zero: only whole parameters save memory.)"""

    def method(model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig, **options: Any) -> TrainRecord:
        if config.weight_decay:
            raise ValueError("frozen entries: expected weight_decay = 0, which would move them")

        def adjust(step: int, parameters: Mapping[str, nn.Parameter]) -> None:
            for name, mask in masks.items():
                gradient = parameters[name].grad
                if gradient is not None:
                    gradient.mul_(mask)

        return fine_tune(model, pairs, config, adjust=adjust, **options)

    return method


def neuron_scores(
    model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig = DEFAULTS, batch_size: int = 8
) -> Float[Tensor, "layer d_mlp"]:
    """Mean over the pairs of |sum over positions of activation x gradient| of the answer's log-probability (nats).

    A neuron is one entry of `mlp.hook_post`. Activation times gradient is what the log-probability would lose, to first
    order, were the neuron set to zero there.
    With refusals as answers these are the neurons that refusing rests on (after Wei et al. 2024, who score weights).
    Positions of the prefix that a batch shares are left out. Raises ValueError for no pairs.
    """
    examples = encode_examples(model, pairs, config)
    total = torch.zeros(model.cfg.n_layers, model.blocks[0].mlp.W_out.shape[0])
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        leaves: dict[int, Tensor] = {}

        def record(activation: Tensor, hook: HookPoint, leaves: dict[int, Tensor] = leaves) -> Tensor:
            leaf = activation.detach().requires_grad_()
            leaves[hook.layer()] = leaf  # of the shared prefix first, then, to stay, of the rest
            return leaf + (activation - activation.detach())  # adds 0, and lets gradients through to earlier layers

        hooks: Hooks = [(f"blocks.{layer}.mlp.hook_post", record) for layer in range(model.cfg.n_layers)]
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            value = answer_log_probs(model, batch, config).sum()
            gradients = torch.autograd.grad(value, [leaves[layer] for layer in range(model.cfg.n_layers)])
        for layer, gradient in enumerate(gradients):
            total[layer] += (leaves[layer].detach() * gradient).sum(dim=1).abs().sum(dim=0).cpu()
    return total / len(examples)


def neuron_masks(
    model: HookedTransformer, scores: Float[Tensor, "layer d_mlp"], n_frozen: int
) -> dict[str, Float[Tensor, "d_model d_mlp"] | Float[Tensor, "d_mlp d_model"]]:
    """Masks that freeze the `n_frozen` MLP neurons of the highest scores: their gate, up and down weights.

    A mask is on its weight's device.
    """
    frozen = torch.zeros(scores.numel(), dtype=torch.bool)
    frozen[scores.flatten().topk(n_frozen).indices.cpu()] = True
    masks = {}
    for layer, free in enumerate((~frozen).float().view(scores.shape)):
        for name, mask in (("W_gate", free), ("W_in", free), ("W_out", free[:, None])):
            weight = getattr(model.blocks[layer].mlp, name)
            masks[f"blocks.{layer}.mlp.{name}"] = mask.to(weight.device).expand(weight.shape)
    return masks


def neurons_of_equal_size(model: HookedTransformer, layers: LayerRange) -> int:
    """How many MLP neurons have as many parameters as the projections of `layers`."""
    names = {f"blocks.{layer}.{projection.hooked}" for layer in layers for projection in block_projections(model)}
    total = sum(model.get_parameter(name).numel() for name in names)
    return round(total / (3 * model.cfg.d_model))


def lora_outside(layers: LayerRange, rank: int = 8, alpha: float = 16.0) -> Method:
    """Low-rank updates of all layers but these; what was learnt is added to the weights at the end.

    The run's seed (`TrainConfig.seed`) also draws where the updates start.
    """

    def method(model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig, **options: Any) -> TrainRecord:
        def outside(name: str) -> bool:
            layer = layer_of(name)
            return is_adapter_parameter(name) and layer is not None and layer not in layers

        with low_rank_adapters(model, None, rank, alpha, config.seed) as placed:
            record = fine_tune(model, pairs, config, trainable=outside, **options)
        with torch.no_grad():
            for layer, projection, update in placed:
                if layer not in layers:
                    weight = model.get_parameter(f"blocks.{layer}.{projection.hooked}")
                    weight.add_(as_hooked(projection, update.weight(), model))
        return record

    return method
