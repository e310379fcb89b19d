"""Low-rank adapters (LoRA) on a HookedTransformer, saved in PEFT's format.

    W = W_0 + (alpha / rank) B A,    A: [rank, in] random, B: [out, rank] zero at first

as a torch parametrization of the weight, so that hooks, scaling and the training loop see an ordinary parameter.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.projections import Projection, as_hooked, block_projections


class LowRankUpdate(nn.Module):
    """Adds scale * B A to a weight, in TransformerLens' shape and memory layout."""

    def __init__(self, projection: Projection, model: HookedTransformer, weight: Tensor, rank: int, scale: float):
        super().__init__()
        self.projection, self.scale = projection, scale
        self._model = [model]  # in a list, so that the model does not become a submodule of its own weight
        d_in, d_out = self._linear_shape(weight)
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, dtype=weight.dtype, device=weight.device))

    def _linear_shape(self, weight: Tensor) -> tuple[int, int]:
        if self.projection.hooked.endswith("W_O"):
            return weight.shape[0] * weight.shape[1], weight.shape[2]
        if weight.ndim == 3:
            return weight.shape[1], weight.shape[0] * weight.shape[2]
        return weight.shape[0], weight.shape[1]

    def forward(self, weight: Tensor) -> Tensor:
        update: Float[Tensor, "out in"] = self.B @ self.A * self.scale
        return weight + as_hooked(self.projection, update, self._model[0])


def is_adapter_parameter(name: str) -> bool:
    """True for A and B of a low-rank update: what `fine_tune(trainable=...)` wants."""
    return ".parametrizations." in name and name.endswith((".A", ".B"))


@contextmanager
def low_rank_adapters(
    model: HookedTransformer, layers: LayerRange | None = None, rank: int = 8, alpha: float = 16.0, seed: int = 0
) -> Iterator[list[tuple[int, Projection, LowRankUpdate]]]:
    """Put low-rank updates on all seven projections of `layers` (default: all layers) while inside.

    Leaving takes them off again: the weights are the old ones, bit for bit. Save before leaving.
    """
    chosen = layers.check_inside(model.cfg.n_layers) if layers else LayerRange(0, model.cfg.n_layers - 1)
    generator = torch.Generator().manual_seed(seed)
    projections = block_projections(model)
    placed: list[tuple[int, Projection, LowRankUpdate]] = []
    try:
        for layer in chosen:
            for projection in projections:
                placed.append((layer, projection, _place(model, layer, projection, rank, alpha / rank, generator)))
        yield placed
    finally:
        for layer, projection, _ in placed:
            module, leaf = _owner(model, layer, projection)
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def _owner(model: HookedTransformer, layer: int, projection: Projection) -> tuple[nn.Module, str]:
    module, leaf = projection.hooked.rsplit(".", 1)
    return model.blocks[layer].get_submodule(module), leaf


def _place(
    model: HookedTransformer,
    layer: int,
    projection: Projection,
    rank: int,
    scale: float,
    generator: torch.Generator,
) -> LowRankUpdate:
    module, leaf = _owner(model, layer, projection)
    update = LowRankUpdate(projection, model, getattr(module, leaf), rank, scale)
    bound = math.sqrt(3 / update.A.shape[1])  # as PEFT: kaiming uniform with a = sqrt(5), times sqrt(3)
    with torch.no_grad():
        update.A.copy_((torch.rand(update.A.shape, generator=generator) * 2 - 1) * bound / math.sqrt(3))
    parametrize.register_parametrization(module, leaf, update)
    return update


def save_adapter(
    placed: list[tuple[int, Projection, LowRankUpdate]],
    folder: str | Path,
    base_model: str,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write adapter_model.safetensors and adapter_config.json as PEFT reads them; `dtype` halves the size."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for layer, projection, update in placed:
        prefix = f"base_model.model.model.layers.{layer}.{projection.module}"
        tensors[f"{prefix}.lora_A.weight"] = update.A.detach().to(dtype).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = update.B.detach().to(dtype).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = placed[0][2].A.shape[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": placed[0][2].scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({projection.module.rsplit(".", 1)[1] for _, projection, _ in placed}),
        "layers_to_transform": sorted({layer for layer, _, _ in placed}),
        "layers_pattern": "layers",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
