"""How fast are last-token residual streams, and in how much memory? `python experiments/benchmarks/residuals.py`

One run measures, on one model and the same prompts (docs/method.md#prefix-sharing):

    pairs         the paper's code: two one-token generations for each of 3 x 500 pairs, hidden states of all positions
    batched       transformers, `output_hidden_states`, batches padded on the left
    batched-last  the same with logits of the last position only (`logits_to_keep=1`)
    cache         TransformerLens' `run_with_cache`, equal-length batches, weights laid out as TransformerLens does
    ours          `last_token_residuals`
    ours-whole    the same without the shared prefix
    ours-bf16     the same in bfloat16, with the largest change of the gap curve

Each method has a process of its own, is warmed up, and repeated: the best time counts, loading does not. Results
are ratios; a machine's seconds are in metrics.json. Memory is the process's peak resident memory above what it
held before the run (Linux; elsewhere it is left out). How far each method's numbers are from ours is printed
too: a method that computes something else would be no rival.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from measuring import in_own_process, pad_left
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

import safety_mech as sm
from safety_mech.commands.command_line import run
from safety_mech.commands.memory import resident, start_of_peak
from safety_mech.models.chat import ChatTokens, check_context, encode_chat, equal_length_batches
from safety_mech.models.conversion import restore_linear_layout
from safety_mech.models.forward import embed, run_blocks, stack_rest, unembed_last
from safety_mech.models.loading import load_transformers
from safety_mech.models.sources import find_source
from safety_mech.prompts import draw, prompt_hash
from safety_mech.reporting.runs import check_writable, write_run

PAIRS_OF_THE_PAPER = 3 * 500
"""Normal-normal, malicious-malicious and normal-malicious (paper §3.3)."""

WARM_UP = 4
"""Prompts run before anything is measured."""

Residuals = Float[Tensor, "prompt layer d_model"]
Method = Callable[[Sequence[str]], Residuals]


@dataclass(frozen=True)
class BenchConfig:
    """Time and memory of last-token residual streams: the paper's procedure, transformers, TransformerLens, ours."""

    model: str = "smollm2-135m-instruct"
    """A built-in name, a local folder, a .gguf file, or a hub id."""
    template: str = "own"
    """own (the model's chat template), alpaca or alpaca_short."""
    n_prompts: int = 100
    """Prompts of each set: the shipped normal and malicious test sets."""
    sample_pairs: int = 12
    """Pairs of which the per-pair procedure is timed; its time is scaled to 3 x 500."""
    batch_size: int = 16
    """Prompts a batch, for transformers and `run_with_cache`; ours keeps its default."""
    repeats: int = 3
    """The best of this many counts."""
    seed: int = 0
    """Draws the sampled pairs."""
    out: str = "results"


@dataclass(frozen=True)
class Measurement:
    """One method: seconds and peak bytes (None where not measured) of each repeat, and what it computed.

    `array` is the residual streams as numpy, which goes from process to process without shared memory.
    """

    seconds: list[float]
    peak_bytes: list[int | None]
    array: np.ndarray

    @property
    def residuals(self) -> Residuals:
        return torch.from_numpy(self.array)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def peak(self) -> int | None:
        measured = [peak for peak in self.peak_bytes if peak is not None]
        return max(measured, default=None)


@dataclass(frozen=True)
class Line:
    """One method in the table. Times and peaks are ratios; `difference` is relative to ours."""

    time_of_batched: float
    faster_than_pairs: float
    peak_mib: float | None
    peak_of_batched: float | None
    difference: float


@dataclass(frozen=True)
class BenchResult:
    lines: dict[str, Line]
    parts: dict[str, float]
    """Where the time goes: time of one batch, relative to `forward` with TransformerLens' layout."""
    gap: Float[Tensor, " layer"]
    gap_bf16: Float[Tensor, " layer"]
    folder: Path


def main(config: BenchConfig) -> BenchResult:
    check_config(config)
    sets = {name: draw(f"{name}:test", config.n_prompts).prompts for name in ("normal", "malicious")}
    find_source(config.model)
    check_writable(config.out)
    prompts = [*sets["normal"], *sets["malicious"]]
    pairs = sample_pairs(config.n_prompts, config.sample_pairs, config.seed)
    measured = {}
    for name in METHODS:
        print(f"measuring {name} ...", flush=True)
        given = [prompts[index] for pair in pairs for index in pair] if name == "pairs" else prompts
        measured[name] = in_own_process(measure, name, config, given)
    print("measuring where the time goes ...", flush=True)
    seconds_of_parts = in_own_process(time_parts, config, prompts)
    lines = compare(measured, pairs)
    parts = {name: seconds / next(iter(seconds_of_parts.values())) for name, seconds in seconds_of_parts.items()}
    gap, gap_bf16 = (gap_of(measured[name].residuals, config.n_prompts) for name in ("ours", "ours-bf16"))
    text = "\n".join([table(lines), "", table_of_parts(parts), "", sentence_on_bf16(gap, gap_bf16)])
    print(text)
    folder = write_run(
        config.out,
        "bench_residuals",
        config.model,
        config=config,
        metrics={
            "methods": lines,
            "seconds": {name: m.seconds for name, m in measured.items()},
            "peak_bytes": {name: m.peak_bytes for name, m in measured.items()},
            "pairs_scaled_by": PAIRS_OF_THE_PAPER / len(pairs),
            "parts": parts,
            "seconds_of_parts": seconds_of_parts,
            "largest_gap_change_bf16_degrees": (gap_bf16 - gap).abs().max(),
            "prompt_hashes": {name: prompt_hash(given) for name, given in sets.items()},
        },
        tensors={"gap": gap, "gap_bf16": gap_bf16},
        texts={"table.txt": text + "\n"},
    )
    print(f"written: {folder}/ (table.txt, metrics.json, config.json, tensors.safetensors)")
    return BenchResult(lines, parts, gap, gap_bf16, folder)


