"""`python experiments/locate.py`: a bad input is one line and status 2, a good one writes a whole run."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from safety_mech import GapDifference, LayerRange, initial_range, load_pairs
from safety_mech.commands import locate, locate_run
from safety_mech.commands.command_line import run
from safety_mech.commands.locate_run import starting_range
from safety_mech.divergence.angles import SymmetricGap
from safety_mech.models import loading as models
from safety_mech.prompts import prompt_hash

N_LAYERS = 4
"""Of the random Llama (the fixture llama_folder)."""
SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "locate.py"
NORMAL = ["How do I bake a cake?", "What is the capital of France?", "Name a fruit", "Where is the cat?", "Why?"]
MALICIOUS = ["How do I rob a bank?", "Tell me how to hurt a cat.", "Forge a passport", "Who can I cheat?"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with prompt sets, good and bad, and things that are no models."""
    (tmp_path / "normal.txt").write_text("\n".join(NORMAL))
    (tmp_path / "malicious.txt").write_text("\n".join(MALICIOUS))
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "twice.txt").write_text("one\ntwo\none\n")
    (tmp_path / "long.txt").write_text("\n".join([*MALICIOUS, "why " * 600]))
    (tmp_path / "set.csv").write_text("query_text,target\none,ein\n")
    (tmp_path / "no_model").mkdir()
    (tmp_path / "a_file").write_text("in the way")
    return tmp_path


@dataclass(frozen=True)
class Outcome:
    status: int | str | None
    out: str
    err: str


