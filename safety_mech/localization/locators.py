"""Many ways to locate the safety layers, under one signature: (model, prompts) -> range, with per-layer scores.

    LOCATORS["decision_window"](model, PromptSets(normal, malicious, pairs=pairs)).range

docs/method.md#locators says what each looks at, and by which rule its scores become a range. The paper's search always
answers here, also where `locate_by_scaling` would find nothing. Without a gap it starts from the middle third of the
model. `detail` says both.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.divergence.angles import GapCurve, GapDifference, gap_difference
from safety_mech.divergence.onset import DIFFERENCE_RULE, initial_range, initial_range_samples
from safety_mech.interventions.directions import separation
from safety_mech.interventions.weight_swap import weight_change
from safety_mech.layers import LayerRange
from safety_mech.localization.measurements import AnyLocator, Located, Locator, Measurements, PromptSets
from safety_mech.localization.safety_layers import SafetyLayers, locate_by_scaling
from safety_mech.localization.search import grid_best
from safety_mech.localization.segments import best_ranges, best_segment
from safety_mech.localization.slopes import PARTS, log_odds_slopes, margin
from safety_mech.localization.sufficiency import swap_losses
from safety_mech.stats import group_numbers, mean_estimate, middle_third, resampled_counts, resampled_means

SAMPLES = 200
"""Bootstrap samples of prompts."""
SEARCH_WINDOW = 4
DECISION_SHARE = 0.1
"""A layer in which at least this share of the decision arrives is where it is made."""
DECISION_LEVEL = 0.98
"""Of the interval of the whole decision: 1 % of models without one pass."""
DECISION_LEAD = 3
"""Of 0 to 5 layers, the number with the best mean IoU on the three design organisms of planted.py (0.22, 0.44, 0.67,
0.69, 0.67, 0.67), fixed before any other one was looked at."""


def locate_by_gap(measured: Measurements) -> Located:
    """The paper's initial range, by the rule of onset.py."""
    return _by_onset("gap", measured.curve)


def locate_by_search(measured: Measurements, method: str, recipe: str, above: bool = True) -> Located:
    """The paper's progressive search; its last best range, whether beyond noise or not."""
    found, detail = _search(measured, recipe, above, grid=False)
    if found.sweeps is None:
        raise ValueError(found.reason)
    counted = Counter(layer for answer in found.samples.elements() for layer in answer)
    held = torch.tensor([counted[layer] for layer in range(measured.n_layers)]).double()
    scores = held / max(1, found.samples.total())
    return Located(method, found.sweeps.range, scores, Counter({**found.samples}), detail)


def locate_by_grid(measured: Measurements) -> Located:
    """The best of all ranges, of any width."""
    found, detail = _search(measured, "attn_out", above=True, grid=True)
    if found.grid is None or found.baseline is None:
        raise ValueError(found.reason)
    numbers = group_numbers(found.grid.shape[-1], measured.prompts.clusters)
    counts = resampled_counts(SAMPLES, max(numbers) + 1, _generator(measured))[:, numbers]
    means = found.grid @ (counts / counts.sum(1, keepdim=True)).T
    samples = Counter(grid_best(mean[..., None], "max") for mean in means.unbind(-1))
    alone = found.grid.diagonal().mean(0) - found.baseline.mean()
    return Located("grid", found.best_of_grid, alone, samples, detail)


def locate_by_direction(measured: Measurements) -> Located:
    """Where d' of the held-out projection on the difference of means grows; layer 0 has no layer before it: 0."""
    found = separation(*measured.residuals, seed=measured.prompts.seed)
    growth = torch.cat([torch.zeros(1).double(), found.d_prime.diff()])
    detail = f"AUC at least {float(found.auc.min()):.2f}, at most {float(found.auc.max()):.2f}"
    return _by_segment("direction", growth, detail=detail)


def locate_by_patching(measured: Measurements) -> Located:
    """Contrastive pairs of equal token length, layer outputs at the last token exchanged; mean of both ways."""
    effect = measured.patched("layer").effect.T
    samples = resampled_means(effect, SAMPLES, _generator(measured))
    return _by_segment("patching", effect.mean(0), samples, _pairs_used(measured))


