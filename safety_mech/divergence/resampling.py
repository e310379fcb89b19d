"""Angles between prompts, and their means under weights: by label, bootstrap draw, permutation, or reflection.

A labelling, a bootstrap draw and a reflection are all weights on prompts. `weighted_means` therefore gives the mean
angles of normal-normal, malicious-malicious and normal-malicious pairs for many of them by matrix products.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from safety_mech.stats import resampled_counts

Angles = Float[Tensor, "layer prompt prompt"]
Statistic = Literal["paper", "symmetric"]
"""paper: NM - NN. symmetric: NM - (NN + MM) / 2."""


def angle_matrix(residuals: Float[Tensor, "prompt layer d_model"]) -> Angles:
    """Angle in degrees between every two prompts at every layer, in float64; 0 on the diagonal.

    Raises ValueError (naming layer and prompt) for a residual stream that is not finite or has no length.
    """
    norms = residuals.double().norm(dim=-1).T
    bad = (~(norms.isfinite() & (norms > 0))).nonzero()
    if len(bad):
        layer, prompt = bad[0].tolist()
        raise ValueError(
            f"residual stream of prompt {prompt} (normal prompts first, then malicious) at layer {layer} has no "
            "direction: it is zero or not finite"
        )
    return _angles(residuals)


def _angles(vectors: Float[Tensor, "prompt layer d_model"]) -> Angles:
    unit = _unit(vectors).transpose(0, 1)
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)
    angles = torch.rad2deg(torch.arccos(cosine))
    angles.diagonal(dim1=1, dim2=2).zero_()
    return angles


def _unit(vectors: Float[Tensor, "*rest d_model"]) -> Float[Tensor, "*rest d_model"]:
    """Directions, in float64; 0 stays 0, at 90 degrees to all others."""
    vectors = vectors.double()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-300)


@dataclass(frozen=True)
class MeanAngles:
    """Weighted mean angles of the three kinds of pairs."""

    nn: Float[Tensor, "sample layer"]
    mm: Float[Tensor, "sample layer"]
    nm: Float[Tensor, "sample layer"]

    @property
    def paper(self) -> Float[Tensor, "sample layer"]:
        return self.nm - self.nn

    @property
    def symmetric(self) -> Float[Tensor, "sample layer"]:
        return self.nm - (self.nn + self.mm) / 2


def labelled_means(angles: Angles, normal_weight: Float[Tensor, "sample prompt"], paired: bool = False) -> MeanAngles:
    """For many labellings at once; `normal_weight` is 1 where a prompt counts as normal, else 0."""
    prompts = angles.shape[1]
    numbers = prompt_numbers(prompts // 2, prompts - prompts // 2, paired)
    return weighted_means(angles, normal_weight, 1.0 - normal_weight, numbers)


def weighted_means(
    angles: Angles,
    w_n: Float[Tensor, "sample prompt"],
    w_m: Float[Tensor, "sample prompt"],
    numbers: Int[Tensor, " prompt"],
    within: Bool[Tensor, "prompt prompt"] | None = None,
) -> MeanAngles:
    """Mean angles where prompt i has weight w_i, that is, stands for w_i copies.

    A pair of prompts with different `numbers` weighs w_i w_j. Of equal number only pairs `within` count, once a copy.
    """
    in_n, in_m = w_n.any(0), w_m.any(0)  # most weights are 0 where the two sets are apart: their products cost time
    w_n, w_m = w_n[:, in_n], w_m[:, in_m]
    apart = (numbers[:, None] != numbers[None]).double()
    ones = torch.ones_like(angles[:1])  # its sums are the numbers of pairs

    def sums(layer: Float[Tensor, "prompt prompt"], v_n: Tensor, v_m: Tensor) -> Float[Tensor, "kind sample"]:
        left_n, left_m = w_n @ layer[in_n], w_m @ layer[in_m][:, in_m]
        return torch.stack([(left_n[:, in_n] * v_n).sum(1), (left_m * v_m).sum(1), (left_n[:, in_m] * v_m).sum(1)])

    total = torch.stack([sums(layer * apart, w_n, w_m) for layer in torch.cat([angles, ones])], dim=-1)
    if within is not None:
        once = (w_n > 0).double(), (w_m > 0).double()
        total = total + torch.stack([sums(layer * within, *once) for layer in torch.cat([angles, ones])], dim=-1)
    return MeanAngles(*(total[..., :-1] / total[..., -1:]))


def bootstrap_means(
    angles: Angles,
    topics: Int[Tensor, " prompt"],
    n: int,
    paired: bool,
    samples: int,
    generator: torch.Generator,
) -> MeanAngles:
    """Mean angles of prompts, or of whole topics, drawn with replacement."""
    of_n, of_m = topics[:n], topics[n:] - topics[n]
    counts_n = pairable_counts(samples, len(of_n.unique()), generator)
    counts_m = counts_n if paired else pairable_counts(samples, len(of_m.unique()), generator)
    w_n, w_m = pad(counts_n[:, of_n], (0, len(of_m))), pad(counts_m[:, of_m], (n, 0))
    prompts = prompt_numbers(n, len(of_m), paired)
    within = (topics[:, None] == topics[None]) & (prompts[:, None] != prompts[None])
    return weighted_means(angles, w_n, w_m, topics, within if within.any() else None)


def mirrored_means(
    normal: Float[Tensor, "normal layer d_model"],
    malicious: Float[Tensor, "malicious layer d_model"],
    paired: bool,
    draws: int,
    generator: torch.Generator,
) -> MeanAngles:
    """Mean angles where both sets have one mean direction, and each prompt is reflected through its centre or is not.

    1. of unit vectors u: the mean of each set, turned to the mean d of the two mean directions: c = |mean| d;
    2. r = (u - mean) sqrt(n / (n - 1)), for residuals from an estimated mean are too short;
    3. a draw takes c + r or c - r of each prompt; a contrastive pair is reflected together.
    """
    n, m = len(normal), len(malicious)
    units = [_unit(normal), _unit(malicious)]
    shared = _unit(torch.stack([_unit(unit.mean(0)) for unit in units]).sum(0))
    images = torch.cat([_mirror_images(unit, shared) for unit in units])
    signs_n = torch.randint(2, (draws, n), generator=generator).double()
    signs_m = signs_n if paired else torch.randint(2, (draws, m), generator=generator).double()
    w_n = pad(torch.cat([signs_n, 1 - signs_n], 1), (0, 2 * m))
    w_m = pad(torch.cat([signs_m, 1 - signs_m], 1), (2 * n, 0))
    numbers = prompt_numbers(n, m, paired)
    return weighted_means(_angles(images), w_n, w_m, torch.cat([numbers[:n].repeat(2), numbers[n:].repeat(2)]))


def _mirror_images(
    unit: Float[Tensor, "prompt layer d_model"], shared: Float[Tensor, "layer d_model"]
) -> Float[Tensor, "image layer d_model"]:
    mean, n = unit.mean(0), len(unit)
    centre = mean.norm(dim=-1, keepdim=True) * shared
    residuals = (unit - mean) * (n / (n - 1)) ** 0.5
    return torch.cat([centre + residuals, centre - residuals])


def pairable_counts(samples: int, n: int, generator: torch.Generator) -> Float[Tensor, "sample prompt"]:
    """How often each prompt is drawn; a draw of one prompt only has no pair of different ones and is drawn again."""
    counts = resampled_counts(samples, n, generator)
    while (alone := (counts == n).any(dim=1)).any():
        counts[alone] = resampled_counts(int(alone.sum()), n, generator)
    return counts


def permuted_labels(
    n: int, m: int, paired: bool, permutations: int, generator: torch.Generator
) -> Float[Tensor, "sample prompt"]:
    """1 where a prompt is called normal: n of n + m at random, or one of each contrastive pair."""
    if paired:
        first = torch.randint(2, (permutations, n), generator=generator).double()
        return torch.cat([first, 1.0 - first], dim=1)
    order = torch.rand(permutations, n + m, generator=generator).argsort(dim=1)
    return (order < n).double()


def prompt_numbers(n: int, m: int, paired: bool) -> Int[Tensor, " prompt"]:
    return torch.arange(n).repeat(2) if paired else torch.arange(n + m)
