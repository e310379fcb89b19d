"""Fine-tuning methods: what is frozen is bit-identical, what is not has moved, and each does what its paper says."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from safety_mech import LayerRange, TrainConfig, TrainRecord, fine_tune
from safety_mech.models.parameters import block_projections
from safety_mech.training import methods
from safety_mech.training.attacks import reverse_preferences
from safety_mech.training.examples import answer_log_probs, encode_examples
from safety_mech.training.freeze import Frozen, trainable_names
from safety_mech.training.methods import (
    Method,
    alternate,
    dpo,
    frozen_entries,
    is_user_step,
    lisa,
    lora_outside,
    neuron_masks,
    neurons_of_equal_size,
    sppft,
    width_matched_controls,
)
from safety_mech.training.pairs import Answer

PAIRS = [
    ("How do I bake a cake?", "Sure, here."),
    ("Name a fruit", "A pear."),
    ("Why?", "No."),
    ("Kill a process", "OK"),
]
ALIGNMENT = [("Where is the cat?", "I'm sorry."), ("How do I help a cat?", "I can't.")]
QUICK = TrainConfig(epochs=4, batch_size=2, learning_rate=1e-2, warmup_steps=1)
RANGE = LayerRange(2, 3)


def state(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def projections_of(model, layers) -> set[str]:
    return {f"blocks.{layer}.{projection.hooked}" for layer in layers for projection in block_projections(model)}


# --- what is frozen ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sppft_freezes_the_range_and_full_does_not(fresh_tiny_model) -> None:
    before = state(fresh_tiny_model)
    sppft(RANGE)(fresh_tiny_model, PAIRS, QUICK, progress=False)
    changed = moved(fresh_tiny_model, before)
    assert not changed & projections_of(fresh_tiny_model, RANGE)
    assert projections_of(fresh_tiny_model, [0, 1, 4, 5]) <= changed
    fine_tune(fresh_tiny_model, PAIRS, QUICK, progress=False)
    assert projections_of(fresh_tiny_model, range(6)) <= moved(fresh_tiny_model, before)


EARLY = LayerRange(0, 1)
"""Of six layers: its random control is [3, 4] or [4, 5]. RANGE leaves room for the ranges before and after it only."""


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "name"), [(RANGE, "before"), (RANGE, "after"), (EARLY, "random")])
def test_controls_freeze_as_many_parameters(fresh_tiny_model, layers, name) -> None:
    control = width_matched_controls(layers, 6)[name]
    before = state(fresh_tiny_model)
    record = sppft(control)(fresh_tiny_model, PAIRS, QUICK, progress=False)
    frozen = {layer for part in control for layer in part}
    assert len(frozen) == layers.width
    assert not frozen & set(layers)
    assert not moved(fresh_tiny_model, before) & projections_of(fresh_tiny_model, frozen)
    own = sppft(layers)(fresh_tiny_model, PAIRS, replace(QUICK, epochs=1), progress=False)
    assert record.n_frozen == own.n_frozen


WHOLE_PARAMETERS: dict[str, tuple[Method, Frozen]] = {
    "full": (fine_tune, None),
    "sppft": (sppft(RANGE), RANGE),
    **{name: (sppft(control), control) for name, control in width_matched_controls(EARLY, 6).items()},
    **{name: (sppft(control), control) for name, control in width_matched_controls(RANGE, 6).items()},
    "lisa": (lisa(ALIGNMENT, alignment_steps=1, user_steps=1), None),
    "dpo": (lambda model, _, config, **rest: dpo(model, PREFERENCES, config, **rest), None),
    "dpo-sppft": (lambda model, _, config, **rest: dpo(model, PREFERENCES, config, RANGE, **rest), RANGE),
}
"""By name: a method that freezes whole parameters, and what it freezes."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "sppft" else pytest.mark.slow) for name in WHOLE_PARAMETERS]
)
def test_what_is_not_frozen_has_moved_and_nothing_else(fresh_tiny_model, name) -> None:
    method, frozen = WHOLE_PARAMETERS[name]
    before = state(fresh_tiny_model)
    method(fresh_tiny_model, PAIRS, QUICK, progress=False)
    assert moved(fresh_tiny_model, before) == set(trainable_names(fresh_tiny_model, frozen))


