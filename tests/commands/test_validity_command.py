"""`experiments/validity.py`: the gap under its controls, from one command; what is left of it by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import safety_mech as sm
from safety_mech.commands import validity, validity_run
from safety_mech.divergence.angles import GapStatistic
from safety_mech.divergence.controls import Matched


@pytest.fixture
def config_for(llama_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    for kind in ("normal", "malicious"):
        (tmp_path / f"{kind}.txt").write_text("\n".join(sm.load_prompts(f"{kind}:test")[:24]))

    def make(**changes: object) -> Any:
        settings = {
            "model": str(llama_folder),
            "normal": str(tmp_path / "normal.txt"),
            "malicious": str(tmp_path / "malicious.txt"),
            "n_matched": 3,
            "splits": 20,
            "bootstrap": 30,
            "permutations": 30,
            "out": str(tmp_path / "runs"),
        }
        return validity.ValidityConfig(**{**settings, **changes})

    return make


@pytest.mark.whole_run
def test_every_control_has_a_line(config_for, llama_folder, capsys):
    folder = validity.main(config_for(base=str(llama_folder)))
    metrics = json.loads((folder / "metrics.json").read_text())
    controls = [row["control"] for row in metrics["survival"]]
    assert controls[:6] == [
        "none: the raw gap",
        "shuffled labels",
        "two halves of the harmless topics",
        "one harmless topic against the rest",
        "contrastive pairs",
        "equal length, similar words",
    ]
    assert metrics["survival"][0]["share"]["value"] == 1.0
    base = metrics["survival"][6]  # the model is its own base here: nothing is left, in no draw
    assert base["control"] == "the base's gap"
    assert (base["left"]["value"], base["left"]["low"], base["left"]["high"]) == (0.0, 0.0, 0.0)
    assert controls[-1].startswith("all of them (the least: ")
    assert metrics["matched"]["length_difference"] == 0.0
    assert metrics["matched"]["shared_words"] > metrics["matched"]["shared_words_before"]
    files = {path.name for path in folder.iterdir()}
    assert {"report.html", "controls.png", "table.txt", "tensors.safetensors"} <= files
    raw = metrics["survival"][0]["left"]
    page = (folder / "report.html").read_text("utf-8")
    assert f"Of a raw gap of {raw['value']:.2f} [{raw['low']:.2f}, {raw['high']:.2f}] degrees" in page
    assert "what is left of it there" in capsys.readouterr().out


@pytest.mark.whole_run
def test_without_a_base_the_same_numbers_twice(config_for, llama_adapter):
    def table(**changes: object) -> str:
        return (validity.main(config_for(**changes)) / "table.txt").read_text()

    first = table()
    assert first == table()
    assert "base" not in first
    others = ({"seed": 1}, {"adapter": str(llama_adapter)}, {"dtype": "bfloat16"})
    assert len({first, *(table(**change) for change in others)}) == 4


def curves(gap: float, spread: float, null: float) -> validity_run.ModelCurves:
    """One layer, three draws."""

    def curve(at: float) -> GapStatistic:
        low, middle, high = (torch.tensor([value]).double() for value in (at - spread, at, at + spread))
        draws, shuffled = torch.stack([low, middle, high]), torch.full((5, 1), null).double()
        return GapStatistic(middle, low, high, torch.zeros(1).double(), 0.0, draws, shuffled)

    topics = torch.full((4, 1), 3 * null).double()
    return validity_run.ModelCurves(curve(gap), curve(gap / 2), curve(gap / 4), halves=topics, single=2 * topics)


def test_what_is_left_by_hand():
    rows = validity_run.survivals(curves(8.0, 1.0, 0.5), curves(2.0, 0.0, 0.5), 0)
    left = {row.control: row.left.value for row in rows}
    assert left["none: the raw gap"] == 8.0
    assert left["shuffled labels"] == 7.5
    assert left["two halves of the harmless topics"] == 6.5
    assert left["one harmless topic against the rest"] == 5.0
    assert left["contrastive pairs"] == 4.0
    assert left["equal length, similar words"] == 2.0
    assert left["the base's gap"] == 6.0
    assert left["the base's gap, contrastive pairs"] == 3.0
    assert left["the base's gap, equal length, similar words"] == 1.5
    last = rows[-1]
    assert last.control == "all of them (the least: the base's gap, equal length, similar words)"
    assert last.share.value == pytest.approx(1.5 / 8)
    assert rows[1].left.low < rows[1].left.value < rows[1].left.high


def test_harmless_topics_are_taken_off_at_their_upper_bound():
    many = torch.linspace(0, 1, 1001).double()[:, None]
    rows = validity_run.survivals(replace(curves(8.0, 1.0, 0.5), halves=many), None, 0)
    assert {row.control: row.left.value for row in rows}["two halves of the harmless topics"] == pytest.approx(7.025)


def test_the_statistic_is_that_of_all_controls(config_for, tiny_model, monkeypatch):
    """Every curve and null of `measure` is the one that was asked for, from the same residual streams."""
    generator = torch.Generator().manual_seed(0)
    streams = {}

    def residuals(model: object, prompts: list[str], *_: object, **__: object) -> torch.Tensor:
        for prompt in prompts:
            streams.setdefault(prompt, torch.randn(2, 5, generator=generator))
        return torch.stack([streams[prompt] for prompt in prompts])

    monkeypatch.setattr(sm, "last_token_residuals", residuals)
    sets = validity.check_and_load(config_for())
    matched = Matched(((0, 1), (1, 0), (2, 2)), 0.0, 0.0, 0.0, 0.0)
    found = {
        name: validity_run.measure(tiny_model, sets, matched, config_for(statistic=name))
        for name in ("paper", "symmetric")
    }
    curve = sm.gap_curve(
        *(residuals(None, part) for part in (sets.normal, sets.malicious)), bootstrap=5, permutations=5
    )
    assert torch.equal(found["paper"].raw.gap, curve.gap)
    assert torch.equal(found["symmetric"].raw.gap, curve.symmetric.gap)
    for part in ("pairs", "matched"):
        assert not torch.allclose(getattr(found["paper"], part).gap, getattr(found["symmetric"], part).gap)
    for part in ("halves", "single"):
        assert not torch.allclose(getattr(found["paper"], part), getattr(found["symmetric"], part))
    rows = validity_run.survivals(found["symmetric"], None, 0, "symmetric")
    assert rows[1].control == "spread alone (reflected prompts)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"template": "poem"}, "template 'poem'"),
        ({"splits": 2}, "splits = 2: expected at least 3"),
        ({"normal": "absent.txt"}, "no such file"),
        ({"topics": "dev"}, "split 'dev'"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(config_for, changes, message, monkeypatch):
    monkeypatch.setattr(sm, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        validity.main(config_for(**changes))
