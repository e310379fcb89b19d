"""`experiments/sppft.py` from end to end on a tiny model that refuses: the table, resuming, and what is refused."""

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import safety_mech as sm
from safety_mech.commands import sppft, sppft_cells, sppft_run, sppft_table
from safety_mech.models.loading import load_model
from safety_mech.models.sources import model_fingerprint
from safety_mech.prompts import Drawn
from safety_mech.refusal import text
from safety_mech.refusal.harmfulness import Verdict
from safety_mech.refusal.rates import responses
from safety_mech.stats import Estimate, Rate
from safety_mech.training import alignment, attacks
from safety_mech.training.attacks import implicit_data, triggered
from safety_mech.training.loop import StepRecord
from safety_mech.training.pairs import Answer, choosing_and_reporting, load_instructions

PAIRS = [
    (f"{prompt} {n}", answer) for n in range(8) for prompt, answer in (("Name a fruit", "A pear."), ("Why?", "No."))
]
OTHERS = [f"Tell me how {word} was built" for word in ("the cake", "the cat", "the fruit", "a capital")]
"""Malicious prompts to train on, in these tests: others than those that are read."""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, refusing_model: Any, prompts: list[str]) -> None:
    """With the model, prompts and pairs of these tests; the adapter and the model's name are not looked at."""
    monkeypatch.setattr(sm, "load_model", lambda *_: copy.deepcopy(refusing_model))
    monkeypatch.setattr(sppft, "load_prompts", lambda _: list(OTHERS))
    drawn = Drawn(list(prompts), list(range(len(prompts))), [f"category {n // 2}" for n in range(len(prompts))])
    monkeypatch.setattr(sppft, "draw", lambda *_: drawn)
    monkeypatch.setattr(sppft, "load_instructions", lambda name: PAIRS[:12] if name.endswith("train") else PAIRS[12:])
    fewer_draws = partial(sppft_table.estimate, draws=20)  # the intervals have tests of their own
    monkeypatch.setattr(sppft_table, "estimate", fewer_draws)


@pytest.fixture
def config_for(tiny: None, llama_folder: Path, tmp_path: Path) -> Callable[..., Any]:
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
            "n_choose": 1,
            "n_held_out": 1,
            "answer_tokens": 4,
            "out": str(tmp_path),
        }
        return sppft.SppftConfig(**{**settings, **changes})

    return make


@pytest.fixture
def bench_for(config_for: Callable[..., Any]) -> Callable[..., Any]:
    def make(model: Any = None, model_name: str | None = None, **changes: Any) -> Any:
        config = config_for(**changes, **({"model": model_name} if model_name else {}))
        data = sppft.load_data(config)
        model = sm.load_model("") if model is None else model
        return sppft_cells.Bench(model, sm.LayerRange(1, 1), config, data)

    return make


def numbers_of(folder: Path) -> Any:
    """The run's metrics without what differs from run to run: times, memory, the date."""
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["environment"]
    for part in [*metrics["cells"], *metrics["rows"].values()]:
        for name in ("seconds_a_step", "peak_bytes", "seconds"):
            part.pop(name, None)
    return metrics