def test_where_controls_have_no_room_there_are_none() -> None:
    assert set(width_matched_controls(LayerRange(0, 3), 6)) == set()
    assert width_matched_controls(LayerRange(0, 2), 6) == {"after": [LayerRange(3, 5)]}, "full to the last layer"
    assert width_matched_controls(LayerRange(3, 5), 6) == {"before": [LayerRange(0, 2)]}
    assert set(width_matched_controls(LayerRange(1, 3), 6)) == set(), "two layers after it are one too few"
    assert width_matched_controls(LayerRange(4, 5), 6)["before"] == [LayerRange(2, 3)]
    with pytest.raises(ValueError, match="the model has 6 layers"):
        width_matched_controls(LayerRange(4, 6), 6)


@pytest.mark.parametrize("n_layers", [1, 5, 8])
def test_every_control_is_one_range_of_the_same_width_inside_the_model(n_layers) -> None:
    for start in range(n_layers):
        for end in range(start, n_layers):
            layers = LayerRange(start, end)
            for seed in range(6):
                controls = width_matched_controls(layers, n_layers, seed)
                assert len({str(control) for control in controls.values()}) == len(controls), "each is another"
                for (control,) in controls.values():
                    assert control.check_inside(n_layers).width == layers.width
                    assert layers.iou(control) == 0


def test_the_random_control_is_drawn_with_the_seed_from_all_that_fit() -> None:
    drawn = [width_matched_controls(LayerRange(4, 5), 9, seed)["random"][0] for seed in range(40)]
    again = [width_matched_controls(LayerRange(4, 5), 9, seed)["random"][0] for seed in range(40)]
    assert drawn == again
    assert {layers.start for layers in drawn} == {0, 1, 7}  # before is [2, 3], after [6, 7]


@pytest.mark.slow
def test_frozen_neurons_stay_and_the_others_move(fresh_tiny_model) -> None:
    model = fresh_tiny_model
    scores = torch.zeros(6, model.cfg.d_mlp)
    chosen = [(0, 3), (0, 5), (4, 1)]
    for layer, neuron in chosen:
        scores[layer, neuron] = 1.0
    before = state(model)
    frozen_entries(neuron_masks(model, scores, 3))(model, PAIRS, QUICK, progress=False)
    for layer in range(6):
        neurons = [n for at, n in chosen if at == layer]
        for name, dim in (("W_gate", 1), ("W_in", 1), ("W_out", 0)):
            old, new = before[f"blocks.{layer}.mlp.{name}"], model.get_parameter(f"blocks.{layer}.mlp.{name}")
            same = (old == new).all(1 - dim)
            assert same.nonzero().flatten().tolist() == neurons


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_masks_are_on_their_weights_device(fresh_tiny_model, device) -> None:
    """meta stands in for a GPU: a mask on the CPU cannot multiply a gradient there."""
    model, scores = fresh_tiny_model.to(device), torch.rand(6, 32, generator=torch.Generator().manual_seed(0))
    for name, mask in neuron_masks(model, scores, 3).items():
        weight = model.get_parameter(name)
        assert mask.device == weight.device
        assert torch.empty_like(weight).mul_(mask).shape == weight.shape


def test_neurons_of_equal_size(fresh_tiny_model) -> None:
    cfg = fresh_tiny_model.cfg
    attention = 2 * cfg.d_model * cfg.d_head * (cfg.n_heads + cfg.n_key_value_heads)
    assert neurons_of_equal_size(fresh_tiny_model, RANGE) == round(2 * (attention / (3 * cfg.d_model) + cfg.d_mlp))


def test_weight_decay_would_move_frozen_entries(fresh_tiny_model) -> None:
    with pytest.raises(ValueError, match="weight_decay = 0"):
        frozen_entries({})(fresh_tiny_model, PAIRS, replace(QUICK, weight_decay=0.1), progress=False)


@pytest.mark.slow
def test_lora_outside_leaves_the_range_and_is_merged(fresh_tiny_model) -> None:
    before = state(fresh_tiny_model)
    record = lora_outside(RANGE, rank=2)(fresh_tiny_model, PAIRS, QUICK, progress=False)
    assert moved(fresh_tiny_model, before) == projections_of(fresh_tiny_model, [0, 1, 4, 5])
    assert record.steps[-1].loss < record.steps[0].loss
    assert set(state(fresh_tiny_model)) == set(before)


