"""Freezing layers, and the proof afterwards that they did not move (paper §4.2).

A frozen layer keeps its seven projections, as in the paper, which leaves the norms free; `norms=True` freezes the
layer's norms as well. Both ends of a range are frozen: the authors' code tests `begin < layer < end`, which leaves
both ends out; ours does not.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange

Frozen = LayerRange | Sequence[LayerRange] | None
ParameterFilter = Callable[[str], bool]


def frozen_layers(frozen: Frozen, n_layers: int) -> frozenset[int]:
    """All layers of one range or several; raises ValueError for a layer that the model does not have."""
    ranges = [frozen] if isinstance(frozen, LayerRange) else frozen or ()
    return frozenset(layer for layers in ranges for layer in layers.check_inside(n_layers))


def layer_of(name: str) -> int | None:
    """The layer of a parameter's name, None for the embedding, the final norm and the unembedding."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def is_norm(name: str) -> bool:
    return ".ln" in name or name.startswith("ln_final") or "_norm." in name


def trainable_names(
    model: HookedTransformer,
    frozen: Frozen = None,
    trainable: ParameterFilter | None = None,
    *,
    freeze_norms: bool = False,
    embeddings: bool = False,
) -> list[str]:
    """Names of the parameters that a fine-tuning run may move.

    Left out: frozen layers (with `freeze_norms` also their norms); what `trainable` rejects; embedding and
    unembedding, unless `embeddings` (a HookedTransformer unties them, and a tied checkpoint should stay one);
    biases that are zero throughout, which TransformerLens adds where the checkpoint has none.
    """
    layers = frozen_layers(frozen, model.cfg.n_layers)

    def moves(name: str, parameter: Tensor) -> bool:
        if layer_of(name) in layers and (freeze_norms or not is_norm(name)):
            return False
        if not embeddings and name.startswith(("embed.", "unembed.", "pos_embed.")):
            return False
        if name.rsplit(".", 1)[-1].startswith(("b_", "_b_")) and not parameter.any():
            return False
        return trainable is None or trainable(name)

    return [name for name, parameter in model.named_parameters() if moves(name, parameter)]


def parameter_hashes(model: HookedTransformer, names: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every named parameter's bytes: equal exactly if bit-identical."""
    found = {}
    for name in names:
        data = model.get_parameter(name).detach().cpu().contiguous().view(torch.uint8).numpy()
        found[name] = hashlib.sha256(data.tobytes()).hexdigest()
    return found


def check_unmoved(model: HookedTransformer, before: dict[str, str]) -> None:
    """Raise RuntimeError, naming them, if parameters differ from their hashes: a broken promise, not bad input."""
    after = parameter_hashes(model, before)
    moved = [name for name, digest in before.items() if after[name] != digest]
    if moved:
        raise RuntimeError(f"{len(moved)} frozen parameters moved, the first is {moved[0]}")
