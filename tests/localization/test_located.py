"""What is measured once for several locators, and for how long it is kept."""

from dataclasses import replace

import pytest
from transformer_lens import HookedTransformer

from safety_mech.localization.located import PromptSets, measured_once, shared_measurements

SETS = PromptSets(["Why?"], ["How?"], phrases=("Sorry",))


def test_what_was_measured_is_kept_inside_only(tiny_model: HookedTransformer) -> None:
    values = iter(range(100))

    def ask(sets: PromptSets = SETS, what: str = "x") -> int:
        return measured_once((what,), tiny_model, sets, lambda: next(values))

    with shared_measurements():
        assert [ask(), ask()] == [0, 0]
        assert ask(what="y") == 1
    assert [ask(), ask()] == [2, 3], "outside, nothing is kept"
    with pytest.raises(RuntimeError, match="stop"), shared_measurements():
        raise RuntimeError("stop")
    assert [ask(), ask()] == [4, 5]
    with shared_measurements():
        assert ask() == 6, "a new block starts empty"


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"phrases": ("I can't",)}, {"template": "alpaca"}, {"malicious": ["Who?"]}, {"normal": ["Who?"]}],
    ids=str,
)
def test_other_settings_are_measured_anew(tiny_model: HookedTransformer, change: dict) -> None:
    values = iter(range(100))
    with shared_measurements():
        for sets, expected in ((SETS, 0), (replace(SETS, **change), 1), (SETS, 0)):
            assert measured_once(("x",), tiny_model, sets, lambda: next(values)) == expected
