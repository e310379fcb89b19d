"""Where the last token looks in the question, layer by layer (paper §3.6, A.5; docs/method.md#attention-stages).

The paper's picture: attention from the last token of the prompt to every token of the question, averaged over heads,
one row a layer, min-max scaled per row, with the short Alpaca template. The question's tokens are found from the
template (chat.py), never by a fixed index.

Attention shows where a layer reads, and not what it computes from it; it does not prove a mechanism.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint
from transformers import PreTrainedTokenizerBase

from safety_mech.models.chat import (
    DEFAULT_BATCH_TOKENS,
    ChatTokens,
    Template,
    check_context,
    encode_chat,
    encode_text,
    equal_length_batches,
    resolve_template,
    tokenizer_of,
)
from safety_mech.models.forward import Hooks, common_prefix, embed, run_blocks, stack_rest


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

    1. put prompts into the template; run the tokens they all start with once, and cache their keys and values;
    2. run the rest in batches of equal length; one hook a layer copies the pattern's last row at the question's
       tokens. Rows of the pattern are the positions that are run, its columns ALL positions, the shared prefix's too.

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
    rows: list[int] = []

    def keep_last_row(pattern: Float[Tensor, "prompt head pos all_pos"], hook: HookPoint) -> None:
        last = pattern[:, :, -1].float()
        last = last.mean(dim=1) if head is None else last[:, head]
        _check_attends(last, hook.layer(), rows)
        for index, weights in zip(rows, last.cpu(), strict=True):
            question = chats[index].question
            found[index][hook.layer()] = weights[question.start : question.stop]

    bar = tqdm(total=len(chats), desc="attention", unit="prompt", disable=not progress)
    with torch.no_grad(), bar:
        prefix = common_prefix(model, chats, share_prefix)
        hooks: Hooks = [(f"blocks.{layer}.attn.hook_pattern", keep_last_row) for layer in range(model.cfg.n_layers)]
        with model.hooks(fwd_hooks=hooks):
            for rows in equal_length_batches([len(chat) - len(prefix) for chat in chats], batch_tokens):
                tokens = stack_rest(model, chats, rows, len(prefix))
                run_blocks(model, embed(model, tokens, len(prefix)), cache=prefix.cache_for(len(rows)))
                bar.update(len(rows))
    shape = resolve_template(tokenizer_of(model), template)
    return [
        _with_text(tokenizer_of(model), shape, prompt.strip(), chat, weights)
        for prompt, chat, weights in zip(prompts, chats, found, strict=True)
    ]


def _check_attends(last: Float[Tensor, "prompt all_pos"], layer: int, rows: Sequence[int]) -> None:
    """TransformerLens turns nan in a pattern into 0, which would pass for a token that attends to nothing."""
    empty = (last.sum(dim=-1) == 0).nonzero()
    if len(empty):
        raise ValueError(
            f"the last token attends to nothing at layer {layer} for prompt {rows[int(empty[0, 0])]}: "
            "try dtype float32, or check the weights"
        )


def _with_text(
    tokenizer: PreTrainedTokenizerBase, template: Template, prompt: str, chat: ChatTokens, weights: Tensor
) -> QuestionAttention:
    """Beside the weights: each token as text, and where it stands in the prompt."""
    _, offsets = encode_text(tokenizer, template.render(prompt))
    first, length = len(template.before), len(prompt)
    spans = tuple((max(0, offsets[pos][0] - first), min(length, offsets[pos][1] - first)) for pos in chat.question)
    tokens = tuple(str(tokenizer.decode([int(chat.tokens[pos])])) for pos in chat.question)
    return QuestionAttention(prompt, tokens, spans, weights)


def min_max(weights: Float[Tensor, "layer pos"]) -> Float[Tensor, "layer pos"]:
    """Every row scaled to [0, 1], as in the paper's heatmaps; a row without contrast (all equal) becomes 0.

    Scaled rows show which tokens a layer prefers and no longer how much: compare layers by `weights` itself.
    """
    low, high = weights.amin(dim=-1, keepdim=True), weights.amax(dim=-1, keepdim=True)
    spread = high - low
    return torch.where(spread > 0, (weights - low) / spread.where(spread > 0, 1.0), 0.0)
