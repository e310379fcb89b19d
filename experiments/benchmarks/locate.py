"""What does a localisation cost? The authors' procedure, batched transformers, and ours, on the same ranges.

The same model, prompts and ranges in one run; every method runs in a process of its own. Read the RATIOS: seconds
are this machine's. Methods:

- authors: a copied model whose weights are multiplied, one prompt at a time, 16 greedy tokens (a sample, scaled up)
- batched: weights multiplied in place and put back, padded batches, 10 greedy tokens (a sample, scaled up)
- text: ours, R_o from generated text, the `weights` recipe (`ScaledRanges.refuses`)
- log-odds: ours, without generation (`ScaledRanges.log_odds`); in float32 and in bfloat16
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from measuring import Padded, best_time, check_at_least_one, in_own_process, pad_left, padded_batches, timed
from torch import Tensor, nn
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

import safety_mech as sm
from safety_mech.commands.command_line import run
from safety_mech.interventions.scaling import check_alpha
from safety_mech.layers import LayerRange
from safety_mech.localization.range_sweep import ScaledRanges, layer_evaluations
from safety_mech.localization.search import progressive_search
from safety_mech.models.chat import decode_answer, encode_chat
from safety_mech.models.loading import load_transformers
from safety_mech.models.sources import find_source
from safety_mech.prompts import draw, prompt_hash
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, phrases_in_use
from safety_mech.refusal.text import JUDGED_TOKENS, refuses
from safety_mech.reporting.runs import check_writable, write_run

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
    for name, method in METHODS.items():
        print(f"measuring {name} ...", flush=True)
        measured[name] = in_own_process(method, config, ranges, sampled)
        print(f"{name}: the sweeps take {measured[name].sweeps / unit:.1f} plain passes", flush=True)
    text = report(measured, unit, unit_bf16, ranges, n_layers)
    print(text)
    metrics = {
        "seconds_of_plain_pass": {"float32": unit, "bfloat16": unit_bf16},
        "measured": measured,
        "largest_logit_difference": difference,
        "agreement": agreement(measured),
        "ranges": [str(layers) for layers in ranges],
        "prompt_hash": prompt_hash(prompts_of(config)),
    }
    folder = write_run(
        config.out, "bench_locate", config.model, config=config, metrics=metrics, texts={"table.txt": text + "\n"}
    )
    print(f"written: {folder}/ (table.txt, metrics.json, config.json)")
    return folder


def check_config(config: BenchConfig) -> None:
    check_at_least_one(config, "window n_prompts batch_size sample_ranges sample_prompts repeats")
    LayerRange.parse(config.initial)
    check_alpha(config.alpha)
    find_source(config.model)
    check_writable(config.out)


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


def scale_weights(model: PreTrainedModel, layers: LayerRange, alpha: float) -> None:
    """Multiply the paper's projection weights of these layers, in place."""
    for module in projections(model, layers):
        module.weight.data.mul_(alpha)


def projections(model: Any, layers: LayerRange) -> list[nn.Linear]:
    """The paper's seven of every layer of the range (Llama's names)."""
    return [
        getattr(part, name)
        for block in model.model.layers[layers.start : layers.end + 1]
        for part, names in ((block.self_attn, "qkvo"), (block.mlp, ("gate", "up", "down")))
        for name in (f"{letter}_proj" for letter in names)
    ]


@contextmanager
def weights_scaled_in_place(model: PreTrainedModel, layers: LayerRange, alpha: float) -> Iterator[None]:
    changed = projections(model, layers)
    before = [module.weight.data.clone() for module in changed]
    scale_weights(model, layers, alpha)
    try:
        yield
    finally:
        for module, weight in zip(changed, before, strict=True):
            module.weight.data.copy_(weight)


def generate(model: Any, batch: Padded, tokens: int) -> Int[Tensor, "prompt new_pos"]:
    """Greedy answers of a batch that is padded on the left."""
    padded, mask = batch
    found = model.generate(
        padded, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=0, num_beams=1
    )
    return found[:, padded.shape[1] :]


