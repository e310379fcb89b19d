"""Localisation (paper §3.4, A.3.4): initial range, alpha, progressive search, and what makes its answer one.

Everything is measured in refusals: the mean refusal probability of the over-rejection prompts, or their refusals in
text (the paper's R_o). The search is in search.py, the rules for alpha in alpha.py.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
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
    given_alpha,
    measure_alpha,
    search_at,
)
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.localization.search import Direction, Sweep, grid_best, resampled_search
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
    scaled minus unscaled, with its 95 % interval over prompts (on the prompts that range and alpha were chosen on).
    `samples` counts the search's answer over bootstrap samples; `best_of_grid` (if the grid was run) is the best range
    of all, of any width.
    """

    range: LayerRange | None
    initial: LayerRange | None
    curve: GapCurve
    alpha: AlphaChoice | None
    sweeps: tuple[Sweep, Sweep] | None
    samples: Counter[LayerRange]
    baseline: Float[Tensor, " prompt"] | None
    effect: Estimate | None
    grid: Float[Tensor, "start end prompt"] | None
    best_of_grid: LayerRange | None
    phrases: tuple[str, ...]
    refused: float | None
    reason: str

    @property
    def is_best_of_grid(self) -> bool | None:
        return None if self.best_of_grid is None else self.best_of_grid == self.range

    def interval(self, level: float = 0.9) -> tuple[tuple[int, int], tuple[int, int]] | None:
        """Bootstrap intervals of start and end, as ((low, high), (low, high)); None without samples."""
        if not self.samples:
            return None
        draws = torch.tensor([[r.start, r.end] for r in self.samples.elements()]).double()
        tail = (1 - level) / 2
        low, high = (torch.quantile(draws, q, dim=0, interpolation="nearest") for q in (tail, 1 - tail))
        return (int(low[0]), int(high[0])), (int(low[1]), int(high[1]))


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
    """Locate the safety layers of a model as the paper does. `sm.locate` is this, and more methods (locators.py).

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
    Scaling some layers moves something in every model, also in one that was never aligned. Where the model does not
    refuse, or there is no gap, or ranges do not differ beyond noise, or no effect is to be seen, `range` is None.
    Raises ValueError for alpha = 1, which changes nothing, and for an alpha that is no number and no rule.
    """
    rule, alphas = _alphas(alpha, above)
    if curve is None:
        sets = (normal, malicious)
        residuals = [last_token_residuals(model, prompts, template, progress=progress) for prompts in sets]
        curve = gap_curve(residuals[0], residuals[1], seed=seed)
    initial = initial or initial_range(curve)
    if initial is None:
        reason = "no gap between malicious and normal prompts that the rule accepts"
        return SafetyLayers(None, None, curve, None, None, Counter(), None, None, None, None, (), None, reason)
    phrases = tuple(phrases) if phrases is not None else phrases_in_use(model, malicious, template)
    refused = float(refusal_log_odds(model, malicious, template, phrases).sigmoid().mean())
    direction = direction_of(alphas[0])
    search = search_at(initial, n_layers=model.cfg.n_layers, window=window, direction=direction)
    scaled_at = {
        at: _ScaledAt(ScaledRanges(model, over_rejection, at, recipe, template, phrases), text) for at in alphas
    }
    points = []
    for at in tqdm(alphas, desc="alpha", unit="alpha", disable=not progress or len(alphas) == 1):
        points.append(measure_alpha(at, scaled_at[at].refusal, scaled_at[at].degenerate, search, clusters, seed))
        scaled_at[at].release()
    choice = choose_alpha(points, rule) if rule else given_alpha(points[0])
    chosen = scaled_at[choice.alpha]
    baseline = chosen.refusal(None)
    if choice.point.range is None:
        reason = f"the scaled model's logits are not finite at alpha {choice.alpha}: take one nearer to 1"
        return SafetyLayers(
            None, initial, curve, choice, None, Counter(), baseline, None, None, None, phrases, refused, reason
        )
    found = search(chosen.refusal)
    counted = resampled_search(
        chosen.refusal,
        initial,
        n_layers=model.cfg.n_layers,
        window=window,
        direction=direction,
        clusters=clusters,
        samples=samples,
        seed=seed,
    )
    effect = mean_estimate((chosen.refusal(found.range) - baseline).tolist(), clusters, seed=seed)
    grid = chosen.ranges.grid(progress, text) if whole_grid else None
    reason = _nothing_found(refused, least_refused, choice, effect, least_effect)
    return SafetyLayers(
        found.range if reason is None else None,
        initial,
        curve,
        choice,
        (found.upper, found.lower),
        counted,
        baseline,
        effect,
        grid,
        grid_best(grid, direction) if grid is not None else None,
        phrases,
        refused,
        reason or "found",
    )


@dataclass
class _ScaledAt:
    """Refusals with ranges scaled by one alpha. Every cell is measured once and cached; `release` frees what the engine
    holds besides, its states."""

    ranges: ScaledRanges
    text: bool
    cells: dict[LayerRange | None, Float[Tensor, " prompt"]] = field(default_factory=dict)

    def refusal(self, layers: LayerRange | None) -> Float[Tensor, " prompt"]:
        """Of every prompt: its probability; in text 0 or 1. float64."""
        if layers not in self.cells:
            measure = self.ranges.refuses if self.text else self.ranges.probability
            self.cells[layers] = measure(layers).double()
        return self.cells[layers]

    def degenerate(self, layers: LayerRange) -> float:
        """Share of the prompts whose answer is degenerate."""
        answers = self.ranges.answers(layers, whole=True)
        return sum(map(is_degenerate, answers)) / len(answers)

    def release(self) -> None:
        self.ranges.release()


def direction_of(alpha: float) -> Direction:
    return "max" if alpha > 1 else "min"


def check_search_alpha(alpha: float | str) -> None:
    """Raise ValueError for an alpha that `locate` cannot search at."""
    if isinstance(alpha, str):
        if alpha not in get_args(Rule):
            raise ValueError(f"alpha {alpha!r}: expected a number, or one of the rules {', '.join(get_args(Rule))}")
        return
    check_alpha(alpha)
    if alpha == 1:
        raise ValueError("alpha = 1 changes nothing: expected a number above or below, or the rule auto or paper")


def _alphas(alpha: float | str, above: bool) -> tuple[Rule | None, tuple[float, ...]]:
    """The rule, if it is one, and the alphas to measure."""
    check_search_alpha(alpha)
    if isinstance(alpha, str):
        return cast(Rule, alpha), ALPHAS_ABOVE if above else ALPHAS_BELOW
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
