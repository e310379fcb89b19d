"""The margin, and its slope by the scale on each layer (docs/method.md#locators).

    margin = mean refusal log-odds of malicious prompts - mean refusal log-odds of harmless ones, in nats
    slope  = d log-odds / d a at a = 1, where a scales one layer's attention (or MLP) output

One forward and one backward pass give the slopes of all layers. Every prompt has scales of its own, so that the same
pass gives each prompt its own slope, and intervals over prompts cost nothing. For that the shared prefix is run with
every prompt.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.models.chat import Template, check_context, encode_chat, equal_length_batches, tokenizer_of
from safety_mech.models.forward import Hooks, common_prefix
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, append_chain, batch_log_odds, phrase_chains

PARTS = ("attn_out", "mlp_out")
"""The axis `part`; both are recipes of scaling.py as well."""
GRADIENT_BATCH_TOKENS = 512
"""Tokens a batch, over all chains of phrases: the graph holds some 2 MB a token of a 135M model."""


def log_odds_slopes(
    model: HookedTransformer,
    prompts: Sequence[str],
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
    *,
    batch_tokens: int = GRADIENT_BATCH_TOKENS,
    progress: bool = False,
) -> Float[Tensor, "prompt part layer"]:
    """Derivative of every prompt's refusal log-odds (nats per unit of scale, float64) by each layer's scale at 1.

    Each layer's attention and MLP output is multiplied by a scale that is 1; log-odds run forward and backward.
    To first order, scaling layers i..j by alpha moves the log-odds by (alpha - 1) times the sum of their slopes.
    Raises ValueError as `refusal_log_odds` does.
    """
    chats = encode_chat(tokenizer_of(model), prompts, template)
    chains = phrase_chains(tokenizer_of(model), template, phrases)
    longest = append_chain(chats, max(chains, key=lambda chain: len(chain.tokens)))
    check_context(longest, model.cfg.n_ctx)
    slopes = torch.empty(len(chats), len(PARTS), model.cfg.n_layers, dtype=torch.float64)
    bar = tqdm(total=len(chats), desc="slopes", unit="prompt", disable=not progress)
    with torch.enable_grad(), bar:
        prefix = common_prefix(model, chats, share=False)
        for rows in equal_length_batches([len(chat) * len(chains) for chat in longest], batch_tokens):
            shape = (len(PARTS), model.cfg.n_layers, len(rows))
            scales = torch.ones(shape, dtype=model.cfg.dtype, device=model.embed.W_E.device, requires_grad=True)
            hooks: Hooks = [
                (f"blocks.{layer}.hook_{part}", _scaling_by(scales[index, layer]))
                for index, part in enumerate(PARTS)
                for layer in range(model.cfg.n_layers)
            ]
            with model.hooks(fwd_hooks=hooks):
                total = batch_log_odds(model, [chats[row] for row in rows], chains, prefix).sum()
            (gradient,) = torch.autograd.grad(total, scales)
            slopes[rows] = gradient.permute(2, 0, 1).double().cpu()
            bar.update(len(rows))
    return slopes


def _scaling_by(scale: Float[Tensor, " prompt"]) -> Callable[..., Tensor]:
    def scale_rows(x: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> Float[Tensor, "prompt pos d_model"]:
        return x * scale[:, None, None]

    return scale_rows


def margin(
    malicious: Float[Tensor, "malicious *rest"], normal: Float[Tensor, "normal *rest"]
) -> Float[Tensor, "*rest"]:
    """Mean over malicious minus mean over harmless prompts: of log-odds the margin, of their slopes its slope."""
    return malicious.mean(0) - normal.mean(0)
