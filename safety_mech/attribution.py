"""Which tokens of a prompt move the refusal, to first order: gradient times input, one number a token.

    a_t = <dL/de_t, e_t - baseline>        L = refusal log-odds of the prompt (refusal.py), in nats
                                           e_t = embedding of token t

It is computed as the derivative of L with respect to a strength s_t at 0, where every embedding is moved away from the
baseline, e_t + s_t (e_t - baseline): one forward pass for each chain of openings and one backward pass for all tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.chat import Template, check_context, encode_chat, tokenizer_of
from safety_mech.forward import common_opening
from safety_mech.refusal import REFUSAL_OPENINGS, append_chain, batch_log_odds, opening_chains


@dataclass(frozen=True)
class TokenAttribution:
    """`values[t]`, in nats, belongs to `tokens[t]`; `question`: the positions of the prompt inside the template."""

    tokens: tuple[str, ...]
    values: Float[Tensor, " pos"]
    question: range
    log_odds: float


def refusal_attribution(
    model: HookedTransformer,
    prompt: str,
    template: str | Template = "own",
    openings: Sequence[str] = REFUSAL_OPENINGS,
    *,
    baseline: Float[Tensor, " d_model"] | None = None,
) -> TokenAttribution:
    """Gradient times input of the refusal log-odds, for every token of the prompt in its template.

    What it means: a_t > 0 says that moving token t's embedding a little further from `baseline` (default: the mean
    embedding of the vocabulary, "no token in particular") raises the log-odds of a refusal, by a_t nats for each
    whole step.
    What it does not mean: it is a slope, and not what happens when the token is taken out or replaced; in a saturated
    model the slopes are small though the token decides. The values do not add up to the log-odds. And it says
    nothing about the layer in which the token does its work. A baseline of zeros gives the textbook's gradient
    times embedding, which in models with a norm before every block sees little: the norm takes the length away.

    Raises ValueError as `refusal_log_odds` does. float64 values; exact up to the model's own precision.
    """
    tokenizer = tokenizer_of(model)
    chats = encode_chat(tokenizer, [prompt], template)
    chains = opening_chains(tokenizer, template, openings)
    for chain in chains:
        check_context(append_chain(chats, chain), model.cfg.n_ctx)
    embedding = model.embed.W_E.detach()
    centre = embedding.mean(0) if baseline is None else baseline.to(embedding)
    strength = torch.zeros(len(chats[0]), dtype=embedding.dtype, device=embedding.device, requires_grad=True)
    with torch.enable_grad(), model.hooks(fwd_hooks=[("hook_embed", _away_from(centre, strength))]):
        opening = common_opening(model, chats)  # of one prompt: none, so that the hook sees every position
        value = batch_log_odds(model, chats, chains, opening)[0]
        (slopes,) = torch.autograd.grad(value, strength)
    texts = tuple(str(tokenizer.decode([token])) for token in chats[0].tokens.tolist())
    return TokenAttribution(texts, slopes.double().cpu(), chats[0].question, float(value.detach()))


def _away_from(centre: Float[Tensor, " d_model"], strength: Float[Tensor, " pos"]) -> Callable[..., Tensor]:
    """(embedding, hook) -> embedding moved away from `centre`; tokens behind the prompt's, the openings', stay."""

    def move(embedding: Float[Tensor, "prompt all_pos d_model"], hook: HookPoint) -> Tensor:
        padded = torch.nn.functional.pad(strength, (0, embedding.shape[1] - len(strength)))
        return embedding + padded[:, None] * (embedding - centre)

    return move
