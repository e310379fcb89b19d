"""What does a localisation cost? The authors' procedure, batched transformers, and ours, on the same ranges.

The same model, prompts and ranges in one run; every method runs in a process of its own. Read the RATIOS: seconds
are this machine's. Methods:

- authors: a copied model whose weights are multiplied, one prompt at a time, 16 greedy tokens (a sample, scaled up)
- batched: weights multiplied and put back, padded batches, 10 greedy tokens (a sample, scaled up)
- text: ours, R_o from generated text, the `weights` recipe (`ScaledRanges.refuses`)
- log-odds: ours, without generation (`ScaledRanges.log_odds`); in float32 and in bfloat16
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from measuring import answer_greedily, best_time, in_own_process, pad, padded_batches, projections, timed
from transformers import PreTrainedModel

import safety_mech as sm
from safety_mech.commands.checks import check_at_least, check_model
from safety_mech.commands.command_line import run
from safety_mech.commands.publish import publish_table
from safety_mech.interventions.scaling import check_alpha
from safety_mech.layers import LayerRange
from safety_mech.localization.range_sweep import ScaledRanges, layer_evaluations
from safety_mech.localization.search import progressive_search
from safety_mech.models.chat import decode_answer, encode_chat
from safety_mech.models.loading import load_transformers
from safety_mech.models.parameters import replaced
from safety_mech.prompts import draw, prompt_hash
from safety_mech.refusal.log_odds import phrases_in_use
from safety_mech.refusal.text import JUDGED_TOKENS, refuses

AUTHORS_TOKENS = 16
"""The authors' script generates 16 tokens."""
GRID_ROWS = 10
"""Of the grid by text, and of that in bfloat16, every tenth row is timed."""
SAME_LOGITS = 1e-3
"""Largest difference of logits at which two ways of scaling count as the same."""


@dataclass(frozen=True)
class BenchConfig:
    """Time the search for ranges: the authors' procedure, batched transformers, ours by text and by log-odds."""

    model: str = "smollm2-135m-aligned"
    """A built-in name, a local folder, a .gguf file, or a hub id, of the Llama family."""
    alpha: float = 1.2
    initial: str = "12-17"
    """Both bounds of this range are swept."""
    window: int = 2
    """Layers to both sides: 2 gives the paper's sweeps, of five ranges each."""
    n_prompts: int = 100
    """Of the shipped over-rejection test set."""
    batch_size: int = 16
    """Prompts a batch, for transformers; ours keeps its default."""
    sample_ranges: int = 3
    """Ranges of which the two transformers methods are timed."""
    sample_prompts: int = 6
    """Prompts of which the authors' procedure is timed."""
    grid: bool = True
    """Also time the whole grid; by text and in bfloat16 every tenth row only, scaled up."""
    repeats: int = 3
    """Of the plain pass, the unit: the best counts."""
    out: str = "results"


@dataclass(frozen=True)
class Timed:
    """Seconds for all ranges of the sweeps and (where measured) of the grid, and blocks run for them."""

    sweeps: float
    grid: float | None = None
    evaluations: int | None = None
    grid_evaluations: int | None = None
    decisions: dict[str, list[bool]] | None = None
    """By range, for the sampled ranges: which prompts are refused."""


def main(config: BenchConfig) -> Path:
    check_config(config)
    print("measuring a plain pass ...", flush=True)
    unit, n_layers = in_own_process(time_plain_pass, config, "float32")
    unit_bf16, _ = in_own_process(time_plain_pass, config, "bfloat16")
    ranges = ranges_of_sweeps(config, n_layers)
    sampled = spread(ranges, config.sample_ranges)
    difference = in_own_process(largest_logit_difference, config, sampled[0])
    if difference > SAME_LOGITS:
        raise ValueError(f"the methods' logits differ by {difference:.1e}: expected at most {SAME_LOGITS}")
    measured: dict[str, Timed] = {}
    for name in METHODS:
        print(f"measuring {name} ...", flush=True)
        measured[name] = in_own_process(measure, name, config, ranges, sampled)
        print(f"{name}: the sweeps take {measured[name].sweeps / unit:.1f} plain passes", flush=True)
    text = report(measured, unit, unit_bf16, ranges, n_layers)
    metrics = {
        "seconds_of_plain_pass": {"float32": unit, "bfloat16": unit_bf16},
        "measured": measured,
        "largest_logit_difference": difference,
        "agreement": agreement(measured),
        "ranges": [str(layers) for layers in ranges],
        "prompt_hash": prompt_hash(prompts_of(config)),
    }
    return publish_table("bench_locate", config, text, metrics=metrics)


def check_config(config: BenchConfig) -> None:
    counts = ("window", "n_prompts", "batch_size", "sample_ranges", "sample_prompts", "repeats")
    check_at_least(1, **{name: getattr(config, name) for name in counts})
    LayerRange.parse(config.initial)
    check_alpha(config.alpha)
    check_model(model=config.model, out=config.out)


