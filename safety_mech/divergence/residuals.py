"""Last-token residual streams, by hooks; nothing else is stored (paper §3.2, docs/method.md#residual-streams)."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.models.chat import DEFAULT_BATCH_TOKENS, Template, check_context, encode_chat, tokenizer_of
from safety_mech.models.forward import read_activations


def last_token_residuals(
    model: HookedTransformer,
    prompts: Sequence[str],
    template: str | Template = "own",
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    share_prefix: bool = True,
    progress: bool = False,
) -> Float[Tensor, "prompt layer d_model"]:
    """The residual stream after every block at the last token of every prompt, in float32 on the CPU.

    The tokens that all prompts start with run once, the rest in batches of equal length. One hook a layer copies the
    last position, the rest is dropped.

    Memory: prompts x layers x d_model, plus one batch of `batch_tokens` tokens in one layer.
    `share_prefix=False` runs every prompt whole: for hooks of your own that need all positions.
    Raises ValueError for empty prompts, one longer than the context, or NaN (naming layer and prompt).
    """
    chats = encode_chat(tokenizer_of(model), prompts, template)
    check_context(chats, model.cfg.n_ctx)
    found = torch.empty(len(chats), model.cfg.n_layers, model.cfg.d_model)

    def keep_last(resid: Float[Tensor, "prompt pos d_model"], layer: int, rows: list[int]) -> None:
        found[rows, layer] = resid[:, -1].float().cpu()

    bar = "residual streams" if progress else None
    read_activations(model, chats, "hook_resid_post", keep_last, batch_tokens, share_prefix, bar)
    bad = (~found.isfinite().all(dim=-1)).nonzero()
    if len(bad):
        first = bad[bad[:, 1].argmin()]
        raise ValueError(
            f"the residual stream is not finite at layer {int(first[1])} for prompt {int(first[0])}: "
            "try dtype float32, or check the weights"
        )
    return found
