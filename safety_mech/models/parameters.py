"""The seven projections of a Llama-like block, under TransformerLens' names and under transformers'.

Low-rank adapters, export, freezing and scaling read this one table. The paper freezes and scales exactly these weights
(q, k, v, o, gate, up, down), and neither norms nor biases.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens import HookedTransformer

PREFIX = "low_rank_"
"""A low-rank update is a submodule of its weight's module, under this prefix and the weight's name."""


@dataclass(frozen=True)
class Projection:
    """`hooked`: the parameter's name inside a block; `module`: the Linear's name inside a transformers layer.

    `to_hooked`: einops pattern from the Linear's weight [out, in] to TransformerLens' shape, `n` = heads.
    """

    hooked: str
    module: str
    to_hooked: str
    heads: str | None = None

    @property
    def to_linear(self) -> str:
        left, right = self.to_hooked.split("->")
        return f"{right.strip()} -> {left.strip()}"


PROJECTIONS = (
    Projection("attn.W_Q", "self_attn.q_proj", "(n h) m -> n m h", "n_heads"),
    Projection("attn._W_K", "self_attn.k_proj", "(n h) m -> n m h", "n_key_value_heads"),
    Projection("attn._W_V", "self_attn.v_proj", "(n h) m -> n m h", "n_key_value_heads"),
    Projection("attn.W_O", "self_attn.o_proj", "m (n h) -> n h m", "n_heads"),
    Projection("mlp.W_gate", "mlp.gate_proj", "f m -> m f"),
    Projection("mlp.W_in", "mlp.up_proj", "f m -> m f"),
    Projection("mlp.W_out", "mlp.down_proj", "m f -> f m"),
)


def block_projections(model: HookedTransformer) -> tuple[Projection, ...]:
    """The projections of this model's blocks; raises ValueError for a model that is not Llama-like."""
    names = dict(model.blocks[0].named_parameters())
    found = []
    for projection in PROJECTIONS:
        plain = projection.hooked.replace("._W", ".W")  # no grouped queries: W_K instead of _W_K
        hooked = projection.hooked if projection.hooked in names else plain
        if hooked not in names:
            raise ValueError(f"this model's blocks have no {plain}: expected a gated, Llama-like architecture")
        found.append(replace(projection, hooked=hooked))
    return tuple(found)


@contextmanager
def replaced(tensors: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """While inside, every parameter points to the tensor beside it; back to its own on leaving, also by an exception.

    No tensor is copied or edited; what is trained in the tensors inside does not reach the parameters' own.
    """
    own = [weight.data for weight, _ in tensors]
    try:
        for weight, tensor in tensors:
            weight.data = tensor
        yield
    finally:
        for (weight, _), data in zip(tensors, own, strict=True):
            weight.data = data


def as_hooked(
    projection: Projection, weight: Float[Tensor, "out in"], model: HookedTransformer
) -> Float[Tensor, "..."]:
    """A Linear's weight as a view in TransformerLens' shape."""
    return rearrange(weight, projection.to_hooked, **_head_count(projection, model))


def as_linear(
    projection: Projection, weight: Float[Tensor, "..."], model: HookedTransformer
) -> Float[Tensor, "out in"]:
    """TransformerLens' weight in the Linear's shape."""
    return rearrange(weight, projection.to_linear, **_head_count(projection, model))


def _head_count(projection: Projection, model: HookedTransformer) -> dict[str, int]:
    if projection.heads is None:
        return {}
    return {"n": getattr(model.cfg, projection.heads) or model.cfg.n_heads}
