"""`experiments/benchmarks/finetune.py` on a tiny model: all variants train on the same batches, and that is checked."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from safety_mech.commands.memory import start_of_peak


@pytest.fixture
def bench(load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load_script("benchmarks/finetune")
    monkeypatch.setattr(module, "in_own_process", lambda function, *arguments: function(*arguments))
    return module


@pytest.fixture
def config(bench: ModuleType, llama_folder: Path, tmp_path: Path) -> Any:
    return bench.BenchConfig(model=str(llama_folder), steps=2, batch_size=2, out=str(tmp_path))


@pytest.mark.whole_run
def test_a_run_from_end_to_end(bench: ModuleType, config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    measured = bench.main(config)
    assert set(measured) == set(bench.VARIANTS)
    assert all(one.seconds_per_step > 0 for one in measured.values())
    losses = [one.first_loss for one in measured.values()]
    assert max(losses) - min(losses) < 1e-4
    assert all(name in capsys.readouterr().out or name in bench.table(measured) for name in bench.VARIANTS)


@pytest.mark.whole_run
def test_variants_that_do_other_work_are_told(bench: ModuleType, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: the check of equal losses can fail."""
    monkeypatch.setattr(bench, "in_order", lambda examples, config: [[5, 4], [3, 2], [1, 0]])
    with pytest.raises(ValueError, match="do not do the same work"):
        bench.main(config)


@pytest.mark.whole_run
def test_another_seed_and_bfloat16_start_from_other_losses(bench: ModuleType, config: Any) -> None:
    losses = [
        bench.measure("ours full", replace(config, **changes)).first_loss
        for changes in ({}, {}, {"seed": 1}, {"bfloat16": True})
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


@pytest.mark.slow
def test_the_middle_third(bench: ModuleType) -> None:
    layers = bench.middle_third(30)
    assert (layers.start, layers.end) == (10, 19)
    assert start_of_peak() is None or start_of_peak() > 0
