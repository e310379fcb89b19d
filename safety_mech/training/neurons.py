"""Single MLP neurons: how much each matters for an answer, to first order.

A neuron is one entry of `mlp.hook_post`. Its attribution to an answer's log-probability is activation times gradient,
summed over positions: what the log-probability would lose, to first order, were the neuron set to zero there.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.models.forward import Hooks
from safety_mech.training.loop import Pair, TrainConfig, answer_log_probs, encode_examples


def neuron_scores(
    model: HookedTransformer, pairs: Sequence[Pair], config: TrainConfig | None = None, batch_size: int = 8
) -> Float[Tensor, "layer d_mlp"]:
    """Mean over the pairs of |sum over positions of activation x gradient| of the answer's log-probability (nats).

    With refusals as answers these are the neurons that refusing rests on (after Wei et al. 2024, who score weights).
    Positions of the template's opening, which a batch shares, are left out. Raises ValueError for no pairs.
    """
    config = config or TrainConfig()
    examples = encode_examples(model, pairs, config)
    total = torch.zeros(model.cfg.n_layers, model.blocks[0].mlp.W_out.shape[0])
    for first in range(0, len(examples), batch_size):
        batch = examples[first : first + batch_size]
        kept: dict[int, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint, kept: dict[int, Tensor] = kept) -> Tensor:
            leaf = activation.detach().requires_grad_()
            kept[hook.layer()] = leaf  # of the shared opening first, then, for good, of the rest
            return leaf + (activation - activation.detach())  # adds 0, and lets gradients through to earlier layers

        hooks: Hooks = [(f"blocks.{layer}.mlp.hook_post", keep) for layer in range(model.cfg.n_layers)]
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            value = answer_log_probs(model, batch, config).sum()
            gradients = torch.autograd.grad(value, [kept[layer] for layer in range(model.cfg.n_layers)])
        for layer, gradient in enumerate(gradients):
            total[layer] += (kept[layer].detach() * gradient).sum(dim=1).abs().sum(dim=0).cpu()
    return total / len(examples)
