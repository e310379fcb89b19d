"""`experiments/planted.py`: every locator on every organism, resumed after a kill, scored against the truth."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_random_adapter

import safety_mech as sm
from safety_mech.commands import planted, planted_report
from safety_mech.commands.cells import Answer
from safety_mech.localization.measurements import Located
from safety_mech.localization.sufficiency import Transplants
from safety_mech.reporting.runs import write_json

pytestmark = pytest.mark.usefixtures("short_alpha_curve")

METHODS = ("gap", "search", "direction", "patching", "margin_attn", "weight_change", "swap")


def make_organism(layers: sm.LayerRange, seed: int, config: planted.PlantedConfig) -> None:
    """Stands in for align.py: an adapter with random updates of the planted layers, and its recipe."""
    folder = Path(config.adapters) / planted.organism_name(layers, seed)
    save_random_adapter(sm.load_model(config.model), folder, config.model, layers, seed)
    rates = {name: {"count": n, "total": 100} for name, n in (("malicious", 95), ("normal", 2))}
    recipe = {"planted": {"start": layers.start, "end": layers.end}, "seed": seed}
    write_json(folder / "recipe.json", {"base_model": config.model, "recipe": recipe, "aligned": {"refused": rates}})


@pytest.fixture
def config_for(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    monkeypatch.setattr(planted, "train_organism", make_organism)

    def make(**changes: object) -> Any:
        settings = {
            "model": str(llama_folder),
            "adapters": str(tmp_path / "adapters"),
            "design": ("0-1",),
            "held_out": ("2-2",),
            "train": True,
            "methods": METHODS,
            "n_prompts": 12,
            "n_over_rejection": 3,
            "out": str(tmp_path / "runs"),
        }
        return planted.PlantedConfig(**{**settings, **changes})

    return make


@pytest.mark.long_run
@pytest.mark.whole_run
def test_every_locator_on_every_organism(config_for, capsys):
    folder = planted.main(config_for())
    metrics = json.loads((folder / "metrics.json").read_text())
    roles = {(o["planted"]["start"], o["seed"]): o["role"] for o in metrics["organisms"]}
    assert roles == {(0, 0): "design", (0, 1): "held out", (2, 0): "held out", (2, 1): "held out"}
    assert len(metrics["cells"]) == 4 * len(METHODS)
    files = {p.name for p in folder.iterdir()}
    assert {"report.html", "table.txt", "ranges.png", "scores.png", "tensors.safetensors"} <= files
    page = (folder / "report.html").read_text("utf-8")
    assert "On held out organisms the greatest mean IoU is that of " in page
    exact = metrics["summary"]["all"]["weight_change"]  # who has the base sees the planted layers
    assert exact["iou"]["value"] == 1.0
    assert (exact["start_error"], exact["end_error"], exact["centre_hits"]) == (0.0, 0.0, 4)
    assert exact["slope"]["value"] == pytest.approx(1.0)
    assert metrics["summary"]["all"]["middle third"]["organisms"] == 4
    text = capsys.readouterr().out
    for role in ("design", "held out", "all"):
        assert f"{role} organisms: mean" in text


@pytest.mark.whole_run
def test_a_finished_cell_and_a_finished_organism_are_not_made_again(config_for, monkeypatch):
    few = {"methods": ("margin_attn", "weight_change"), "held_out": (), "seeds": (0,)}
    first = (planted.main(config_for(**few)) / "table.txt").read_text()
    monkeypatch.setattr(planted, "train_organism", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(sm, "load_model", lambda *_, **__: pytest.fail("a model was loaded again"))
    assert (planted.main(config_for(**few)) / "table.txt").read_text() == first
    with pytest.raises(pytest.fail.Exception, match="a model was loaded again"):  # control: other prompts, new cells
        planted.main(config_for(**few, n_prompts=13))
    with pytest.raises(pytest.fail.Exception, match="trained again"):
        planted.main(config_for(**{**few, "seeds": (0, 1)}))


@pytest.mark.whole_run
def test_only_the_wanted_roles_are_made_and_measured(config_for):
    folder = planted.main(config_for(roles=("design",), methods=("weight_change",)))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [o["role"] for o in metrics["organisms"]] == ["design"]
    assert [path.name for path in Path(metrics["organisms"][0]["folder"]).parent.iterdir()] == ["planted-0-1-seed0"]


@pytest.mark.whole_run
def test_a_locator_that_cannot_be_run_has_no_answer_and_says_why(config_for):
    folder = planted.main(config_for(methods=("direction",), n_prompts=5, held_out=(), seeds=(0,)))
    (cell,) = json.loads((folder / "metrics.json").read_text())["cells"]
    assert cell["range"] is None
    assert cell["iou"] == 0.0
    assert "5 folds of 5 prompts" in cell["detail"]


@pytest.mark.whole_run
def test_a_slow_method_on_second_seeds_only_is_refused(config_for):
    planted.main(config_for(seeds=(1,), held_out=(), methods=("weight_change",)))
    with pytest.raises(ValueError, match="grid: run on first seeds only, and there are none"):
        planted.main(config_for(train=False, methods=("grid",), first_seed_methods=("grid",)))


def test_slow_methods_are_run_on_first_seeds_only(config_for):
    config = config_for(methods=("gap", "grid"), first_seed_methods=("grid",), seeds=(0, 1))
    assert planted.methods_of(cell("5-10", None, seed=0).organism, config) == ["gap", "grid"]
    assert planted.methods_of(cell("5-10", None, seed=1).organism, config) == ["gap"]


def test_an_organism_at_the_limits_passes():
    organism = cell("5-10", None).organism
    least, most = planted.LEAST_MALICIOUS, planted.MOST_NORMAL
    assert replace(organism, malicious=least, normal=most).passes
    assert not replace(organism, malicious=least - 0.001, normal=most).passes
    assert not replace(organism, malicious=least, normal=most + 0.001).passes


def test_no_organisms(config_for):
    with pytest.raises(ValueError, match="no organism of design, held out, unlisted in"):
        planted.main(config_for(train=False))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("magic",)}, "method 'magic': expected some of gap, search"),
        ({"n_prompts": 0}, "n_prompts = 0: expected at least 1"),
        ({"design": ("5 to 10",)}, "expected START-END"),
        ({"held_out": ("0-1",)}, "in both lists"),
        ({"model": "nonsense"}, "model 'nonsense'"),
        ({"adapters": "shipped"}, "in a folder of yours: name one"),
    ],
)
def test_bad_input_is_refused_before_anything_is_made(config_for, changes, message, monkeypatch):
    monkeypatch.setattr(planted, "train_organism", lambda *_: pytest.fail("an organism was made"))
    with pytest.raises(ValueError, match=message):
        planted.main(config_for(**changes))


# --- the numbers, by hand ---------------------------------------------------------------------------------------------


def cell(truth: str, found: str | None, seed: int = 0, method: str = "m", passes: bool = True):
    role = "design" if seed == 0 else "held out"
    rates = (0.95, 0.02) if passes else (0.5, 0.02)
    organism = planted.Organism(Path(f"o-{truth}-{seed}"), sm.LayerRange.parse(truth), seed, role, *rates)
    located = Located(method, sm.LayerRange.parse(found) if found else None, torch.zeros(30).double())
    answer = Answer(located, "", 1.0, 30)
    return planted_report.Cell(organism, carried_by({organism.planted: 1.0}), method, answer)


def carried_by(shares: dict[sm.LayerRange, float]) -> Transplants:
    table = torch.full((30, 30), torch.nan, dtype=torch.float64)
    for layers, share in shares.items():
        table[layers.start, layers.end] = share
    return Transplants(table, table.clone(), 3.0)


def test_summary_by_hand():
    cells = [
        cell("5-10", "5-10"),
        cell("12-17", "15-20"),
        cell("18-23", None),
        cell("8-21", "0-1", passes=False),
    ]
    row = planted_report.summaries(cells)["design"]["m"]
    assert (row["organisms"], row["answered"], row["centre_hits"]) == (3, 2, 1)  # 17.5 lies behind 17
    assert row["iou"].value == pytest.approx((1 + 3 / 9 + 0) / 3)
    assert (row["start_error"], row["end_error"]) == (1.5, 1.5)
    assert row["sufficient_iou"].value == row["iou"].value, "here, all that was planted is needed"
    assert row["slope"].value == pytest.approx((17.5 - 7.5) / (14.5 - 7.5))
    early = planted_report.summaries([cell("5-10", "2-7"), cell("12-17", "13-18")])["design"]["m"]
    assert early["start_error"] == early["end_error"] == 2.0, "of 3 before and 1 behind"
    guess = planted_report.summaries(cells)["design"]["middle third"]
    assert guess["iou"].value == pytest.approx((1 / 15 + 6 / 10 + 2 / 14) / 3)


def test_the_lead_names_the_best_that_needs_no_base():
    found = {"search": "6-10", "gap": "5-5", "weight_change": "5-10"}
    cells = [cell("5-10", layers, method=method) for method, layers in found.items()]
    lead = planted_report.lead_of(planted_report.summaries(cells))
    assert lead.startswith("On design organisms the greatest mean IoU is that of search: 0.83. To compare: middle")
    assert "that of weight_change: 1.00" in planted_report.lead_of(planted_report.summaries(cells[-1:]))
    assert planted_report.lead_of({}).startswith("No organism refuses")


def test_seeds_of_one_range_are_drawn_together():
    once = [cell(truth, found) for truth, found in (("5-10", "5-10"), ("12-17", "1-2"), ("20-26", "20-23"))]
    twice = [*once, *(replace(c, organism=replace(c.organism, seed=1, role="held out")) for c in once)]
    assert planted_report.summary_of(twice)["m"]["iou"] == planted_report.summary_of(once)["m"]["iou"]


def test_a_sufficient_range_that_is_less_than_what_was_planted():
    found = cell("5-10", "9-10")
    shares = {sm.LayerRange(9, 9): 0.7, sm.LayerRange(9, 10): 0.8, sm.LayerRange(5, 10): 1.0}
    narrow = replace(found, transplants=carried_by(shares))
    assert (narrow.score.iou, narrow.sufficient_iou) == (pytest.approx(2 / 6), 1.0)
    assert replace(found, transplants=None).sufficient_iou == 0.0
    (line,) = [line for line in planted_report.organism_table([narrow]).splitlines() if line.startswith("o-5-10-0")]
    assert line.split("%", 2)[2].split() == ["[9,", "10]", "[5,", "10]", "9", "(70%", "of", "3.0", "nats)"]
    table = planted_report.summary_of([narrow])
    assert table["sufficient 80%"]["iou"].value == pytest.approx(2 / 6)
    assert table["sufficient 95%"]["iou"].value == 1.0
    assert planted_report.summary_of([replace(found, transplants=None)])["sufficient 80%"]["iou"].value == 0.0


def test_a_method_that_was_not_run_on_an_organism_leaves_a_hole():
    cells = [
        cell("5-10", "5-10", method="a"),
        cell("5-10", "5-10", method="b"),
        cell("12-17", "12-17", method="a"),
    ]
    rows = {line.split()[0]: line for line in planted_report.cell_table(cells).splitlines()}
    assert rows["a"].count("1.00") == 2
    assert rows["b"].count("1.00") == 1
    assert planted_report.summary_of(cells)["b"]["organisms"] == 1
    assert sum(ax.get_visible() for ax in planted_report.plot_scores(cells).axes) == 3


def test_one_answer_for_all_has_slope_0():
    row = planted_report.summary_of([cell(truth, "10-17") for truth in ("5-10", "12-17", "18-23")])["m"]
    assert row["slope"].value == 0.0
    assert str(row["correlation"]) == "undefined"


def test_the_shipped_lists_keep_second_seeds_and_two_ranges_aside():
    config = planted.PlantedConfig()
    roles = planted.wanted(config)
    assert len(roles) == 10
    assert list(roles.values()).count("design") == 3
    assert all(role == "held out" for (_, seed), role in roles.items() if seed == 1)
    found = planted.find_organisms(planted.PlantedConfig(design=()))
    assert {str(o.planted) for o in found if o.role == "unlisted"} == {"[5, 10]", "[18, 23]", "[10, 12]"}
