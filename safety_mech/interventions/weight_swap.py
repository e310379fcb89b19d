"""With the base model at hand: how much each layer's weights moved, and its layers put back one range at a time.

Both need the model before alignment, which a user of somebody else's model seldom has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.models.parameters import replaced


def weight_change(model: HookedTransformer, base: HookedTransformer) -> Float[Tensor, " layer"]:
    """|W - W_base| / |W_base| of every layer's matrices together (Frobenius norm, float64); 0: not trained.

    Raises ValueError for models of different shapes.
    """
    changes = []
    for layer in range(model.cfg.n_layers):
        moved, size = 0.0, 0.0
        for ours, theirs in paired_parameters(model, base, layer):
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
    pairs = [pair for layer in layers for pair in paired_parameters(model, base, layer)]
    with replaced([(ours, theirs.data) for ours, theirs in pairs]):
        yield model


def paired_parameters(
    model: HookedTransformer, base: HookedTransformer, layer: int
) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each of a layer's parameters, and the base's of the same name; ValueError for models of different shapes."""
    if model.cfg.n_layers != base.cfg.n_layers:
        raise ValueError(f"model and base have {model.cfg.n_layers} and {base.cfg.n_layers} layers: not its base")
    ours, theirs = (sorted(part.blocks[layer].named_parameters()) for part in (model, base))
    if [(name, p.shape) for name, p in ours] != [(name, p.shape) for name, p in theirs]:
        raise ValueError(f"layer {layer} of model and base has parameters of different shapes: not its base")
    return [(mine, other) for (_, mine), (_, other) in zip(ours, theirs, strict=True)]
