"""Scaling layers (paper §3.4, A.3.4; docs/method.md#recipes), by hooks; no model is copied.

    with scaled(model, LayerRange(10, 17), 1.2): ...        # attention outputs of layers 10..17 times 1.2

A recipe says which activations are multiplied. It is data; a new one takes one line:

    RECIPES["keys"] = Recipe(("attn.hook_k",))

`weights` is the paper's recipe. Inside, the parameters point to multiplied copies, so the logits equal those of a
multiplied model bit for bit. (Scaled activations are the same in exact arithmetic, but float32 rounds them differently,
by 1e-4 in the logits of a 30-layer model.) Low-rank updates of these weights are multiplied with them.

With `positions` the weights stay and activations are scaled: for o its input `hook_z`, for down its input
`mlp.hook_post`. So their biases are untouched, and models that normalise after the block are right too. The biases of
q, k, v (and of an ungated up) are subtracted before scaling and added again.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.layers import LayerRange
from safety_mech.models.forward import Hooks, check_one_device
from safety_mech.models.parameters import PREFIX, replaced


@dataclass(frozen=True)
class Recipe:
    """Hook points of a block whose activation is multiplied.

    `biased` names, for hook points that come AFTER a bias, that bias inside the block: it is not scaled.
    `weights` are parameters of a block (those that it has) that amount to the same, to be multiplied instead wherever
    all positions are.
    """

    hook_points: tuple[str, ...]
    biased: tuple[tuple[str, str], ...] = ()
    weights: tuple[str, ...] = ()


_QKV = ("attn.hook_q", "attn.hook_k", "attn.hook_v")
_QKV_BIASES = (("attn.hook_q", "attn.b_Q"), ("attn.hook_k", "attn.b_K"), ("attn.hook_v", "attn.b_V"))
_MLP = ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post")
_MLP_BIASES = (("mlp.hook_pre", "mlp.b_in"),)
_WEIGHTS_NO_O = ("attn.W_Q", "attn.W_K", "attn._W_K", "attn.W_V", "attn._W_V", "mlp.W_gate", "mlp.W_in", "mlp.W_out")

RECIPES: dict[str, Recipe] = {
    "attn_out": Recipe(("hook_attn_out",)),
    "mlp_out": Recipe(("hook_mlp_out",)),
    "weights": Recipe((*_QKV, "attn.hook_z", *_MLP), _QKV_BIASES + _MLP_BIASES, (*_WEIGHTS_NO_O, "attn.W_O")),
    # An earlier release of the authors' code scaled everything but o, by accident.
    "weights_no_o": Recipe((*_QKV, *_MLP), _QKV_BIASES + _MLP_BIASES, _WEIGHTS_NO_O),
}


@contextmanager
def scaled(
    model: HookedTransformer,
    layers: LayerRange,
    alpha: float,
    recipe: str | Recipe = "attn_out",
    *,
    heads: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Iterator[HookedTransformer]:
    """Multiply the recipe's activations of layers `layers` by `alpha` while inside; may be nested.

    `heads`: only these attention heads' outputs (`attn_out` only: their `hook_z` is scaled).
    `positions`: only these, counted from the END (-1 is the last), so that a shared prefix does not move them.
    Leaving, also by an exception, leaves the model as it was, bit for bit. No tensor is edited in place.
    A recipe of `weights` throws its multiplied copies away on leaving: train adapters inside, not weights.
    Raises ValueError for layers or heads outside the model, alpha <= 0 or not finite, an unknown recipe, one that names
    no hook point of this model or reaches into the MLP of a mixture of experts, or a model on several devices.
    """
    check_one_device(model)
    chosen = find_recipe(recipe)
    _check_no_experts(model, chosen)
    check_alpha(alpha)
    layers.check_inside(model.cfg.n_layers)
    if heads is not None:
        chosen = _head_recipe(model, chosen, heads)
    if positions is not None and not all(position < 0 for position in positions):
        raise ValueError(f"positions {list(positions)}: expected negative ones, counted from the end (-1 is the last)")
    if chosen.weights and positions is None:
        with _multiplied(model, layers, alpha, chosen.weights):
            yield model
        return
    hooks: Hooks = [
        (f"blocks.{layer}.{point}", _scaling_hook(alpha, _bias(model, layer, point, chosen), heads, positions))
        for layer in layers
        for point in _hook_points(model, layer, chosen)
    ]
    with model.hooks(fwd_hooks=hooks):
        yield model


@contextmanager
def _multiplied(model: HookedTransformer, layers: LayerRange, alpha: float, names: tuple[str, ...]) -> Iterator[None]:
    """While inside, parameters of these names point to alpha times their tensor. Their low-rank updates follow, also
    those that are attached while inside."""
    weights, updates, own = [], [], list[tuple[Any, float]]()
    for block in (model.blocks[layer] for layer in layers):
        for name, weight in block.named_parameters():
            if name in names:
                module, _, leaf = name.rpartition(".")
                weights.append((weight, weight.data * alpha))
                updates.append((block.get_submodule(module), PREFIX + leaf))

    def multiply(owner: nn.Module, name: str, update: Any) -> None:
        if any(owner is module and name == place for module, place in updates):
            own.append((update, update.multiplier))
            update.multiplier *= alpha

    for module, name in updates:
        if hasattr(module, name):
            multiply(module, name, getattr(module, name))
    watch = register_module_module_registration_hook(multiply)
    try:
        with replaced(weights):
            yield
    finally:
        watch.remove()
        for update, multiplier in own:
            update.multiplier = multiplier


def find_recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its name in RECIPES, or the recipe itself; raises ValueError naming the known ones."""
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in RECIPES:
        raise ValueError(f"recipe {recipe!r}: expected one of {', '.join(RECIPES)}, or a Recipe of your own")
    return RECIPES[recipe]