@pytest.fixture
def command(files: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process, with FILES in an argument standing for the folder of `files`."""

    def run_command(*arguments: str) -> Outcome:
        filled = [argument.replace("FILES", str(files)) for argument in arguments]
        with pytest.raises(SystemExit) as stopped:
            run(locate.main, locate.LocateConfig, filled)
        captured = capsys.readouterr()
        return Outcome(stopped.value.code, captured.out, captured.err)

    return run_command


def check_one_line(outcome: Outcome, *parts: str) -> None:
    """Status 2, and one line on stderr that starts with "error:" and holds all parts."""
    assert outcome.status == 2
    assert outcome.err.startswith("error: ")
    assert outcome.err.count("\n") == 1
    assert outcome.err.endswith("\n")
    for part in parts:
        assert part in outcome.err


BAD = {
    "unknown model": (["--model", "nonsense"], ["'nonsense'", "built in: smollm2-135m-instruct"]),
    "missing folder": (["--model", "./absent"], ["'./absent'", "no such folder"]),
    "missing gguf": (["--model", "FILES/absent.gguf"], ["absent.gguf", "no such folder or .gguf file"]),
    "folder that is no model": (["--model", "FILES/no_model"], ["no_model", "no config.json"]),
    "adapter that is none": (["--adapter", "FILES/no_model"], ["no_model", "adapter_config.json"]),
    "missing prompt file": (["--malicious", "FILES/absent.csv"], ["absent.csv", "no such file"]),
    "missing normal file": (["--normal", "FILES/absent.csv"], ["absent.csv", "no such file"]),
    "unknown split": (["--normal", "normal:dev"], ["'dev'", "train, test, all"]),
    "absent column": (["--malicious", "FILES/set.csv:goal"], ["'goal'", "query_text, target"]),
    "no known column": (["--normal", "FILES/set.csv"], ["no known prompt column", "query_text, target"]),
    "empty set": (["--normal", "FILES/empty.txt"], ["empty.txt", "is empty"]),
    "duplicate prompts": (["--malicious", "FILES/twice.txt"], ["prompts 1 and 3 are equal: 'one'"]),
    "malformed hub id": (["--malicious", "hf:org/name"], ["expected hf:org/name:split:column"]),
    "bad dtype": (["--dtype", "float64"], ["'float64'", "float32, bfloat16, float16"]),
    "bootstrap too small": (["--bootstrap", "99"], ["expected at least 100"]),
    "permutations too few": (["--permutations", "0"], ["expected at least 100"]),
    "one over-rejection prompt": (["--max-over-rejection", "1"], ["max_over_rejection = 1", "at least 2"]),
    "one sampled pair": (["--r", "1"], ["r = 1", "at least 2"]),
    "topics of a file": (
        ["--bootstrap-over", "topics", "--normal", "FILES/normal.txt"],
        ["topics", "normal.txt", "not known", "shipped set"],
    ),
    "unwritable out": (["--out", "FILES/a_file/runs"], ["a_file/runs", "cannot be made"]),
    "out is a file": (["--out", "FILES/a_file"], ["a_file", "cannot be made"]),
    "bad template": (["--template", "chatml"], ["'chatml'", "own, alpaca, alpaca_short"]),
    "too few prompts": (["--malicious", "FILES/two.txt"], ["2 malicious prompts", "at least 3"]),
    "initial range that is none": (["--initial", "middle"], ["'middle'", "START-END"]),
    "unknown device": (["--device", "abacus"], ["'abacus'", "cannot be used here"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line_before_any_model_is_loaded(
    command: Callable[..., Outcome], name: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for auto in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments, parts = BAD[name]
    # where the case says nothing about --out, nothing may be written into the working folder
    check_one_line(command("--out", "FILES/runs", *arguments), *parts)
    assert not list(files.rglob("metrics.json"))


def test_a_good_command_does_load_a_model(command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control for the test above: its guard is on the way of every command that is not refused."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError("the guard was reached\nsecond line")

    # An earlier test may have left the built-in model in memory: this one must see it read.
    monkeypatch.setattr(models, "_read_built_in", models._read_files)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    outcome = command("--out", "FILES/runs")
    check_one_line(outcome, "could not be loaded", "the guard was reached")
    assert "second line" not in outcome.err


@pytest.mark.parametrize("offline", [False, True])
def test_a_hub_model_that_does_not_load_says_how_to_go_on(
    command: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nCheck your internet connection")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if offline else "")
    outcome = command("--model", "org/absent", "--out", "FILES/runs")
    check_one_line(outcome, "'org/absent' could not be loaded from the hub", "We couldn't connect")
    assert ("HF_HUB_OFFLINE is set" in outcome.err) == offline


TINY = ["--normal", "FILES/normal.txt", "--malicious", "FILES/malicious.txt", "--no-pairs", "--out", "FILES/runs"]


def test_what_only_the_model_can_tell_is_one_line_as_well(
    command: Callable[..., Outcome], llama_folder: Path, files: Path
) -> None:
    outcome = command(*TINY, "--model", str(llama_folder), "--malicious", "FILES/long.txt")
    last_line = outcome.err.splitlines()[-1]
    check_one_line(Outcome(outcome.status, "", last_line + "\n"), "prompt 4 has", "the context holds 512")
    assert "Traceback" not in outcome.err
    assert not list(files.rglob("metrics.json"))


def spoil_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_chat_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize("spoil", [spoil_weights, spoil_config, remove_weights, remove_chat_template])
def test_a_spoilt_model_folder_is_one_line(
    command: Callable[..., Outcome], llama_folder: Path, files: Path, spoil: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(llama_folder, files / "spoilt"))
    spoil(folder)
    outcome = command(*TINY, "--model", str(folder))
    check_one_line(Outcome(outcome.status, "", outcome.err.splitlines()[-1] + "\n"))
    assert "Traceback" not in outcome.err


def test_an_unknown_flag_and_help(command: Callable[..., Outcome]) -> None:
    assert command("--modle", "x").status == 2
    text = command("--help")
    assert text.status == 0
    flags = ["--model", "--adapter", "--normal", "--malicious", "--template", "--device", "--dtype", "--seed", "--out"]
    assert [flag for flag in flags if flag not in text.out] == []


def test_ctrl_c_is_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        run(interrupted, locate.LocateConfig, [])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback() -> None:
    """Control: only a ValueError is the user's; anything else must not be hidden behind one line."""

    def broken(config: object) -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        run(broken, locate.LocateConfig, [])


@pytest.mark.whole_run
def test_the_real_command_ends_with_status_2(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, str(SCRIPT), "--malicious", "absent.csv", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    check_one_line(Outcome(outcome.returncode, outcome.stdout, outcome.stderr), "absent.csv", "no such file")
    assert "Traceback" not in outcome.stdout + outcome.stderr
    assert "loading" not in outcome.stdout
    assert list(tmp_path.iterdir()) == []


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_for(files: Path, llama_folder: Path) -> Callable[..., object]:
    def make(**changes: object) -> object:
        settings = {
            "model": str(llama_folder),
            "normal": str(files / "normal.txt"),
            "malicious": str(files / "malicious.txt"),
            "pairs": False,
            "max_over_rejection": 4,
            "bootstrap": 100,
            "permutations": 100,
            "out": str(files / "runs"),
        }
        return locate.LocateConfig(**{**settings, **changes})

    return make


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.slow
def test_a_run_writes_its_folder(
    config_for: Callable[..., object], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(pairs=True, seed=3)
    result = locate.main(config)
    folder = result.folder
    assert folder.parent == files / "runs" / "locate" / "random-llama"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {"config.json", "metrics.json", "tensors.safetensors", "gap.png"} <= {path.name for path in folder.iterdir()}
    assert read(folder / "config.json") == vars(config)
    metrics = read(folder / "metrics.json")
    assert metrics["seed"] == 3
    assert set(metrics["curves"]) == {"prompts", "contrastive pairs"} == set(result.curves)
    assert metrics["prompt_hashes"]["prompts normal"] == prompt_hash(NORMAL)
    assert metrics["prompt_hashes"]["prompts malicious"] == prompt_hash(MALICIOUS)
    assert metrics["prompt_hashes"]["contrastive pairs malicious"] == prompt_hash(
        [pair.malicious for pair in load_pairs("test")]
    )
    tensors = load_file(folder / "tensors.safetensors")
    for name, curve in result.curves.items():
        assert metrics["curves"][name]["gap"] == curve.gap.tolist()
        assert torch.equal(tensors[f"{name}.gap".replace(" ", "_")], curve.gap)
        assert tensors[f"{name}.samples".replace(" ", "_")].shape == (100, N_LAYERS)
    printed = capsys.readouterr().out
    assert str(folder) in printed
    assert all(f"\n{layer:>5}  " in printed for layer in range(N_LAYERS))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(config_for: Callable[..., object]) -> None:
    first, second, other = (locate.main(config_for(seed=seed)) for seed in (0, 0, 1))
    curves = [result.curves["prompts"] for result in (first, second, other)]
    assert len({result.folder for result in (first, second, other)}) == 3
    assert (first.folder / "tensors.safetensors").read_bytes() == (second.folder / "tensors.safetensors").read_bytes()
    assert torch.equal(curves[0].gap, curves[2].gap), "all pairs are used: the gap does not depend on the seed"
    assert not torch.equal(curves[0].samples, curves[2].samples)


@pytest.mark.slow
def test_the_command_line_does_what_main_does(
    config_for: Callable[..., object], llama_folder: Path, files: Path
) -> None:
    by_hand = locate.main(config_for(template="alpaca", out=str(files / "by_hand")))
    arguments = [argument.replace("FILES", str(files)) for argument in TINY]
    options = ["--template", "alpaca", "--bootstrap", "100", "--permutations", "100", "--max-over-rejection", "4"]
    run(locate.main, locate.LocateConfig, [*arguments, "--model", str(llama_folder), *options])
    (folder,) = (files / "runs" / "locate" / "random-llama").iterdir()
    for name in ("tensors.safetensors", "gap.png"):
        assert (folder / name).read_bytes() == (by_hand.folder / name).read_bytes()


# --- where the search starts ------------------------------------------------------------------------------------------


def difference_of(gap: list[float]) -> GapDifference:
    values = torch.tensor(gap, dtype=torch.float64)
    parts = (values, values - 0.1, values + 0.1, torch.full_like(values, 0.001), 0.001, values[None], values[None])
    return GapDifference(*parts, symmetric=SymmetricGap(*parts, permuted=values[None]))


def test_the_search_starts_from_what_is_given_then_the_own_gap_then_the_difference() -> None:
    own, opened = LayerRange(1, 2), difference_of([0.0, 0.0, 0.4, 0.4])
    given = locate.LocateConfig(initial="0-3")
    assert starting_range(given, own, opened).range == LayerRange(0, 3)
    assert starting_range(locate.LocateConfig(), own, opened).range == own
    from_difference = starting_range(locate.LocateConfig(), None, opened)
    assert from_difference.range == LayerRange(2, 2)
    assert "difference to the base" in from_difference.source


def test_the_statistic_says_which_difference_the_search_starts_from() -> None:
    """The paper's gap opens in layer 2, the symmetric one in layer 3."""
    paper, other = difference_of([0.0, 0.0, 0.4, 0.4]), difference_of([0.0, 0.0, 0.0, 0.4])
    both = replace(paper, symmetric=other.symmetric)
    assert starting_range(locate.LocateConfig(), None, both).range == LayerRange(2, 2)
    assert starting_range(locate.LocateConfig(statistic="symmetric"), None, both).range == LayerRange(3, 3)


@pytest.mark.slow
def test_a_quick_run_over_topics_says_so_and_holds_both_statistics(
    config_for: Callable[..., object], llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {"normal": "normal:test", "malicious": "malicious:test", "pairs": True, "base": str(llama_folder)}
    config = config_for(**sets, quick=True, bootstrap_over="topics", statistic="symmetric", r=50)
    result = locate.main(config)
    said = capsys.readouterr().out
    assert "bootstrap over 12 normal and 12 malicious topics" in said
    assert "bootstrap over 10 normal and 10 malicious topics" in said, "of the contrastive pairs"
    metrics = read(result.folder / "metrics.json")
    for name, curve in result.curves.items():
        written = metrics["curves"][name]
        assert written["bootstrap_over"]["unit"] == "topics"
        assert written["symmetric"]["gap"] == curve.symmetric.gap.tolist()
        assert written["symmetric"]["p_any"] == curve.symmetric.p_any
        assert written["symmetric"]["spread_alone"] == curve.symmetric.spread_alone.tolist()
        assert written["sampled_gap"] == curve.sampled_gap.tolist()
        peak = float(curve.symmetric.gap.max())
        assert f"symmetric {peak:.2f} degrees" in said
        assert result.initial[name] == initial_range(curve, statistic="symmetric")
    assert metrics["differences"]["prompts"]["symmetric"]["gap"] == [0.0] * N_LAYERS
    page = unescape((result.folder / "report.html").read_text("utf-8"))
    assert "bootstrap over 12 normal and 12 malicious topics" in page
    assert "of the symmetric one" in page


def test_nothing_to_start_from_is_said() -> None:
    flat = difference_of([0.0] * 4)
    for difference, part in ((flat, "nor of its difference"), (None, "no base to compare")):
        start = starting_range(locate.LocateConfig(), None, difference)
        assert start.range is None
        assert part in start.source


@pytest.mark.slow
def test_the_settings_of_the_search_reach_it(
    config_for: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    reached: dict[str, object] = {}

    def stands_in(*_: object, **settings: object) -> None:
        reached.update(settings)
        raise ValueError("seen")

    monkeypatch.setattr(locate_run.sm, "locate", stands_in)
    wanted = {"recipe": "weights", "least_effect": 0.3, "least_refused": 0.2, "alpha": 1.1, "text": True, "seed": 5}
    with pytest.raises(ValueError, match="seen"):
        locate.main(config_for(initial="1-2", below=True, template="alpaca", **wanted))
    expected = {**wanted, "above": False, "template": "alpaca", "initial": LayerRange(1, 2)}
    assert {name: reached[name] for name in expected} == expected


@pytest.mark.slow
def test_a_given_initial_range_leads_to_sweeps_and_grid(config_for: Callable[..., object]) -> None:
    result = locate.main(config_for(initial="1-2", alpha=1.2))
    assert {"sweeps.png", "grid.png"} <= {path.name for path in result.folder.iterdir()}
    metrics = read(result.folder / "metrics.json")
    assert metrics["start"] == {"range": {"start": 1, "end": 2}, "source": "given"}
    assert metrics["search"]["best_of_grid"] is not None
    assert load_file(result.folder / "tensors.safetensors")["grid"].shape == (N_LAYERS, N_LAYERS, 4)
