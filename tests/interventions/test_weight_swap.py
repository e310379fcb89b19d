"""Weight change and swapped layers, against models that were really put together from two."""

import pytest
import torch
from tiny import build_tiny_model
from transformer_lens import HookedTransformer

from safety_mech import LayerRange
from safety_mech.interventions.scaling import scaled
from safety_mech.interventions.weight_swap import swapped, weight_change

TOKENS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def two_models() -> tuple[HookedTransformer, HookedTransformer]:
    """A base, and a model of which layers 2 and 3 are others."""
    base, other = (build_tiny_model(seed, dtype=torch.float64).to(torch.float64) for seed in (0, 1))
    model = build_tiny_model(0, dtype=torch.float64).to(torch.float64)
    for layer in (2, 3):
        model.blocks[layer].load_state_dict(other.blocks[layer].state_dict())
    return model, base


def copy_of(model: HookedTransformer) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_weight_change_by_hand(two_models):
    model, base = two_models
    found = weight_change(model, base)
    assert found[[0, 1, 4, 5]].tolist() == [0.0] * 4
    matrices = [
        (p, q)
        for (_, p), (_, q) in zip(model.blocks[2].named_parameters(), base.blocks[2].named_parameters(), strict=True)
        if p.ndim > 1
    ]
    moved, size = (
        torch.cat([x.flatten() for x in side]) for side in ([p - q for p, q in matrices], [q for _, q in matrices])
    )
    assert float(found[2]) == pytest.approx(float(moved.norm() / size.norm()))
    assert float(found[3]) > 0.5


@pytest.mark.slow
def test_all_changed_layers_swapped_give_the_base(two_models):
    model, base = two_models
    before = copy_of(model)
    with swapped(model, base, LayerRange(2, 3)):
        torch.testing.assert_close(model(TOKENS), base(TOKENS), rtol=0, atol=0)
    assert not torch.allclose(model(TOKENS), base(TOKENS))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_one_swapped_layer_is_a_model_put_together(two_models):
    model, base = two_models
    built = build_tiny_model(0, dtype=torch.float64).to(torch.float64)
    built.blocks[3].load_state_dict(model.blocks[3].state_dict())
    with swapped(model, base, LayerRange(2, 2)):
        assert torch.equal(model(TOKENS), built(TOKENS))


@pytest.mark.slow
def test_hooks_stay_in_place(two_models):
    model, base = two_models
    with scaled(base, LayerRange(2, 2), 1.5):
        expected = base(TOKENS)
    with swapped(model, base, LayerRange(2, 3)), scaled(model, LayerRange(2, 2), 1.5):
        assert torch.equal(model(TOKENS), expected)


@pytest.mark.slow
def test_leaving_by_an_exception_restores_both(two_models):
    model, base = two_models
    before = [copy_of(part) for part in two_models]
    with pytest.raises(RuntimeError, match="stop"), swapped(model, base, LayerRange(0, 5)):
        raise RuntimeError("stop")
    for part, old in zip(two_models, before, strict=True):
        assert all(torch.equal(parameter, old[name]) for name, parameter in part.named_parameters())
    assert model.blocks[2].mlp.W_in.data_ptr() != base.blocks[2].mlp.W_in.data_ptr()


def test_models_that_do_not_belong_together(tiny_model):
    fewer, wider = build_tiny_model(n_layers=4), build_tiny_model(d_mlp=48)
    with pytest.raises(ValueError, match="6 and 4 layers: not its base"):
        weight_change(tiny_model, fewer)
    with (
        pytest.raises(ValueError, match="layer 1 of model and base has parameters of different shapes"),
        swapped(tiny_model, wider, LayerRange(1, 1)),
    ):
        pass
    with pytest.raises(ValueError, match="the model has 6 layers"), swapped(tiny_model, tiny_model, LayerRange(1, 6)):
        pass