def locate_by_decision(measured: Measurements, method: str, lead: int = 0) -> Located:
    """Where exchanging the residual stream within contrastive pairs first moves the refusal.

    The stream is exchanged at the prompt's last token and at the refusal's tokens behind it: before the first layer
    nothing differs, after the last one the whole difference within pairs is exchanged. Later layers add to the effect
    as well, also in models where only early ones were trained to refuse, so the first layers that do are taken.
    `lead`: that many layers before them are added: they write what the last token reads.

    The scores are shares of the whole decision. Where noise reaches that (its DECISION_LEVEL interval over pairs is not
    above 0) there is no answer, and the scores are in nats.
    """
    effect, detail, seed = measured.patched("resid", "answer").effect, _pairs_used(measured), measured.prompts.seed
    added = effect.diff(dim=0, prepend=torch.zeros_like(effect[:1])).T.double()
    total = mean_estimate(added.sum(1).tolist(), level=DECISION_LEVEL, seed=seed)
    if not total.low > 0:
        reason = f"the two sides of a pair do not differ beyond noise: {total} nats"
        return Located(method, None, added.mean(0), Counter(), f"{detail}; {reason}")
    shares = added.mean(0) / added.mean(0).sum()
    samples = resampled_means(added, SAMPLES, _generator(measured))
    answers = Counter(_decided_in(row, lead) for row in samples)
    found = _decided_in(added.mean(0), lead)
    held = float(shares[found.start : found.end + 1].sum()) if found else 0.0
    return Located(method, found, shares, answers, f"{detail}; {held:.0%} of the decision arrives there")


def _pairs_used(measured: Measurements) -> str:
    return f"{len(measured.pairs)} of {len(measured.prompts.pairs)} pairs are of equal token length"


def _decided_in(added: Float[Tensor, " layer"], lead: int) -> LayerRange | None:
    """The first run of layers with DECISION_SHARE of the whole; None where the whole is not above 0."""
    whole = added.sum()
    return first_run(added / whole, DECISION_SHARE, lead) if whole > 0 else None


def first_run(scores: Float[Tensor, " layer"], least: float, lead: int = 0) -> LayerRange | None:
    """The first layer with at least this score, those right behind it that have it, too, and `lead` layers before
    them, as far as there are any."""
    enough = [score >= least for score in scores.tolist()]
    if True not in enough:
        return None
    start = enough.index(True)
    return LayerRange(max(0, start - lead), [*enough, False].index(False, start) - 1)


def locate_by_margin(measured: Measurements) -> Located:
    """Slope of the margin by the scale on a layer's attention output."""

    def slopes(texts: Sequence[str]) -> Float[Tensor, "prompt layer"]:
        found = log_odds_slopes(measured.model, texts, measured.prompts.template, measured.phrases)
        return found[:, PARTS.index("attn_out")]

    return _by_margin("margin_attn", slopes, measured)


LOCATORS: dict[str, AnyLocator] = {
    "gap": Locator(locate_by_gap),
    "search": Locator(partial(locate_by_search, method="search", recipe="attn_out")),
    "search_below": Locator(partial(locate_by_search, method="search_below", recipe="attn_out", above=False)),
    "search_weights": Locator(partial(locate_by_search, method="search_weights", recipe="weights")),
    "grid": Locator(locate_by_grid),
    "direction": Locator(locate_by_direction),
    "patching": Locator(locate_by_patching),
    "decision": Locator(partial(locate_by_decision, method="decision")),
    "decision_window": Locator(partial(locate_by_decision, method="decision_window", lead=DECISION_LEAD)),
    "margin_attn": Locator(locate_by_margin),
}
"""Locators that need no base model; a researcher adds one in a line."""

BASE_METHODS = ("gap_difference", "weight_change", "swap")
"""Those of `base_locators`."""


def base_locators(base: HookedTransformer) -> dict[str, AnyLocator]:
    """Locators that compare with the model before alignment, under the same signature."""

    def gap_of_difference(measured: Measurements) -> Located:
        before = Measurements(base, measured.prompts).curve
        return _by_onset("gap_difference", gap_difference(measured.curve, before))

    def weights(measured: Measurements) -> Located:
        return _by_segment("weight_change", weight_change(measured.model, base))

    def swap(measured: Measurements) -> Located:
        settings = (measured.prompts.template, measured.phrases)
        return _by_margin("swap", lambda texts: swap_losses(measured.model, base, texts, *settings), measured)

    return dict(zip(BASE_METHODS, map(Locator, (gap_of_difference, weights, swap)), strict=True))


