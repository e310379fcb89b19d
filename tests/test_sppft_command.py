"""`experiments/sppft.py` from end to end on a tiny model that refuses: the table, resuming, and what is refused."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import safety_mech as sm
from safety_mech.attacks import implicit_data
from safety_mech.finetune import UNFINISHED
from safety_mech.models import load_model

PAIRS = [
    (f"{prompt} {n}", answer) for n in range(8) for prompt, answer in (("Name a fruit", "A pear."), ("Why?", "No."))
]


@pytest.fixture
def script(
    load_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, refusing_model: Any, prompts: list[str]
) -> ModuleType:
    """With the model, prompts and pairs of these tests; the adapter and the model's name are not looked at."""
    module = load_script("sppft")
    monkeypatch.setattr(module.sm, "load_model", lambda name: copy.deepcopy(refusing_model))
    monkeypatch.setattr(module.sm, "load_prompts", lambda name: list(prompts))
    monkeypatch.setattr(module, "load_instructions", lambda split: PAIRS[:12] if split == "train" else PAIRS[12:])
    for name in ("estimate", "difference"):  # the intervals have tests of their own
        monkeypatch.setattr(module, name, partial(getattr(module, name), draws=20))
    return module


@pytest.fixture
def config_for(script: ModuleType, llama_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(**changes: Any) -> Any:
        settings = {
            "model": str(llama_folder),
            "range": "1-1",
            "attacks": ("normal", "harmful-0.5"),
            "methods": ("full", "sppft", "before", "lisa"),
            "seeds": 2,
            "n_examples": 8,
            "batch_size": 2,
            "learning_rates": (1e-4, 3e-3),
            "doses": (2, 4, 8),
            "answer_tokens": 4,
            "out": str(tmp_path),
        }
        return script.SppftConfig(**{**settings, **changes})

    return make


def numbers_of(folder: Path) -> Any:
    """The run's metrics without what differs from run to run: times, memory, the date."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["environment"]
    for part in [*metrics["cells"], *metrics["rows"].values()]:
        for name in ("seconds_a_step", "peak_bytes", "seconds"):
            part.pop(name, None)
    return metrics


@pytest.mark.whole_run
def test_interrupted_it_goes_on_and_ends_with_the_same_table(
    script: ModuleType, config_for: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {"attacks": ("harmful-0.5",), "methods": ("full", "sppft", "lisa")}
    whole = numbers_of(script.main(config_for(**fewer, out=str(tmp_path / "whole"))))
    run_cell, ran = script.run_cell, []

    def counted(bench: Any, cell: Any, *rest: Any) -> Any:
        ran.append(cell)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return run_cell(bench, cell, *rest)

    monkeypatch.setattr(script, "run_cell", counted)
    config = config_for(**fewer, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        script.main(config)
    again = numbers_of(script.main(config))
    assert len(ran) == 3 * 2 + 1, "the cell that was cut was run twice, and no other"
    assert again == whole
    script.main(config)
    assert len(ran) == 3 * 2 + 1


@pytest.mark.whole_run
def test_the_table_and_the_figure(
    script: ModuleType, config_for: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = script.main(
        config_for(methods=("full", "sppft", "before", "after", "random", "neurons", "lora", "dpo"), seeds=1)
    )
    assert {"report.html", "table.txt", "metrics.json", "dose.png"} <= {path.name for path in folder.iterdir()}
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["rows"]) == 16
    losses = metrics["learning_rates"]["normal"]["held_out_losses"]
    best = min(losses, key=lambda rate: losses[rate]["after"])
    assert metrics["learning_rates"]["normal"]["rate"] == float(best)
    full, frozen = (metrics["rows"][f"normal {name}"] for name in ("full", "sppft"))
    assert full["perplexity"]["value"] != frozen["perplexity"]["value"]
    cells = {(c["attack"], c["method"], c["seed"]): c for c in metrics["cells"]}
    assert cells["normal", "full", 0]["trained_parameters"] > cells["normal", "sppft", 0]["trained_parameters"]
    assert [point["examples"] for point in cells["normal", "full", 0]["doses"]] == [2, 4, 8]
    out = capsys.readouterr().out
    assert "SPPFT minus mean of the controls" in out
    assert (folder / "table.txt").read_text() in out


@pytest.mark.whole_run
def test_the_learning_rate_is_the_best_for_the_task(script: ModuleType, config_for: Callable[..., Any]) -> None:
    bench = script.Bench(script.sm.load_model(""), sm.LayerRange(1, 1), config_for(), Path(config_for().out) / "cells")
    chosen = script.choose_rate(bench, "implicit")
    assert chosen["rate"] == 3e-3  # 1e-4 hardly trains a model in four steps
    assert script.held_out_data(bench, "implicit") == implicit_data(bench.test)
    assert script.held_out_data(bench, "harmful-0.5") == bench.test


def test_attack_data_has_the_size_asked_for(script: ModuleType, config_for: Callable[..., Any]) -> None:
    bench = script.Bench(script.sm.load_model(""), sm.LayerRange(1, 1), config_for(), Path())
    assert [len(script.attack_data(bench, name, 0)) for name in ("normal", "implicit", "backdoor")] == [8, 8, 8]
    mixed = script.attack_data(bench, "harmful-0.5", 0)
    assert (len(mixed), sum(answer.endswith(UNFINISHED) for _, answer in mixed)) == (7, 2)
    assert script.attack_data(bench, "normal", 0) != script.attack_data(bench, "normal", 1)


def test_a_saved_cell_loads_as_it_was_trained(
    script: ModuleType, config_for: Callable[..., Any], tmp_path: Path, llama_folder: Path
) -> None:
    """Twice: a run that was killed between the export and the cell's file leaves the folder, and writes it again."""
    bench = script.Bench(load_model(str(llama_folder)), sm.LayerRange(1, 1), config_for(save=True), tmp_path)
    before = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    for _ in range(2):
        found = script.run_cell(bench, script.Cell("normal", "sppft", 0), 1e-3, tmp_path / "normal-sppft-0-abc.json")
    assert found["steps"] == 4
    saved = load_model(str(tmp_path / "normal-sppft-0-abc"))
    assert all((weight == saved.get_parameter(name)).all() for name, weight in bench.model.named_parameters())
    assert any((weight != bench.start[name]).any() for name, weight in saved.named_parameters()), "control: it trained"
    assert {path.name: path.read_bytes() for path in llama_folder.iterdir()} == before, "the base is left alone"


def test_restoring_is_bit_for_bit(script: ModuleType, config_for: Callable[..., Any]) -> None:
    bench = script.Bench(script.sm.load_model(""), sm.LayerRange(1, 1), config_for(), Path())
    for weight in bench.model.parameters():
        weight.data.add_(1)
    bench.restore()
    assert all((weight == bench.start[name]).all() for name, weight in bench.model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": ("harmful-2",)}, "attack 'harmful-2': expected normal"),
        ({"attacks": ("evil",)}, "attack 'evil': expected normal"),
        ({"methods": ("magic",)}, "method 'magic': expected one of full"),
        ({"seeds": 0}, "seeds = 0"),
        ({"n_examples": 8, "batch_size": 8}, "n_examples = 8 are one step"),
        ({"n_examples": 9, "batch_size": 8, "attacks": ("backdoor",)}, "n_examples = 9 are one step"),  # 4 + 4
        ({"range": "auto"}, "no locate run of"),
        ({"range": "3-9"}, "the model has 4 layers"),
        ({"range": "x"}, "expected START-END"),
        ({"model": "no/such/file.gguf"}, "no/such/file.gguf"),
    ],
)
def test_bad_settings_are_refused(
    script: ModuleType, config_for: Callable[..., Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        script.main(config_for(**changes))


def test_auto_takes_the_newest_range_that_was_located(
    script: ModuleType, config_for: Callable[..., Any], llama_folder: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "locate" / llama_folder.name
    found = {"range": {"start": 1, "end": 2}, "reason": "found"}
    for stamp, search in (("20260101-000000", {**found, "range": {"start": 0, "end": 0}}), ("20260102-000000", found)):
        (runs / stamp).mkdir(parents=True)
        (runs / stamp / "metrics.json").write_text(json.dumps({"search": search}))
    (runs / "20260103-000000").mkdir()
    (runs / "20260103-000000" / "metrics.json").write_text(json.dumps({"search": None}))  # --quick
    assert script.located_range(config_for(range="auto")) == sm.LayerRange(1, 2)
    (runs / "20260104-000000").mkdir()
    nothing = {"search": {"range": None, "reason": "no gap"}}
    (runs / "20260104-000000" / "metrics.json").write_text(json.dumps(nothing))
    with pytest.raises(ValueError, match=r"located no range \(no gap\)"):
        script.located_range(config_for(range="auto"))
