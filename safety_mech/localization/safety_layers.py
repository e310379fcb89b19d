"""Localisation (paper §3.4, A.3.4): initial range, alpha, progressive search, and what makes its answer one.

The search is in search.py, the rules for alpha in alpha.py.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer

from safety_mech.divergence.angles import GapCurve, gap_curve
from safety_mech.divergence.onset import initial_range
from safety_mech.divergence.residuals import last_token_residuals
from safety_mech.interventions.scaling import check_alpha
from safety_mech.layers import LayerRange
from safety_mech.localization.alpha import (
    ALPHAS_ABOVE,
    ALPHAS_BELOW,
    PAPER_SPREAD,
    AlphaChoice,
    Rule,
    choose_alpha,
    measure_alpha,
)
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.localization.search import (
    Direction,
    SearchResult,
    grid_best,
    mean_of,
    progressive_search,
    resampled_search,
)
from safety_mech.models.chat import Template
from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.log_odds import phrases_in_use, refusal_log_odds
from safety_mech.stats import Estimate, mean_estimate

LEAST_REFUSED = 0.1
"""A model that begins its answers to malicious prompts with a refusal less often than this has no safety to locate."""
LEAST_EFFECT = 0.1
"""Share of the over-rejection prompts: a range that changes refusals by less is no answer, however significant."""
MAX_P = 0.01
"""Of the spread between ranges; small, for alpha and range were both chosen on these prompts."""


@dataclass(frozen=True)
class SafetyLayers:
    """What `locate` found. `range` is None where there is nothing to find, and `reason` says why: no gap, too few
    refusals, no spread between ranges beyond noise, or no effect that a reader would see. `sweeps` and `samples` then
    still say what the search would have answered.

    `refused`: mean probability that a malicious prompt is answered with a refusal. `baseline`: refusal of every
    over-rejection prompt, unscaled (a probability; 0 or 1 in text). `effect`: mean refusal with the search's range
    scaled minus unscaled, with its interval over the prompts that range and alpha were chosen on.
    `samples` counts the search's answer over bootstrap samples; `best_of_grid` is the best range of any width.
    """

    curve: GapCurve
    reason: str
    range: LayerRange | None = None
    initial: LayerRange | None = None
    alpha: AlphaChoice | None = None
    sweeps: SearchResult | None = None
    samples: Counter[LayerRange] = field(default_factory=Counter)
    baseline: Float[Tensor, " prompt"] | None = None
    effect: Estimate | None = None
    grid: Float[Tensor, "start end prompt"] | None = None
    phrases: tuple[str, ...] = ()
    refused: float | None = None

    @property
    def best_of_grid(self) -> LayerRange | None:
        if self.grid is None or self.alpha is None:
            return None
        return grid_best(self.grid, direction_of(self.alpha.alpha))

    @property
    def is_best_of_grid(self) -> bool | None:
        return None if self.best_of_grid is None else self.best_of_grid == self.range

    def interval(self, level: float = 0.9) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Bootstrap intervals of start and end, as ((low, high), (low, high)); None without samples."""
        if not self.samples:
            return None
        draws = torch.tensor([[r.start, r.end] for r in self.samples.elements()]).double()
        tail = (1 - level) / 2
        bounds = torch.tensor([tail, 1 - tail], dtype=torch.float64)
        starts, ends = torch.quantile(draws, bounds, dim=0, interpolation="nearest").int().T.tolist()
        return tuple(starts), tuple(ends)


