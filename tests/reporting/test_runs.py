"""A run is written whole or not at all, reads back exactly, and never overwrites another."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from safety_mech import LayerRange
from safety_mech.reporting import runs as results
from safety_mech.reporting.plots import new_figure
from safety_mech.reporting.runs import (
    cached_json,
    check_writable,
    content_hash,
    plain,
    safe_name,
    write_json,
    write_run,
)


@dataclass(frozen=True)
class Config:
    model: str = "org/tiny"
    layers: LayerRange = field(default_factory=lambda: LayerRange(6, 12))
    out: Path = Path("some/where")
    alphas: tuple[float, ...] = (0.8, 1.2)


CONFIG_AS_JSON = {
    "model": "org/tiny",
    "layers": {"start": 6, "end": 12},
    "out": "some/where",
    "alphas": [0.8, 1.2],
}


class FrozenClock(datetime):
    """Always the same second."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 11, 23, 18, 30, 15, tzinfo=timezone.utc)


@pytest.fixture
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "datetime", FrozenClock)


def write(out: Path, model: str = "org/tiny", **parts: Any) -> Path:
    return write_run(out, "locate", model, **{"config": Config(), "metrics": {"peak": 1.5}, **parts})


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def everything_in(folder: Path) -> list[str]:
    """Hidden files as well."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.usefixtures("frozen_clock")
def test_the_folder_is_experiment_model_stamp(tmp_path: Path) -> None:
    figure, _ = new_figure()
    parts = {"tensors": {"gap": torch.zeros(2)}, "figures": {"gap": figure}, "texts": {"report.html": "<p>é</p>"}}
    folder = write(tmp_path / "new" / "results", **parts)
    assert folder == tmp_path / "new/results/locate/tiny/20261123-183015"
    files = ["config.json", "gap.png", "metrics.json", "report.html", "tensors.safetensors"]
    assert everything_in(folder) == files
    assert (folder / "gap.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "report.html").read_text("utf-8") == "<p>é</p>"
    assert everything_in(folder.parent)[0] == folder.name, "no partial folder is left beside it"


def test_what_is_not_given_is_not_written(tmp_path: Path) -> None:
    assert everything_in(write(tmp_path)) == ["config.json", "metrics.json"]


def test_config_and_metrics_round_trip(tmp_path: Path) -> None:
    metrics = {"gap": torch.tensor([0.5, 1.25]), "range": LayerRange(1, 2), "by": {3: [True, None, "é"]}, "n": 100}
    folder = write(tmp_path, metrics=metrics)
    assert read(folder / "config.json") == CONFIG_AS_JSON
    written = read(folder / "metrics.json")
    environment = written.pop("environment")
    expected = {"gap": [0.5, 1.25], "range": {"start": 1, "end": 2}, "by": {"3": [True, None, "é"]}, "n": 100}
    assert written == expected
    assert environment["threads"] == torch.get_num_threads()
    assert environment["packages"]["torch"] == torch.__version__
    assert set(environment["packages"]) == set(results.PACKAGES)
    assert datetime.fromisoformat(environment["written"]).utcoffset() is not None


def test_tensors_round_trip_bit_for_bit(tmp_path: Path) -> None:
    base = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tensors = {
        "float64": base,
        "transposed": base.T,
        "bfloat16": base.bfloat16(),
        "with_grad": base.clone().requires_grad_(),
        "nan": torch.tensor([math.nan, math.inf]),
        "empty": torch.empty(0, 5),
    }
    loaded = load_file(write(tmp_path, tensors=tensors) / "tensors.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(), tensor.detach().nan_to_num())


@pytest.mark.parametrize("part", [slice(None), slice(1, 2)], ids=["the same tensor", "a row of it"])
def test_tensors_may_share_memory(tmp_path: Path, part: slice) -> None:
    gap = torch.arange(12.0).reshape(3, 4)
    loaded = load_file(write(tmp_path, tensors={"gap": gap, "part": gap[part]}) / "tensors.safetensors")
    assert torch.equal(loaded["gap"], gap)
    assert torch.equal(loaded["part"], gap[part])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_become_null(tmp_path: Path, bad: float) -> None:
    metrics = {"alone": bad, "tensor": torch.tensor([1.0, bad]), "deep": {"list": [{"x": bad}, 2.0]}}
    text = (write(tmp_path, metrics=metrics) / "metrics.json").read_text()
    written = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in metrics.json"))
    assert (written["alone"], written["tensor"], written["deep"]) == (None, [1.0, None], {"list": [{"x": None}, 2.0]})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 2.5, "x", True, None), [1, 2.5, "x", True, None]),
        (Path("a/b"), "a/b"),
        (torch.tensor(3), 3),
        (torch.tensor([[True, False]]), [[True, False]]),
        (torch.bfloat16, "torch.bfloat16"),
        (Counter({"[6, 12]": 3}), {"[6, 12]": 3}),
        ({4}, [4]),
        ({None: 1}, {"None": 1}),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.array([1, 2]), [1, 2]),
    ],
)
def test_plain(value: Any, expected: Any) -> None:
    assert json.dumps(plain(value)) == json.dumps(expected)


class Broken(Figure):
    """A figure that fails to be written, as a full disk or a second Ctrl-C would."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
        self.seen: list[str] = []

    def savefig(self, fname: Any, **_: Any) -> None:  # type: ignore[override]
        self.seen = everything_in(Path(fname).parent)
        raise self.error


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
def test_a_run_that_is_stopped_while_writing_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    broken = Broken(error)
    with pytest.raises(type(error)):
        write(tmp_path, tensors={"gap": torch.zeros(2)}, figures={"gap": broken})
    assert broken.seen == ["config.json", "metrics.json", "tensors.safetensors"], "control: it was half-written"
    assert everything_in(tmp_path / "locate" / "tiny") == []


