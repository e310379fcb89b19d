"""How far malicious prompts part from normal ones, layer by layer (paper §3.2, §3.3): pure tensor maths.

    angle(x, y) = arccos of the cosine of two last-token residual streams, in degrees
    gap_k       = mean angle of normal-malicious pairs - mean angle of normal-normal pairs, at layer k

All pairs are used by default, for they cost one matrix product; `r` and `seed` sample pairs as the paper does
(r = 500 of each kind). Angles are computed in float64: near 0 degrees the cosine is 1 - angle^2 / 2, and
float32 would lose the angle.

Uncertainty is over PROMPTS, not over pairs: pairs share prompts, so the pairs' own spread would give intervals
many times too narrow.

- Bootstrap: prompts are drawn with replacement, as multinomial weights w. A pair of two copies of one prompt has
  angle 0 and says nothing about pairs of different prompts; it is left out: mean_NN = w'Aw / (1 - sum w_i^2).
- Permutation test of "no gap": labels are exchanged over all prompts, or, for matched twins, within each pair;
  p = (1 + number of permuted gaps >= observed) / (1 + permutations), one-sided. `p_any` corrects for looking at
  all layers, by the largest studentised gap of each permutation.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from safety_mech.agreement import resampled_counts

Angles = Float[Tensor, "layer prompt prompt"]


@dataclass(frozen=True)
class PairStats:
    """Mean and standard deviation over pairs, per layer, of cosine and angle (degrees)."""

    cosine_mean: Float[Tensor, " layer"]
    cosine_std: Float[Tensor, " layer"]
    angle_mean: Float[Tensor, " layer"]
    angle_std: Float[Tensor, " layer"]
    n_pairs: int


@dataclass(frozen=True)
class GapCurve:
    """The layer-wise gap between normal-malicious and normal-normal pairs, in degrees, with its uncertainty.

    `low`, `high`: bounds of the bootstrap interval at `level`. `samples`: the bootstrap's own curves.
    `p_values`: one-sided permutation test at each layer; `p_any`: that any layer has a gap, corrected for the
    number of layers. `null`: the permutations' gaps. Curves of the same prompts and seed have the same draws, so
    that two models can be compared draw by draw (`gap_difference`).
    """

    normal_normal: PairStats
    malicious_malicious: PairStats
    normal_malicious: PairStats
    gap: Float[Tensor, " layer"]
    low: Float[Tensor, " layer"]
    high: Float[Tensor, " layer"]
    p_values: Float[Tensor, " layer"]
    p_any: float
    samples: Float[Tensor, "sample layer"]
    null: Float[Tensor, "permutation layer"]
    level: float
    seed: int

    @property
    def n_layers(self) -> int:
        return len(self.gap)


def gap_curve(
    normal: Float[Tensor, "normal layer d_model"],
    malicious: Float[Tensor, "malicious layer d_model"],
    *,
    paired: bool = False,
    r: int | None = None,
    bootstrap: int = 1000,
    permutations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> GapCurve:
    """Cosines, angles and gap of every layer, with a bootstrap interval and a permutation test over prompts.

    `paired`: row i of both sets are twins (METHOD 7). A prompt is never compared with its own twin, twins are
    resampled together, and labels are exchanged within twins.
    `r`: sample r pairs of each kind as the paper did (interval and p-values still come from all pairs).
    Raises ValueError for fewer than three prompts a set, unequal twins, or a residual stream of zero length.
    """
    _check_sets(normal, malicious, paired)
    if min(bootstrap, permutations) < 1 or not 0 < level < 1 or (r is not None and r < 2):
        raise ValueError(
            "expected bootstrap and permutations of at least 1, a level inside (0, 1), and r of at least 2"
        )
    generator = torch.Generator().manual_seed(seed)
    angles = angle_matrix(torch.cat([normal, malicious]))
    n, m = len(normal), len(malicious)
    is_normal = torch.arange(n + m) < n
    own_twin = torch.eye(n, dtype=torch.bool) if paired else torch.zeros(n, m, dtype=torch.bool)
    stats = _pair_stats(angles, n, own_twin, r, generator)
    samples = _bootstrap_gaps(angles, n, paired, bootstrap, generator)
    low, high = _interval(samples, level)
    gap = stats[2].angle_mean - stats[0].angle_mean
    observed = labelled_gaps(angles, is_normal[None].double(), paired)[0]
    null = labelled_gaps(angles, _permuted_labels(n, m, paired, permutations, generator), paired)
    p_values, p_any = _p_values(observed, null)
    return GapCurve(stats[0], stats[1], stats[2], gap, low, high, p_values, p_any, samples, null, level, seed)


@dataclass(frozen=True)
class GapDifference:
    """How much larger one model's gap is than another's, in degrees, on the same prompts; `samples`: by bootstrap."""

    gap: Float[Tensor, " layer"]
    low: Float[Tensor, " layer"]
    high: Float[Tensor, " layer"]
    p_values: Float[Tensor, " layer"]
    p_any: float
    samples: Float[Tensor, "sample layer"] = field(repr=False)


def gap_difference(after: GapCurve, before: GapCurve) -> GapDifference:
    """The gap of `after` minus that of `before`, with interval and one-sided p-values ("no larger gap").

    Both curves must come from the same prompts, in the same order, with the same seed: then every bootstrap draw and
    every permutation is the same in both, and what the prompts have in common cancels.
    Raises ValueError for curves of different shapes or seeds.
    """
    if after.samples.shape != before.samples.shape or after.null.shape != before.null.shape:
        raise ValueError("gap curves of different numbers of layers or draws: expected the same prompts and settings")
    if after.seed != before.seed:
        raise ValueError(f"gap curves with seeds {after.seed} and {before.seed}: expected the same")
    observed = after.gap - before.gap
    samples = after.samples - before.samples
    p_values, p_any = _p_values(observed, after.null - before.null)
    return GapDifference(observed, *_interval(samples, after.level), p_values, p_any, samples)


def _interval(
    samples: Float[Tensor, "sample layer"], level: float
) -> tuple[Float[Tensor, " layer"], Float[Tensor, " layer"]]:
    tail = (1 - level) / 2
    low, high = torch.quantile(samples, torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)
    return low, high


def _check_sets(normal: Tensor, malicious: Tensor, paired: bool) -> None:
    if min(len(normal), len(malicious)) < 3:
        raise ValueError(f"{len(normal)} normal and {len(malicious)} malicious prompts: expected at least 3 of each")
    if paired and len(normal) != len(malicious):
        raise ValueError(f"paired: {len(normal)} normal and {len(malicious)} malicious prompts are not twins")


def angle_matrix(residuals: Float[Tensor, "prompt layer d_model"]) -> Angles:
    """Angle in degrees between every two prompts at every layer, in float64; 0 on the diagonal.

    Raises ValueError (naming layer and prompt) for a residual stream that is not finite or has no length.
    """
    x = residuals.double().transpose(0, 1)
    norms = x.norm(dim=-1, keepdim=True)
    bad = (~(norms.isfinite() & (norms > 0))[..., 0]).nonzero()
    if len(bad):
        layer, prompt = bad[0].tolist()
        raise ValueError(
            f"residual stream of prompt {prompt} (normal prompts first, then malicious) at layer {layer} has no "
            "direction: it is zero or not finite"
        )
    unit = x / norms
    cosine = (unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)
    angles = torch.rad2deg(torch.arccos(cosine))
    angles.diagonal(dim1=1, dim2=2).zero_()
    return angles


def _pair_stats(
    angles: Angles,
    n: int,
    own_twin: Bool[Tensor, "normal malicious"],
    r: int | None,
    generator: torch.Generator,
) -> tuple[PairStats, PairStats, PairStats]:
    m = angles.shape[1] - n
    nn, mm = torch.triu_indices(n, n, 1), torch.triu_indices(m, m, 1) + n
    nm = (~own_twin).nonzero().T + torch.tensor([[0], [n]])
    return (
        _stats(angles, nn, r, generator),
        _stats(angles, mm, r, generator),
        _stats(angles, nm, r, generator),
    )


def _stats(angles: Angles, pairs: Int[Tensor, "2 pair"], r: int | None, generator: torch.Generator) -> PairStats:
    if r is not None:
        pairs = pairs[:, torch.randperm(pairs.shape[1], generator=generator)[:r]]
    values = angles[:, pairs[0], pairs[1]]
    cosine = torch.cos(torch.deg2rad(values))
    return PairStats(cosine.mean(1), cosine.std(1), values.mean(1), values.std(1), n_pairs=int(pairs.shape[1]))


def labelled_gaps(
    angles: Angles, normal_weight: Float[Tensor, "sample prompt"], paired: bool = False
) -> Float[Tensor, "sample layer"]:
    """Gaps for many labellings at once; `normal_weight` is 1 where a prompt counts as normal, else 0."""
    return _weighted_gaps(angles, normal_weight, 1.0 - normal_weight, paired)


def _weighted_gaps(
    angles: Angles, w_n: Float[Tensor, "sample prompt"], w_m: Float[Tensor, "sample prompt"], paired: bool
) -> Float[Tensor, "sample layer"]:
    """Weighted mean angle N-M minus N-N, without pairs of a prompt with itself, or (paired) with its own twin."""
    half = angles.shape[1] // 2

    def mean(left: Tensor, right: Tensor, same: bool) -> Float[Tensor, "sample layer"]:
        total = torch.stack([((left @ layer) * right).sum(1) for layer in angles], dim=1)
        pairs = left.sum(1) * right.sum(1)
        if same:
            pairs = pairs - (left * right).sum(1)  # the diagonal is 0 degrees: only its weight must go
        elif paired:
            twin = right.roll(half, 1)
            total = total - torch.stack([(left * twin) @ layer.diagonal(half).repeat(2) for layer in angles], 1)
            pairs = pairs - (left * twin).sum(1)
        return total / pairs[:, None]

    return mean(w_n, w_m, same=False) - mean(w_n, w_n, same=True)


def _bootstrap_gaps(
    angles: Angles, n: int, paired: bool, samples: int, generator: torch.Generator
) -> Float[Tensor, "sample layer"]:
    m = angles.shape[1] - n
    counts_n = _pairable_counts(samples, n, generator)
    counts_m = counts_n if paired else _pairable_counts(samples, m, generator)
    zeros_n, zeros_m = torch.zeros(samples, n).double(), torch.zeros(samples, m).double()
    return _weighted_gaps(angles, torch.cat([counts_n, zeros_m], 1), torch.cat([zeros_n, counts_m], 1), paired)


def _pairable_counts(samples: int, n: int, generator: torch.Generator) -> Float[Tensor, "sample prompt"]:
    """How often each prompt is drawn; a draw of one prompt only has no pair of different ones and is drawn again."""
    counts = resampled_counts(samples, n, generator)
    while (alone := (counts == n).any(dim=1)).any():
        counts[alone] = resampled_counts(int(alone.sum()), n, generator)
    return counts


def _permuted_labels(
    n: int, m: int, paired: bool, permutations: int, generator: torch.Generator
) -> Float[Tensor, "sample prompt"]:
    """1 where a prompt is called normal: n of n + m at random, or one of each two twins."""
    if paired:
        first = torch.randint(2, (permutations, n), generator=generator).double()
        return torch.cat([first, 1.0 - first], dim=1)
    order = torch.rand(permutations, n + m, generator=generator).argsort(dim=1)
    return (order < n).double()


def _p_values(
    observed: Float[Tensor, " layer"], null: Float[Tensor, "sample layer"]
) -> tuple[Float[Tensor, " layer"], float]:
    tolerance = 1e-9  # the observed labelling may be drawn again, up to rounding
    p_values = (1 + (null >= observed - tolerance).sum(0).double()) / (1 + len(null))
    centre, spread = null.mean(0), null.std(0).clamp_min(1e-12)
    largest = ((null - centre) / spread).max(dim=1).values
    p_any = (1 + int((largest >= ((observed - centre) / spread).max() - tolerance).sum())) / (1 + len(null))
    return p_values, float(p_any)
