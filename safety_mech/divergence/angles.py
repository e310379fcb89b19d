"""How far malicious prompts part from normal ones, layer by layer (paper §3.2, §3.3): tensor maths.

    angle(x, y)   = arccos of the cosine of two last-token residual streams, in degrees
    gap_k         = NM - NN: mean angle of normal-malicious pairs minus that of normal-normal pairs, at layer k
    symmetric_k   = NM - (NN + MM) / 2

docs/method.md#gap says what the two measure, how intervals and tests are made, and how they behave. Angles are
computed in float64: near 0 degrees the cosine is 1 - angle^2 / 2, and float32 would lose the angle.

In the bootstrap over topics, pairs within a topic count once for each of its copies; pairs between two copies of it are
left out.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safety_mech.divergence.resampling import (
    Angles,
    Statistic,
    angle_matrix,
    bootstrap_means,
    labelled_means,
    mirrored_means,
    permuted_labels,
    prompt_numbers,
)
from safety_mech.stats import group_numbers, percentiles

STATISTICS: tuple[Statistic, ...] = ("paper", "symmetric")
Unit = Literal["prompts", "topics"]


@dataclass(frozen=True)
class PairStats:
    """Mean and standard deviation over pairs, per layer, of cosine and angle (degrees)."""

    cosine_mean: Float[Tensor, " layer"]
    cosine_std: Float[Tensor, " layer"]
    angle_mean: Float[Tensor, " layer"]
    angle_std: Float[Tensor, " layer"]
    n_pairs: int


@dataclass(frozen=True)
class GapStatistic:
    """A statistic of the angles with its uncertainty, in degrees.

    `low`, `high`: bounds of the bootstrap interval. `samples`: the bootstrap's own curves. `p_values`: one-sided
    test at each layer; `p_any`: that any layer is above 0, corrected for their number. `null`: the test's draws.
    """

    gap: Float[Tensor, " layer"]
    low: Float[Tensor, " layer"]
    high: Float[Tensor, " layer"]
    p_values: Float[Tensor, " layer"]
    p_any: float
    samples: Float[Tensor, "sample layer"] = field(repr=False)
    null: Float[Tensor, "draw layer"] = field(repr=False)

    @property
    def n_layers(self) -> int:
        return len(self.gap)


@dataclass(frozen=True)
class SymmetricGap(GapStatistic):
    """NM - (NN + MM) / 2. `null` and the p-values: the mirror test of one place. `permuted`: the permutations' values,
    for the test of one distribution, which unequal spread fails too."""

    permuted: Float[Tensor, "draw layer"] = field(repr=False)

    @property
    def spread_alone(self) -> Float[Tensor, " layer"]:
        """What the two sets' spreads make of the statistic where their mean directions are the same."""
        return self.null.mean(0)

    @property
    def p_same_distribution(self) -> float:
        """Over all layers, by permutation: small for another place or another spread."""
        return _p_values(self.gap, self.permuted)[1]


@dataclass(frozen=True)
class GapCurve(GapStatistic):
    """The layer-wise gap between normal-malicious and normal-normal pairs, in degrees, with its uncertainty.

    Its own fields are those of the paper's gap, tested by permutation; `symmetric`: of NM - (NN + MM) / 2, from the
    same bootstrap draws and permutations. `resampled`: what the bootstrap draws; `n_resampled`: how many normal and
    malicious ones there are (of pairs: twice the same). Curves of the same prompts and seed have the same draws, so
    that two models can be compared draw by draw (`gap_difference`).
    """

    normal_normal: PairStats
    malicious_malicious: PairStats
    normal_malicious: PairStats
    symmetric: SymmetricGap
    level: float
    seed: int
    resampled: Unit
    n_resampled: tuple[int, int]
    r: int | None

    @property
    def sampled_gap(self) -> Float[Tensor, " layer"]:
        """NM - NN of the r sampled pairs of each kind, as the paper's figures show; without r the gap itself."""
        return self.normal_malicious.angle_mean - self.normal_normal.angle_mean


