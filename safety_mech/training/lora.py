"""Low-rank adapters (LoRA) on a HookedTransformer, saved in PEFT's format.

    W x + (alpha / rank) B A x,    A: [rank, in] random, B: [out, rank] zero at first

The update is added to a projection's OUTPUT, before TransformerLens' hook there fires: hooks and `scaled` see what
they would see had the weight been changed. The weights stay as they are, so a training step computes no gradient of
a whole weight and adds nothing to one.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle
from transformer_lens import HookedTransformer

from safety_mech.layers import LayerRange
from safety_mech.models.parameters import PREFIX, Projection, as_linear, block_projections, replaced


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
            attn, mlp = model.blocks[layer].attn, model.blocks[layer].mlp
            updates = {}
            for projection in projections:
                module, leaf = projection.hooked.rsplit(".", 1)
                owner = model.blocks[layer].get_submodule(module)
                update = LowRankUpdate(as_linear(projection, getattr(owner, leaf), model), rank, alpha / rank)
                bound = 1 / math.sqrt(update.A.shape[1])  # as PEFT: kaiming uniform with a = sqrt(5)
                with torch.no_grad():
                    update.A.copy_((torch.rand(update.A.shape, generator=generator) * 2 - 1) * bound)
                owner.add_module(f"{PREFIX}{leaf}", update)
                stack.callback(delattr, owner, f"{PREFIX}{leaf}")
                updates[projection.module.rsplit(".", 1)[1]] = update
                placed.append((layer, projection, update))
            of_heads = [
                ("query_input", attn.hook_q, updates["q_proj"]),
                ("key_input", attn.hook_k, updates["k_proj"]),
                ("value_input", attn.hook_v, updates["v_proj"]),
            ]
            of_mlp = [(0, mlp.hook_pre, updates["gate_proj"]), (0, mlp.hook_pre_linear, updates["up_proj"])]
            _attach(stack, attn, of_heads, attn.hook_z, updates["o_proj"])
            _attach(stack, mlp, of_mlp, mlp.hook_post, updates["down_proj"])
        yield placed


def _attach(
    stack: ExitStack,
    module: Any,
    inside: Sequence[tuple[str | int, Any, LowRankUpdate]],
    last_point: Any,
    last: LowRankUpdate,
) -> None:
    """Hook the updates of attention or of an MLP in, until the stack is closed.

    `inside`: an input of the module, by position or name; the hook point of its product; the product's update. The
    `last` update is added to the module's output. It takes what comes out of `last_point` after all hooks that are
    there: so a hook that listens once, and last, is put on in every pass.
    """
    inputs: dict[str | int, Tensor] = {}
    listening: list[RemovableHandle] = []

    def stop_listening() -> None:
        while listening:
            listening.pop().remove()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stop_listening()  # an interrupted pass may never have come to the hook point
        given = dict(enumerate(args)) | kwargs
        inputs.update({key: given[key] for key, _, _ in inside})
        listening.append(last_point.register_forward_hook(listen))

    def listen(module: nn.Module, args: Any, output: Tensor) -> None:
        stop_listening()
        inputs["last"] = output

    def after(module: nn.Module, args: Any, output: Float[Tensor, "prompt pos d_model"]) -> Tensor:
        updated = output + last(inputs["last"].flatten(2))  # heads side by side
        inputs.clear()
        return updated

    def add(key: str | int, update: LowRankUpdate) -> Callable[..., Tensor]:
        return lambda module, args, product: product + update(inputs[key]).view(product.shape)

    stack.callback(stop_listening)
    handles = [point.register_forward_hook(add(key, update), prepend=True) for key, point, update in inside]
    handles += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    for handle in handles:
        stack.callback(handle.remove)


@contextmanager
def matrices_in_bfloat16(model: HookedTransformer) -> Iterator[None]:
    """While inside, blocks and unembedding hold their own matrices in bfloat16: to train updates under autocast.

    Autocast casts a float32 matrix anew for every product; it remembers only those that want a gradient, and here none
    does. Held in bfloat16, every product is the same, bit for bit, without the cast. Updates, norms, biases and the
    embedding stay as they are. Leaving puts the old tensors back.
    """
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("blocks.", "unembed.")) and name.rsplit(".", 1)[-1].lstrip("_").startswith("W_")
    ]
    with replaced([(parameter, parameter.data.to(torch.bfloat16)) for parameter in matrices]):
        yield


def save_adapter(placed: Placed, folder: str | Path, base_model: str, dtype: torch.dtype = torch.float16) -> Path:
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
