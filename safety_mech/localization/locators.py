"""Many ways to locate the safety layers, under one signature: (model, prompts) -> range, with per-layer scores.

    LOCATORS["margin"](model, PromptSets(normal, malicious, over_rejection)).range

| method | what it looks at | per-layer score |
|---|---|---|
| gap | the paper's first step: where the cosine gap opens (onset.py) | gap, degrees |
| search, search_below, search_weights | the paper's scaling search, from there | share of bootstrap answers with it |
| grid | the best of all ranges, by the paper's measure | refusals with the layer scaled alone, minus unscaled |
| direction | where harmful and harmless come apart along the difference of means | growth of d' from the layer before |
| patching | layer outputs exchanged between twins | change of log-odds, nats |
| decision | the stream exchanged between twins: where the last token first has the decision | share that arrives |
| decision_window | the same, and three layers before it, which write what it reads | share that arrives |
| margin, margin_attn, margin_mlp | slope of the margin by the layer's scale (margin.py) | nats per unit of scale |
| margin_scaled | the same by really scaling, 0.8 and 1.2 | nats per unit of scale |

With the base model at hand (`base_locators(base)`): gap_difference, weight_change, swap.

Ranges: gap, search and grid have rules of their own, which are the paper's, and so have decision and decision_window
(`first_run`); all others take the one of segments.py.
The paper's search always answers here, also where `locate_by_scaling` would say that there is nothing to find, and
the middle third of the model is where it starts if there is no gap: both is said in `detail`.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.divergence.angles import GapCurve, gap_curve, gap_difference
from safety_mech.divergence.onset import DIFFERENCE_RULE, initial_range, initial_range_samples
from safety_mech.divergence.residuals import last_token_residuals
from safety_mech.interventions.directions import separation
from safety_mech.interventions.weight_swap import swap_losses, weight_change
from safety_mech.layers import LayerRange
from safety_mech.localization.located import Located, Locator, PromptSets, measured_once
from safety_mech.localization.patching import Patching, Positions, equal_length_pairs, patch_pairs
from safety_mech.localization.safety_layers import SafetyLayers, direction_of, locate_by_scaling
from safety_mech.localization.search import grid_best
from safety_mech.localization.segments import best_ranges, best_segment
from safety_mech.localization.slopes import PARTS, finite_slopes, log_odds_slopes, margin
from safety_mech.stats import group_numbers, mean_estimate, middle_third, resampled_counts

SAMPLES = 200
"""Bootstrap samples of prompts."""
FINITE_ALPHAS = (0.8, 1.2)
SEARCH_WINDOW = 4
DECISION_SHARE = 0.1
"""A layer in which at least this share of the decision arrives is where it is made."""
DECISION_LEVEL = 0.98
"""Of the interval of the whole decision: 1 % of models without one pass."""
DECISION_LEAD = 3
"""Layers before the decision that decision_window adds: of 0 to 5, the number with the best mean IoU on the three
design organisms of planted.py (0.22, 0.44, 0.67, 0.69, 0.67, 0.67), fixed before any other one was looked at."""


def locate_by_gap(model: HookedTransformer, prompts: PromptSets) -> Located:
    """The paper's initial range, by the rule of onset.py."""
    curve = _curve(model, prompts)
    return Located("gap", initial_range(curve), curve.gap, initial_range_samples(curve), f"p = {curve.p_any:.3f}")


def locate_by_search(
    model: HookedTransformer, prompts: PromptSets, method: str, recipe: str, above: bool = True
) -> Located:
    """The paper's progressive search; its last best range, whether beyond noise or not."""
    found, detail = _search(model, prompts, recipe, above, grid=False)
    if found.sweeps is None:
        raise ValueError(found.reason)
    total = max(1, found.samples.total())
    held = [sum(count for r, count in found.samples.items() if layer in r) / total for layer in _layers(model)]
    return Located(method, found.sweeps[1].best, _scores(held), _counted(found.samples), detail)


def locate_by_grid(model: HookedTransformer, prompts: PromptSets) -> Located:
    """The best of all ranges, of any width."""
    found, detail = _search(model, prompts, "attn_out", above=True, grid=True)
    if found.grid is None or found.alpha is None or found.baseline is None:
        raise ValueError(found.reason)
    direction = direction_of(found.alpha.alpha)
    numbers = group_numbers(found.grid.shape[-1], prompts.clusters)
    counts = resampled_counts(SAMPLES, max(numbers) + 1, _generator(prompts))[:, numbers]
    means = found.grid @ (counts / counts.sum(1, keepdim=True)).T
    samples = Counter(grid_best(mean[..., None], direction) for mean in means.unbind(-1))
    alone = found.grid.diagonal().mean(0) - found.baseline.mean()
    return Located("grid", grid_best(found.grid, direction), alone, samples, detail)


