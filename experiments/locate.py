"""Where are the safety layers of a model? Run me: `python experiments/locate.py` (or `make locate`).

Measures, layer by layer, how far malicious prompts part from normal ones (paper §3.2), on a prompt set and on
matched pairs, and reads off the initial range (§3.4, step 1).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer_lens import HookedTransformer

import safety_mech as sm
from safety_mech.chat import check_template_name
from safety_mech.command_line import run
from safety_mech.models import check_device, find_source
from safety_mech.prompts import prompt_hash
from safety_mech.results import check_writable, write_run


@dataclass(frozen=True)
class LocateConfig:
    """Find the layers that tell malicious prompts from normal ones."""

    model: str = "smollm2-135m-instruct"
    """A built-in name, a local folder, a .gguf file, or a hub id."""
    adapter: str | None = None
    """A PEFT folder to merge into the model."""
    normal: str = "normal:test"
    """Prompt set: a shipped one, FILE, FILE:COLUMN, or hf:ORG/NAME:SPLIT:COLUMN."""
    malicious: str = "malicious:test"
    """Prompt set, as above."""
    pairs: bool = True
    """Also measure the shipped matched pairs (same frame, one harmful and one harmless)."""
    template: str = "own"
    """own (the model's chat template), alpaca or alpaca_short."""
    device: str | None = None
    dtype: str = "float32"
    """float32, bfloat16 or float16."""
    r: int | None = None
    """Sample this many pairs of each kind, as the paper does (500); default: all pairs."""
    bootstrap: int = 1000
    permutations: int = 1000
    seed: int = 0
    out: str = "results"


@dataclass(frozen=True)
class LocateResult:
    curves: dict[str, sm.GapCurve]
    initial: dict[str, sm.LayerRange | None]
    initial_samples: dict[str, Counter[sm.LayerRange | None]]
    folder: Path


def main(config: LocateConfig) -> LocateResult:
    check_config(config)
    sets = {"prompts": (sm.load_prompts(config.normal), sm.load_prompts(config.malicious))}
    check_sizes(*sets["prompts"])
    if config.pairs:
        twins = sm.load_pairs()
        sets["matched pairs"] = ([twin.normal for twin in twins], [twin.malicious for twin in twins])
    print(f"loading {config.model} ...")
    model = sm.load_model(config.model, config.device, config.dtype, adapter=config.adapter)
    curves = {name: measure(model, *sets[name], paired=name == "matched pairs", config=config) for name in sets}
    initial = {name: sm.initial_range(curve) for name, curve in curves.items()}
    samples = {name: sm.initial_range_samples(curve) for name, curve in curves.items()}
    print(gap_table(curves["prompts"], initial["prompts"]))
    for name, curve in curves.items():
        print(f"{name}: {sentence(curve, initial[name], samples[name])}")
    metrics = {name: curve_metrics(curves[name], initial[name], samples[name]) for name in curves}
    hashes = {
        f"{name} {kind}": prompt_hash(p)
        for name in sets
        for kind, p in zip(("normal", "malicious"), sets[name], strict=True)
    }
    title = f"{config.model}, template {config.template}"
    folder = write_run(
        config.out,
        "locate",
        config.model,
        config=config,
        metrics={
            "curves": metrics,
            "prompt_hashes": hashes,
            "device": str(model.cfg.device),
            "seed": config.seed,
        },
        tensors={
            f"{name}.{part}".replace(" ", "_"): getattr(curve, part)
            for name, curve in curves.items()
            for part in ("gap", "low", "high", "p_values", "samples")
        },
        figures={"gap": sm.plot_gap(curves, initial, title)},
    )
    print(f"written: {folder}/ (gap.png, metrics.json, config.json, tensors.safetensors)")
    return LocateResult(curves, initial, samples, folder)


def check_config(config: LocateConfig) -> None:
    """All that can be refused before a model is loaded."""
    if min(config.bootstrap, config.permutations) < 100:
        raise ValueError("bootstrap and permutations: expected at least 100 each, or the tails are guesses")
    if config.r is not None and config.r < 2:
        raise ValueError(f"r = {config.r}: expected at least 2 pairs of each kind")
    check_template_name(config.template)
    check_device(config.device)
    find_source(config.model, config.adapter)
    check_writable(config.out)


def check_sizes(normal: list[str], malicious: list[str]) -> None:
    if min(len(normal), len(malicious)) < 3:
        raise ValueError(f"{len(normal)} normal and {len(malicious)} malicious prompts: expected at least 3 of each")


def measure(
    model: HookedTransformer, normal: list[str], malicious: list[str], paired: bool, config: LocateConfig
) -> sm.GapCurve:
    residuals = [
        sm.last_token_residuals(model, prompts, config.template, progress=True) for prompts in (normal, malicious)
    ]
    options: dict[str, Any] = {"bootstrap": config.bootstrap, "permutations": config.permutations}
    return sm.gap_curve(residuals[0], residuals[1], paired=paired, r=config.r, seed=config.seed, **options)


def gap_table(curve: sm.GapCurve, initial: sm.LayerRange | None) -> str:
    """One line a layer; layers of the initial range carry a bar."""
    lines = [
        f"{'layer':>5}  {'cos N-N':>8} {'cos N-M':>8} {'cos M-M':>8}  {'gap (deg)':>9}  {'interval':>16}  {'p':>6}"
    ]
    kinds = (curve.normal_normal, curve.normal_malicious, curve.malicious_malicious)
    for layer in range(curve.n_layers):
        cosines = " ".join(f"{float(kind.cosine_mean[layer]):8.4f}" for kind in kinds)
        interval = f"[{float(curve.low[layer]):6.2f}, {float(curve.high[layer]):6.2f}]"
        mark = " |" if initial is not None and layer in initial else ""
        lines.append(
            f"{layer:>5}  {cosines}  {float(curve.gap[layer]):9.2f}  {interval:>16}  {float(curve.p_values[layer]):6.3f}{mark}"
        )
    return "\n".join(lines)


def sentence(curve: sm.GapCurve, initial: sm.LayerRange | None, samples: Counter[sm.LayerRange | None]) -> str:
    peak = int(curve.gap.argmax())
    gap = f"largest gap {float(curve.gap[peak]):.2f} degrees [{float(curve.low[peak]):.2f}, {float(curve.high[peak]):.2f}] at layer {peak}, p over all layers {curve.p_any:.3f}"
    if initial is None:
        return f"{gap}; no initial range: no gap that the rule accepts"
    share = samples[initial] / sum(samples.values())
    return f"{gap}; initial range {initial} (the same in {share:.0%} of bootstrap curves, none in {samples[None] / sum(samples.values()):.0%})"


def curve_metrics(
    curve: sm.GapCurve, initial: sm.LayerRange | None, samples: Counter[sm.LayerRange | None]
) -> dict[str, Any]:
    return {
        "gap": curve.gap,
        "low": curve.low,
        "high": curve.high,
        "p_values": curve.p_values,
        "p_any": curve.p_any,
        "cosine_mean": {
            "normal_normal": curve.normal_normal.cosine_mean,
            "normal_malicious": curve.normal_malicious.cosine_mean,
            "malicious_malicious": curve.malicious_malicious.cosine_mean,
        },
        "initial_range": initial,
        "initial_range_samples": {str(layers): count for layers, count in samples.most_common()},
    }


if __name__ == "__main__":
    run(main, LocateConfig)
