"""Neuron attribution against finite differences."""

import pytest
import torch

from safety_mech.training.config import TrainConfig
from safety_mech.training.examples import answer_log_probs, encode_examples
from safety_mech.training.methods import neuron_scores

PAIRS = [("Kill a process", "I'm sorry."), ("Why?", "I can't help with that."), ("Name a fruit", "Sure, a pear.")]
STEP = 0.02  # the loss is read in float32, even of a float64 model


def log_prob_with(model, pair, layer: int, neuron: int, factor: float) -> float:
    """Of the answer, with one neuron scaled at all positions after the shared prefix (a single pair shares most)."""
    prefix_seen = []

    def scale(activation, hook):
        if not prefix_seen:
            prefix_seen.append(activation.shape)
            return activation
        activation = activation.clone()
        activation[..., neuron] *= factor
        return activation

    config = TrainConfig()
    with torch.no_grad(), model.hooks(fwd_hooks=[(f"blocks.{layer}.mlp.hook_post", scale)]):
        return float(answer_log_probs(model, encode_examples(model, [pair], config), config).sum())


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "neuron"), [(0, 3), (2, 11), (5, 30)])
def test_scores_are_what_scaling_a_neuron_does_to_first_order(make_tiny_model, layer: int, neuron: int) -> None:
    model = make_tiny_model().double()
    expected = 0.0
    for pair in PAIRS:
        values = [log_prob_with(model, pair, layer, neuron, 1 + sign * STEP) for sign in (1, -1)]
        expected += abs(values[0] - values[1]) / (2 * STEP) / len(PAIRS)
    found = neuron_scores(model, PAIRS, batch_size=1)
    assert found.shape == (6, model.cfg.d_mlp)
    assert float(found[layer, neuron]) == pytest.approx(expected, rel=0.02)
    assert float(found[layer, neuron]) > 1e-3, "control: the neuron matters"


def test_the_model_is_left_as_it_was(make_tiny_model) -> None:
    model = make_tiny_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    neuron_scores(model, PAIRS)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    assert all(weight.grad is None for weight in model.parameters())