@overload
def locate(
    model: HookedTransformer,
    normal: Sequence[str],
    malicious: Sequence[str],
    over_rejection: Sequence[str],
    *,
    method: Literal["paper"] = "paper",
    **settings: Any,
) -> SafetyLayers: ...
@overload
def locate(
    model: HookedTransformer,
    normal: Sequence[str],
    malicious: Sequence[str],
    over_rejection: Sequence[str] = (),
    *,
    method: str,
    base: HookedTransformer | None = None,
    **settings: Any,
) -> Located: ...
def locate(
    model: HookedTransformer,
    normal: Sequence[str],
    malicious: Sequence[str],
    over_rejection: Sequence[str] = (),
    *,
    method: str = "paper",
    base: HookedTransformer | None = None,
    **settings: Any,
) -> SafetyLayers | Located:
    """Locate the safety layers of a model.

    `method` "paper" (the reference): `locate_by_scaling(model, normal, malicious, over_rejection, **settings)`, with
    all of its settings and its result. Any other: a locator of LOCATORS or, with the model before alignment as
    `base`, of `base_locators`; `settings` are then fields of PromptSets (pairs, template, phrases, seed).
    Raises ValueError, naming those there are, for an unknown method.
    """
    if method == "paper":
        return locate_by_scaling(model, normal, malicious, over_rejection, **settings)
    known = LOCATORS | (base_locators(base) if base is not None else {})
    if method not in known:
        hint = "" if base is not None else "; more with base="
        raise ValueError(f"method {method!r}: expected paper or one of {', '.join(known)}{hint}")
    return known[method](model, PromptSets(normal, malicious, over_rejection, **settings))


# --- what locators share ----------------------------------------------------------------------------------------------


def _search(measured: Measurements, recipe: str, above: bool, grid: bool) -> tuple[SafetyLayers, str]:
    prompts = measured.prompts
    if not prompts.over_rejection:
        raise ValueError("the scaling search needs over-rejection prompts, and none were given")
    start, source = _starting_range(measured.curve)
    found = locate_by_scaling(
        measured.model,
        prompts.normal,
        prompts.malicious,
        prompts.over_rejection,
        above=above,
        recipe=recipe,
        template=prompts.template,
        window=SEARCH_WINDOW,
        whole_grid=grid,
        curve=measured.curve,
        initial=start,
        phrases=measured.phrases,
        clusters=prompts.clusters,
        samples=SAMPLES,
        seed=prompts.seed,
    )
    assert found.alpha is not None
    return found, f"from {start} ({source}); alpha {found.alpha.alpha}; {found.reason}"


def _by_onset(method: str, curve: GapCurve | GapDifference) -> Located:
    return Located(method, initial_range(curve), curve.gap, initial_range_samples(curve), f"p = {curve.p_any:.3f}")


def _starting_range(curve: GapCurve) -> tuple[LayerRange, str]:
    """The paper starts where the gap opens; where the rule accepts none, from any gap above 0, else from the middle."""
    for rule, source in ((None, "the gap's range"), (DIFFERENCE_RULE, "any significant gap")):
        if (found := initial_range(curve, rule)) is not None:
            return found, source
    return middle_third(curve.n_layers), "no gap: the middle third"


def _by_segment(
    method: str,
    scores: Float[Tensor, " layer"],
    samples: Float[Tensor, "sample layer"] | None = None,
    detail: str = "",
) -> Located:
    """The one rule of segments.py, on the scores and on their bootstrap samples."""
    found = best_segment(scores)
    if found is None:
        return Located(method, None, scores.double(), Counter(), "all layers score the same")
    counted = Counter(best_ranges(samples)) if samples is not None else Counter[LayerRange | None]()
    fit = f"the two levels explain {found.explained:.0%} of the scores' variance"
    return Located(method, found.range, scores.double(), counted, f"{detail}; {fit}" if detail else fit)


def _by_margin(
    method: str, values_of: Callable[[Sequence[str]], Float[Tensor, "prompt layer"]], measured: Measurements
) -> Located:
    malicious, normal = (values_of(texts) for texts in (measured.prompts.malicious, measured.prompts.normal))
    generator = _generator(measured)
    samples = resampled_means(malicious, SAMPLES, generator) - resampled_means(normal, SAMPLES, generator)
    return _by_segment(method, margin(malicious, normal), samples)


def _generator(measured: Measurements) -> torch.Generator:
    return torch.Generator().manual_seed(measured.prompts.seed)
