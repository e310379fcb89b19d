"""What a command line is refused for before torch is imported, which takes ten times as long as these checks.

Rooms that own these names import torch, so the names stand here once more; a test holds them equal to their owners'.
"""

import math
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from safety_mech.models.sources import find_source
from safety_mech.reporting.runs import check_writable

TEMPLATES = ("own", "alpaca", "alpaca_short")
RECIPES = ("attn_out", "mlp_out", "weights", "weights_no_o")
DTYPES = ("float32", "bfloat16", "float16")
LOCATORS = (
    "gap",
    "search",
    "search_below",
    "search_weights",
    "grid",
    "direction",
    "patching",
    "decision",
    "decision_window",
    "margin_attn",
)
BASE_METHODS = ("gap_difference", "weight_change", "swap")
DEVICE = re.compile(r"(cpu|mps|(cuda|xpu|hip)(:\d+)?)")


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ValueError for a value that is not among `known`."""
    if value not in known:
        raise ValueError(f"{name} {value!r}: expected one of {', '.join(known)}")


def check_methods(methods: Iterable[str], known: Sequence[str] = (*LOCATORS, *BASE_METHODS)) -> None:
    """Raise ValueError for a locator that is not among `known`."""
    for method in methods:
        if method not in known:
            raise ValueError(f"method {method!r}: expected some of {', '.join(known)}")


def check_at_least(least: int, **counts: int) -> None:
    """Raise ValueError for the first count below `least`."""
    for name, count in counts.items():
        if count < least:
            raise ValueError(f"{name} = {count}: expected at least {least}")


def check_rising(name: str, numbers: Sequence[int]) -> None:
    """Raise ValueError for numbers that do not rise from 1."""
    if not numbers or numbers[0] < 1 or any(b <= a for a, b in pairwise(numbers)):
        raise ValueError(f"{name} {list(numbers)}: expected rising numbers, from 1 on")


def check_alpha(alpha: float | str) -> None:
    """Raise ValueError for a number that layers cannot be scaled by; the rules (auto, paper) pass."""
    if isinstance(alpha, str):
        return
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha = {alpha}: expected a finite number above 0")
    if alpha == 1:
        raise ValueError("alpha = 1 changes nothing: expected a number above or below, or the rule auto or paper")


def check_model(
    *,
    model: str,
    out: str,
    template: str = "own",
    device: str | None = None,
    dtype: str = "float32",
    adapter: str | None = None,
    base: str | None = None,
) -> None:
    """Raise ValueError for a template, dtype or device that is unknown, a model, adapter or base that leads nowhere, or
    an output folder that cannot be written.

    Torch is imported only for a device other than the CPU: to tell whether it is there.
    """
    check_choice("template", template, TEMPLATES)
    check_choice("dtype", dtype, DTYPES)
    find_source(model, adapter)
    if base not in (None, "auto"):
        find_source(base)
    check_writable(out)
    if device in (None, "cpu"):
        return
    if not DEVICE.fullmatch(device):
        raise ValueError(f"device {device!r} cannot be used here: expected cpu, cuda, cuda:N or mps")
    from safety_mech.models.loading import check_device  # imports torch

    check_device(device)
