"""Tables and sentences for the terminal: numbers in, text out."""

from collections import Counter

from safety_mech.divergence.angles import GapCurve, GapDifference, GapStatistic, SymmetricGap
from safety_mech.divergence.resampling import Statistic
from safety_mech.layers import LayerRange
from safety_mech.localization.alpha import AlphaChoice
from safety_mech.localization.safety_layers import SafetyLayers
from safety_mech.localization.search import Sweep


def gap_table(curve: GapCurve, initial: LayerRange | None) -> str:
    """One line a layer; layers of the initial range carry a bar."""
    bounds = f"{curve.level:.0%} interval"
    symmetric = f"{'symmetric':>9}  {bounds:>16}  {'spread':>6}  {'p':>6}"
    paper = f"{'gap (deg)':>9}  {bounds:>16}  {'p':>6}"
    lines = [f"{'layer':>5}  {'cos N-N':>8} {'cos N-M':>8} {'cos M-M':>8}  {paper}  {symmetric}"]
    kinds = (curve.normal_normal, curve.normal_malicious, curve.malicious_malicious)
    for layer in range(curve.n_layers):
        cosines = " ".join(f"{float(kind.cosine_mean[layer]):8.4f}" for kind in kinds)
        paper, other = _cells(curve, layer), _cells(curve.symmetric, layer, float(curve.symmetric.spread_alone[layer]))
        mark = " |" if initial is not None and layer in initial else ""
        lines.append(f"{layer:>5}  {cosines}  {paper}  {other}{mark}")
    return "\n".join(lines)


def _cells(part: GapStatistic, layer: int, spread: float | None = None) -> str:
    interval = interval_text(float(part.low[layer]), float(part.high[layer]))
    alone = "" if spread is None else f"{spread:6.2f}  "
    return f"{float(part.gap[layer]):9.2f}  {interval:>16}  {alone}{float(part.p_values[layer]):6.3f}"


def interval_text(low: float, high: float) -> str:
    return f"[{low:.2f}, {high:.2f}]"


def gap_sentence(
    curve: GapCurve,
    initial: LayerRange | None,
    samples: Counter[LayerRange | None],
    statistic: Statistic = "paper",
) -> str:
    """The largest gap by both statistics, with interval and p-value, and the initial range with how sure it is.

    `statistic`: the one that the initial range was read off.
    """
    gap = f"largest gap {_peak(curve)}; {symmetric_text(curve.symmetric)}; {bootstrap_text(curve)}"
    if curve.r is not None:
        peak = int(curve.gap.argmax())
        sampled = f"{float(curve.sampled_gap[peak]):.2f} degrees"
        gap += f"; of {curve.normal_normal.n_pairs} sampled pairs of each kind {sampled} at layer {peak}"
    by = " (by the symmetric statistic)" if statistic == "symmetric" else ""
    if initial is None:
        return f"{gap}; no initial range{by}: no gap that the rule accepts"
    total = sum(samples.values())
    same, none = samples[initial] / total, samples[None] / total
    return f"{gap}; initial range {initial}{by} (the same in {same:.0%} of bootstrap curves, none in {none:.0%})"


def _peak(part: GapStatistic) -> str:
    peak = int(part.gap.argmax())
    interval = interval_text(float(part.low[peak]), float(part.high[peak]))
    return f"{float(part.gap[peak]):.2f} degrees {interval} at layer {peak}, p over all layers {part.p_any:.3f}"


def symmetric_text(part: SymmetricGap) -> str:
    """Its largest value, and what the sets' spreads alone make of it there."""
    spread = float(part.spread_alone[int(part.gap.argmax())])
    return f"symmetric {_peak(part)} (spread alone: {spread:.2f})"


def bootstrap_text(curve: GapCurve) -> str:
    """What the interval is over: "bootstrap over 12 normal and 12 malicious topics"."""
    normal, malicious = curve.n_resampled
    return f"bootstrap over {normal} normal and {malicious} malicious {curve.resampled}"