def ranges_of_sweeps(config: BenchConfig, n_layers: int) -> list[LayerRange]:
    """Both sweeps around `initial`; the range that is in both counts once."""
    initial = LayerRange.parse(config.initial).check_inside(n_layers)
    # A measure that is best at `initial` widens no window.
    sweeps = progressive_search(
        lambda layers: float(layers == initial), initial, n_layers=n_layers, window=config.window
    )
    return list(dict.fromkeys(layers for sweep in sweeps for layers in sweep.ranges))


def spread(ranges: Sequence[LayerRange], count: int) -> list[LayerRange]:
    """`count` of them, evenly."""
    places = torch.linspace(0, len(ranges) - 1, min(count, len(ranges))).round().int().tolist()
    return [ranges[place] for place in places]


def prompts_of(config: BenchConfig) -> list[str]:
    return draw("over_rejection:test", config.n_prompts).prompts


# --- transformers -----------------------------------------------------------------------------------------------------


def weights_scaled(model: PreTrainedModel, layers: LayerRange, alpha: float) -> AbstractContextManager[None]:
    """The paper's projection weights of these layers, multiplied while inside."""
    weights = [module.get_parameter("weight") for module in projections(model, layers)]
    return replaced([(weight, weight.data * alpha) for weight in weights])


def time_authors(config: BenchConfig, ranges: Sequence[LayerRange], sampled: Sequence[LayerRange]) -> Timed:
    model, tokenizer = load_transformers(config.model)
    chats = encode_chat(tokenizer, prompts_of(config), "own")
    few = [pad([chat]) for chat in chats[:: max(1, len(chats) // config.sample_prompts)][: config.sample_prompts]]
    answer_greedily(model, few[0], AUTHORS_TOKENS)  # warm-up

    def scaled_copy(layers: LayerRange) -> PreTrainedModel:
        changed = copy.deepcopy(model)
        for module in projections(changed, layers):
            module.weight.data.mul_(config.alpha)
        return changed

    total = 0.0
    for layers in sampled:
        copying, changed = timed(lambda layers=layers: scaled_copy(layers))
        answering, _ = timed(lambda changed=changed: [answer_greedily(changed, one, AUTHORS_TOKENS) for one in few])
        total += copying + answering * len(chats) / len(few)
    return scaled_up(config, total / len(sampled), len(ranges), model)


def time_batched(config: BenchConfig, ranges: Sequence[LayerRange], sampled: Sequence[LayerRange]) -> Timed:
    model, tokenizer = load_transformers(config.model)
    chats = encode_chat(tokenizer, prompts_of(config), "own")
    answer_greedily(model, pad(chats[:4]), JUDGED_TOKENS)  # warm-up

    def decisions(layers: LayerRange) -> list[bool]:
        answers: list[list[int]] = []
        with weights_scaled(model, layers, config.alpha):
            for batch in padded_batches(chats, config.batch_size):
                answers += answer_greedily(model, batch, JUDGED_TOKENS)[:, batch[0].shape[1] :].tolist()
        return [refuses(decode_answer(tokenizer, answer)) for answer in answers]

    seconds, decided = timed(lambda: {str(layers): decisions(layers) for layers in sampled})
    return scaled_up(config, seconds / len(sampled), len(ranges), model, decided)


def scaled_up(
    config: BenchConfig, per_range: float, n_ranges: int, model: Any, decisions: dict[str, list[bool]] | None = None
) -> Timed:
    """The time of all ranges, from that of one."""
    grid = per_range * len(all_ranges(model.config.num_hidden_layers)) if config.grid else None
    return Timed(per_range * n_ranges, grid, decisions=decisions)


def time_plain_pass(config: BenchConfig, dtype: str) -> tuple[float, int]:
    """The unit: one forward pass of transformers over the prompts, all logits, in padded batches; and the layers."""
    model, tokenizer = load_transformers(config.model, dtype)
    batches = list(padded_batches(encode_chat(tokenizer, prompts_of(config), "own"), config.batch_size))

    def one_pass() -> None:
        for tokens, mask in batches:
            model(input_ids=tokens, attention_mask=mask)

    with torch.no_grad():
        return best_time(one_pass, config.repeats), model.config.num_hidden_layers


# --- ours -------------------------------------------------------------------------------------------------------------


def time_ours(
    config: BenchConfig,
    ranges: Sequence[LayerRange],
    sampled: Sequence[LayerRange],
    *,
    text: bool = False,
    dtype: str = "float32",
    every: int = 1,
) -> Timed:
    """By log-odds, or by `text`; of the grid `every` so many rows."""
    model = sm.load_model(config.model, "cpu", dtype)
    phrases = phrases_in_use(model, sm.load_prompts("malicious:test")[:32])  # the warm-up, too

    def measured_anew(part: Sequence[LayerRange]) -> ScaledRanges:
        """A new engine, which has measured these ranges: an old one would look them up."""
        engine = ScaledRanges(model, prompts_of(config), config.alpha, "weights", phrases=phrases)
        for layers in part:
            (engine.refuses if text else engine.log_odds)(layers)
        return engine

    seconds, engine = timed(lambda: measured_anew(ranges))
    decisions = {str(layers): engine.refuses(layers).tolist() for layers in sampled} if text else None
    if not config.grid:
        return Timed(seconds, None, engine.evaluations, None, decisions)
    grid, whole = time_grid(measured_anew, engine.model.cfg.n_layers, every)
    return Timed(seconds, grid, engine.evaluations, whole.evaluations, decisions)


def time_grid(
    measure: Callable[[Sequence[LayerRange]], ScaledRanges], n_layers: int, every: int
) -> tuple[float, ScaledRanges]:
    """Seconds of the whole grid. Of `every` so many rows one is run; its time is scaled up by layer evaluations."""
    cells = [layers for layers in all_ranges(n_layers) if layers.start % every == 0]
    seconds, ran = timed(lambda: measure(cells))
    whole, part = (layer_evaluations(ranges, n_layers)["shared"] for ranges in (all_ranges(n_layers), cells))
    return seconds * whole / part, ran


def all_ranges(n_layers: int) -> list[LayerRange]:
    """Every cell of the (start, end) grid, row by row."""
    return [LayerRange(start, end) for start in range(n_layers) for end in range(start, n_layers)]


METHODS: dict[str, Callable[..., Timed]] = {
    "authors": time_authors,
    "batched": time_batched,
    "text": partial(time_ours, text=True, every=GRID_ROWS),
    "log-odds": time_ours,
    "log-odds bf16": partial(time_ours, dtype="bfloat16", every=GRID_ROWS),
}


def measure(name: str, config: BenchConfig, ranges: Sequence[LayerRange], sampled: Sequence[LayerRange]) -> Timed:
    return METHODS[name](config, ranges, sampled)


# --- comparing --------------------------------------------------------------------------------------------------------


def largest_logit_difference(config: BenchConfig, layers: LayerRange) -> float:
    """Between weights really multiplied and our hooks, on logits after the last token of eight prompts."""
    reference, tokenizer = load_transformers(config.model)
    model = sm.load_model(config.model, "cpu")
    chats = encode_chat(tokenizer, prompts_of(config)[:8], "own")
    with (
        torch.no_grad(),
        weights_scaled(reference, layers, config.alpha),
        sm.scaled(model, layers, config.alpha, "weights"),
    ):
        differences = [model(c.tokens[None])[0, -1] - reference(c.tokens[None]).logits[0, -1] for c in chats]
    return float(torch.stack(differences).abs().max())


def agreement(measured: dict[str, Timed]) -> dict[str, float]:
    """By sampled range: the share of prompts on which batched transformers and our text decide alike."""
    theirs, ours = (pd.DataFrame(measured[name].decisions) for name in ("batched", "text"))
    return (theirs == ours).mean().to_dict()


def report(
    measured: dict[str, Timed], unit: float, unit_bf16: float, ranges: Sequence[LayerRange], n_layers: int
) -> str:
    """Ratios: of the plain pass (float32), and of the two transformers methods."""
    cells = all_ranges(n_layers)
    shares = ", ".join(f"{layers} {share:.0%}" for layers, share in agreement(measured).items())
    lines = [
        f"sweeps: {len(ranges)} ranges; grid: {len(cells)} ranges; unit: one plain float32 pass of transformers",
        ratios(measured, unit),
        f"a plain bfloat16 pass takes {unit_bf16 / unit:.2f} of a float32 one",
        f"batched and text decide alike: {shares}",
    ]
    ours = measured["log-odds"]
    for what, given, count in (("sweeps", ranges, ours.evaluations), ("grid", cells, ours.grid_evaluations)):
        if count is not None:
            cost = layer_evaluations(given, n_layers)
            lines.append(
                f"layer evaluations, {what}: {count} run, {cost['shared']} by the prefix-sharing count, "
                f"{cost['whole']} with whole forwards"
            )
    lines.append(
        f"the grid with prefix sharing: about L^3/6 = {n_layers**3 // 6} instead of L^3/2 = {n_layers**3 // 2}"
    )
    return "\n".join(lines)


def ratios(measured: dict[str, Timed], unit: float) -> str:
    """One line a method; without a grid its two columns are left out."""
    sweeps, grid = (
        pd.Series({name: getattr(it, what) for name, it in measured.items()}, dtype=float)
        for what in ("sweeps", "grid")
    )
    columns = {
        "sweeps / unit": sweeps / unit,
        "authors / it": sweeps["authors"] / sweeps,
        "batched / it": sweeps["batched"] / sweeps,
        "grid / unit": grid / unit,
        "batched / it, a cell": grid["batched"] / grid,
    }
    table = pd.DataFrame(columns).dropna(axis=1)
    table["batched / it"] = table["batched / it"].map("{:.2f}".format)
    return table.to_string(float_format="{:.1f}".format)


if __name__ == "__main__":
    run(main, BenchConfig)
