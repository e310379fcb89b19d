"""From a question to the model's tokens: one template for every prompt, and batches that need no padding.

The query sits inside the template, so the last token is the same for all prompts (paper §3.2). Which tokens
are the question's is found from the template, never from a fixed index. Prompts are batched by equal token
length: nothing is ever padded, so a batch gives what single prompts give.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_TOKENS = 4096
"""Tokens a batch, at most (one prompt longer than this makes a batch of its own)."""


@dataclass(frozen=True)
class Template:
    """What stands before and after the question. `before` holds the BOS text where the model wants one."""

    before: str
    after: str

    def render(self, question: str) -> str:
        return self.before + question + self.after


# The format is Stanford Alpaca's convention; the description is in our own words.
ALPACA = Template(
    before="The following instruction describes a task. Write a response that completes it well.\n\n### Instruction:\n",
    after="\n\n### Response:\n",
)
# METHOD 3: no task description, for pictures of attention over the question.
ALPACA_SHORT = Template(before="### Instruction:\n", after="\n\n### Response:\n")
PLAIN_TEMPLATES = {"alpaca": ALPACA, "alpaca_short": ALPACA_SHORT}


@dataclass(frozen=True)
class ChatTokens:
    """One prompt as tokens. `question` are the positions that hold the question's text."""

    tokens: Int[Tensor, " pos"]
    question: range

    def __len__(self) -> int:
        return len(self.tokens)


def tokenizer_of(model: HookedTransformer) -> PreTrainedTokenizerBase:
    """The model's tokenizer; raises ValueError for a model without one."""
    if model.tokenizer is None:
        raise ValueError("this model has no tokenizer: load it with safety_mech.load_model, or set model.tokenizer")
    return model.tokenizer


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """Generated tokens as text, without special tokens and surrounding white space."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()


def answer_space(template: Template) -> str:
    """What an answer begins with: "[/INST]" is answered by " I ...", "assistant\\n" by "I ..."."""
    return "" if template.after[-1:].isspace() else " "


def check_template_name(template: str | Template) -> None:
    """Raise ValueError for a name that is no template: what can be checked before a model is loaded."""
    known = ("own", *PLAIN_TEMPLATES)
    if isinstance(template, str) and template not in known:
        raise ValueError(f"template {template!r}: expected one of {', '.join(known)}")


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str | Template = "own") -> Template:
    """`"own"`: the chat template that came with the model; `"alpaca"`, `"alpaca_short"`; or a Template.

    Raises ValueError for an unknown name, or for "own" where the tokenizer has no chat template.
    """
    if isinstance(template, Template):
        return template
    check_template_name(template)
    if template in PLAIN_TEMPLATES:
        return PLAIN_TEMPLATES[template]
    if not tokenizer.chat_template:
        raise ValueError("template 'own': this model's tokenizer has no chat template; use 'alpaca' instead")
    return _own_template(tokenizer)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Render the chat template around a mark and cut it there."""
    mark = "QUESTIONGOESHERE"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(text).partition(mark)
    if not found or mark in after:
        raise ValueError("template 'own': the chat template does not hold the user's text exactly once")
    return Template(before, after)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and character offsets; the tokenizer's own BOS comes first, but never a second one."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), [tuple(pair) for pair in encoded["offset_mapping"]]
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos] and tokenizer("").input_ids[:1] == [bos]:
        ids, offsets = [bos, *ids], [(0, 0), *offsets]
    return ids, offsets


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], template: str | Template = "own"
) -> list[ChatTokens]:
    """Put every prompt into the template and encode it.

    Surrounding white space is stripped from prompts, as most chat templates do.
    Raises ValueError for no prompts, an empty prompt, or one that holds a special token's text (it would
    end the user's turn early).
    """
    if isinstance(prompts, str):
        raise ValueError("prompts: expected a list of strings, got one string; write [prompt]")
    if len(prompts) == 0:
        raise ValueError("no prompts were given: expected at least one")
    shape = resolve_template(tokenizer, template)
    return [_encode_one(tokenizer, shape, index, prompt.strip()) for index, prompt in enumerate(prompts)]


def _encode_one(tokenizer: PreTrainedTokenizerBase, template: Template, index: int, question: str) -> ChatTokens:
    if not question:
        raise ValueError(f"prompt {index} is empty: expected some text")
    for special in special_texts(tokenizer):
        if special in question:
            raise ValueError(f"prompt {index} holds the special token {special!r}: take it out")
    ids, offsets = encode_text(tokenizer, template.render(question))
    first, last = len(template.before), len(template.before) + len(question)
    inside = [pos for pos, (start, end) in enumerate(offsets) if end > first and start < last]
    return ChatTokens(torch.tensor(ids), range(inside[0], inside[-1] + 1))


def special_texts(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Texts of all special tokens, also of those without a role (Llama 3's <|eot_id|>)."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {*added, *tokenizer.all_special_tokens}


def check_context(chats: Sequence[ChatTokens], n_ctx: int, new_tokens: int = 0) -> None:
    """Raise ValueError if a prompt, with `new_tokens` to be generated, is longer than the model's context."""
    for index, chat in enumerate(chats):
        if len(chat) + new_tokens > n_ctx:
            extra = f" and {new_tokens} to generate" if new_tokens else ""
            raise ValueError(f"prompt {index} has {len(chat)} tokens{extra}: the context holds {n_ctx}; shorten it")


def shared_opening(chats: Sequence[ChatTokens]) -> int:
    """Number of leading tokens that all prompts share, leaving at least one token of each.

    With SmolLM2's own template 24 of about 37 tokens (METHOD 5). One prompt alone shares nothing.
    """
    if len(chats) < 2:
        return 0
    shortest = min(len(chat) for chat in chats) - 1
    stacked = torch.stack([chat.tokens[:shortest] for chat in chats])
    differs = (stacked != stacked[0]).any(dim=0).nonzero()
    return int(differs[0, 0]) if len(differs) else shortest


def equal_length_batches(lengths: Sequence[int], batch_tokens: int = DEFAULT_BATCH_TOKENS) -> Iterator[list[int]]:
    """Yield lists of prompt indices of equal length, at most `batch_tokens` tokens each; longest first.

    The longest first, so that a run that will not fit in memory fails at once.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    for length in sorted(by_length, reverse=True):
        indices, size = by_length[length], max(1, batch_tokens // length)
        for first in range(0, len(indices), size):
            yield indices[first : first + size]