def difference_sentence(difference: GapDifference) -> str:
    """Where the aligned model's gap is larger than its base's, and by how much at most; by both statistics."""
    peak = int(difference.gap.argmax())
    interval = interval_text(float(difference.low[peak]), float(difference.high[peak]))
    above = [layer for layer in range(len(difference.gap)) if float(difference.low[layer]) > 0]
    where = f"above 0 in layers {layers_text(above)}" if above else "above 0 in no layer"
    return (
        f"{float(difference.gap[peak]):.2f} degrees {interval} at layer {peak}, {where} "
        f"(p over all layers {difference.p_any:.3f}); {symmetric_text(difference.symmetric)}"
    )


def layers_text(layers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def sweep_table(sweep: Sweep, unit: str) -> str:
    """A sweep as the paper prints it: ranges above, values below, the best in stars."""
    cells = [f"*{layers}*" if layers == sweep.best else str(layers) for layers in sweep.ranges]
    values = [f"{value:.3f}" for value in sweep.values]
    widths = [max(map(len, pair)) for pair in zip(cells, values, strict=True)]
    head = f"{sweep.bound} bound"
    rows = [
        f"{label:<14}" + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        for label, row in ((head, cells), (unit, values))
    ]
    return "\n".join(rows)


def alpha_table(choice: AlphaChoice) -> str:
    """The curve over alpha, one line an alpha; the chosen one carries a bar. Rates are shares of the prompts."""
    lines = [f"{'alpha':>5}  {'range':<9} {'refused':>8} {'spread':>7} {'p':>6} {'lower sd':>8} {'degenerate':>10}"]
    for point in choice.points:
        mark = " |" if point.alpha == choice.alpha else ""
        lines.append(
            f"{point.alpha:>5.2f}  {point.range!s:<9} {point.rate:>8.1%} {point.spread:>7.1%} {point.p_value:>6.3f} "
            f"{point.lower_spread:>8.1%} {point.degenerate:>10.1%}{mark}"
        )
    return "\n".join(lines)


def alpha_sentence(choice: AlphaChoice) -> str:
    """How alpha was chosen, and whether its neighbours locate the same range."""
    rules = {
        "auto": "the greatest spread between ranges beyond noise, answers not degenerate",
        "paper": "the first at which the rate's standard deviation over the lower sweep reaches 2.5 %",
        "given": "given",
    }
    agreement = "" if choice.agreement is None else f"; IoU with the neighbouring alphas' ranges {choice.agreement:.2f}"
    return f"alpha {choice.alpha} ({rules[choice.rule]}){agreement}"


def effect_text(found: SafetyLayers) -> str:
    """ "0.28 -> 0.69, +0.41 [+0.30, +0.52]": refusals unscaled and scaled, and the change with its interval."""
    assert found.baseline is not None
    assert found.effect is not None
    before, effect = float(found.baseline.mean()), found.effect
    return f"{before:.2f} -> {before + effect.value:.2f}, {effect.value:+.2f} [{effect.low:+.2f}, {effect.high:+.2f}]"


def search_sentence(found: SafetyLayers) -> str:
    """The located range, what it does, its interval, and whether the grid has a better one."""
    if found.range is None:
        return f"no safety layers located: {found.reason}"
    interval = found.interval()
    total = sum(found.samples.values())
    sure = f"; the same in {found.samples[found.range] / total:.0%} of {total} bootstrap samples" if total else ""
    spans = f", 90 % intervals: start {list(interval[0])}, end {list(interval[1])}" if interval else ""
    alpha = f" at alpha {found.alpha.alpha}" if found.alpha else ""
    grid = ""
    if found.best_of_grid is not None:
        better = "the grid's best too" if found.is_best_of_grid else f"but the grid's best is {found.best_of_grid}"
        grid = f"; {better}"
    return f"located {found.range}{alpha}, refusals {effect_text(found)}{spans}{sure}{grid}"