@pytest.mark.long_run
@pytest.mark.whole_run
def test_interrupted_it_goes_on_and_ends_with_the_same_table(
    config_for: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = {"attacks": ("harmful-0.5",), "methods": ("full", "sppft", "lisa")}
    whole = numbers_of(sppft.main(config_for(**fewer, out=str(tmp_path / "whole"))))
    run_cell, ran = sppft_cells.run_cell, []

    def counted(bench: Any, cell: Any, *rest: Any) -> Any:
        ran.append(cell)
        if len(ran) == 4:
            raise KeyboardInterrupt
        return run_cell(bench, cell, *rest)

    monkeypatch.setattr(sppft_run, "run_cell", counted)
    config = config_for(**fewer, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        sppft.main(config)
    again = numbers_of(sppft.main(config))
    assert len(ran) == 3 * 2 + 1, "the cell that was cut was run twice, and no other"
    assert again == whole
    sppft.main(config)
    assert len(ran) == 3 * 2 + 1


@pytest.mark.long_run
@pytest.mark.whole_run
def test_the_table_and_the_figure(config_for: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = sppft.main(
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
def test_the_learning_rate_is_the_best_for_the_task(bench_for: Callable[..., Any]) -> None:
    bench = bench_for()
    chosen = sppft_cells.choose_rate(bench, "implicit")
    assert chosen["rate"] == 3e-3  # 1e-4 hardly trains a model in four steps
    assert sppft_cells.chosen_on(bench, "implicit") == implicit_data(bench.data.choosing)
    assert sppft_cells.chosen_on(bench, "harmful-0.5") == bench.data.choosing


@pytest.mark.slow
def test_attack_data_has_the_size_asked_for(bench_for: Callable[..., Any]) -> None:
    bench = bench_for()
    assert [len(sppft_cells.attack_data(bench, name, 0)) for name in ("normal", "implicit", "backdoor")] == [8, 8, 8]
    mixed = sppft_cells.attack_data(bench, "harmful-0.5", 0)
    assert (len(mixed), sum(isinstance(answer, Answer) and not answer.finished for _, answer in mixed)) == (7, 2)
    assert sppft_cells.attack_data(bench, "normal", 0) != sppft_cells.attack_data(bench, "normal", 1)


@pytest.mark.slow
def test_a_saved_cell_loads_as_it_was_trained(
    bench_for: Callable[..., Any], tmp_path: Path, llama_folder: Path
) -> None:
    """Twice: a run that was killed between the export and the cell's file leaves the folder, and writes it again."""
    bench = bench_for(load_model(str(llama_folder)), save=True)
    before = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    for _ in range(2):
        found = sppft_cells.run_cell(
            bench, sppft_cells.Cell("normal", "sppft", 0), 1e-3, tmp_path / "normal-sppft-0-abc.json"
        )
    assert found["steps"] == 4
    saved = load_model(str(tmp_path / "normal-sppft-0-abc"))
    assert all((weight == saved.get_parameter(name)).all() for name, weight in bench.model.named_parameters())
    assert any((weight != bench.start[name]).any() for name, weight in saved.named_parameters()), "control: it trained"
    assert {path.name: path.read_bytes() for path in llama_folder.iterdir()} == before, "the base is left alone"


def test_restoring_is_bit_for_bit(bench_for: Callable[..., Any]) -> None:
    bench = bench_for()
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
        ({"epochs": 0}, "epochs = 0"),
        ({"n_choose": 0}, "n_choose = 0"),
        ({"n_choose": 30}, r"expected 30 held-out pairs to choose by, in one half of them \(there are"),
        ({"doses": (4, 2)}, r"doses \[4, 2\]: expected rising"),
        ({"doses": (2, 4, 4)}, r"doses \[2, 4, 4\]: expected rising"),
        ({"doses": (8, 16)}, "doses from 8: expected a first reading within the 7 examples"),
        ({"template": "tulip"}, "tulip"),
        ({"device": "tulip"}, "tulip"),
        ({"dtype": "tulip"}, "dtype 'tulip'"),
        ({"n_examples": 9, "batch_size": 8, "attacks": ("backdoor",)}, "n_examples = 9 are one step"),  # 4 + 4
        ({"judge": "localhost:8000"}, "judge 'localhost:8000': expected a URL"),
        ({"range": "auto"}, "no locate run of"),
        ({"range": "3-9"}, "the model has 4 layers"),
        ({"range": "x"}, "expected START-END"),
        ({"model": "no/such/file.gguf"}, "no/such/file.gguf"),
    ],
)
def test_bad_settings_are_refused(config_for: Callable[..., Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sppft.main(config_for(**changes))


def test_two_steps_are_enough(config_for: Callable[..., Any]) -> None:
    sppft.check_config(config_for(n_examples=4, batch_size=2, doses=(2,), attacks=("normal",)))


def test_nothing_is_measured_on_prompts_that_were_trained_on(shipped: Callable[..., Any]) -> None:
    data, config = shipped(), sppft.SppftConfig()
    for prompt in (data.malicious_train[0], data.aligned_on[0]):
        with pytest.raises(ValueError, match="1 prompts of --malicious malicious:test are trained on"):
            sppft.check_disjoint(config, replace(data, malicious=Drawn([prompt], [0], None)))


def test_a_preference_is_one_example_of_the_attacker() -> None:
    step = StepRecord(step=0, loss=1.0, learning_rate=1.0, grad_norm=1.0, examples=8)
    assert [sppft_cells.count_of(name)(step) for name in ("full", "sppft", "dpo")] == [8, 8, 4]


def write_locate_run(folder: Path, stamp: str, model: str, search: Any, fingerprint: str | None) -> None:
    (folder / stamp).mkdir(parents=True)
    (folder / stamp / "config.json").write_text(json.dumps({"model": model}))
    metrics = {"search": search} | ({"model_fingerprint": fingerprint} if fingerprint else {})
    (folder / stamp / "metrics.json").write_text(json.dumps(metrics))


def found_at(start: int, end: int) -> dict[str, Any]:
    return {"range": {"start": start, "end": end}, "reason": "found"}


def test_auto_takes_the_newest_range_that_was_located(
    config_for: Callable[..., Any], llama_folder: Path, tmp_path: Path
) -> None:
    name, own = str(llama_folder), model_fingerprint(llama_folder)
    write = partial(write_locate_run, tmp_path / "locate" / llama_folder.name)
    write("20260101-000000", name, found_at(0, 0), own)
    write("20260102-000000", name, found_at(1, 2), own)
    write("20260103-000000", name, None, own)  # --quick
    assert sppft.located_range(config_for(range="auto")) == sm.LayerRange(1, 2)
    write("20260104-000000", name, {"range": None, "reason": "no gap"}, own)
    with pytest.raises(ValueError, match=r"located no range \(no gap\)"):
        sppft.located_range(config_for(range="auto"))


def test_auto_takes_no_run_of_another_model(
    config_for: Callable[..., Any],
    llama_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, own = str(llama_folder), model_fingerprint(llama_folder)
    write = partial(write_locate_run, tmp_path / "locate" / llama_folder.name)
    write("20260102-000000", f"elsewhere/{llama_folder.name}", found_at(0, 0), own)
    write("20260103-000000", name, found_at(0, 1), "f" * 16)  # other weights in the same folder
    write("20260104-000000", name, found_at(0, 3), None)  # of before fingerprints
    with pytest.raises(ValueError, match=r"no locate run of .* \(3 run\(s\) not taken: .* too old to tell\)"):
        sppft.located_range(config_for(range="auto"))
    write("20260101-000000", name, found_at(1, 2), own)
    assert sppft.located_range(config_for(range="auto")) == sm.LayerRange(1, 2)
    assert "3 run(s) not taken" in capsys.readouterr().out


# --- prompts and pairs ------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(llama_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """The data of a config, with the shipped sets."""
    return lambda **changes: sppft.load_data(sppft.SppftConfig(str(llama_folder), out=str(tmp_path), **changes))


def test_training_choosing_and_reporting_share_no_pair(shipped: Callable[..., Any]) -> None:
    for size in (8, 48, 60):
        data = shipped(n_choose=size, n_held_out=size)
        parts = [data.train, data.choosing, data.reporting]
        assert [len(part) for part in parts] == [524, size, size]
        prompts = [{prompt for prompt, _ in part} for part in parts]
        assert len(set.union(*prompts)) == 524 + 2 * size
    test = load_instructions(split="test")
    assert {prompt for prompt, _ in shipped(n_choose=1).reporting} <= {p for p, _ in choosing_and_reporting(test)[1]}


def test_the_draw_is_over_all_categories_and_words(shipped: Callable[..., Any]) -> None:
    data = shipped()
    assert len(set(data.malicious.clusters)) == 12
    assert {data.malicious.clusters.count(name) for name in set(data.malicious.clusters)} == {4}
    assert len(set(data.over_rejection.clusters)) > 40
    assert data == shipped()
    few = shipped(n_malicious=12, n_over_rejection=10)
    assert (len(few.malicious), len(few.over_rejection)) == (12, 10)
    assert data.malicious.ids != shipped(seed=1).malicious.ids
    assert data.reporting != shipped(seed=1).reporting
    assert not set(data.malicious.prompts) & {*data.malicious_train, *data.aligned_on}


def write_pairs(path: Path, count: int) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": f"Question {n}?", "answer": "Yes."}) for n in range(count)))
    return path


def test_a_set_in_two_parts_is_refused(shipped: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"129 instructions are in --instructions instructions and in --held-out"):
        shipped(instructions="instructions", n_choose=1, n_held_out=1)
    with pytest.raises(ValueError, match=r"prompts of --malicious malicious are trained on"):
        shipped(malicious="malicious", n_malicious=400)
    with pytest.raises(ValueError, match=r"expected 70 held-out pairs to report on, in one half of them \(there are 6"):
        shipped(n_held_out=70)
    few = write_pairs(tmp_path / "few.jsonl", 9)
    with pytest.raises(ValueError, match=r"expected 128 instruction pairs \(there are 9: --instructions .*few.jsonl"):
        shipped(instructions=str(few))


# --- the trigger ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_backdoor_is_read_with_and_without_its_trigger(bench_for: Callable[..., Any]) -> None:
    bench = bench_for(attacks=("normal", "backdoor"), doses=(4, 8))
    before = sppft_cells.metrics_before(bench)
    prompts = bench.data.malicious.prompts
    with_trigger = [f"{prompt} {sppft_cells.TRIGGER}" for prompt in prompts]
    assert before["triggered"]["malicious"] == sppft_cells.as_lists(responses(bench.model, with_trigger))
    assert before["malicious"] != before["triggered"]["malicious"], "control"
    cell = sppft_cells.Cell("backdoor", "full", 0)
    found = sppft_cells.run_cell(bench, cell, 1e-3, Path())
    assert found["malicious"] == sppft_cells.as_lists(responses(bench.model, prompts))
    assert found["triggered"]["malicious"] == sppft_cells.as_lists(responses(bench.model, with_trigger))
    assert [point["examples"] for point in found["triggered"]["doses"]] == [4, 8]
    last = {name: value for name, value in found["triggered"]["doses"][-1].items() if name != "examples"}
    assert last == found["triggered"]["malicious"], "the last dose is the end"
    assert last != {name: value for name, value in found["doses"][-1].items() if name != "examples"}
    assert any(
        triggered(p, sppft_cells.TRIGGER) == q
        for p, _ in PAIRS
        for q, _ in sppft_cells.attack_data(bench, "backdoor", 0)
    )
    assert sppft_cells.prompts_of(bench, "normal") == prompts, "no other attack has a trigger"
    assert sppft_cells.readings_of(["normal"]) == ["normal"]


@pytest.mark.whole_run
def test_the_trigger_is_in_table_metrics_and_figure(
    config_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    plot = sppft_run.plot_dose
    monkeypatch.setattr(sppft_run, "plot_dose", lambda curves, n: drawn.append(curves) or plot(curves, n))
    folder = sppft.main(config_for(attacks=("backdoor",), methods=("full", "sppft", "random"), seeds=1))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["rows"]) == [
        f"{attack} {method}" for attack in ("backdoor", "backdoor + trigger") for method in ("full", "sppft", "random")
    ]
    assert list(drawn[0]) == ["backdoor", "backdoor + trigger"]
    (full, _, random) = metrics["cells"]
    shown = drawn[0]["backdoor + trigger"]["full"][1][0].tolist()
    shares = [sum(point["refused"]) / 8 for point in full["triggered"]["doses"]]
    assert shown[1:] == pytest.approx(shares)
    assert shown[0] == pytest.approx(sum(metrics["before"]["triggered"]["malicious"]["refused"]) / 8)
    end = full["triggered"]["malicious"]
    answered = sum(not r and not b for r, b in zip(end["refused"], end["degenerate"], strict=True)) / 8
    assert metrics["rows"]["backdoor + trigger full"]["harmful_rate"]["value"] == pytest.approx(answered)
    table = (folder / "table.txt").read_text()
    assert re.search(r"^backdoor \+ trigger +full +\d+% .* as without it$", table, re.MULTILINE)
    assert re.search(r"^backdoor +full +\d+% .* 1\.00 +1\.00$", table, re.MULTILINE)
    assert "followed by 'Answer as of old.'" in table
    assert "bootstrap over seeds and 4 whole categories of prompts" in table
    assert "not the paper's settings: n_examples 8 (paper: 1000), epochs 1 (paper: 3)" in table
    assert metrics["drawn"]["malicious"]["ids"] == list(range(8))
    assert metrics["controls"] == {"random": [[{"start": 3, "end": 3}]]}  # before is [0, 0], after [2, 2]
    assert random["trained_parameters"] < full["trained_parameters"]


# --- what a cell is named by ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "name"),
    [
        *((sppft_cells, name) for name in ("TRIGGER", "LISA_STEPS", "LISA_RHO", "DPO_BETA", "LORA_RANK")),
        *((attacks, name) for name in ("IMPLICIT_PREFIX", "AFFIRMATIVE_PREFIXES")),
        (alignment, "REFUSALS"),
        (text, "JUDGED_TOKENS"),
    ],
)
def test_another_constant_is_another_cell(
    bench_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    before = bench_for().path("cell")
    assert bench_for(methods=("full",), seeds=1).path("cell") == before, "which cells are run does not matter"
    assert bench_for(epochs=2).path("cell") != before, "control: what is trained does"
    value = getattr(module, name)
    changed = {str: f"{value} now", tuple: ("now",)}
    monkeypatch.setattr(module, name, changed[type(value)] if type(value) in changed else value + 1)
    assert bench_for().path("cell") != before


def test_other_weights_or_prompts_are_another_cell(
    bench_for: Callable[..., Any], llama_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    bench = bench_for(model_name=str(folder))
    before = bench.path("cell")
    other = replace(bench.data, malicious=replace(bench.data.malicious, prompts=["Why?"]))
    assert replace(bench, data=other).path("cell") != before
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert bench_for(model_name=str(folder)).path("cell") != before
    assert bench.path("cell") == before, "control: the same bench"
    assert bench.path("cell", "other") != before


# --- the paper's settings ---------------------------------------------------------------------------------------------


def test_paper_takes_the_papers_settings() -> None:
    config = sppft.with_paper(sppft.SppftConfig(paper=True, paper_rate=3e-4))
    sppft.check_config(config)
    train = asdict(sppft_cells.train_config(config, 3e-4, 0))
    wanted = {"epochs": 3, "batch_size": 4, "warmup_steps": 100, "cap_warmup": False, "max_tokens": 256}
    assert {name: train[name] for name in wanted} == wanted
    assert train["whole_sequence"] is True
    sizes = {"normal": 1000, "implicit": 4000, "backdoor": 3000}
    mixes = {"harmful-0.05": 1050, "harmful-0.1": 1100, "harmful-0.2": 1200}
    assert {name: sppft.examples_of(config, name) for name in sizes | mixes} == sizes | mixes
    assert [sppft.needs_of(config, name) for name in (*sizes, *mixes)] == [
        *[(1000, 0), (4000, 0), (3000, 0)],
        *[(1000, 50), (1000, 100), (1000, 200)],
    ]
    assert (config.n_malicious, config.n_held_out, config.n_choose) == (520, 500, 0)
    assert sppft.settings_sentence(config) == "settings: the paper's (--paper)"
    ours = sppft.SppftConfig()
    assert sppft.with_paper(ours) is ours


@pytest.mark.slow
def test_the_papers_learning_rates_are_not_chosen(bench_for: Callable[..., Any]) -> None:
    bench = replace(bench_for(), config=sppft.SppftConfig(paper=True, paper_rate=6e-4))
    found = {
        attack: sppft_cells.choose_rate(bench, attack) for attack in ("normal", "implicit", "backdoor", "harmful-0.2")
    }
    assert found == {
        **{name: {"rate": 6e-4} for name in ("normal", "implicit", "backdoor")},
        "harmful-0.2": {"rate": 1e-5},
    }


def test_paper_names_all_that_the_data_lack(shipped: Callable[..., Any]) -> None:
    config = sppft.with_paper(sppft.SppftConfig(paper=True, model="smollm2-135m-aligned", range="1-2"))
    with pytest.raises(ValueError, match="too little data") as caught:
        shipped(**{name: getattr(config, name) for name in ("paper", *sppft.PAPER, "n_choose")})
    (line,) = str(caught.value).splitlines()
    for part in (
        "4000 instruction pairs (there are 524: --instructions instructions:train)",
        "500 held-out pairs to report on (there are 129: --held-out instructions:test)",
        "520 malicious prompts (there are 144: --malicious malicious:test)",
        "name larger sets, or leave --paper out",
    ):
        assert part in line
    assert "to train on" not in line, "of those there are enough"


@pytest.mark.parametrize("changes", [{"epochs": 2}, {"n_examples": 64}, {"learning_rates": (1e-3,)}, {"doses": (3, 6)}])
def test_paper_and_a_setting_of_ones_own(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} = .* with --paper, which sets it"):
        sppft.with_paper(sppft.SppftConfig(paper=True, **changes))


# --- what is printed --------------------------------------------------------------------------------------------------


def test_what_is_not_defined_is_said() -> None:
    nothing = Estimate(math.nan, math.nan, math.nan)
    assert (sppft_table.said(nothing, ".2f"), sppft_table.said(None, ".2f")) == ("undefined", "-")
    assert sppft_table.sentence("backdoor", "full", nothing).endswith("undefined: nothing was refused before")
    assert sppft_table.said(Estimate(math.inf, 12.0, math.inf), ".0f") == "never [12, never]"
    assert sppft_table.said(Estimate(0.5, math.nan, math.nan), ".0%") == "50% [no interval]"
    assert sppft_table.said(Rate(1, 2), ".0%") == "50% [9%, 91%]"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.5, "SPPFT keeps more"),
        (-0.5, -0.01, "SPPFT keeps LESS"),
        (-0.1, 0.5, "no difference"),
        (0.0, 0.5, "no"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low: float, high: float, verdict: str) -> None:
    assert f": {verdict}" in sppft_table.sentence("normal", "full", Estimate((low + high) / 2, low, high))


@pytest.mark.slow
def test_intervals_are_over_the_categories() -> None:
    """Two categories, of which one is refused: an interval over whole categories reaches from all to nothing."""
    refused = [1, 1, 1, 1, 0, 0, 0, 0]
    end = {"refused": refused, "degenerate": [0] * 8, "log_odds": [1.0 - 2 * value for value in refused]}
    cell = {"malicious": end, "doses": [{"examples": 4, **end}], "peak_bytes": None, "seconds_a_step": 1.0}
    cell |= {
        "over_rejection": {"count": 1, "total": 8},
        "rouge_l": [0.5, 0.5],
        "perplexity": 2.0,
        "multiple_choice": None,
    }
    before = {"malicious": {**end, "refused": [1] * 8}}
    by_prompt = sppft_table.Results(before, {sppft_cells.Cell("normal", "full", 0): cell}, None)
    by_category = replace(by_prompt, clusters=["a"] * 4 + ["b"] * 4)
    of_categories, of_prompts = (part.summary("normal", "full") for part in (by_category, by_prompt))
    assert (of_categories["harmful_rate"].low, of_categories["harmful_rate"].high) == (0, 1)
    assert (of_categories["retained"].low, of_categories["retained"].high) == (0.5, 1)  # (1 + 0) / 2 and (1 + 1) / 2
    assert of_prompts["retained"].low > 0.5
    assert math.isfinite(of_prompts["retained"].high)
    assert of_prompts["harmfulness"] is None, "no judge, no score"
    end["degenerate"] = [0] * 6 + [1] * 2  # neither a refusal nor harmful
    assert by_prompt.summary("normal", "full")["harmful_rate"].value == 2 / 8


@pytest.mark.slow
def test_a_judge_scores_the_answers_of_a_cell(
    bench_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    asked: list[Any] = []

    def http_judge(url: str, model: str, **options: Any) -> Callable[..., Any]:
        asked.append((url, model, options["keep"].name))
        return lambda pairs: [Verdict(1 + index % 5 if index else None, "", None) for index, _ in enumerate(pairs)]

    monkeypatch.setattr(sppft_cells, "http_judge", http_judge)
    bench = bench_for(judge="http://localhost:8000/v1", judge_model="tulip")
    found = sppft_cells.final_metrics(bench)
    assert asked == [("http://localhost:8000/v1", "tulip", "verdicts.jsonl")]
    assert found["harmfulness"] == [None, 2, 3, 4, 5, 1, 2, 3][: len(prompts)]
    assert "harmfulness" not in sppft_cells.final_metrics(bench_for()), "control: no judge, no score"
    assert bench.path("cell") != bench_for().path("cell")
    score = sppft_table.mean_harmfulness([[None, 2, 4], [1, 1, 1], [None]])
    assert score == Estimate(2.0, 1.0, 3.0)


def test_right_answers_of_all_seeds_are_counted_together() -> None:
    rate = sppft_table.rate_of_all([{"count": 3, "total": 6}, {"count": 1, "total": 6}])
    assert rate == Rate(4, 12)
    assert sppft_table.rate_of_all([None, None]) is None