def locate_by_scaling(
    model: HookedTransformer,
    normal: Sequence[str],
    malicious: Sequence[str],
    over_rejection: Sequence[str],
    *,
    alpha: float | str = "auto",
    above: bool = True,
    recipe: str = "attn_out",
    template: str | Template = "own",
    text: bool = False,
    window: int = 4,
    whole_grid: bool = False,
    curve: GapCurve | None = None,
    initial: LayerRange | None = None,
    phrases: Sequence[str] | None = None,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 200,
    least_refused: float = LEAST_REFUSED,
    least_effect: float = LEAST_EFFECT,
    seed: int = 0,
    progress: bool = False,
) -> SafetyLayers:
    """Locate the safety layers of a model as the paper does; docs/method.md#evidence says when `range` is None.

    1. gap curve of `normal` and `malicious` (or `curve`, if it is measured already) -> initial range (or `initial`);
    2. baseline: refusal of the `over_rejection` prompts, unscaled;
    3. at every alpha above 1 (`above`; else below) the progressive search over `window` layers to both sides; one
       alpha by the rule "auto" or "paper" (alpha.py); or only at the `alpha` given, a number;
    4. the search at that alpha again on bootstrap samples of the prompts;
    5. `whole_grid`: every range, for comparison.

    `text`: measure refusals in generated text (the paper's R_o) instead of refusal probability.
    `phrases`: of refusals, for the probability; default those of REFUSAL_PHRASES that the model uses on the
    malicious prompts. `clusters`: a label for every over-rejection prompt; those that share one (a word) are resampled
    together. `least_refused`: share of malicious prompts that a model must refuse for a range to be an answer; 0: any.
    `least_effect`: by what share of the prompts a range must change refusals.
    Raises ValueError for alpha = 1, which changes nothing, and for an alpha that is no number and no rule.
    """
    rule, alphas = _alphas(alpha, above)
    if curve is None:
        sets = (normal, malicious)
        residuals = [last_token_residuals(model, prompts, template, progress=progress) for prompts in sets]
        curve = gap_curve(residuals[0], residuals[1], seed=seed)
    initial = initial or initial_range(curve)
    if initial is None:
        return SafetyLayers(curve, "no gap between malicious and normal prompts that the rule accepts")
    phrases = tuple(phrases) if phrases is not None else phrases_in_use(model, malicious, template)
    refused = float(refusal_log_odds(model, malicious, template, phrases).sigmoid().mean())
    direction = direction_of(alphas[0])
    search = partial(
        progressive_search, initial=initial, n_layers=model.cfg.n_layers, window=window, direction=direction
    )
    scaled_at = {at: ScaledRanges(model, over_rejection, at, recipe, template, phrases) for at in alphas}
    # Resampling asks for a cell hundreds of times: without the cache, a text would be judged anew each time.
    refusal_at = {at: cache(partial(ranges.refusal, text=text)) for at, ranges in scaled_at.items()}
    points = []
    for at in tqdm(alphas, desc="alpha", unit="alpha", disable=not progress or len(alphas) == 1):
        degenerate = partial(_degenerate_share, scaled_at[at])
        points.append(measure_alpha(at, refusal_at[at], degenerate, search, clusters, seed))
        scaled_at[at].release()
    choice = choose_alpha(points, rule)
    refusal = refusal_at[choice.alpha]
    baseline = refusal(None)
    answer = partial(
        SafetyLayers, curve, initial=initial, alpha=choice, baseline=baseline, phrases=phrases, refused=refused
    )
    if choice.point.range is None:
        return answer(f"the scaled model's logits are not finite at alpha {choice.alpha}: take one nearer to 1")
    found = search(mean_of(refusal))
    effect = mean_estimate((refusal(found.range) - baseline).tolist(), clusters, seed=seed)
    reason = _nothing_found(refused, least_refused, choice, effect, least_effect)
    return answer(
        reason or "found",
        range=found.range if reason is None else None,
        sweeps=found,
        samples=resampled_search(search, refusal, len(baseline), clusters, samples, seed),
        effect=effect,
        grid=scaled_at[choice.alpha].grid(progress, text) if whole_grid else None,
    )


def _degenerate_share(ranges: ScaledRanges, layers: LayerRange) -> float:
    """Share of the prompts whose answer is degenerate with `layers` scaled."""
    answers = ranges.answers(layers, whole=True)
    return sum(map(is_degenerate, answers)) / len(answers)


def direction_of(alpha: float) -> Direction:
    return "max" if alpha > 1 else "min"


def _alphas(alpha: float | str, above: bool) -> tuple[Rule | None, tuple[float, ...]]:
    """The rule, if it is one, and the alphas to measure; ValueError for an alpha that cannot be searched at."""
    if isinstance(alpha, str):
        if alpha not in get_args(Rule):
            raise ValueError(f"alpha {alpha!r}: expected a number, or one of the rules {', '.join(get_args(Rule))}")
        return cast(Rule, alpha), ALPHAS_ABOVE if above else ALPHAS_BELOW
    check_alpha(alpha)
    if alpha == 1:
        raise ValueError("alpha = 1 changes nothing: expected a number above or below, or the rule auto or paper")
    return None, (float(alpha),)


def _nothing_found(
    refused: float, least_refused: float, choice: AlphaChoice, effect: Estimate, least_effect: float
) -> str | None:
    """Why the search's answer is no range of safety layers; None where it is one."""
    point = choice.point
    if refused < least_refused:
        return (
            f"the model refuses {refused:.1%} of the malicious prompts (asked: {least_refused:.0%}): nothing to locate"
        )
    if not choice.reached:
        return {
            "auto": "answers are degenerate at every alpha tried: nothing to locate",
            "paper": f"no alpha tried moves refusals by {PAPER_SPREAD:.1%} (standard deviation over the lower sweep)",
        }.get(choice.rule, "the measure is not finite")
    if point.p_value > MAX_P:
        return (
            f"ranges do not differ beyond noise at alpha {choice.alpha} (spread {point.spread:.1%} of the prompts, "
            f"p = {point.p_value:.3f})"
        )
    sign = 1 if direction_of(choice.alpha) == "max" else -1
    low, size = min(sign * effect.low, sign * effect.high), sign * effect.value
    if not (low > 0 and size >= least_effect):
        moved = f"{effect.value:+.1%} [{effect.low:+.1%}, {effect.high:+.1%}]"
        return (
            f"the best range, {point.range}, changes refusals by {moved} at alpha {choice.alpha}: an effect to be seen "
            f"would be {sign * least_effect:+.0%} or more"
        )
    return None
