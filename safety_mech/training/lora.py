"""Low-rank adapters (LoRA) on a HookedTransformer, saved in PEFT's format.

    W x + (alpha / rank) B A x,    A: [rank, in] random, B: [out, rank] zero at first

The update is added to a projection's OUTPUT, before TransformerLens' hook there fires: hooks and `scaled` see what
they would see had the weight been changed. The weights stay as they are, so a training step computes no gradient of
a whole weight and adds nothing to one.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.models.parameters import PREFIX, Projection, as_linear, block_projections


class LowRankUpdate(nn.Module):
    """x -> multiplier * scale * B A x, in the projection's number format. `scaled` sets `multiplier` for a while."""

    def __init__(self, weight: Float[Tensor, "out in"], rank: int, scale: float):
        super().__init__()
        d_out, d_in = weight.shape
        self.scale, self.multiplier = scale, 1.0
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=weight.dtype, device=weight.device))
        self.B = nn.Parameter(torch.zeros(d_out, rank, dtype=weight.dtype, device=weight.device))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return linear(linear(x, self.A) * (self.scale * self.multiplier), self.B)

    def weight(self) -> Float[Tensor, "out in"]:
        """What the update adds to the projection's weight."""
        return self.B @ self.A * self.scale


Placed = list[tuple[int, Projection, LowRankUpdate]]
"""Layer, which projection of it, and its update."""


def is_adapter_parameter(name: str) -> bool:
    """True for A and B of a low-rank update: what `fine_tune(trainable=...)` wants."""
    return f".{PREFIX}" in name and name.endswith((".A", ".B"))


@contextmanager
def low_rank_adapters(
    model: HookedTransformer, layers: LayerRange | None = None, rank: int = 8, alpha: float = 16.0, seed: int = 0
) -> Iterator[Placed]:
    """Put low-rank updates on all seven projections of `layers` (default: all layers) while inside.

    Leaving takes them off again: the model is the old one, bit for bit. Save before leaving.
    Raises ValueError for a rank below 1, a model that is not Llama-like, or one with split inputs of heads.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected at least 1")
    if model.cfg.use_split_qkv_input or model.cfg.use_attn_in:
        raise ValueError("low-rank updates: turn use_split_qkv_input and use_attn_in off first")
    chosen = layers.check_inside(model.cfg.n_layers) if layers else LayerRange(0, model.cfg.n_layers - 1)
    generator = torch.Generator().manual_seed(seed)
    projections = block_projections(model)
    placed: Placed = []
    with ExitStack() as stack:
        for layer in chosen:
            block = model.blocks[layer]
            updates = {}
            for projection in projections:
                update = _place(model, layer, projection, rank, alpha / rank, generator)
                module, leaf = projection.hooked.rsplit(".", 1)
                stack.callback(delattr, block.get_submodule(module), f"{PREFIX}{leaf}")
                updates[leaf.removeprefix("_")] = update
                placed.append((layer, projection, update))
            for handle in [*_add_to_attention(block.attn, updates), *_add_to_mlp(block.mlp, updates)]:
                stack.callback(handle.remove)
        yield placed


def _place(
    model: HookedTransformer,
    layer: int,
    projection: Projection,
    rank: int,
    scale: float,
    generator: torch.Generator,
) -> LowRankUpdate:
    module, leaf = projection.hooked.rsplit(".", 1)
    owner = model.blocks[layer].get_submodule(module)
    weight = getattr(owner, leaf)
    update = LowRankUpdate(as_linear(projection, weight, model), rank, scale)
    bound = 1 / math.sqrt(update.A.shape[1])  # as PEFT: kaiming uniform with a = sqrt(5)
    with torch.no_grad():
        update.A.copy_((torch.rand(update.A.shape, generator=generator) * 2 - 1) * bound)
    owner.add_module(f"{PREFIX}{leaf}", update)
    return update


class _Tap:
    """What comes out of a hook point, after all hooks that are there now: it listens once, and last."""

    def __init__(self, point: nn.Module):
        self.point = point
        self.outputs: list[Tensor] = []
        self.handle: RemovableHandle | None = None

    def listen(self) -> None:
        self.remove()
        self.handle = self.point.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.remove()
        self.outputs.append(output)

    def take(self) -> Tensor:
        return self.outputs.pop()

    def remove(self) -> None:
        """Listen no more, also where an interrupted forward pass never came to the hook point."""
        self.outputs.clear()
        if self.handle is not None:
            self.handle.remove()
            self.handle = None


def _add_to_attention(attn: Any, updates: dict[str, LowRankUpdate]) -> list[RemovableHandle | _Tap]:
    """q, k and v from the module's inputs; o from what comes out of hook_z."""
    inputs: dict[str, Tensor] = {}
    z = _Tap(attn.hook_z)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.update(W_Q=kwargs["query_input"], W_K=kwargs["key_input"], W_V=kwargs["value_input"])
        z.listen()

    def heads_of(name: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: Any, heads: Float[Tensor, "prompt pos head d_head"]) -> Tensor:
            return heads + updates[name](inputs.pop(name)).view(heads.shape)

        return add

    def after(module: nn.Module, args: Any, output: Float[Tensor, "prompt pos d_model"]) -> Tensor:
        return output + updates["W_O"](rearrange(z.take(), "prompt pos head d_head -> prompt pos (head d_head)"))

    return [
        attn.register_forward_pre_hook(before, with_kwargs=True),
        *(
            point.register_forward_hook(heads_of(name), prepend=True)
            for name, point in (("W_Q", attn.hook_q), ("W_K", attn.hook_k), ("W_V", attn.hook_v))
        ),
        attn.register_forward_hook(after),
        z,
    ]


def _add_to_mlp(mlp: Any, updates: dict[str, LowRankUpdate]) -> list[RemovableHandle | _Tap]:
    """gate and up from the module's input; down from what comes out of hook_post."""
    inputs: list[Tensor] = []
    post = _Tap(mlp.hook_post)

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[:] = args[:1]
        post.listen()

    def product_of(name: str) -> Callable[..., Tensor]:
        def add(module: nn.Module, args: Any, product: Float[Tensor, "prompt pos d_mlp"]) -> Tensor:
            return product + updates[name](inputs[0])

        return add

    def after(module: nn.Module, args: Any, output: Float[Tensor, "prompt pos d_model"]) -> Tensor:
        inputs.clear()
        return output + updates["W_out"](post.take())

    return [
        mlp.register_forward_pre_hook(before),
        mlp.hook_pre.register_forward_hook(product_of("W_gate"), prepend=True),
        mlp.hook_pre_linear.register_forward_hook(product_of("W_in"), prepend=True),
        mlp.register_forward_hook(after),
        post,
    ]


@contextmanager
def matrices_in_bfloat16(model: HookedTransformer) -> Iterator[None]:
    """While inside, blocks and unembedding hold their own matrices in bfloat16: to train updates under autocast.

    Autocast casts a float32 matrix anew for every product; it remembers only those that want a gradient, and here none
    does. Held in bfloat16, every product is the same, bit for bit, without the cast. Updates, norms, biases and the
    embedding stay as they are. Leaving puts the old tensors back.
    """
    own = {
        parameter: parameter.data
        for name, parameter in model.named_parameters()
        if name.startswith(("blocks.", "unembed.")) and name.rsplit(".", 1)[-1].lstrip("_").startswith("W_")
    }
    try:
        for parameter, data in own.items():
            parameter.data = data.to(torch.bfloat16)
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data


def save_adapter(
    placed: Placed,
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
