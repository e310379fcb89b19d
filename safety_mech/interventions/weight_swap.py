"""With the base model at hand: how much each layer's weights moved, and its layers put back one range at a time.

Both need the model before alignment, which users of a published model seldom have. They are references for the
locators that do without it (docs/method.md#locators).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.models.chat import Template
from safety_mech.models.parameters import replaced
from safety_mech.refusal.log_odds import REFUSAL_PHRASES


def weight_change(model: HookedTransformer, base: HookedTransformer) -> Float[Tensor, " layer"]:
    """|W - W_base| / |W_base| of every layer's matrices together (Frobenius norm, float64); 0: not trained.

    Raises ValueError for models of different shapes.
    """
    changes = []
    for layer in range(model.cfg.n_layers):
        moved, size = 0.0, 0.0
        for (_, ours), (_, theirs) in zip(*_parameters(model, base, layer), strict=True):
            if ours.ndim > 1:
                moved += float((ours.data - theirs.data).double().square().sum())
                size += float(theirs.data.double().square().sum())
        changes.append((moved / size) ** 0.5)
    return torch.tensor(changes, dtype=torch.float64)


@contextmanager
def swapped(model: HookedTransformer, base: HookedTransformer, layers: LayerRange) -> Iterator[HookedTransformer]:
    """While inside, `layers` of the model have the base's weights (all parameters, norms too); hooks stay in place.

    Nothing is copied: parameters point to the base's tensors, and back to their own on leaving, also by an exception.
    Raises ValueError for models of different shapes or layers outside the model.
    """
    layers.check_inside(model.cfg.n_layers)
    pairs = [
        (ours, theirs.data)
        for layer in layers
        for (_, ours), (_, theirs) in zip(*_parameters(model, base, layer), strict=True)
    ]
    with replaced(pairs):
        yield model


def _parameters(
    model: HookedTransformer, base: HookedTransformer, layer: int
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    if model.cfg.n_layers != base.cfg.n_layers:
        raise ValueError(f"model and base have {model.cfg.n_layers} and {base.cfg.n_layers} layers: not its base")
    ours, theirs = (sorted(part.blocks[layer].named_parameters()) for part in (model, base))
    if [(name, p.shape) for name, p in ours] != [(name, p.shape) for name, p in theirs]:
        raise ValueError(f"layer {layer} of model and base has parameters of different shapes: not its base")
    return ours, theirs


def swap_losses(
    model: HookedTransformer,
    base: HookedTransformer,
    prompts: Sequence[str],
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
) -> Float[Tensor, "prompt layer"]:
    """What every prompt's refusal log-odds (nats) lose when one layer is the base's; shared prefixes are cached.

    A layer that is the base's to the last bit loses nothing, and is not run.
    """
    ranges = ScaledRanges(
        model, prompts, 1.0, template=template, phrases=phrases, change=lambda layers: swapped(model, base, layers)
    )
    unchanged = ranges.log_odds(None)
    lost = torch.zeros(len(prompts), model.cfg.n_layers, dtype=torch.float64)
    for layer in range(model.cfg.n_layers):
        pairs = zip(*_parameters(model, base, layer), strict=True)
        if not all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in pairs):
            lost[:, layer] = unchanged - ranges.log_odds(LayerRange(layer, layer))
    return lost
