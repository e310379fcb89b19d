"""Last-token residual streams, by hooks; nothing else is stored (paper §3.2, docs/method.md#residual-streams).

`v_k(x)`: the residual stream after block k (`blocks.k.hook_resid_post`) at the last prompt token, from one
forward pass, without generation. Transformers' last hidden state is taken AFTER the final norm, so the paper's
curve differs from ours at the last layer.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.models.chat import (
    DEFAULT_BATCH_TOKENS,
    Template,
    check_context,
    encode_chat,
    equal_length_batches,
    tokenizer_of,
)
from safety_mech.models.forward import Hooks, common_prefix, embed, run_blocks, stack_rest


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

    1. put prompts into the template; run the tokens they all start with once, and cache their keys and values;
    2. run the rest in batches of equal length; one hook a layer copies the last position, the rest is dropped.

    Memory: prompts x layers x d_model, plus one batch of `batch_tokens` tokens in one layer.
    `share_prefix=False` runs every prompt whole: for hooks of your own that need all positions.
    Raises ValueError for empty prompts, one longer than the context, or NaN (naming layer and prompt).
    """
    chats = encode_chat(tokenizer_of(model), prompts, template)
    check_context(chats, model.cfg.n_ctx)
    found = torch.empty(len(chats), model.cfg.n_layers, model.cfg.d_model)
    rows: list[int] = []

    def keep_last(resid: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> None:
        found[rows, hook.layer()] = resid[:, -1].float().cpu()

    bar = tqdm(total=len(chats), desc="residual streams", unit="prompt", disable=not progress)
    with torch.no_grad(), bar:
        prefix = common_prefix(model, chats, share_prefix)
        hooks: Hooks = [(f"blocks.{layer}.hook_resid_post", keep_last) for layer in range(model.cfg.n_layers)]
        with model.hooks(fwd_hooks=hooks):
            for rows in equal_length_batches([len(chat) - len(prefix) for chat in chats], batch_tokens):
                tokens = stack_rest(model, chats, rows, len(prefix))
                run_blocks(model, embed(model, tokens, len(prefix)), cache=prefix.cache_for(len(rows)))
                bar.update(len(rows))
    return _check_finite(found)


def _check_finite(found: Float[Tensor, "prompt layer d_model"]) -> Float[Tensor, "prompt layer d_model"]:
    bad = (~found.isfinite().all(dim=-1)).nonzero()
    if len(bad):
        first = bad[bad[:, 1].argmin()]
        raise ValueError(
            f"the residual stream is not finite at layer {int(first[1])} for prompt {int(first[0])}: "
            "try dtype float32, or check the weights"
        )
    return found