def time_authors(config: BenchConfig, ranges: Sequence[LayerRange], sampled: Sequence[LayerRange]) -> Timed:
    model, tokenizer = load_transformers(config.model)
    chats = encode_chat(tokenizer, prompts_of(config), "own")
    few = [pad_left([chat]) for chat in chats[:: max(1, len(chats) // config.sample_prompts)][: config.sample_prompts]]
    generate(model, few[0], AUTHORS_TOKENS)  # warm-up

    def scaled_copy(layers: LayerRange) -> PreTrainedModel:
        changed = copy.deepcopy(model)
        scale_weights(changed, layers, config.alpha)
        return changed

    total = 0.0
    for layers in sampled:
        copying, changed = timed(lambda layers=layers: scaled_copy(layers))
        answering, _ = timed(lambda changed=changed: [generate(changed, prompt, AUTHORS_TOKENS) for prompt in few])
        total += copying + answering * len(chats) / len(few)
    return scaled_up(config, total / len(sampled), len(ranges), model)


def time_batched(config: BenchConfig, ranges: Sequence[LayerRange], sampled: Sequence[LayerRange]) -> Timed:
    model, tokenizer = load_transformers(config.model)
    chats = encode_chat(tokenizer, prompts_of(config), "own")
    generate(model, pad_left(chats[:4]), JUDGED_TOKENS)  # warm-up

    def decisions(layers: LayerRange) -> list[bool]:
        with weights_scaled_in_place(model, layers, config.alpha):
            answers = [generate(model, batch, JUDGED_TOKENS) for batch in padded_batches(chats, config.batch_size)]
        return [refuses(decode_answer(tokenizer, answer)) for batch in answers for answer in batch.tolist()]

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


def time_text(config: BenchConfig, ranges: Sequence[LayerRange], sampled: Sequence[LayerRange]) -> Timed:
    model = sm.load_model(config.model, "cpu")
    sm.generate(model, prompts_of(config)[:4], JUDGED_TOKENS)  # warm-up

    def measure(part: Sequence[LayerRange]) -> ScaledRanges:
        return measured_anew(config, model, "refuses", part)

    seconds, engine = timed(lambda: measure(ranges))
    decisions = {str(layers): engine.refuses(layers).tolist() for layers in sampled}
    grid = time_grid(measure, engine.model.cfg.n_layers, GRID_ROWS)[0] if config.grid else None
    return Timed(seconds, grid, decisions=decisions)


def time_log_odds(
    config: BenchConfig,
    ranges: Sequence[LayerRange],
    sampled: Sequence[LayerRange],
    dtype: str = "float32",
    every: int = 1,
) -> Timed:
    model = sm.load_model(config.model, "cpu", dtype)
    phrases = phrases_in_use(model, sm.load_prompts("malicious:test")[:32])

    def measure(part: Sequence[LayerRange]) -> ScaledRanges:
        return measured_anew(config, model, "log_odds", part, phrases)

    seconds, engine = timed(lambda: measure(ranges))
    if not config.grid:
        return Timed(seconds, evaluations=engine.evaluations)
    grid, whole = time_grid(measure, engine.model.cfg.n_layers, every)
    return Timed(seconds, grid, engine.evaluations, whole.evaluations)


def time_log_odds_bf16(*arguments: Any) -> Timed:
    return time_log_odds(*arguments, dtype="bfloat16", every=GRID_ROWS)


def measured_anew(
    config: BenchConfig,
    model: HookedTransformer,
    measure: str,
    ranges: Sequence[LayerRange],
    phrases: Sequence[str] = REFUSAL_PHRASES,
) -> ScaledRanges:
    """A new engine, which has measured these ranges: an old one would look them up."""
    engine = ScaledRanges(model, prompts_of(config), config.alpha, "weights", phrases=phrases)
    for layers in ranges:
        getattr(engine, measure)(layers)
    return engine


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
    "text": time_text,
    "log-odds": time_log_odds,
    "log-odds bf16": time_log_odds_bf16,
}


# --- comparing --------------------------------------------------------------------------------------------------------


def largest_logit_difference(config: BenchConfig, layers: LayerRange) -> float:
    """Between weights really multiplied and our hooks, on logits after the last token of eight prompts."""
    reference, tokenizer = load_transformers(config.model)
    model = sm.load_model(config.model, "cpu")
    chats = encode_chat(tokenizer, prompts_of(config)[:8], "own")
    worst = 0.0
    with torch.no_grad(), weights_scaled_in_place(reference, layers, config.alpha):
        for chat in chats:
            wanted = reference(chat.tokens[None]).logits[0, -1]
            with sm.scaled(model, layers, config.alpha, "weights"):
                found = model(chat.tokens[None])[0, -1]
            worst = max(worst, float((found - wanted).abs().max()))
    return worst


def agreement(measured: dict[str, Timed]) -> dict[str, float]:
    """By sampled range: the share of prompts on which batched transformers and our text decide alike."""
    theirs, ours = measured["batched"].decisions, measured["text"].decisions
    assert theirs is not None
    assert ours is not None
    return {
        layers: sum(a == b for a, b in zip(theirs[layers], ours[layers], strict=True)) / len(theirs[layers])
        for layers in theirs
    }


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
    counted = measured["log-odds"].evaluations, measured["log-odds"].grid_evaluations
    for what, given, count in zip(("sweeps", "grid"), (ranges, cells), counted, strict=True):
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