def locate_by_direction(model: HookedTransformer, prompts: PromptSets) -> Located:
    """Where d' of the held-out projection on the difference of means grows; layer 0 has no layer before it: 0."""
    normal, malicious = _residuals(model, prompts)
    found = separation(normal, malicious, seed=prompts.seed)
    growth = torch.cat([torch.zeros(1).double(), found.d_prime.diff()])
    detail = f"AUC at least {float(found.auc.min()):.2f}, at most {float(found.auc.max()):.2f}"
    return _by_segment("direction", growth, detail=detail)


def locate_by_patching(model: HookedTransformer, prompts: PromptSets) -> Located:
    """Twins of equal token length, layer outputs at the last token exchanged; mean of both ways."""
    patched, detail = _patched(model, prompts, what="layer")
    effect = patched.effect.T
    return _by_segment("patching", effect.mean(0), _resampled(effect, prompts, _generator(prompts)), detail)


def locate_by_decision(model: HookedTransformer, prompts: PromptSets, method: str, lead: int = 0) -> Located:
    """The residual stream at the prompt's last token (and the refusal's, behind it) exchanged between twins after every
    layer: where the effect first grows.

    After the last layer the whole difference between twins is exchanged, before the first nothing is; what a layer
    adds is the share of the decision that reaches the last token there. Later layers add to it, too, in models where
    only early ones were trained to refuse: the first to do so is where it is made. `lead`: layers before it that are
    added, as far as there are any; what reaches the last token there was written at other positions before.

    The scores are shares of the whole decision, the mean difference between twins. Where noise reaches that (its
    DECISION_LEVEL interval over pairs is not above 0) shares mean nothing: then there is no answer, and the scores are
    in nats.
    """
    patched, detail = _patched(model, prompts, what="resid", positions="answer")
    added = patched.effect.diff(dim=0, prepend=torch.zeros_like(patched.effect[:1])).T.double()
    total = mean_estimate(added.sum(1).tolist(), level=DECISION_LEVEL, seed=prompts.seed)
    if not total.low > 0:
        reason = f"twins do not differ beyond noise: {total} nats"
        return Located(method, None, added.mean(0), Counter(), f"{detail}; {reason}")
    shares = added.mean(0) / added.mean(0).sum()
    samples = _resampled(added, prompts, _generator(prompts))
    answers = Counter(led_by(_decided_in(row), lead) for row in samples)
    found = led_by(_decided_in(added.mean(0)), lead)
    held = float(shares[found.start : found.end + 1].sum()) if found else 0.0
    return Located(method, found, shares, answers, f"{detail}; {held:.0%} of the decision arrives there")


def _decided_in(added: Float[Tensor, " layer"]) -> LayerRange | None:
    """The first run of layers with DECISION_SHARE of the whole; None where the whole is not above 0."""
    whole = added.sum()
    return first_run(added / whole, DECISION_SHARE) if whole > 0 else None


def led_by(found: LayerRange | None, lead: int) -> LayerRange | None:
    """The range with as many layers before it added, as far as there are any."""
    return LayerRange(max(0, found.start - lead), found.end) if found else None


def first_run(scores: Float[Tensor, " layer"], least: float) -> LayerRange | None:
    """The first layer with at least this score, and those right behind it that have it, too."""
    enough = [layer for layer, score in enumerate(scores.tolist()) if score >= least]
    if not enough:
        return None
    end = enough[0]
    while end + 1 in enough:
        end += 1
    return LayerRange(enough[0], end)


def locate_by_margin(
    model: HookedTransformer, prompts: PromptSets, method: str, parts: Sequence[str] = PARTS
) -> Located:
    """Slope of the margin by the scale on a layer's outputs; of several parts their sum, that of both at once."""
    prompts = prompts.with_phrases(model)
    chosen = [PARTS.index(part) for part in parts]

    def measure() -> list[Float[Tensor, "prompt part layer"]]:
        sets = (prompts.malicious, prompts.normal)
        return [log_odds_slopes(model, texts, prompts.template, _phrases(prompts)) for texts in sets]

    slopes = [part[:, chosen].sum(1) for part in measured_once(("slopes",), model, prompts, measure)]
    return _by_margin(method, slopes[0], slopes[1], prompts)


def locate_by_scaled_margin(model: HookedTransformer, prompts: PromptSets) -> Located:
    """Finite slope of the margin: each layer's outputs scaled alone; the mean over FINITE_ALPHAS."""
    prompts = prompts.with_phrases(model)

    def slopes(texts: Sequence[str]) -> Float[Tensor, "prompt layer"]:
        parts = [
            finite_slopes(model, texts, alpha, template=prompts.template, phrases=_phrases(prompts))
            for alpha in FINITE_ALPHAS
        ]
        return torch.stack(parts).mean(0)

    return _by_margin("margin_scaled", slopes(prompts.malicious), slopes(prompts.normal), prompts)


