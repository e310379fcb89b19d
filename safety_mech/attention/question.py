"""Where the last token looks in the question, layer by layer (paper §3.6, A.5; docs/method.md#attention-stages).

Attention shows where a layer reads, and not what it computes from it; it does not prove a mechanism.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from safety_mech.models.chat import (
    DEFAULT_BATCH_TOKENS,
    Template,
    check_context,
    encode_chat,
    encode_text,
    resolve_template,
    tokenizer_of,
)
from safety_mech.models.forward import read_activations


@dataclass(frozen=True)
class QuestionAttention:
    """Attention of a prompt's LAST token to each token of its question.

    `tokens`: the question's tokens as text; `spans`: the characters of `prompt` that each of them covers.
    `weights`: probabilities, float32 on the CPU. A row sums to what the whole question gets; the rest of the last
    token's attention, to 1, goes to the template.
    """

    prompt: str
    tokens: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    weights: Float[Tensor, "layer pos"]


def question_attention(
    model: HookedTransformer,
    prompts: Sequence[str],
    template: str | Template = "alpaca_short",
    *,
    head: int | None = None,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
    share_prefix: bool = True,
    progress: bool = False,
) -> list[QuestionAttention]:
    """Attention of the last token over the question in every layer, of every prompt: mean over heads, or one `head`.

    The tokens that all prompts start with run once, the rest in batches of equal length. One hook a layer copies the
    pattern's last row at the question's tokens. Rows of the pattern are the positions that are run, its columns ALL
    positions, the shared prefix's too.

    Memory: layers x question tokens a prompt, plus one batch's pattern in one layer.
    `share_prefix=False` runs every prompt whole: for hooks of your own that need all positions.
    Raises ValueError for empty prompts, one longer than the context, a head that the model does not have, or a last
    token that attends to nothing (naming layer and prompt).
    """
    if head is not None and not 0 <= head < model.cfg.n_heads:
        raise ValueError(f"head {head}: the model has heads 0 to {model.cfg.n_heads - 1}; None takes their mean")
    chats = encode_chat(tokenizer_of(model), prompts, template)
    check_context(chats, model.cfg.n_ctx)
    found = [torch.empty(model.cfg.n_layers, len(chat.question)) for chat in chats]

    def keep_last_row(pattern: Float[Tensor, "prompt head pos all_pos"], layer: int, rows: list[int]) -> None:
        last = pattern[:, :, -1].float()
        last = last.mean(dim=1) if head is None else last[:, head]
        _check_attends(last, layer, rows)
        for index, weights in zip(rows, last.cpu(), strict=True):
            question = chats[index].question
            found[index][layer] = weights[question.start : question.stop]

    bar = "attention" if progress else None
    read_activations(model, chats, "attn.hook_pattern", keep_last_row, batch_tokens, share_prefix, bar)
    tokenizer, shape = tokenizer_of(model), resolve_template(tokenizer_of(model), template)
    first, attentions = len(shape.before), []
    for prompt, chat, weights in zip(map(str.strip, prompts), chats, found, strict=True):
        _, offsets = encode_text(tokenizer, shape.render(prompt))
        places = [(start - first, end - first) for start, end in (offsets[pos] for pos in chat.question)]
        spans = tuple((max(0, start), min(len(prompt), end)) for start, end in places)
        tokens = tuple(str(tokenizer.decode([int(chat.tokens[pos])])) for pos in chat.question)
        attentions.append(QuestionAttention(prompt, tokens, spans, weights))
    return attentions


def _check_attends(last: Float[Tensor, "prompt all_pos"], layer: int, rows: Sequence[int]) -> None:
    """TransformerLens turns nan in a pattern into 0, which would pass for a token that attends to nothing."""
    empty = (last.sum(dim=-1) == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"the last token attends to nothing at layer {layer} for prompt {rows[int(empty[0, 0])]}: "
            "try dtype float32, or check the weights"
        )


def min_max(weights: Float[Tensor, "layer pos"]) -> Float[Tensor, "layer pos"]:
    """Every row scaled to [0, 1], as in the paper's heatmaps; a row without contrast (all equal) becomes 0.

    Scaled rows show which tokens a layer prefers and no longer how much: compare layers by `weights` itself.
    """
    low, high = weights.amin(dim=-1, keepdim=True), weights.amax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (weights - low) / spread.where(spread > 0, 1.0), 0.0)
