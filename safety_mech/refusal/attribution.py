"""Which tokens of a prompt move the refusal: the effect of replacing a token, and its slope.

    effect_t = L - L(e_t := baseline)          L = refusal log-odds of the prompt (log_odds.py), in nats
    slope_t  = <dL/de_t, e_t - baseline>       e_t = embedding of token t; gradient times input

The effect is measured, in a batch with one row for each token. The slope is its first-order estimate for all tokens at
once; it takes one forward pass for each chain of phrases and one backward pass. Where the two disagree, the effect is
right (docs/method.md#token-attribution). On smollm2-135m-aligned "kill" in "Explain why a process might survive after I
kill it from the terminal." has effect +2.4 (its presence raises the log-odds) and slope -1.7. Over the question tokens
of six prompts, three malicious and three harmless, Pearson's correlation of effect and slope was -0.3 to 0.5 (with a
baseline of zeros -0.4 to 0.8).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from safety_mech.models.chat import DEFAULT_BATCH_TOKENS, ChatTokens, Template, check_context, encode_chat, tokenizer_of
from safety_mech.models.forward import common_prefix
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, Chain, append_chain, batch_log_odds, phrase_chains


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
    phrases: Sequence[str] = REFUSAL_PHRASES,
    *,
    baseline: Float[Tensor, " d_model"] | None = None,
) -> TokenAttribution:
    """Slope of the refusal log-odds, gradient times input, for every token of the prompt in its template.

    A value a_t > 0 says that moving token t's embedding a little further from `baseline` raises the log-odds of a
    refusal, by a_t nats for each whole step. The default baseline is the mean embedding of the vocabulary.

    The effect of replacing the token may have another sign (`replacement_effects`). In a saturated model slopes are
    small even where the token decides. The values do not add up to the log-odds, and they do not tell in which layer
    the token acts. A baseline of zeros gives gradient times embedding, which sees little in models with a norm before
    every block, because the norm removes the length.

    Raises ValueError as `refusal_log_odds` does. float64 values; exact up to the model's own precision.
    """
    chats, chains = _encode(model, prompt, template, phrases)
    centre = _baseline(model, baseline)
    strength = torch.zeros(len(chats[0]), dtype=centre.dtype, device=centre.device, requires_grad=True)

    def move(embedding: Float[Tensor, "prompt all_pos d_model"], hook: HookPoint) -> Tensor:
        """Away from `centre`; the phrases' tokens, after the prompt's, stay."""
        padded = torch.nn.functional.pad(strength, (0, embedding.shape[1] - len(strength)))
        return embedding + padded[:, None] * (embedding - centre)

    with torch.enable_grad(), model.hooks(fwd_hooks=[("hook_embed", move)]):
        prefix = common_prefix(model, chats)  # empty for one prompt, so the hook sees every position
        value = batch_log_odds(model, chats, chains, prefix)[0]
        (slopes,) = torch.autograd.grad(value, strength)
    return _attribution(model, chats[0], slopes, value)


def replacement_effects(
    model: HookedTransformer,
    prompt: str,
    template: str | Template = "own",
    phrases: Sequence[str] = REFUSAL_PHRASES,
    *,
    baseline: Float[Tensor, " d_model"] | None = None,
) -> TokenAttribution:
    """What the refusal log-odds lose when one token's embedding is replaced by `baseline`, for every token in turn.

    Positive where the token makes the model refuse more. The other tokens stay, so two tokens that say the same may
    both show 0. The values do not add up to the log-odds. `baseline` as in `refusal_attribution`.
    Raises ValueError as `refusal_log_odds` does. float64.
    """
    chats, chains = _encode(model, prompt, template, phrases)
    centre, prefix = _baseline(model, baseline), common_prefix(model, chats)
    length = len(chats[0])
    replaced = []

    def replace(embedding: Float[Tensor, "prompt all_pos d_model"], hook: HookPoint) -> Tensor:
        """Token `positions[k]` of row k."""
        new = embedding.clone()
        new[torch.arange(len(positions)), positions] = centre
        return new

    with torch.no_grad():
        value = batch_log_odds(model, chats, chains, prefix)[0]
        for positions in torch.arange(length).split(max(1, DEFAULT_BATCH_TOKENS // length)):
            with model.hooks(fwd_hooks=[("hook_embed", replace)]):
                replaced.append(batch_log_odds(model, chats * len(positions), chains, prefix))
    return _attribution(model, chats[0], value - torch.cat(replaced), value)


def _encode(
    model: HookedTransformer, prompt: str, template: str | Template, phrases: Sequence[str]
) -> tuple[list[ChatTokens], tuple[Chain, ...]]:
    chats = encode_chat(tokenizer_of(model), [prompt], template)
    chains = phrase_chains(tokenizer_of(model), template, phrases)
    for chain in chains:
        check_context(append_chain(chats, chain), model.cfg.n_ctx)
    return chats, chains


def _baseline(model: HookedTransformer, given: Float[Tensor, " d_model"] | None) -> Float[Tensor, " d_model"]:
    embedding = model.embed.W_E.detach()
    return embedding.mean(0) if given is None else given.to(embedding)


def _attribution(
    model: HookedTransformer, chat: ChatTokens, values: Float[Tensor, " pos"], log_odds: Tensor
) -> TokenAttribution:
    texts = tuple(str(tokenizer_of(model).decode([token])) for token in chat.tokens.tolist())
    return TokenAttribution(texts, values.detach().double().cpu(), chat.question, float(log_odds.detach()))
