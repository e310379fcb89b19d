"""`experiments/benchmarks/residuals.py` on a tiny model: all methods compute the same residual streams."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.mark.whole_run
def test_a_run_from_end_to_end(
    load_script: Callable[[str], ModuleType], llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load_script("benchmarks/residuals")
    monkeypatch.setattr(bench, "in_own_process", lambda function, *arguments: function(*arguments))
    folder = bench.main(
        bench.BenchConfig(
            str(llama_folder), "alpaca", n_prompts=4, sample_pairs=3, batch_size=3, repeats=1, seed=1, out=str(tmp_path)
        )
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["methods"]) == set(bench.METHODS)
    assert all(line["time_of_batched"] > 0 for line in metrics["methods"].values())
    same = {name: line["difference"] for name, line in metrics["methods"].items() if name != "ours-bf16"}
    assert max(same.values()) < 1e-5
    assert metrics["methods"]["ours-bf16"]["difference"] > 1e-4, "control: another number format differs"
    assert metrics["pairs_scaled_by"] == 500
    text = (folder / "table.txt").read_text()
    assert all(name in text for name in bench.METHODS)
