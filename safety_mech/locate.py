"""Localisation (paper §3.4, A.3.4): alpha, the progressive search, the whole grid, and how sure the answer is.

`progressive_search` is the paper's; it sees two lines of the (i, j) grid. `grid_best` looks at all of it.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.chat import Template
from safety_mech.divergence import GapCurve, gap_curve
from safety_mech.layers import LayerRange
from safety_mech.onset import initial_range
from safety_mech.overrejection import ScaledRanges
from safety_mech.refusal import REFUSAL_OPENINGS, openings_in_use, refusal_log_odds
from safety_mech.residuals import last_token_residuals

Direction = Literal["max", "min"]
Measure = Callable[[LayerRange], float]

ALPHA_STEP = 0.05
MAX_ALPHA_STEPS = 10
"""The paper starts at 1 and moves in steps of 0.05; past 1.5 (or 0.5) models babble."""
TARGET_STD = 0.025
"""Stop at the first alpha whose R_o has this standard deviation over the lower sweep: 15-20 of 721 prompts."""
TARGET_SNR = 3.0
"""The same for log-odds, which have no natural unit: spread over the sweep / bootstrap standard error of a cell."""
LEAST_REFUSED = 0.1
"""A model that opens its answers to malicious prompts with a refusal less often than this has no safety to locate."""


@dataclass(frozen=True)
class Sweep:
    """One line of the grid: the ranges tried and what the measure said; `best` is the arg max (or min)."""

    bound: Literal["upper", "lower"]
    ranges: tuple[LayerRange, ...]
    values: tuple[float, ...]
    best: LayerRange


@dataclass(frozen=True)
class SearchResult:
    range: LayerRange
    upper: Sweep
    lower: Sweep


@dataclass(frozen=True)
class AlphaChoice:
    """`alpha`, and what every alpha tried gave: spread over the lower sweep, in `unit`."""

    alpha: float
    reached: bool
    tried: tuple[tuple[float, float], ...]
    unit: str


@dataclass(frozen=True)
class SafetyLayers:
    """What `locate` found. `range` is None where there is nothing to find: no gap, no refusals, or no effect beyond
    noise; `sweeps` and `samples` then still say what the search would have answered.

    `refused`: mean probability that a malicious prompt is answered with one of the openings. `samples` counts the
    search's answer over bootstrap samples of prompts; `best_of_grid` (if the grid was run) is the best range of all,
    and `is_best_of_grid` says whether the search found it.
    """

    range: LayerRange | None
    initial: LayerRange | None
    curve: GapCurve
    alpha: AlphaChoice | None
    sweeps: tuple[Sweep, Sweep] | None
    samples: Counter[LayerRange]
    baseline: Float[Tensor, " prompt"] | None
    grid: Float[Tensor, "start end prompt"] | None
    best_of_grid: LayerRange | None
    openings: tuple[str, ...]
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


def progressive_search(
    measure: Measure, initial: LayerRange, *, n_layers: int, window: int = 2, direction: Direction = "max"
) -> SearchResult:
    """The paper's search: hold the start and sweep the end, take the best; then hold that end and sweep the start.

    A sweep evaluates the whole window to both sides, for the curves are not unimodal (Llama-3 in the paper's table):
    no hill-climbing. A best value on the window's very edge says that the window was too small: it is then widened
    to that side by `window` more, as the paper's lower sweeps must have been (Llama-2: from 9 down to 4).
    Ties go to the range nearest to the one that was held. `direction`: "max" for alpha > 1, "min" for alpha < 1.
    Raises ValueError for a range outside the model, a window below 1, or an unknown direction.
    """
    if direction not in ("max", "min"):
        raise ValueError(f"direction {direction!r}: expected 'max' (alpha > 1) or 'min' (alpha < 1)")
    if window < 1:
        raise ValueError(f"window {window}: expected at least one layer to each side")
    initial.check_inside(n_layers)
    sign = 1.0 if direction == "max" else -1.0
    ends = _best_bound(
        lambda end: measure(LayerRange(initial.start, end)), initial.end, (initial.start, n_layers - 1), window, sign
    )
    best_end = ends.best
    starts = _best_bound(lambda start: measure(LayerRange(start, best_end)), initial.start, (0, best_end), window, sign)
    upper = Sweep(
        "upper",
        tuple(LayerRange(initial.start, end) for end in ends.values),
        tuple(ends.values.values()),
        LayerRange(initial.start, best_end),
    )
    lower = Sweep(
        "lower",
        tuple(LayerRange(start, best_end) for start in starts.values),
        tuple(starts.values.values()),
        LayerRange(starts.best, best_end),
    )
    return SearchResult(lower.best, upper, lower)


@dataclass(frozen=True)
class _Bound:
    best: int
    values: dict[int, float]


def _best_bound(
    value: Callable[[int], float], centre: int, limits: tuple[int, int], window: int, sign: float
) -> _Bound:
    """Evaluate centre +- window inside the limits; while the best is an edge that can move, widen that side."""
    low, high = max(limits[0], centre - window), min(limits[1], centre + window)
    values = {bound: float(value(bound)) for bound in range(low, high + 1)}
    while True:
        if any(math.isnan(measured) for measured in values.values()):
            raise ValueError("the measure gave nan: the scaled model's logits are not finite; take alpha nearer to 1")
        best = max(values, key=lambda bound: (sign * values[bound], -abs(bound - centre)))
        if best == low and low > limits[0]:
            wider = range(max(limits[0], low - window), low)
        elif best == high and high < limits[1]:
            wider = range(high + 1, min(limits[1], high + window) + 1)
        else:
            return _Bound(best, dict(sorted(values.items())))
        values |= {bound: float(value(bound)) for bound in wider}
        low, high = min(values), max(values)


def direction_of(alpha: float) -> Direction:
    return "max" if alpha > 1 else "min"


def choose_alpha(
    cells: Callable[[float], Callable[[LayerRange], Float[Tensor, " prompt"]]],
    initial: LayerRange,
    *,
    above: bool,
    window: int = 2,
    text: bool = False,
) -> AlphaChoice:
    """The first alpha, in steps of 0.05 away from 1, at which the lower sweep moves enough (A.3.4).

    `cells(alpha)` gives a function from a range to one value a prompt. `text`: values are refusals, and the spread is
    the standard deviation of the rate over the sweep, to reach TARGET_STD; else log-odds, and it is that deviation
    over the standard error of the difference to the sweep's mean, to reach TARGET_SNR.
    If no alpha reaches it, the last one tried is returned with `reached` False.
    """
    tried: list[tuple[float, float]] = []
    for step in range(1, MAX_ALPHA_STEPS + 1):
        alpha = round(1 + (ALPHA_STEP if above else -ALPHA_STEP) * step, 2)
        cell = cells(alpha)
        values = torch.stack([cell(layers).double() for layers in initial.lower_neighbours(window)])
        tried.append((alpha, float(values.mean(1).std()) if text else signal_to_noise(values)))
        if tried[-1][1] >= (TARGET_STD if text else TARGET_SNR):
            return AlphaChoice(alpha, True, tuple(tried), _unit(text))
    return AlphaChoice(tried[-1][0], False, tuple(tried), _unit(text))


def _unit(text: bool) -> str:
    return "sd of the refusal rate over the sweep" if text else "signal-to-noise ratio of the sweep"


def signal_to_noise(values: Float[Tensor, "range prompt"]) -> float:
    """Standard deviation of the ranges' means over the mean standard error of a range's difference to the sweep.

    Prompts are the same in every range, so what all ranges share of a prompt's value is no noise.
    """
    if len(values) < 2:
        return 0.0
    differences = values - values.mean(0)
    noise = differences.std(1).mean() / values.shape[1] ** 0.5
    return float(values.mean(1).std() / noise.clamp_min(1e-12))


def grid_best(
    grid: Float[Tensor, "start end prompt"], direction: Direction, max_width: int | None = None
) -> LayerRange:
    """The best range of the whole grid, by the mean over prompts."""
    means = grid.mean(-1)
    widths = torch.arange(len(means))[None] - torch.arange(len(means))[:, None]
    allowed = (widths >= 0) & (widths < (max_width or len(means)))
    worst = -torch.inf if direction == "max" else torch.inf
    means = torch.where(allowed, means, worst)
    flat = int(means.argmax() if direction == "max" else means.argmin())
    return LayerRange(flat // len(means), flat % len(means))


def resampled_search(
    cell: Callable[[LayerRange], Float[Tensor, " prompt"]],
    initial: LayerRange,
    *,
    n_layers: int,
    window: int,
    direction: Direction,
    samples: int = 200,
    seed: int = 0,
) -> Counter[LayerRange]:
    """The search's answers over bootstrap samples of prompts. Cells are kept per prompt, so a sample is a mean."""
    n_prompts = len(cell(initial))
    drawn = torch.randint(n_prompts, (samples, n_prompts), generator=torch.Generator().manual_seed(seed))
    answers: Counter[LayerRange] = Counter()
    for rows in drawn:
        found = progressive_search(
            lambda layers, rows=rows: float(cell(layers).double()[rows].mean()),
            initial,
            n_layers=n_layers,
            window=window,
            direction=direction,
        )
        answers[found.range] += 1
    return answers


def locate_by_scaling(
    model: HookedTransformer,
    normal: Sequence[str],
    malicious: Sequence[str],
    over_rejection: Sequence[str],
    *,
    alpha: float | None = None,
    above: bool = True,
    recipe: str = "attn_out",
    template: str | Template = "own",
    text: bool = False,
    window: int = 4,
    whole_grid: bool = False,
    curve: GapCurve | None = None,
    initial: LayerRange | None = None,
    openings: Sequence[str] | None = None,
    samples: int = 200,
    least_refused: float = LEAST_REFUSED,
    seed: int = 0,
    progress: bool = False,
) -> SafetyLayers:
    """Locate the safety layers of a model as the paper does. `sm.locate` is this, and more methods (locators.py).

    1. gap curve of `normal` and `malicious` (or `curve`, if it is measured already) -> initial range (or `initial`);
    2. baseline: refusal of the `over_rejection` prompts, unscaled;
    3. `alpha`, if None, by A.3.4, on the side of 1 that `above` says;
    4. progressive search over `window` layers to both sides; the same on bootstrap samples of the prompts;
    5. `whole_grid`: every range, for comparison.

    `text`: measure refusals in generated text (the paper's R_o) instead of log-odds.
    `openings`: for log-odds; default those of REFUSAL_OPENINGS that the model uses on the malicious prompts.
    `least_refused`: the share of malicious prompts that a model must refuse for a range to be an answer; 0: any.
    Scaling some layers moves log-odds in every model, also in one that was never aligned; what makes layers safety
    layers is that malicious prompts are refused. Where they are not, or there is no gap, or scaling moves nothing
    beyond noise at any alpha, `range` is None and `reason` says so.
    """
    if curve is None:
        sets = (normal, malicious)
        residuals = [last_token_residuals(model, prompts, template, progress=progress) for prompts in sets]
        curve = gap_curve(residuals[0], residuals[1], seed=seed)
    initial = initial or initial_range(curve)
    if initial is None:
        reason = "no gap between malicious and normal prompts that the rule accepts"
        return SafetyLayers(None, None, curve, None, None, Counter(), None, None, None, (), None, reason)
    if openings is None:
        openings = REFUSAL_OPENINGS if text else openings_in_use(model, malicious, template)
    refused = float(refusal_log_odds(model, malicious, template, openings).sigmoid().mean())
    engines: dict[float, ScaledRanges] = {}

    def cells(at: float) -> Callable[[LayerRange], Float[Tensor, " prompt"]]:
        if at not in engines:
            engines.clear()  # one alpha's states at a time are enough memory
            engines[at] = ScaledRanges(model, over_rejection, at, recipe, template, openings)
        return engines[at].refuses if text else engines[at].log_odds

    if alpha is None:
        choice = choose_alpha(cells, initial, above=above, window=window, text=text)
    else:
        choice = AlphaChoice(alpha, True, (), "given")
    cell, direction = cells(choice.alpha), direction_of(choice.alpha)
    baseline = engines[choice.alpha].refuses(None) if text else engines[choice.alpha].log_odds(None)
    search = {"n_layers": model.cfg.n_layers, "window": window, "direction": direction}
    found = progressive_search(lambda layers: float(cell(layers).double().mean()), initial, **search)
    counted = resampled_search(cell, initial, **search, samples=samples, seed=seed)
    grid = engines[choice.alpha].grid(progress, text) if whole_grid else None
    best = grid_best(grid, direction, max_width=found.range.width) if grid is not None else None
    reason = _nothing_found(refused, least_refused, choice)
    return SafetyLayers(
        found.range if reason is None else None,
        initial,
        curve,
        choice,
        (found.upper, found.lower),
        counted,
        baseline.double(),
        grid,
        best,
        tuple(openings),
        refused,
        reason or "found",
    )


def _nothing_found(refused: float, least_refused: float, choice: AlphaChoice) -> str | None:
    """Why the search's answer is no range of safety layers; None where it is one."""
    if refused < least_refused:
        return (
            f"the model refuses {refused:.1%} of the malicious prompts (asked: {least_refused:.0%}): nothing to locate"
        )
    return None if choice.reached else "scaling moves nothing beyond noise at any alpha tried"
