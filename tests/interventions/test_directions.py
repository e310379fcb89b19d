"""Refusal directions: means and separation by hand, and interventions against the formula at every hook."""

import pytest
import torch
from tiny import GPT2_STYLE, build_tiny_model
from torch import Tensor

from safety_mech import LayerRange, last_token_residuals
from safety_mech.interventions.directions import ablated, added, auc, d_prime, difference_of_means, separation


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_difference_of_means_by_hand_in_float64():
    normal = torch.tensor([[[1e8, 0.0]], [[1e8, 2.0]]])
    malicious = torch.tensor([[[1e8, 4.0]]])
    found = difference_of_means(normal, malicious)
    assert found.dtype == torch.float64
    assert found.tolist() == [[0.0, 3.0]]


def test_auc_and_d_prime_equal_their_definitions():
    normal, malicious = torch.randn(9, 3, generator=seeded()).double(), torch.randn(7, 3, generator=seeded(1)).double()
    normal[0, 0] = malicious[0, 0]  # a tie
    for layer in range(3):
        wins = [(m > n) + 0.5 * (m == n) for m in malicious[:, layer] for n in normal[:, layer]]
        assert auc(normal, malicious)[layer] == pytest.approx(float(sum(wins)) / 63, abs=1e-12)
        spread = ((normal[:, layer].var() + malicious[:, layer].var()) / 2) ** 0.5
        expected = (malicious[:, layer].mean() - normal[:, layer].mean()) / spread
        assert d_prime(normal, malicious)[layer] == pytest.approx(float(expected))


def test_held_out_prompts_are_not_separated_by_chance():
    """More dimensions than prompts: in the sample every direction separates; on held-out prompts only a real one."""
    noise_n, noise_m = torch.randn(40, 2, 400, generator=seeded()), torch.randn(40, 2, 400, generator=seeded(1))
    noise_m[:, 1, 0] += 8  # layer 1 has a difference
    found = separation(noise_n, noise_m)
    assert 0.3 < found.auc[0] < 0.7
    assert abs(found.d_prime[0]) < 1
    assert found.auc[1] > 0.9
    assert found.d_prime[1] > 2
    inside = [torch.einsum("pld,ld->pl", x.double(), difference_of_means(noise_n, noise_m)) for x in (noise_n, noise_m)]
    assert auc(*inside)[0] > 0.99  # control: what a direction makes of its own prompts


def test_separation_does_not_depend_on_lengths_of_layers():
    normal, malicious = torch.randn(20, 3, 6, generator=seeded()), torch.randn(20, 3, 6, generator=seeded(1)) + 1
    scales = torch.tensor([1.0, 100.0, 0.01])[:, None]
    plain, longer = separation(normal, malicious), separation(normal * scales, malicious * scales)
    torch.testing.assert_close(plain.d_prime, longer.d_prime, rtol=1e-4, atol=1e-6)
    assert torch.equal(plain.auc, longer.auc)


