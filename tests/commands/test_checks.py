"""What is refused before torch is imported: the same names as where they are used, and at once."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from safety_mech.commands import checks
from safety_mech.commands.align import AlignRun
from safety_mech.commands.locate import LocateConfig
from safety_mech.commands.validity import ValidityConfig
from safety_mech.divergence.angles import Unit
from safety_mech.divergence.resampling import Statistic
from safety_mech.interventions.scaling import RECIPES
from safety_mech.localization.locators import BASE_METHODS, LOCATORS
from safety_mech.localization.safety_layers import LEAST_EFFECT, LEAST_REFUSED
from safety_mech.models.chat import PLAIN_TEMPLATES
from safety_mech.models.sources import DTYPES
from safety_mech.training.alignment import AlignConfig

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def test_the_names_are_their_owners() -> None:
    assert ("own", *PLAIN_TEMPLATES) == checks.TEMPLATES
    assert tuple(RECIPES) == checks.RECIPES
    assert tuple(DTYPES) == checks.DTYPES
    fields = LocateConfig.__dataclass_fields__
    assert fields["statistic"].type == Statistic
    assert fields["bootstrap_over"].type == Unit
    assert (LocateConfig.least_effect, LocateConfig.least_refused) == (LEAST_EFFECT, LEAST_REFUSED)
    assert set(get_args(fields["alpha"].type)) >= {float}
    assert tuple(LOCATORS) == checks.LOCATORS
    assert BASE_METHODS == checks.BASE_METHODS
    assert ValidityConfig.__dataclass_fields__["statistic"].type == Statistic


@pytest.mark.parametrize(
    ("numbers", "rise"), [((1,), True), ((2, 4), True), ((), False), ((0, 1), False), ((2, 2), False)]
)
def test_numbers_that_rise_from_one(numbers: tuple[int, ...], rise: bool) -> None:
    if rise:
        checks.check_rising("doses", numbers)
    else:
        with pytest.raises(ValueError, match="expected rising numbers, from 1 on"):
            checks.check_rising("doses", numbers)


def test_the_defaults_of_align_are_the_recipe() -> None:
    recipe, run = AlignConfig(), AlignRun()
    assert (run.rank, run.n_over_rejection, run.seed) == (recipe.rank, recipe.n_over_rejection, recipe.seed)
    for name in ("epochs", "batch_size", "learning_rate", "bfloat16"):
        assert getattr(run, name) == getattr(recipe.train, name)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan"), 1.0])
def test_an_alpha_that_scales_nothing(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha = "):
        checks.check_alpha(alpha)
    checks.check_alpha(1.2)
    checks.check_alpha("paper")


RUN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    heavy = [name for name in ("torch", "transformers", "transformer_lens", "matplotlib") if name in sys.modules]
    print(f"status {stopped.code}, imported {heavy}")
"""
ANSWERED = {
    "help": (["--help"], 0),
    "missing file": (["--malicious", "absent.csv"], 2),
    "unknown flag": (["--modle", "x"], 2),
    "unknown model": (["--model", "nonsense"], 2),
    "unknown device": (["--device", "abacus"], 2),
}


OF_SCRIPT = {
    "align": [["--extra", "absent.csv"], ["--model", "nonsense"], ["--planted", "a-b"], ["--rank", "0"]],
    "planted": [["--adapters", "absent"], ["--model", "nonsense"], ["--methods", "magic"], ["--template", "poem"]],
    "ranges": [["--sets", "absent.csv"], ["--model", "nonsense"], ["--recipes", "magic"], ["--templates", "poem"]],
    "sppft": [["--malicious", "absent.csv"], ["--methods", "magic"]],
    "stability": [["--malicious-sets", "absent.csv"], ["--base", "nonsense"], ["--methods", "magic"]],
    "stages": [["--malicious", "absent.csv"], ["--model", "nonsense"]],
    "validity": [["--malicious", "absent.csv"], ["--model", "nonsense"], ["--device", "abacus"], ["--splits", "2"]],
}
"""A missing file and refused flags, command by command."""


@pytest.mark.slow
@pytest.mark.parametrize("script", OF_SCRIPT)
def test_help_is_answered_without_torch(script: str, tmp_path: Path) -> None:
    answered_without_torch(script, ["--help"], 0, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"), [(script, arguments) for script, listed in OF_SCRIPT.items() for arguments in listed]
)
def test_a_refusal_is_answered_without_torch(script: str, arguments: list[str], tmp_path: Path) -> None:
    answered_without_torch(script, arguments, 2, tmp_path)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ANSWERED)
def test_locate_is_answered_without_torch(name: str, tmp_path: Path) -> None:
    answered_without_torch("locate", *ANSWERED[name], tmp_path)


def answered_without_torch(script: str, arguments: list[str], status: int, tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-c", RUN, str(EXPERIMENTS / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert outcome.stdout.splitlines()[-1] == f"status {status}, imported []", outcome.stderr
