"""The refusal direction of every layer, by difference of means; ablating it and adding it (Arditi et al. 2024).

    r_k = mean of v_k over malicious prompts - mean of v_k over harmless prompts          v_k: residuals.py

Means are taken in float64, because in the last layers the streams are a hundred times longer than their difference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.stats import mannwhitneyu
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.divergence.angles import check_pairs
from safety_mech.layers import LayerRange

RESIDUAL_POINTS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")
"""Where a block reads or leaves the residual stream; a parallel block has no hook_resid_mid."""


@dataclass(frozen=True)
class Separation:
    """How well the projection on the direction tells held-out prompts apart, per layer; means over the folds.

    `auc`: probability that a malicious prompt projects higher than a harmless one (0.5: chance).
    `d_prime`: difference of the two means in units of the pooled standard deviation.
    """

    auc: Float[Tensor, " layer"]
    d_prime: Float[Tensor, " layer"]


def difference_of_means(
    normal: Float[Tensor, "normal layer d_model"], malicious: Float[Tensor, "malicious layer d_model"]
) -> Float[Tensor, "layer d_model"]:
    """The direction of every layer, float64, not normalised: its length is what `added` adds at coefficient 1.

    Raises ValueError for an empty set, or streams that are not finite.
    """
    for name, residuals in (("normal", normal), ("malicious", malicious)):
        if len(residuals) == 0:
            raise ValueError(f"no {name} prompts were given: expected at least one")
        if not residuals.isfinite().all():
            raise ValueError(f"the residual streams of the {name} prompts are not finite: check model and dtype")
    return malicious.double().mean(0) - normal.double().mean(0)


def separation(
    normal: Float[Tensor, "normal layer d_model"],
    malicious: Float[Tensor, "malicious layer d_model"],
    *,
    paired: bool = False,
    folds: int = 5,
    seed: int = 0,
) -> Separation:
    """Cross-validated separation of every layer: with more dimensions than prompts, a direction separates the prompts
    it was computed from in any layer.

    1. deal the prompts of both sets out to `folds` folds (`paired`: row i of both sets goes to one fold);
    2. for each fold, take the direction from all other folds, and project the fold's prompts on it;
    3. AUC and d' within the fold; their mean over the folds.

    Raises ValueError for fewer than two folds or for a set with fewer than two prompts a fold (d' needs a spread).
    """
    smaller = min(len(normal), len(malicious))
    if folds < 2 or smaller < 2 * folds:
        raise ValueError(f"{folds} folds of {smaller} prompts: expected at least 2 folds with 2 prompts of each set")
    if paired:
        check_pairs(normal, malicious)
    generator = torch.Generator().manual_seed(seed)
    fold_n = torch.randperm(len(normal), generator=generator) % folds
    fold_m = fold_n if paired else torch.randperm(len(malicious), generator=generator) % folds
    parts = []
    for fold in range(folds):
        direction = difference_of_means(normal[fold_n != fold], malicious[fold_m != fold])
        held_out = (normal[fold_n == fold], malicious[fold_m == fold])
        projected = [torch.einsum("pld,ld->pl", x.double(), direction) for x in held_out]
        parts.append(torch.stack([auc(*projected), d_prime(*projected)]))
    return Separation(*torch.stack(parts).mean(0))


def auc(normal: Float[Tensor, "normal layer"], malicious: Float[Tensor, "malicious layer"]) -> Float[Tensor, " layer"]:
    """Share of (malicious, normal) pairs in which the malicious value is the higher one; a tie counts a half."""
    wins = mannwhitneyu(malicious.numpy(), normal.numpy(), method="asymptotic").statistic
    return torch.from_numpy(wins) / (len(normal) * len(malicious))


def d_prime(
    normal: Float[Tensor, "normal layer"], malicious: Float[Tensor, "malicious layer"]
) -> Float[Tensor, " layer"]:
    """Difference of the means over the root of the mean of both variances."""
    spread = ((normal.var(0) + malicious.var(0)) / 2).sqrt().clamp_min(1e-12)
    return (malicious.mean(0) - normal.mean(0)) / spread


@contextmanager
def ablated(
    model: HookedTransformer, direction: Float[Tensor, " d_model"], layers: LayerRange | None = None
) -> Iterator[HookedTransformer]:
    """While inside, take the direction out of the residual stream of `layers` (default: all): x - (x . r) r, |r| = 1.

    At all positions, before, within and after every block, so that no component reads it.
    Leaving restores the model bit for bit. Raises ValueError for a direction of another size or without length.
    """
    unit = _unit(model, direction)
    chosen = layers.check_inside(model.cfg.n_layers) if layers else LayerRange(0, model.cfg.n_layers - 1)
    names = [f"blocks.{layer}.{point}" for layer in chosen for point in RESIDUAL_POINTS]

    def project_out(resid: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> Float[Tensor, "prompt pos d_model"]:
        along = unit.to(resid)
        return resid - (resid @ along)[..., None] * along

    with model.hooks(fwd_hooks=[(name, project_out) for name in names if name in model.hook_dict]):
        yield model


@contextmanager
def added(
    model: HookedTransformer, direction: Float[Tensor, " d_model"], layer: int, coefficient: float = 1.0
) -> Iterator[HookedTransformer]:
    """While inside, add coefficient x direction to the residual stream after block `layer`, at all positions.

    Leaving restores the model bit for bit. Raises ValueError as `ablated` does, or for a layer outside the model.
    """
    LayerRange(layer, layer).check_inside(model.cfg.n_layers)
    _unit(model, direction)

    def add(resid: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> Float[Tensor, "prompt pos d_model"]:
        return resid + (coefficient * direction).to(resid)

    with model.hooks(fwd_hooks=[(f"blocks.{layer}.hook_resid_post", add)]):
        yield model


def _unit(model: HookedTransformer, direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    if len(direction) != model.cfg.d_model:
        raise ValueError(
            f"a direction of {len(direction)} numbers: this model's residual stream has {model.cfg.d_model}"
        )
    length = direction.double().norm()
    if not (length.isfinite() and length > 0):
        raise ValueError("the direction has no length, or is not finite: expected the difference of two means")
    return direction.double() / length
