"""`experiments/benchmarks/locate.py` on a tiny model: the methods do the same work, and the figures add up."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from safety_mech import LayerRange, load_model
from safety_mech.models.loading import load_transformers


@pytest.fixture(scope="module")
def bench(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("benchmarks/locate")


@pytest.fixture
def config(bench: ModuleType, llama_folder: Path, tmp_path: Path) -> Any:
    return bench.BenchConfig(
        model=str(llama_folder),
        initial="1-2",
        window=1,
        n_prompts=6,
        batch_size=4,
        sample_ranges=2,
        sample_prompts=2,
        repeats=1,
        out=str(tmp_path),
    )


@pytest.mark.whole_run
def test_a_run_from_end_to_end(bench: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))
    folder = bench.main(config)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["measured"]) == {"authors", "batched", "text", "log-odds", "log-odds bf16"}
    assert all(part["sweeps"] > 0 and part["grid"] > 0 for part in metrics["measured"].values())
    assert metrics["ranges"] == ["[1, 1]", "[1, 2]", "[1, 3]", "[0, 2]", "[2, 2]"]
    assert set(metrics["agreement"].values()) == {1.0}
    assert metrics["largest_logit_difference"] < 1e-4
    text = (folder / "table.txt").read_text()
    assert all(name in text for name in metrics["measured"])


@pytest.mark.slow
def test_what_is_run_is_what_the_formula_says(bench: ModuleType, config: Any) -> None:
    ranges = bench.ranges_of_sweeps(config, 4)
    timed = bench.time_ours(config, ranges, ranges[:1])
    assert timed.evaluations == bench.layer_evaluations(ranges, 4)["shared"]
    assert timed.grid_evaluations == bench.layer_evaluations(bench.all_ranges(4), 4)["shared"]
    assert timed.evaluations < bench.layer_evaluations(ranges, 4)["whole"]


def test_weights_are_scaled_where_said_and_put_back(bench: ModuleType, llama_folder: Path) -> None:
    model, _ = load_transformers(str(llama_folder))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with bench.weights_scaled(model, LayerRange(1, 2), 1.5):
        changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert len(changed) == 2 * 7
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) and "proj" in name for name in changed)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


@pytest.mark.slow
def test_methods_that_scale_differently_are_told(
    bench: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the check of equal logits can fail."""
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(bench, "projections", lambda *_: [])
    with pytest.raises(ValueError, match="logits differ by"):
        bench.main(config)


@pytest.mark.parametrize("changes", [{"window": 0}, {"initial": "x"}, {"alpha": -1.0}, {"model": "nonsense"}])
def test_bad_input_is_refused_before_anything_is_measured(
    bench: ModuleType, config: Any, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "in_own_process", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"expected|no such"):
        bench.main(replace(config, **changes))


def test_a_range_outside_the_model_is_refused(bench: ModuleType, config: Any) -> None:
    with pytest.raises(ValueError, match="the model has 4 layers"):
        bench.ranges_of_sweeps(replace(config, initial="3-4"), 4)
    assert load_model(config.model).cfg.n_layers == 4