LOCATORS: dict[str, Locator] = {
    "gap": locate_by_gap,
    "search": partial(locate_by_search, method="search", recipe="attn_out"),
    "search_below": partial(locate_by_search, method="search_below", recipe="attn_out", above=False),
    "search_weights": partial(locate_by_search, method="search_weights", recipe="weights"),
    "grid": locate_by_grid,
    "direction": locate_by_direction,
    "patching": locate_by_patching,
    "decision": partial(locate_by_decision, method="decision"),
    "decision_window": partial(locate_by_decision, method="decision_window", lead=DECISION_LEAD),
    "margin": partial(locate_by_margin, method="margin"),
    "margin_attn": partial(locate_by_margin, method="margin_attn", parts=("attn_out",)),
    "margin_mlp": partial(locate_by_margin, method="margin_mlp", parts=("mlp_out",)),
    "margin_scaled": locate_by_scaled_margin,
}
"""Locators that need no base model; a researcher adds one in a line."""


def base_locators(base: HookedTransformer) -> dict[str, Locator]:
    """Locators that compare with the model before alignment, under the same signature."""

    def gap_of_difference(model: HookedTransformer, prompts: PromptSets) -> Located:
        difference = gap_difference(_curve(model, prompts), _curve(base, prompts))
        samples = initial_range_samples(difference)
        detail = f"p = {difference.p_any:.3f}"
        return Located("gap_difference", initial_range(difference), difference.gap, samples, detail)

    def weights(model: HookedTransformer, prompts: PromptSets) -> Located:
        return _by_segment("weight_change", weight_change(model, base))

    def swap(model: HookedTransformer, prompts: PromptSets) -> Located:
        prompts = prompts.with_phrases(model)
        lost = [
            swap_losses(model, base, texts, prompts.template, _phrases(prompts))
            for texts in (prompts.malicious, prompts.normal)
        ]
        return _by_margin("swap", lost[0], lost[1], prompts)

    return {"gap_difference": gap_of_difference, "weight_change": weights, "swap": swap}


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


def _patched(
    model: HookedTransformer, prompts: PromptSets, what: str, positions: Positions = "last"
) -> tuple[Patching, str]:
    prompts = prompts.with_phrases(model)
    twins = equal_length_pairs(model, prompts.pairs, prompts.template) if prompts.pairs else []
    if len(twins) < 2:
        raise ValueError(f"patching: {len(twins)} pairs with twins of equal token length: expected at least 2")
    found = measured_once(
        ("patched", what, positions),
        model,
        prompts,
        lambda: patch_pairs(model, twins, prompts.template, _phrases(prompts), what=what, positions=positions),
    )
    return found, f"{len(twins)} of {len(prompts.pairs)} pairs are of equal token length"


def _residuals(
    model: HookedTransformer, prompts: PromptSets
) -> tuple[Float[Tensor, "normal layer d_model"], Float[Tensor, "malicious layer d_model"]]:
    normal, malicious = (
        last_token_residuals(model, texts, prompts.template) for texts in (prompts.normal, prompts.malicious)
    )
    return normal, malicious


def _curve(model: HookedTransformer, prompts: PromptSets) -> GapCurve:
    return measured_once(("curve",), model, prompts, lambda: gap_curve(*_residuals(model, prompts), seed=prompts.seed))


def _search(
    model: HookedTransformer, prompts: PromptSets, recipe: str, above: bool, grid: bool
) -> tuple[SafetyLayers, str]:
    if not prompts.over_rejection:
        raise ValueError("the scaling search needs over-rejection prompts, and none were given")
    prompts = prompts.with_phrases(model)
    curve = _curve(model, prompts)
    start, source = _starting_range(curve)
    found = locate_by_scaling(
        model,
        prompts.normal,
        prompts.malicious,
        prompts.over_rejection,
        above=above,
        recipe=recipe,
        template=prompts.template,
        window=SEARCH_WINDOW,
        whole_grid=grid,
        curve=curve,
        initial=start,
        phrases=_phrases(prompts),
        clusters=prompts.clusters,
        samples=SAMPLES,
        seed=prompts.seed,
    )
    assert found.alpha is not None
    return found, f"from {start} ({source}); alpha {found.alpha.alpha}; {found.reason}"


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
    method: str, malicious: Float[Tensor, "malicious layer"], normal: Float[Tensor, "normal layer"], prompts: PromptSets
) -> Located:
    generator = _generator(prompts)
    samples = _resampled(malicious, prompts, generator) - _resampled(normal, prompts, generator)
    return _by_segment(method, margin(malicious, normal), samples)


def _resampled(
    values: Float[Tensor, "prompt layer"], prompts: PromptSets, generator: torch.Generator
) -> Float[Tensor, "sample layer"]:
    """Means over prompts drawn with replacement."""
    return resampled_counts(SAMPLES, len(values), generator) @ values.double() / len(values)


def _phrases(prompts: PromptSets) -> tuple[str, ...]:
    assert prompts.phrases is not None
    return prompts.phrases


def _generator(prompts: PromptSets) -> torch.Generator:
    return torch.Generator().manual_seed(prompts.seed)


def _counted(answers: Counter[LayerRange]) -> Counter[LayerRange | None]:
    return Counter({**answers})


def _layers(model: HookedTransformer) -> range:
    return range(model.cfg.n_layers)


def _scores(values: Sequence[float]) -> Float[Tensor, " layer"]:
    return torch.tensor(values, dtype=torch.float64)
