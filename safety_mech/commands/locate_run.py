"""What a locate run measures, in the order of `python experiments/locate.py`."""

from dataclasses import replace

from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.commands.cells import base_of, load
from safety_mech.commands.locate import LocateConfig, LocateData
from safety_mech.commands.locate_output import write_locate_run
from safety_mech.prompts import Drawn
from safety_mech.reporting.locate_report import LocateResult, Start
from safety_mech.reporting.tables import (
    alpha_sentence,
    alpha_table,
    gap_table,
    search_sentence,
    sweep_table,
)


def run_locate(config: LocateConfig, data: LocateData) -> LocateResult:
    """Curves of the base and of the model, the initial range, the search; then the report and the run's folder."""
    base_curves: dict[str, sm.GapCurve] = {}
    base_name = base_of(config.model, config.base)
    if base_name:
        base_curves = measure_all(load(base_name, None, config), data, config)
    model = load(config.model, config.adapter, config)
    curves = measure_all(model, data, config)
    by = config.statistic
    initial = {name: sm.initial_range(curve, statistic=by) for name, curve in curves.items()}
    samples = {name: sm.initial_range_samples(curve, statistic=by) for name, curve in curves.items()}
    differences = {name: sm.gap_difference(curves[name], base_curves[name]) for name in base_curves}
    start = starting_range(config, initial["prompts"], differences.get("prompts"))
    result = LocateResult(curves, base_name, base_curves, by, initial, samples, differences, start)
    print(gap_table(curves["prompts"], initial["prompts"]))
    print(*result.gap_sentences(), *result.difference_sentences(), start, sep="\n")
    if data.over_rejection is not None:
        found = search(model, data.sets["prompts"], curves["prompts"], data.over_rejection, start, config)
        result = replace(result, found=found)
    folder = write_locate_run(model, data, result, config)
    print(f"written: {folder}/ ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    return replace(result, folder=folder)


def measure_all(model: HookedTransformer, data: LocateData, config: LocateConfig) -> dict[str, sm.GapCurve]:
    curves = {}
    for name, prompts in data.sets.items():
        normal_topics, malicious_topics = data.topics.get(name, (None, None))
        curves[name] = sm.gap_curve(
            *(sm.last_token_residuals(model, part, config.template, progress=True) for part in prompts),
            paired=name == "contrastive pairs",
            normal_clusters=normal_topics,
            malicious_clusters=malicious_topics,
            r=config.r,
            seed=config.seed,
            bootstrap=config.bootstrap,
            permutations=config.permutations,
        )
    return curves


def starting_range(config: LocateConfig, own: sm.LayerRange | None, difference: sm.GapDifference | None) -> Start:
    """The given range; else that of the model's own gap, as in the paper; else that of the difference to the base."""
    if config.initial is not None:
        return Start(sm.LayerRange.parse(config.initial), "given")
    if own is not None:
        return Start(own, "the gap of the model's own curve")
    layers = sm.initial_range(difference, statistic=config.statistic) if difference is not None else None
    if layers is not None:
        return Start(layers, "the gap of the difference to the base (the model's own curve has none)")
    compared = "nor of its difference to the base" if difference is not None else "and no base to compare it with"
    return Start(None, f"no initial range: no gap of the model's own curve, {compared}")


def search(
    model: HookedTransformer,
    prompts: tuple[list[str], list[str]],
    curve: sm.GapCurve,
    over_rejection: Drawn,
    start: Start,
    config: LocateConfig,
) -> sm.SafetyLayers:
    found = sm.locate(
        model,
        *prompts,
        over_rejection.prompts,
        clusters=over_rejection.clusters,
        curve=curve,
        initial=start.range,
        alpha=config.alpha,
        above=not config.below,
        recipe=config.recipe,
        template=config.template,
        text=config.text,
        whole_grid=config.grid,
        least_refused=config.least_refused,
        least_effect=config.least_effect,
        seed=config.seed,
        progress=True,
    )
    if found.alpha:
        print(alpha_table(found.alpha))
        print(alpha_sentence(found.alpha))
    for sweep in found.sweeps or ():
        print(sweep_table(sweep, "refused"))
    print(search_sentence(found))
    return found
