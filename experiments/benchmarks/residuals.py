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
held before the run (Linux only). How far each method's numbers are from ours is printed too: a method that computes
something else would be no rival.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from measuring import answer_greedily, best_time, in_own_process, pad, padded_batches, timed
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedModel

import safety_mech as sm
from safety_mech.commands.checks import check_at_least, check_model
from safety_mech.commands.command_line import run
from safety_mech.commands.memory import peak_since, start_of_peak
from safety_mech.commands.publish import publish_table
from safety_mech.models.chat import ChatTokens, check_context, encode_chat, equal_length_batches, tokenizer_of
from safety_mech.models.conversion import restore_linear_layout
from safety_mech.models.forward import embed, run_blocks, stack_rest, unembed_last
from safety_mech.models.loading import load_transformers
from safety_mech.prompts import draw, prompt_hash

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

    `residuals` are numpy's, which go from process to process without shared memory.
    """

    seconds: list[float]
    peak_bytes: list[int | None]
    residuals: Float[np.ndarray, "prompt layer d_model"]


def main(config: BenchConfig) -> Path:
    check_config(config)
    sets = {name: draw(f"{name}:test", config.n_prompts).prompts for name in ("normal", "malicious")}
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
    return publish_table(
        "bench_residuals",
        config,
        text,
        metrics={
            "methods": lines.to_dict("index"),
            "seconds": {name: m.seconds for name, m in measured.items()},
            "peak_bytes": {name: m.peak_bytes for name, m in measured.items()},
            "pairs_scaled_by": PAIRS_OF_THE_PAPER / len(pairs),
            "parts": parts,
            "seconds_of_parts": seconds_of_parts,
            "largest_gap_change_bf16_degrees": (gap_bf16 - gap).abs().max(),
            "prompt_hashes": {name: prompt_hash(given) for name, given in sets.items()},
        },
        tensors={"gap": gap, "gap_bf16": gap_bf16},
    )


def check_config(config: BenchConfig) -> None:
    most = min(len(sm.load_prompts(name, "test")) for name in ("normal", "malicious"))
    if not 3 <= config.n_prompts <= most:
        raise ValueError(f"n_prompts = {config.n_prompts}: expected 3 to {most}, the size of the shipped test sets")
    check_at_least(1, sample_pairs=config.sample_pairs, batch_size=config.batch_size, repeats=config.repeats)
    check_model(model=config.model, template=config.template, out=config.out)


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
        output = answer_greedily(model, pad([chat]), 1, output_hidden_states=True, return_dict_in_generate=True)
        return torch.stack([state[0, -1] for state in output.hidden_states[0][1:]])

    return lambda prompts: torch.stack([last_states(chat) for chat in encode_chat(tokenizer, prompts, config.template)])


def transformers_batched(config: BenchConfig, **forward_options: Any) -> Method:
    """Batches in the given order, padded on the left; logits of all positions, as a plain forward computes them."""
    model, tokenizer = load_transformers(config.model)

    @torch.no_grad()
    def run_all(prompts: Sequence[str]) -> Residuals:
        batches = padded_batches(encode_chat(tokenizer, prompts, config.template), config.batch_size)
        return torch.cat([_last_states(model, *batch, **forward_options) for batch in batches])

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
    lay_out_as_transformer_lens(model)

    @torch.no_grad()
    def run_all(prompts: Sequence[str]) -> Residuals:
        chats = encode_chat(tokenizer_of(model), prompts, config.template)
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
        before = start_of_peak()
        took, residuals = timed(lambda: method(prompts))
        seconds.append(took)
        peaks.append(peak_since(before))
    return Measurement(seconds, peaks, residuals.float().numpy())


def time_parts(config: BenchConfig, prompts: Sequence[str]) -> dict[str, float]:
    """Best time of one batch, for both layouts of the weights and for what is unembedded.

    The batch is `batch_size` prompts, cut to the shortest: only its shape matters here.
    """
    model = sm.load_model(config.model, "cpu")
    chats = encode_chat(tokenizer_of(model), prompts[: config.batch_size], config.template)
    check_context(chats, model.cfg.n_ctx)
    tokens = torch.stack([chat.tokens[: min(map(len, chats))] for chat in chats])
    parts = {
        "all logits": lambda: model(tokens),
        "last logits": lambda: unembed_last(model, run_blocks(model, embed(model, tokens))),
        "no logits": lambda: run_blocks(model, embed(model, tokens)),
    }
    layouts = {"TransformerLens layout": lay_out_as_transformer_lens, "restored layout": restore_linear_layout}
    best = {}
    with torch.no_grad():
        for layout, lay_out in layouts.items():
            lay_out(model)
            for part, call in parts.items():
                best[f"{layout}, {part}"] = best_time(call, config.repeats)
    return best


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(measured: dict[str, Measurement], pairs: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Times relative to `batched` and to `pairs` scaled to 3 x 500, peaks relative to `batched`, and how far each
    method's numbers are from ours (relative). One row a method."""
    seconds = pd.DataFrame({name: m.seconds for name, m in measured.items()}).min()
    seconds["pairs"] *= PAIRS_OF_THE_PAPER / len(pairs)
    peak = pd.DataFrame({name: m.peak_bytes for name, m in measured.items()}, dtype=float).max()
    expected = dict.fromkeys(measured, measured["ours"].residuals)
    expected["pairs"] = expected["pairs"][[index for pair in pairs for index in pair]]
    columns = {
        "time_of_batched": seconds / seconds["batched"],
        "faster_than_pairs": seconds["pairs"] / seconds,
        "peak_mib": peak / 2**20,
        "peak_of_batched": peak / peak["batched"],
        "difference": {name: largest_difference(m.residuals, expected[name]) for name, m in measured.items()},
    }
    return pd.DataFrame(columns)


def largest_difference(residuals: np.ndarray, expected: np.ndarray) -> float:
    """Largest |x - ours| / |ours| over prompts and layers.

    The last layer is left out: transformers gives its state after the final norm.
    """
    inner, wanted = residuals[:, :-1], expected[:, :-1]
    return float((np.linalg.norm(inner - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)).max())


def gap_of(residuals: np.ndarray, n_normal: int) -> Float[Tensor, " layer"]:
    """The gap curve in degrees; its interval and test are not wanted here."""
    normal, malicious = torch.from_numpy(residuals).tensor_split([n_normal])
    return sm.gap_curve(normal, malicious, bootstrap=100, permutations=100).gap


def table(lines: pd.DataFrame) -> str:
    formats = {"time / batched": ".2f", "pairs / time": ".1f", "peak (MiB)": ".0f", "peak / batched": ".2f"}
    formatters = [f"{{:{form}}}".format for form in (*formats.values(), ".0e")]
    return lines.set_axis([*formats, "differs by"], axis=1).to_string(formatters=formatters)


def table_of_parts(parts: dict[str, float]) -> str:
    times = pd.DataFrame({"time / first": parts})
    return times.rename_axis(columns="where the time goes: one batch").to_string(float_format="{:.2f}".format)


def sentence_on_bf16(gap: Float[Tensor, " layer"], gap_bf16: Float[Tensor, " layer"]) -> str:
    change = (gap_bf16 - gap).abs()
    layer = int(change.argmax())
    return (
        f"bfloat16 changes the gap curve by at most {float(change[layer]):.3f} degrees (layer {layer}); "
        f"its peak is {float(gap.max()):.2f} degrees"
    )


if __name__ == "__main__":
    run(main, BenchConfig)
