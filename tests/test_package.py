"""What `import safety_mech` offers, and that it costs nothing until it is used."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import safety_mech

PACKAGE = Path(safety_mech.__file__).parent


@pytest.mark.parametrize("name", safety_mech.__all__)
def test_a_public_name_is_the_thing_of_that_name(name: str) -> None:
    thing = getattr(safety_mech, name)
    if callable(thing):
        assert thing.__name__ == name
    else:
        assert name.isupper(), "control: constants alone have no name of their own"


def test_editors_and_the_interpreter_see_the_same_names() -> None:
    """Imports under TYPE_CHECKING against the table that `__getattr__` reads."""
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(safety_mech))) if isinstance(node, ast.ImportFrom)]
    listed = {
        (alias.name, (node.module or "").removeprefix("safety_mech."))
        for node in imports
        if (node.module or "").startswith("safety_mech.")
        for alias in node.names
    }
    assert listed == set(safety_mech._HOME.items())
    assert set(safety_mech.__all__) <= set(dir(safety_mech))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = safety_mech.nonsense


def test_a_file_of_a_room_is_a_module() -> None:
    """No public name hides the file of the same name."""
    files = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py") if path.stem != "__init__"]
    for file in files:
        dotted = ".".join(file.parts)
        parent = importlib.import_module(f"safety_mech.{dotted}".rpartition(".")[0])
        importlib.import_module(f"safety_mech.{dotted}")
        assert isinstance(getattr(parent, file.name), ModuleType), dotted


@pytest.mark.slow
def test_no_torch_is_imported_before_it_is_used() -> None:
    """`stats`, which needs it, is the control."""
    code = """
import sys
import safety_mech, safety_mech.prompts, safety_mech.models.sources
print("torch" in sys.modules, "transformers" in sys.modules)
import safety_mech.stats
print("torch" in sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["False", "False", "True"]