def check_alpha(alpha: float) -> None:
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha = {alpha}: expected a finite number above 0 (1 changes nothing)")


def _check_no_experts(model: HookedTransformer, recipe: Recipe) -> None:
    """The experts' weights and hook points have other names, and a recipe would pass them by."""
    if model.cfg.num_experts and any(name.startswith("mlp.") for name in (*recipe.hook_points, *recipe.weights)):
        raise ValueError(
            f"the model has {model.cfg.num_experts} experts a layer, which this recipe does not reach: "
            "expected one of attn_out, mlp_out, or a Recipe without mlp.*"
        )


def _head_recipe(model: HookedTransformer, recipe: Recipe, heads: Sequence[int]) -> Recipe:
    if recipe != RECIPES["attn_out"]:
        raise ValueError("heads can be chosen with the recipe 'attn_out' only")
    if not all(0 <= head < model.cfg.n_heads for head in heads):
        raise ValueError(f"heads {list(heads)}: the model has heads 0 to {model.cfg.n_heads - 1}")
    return Recipe(("attn.hook_z",))


def _hook_points(model: HookedTransformer, layer: int, recipe: Recipe) -> list[str]:
    """Those of the recipe's hook points that this block has: `mlp.hook_pre_linear` is a gated model's only."""
    present = [point for point in recipe.hook_points if f"blocks.{layer}.{point}" in model.hook_dict]
    if not present:
        raise ValueError(f"no hook point of the recipe is in this model: {', '.join(recipe.hook_points)}")
    return present


def _bias(model: HookedTransformer, layer: int, point: str, recipe: Recipe) -> Tensor | None:
    """The bias that the activation at `point` already holds; None where there is none or it is zero."""
    name = dict(recipe.biased).get(point)
    if name is None or (name == "mlp.b_in" and model.cfg.gated_mlp):
        return None  # a gated block adds b_in behind hook_pre and hook_pre_linear
    module, leaf = name.split(".")
    owner = getattr(model.blocks[layer], module)
    bias = getattr(owner, f"_{leaf}", None)  # grouped queries: one bias a key-value head
    bias = getattr(owner, leaf) if bias is None else bias
    return bias.detach() if bias.any() else None


def _scaling_hook(alpha: float, bias: Tensor | None, heads: Sequence[int] | None, positions: Sequence[int] | None):
    """(activation, hook) -> activation: a new tensor, alpha times the old one where it is selected."""

    def scale(activation: Float[Tensor, "prompt pos ..."], hook: HookPoint) -> Float[Tensor, "prompt pos ..."]:
        new = activation * alpha if bias is None else (activation - bias) * alpha + bias
        if heads is None and positions is None:
            return new
        return torch.where(_selected(activation, heads, positions), new, activation)

    return scale


def _selected(activation: Tensor, heads: Sequence[int] | None, positions: Sequence[int] | None) -> Tensor:
    selected = torch.ones(activation.shape, dtype=torch.bool, device=activation.device)
    for dim, chosen in ((1, positions), (2, heads)):
        if chosen is not None:
            along = torch.zeros(activation.shape[dim], dtype=torch.bool, device=activation.device)
            along[[index for index in chosen if -len(along) <= index < len(along)]] = True
            selected &= along.view([-1 if axis == dim else 1 for axis in range(activation.ndim)])
    return selected