def test_folds_are_drawn_with_the_seed_and_pairs_stay_together():
    normal, malicious = torch.randn(20, 2, 6, generator=seeded()), torch.randn(20, 2, 6, generator=seeded(1))
    first, again, other = (separation(normal, malicious, seed=seed).d_prime for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # The malicious prompt is a copy of its normal one, plus a constant that alone separates them in their own fold.
    pairs = separation(normal, normal + 1e-3, paired=True)
    assert (pairs.auc >= 0.5).all()


@pytest.mark.parametrize(
    ("n", "m", "options", "message"),
    [
        (9, 20, {}, "5 folds of 9 prompts"),
        (20, 20, {"folds": 1}, "1 folds of 20 prompts"),
        (20, 21, {"paired": True}, "are not contrastive pairs"),
    ],
)
def test_bad_sets(n, m, options, message):
    with pytest.raises(ValueError, match=message):
        separation(torch.randn(n, 2, 3), torch.randn(m, 2, 3), **options)


def test_means_of_nothing_or_of_nan():
    x = torch.ones(2, 1, 3)
    with pytest.raises(ValueError, match="no malicious prompts"):
        difference_of_means(x, x[:0])
    with pytest.raises(ValueError, match="normal prompts are not finite"):
        difference_of_means(x * torch.nan, x)


# --- interventions ----------------------------------------------------------------------------------------------------


def direction(seed: int = 3) -> Tensor:
    return torch.randn(16, generator=seeded(seed)).double()


def residual_points(model, tokens, hooks=()) -> dict[str, Tensor]:
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    return dict(cache)


@pytest.mark.parametrize("style", [{}, GPT2_STYLE], ids=["rotary", "gpt-2"])
def test_nothing_is_left_of_an_ablated_direction(style):
    model = build_tiny_model(dtype=torch.float64, **style).to(torch.float64)
    tokens = torch.tensor([[5, 6, 7, 8]])
    unit = direction() / direction().norm()
    with ablated(model, direction(), LayerRange(1, 2)):
        inside = residual_points(model, tokens)
    gone = {name for name, resid in inside.items() if (resid @ unit).abs().max() < 1e-12}
    assert gone == {name for name in inside if name.split(".")[1] in "12"} | {"blocks.3.hook_resid_pre"}


def test_ablation_is_the_projection():
    """Of the first block's input: x - (x . r) r, and blocks before the range are as they were."""
    model = build_tiny_model(dtype=torch.float64).to(torch.float64)
    tokens, unit = torch.tensor([[5, 6, 7]]), direction() / direction().norm()
    plain = residual_points(model, tokens)
    with ablated(model, 7 * direction(), LayerRange(2, 4)):
        inside = residual_points(model, tokens)
    x = plain["blocks.1.hook_resid_post"]
    torch.testing.assert_close(inside["blocks.1.hook_resid_post"], x, rtol=0, atol=0)
    expected = x - (x @ unit)[..., None] * unit
    torch.testing.assert_close(inside["blocks.2.hook_resid_pre"], expected, rtol=0, atol=1e-12)


def test_addition_adds_at_one_layer_and_everywhere_along_the_sequence():
    model = build_tiny_model(dtype=torch.float64).to(torch.float64)
    tokens = torch.tensor([[5, 6, 7]])
    plain = residual_points(model, tokens)
    with added(model, direction(), 3, coefficient=-2.0):
        inside = residual_points(model, tokens)
    for layer in range(3):
        assert torch.equal(inside[f"blocks.{layer}.hook_resid_post"], plain[f"blocks.{layer}.hook_resid_post"])
    expected = plain["blocks.3.hook_resid_post"] - 2 * direction()
    torch.testing.assert_close(inside["blocks.3.hook_resid_post"], expected, rtol=0, atol=1e-12)
    assert not torch.allclose(inside["blocks.4.hook_resid_post"], plain["blocks.4.hook_resid_post"])


def test_adding_the_difference_moves_the_mean_onto_the_other(tiny_model, prompts):
    normal, malicious = (
        last_token_residuals(tiny_model, part, share_prefix=False) for part in (prompts[:4], prompts[4:])
    )
    step = difference_of_means(normal, malicious)[2]
    with added(tiny_model, step, 2):
        moved = last_token_residuals(tiny_model, prompts[:4], share_prefix=False)
    torch.testing.assert_close(moved[:, 2].double().mean(0), malicious[:, 2].double().mean(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("use", [lambda model: ablated(model, direction()), lambda model: added(model, direction(), 1)])
def test_leaving_by_an_exception_restores_the_model(tiny_model, use):
    tokens = torch.tensor([[5, 6, 7]])
    before = tiny_model(tokens)
    with pytest.raises(RuntimeError, match="stop"), use(tiny_model):  # noqa: PT012
        assert not torch.equal(tiny_model(tokens), before)
        raise RuntimeError("stop")
    assert torch.equal(tiny_model(tokens), before)


@pytest.mark.parametrize("vector", [torch.ones(3), torch.zeros(16), torch.full((16,), torch.nan)])
def test_bad_directions(tiny_model, vector):
    for use in (lambda: ablated(tiny_model, vector), lambda: added(tiny_model, vector, 0)):
        with pytest.raises(ValueError, match="direction"), use():
            pass


def test_layers_outside_the_model(tiny_model):
    for use in (ablated(tiny_model, direction(), LayerRange(2, 6)), added(tiny_model, direction(), 6)):
        with pytest.raises(ValueError, match="the model has 6 layers"), use:
            pass
