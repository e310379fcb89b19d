"""A room imports only from rooms above it, in the list that CONTRIBUTING.md gives."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "safety_mech"


def listed() -> list[str]:
    text = (ROOT / "CONTRIBUTING.md").read_text().partition("## Rooms")[2]
    found = re.search(r"```\n(.+?)\n```", text, re.DOTALL)
    assert found, "CONTRIBUTING.md, ## Rooms: expected a fenced list of the rooms"
    return [name.strip() for name in found[1].replace("\n", " ").split(",")]


ROOMS = listed()


def imported_rooms(source: str) -> list[tuple[int, str]]:
    """Line and room of every import from the package, also of those inside functions."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "safety_mech" else [module]
            assert node.level == 0, f"line {node.lineno}: expected absolute imports"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts = [name.split(".") for name in names]
        found += [(node.lineno, (*part, "")[1]) for part in parts if part[0] == "safety_mech"]
    return found


def upwards(source: str, room: str) -> list[tuple[int, str]]:
    """Imports from rooms below, or from the package itself, whose names come from everywhere (the last room may)."""
    allowed = [*ROOMS[: ROOMS.index(room) + 1], *[""] * (room == ROOMS[-1])]
    return [(line, name) for line, name in imported_rooms(source) if name not in allowed]


def test_the_list_holds_every_room_there_is() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.stem not in ("__init__", "__pycache__", "data")}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_above_it(room: str) -> None:
    files = [*(PACKAGE / room).rglob("*.py")] or [PACKAGE / f"{room}.py"]
    found = {str(path.relative_to(ROOT)): upwards(path.read_text(), room) for path in files}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_an_import_from_below_is_seen_wherever_it_stands() -> None:
    """Control."""
    source = (
        "from safety_mech.layers import LayerRange\n"
        "import torch\n"
        "def f():\n"
        "    from safety_mech.training.loop import mean_loss\n"
        "    import safety_mech.reporting.plots\n"
        "    from safety_mech import load_model, layers\n"
    )
    assert upwards(source, "refusal") == [(4, "training"), (5, "reporting"), (6, "load_model")]
    assert upwards(source, "reporting") == [(6, "load_model")]
