"""Tables and sentences for the terminal: numbers in, text out."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from safety_mech.divergence.angles import GapCurve, GapDifference, GapStatistic, SymmetricGap
from safety_mech.divergence.resampling import Statistic
from safety_mech.layers import LayerRange
from safety_mech.localization.alpha import AlphaChoice
from safety_mech.localization.safety_layers import SafetyLayers
from safety_mech.localization.search import Sweep


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], barred: Sequence[bool] = ()) -> str:
    """Right-aligned columns under their heads, and a bar behind the rows that are `barred`."""
    spaced = [[row[0], *(f" {cell}" for cell in row[1:])] for row in (head, *rows)]
    first, *lines = pd.DataFrame(spaced[1:], columns=pd.Index(spaced[0])).to_string(index=False).splitlines()
    bars = barred or [False] * len(rows)
    return "\n".join([first, *(line + " |" * bar for line, bar in zip(lines, bars, strict=True))])


def rows_table(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as aligned columns, headed by their keys. Floats get two decimals; a missing or None cell is empty."""
    frame = pd.DataFrame([{name: _cell_text(value) for name, value in row.items()} for row in rows]).fillna("")
    formats = {name: f"{{:<{frame[name].str.len().max() + 1}}}".format for name in frame}
    lines = frame.to_string(index=False, justify="left", formatters=formats).splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _cell_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def gap_table(curve: GapCurve, initial: LayerRange | None) -> str:
    """One line a layer, with a bar at the layers of the initial range."""
    bounds, symmetric = f"{curve.level:.0%} interval", curve.symmetric
    head = ["layer", "cos N-N", "cos N-M", "cos M-M", "gap (deg)", bounds, "p", "symmetric", bounds, "spread", "p"]
    kinds = (curve.normal_normal, curve.normal_malicious, curve.malicious_malicious)
    rows = [
        [
            str(layer),
            *(f"{float(kind.cosine_mean[layer]):.4f}" for kind in kinds),
            *gap_cells(curve, layer),
            f"{float(curve.p_values[layer]):.3f}",
            *gap_cells(symmetric, layer),
            f"{float(symmetric.spread_alone[layer]):.2f}",
            f"{float(symmetric.p_values[layer]):.3f}",
        ]
        for layer in range(curve.n_layers)
    ]
    return text_table(head, rows, [initial is not None and layer in initial for layer in range(curve.n_layers)])


def gap_cells(part: GapStatistic, layer: int) -> tuple[str, str]:
    """The gap at a layer, and its interval."""
    return f"{float(part.gap[layer]):.2f}", f"[{float(part.low[layer]):.2f}, {float(part.high[layer]):.2f}]"


def gap_sentence(
    curve: GapCurve,
    initial: LayerRange | None,
    samples: Counter[LayerRange | None],
    statistic: Statistic = "paper",
) -> str:
    """The largest gap by both statistics, with interval and p-value, and the initial range with how sure it is.

    `statistic`: the one that the initial range was read off.
    """
    gap = f"largest gap {peak_text(curve)}, p over all layers {curve.p_any:.3f}"
    gap += f"; {symmetric_text(curve.symmetric)}; {bootstrap_text(curve)}"
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


def peak_text(part: GapStatistic) -> str:
    """ "1.54 degrees [0.46, 3.70] at layer 11": the largest gap with its interval."""
    peak = int(part.gap.argmax())
    gap, interval = gap_cells(part, peak)
    return f"{gap} degrees {interval} at layer {peak}"


def symmetric_text(part: SymmetricGap) -> str:
    """Its largest value, and what the sets' spreads alone make of it there."""
    spread = float(part.spread_alone[int(part.gap.argmax())])
    return f"symmetric {peak_text(part)}, p over all layers {part.p_any:.3f} (spread alone: {spread:.2f})"


def bootstrap_text(curve: GapCurve) -> str:
    """What the interval is over: "bootstrap over 12 normal and 12 malicious topics"."""
    normal, malicious = curve.n_resampled
    return f"bootstrap over {normal} normal and {malicious} malicious {curve.resampled}"


def difference_sentence(difference: GapDifference) -> str:
    """The peak of the gap minus the base's gap, and the layers where it is above 0; by both statistics."""
    above = [layer for layer in range(len(difference.gap)) if float(difference.low[layer]) > 0]
    where = f"above 0 in layers {layers_text(above)}" if above else "above 0 in no layer"
    tested = f"p over all layers {difference.p_any:.3f}"
    return f"{peak_text(difference)}, {where} ({tested}); {symmetric_text(difference.symmetric)}"


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
    return pd.DataFrame([cells, values], pd.Index([f"{sweep.bound} bound ", unit])).to_string(header=False)


def alpha_table(choice: AlphaChoice) -> str:
    """The curve over alpha, one line an alpha, with a bar at the chosen one. Rates are shares of the prompts."""
    rows = [
        [
            f"{point.alpha:.2f}",
            str(point.range),
            *(f"{share:.1%}" for share in (point.rate, point.spread)),
            f"{point.p_value:.3f}",
            *(f"{share:.1%}" for share in (point.lower_spread, point.degenerate)),
        ]
        for point in choice.points
    ]
    head = ["alpha", "range", "refused", "spread", "p", "lower sd", "degenerate"]
    return text_table(head, rows, [point.alpha == choice.alpha for point in choice.points])


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