def test_a_stopped_run_leaves_earlier_runs_alone(tmp_path: Path) -> None:
    earlier = write(tmp_path)
    before = (earlier / "metrics.json").read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, figures={"gap": Broken(OSError("disk full"))})
    assert [path.name for path in earlier.parent.iterdir()] == [earlier.name]
    assert (earlier / "metrics.json").read_bytes() == before


@pytest.mark.usefixtures("frozen_clock")
def test_runs_in_one_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = [write(tmp_path, metrics={"run": run}) for run in range(3)]
    assert [folder.name for folder in folders] == ["20261123-183015", "20261123-183015-2", "20261123-183015-3"]
    assert [read(folder / "metrics.json")["run"] for folder in folders] == [0, 1, 2]


class WritesAnother(Figure):
    """A figure during whose writing another run of the same second ends."""

    def __init__(self, out: Path) -> None:
        super().__init__()
        self.out = out

    def savefig(self, fname: Any, **_: Any) -> None:  # type: ignore[override]
        write(self.out, metrics={"run": "other"})


@pytest.mark.usefixtures("frozen_clock")
def test_two_runs_at_the_same_time_are_both_written(tmp_path: Path) -> None:
    write(tmp_path, metrics={"run": "mine"}, figures={"gap": WritesAnother(tmp_path)})
    assert {read(path)["run"] for path in tmp_path.rglob("metrics.json")} == {"mine", "other"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "Meta-Llama-3-8B-Instruct"),
        ("/data/models/my model (v2)", "my-model-v2-"),
        ("./local/model/", "model"),
        ("C:model.Q4_1.gguf", "C-model.Q4_1.gguf"),
        ("модель", "-"),
        ("", "model"),
        (".", "model"),
        ("/", "model"),
    ],
)
def test_safe_name(name: str, expected: str) -> None:
    assert safe_name(name) == expected


@pytest.mark.parametrize("name", ["org/tiny", "a/b/c", "a b", "~", "-", "x" * 40, "", "/", "a\nb", "a\\b"])
def test_a_run_stays_inside_its_experiment(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, model=name)
    assert folder.resolve().parent.parent == (tmp_path / "locate").resolve()
    assert len(folder.relative_to(tmp_path).parts) == 3


@pytest.mark.parametrize("name", ["..", "../..", "models/..", "a/../.."])
def test_a_parent_folder_as_a_model_stays_inside_too(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, model=name)
    assert folder.resolve().parent.parent == (tmp_path / "locate").resolve()


def test_check_writable_makes_the_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_writable(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("below", ["", "runs", "runs/deep"])
def test_check_writable_refuses_a_path_at_or_below_a_file(tmp_path: Path, below: str) -> None:
    file = tmp_path / "file.txt"
    file.write_text("as it was")
    with pytest.raises(ValueError, match="cannot be made") as caught:
        check_writable(file / below)
    assert repr(str(file / below)) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert file.read_text() == "as it was"


def test_check_writable_refuses_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results.os, "access", lambda *_: False)  # chmod does not stop root, who may run the tests
    with pytest.raises(ValueError, match="not writable"):
        check_writable(tmp_path)


def test_write_json_replaces_and_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for value in ({"x": 1}, {"x": "é"}):
        write_json(path, value)
        assert read(path) == value
    assert everything_in(tmp_path) == ["a.json"]
    assert "é" in path.read_text("utf-8")


def test_a_content_hash_depends_on_content_and_not_on_the_order_of_keys() -> None:
    first = content_hash({"seed": 0, "model": "m"}, ["a", "b"])
    assert len(first) == 16
    assert content_hash({"model": "m", "seed": 0}, ["a", "b"]) == first
    others = [({"seed": 1, "model": "m"}, ["a", "b"]), ({"seed": 0, "model": "m"}, ["b", "a"]), (["a", "b"],)]
    assert first not in {content_hash(*parts) for parts in others}


def test_what_is_cached_is_made_once(tmp_path: Path) -> None:
    path, made = tmp_path / "new" / "cached.json", []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"range": (1, 2), "nan": math.nan}

    assert cached_json(path, make) == cached_json(path, make) == {"range": [1, 2], "nan": None}
    assert made == [1]
