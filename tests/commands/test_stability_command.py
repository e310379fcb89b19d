"""`experiments/stability.py`: locate again with other prompts and templates; overlaps by hand; resumable."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import safety_mech as sm
from safety_mech.commands import stability, stability_run
from safety_mech.commands.cells import Answer
from safety_mech.localization.measurements import Located, PromptSets

pytestmark = pytest.mark.usefixtures("short_alpha_curve")


@pytest.fixture
def config_for(llama_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(**changes: object) -> Any:
        settings = {
            "model": str(llama_folder),
            "methods": ("gap", "margin_attn", "patching"),
            "n_prompts": 12,
            "n_over_rejection": 4,
            "halvings": 2,
            "out": str(tmp_path / "runs"),
        }
        return stability.StabilityConfig(**{**settings, **changes})

    return make


@pytest.mark.whole_run
def test_every_method_at_every_place_and_not_twice(config_for, llama_adapter, tmp_path, monkeypatch):
    folder = stability.main(config_for())
    metrics = json.loads((folder / "metrics.json").read_text())
    assert len(metrics["answers"]) == 3 * (1 + 1 + 4)
    compared = [row["comparison"] for row in metrics["overlaps"] if row["method"] == "margin_attn"]
    assert compared == ["bootstrap of the prompts", "disjoint halves", "templates"]
    monkeypatch.setattr(sm, "load_model", lambda *_, **__: pytest.fail("located again"))
    again = stability.main(config_for())
    assert (again / "table.txt").read_text() == (folder / "table.txt").read_text()
    assert "from disjoint halves of the prompts" in (again / "report.html").read_text("utf-8")
    (tmp_path / "words.txt").write_text("\n".join(sm.load_prompts("over_rejection:test")[:4]))
    words = str(tmp_path / "words.txt")
    for change in ({"seed": 1}, {"adapter": str(llama_adapter)}, {"over_rejection": words}, {"n_over_rejection": 3}):
        with pytest.raises(pytest.fail.Exception, match="located again"):
            stability.main(config_for(**change))


def test_halves_are_disjoint_and_whole():
    prompts = PromptSets([f"n{i}" for i in range(9)], [f"m{i}" for i in range(8)])
    first, second = (stability_run.half_of(prompts, 3, side) for side in (0, 1))
    assert sorted([*first.normal, *second.normal]) == sorted(prompts.normal)
    assert not set(first.malicious) & set(second.malicious)
    assert stability_run.half_of(prompts, 4, 0).normal != first.normal


def test_overlaps_by_hand():
    def located(start: int, end: int, samples: Counter | None = None) -> Answer:
        found = Located("m", sm.LayerRange(start, end), torch.zeros(9).double(), samples or Counter())
        return Answer(found, "", 1.0, 9)

    places = ("set a b", "set c d", "template alpaca", "half 1a", "half 1b", "half 2a", "half 2b")
    drawn = Counter({sm.LayerRange(0, 3): 2, sm.LayerRange(2, 5): 1})
    found = [
        located(0, 3, drawn),
        located(2, 5),
        Answer(None, "", 1.0, 9),
        located(1, 2),
        located(1, 2),
        located(0, 0),
        located(5, 5),
    ]
    answers = dict(zip(places, found, strict=True))
    rows = {row.comparison: row for row in stability_run.overlaps("m", answers)}
    assert rows["bootstrap of the prompts"].iou.value == pytest.approx((1 + 2 / 6 + 2 / 6) / 3)
    assert rows["bootstrap of the prompts"].answers == ("[0, 3] x2", "[2, 5] x1")
    assert rows["disjoint halves"].iou.value == 0.5
    assert rows["prompt sets"].iou.value == pytest.approx(2 / 6)
    assert rows["templates"].iou.value == 0.0  # no answer overlaps with nothing
    assert rows["templates"].answers == ("[0, 3] x1", "none x1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("magic",)}, "method 'magic': expected some of"),
        ({"normal_sets": ("normal:test", "normal:train")}, "2 normal and 1 malicious sets"),
        ({"n_prompts": 3}, "n_prompts = 3: expected at least 8"),
        ({"templates": ("poem",)}, "template 'poem'"),
        ({"malicious_sets": ("absent.csv",)}, "no such file"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(config_for, changes, message, monkeypatch):
    monkeypatch.setattr(sm, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        stability.main(config_for(**changes))