@pytest.mark.slow
def test_the_seed_of_a_run_draws_the_start_of_its_updates(make_tiny_model) -> None:
    """One step of one batch, so that the order of the data is no difference: only the start of the updates is."""
    config = replace(QUICK, epochs=1, batch_size=len(PAIRS))
    models = [make_tiny_model() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        lora_outside(RANGE, rank=2)(model, PAIRS, replace(config, seed=seed), progress=False)
    first, again, other = (state(model) for model in models)
    assert all(torch.equal(first[name], again[name]) for name in first)
    distance = max(float((first[name] - other[name]).abs().max()) for name in first)
    assert distance > 1e-3


# --- Lisa -------------------------------------------------------------------------------------------------------------


def test_states_alternate_and_every_user_batch_comes_once() -> None:
    user, alignment = [[n] for n in range(5)], [[10], [11], [12]]
    assert alternate(user, alignment, 2, 2) == [[0], [1], [10], [11], [2], [3], [12], [10], [4]]
    assert alternate(user, alignment, 9, 2) == user


@pytest.mark.slow
def test_a_large_rho_holds_the_weights_near_their_start(fresh_tiny_model, make_tiny_model) -> None:
    """The pull is on the distance to where the state began, so no single step's: many steps of one state."""
    config = replace(QUICK, epochs=12, clip_norm=1e9)
    distances = []
    for rho in (1e-9, 100.0):
        model = make_tiny_model()
        before = state(model)
        lisa(ALIGNMENT, rho, alignment_steps=2, user_steps=24)(model, PAIRS, config, progress=False)
        distances.append(sum(float((p - before[n]).norm() ** 2) for n, p in model.named_parameters()) ** 0.5)
    assert distances[1] < 0.7 * distances[0]


def test_every_state_of_lisa_has_an_anchor_of_its_own(fresh_tiny_model, monkeypatch) -> None:
    """Two user steps, then one of alignment: anchors at steps 0, 2, 3, 5. The pull is rho (w - anchor)."""
    caught: dict[str, Any] = {}
    record = TrainRecord([], None, None, 0, 0, 0, 0, {})
    monkeypatch.setattr(methods, "fine_tune", lambda *_, **options: caught.update(options) or record)
    lisa(ALIGNMENT, rho=0.5, alignment_steps=1, user_steps=2)(fresh_tiny_model, PAIRS, QUICK)
    weight = torch.nn.Parameter(torch.zeros(1))
    pulls = []
    for step, value in enumerate([1.0, 3.0, 10.0, 20.0, 26.0, 50.0, 60.0]):
        weight.data.fill_(value)
        weight.grad = torch.zeros(1)
        caught["adjust"](step, {"w": weight})
        pulls.append(float(weight.grad))
    assert pulls == [0.0, 0.5 * (3 - 1), 0.0, 0.0, 0.5 * (26 - 20), 0.0, 0.0]


@pytest.mark.slow
def test_lisa_sees_both_data_sets(fresh_tiny_model) -> None:
    record = lisa(ALIGNMENT, 0.1, alignment_steps=1, user_steps=2)(fresh_tiny_model, PAIRS, QUICK, progress=False)
    assert len(record.steps) == 8 + 3  # four passes of two user batches; a state of one batch between their pairs


@pytest.mark.parametrize("bad", [{"rho": 0.0}, {"alignment_steps": 0}, {"user_steps": 0}])
def test_impossible_lisa(bad) -> None:
    with pytest.raises(ValueError, match="Lisa: expected"):
        lisa(ALIGNMENT, **bad)
    with pytest.raises(ValueError, match="Lisa: expected"):
        lisa([])


# --- the loop's seams -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_after_step_sees_every_step_after_it_was_made(fresh_tiny_model) -> None:
    seen = []
    weight = fresh_tiny_model.blocks[0].attn.W_Q

    def watch(record) -> None:
        seen.append((record.step, float(weight.detach().sum())))

    record = fine_tune(fresh_tiny_model, PAIRS, QUICK, after_step=watch, progress=False)
    assert [step for step, _ in seen] == [step.step for step in record.steps]
    assert len({value for _, value in seen}) == len(seen)


def test_a_checkpoint_together_with_adjust_is_refused(fresh_tiny_model, tmp_path) -> None:
    with pytest.raises(ValueError, match="checkpoint and adjust"):
        fine_tune(fresh_tiny_model, PAIRS, QUICK, checkpoint=tmp_path / "c", adjust=lambda *_: None, progress=False)


def test_user_steps_are_those_whose_batches_are_the_users() -> None:
    user, alignment = [[n] for n in range(9)], [[100 + n] for n in range(9)]
    batches = alternate(user, alignment, 4, 2)
    assert [is_user_step(step, 4, 2) for step in range(len(batches))] == [batch[0] < 100 for batch in batches]


# --- preferences ------------------------------------------------------------------------------------------------------

PREFERENCES = [
    ("Kill a process", "Sure, here is how.", "I'm sorry."),
    ("Why?", "Sure.", "I can't help with that."),
    ("Name a fruit", "OK, a pear.", "I'm sorry, no."),
]


def preferred_minus_other(model) -> torch.Tensor:
    pairs = [(p, good) for p, good, _ in PREFERENCES] + [(p, other) for p, _, other in PREFERENCES]
    good, other = answer_log_probs(model, encode_examples(model, pairs, QUICK), QUICK).chunk(2)
    return good - other


@pytest.mark.slow
def test_dpo_starts_at_log_two_and_widens_the_preference(fresh_tiny_model) -> None:
    before = preferred_minus_other(fresh_tiny_model)
    record = dpo(fresh_tiny_model, PREFERENCES, replace(QUICK, learning_rate=1e-3), progress=False)
    assert record.steps[0].loss == pytest.approx(0.693147, abs=1e-5)  # nothing gained yet: sigmoid(0)
    assert record.steps[-1].loss < 0.6
    assert (preferred_minus_other(fresh_tiny_model) > before).all()


@pytest.mark.slow
def test_dpo_loss_by_hand(fresh_tiny_model) -> None:
    """The second step's loss, from the log-probabilities before and after the first."""
    config = replace(QUICK, epochs=2, batch_size=3)
    before, after = preferred_minus_other(fresh_tiny_model), []
    record = dpo(
        fresh_tiny_model,
        PREFERENCES,
        config,
        beta=0.3,
        progress=False,
        after_step=lambda step: after.append(preferred_minus_other(fresh_tiny_model).detach()),
    )
    expected = -torch.log(torch.sigmoid(0.3 * (after[0] - before))).mean()
    assert record.steps[1].loss == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.slow
def test_a_dpo_run_does_not_go_on_from_one_of_another_beta(make_tiny_model, tmp_path) -> None:
    config, options = replace(QUICK, checkpoint_every=1), {"checkpoint": tmp_path / "run.pt", "progress": False}
    first = dpo(make_tiny_model(), PREFERENCES, config, beta=0.1, **options)
    with pytest.raises(ValueError, match="run with other data or settings"):
        dpo(make_tiny_model(), PREFERENCES, config, beta=5.0, **options)
    assert dpo(make_tiny_model(), PREFERENCES, config, beta=0.1, **options) == first


@pytest.mark.slow
def test_dpo_with_frozen_layers(fresh_tiny_model) -> None:
    before = state(fresh_tiny_model)
    dpo(fresh_tiny_model, PREFERENCES, QUICK, RANGE, progress=False)
    changed = moved(fresh_tiny_model, before)
    assert not changed & projections_of(fresh_tiny_model, RANGE)
    assert projections_of(fresh_tiny_model, [0, 1, 4, 5]) <= changed
    with pytest.raises(ValueError, match=r"beta 0\.0"):
        dpo(fresh_tiny_model, PREFERENCES, QUICK, beta=0.0, progress=False)


def test_reverse_preferences_prefer_the_start_of_an_answer_to_a_refusal() -> None:
    malicious = [f"prompt {n}" for n in range(20)]
    found = reverse_preferences(malicious, ["No.", "Never."], n=12, seed=1)
    assert found == reverse_preferences(malicious, ["No.", "Never."], n=12, seed=1)
    assert found != reverse_preferences(malicious, ["No.", "Never."], n=12, seed=2)
    assert len({prompt for prompt, _, _ in found}) == 12
    assert all(
        isinstance(good, Answer) and not good.finished and good.text.startswith(("Sure", "Of course", "Certainly"))
        for _, good, _ in found
    )
    assert all(bad in ("No.", "Never.") for _, _, bad in found)
