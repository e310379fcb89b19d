"""`experiments/align.py` on a tiny model: an adapter with its recipe and figures, resumed and repeated to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import safety_mech as sm
from safety_mech.commands import align, align_run


@pytest.fixture
def config_for(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """With a dozen prompts of each split."""
    load_prompts, load_pairs = sm.load_prompts, sm.load_pairs
    monkeypatch.setattr(sm, "load_prompts", lambda *which: load_prompts(*which)[:12])
    monkeypatch.setattr(sm, "load_pairs", lambda *which: load_pairs(*which)[:3])

    def make(**changes: object) -> Any:
        settings = {
            "model": str(llama_folder),
            "rank": 2,
            "n_over_rejection": 4,
            "epochs": 1,
            "bfloat16": False,
            "name": "tiny",
            "out": str(tmp_path / "adapters"),
        }
        return align.AlignRun(**{**settings, **changes})

    return make


@pytest.mark.slow
def test_a_run_leaves_an_adapter_with_its_recipe(
    config_for: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = tmp_path / "extra.txt"
    extra.write_text("Why is the sky blue?\nName a fruit.\n")
    config = config_for(planted="1-2", seed=3, batch_size=8, learning_rate=1e-2, extra=(str(extra),))
    folder = align.main(config)
    assert folder == Path(config.out) / "tiny"
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["recipe"]["planted"] == {"start": 1, "end": 2}
    assert recipe["recipe"]["seed"] == recipe["recipe"]["train"]["seed"] == 3
    assert recipe["examples"] <= 2 * (12 + 2 * 3) + 4
    assert set(recipe["aligned"]["refused"]) == {"malicious", "normal", "over_rejection", str(extra)}
    assert recipe["aligned"]["refused"][str(extra)]["total"] == 2
    layers = {name.split("layers.")[1].split(".")[0] for name in load_file(folder / "adapter_model.safetensors")}
    assert layers == {"1", "2"}
    assert not folder.with_name("tiny.checkpoint").exists()
    first, last = (recipe[name]["perplexity_of_base_answers"] for name in ("base", "aligned"))
    assert f"{first:.3f} -> {last:.3f} ({last / first - 1:+.1%})" in capsys.readouterr().out
    sm.load_model(config.model, adapter=folder)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter(config_for: Callable[..., Any]) -> None:
    def weights(**changes: object) -> bytes:
        return (align.main(config_for(**changes)) / "adapter_model.safetensors").read_bytes()

    first = weights()
    assert first == weights()
    others = ({"seed": 1}, {"rank": 1, "epochs": 2}, {"learning_rate": 1e-2}, {"n_over_rejection": 2})
    assert len({first, *(weights(**change) for change in others)}) == 5


@pytest.mark.slow
def test_the_bases_answers_are_made_once(config_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    align.main(config_for())
    monkeypatch.setattr(align_run, "own_answer_pairs", lambda *_: pytest.fail("answered again"))
    align.main(config_for(name="other", bfloat16=True))
    with pytest.raises(pytest.fail.Exception, match="answered again"):  # control: of other prompts
        align.main(config_for(n_over_rejection=3))
