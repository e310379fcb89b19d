"""The margin, and how it moves with each layer (METHOD 8): what safety layers do is tell apart.

    margin = mean refusal log-odds of malicious prompts - mean refusal log-odds of harmless ones, in nats

The paper's measure looks at harmless prompts alone, and moves with any layer that makes the first word more or less
like a refusal. The margin moves only with what does so for one kind of prompt more than for the other.

    slopes: d log-odds / d a at a = 1, where a scales one layer's attention (or MLP) output, all layers in one
            forward and one backward pass
    finite: (log-odds at alpha - log-odds at 1) / (alpha - 1), one layer scaled at a time, prefixes kept

Scales are one a prompt, so that one backward pass gives every prompt's own slope, and intervals over prompts cost
nothing. The template's opening is therefore run with every prompt.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.interventions.scaling import Recipe
from safety_mech.layers import LayerRange
from safety_mech.localization.range_sweep import ScaledRanges
from safety_mech.models.chat import Template, check_context, encode_chat, equal_length_batches, tokenizer_of
from safety_mech.models.forward import Hooks, common_prefix
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, append_chain, batch_log_odds, phrase_chains

PARTS = ("attn_out", "mlp_out")
"""The axis `part`; both are recipes of scaling.py, too."""
LAYER_OUTPUTS = Recipe(("hook_attn_out", "hook_mlp_out"))
"""Both at once: all that a layer adds to the residual stream."""
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

    1. in batches of equal length, multiply each layer's attention and MLP output by a scale that is 1;
    2. log-odds of the batch, forward (`batch_log_odds`, which `refusal_log_odds` runs as well) and backward.

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
        opening = common_prefix(model, chats, share=False)
        for rows in equal_length_batches([len(chat) * len(chains) for chat in longest], batch_tokens):
            shape = (len(PARTS), model.cfg.n_layers, len(rows))
            scales = torch.ones(shape, dtype=model.cfg.dtype, device=model.embed.W_E.device, requires_grad=True)
            with model.hooks(fwd_hooks=_scaling_hooks(scales)):
                total = batch_log_odds(model, [chats[row] for row in rows], chains, opening).sum()
            (gradient,) = torch.autograd.grad(total, scales)
            slopes[rows] = gradient.permute(2, 0, 1).double().cpu()
            bar.update(len(rows))
    return slopes


def _scaling_hooks(scales: Float[Tensor, "part layer prompt"]) -> Hooks:
    return [
        (f"blocks.{layer}.hook_{part}", _scale_rows(scales[index, layer]))
        for index, part in enumerate(PARTS)
        for layer in range(scales.shape[1])
    ]


def _scale_rows(scale: Float[Tensor, " prompt"]) -> Callable[..., Tensor]:
    def scale_rows(x: Float[Tensor, "prompt pos d_model"], hook: HookPoint) -> Float[Tensor, "prompt pos d_model"]:
        return x * scale[:, None, None]

    return scale_rows


def finite_slopes(
    model: HookedTransformer,
    prompts: Sequence[str],
    alpha: float,
    recipe: str | Recipe = LAYER_OUTPUTS,
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
    width: int = 1,
) -> Float[Tensor, "prompt start"]:
    """(log-odds with layers k..k+width-1 scaled by alpha - unscaled) / (alpha - 1), for every k; float64.

    Nats per unit of scale, as `log_odds_slopes`, which it nears as alpha nears 1. For `width` 1 the last axis is
    `layer`. Raises ValueError for alpha = 1 or a width outside the model.
    """
    if alpha == 1:
        raise ValueError("alpha = 1 changes nothing: expected another scale, like 0.8; for the limit: log_odds_slopes")
    if not 1 <= width <= model.cfg.n_layers:
        raise ValueError(f"width {width}: expected 1 to {model.cfg.n_layers}, the model's number of layers")
    ranges = ScaledRanges(model, prompts, alpha, recipe, template, phrases)
    starts = range(model.cfg.n_layers - width + 1)
    scaled = torch.stack([ranges.log_odds(LayerRange(start, start + width - 1)) for start in starts], dim=1)
    return (scaled - ranges.log_odds(None)[:, None]) / (alpha - 1)


def margin(
    malicious: Float[Tensor, "malicious *rest"], normal: Float[Tensor, "normal *rest"]
) -> Float[Tensor, "*rest"]:
    """Mean over malicious minus mean over harmless prompts: of log-odds the margin, of their slopes its slope."""
    return malicious.mean(0) - normal.mean(0)