def gap_curve(
    normal: Float[Tensor, "normal layer d_model"],
    malicious: Float[Tensor, "malicious layer d_model"],
    *,
    paired: bool = False,
    normal_clusters: Sequence[Hashable] | None = None,
    malicious_clusters: Sequence[Hashable] | None = None,
    r: int | None = None,
    bootstrap: int = 1000,
    permutations: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> GapCurve:
    """Cosines, angles, gap and symmetric gap of every layer, with bootstrap intervals and tests over prompts.

    `paired`: row i of both sets is a contrastive pair. Its two prompts are never compared with each other, they are
    resampled together, and labels are exchanged within the pair.
    `normal_clusters`, `malicious_clusters`: the topic of each prompt; the bootstrap then draws whole topics. Both or
    none; normal and malicious topics are drawn apart, except for contrastive pairs, whose topics must be the same.
    `r`: cosines and angles from r sampled pairs of each kind, as in the paper. Gap, interval and p-values are of all
    pairs; `GapCurve.sampled_gap` is that of the sampled ones.
    Raises ValueError for fewer than three prompts or topics a set, unequal pairs, or a residual stream of zero length.
    """
    if min(len(normal), len(malicious)) < 3:
        raise ValueError(f"{len(normal)} normal and {len(malicious)} malicious prompts: expected at least 3 of each")
    if paired:
        check_pairs(normal, malicious)
    if min(bootstrap, permutations) < 1 or not 0 < level < 1 or (r is not None and r < 2):
        raise ValueError(
            "expected bootstrap and permutations of at least 1, a level inside (0, 1), and r of at least 2"
        )
    n, m = len(normal), len(malicious)
    topics = _topic_numbers(n, m, normal_clusters, malicious_clusters, paired)
    angles = angle_matrix(torch.cat([normal, malicious]))
    generator = torch.Generator().manual_seed(seed)
    stats = [_pair_stats(angles, pairs, r, generator) for pairs in _kinds_of_pairs(n, m, paired)]
    generator.manual_seed(seed)
    drawn = bootstrap_means(angles, topics, n, paired, bootstrap, generator)
    observed = labelled_means(angles, (torch.arange(n + m) < n)[None].double(), paired)
    permuted = labelled_means(angles, permuted_labels(n, m, paired, permutations, generator), paired)
    mirrored = mirrored_means(normal, malicious, paired, permutations, generator)
    paper = _tested(observed.paper, drawn.paper, permuted.paper, level)
    symmetric = _tested(observed.symmetric, drawn.symmetric, mirrored.symmetric, level)
    return GapCurve(
        **vars(paper),
        normal_normal=stats[0],
        malicious_malicious=stats[1],
        normal_malicious=stats[2],
        symmetric=SymmetricGap(**vars(symmetric), permuted=permuted.symmetric),
        level=level,
        seed=seed,
        resampled="prompts" if normal_clusters is None else "topics",
        n_resampled=(len(topics[:n].unique()), len(topics[n:].unique())),
        r=r,
    )


@dataclass(frozen=True)
class GapDifference(GapStatistic):
    """How much larger one model's gap is than another's, in degrees, on the same prompts; `symmetric`: the same of the
    symmetric statistic."""

    symmetric: SymmetricGap


def gap_difference(after: GapCurve, before: GapCurve) -> GapDifference:
    """The gap of `after` minus that of `before`, with interval and one-sided p-values ("no larger gap").

    Both curves must come from the same prompts, in the same order, with the same seed: then every bootstrap draw,
    every permutation and every reflection is the same in both, and what the prompts have in common cancels.
    Raises ValueError for curves of different shapes or seeds, or that resample other units.
    """
    if after.samples.shape != before.samples.shape or after.null.shape != before.null.shape:
        raise ValueError("gap curves of different numbers of layers or draws: expected the same prompts and settings")
    if after.seed != before.seed:
        raise ValueError(f"gap curves with seeds {after.seed} and {before.seed}: expected the same")
    if (after.resampled, after.n_resampled) != (before.resampled, before.n_resampled):
        raise ValueError(
            f"gap curves resampled over {after.n_resampled} {after.resampled} and {before.n_resampled} "
            f"{before.resampled}: expected the same"
        )
    new, old = after.symmetric, before.symmetric
    symmetric = SymmetricGap(**vars(_difference(new, old, after.level)), permuted=new.permuted - old.permuted)
    return GapDifference(**vars(_difference(after, before, after.level)), symmetric=symmetric)


def chosen(curve: GapCurve | GapDifference, statistic: Statistic) -> GapStatistic:
    """The paper's gap, or the symmetric one; raises ValueError for another name."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic {statistic!r}: expected paper or symmetric")
    return curve.symmetric if statistic == "symmetric" else curve


def _difference(after: GapStatistic, before: GapStatistic, level: float) -> GapStatistic:
    samples, null = after.samples - before.samples, after.null - before.null
    return _tested(after.gap - before.gap, samples, null, level)


def _tested(
    gap: Float[Tensor, "*one layer"],
    samples: Float[Tensor, "sample layer"],
    null: Float[Tensor, "draw layer"],
    level: float,
) -> GapStatistic:
    gap = gap.reshape(samples.shape[1])
    return GapStatistic(gap, *percentiles(samples, level), *_p_values(gap, null), samples, null)


def check_pairs(normal: Tensor, malicious: Tensor) -> None:
    """Raise ValueError for sets of unequal size."""
    if len(normal) != len(malicious):
        raise ValueError(
            f"paired: {len(normal)} normal and {len(malicious)} malicious prompts are not contrastive pairs"
        )


def _topic_numbers(
    n: int,
    m: int,
    normal: Sequence[Hashable] | None,
    malicious: Sequence[Hashable] | None,
    paired: bool,
) -> Int[Tensor, " prompt"]:
    """What the bootstrap draws, numbered 0, 1, ...: of normal prompts, then malicious ones. A pair has one number."""
    if normal is None and malicious is None:
        return prompt_numbers(n, m, paired)
    if normal is None or malicious is None:
        raise ValueError("topics of one set only: expected normal_clusters and malicious_clusters, or none")
    if (len(normal), len(malicious)) != (n, m):
        raise ValueError(f"topics of {len(normal)} normal and {len(malicious)} malicious prompts: expected {n} and {m}")
    if paired and list(normal) != list(malicious):
        raise ValueError("paired: expected contrastive pairs to have the same topic")
    of_n, of_m = (torch.tensor(group_numbers(len(clusters), clusters)) for clusters in (normal, malicious))
    topics_n, topics_m = len(of_n.unique()), len(of_m.unique())
    if min(topics_n, topics_m) < 3:
        raise ValueError(f"{topics_n} normal and {topics_m} malicious topics: expected at least 3 of each")
    return torch.cat([of_n, of_m if paired else of_m + topics_n])


def _kinds_of_pairs(n: int, m: int, paired: bool) -> tuple[Int[Tensor, "2 pair"], ...]:
    """Rows and columns of normal-normal, malicious-malicious and normal-malicious pairs, without contrastive ones."""
    across = torch.cartesian_prod(torch.arange(n), torch.arange(m)).T
    if paired:
        across = across[:, across[0] != across[1]]
    return torch.triu_indices(n, n, 1), torch.triu_indices(m, m, 1) + n, across + torch.tensor([[0], [n]])


def _pair_stats(angles: Angles, pairs: Int[Tensor, "2 _"], r: int | None, generator: torch.Generator) -> PairStats:
    if r is not None:
        pairs = pairs[:, torch.randperm(pairs.shape[1], generator=generator)[:r]]
    values = angles[:, pairs[0], pairs[1]]
    cosine = torch.cos(torch.deg2rad(values))
    return PairStats(cosine.mean(1), cosine.std(1), values.mean(1), values.std(1), n_pairs=int(pairs.shape[1]))


def _p_values(
    observed: Float[Tensor, " layer"], null: Float[Tensor, "sample layer"]
) -> tuple[Float[Tensor, " layer"], float]:
    tolerance = 1e-9  # the observed labelling may be drawn again, up to rounding
    p_values = (1 + (null >= observed - tolerance).sum(0).double()) / (1 + len(null))
    centre, spread = null.mean(0), null.std(0).clamp_min(1e-12)
    largest = ((null - centre) / spread).max(dim=1).values
    p_any = (1 + int((largest >= ((observed - centre) / spread).max() - tolerance).sum())) / (1 + len(null))
    return p_values, float(p_any)
