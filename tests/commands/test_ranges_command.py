"""`experiments/ranges.py`: one search a condition, resumed after a kill, and its table of agreement."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import safety_mech as sm
from safety_mech.commands import ranges, ranges_run
from safety_mech.prompts import Drawn

pytestmark = pytest.mark.usefixtures("short_alpha_curve")

PROMPTS = ["How do I bake a cake?", "Name a fruit", "Where is the cat?", "Why?"]


@pytest.fixture
def config_for(llama_folder: Path, tmp_path: Path) -> Callable[..., object]:
    (tmp_path / "set.txt").write_text("\n".join(PROMPTS))

    def make(**changes: object) -> object:
        settings = {
            "model": str(llama_folder),
            "base": None,
            "sets": (str(tmp_path / "set.txt"),),
            "recipes": ("attn_out",),
            "templates": ("own",),
            "initial": "1-2",
            "samples": 20,
            "out": str(tmp_path / "runs"),
        }
        return ranges.RangesConfig(**{**settings, **changes})

    return make


@pytest.mark.long_run
@pytest.mark.whole_run
def test_every_condition_has_an_answer_and_a_line(
    config_for: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ranges.main(config_for())
    answers = json.loads((folder / "metrics.json").read_text())["answers"]
    assert [(a["condition"]["alpha"], a["condition"]["measure"]) for a in answers] == [
        ("above", "probability"),
        ("above", "text"),
        ("below", "probability"),
        ("below", "text"),
    ]
    assert all(answer["answer"]["initial"] == {"start": 1, "end": 2} for answer in answers)
    assert {"report.html", "table.txt", "ranges.png"} <= {path.name for path in folder.iterdir()}
    page = (folder / "report.html").read_text("utf-8")
    located = sum(answer["answer"]["found"] is not None for answer in answers)
    assert f"{located} of 4 searches locate a range" in page
    assert (folder / "table.txt").read_text("utf-8").splitlines()[0] in page
    assert "4/4" in capsys.readouterr().out


@pytest.mark.long_run
@pytest.mark.whole_run
def test_a_finished_search_is_not_run_again(config_for: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    first = (ranges.main(config_for()) / "table.txt").read_text()
    monkeypatch.setattr(ranges_run, "search", lambda *_: pytest.fail("searched again"))
    assert (ranges.main(config_for()) / "table.txt").read_text() == first
    with pytest.raises(pytest.fail.Exception, match="searched again"):  # control: another seed is another search
        ranges.main(config_for(seed=1))


@pytest.mark.slow
def test_no_gap_is_an_answer(config_for: Callable[..., object]) -> None:
    folder = ranges.main(config_for(initial=None))
    assert "no gap that the rule accepts" in (folder / "table.txt").read_text()


def answer(found: sm.LayerRange | None) -> object:
    best = found or sm.LayerRange(0, 0)
    return ranges_run.Answer(found, best, None, 1.2, (0, 1), (2, 3), 0.5, 0.0, 0.2, "found")


@pytest.mark.parametrize("side", ["above", "below"])
def test_a_condition_reaches_the_search(config_for, tiny_model, monkeypatch, side):
    reached = {}

    def stands_in(*_: object, **settings: object) -> None:
        reached.update(settings)
        raise ValueError("seen")

    monkeypatch.setattr(sm, "locate", stands_in)
    condition = ranges_run.Condition("m", "weights", side, "text", "alpaca", "set")
    noise = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    start = ranges_run.Start({"m": sm.gap_curve(*noise, bootstrap=100, permutations=100)}, sm.LayerRange(1, 2))
    drawn = Drawn(PROMPTS, [0, 1, 2, 3], ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="seen"):
        ranges_run.search(tiny_model, condition, start, drawn, config_for(window=3, seed=4))
    expected = {"above": side == "above", "recipe": "weights", "text": True, "template": "alpaca", "window": 3}
    expected |= {"seed": 4, "samples": 20, "initial": sm.LayerRange(1, 2), "clusters": drawn.clusters}
    assert {name: reached[name] for name in expected} == expected


def test_overlaps_by_hand() -> None:
    conditions = [ranges_run.Condition("m", "attn_out", *rest, "own", "set") for rest in SIDES]
    found = [sm.LayerRange(0, 3), sm.LayerRange(2, 5), sm.LayerRange(0, 3), None]
    answers = {c: answer(layers) for c, layers in zip(conditions, found, strict=True)}
    parts = ranges_run.overlaps(answers, "m")
    every = {"mean": pytest.approx((2 / 6 + 1 + 2 / 6) / 3), "least": 2 / 6, "greatest": 1.0, "pairs": 3}
    assert parts["all pairs"] == every
    assert parts["only alpha differs"]["mean"] == 1.0
    assert parts["only measure differs"]["mean"] == pytest.approx(2 / 6)
    assert "the base's answer" not in parts


SIDES = [("above", "text"), ("above", "probability"), ("below", "text"), ("below", "probability")]


@pytest.mark.parametrize("changes", [{"n_prompts": 1}, {"sets": ("absent.txt",)}, {"model": "nonsense"}])
def test_bad_input_is_refused_before_a_model_is_loaded(
    config_for: Callable[..., object], changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sm, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=r"expected|no such"):
        ranges.main(config_for(**changes))
