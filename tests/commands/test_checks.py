"""What is refused before torch is imported: the same names as where they are used, and at once."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from safety_mech.commands import checks
from safety_mech.commands.locate import LocateConfig
from safety_mech.divergence.angles import Unit
from safety_mech.divergence.resampling import Statistic
from safety_mech.interventions.scaling import RECIPES
from safety_mech.localization.safety_layers import LEAST_EFFECT, LEAST_REFUSED
from safety_mech.models.chat import PLAIN_TEMPLATES
from safety_mech.models.sources import DTYPES

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


@pytest.mark.parametrize("script", ["locate"])
@pytest.mark.parametrize("name", ANSWERED)
def test_it_is_answered_without_torch(name: str, script: str, tmp_path: Path) -> None:
    arguments, status = ANSWERED[name]
    outcome = subprocess.run(
        [sys.executable, "-c", RUN, str(EXPERIMENTS / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
    )
    assert outcome.stdout.splitlines()[-1] == f"status {status}, imported []", outcome.stderr
