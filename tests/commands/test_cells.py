"""Cached answers of locators: read again while nothing that they depend on has changed, and only then."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from safety_mech.commands import cells
from safety_mech.commands.cells import Models, base_of, cached_answer
from safety_mech.divergence import onset
from safety_mech.localization import alpha, locators
from safety_mech.localization.measurements import PromptSets
from safety_mech.refusal import text
from safety_mech.reporting import runs

SETS = PromptSets(["Why?"], ["How?"], ["Kill a process"], clusters=["kill"])


@pytest.fixture
def ask(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Ask for an answer; how many were measured so far."""
    shutil.copytree(llama_folder, tmp_path / "model")
    measured = []

    def locate(*_: object) -> dict:
        measured.append(1)
        return {"found": None, "detail": f"answer {len(measured)}", "seconds": 0.0, "n_layers": 4}

    monkeypatch.setattr(cells, "_locate", locate)

    def asked(method: str = "decision", prompts: PromptSets = SETS, base: str | None = None) -> int:
        models = Models(str(tmp_path / "model"), base_name=base)
        answer = cached_answer(method, models, prompts, str(tmp_path / "runs"), "test", method)
        assert answer.found is answer.range is None
        return int(answer.detail.removeprefix("answer "))

    return asked


def test_an_answer_is_measured_once(ask: Callable[..., int]) -> None:
    assert [ask(), ask(), ask("gap"), ask()] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (locators, "DECISION_LEAD", 2),
        (locators, "DECISION_SHARE", 0.2),
        (locators, "DECISION_LEVEL", 0.9),
        (locators, "SAMPLES", 10),
        (alpha, "MAX_DEGENERATE", 0.1),
        (alpha, "ALPHAS_ABOVE", (1.1, 1.2)),
        (text, "JUDGED_TOKENS", 8),
        (onset, "DIFFERENCE_RULE", None),
        (runs, "package_version", lambda package: "0.0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_answer_under_other_constants_or_another_version_is_another(
    ask: Callable[..., int], monkeypatch: pytest.MonkeyPatch, module: object, name: str, value: object
) -> None:
    assert ask() == 1
    with monkeypatch.context() as changed:
        changed.setattr(module, name, value)
        assert ask() == 2
    assert ask() == 1


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"phrases": ("I can't",)}, {"template": "alpaca"}, {"malicious": ["Who?"]}, {"clusters": ["x"]}],
    ids=str,
)
def test_an_answer_on_other_prompts_is_another(ask: Callable[..., int], change: dict) -> None:
    assert [ask(), ask(prompts=replace(SETS, **change)), ask()] == [1, 2, 1]


def test_an_answer_of_another_model_or_base_is_another(
    ask: Callable[..., int], llama_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(llama_folder, tmp_path / "base")
    assert [ask("swap", base=str(base)), ask(base=str(base)), ask()] == [1, 2, 2], "decision does not look at the base"
    with (base / "config.json").open("a") as file:
        file.write("\n")
    assert [ask("swap", base=str(base)), ask(base=str(base))] == [3, 2]
    with (tmp_path / "model" / "config.json").open("a") as file:
        file.write("\n")
    assert ask() == 4


def test_measurements_are_shared_on_equal_prompts_only(llama_folder: Path) -> None:
    models = Models(str(llama_folder))
    measured = models.measurements(SETS)
    assert models.measurements(replace(SETS)) is measured
    assert models.measurements(replace(SETS, seed=1)) is not measured


def test_the_base_of_a_model() -> None:
    assert base_of("smollm2-135m-aligned", "auto") == "smollm2-135m-instruct"
    assert base_of("./mine", "auto") is None
    assert base_of("./mine", "./before") == "./before"
