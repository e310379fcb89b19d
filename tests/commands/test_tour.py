"""`experiments/tour.ipynb` runs from top to bottom, without a network, and its page opens in a browser."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook

TOUR = Path(__file__).resolve().parents[2] / "experiments" / "tour.ipynb"
NOT_STORED = "output-not-stored"
"""Tag of a cell whose output is too large to be stored in the file."""
NOWHERE = "http://127.0.0.1:9"
OFFLINE = {"HF_HUB_OFFLINE": "1", "http_proxy": NOWHERE, "https_proxy": NOWHERE, "HTTPS_PROXY": NOWHERE}


def execute(path: Path, timeout: int = 900) -> NotebookNode:
    """Run a copy of the notebook; the first cell that fails raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(path.parent)}})
    client.execute(env={**os.environ, **OFFLINE})
    nbformat.write(notebook, path)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(cell: NotebookNode) -> str:
    """What a cell printed and returned, as text."""
    parts = [output.get("text") or output.get("data", {}).get("text/html", "") for output in cell.outputs]
    return "".join(parts)


def cell_with(notebook: NotebookNode, source: str) -> NotebookNode:
    (found,) = [cell for cell in code_cells(notebook) if source in cell.source]
    return found


def has_picture(cell: NotebookNode) -> bool:
    return any("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[NotebookNode, Path]:
    path = tmp_path_factory.mktemp("tour") / "tour.ipynb"
    shutil.copy(TOUR, path)
    return execute(path), path


@pytest.mark.slow
def test_a_broken_cell_is_noticed(tmp_path: Path) -> None:
    """The negative control of everything below."""
    path = tmp_path / "broken.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 + 1"), new_code_cell("1 / 0")]), path)
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        execute(path)


def test_the_file_is_small_whole_and_as_it_ran() -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    assert TOUR.stat().st_size < 1_500_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert bool(cell.outputs) != (NOT_STORED in cell.metadata.get("tags", []))
        assert not [
            output for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"
        ]


@pytest.mark.long_run
@pytest.mark.real_model
def test_every_code_cell_runs_and_shows_something(executed: tuple[NotebookNode, Path]) -> None:
    notebook, _ = executed
    for cell in code_cells(notebook):
        assert cell.execution_count is not None
        assert cell.outputs, cell.source
        assert not [output for output in cell.outputs if output.output_type == "error"]


@pytest.mark.long_run
@pytest.mark.real_model
def test_key_outputs(executed: tuple[NotebookNode, Path]) -> None:
    notebook, _ = executed
    answers = texts_of(cell_with(notebook, '("base", base), ("aligned", model)):\n    answers'))
    assert "I'm sorry" in answers.split("aligned")[1]
    assert "I'm sorry" not in answers.split("aligned")[0]
    gap = cell_with(notebook, "sm.gap_difference")
    assert has_picture(gap)
    assert re.search(r"aligned minus base: \d\.\d\d degrees", texts_of(gap))
    scaled = [line.split() for line in texts_of(cell_with(notebook, "for alpha in (0.7, 0.85")).splitlines()[2:]]
    means = {float(alpha): [float(value) for value in values] for alpha, *values in scaled}
    assert sorted(means) == [0.7, 0.85, 1.0, 1.15, 1.3]
    assert means[1.0][0] > 0 > means[1.0][2], "malicious prompts are refused, normal ones are not"
    assert means[0.7] != means[1.0]
    assert has_picture(cell_with(notebook, "sm.plot_contrastive_pair"))
    assert has_picture(cell_with(notebook, "sm.plot_word_shares"))
    assert re.search(r"located \[|no safety layers located", texts_of(cell_with(notebook, "found = sm.locate")))
    assert "no safety layers located: the model refuses" in texts_of(cell_with(notebook, "control = sm.locate"))
    moved = re.search(r"before layer \d+: 0\.0000, in it: (\d\.\d+)", texts_of(cell_with(notebook, "def silence")))
    assert moved
    assert float(moved[1]) > 0


@pytest.mark.long_run
@pytest.mark.real_model
def test_the_page_opens_without_a_network(
    executed: tuple[NotebookNode, Path], open_file: Callable[[Path], Any], tmp_path: Path
) -> None:
    notebook, _ = executed
    exporter = HTMLExporter()
    for name in exporter.traits():
        if name.endswith("_url"):  # what nbconvert's template would load from elsewhere
            setattr(exporter, name, "")
    html, _ = exporter.from_notebook_node(notebook)
    (tmp_path / "tour.html").write_text(html, encoding="utf-8")
    page = open_file(tmp_path / "tour.html")
    assert page.wait_for(".circuitsvis div div")
    assert page.count("img") >= 4
    assert page.errors() == []
    assert page.requests() == []