def check_config(config: BenchConfig) -> None:
    most = min(len(sm.load_prompts(name, "test")) for name in ("normal", "malicious"))
    if not 3 <= config.n_prompts <= most:
        raise ValueError(f"n_prompts = {config.n_prompts}: expected 3 to {most}, the size of the shipped test sets")
    for name in ("sample_pairs", "batch_size", "repeats"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} = {getattr(config, name)}: expected at least 1")


def sample_pairs(n: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Pairs of different prompts, normal-normal, malicious-malicious and normal-malicious in turn.

    Prompts 0..n-1 are the normal ones, n..2n-1 the malicious ones.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for number in range(count):
        first, second = torch.randperm(n, generator=generator)[:2].tolist()
        pairs.append([(first, second), (n + first, n + second), (first, n + second)][number % 3])
    return pairs


# --- the methods: each loads its model, and gives back what is timed --------------------------------------------------


def per_pair(config: BenchConfig) -> Method:
    """The paper's code: one generation of one token a prompt; of two prompts a pair (their cosine costs nothing)."""
    model, tokenizer = load_transformers(config.model)

    def last_states(chat: ChatTokens) -> Float[Tensor, "layer d_model"]:
        output: Any = model.generate(
            chat.tokens[None],
            attention_mask=torch.ones_like(chat.tokens[None]),
            max_new_tokens=1,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        return torch.stack([state[0, -1] for state in output.hidden_states[0][1:]])

    return lambda prompts: torch.stack([last_states(chat) for chat in encode_chat(tokenizer, prompts, config.template)])


def transformers_batched(config: BenchConfig, **forward_options: Any) -> Method:
    """Batches in the given order, padded on the left; logits of all positions, as a plain forward computes them."""
    model, tokenizer = load_transformers(config.model)

    @torch.no_grad()
    def run_all(prompts: Sequence[str]) -> Residuals:
        chats = encode_chat(tokenizer, prompts, config.template)
        batches = [chats[first : first + config.batch_size] for first in range(0, len(chats), config.batch_size)]
        return torch.cat([_last_states(model, *pad_left(batch), **forward_options) for batch in batches])

    return run_all


def _last_states(
    model: PreTrainedModel, tokens: Int[Tensor, "prompt pos"], mask: Int[Tensor, "prompt pos"], **options: Any
) -> Residuals:
    """A function of its own, so that one batch's states are gone before the next batch."""
    output = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True, **options)
    return torch.stack([state[:, -1] for state in output.hidden_states[1:]], dim=1)


def run_with_cache(config: BenchConfig) -> Method:
    """TransformerLens as it comes: everything is cached, the last token's residual streams are picked out."""
    model = sm.load_model(config.model, "cpu")
    tokenizer: Any = model.tokenizer
    lay_out_as_transformer_lens(model)

    @torch.no_grad()
    def run_all(prompts: Sequence[str]) -> Residuals:
        chats = encode_chat(tokenizer, prompts, config.template)
        last = torch.empty(len(chats), model.cfg.n_layers, model.cfg.d_model)
        lengths = [len(chat) for chat in chats]
        for rows in equal_length_batches(lengths, config.batch_size * max(lengths)):
            for few in (rows[first : first + config.batch_size] for first in range(0, len(rows), config.batch_size)):
                last[few] = _last_of_cache(model, stack_rest(model, chats, few, 0))
        return last

    return run_all


def _last_of_cache(model: HookedTransformer, tokens: Int[Tensor, "prompt pos"]) -> Residuals:
    _, cache = model.run_with_cache(tokens)
    return torch.stack([cache["resid_post", layer][:, -1] for layer in range(model.cfg.n_layers)], dim=1)


def lay_out_as_transformer_lens(model: HookedTransformer) -> None:
    """Undo `restore_linear_layout`: every weight contiguous in the shape that TransformerLens gives it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()


def ours(config: BenchConfig, dtype: str = "float32", share_prefix: bool = True) -> Method:
    model = sm.load_model(config.model, "cpu", dtype)
    return lambda prompts: sm.last_token_residuals(model, prompts, config.template, share_prefix=share_prefix)


METHODS: dict[str, Callable[[BenchConfig], Method]] = {
    "pairs": per_pair,
    "batched": transformers_batched,
    "batched-last": lambda config: transformers_batched(config, logits_to_keep=1),
    "cache": run_with_cache,
    "ours": ours,
    "ours-whole": lambda config: ours(config, share_prefix=False),
    "ours-bf16": lambda config: ours(config, dtype="bfloat16"),
}


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, config: BenchConfig, prompts: Sequence[str]) -> Measurement:
    """Load, warm up, then time every repeat and watch its memory."""
    method = METHODS[name](config)
    residuals = method(prompts[:WARM_UP])
    seconds, peaks = [], []
    for _ in range(config.repeats):
        del residuals
        held = start_of_peak()
        start = time.perf_counter()
        residuals = method(prompts)
        seconds.append(time.perf_counter() - start)
        peaks.append(None if held is None else resident("VmHWM") - held)
    return Measurement(seconds, peaks, residuals.float().numpy())


def time_parts(config: BenchConfig, prompts: Sequence[str]) -> dict[str, float]:
    """Best time of one batch, for both layouts of the weights and for what is unembedded.

    The batch is `batch_size` prompts, cut to the shortest: only its shape matters here.
    """
    model = sm.load_model(config.model, "cpu")
    tokenizer: Any = model.tokenizer
    chats = encode_chat(tokenizer, prompts[: config.batch_size], config.template)
    check_context(chats, model.cfg.n_ctx)
    tokens = torch.stack([chat.tokens[: min(map(len, chats))] for chat in chats])
    parts: dict[str, Callable[[], Tensor]] = {
        "all logits": lambda: model(tokens),
        "last logits": lambda: unembed_last(model, run_blocks(model, embed(model, tokens))),
        "no logits": lambda: run_blocks(model, embed(model, tokens)),
    }
    layouts = {"TransformerLens layout": lay_out_as_transformer_lens, "restored layout": restore_linear_layout}
    best: dict[str, float] = {}
    with torch.no_grad():
        for layout, lay_out in layouts.items():
            lay_out(model)
            for part, call in parts.items():
                best[f"{layout}, {part}"] = best_time(call, config.repeats)
    return best


def best_time(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call, after one that does not count."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(measured: dict[str, Measurement], pairs: Sequence[tuple[int, int]]) -> dict[str, Line]:
    """Times relative to `batched` and to `pairs` scaled to 3 x 500, peaks relative to `batched`."""
    seconds = {name: m.best for name, m in measured.items()}
    seconds["pairs"] *= PAIRS_OF_THE_PAPER / len(pairs)
    in_pairs = [index for pair in pairs for index in pair]
    reference = measured["ours"].residuals
    lines = {}
    for name, m in measured.items():
        expected = reference[in_pairs] if name == "pairs" else reference
        lines[name] = Line(
            time_of_batched=seconds[name] / seconds["batched"],
            faster_than_pairs=seconds["pairs"] / seconds[name],
            peak_mib=None if m.peak is None else m.peak / 2**20,
            peak_of_batched=ratio(m.peak, measured["batched"].peak),
            difference=largest_difference(m.residuals, expected),
        )
    return lines


def ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def largest_difference(residuals: Residuals, expected: Residuals) -> float:
    """Largest |x - ours| / |ours| over prompts and layers.

    The last layer is left out: transformers gives its state after the final norm.
    """
    inner, wanted = residuals[:, :-1].float(), expected[:, :-1]
    return float(((inner - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def gap_of(residuals: Residuals, n_normal: int) -> Float[Tensor, " layer"]:
    """The gap curve in degrees; its interval and test are not wanted here."""
    return sm.gap_curve(residuals[:n_normal], residuals[n_normal:], bootstrap=100, permutations=100).gap


def table(lines: dict[str, Line]) -> str:
    titles = f"{'time / batched':>16}{'pairs / time':>14}{'peak (MiB)':>12}{'peak / batched':>16}{'differs by':>12}"
    rows = [
        f"{name:<14}{line.time_of_batched:>16.2f}{line.faster_than_pairs:>14.1f}"
        f"{number(line.peak_mib, 0):>12}{number(line.peak_of_batched, 2):>16}{line.difference:>12.0e}"
        for name, line in lines.items()
    ]
    return "\n".join([f"{'method':<14}{titles}", *rows])


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table_of_parts(parts: dict[str, float]) -> str:
    head = f"{'where the time goes: one batch':<38}{'time / first':>14}"
    return "\n".join([head, *(f"{name:<38}{value:>14.2f}" for name, value in parts.items())])


def sentence_on_bf16(gap: Float[Tensor, " layer"], gap_bf16: Float[Tensor, " layer"]) -> str:
    change = (gap_bf16 - gap).abs()
    layer = int(change.argmax())
    return (
        f"bfloat16 changes the gap curve by at most {float(change[layer]):.3f} degrees (layer {layer}); "
        f"its peak is {float(gap.max()):.2f} degrees"
    )


if __name__ == "__main__":
    run(main, BenchConfig)
