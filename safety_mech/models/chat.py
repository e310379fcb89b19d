"""From a question to the model's tokens, by one template for every prompt, in batches that need no padding.

The query sits inside the template, so the last token is the same for all prompts (paper §3.2). Which tokens
are the question's is found from the template, never from a fixed index. Prompts are batched by equal token
length: nothing is ever padded, so a batch gives what single prompts give.

An answer's tokens depend on where it stands: "I" is another token after "[/INST]" than after a line break, and
sentencepiece puts a space before text that follows a special token. So answers are encoded IN PLACE, with their prompt,
and what stands around them is read off the chat template with both turns filled in.
"""

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from itertools import groupby, takewhile
from typing import Any

import torch
from jaxtyping import Int
from jinja2 import TemplateError
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

DEFAULT_BATCH_TOKENS = 4096
"""Tokens a batch, at most (one prompt longer than this makes a batch of its own)."""
TEMPLATE_DATE = date(2024, 7, 26)
"""The day that is "today" in every chat template (Llama-3.2's own default): numbers must not change by day."""


@dataclass(frozen=True)
class Template:
    """What stands around the question and the answer: `before` question `after` `lead` answer `end`."""

    before: str
    """Holds the BOS text where the model wants one."""
    after: str
    lead: str | None = None
    """What the model itself writes before its answer's text: " " after "[/INST]". None: a space, unless `after` ends in
    white space; a template that ends in a special token wants ""."""
    end: str = ""
    """The turn's end as the chat template writes it, one token behind optional white space; "": the tokenizer's
    end-of-sequence token."""

    def render(self, question: str) -> str:
        return self.before + question + self.after

    def in_place(self, answer: str) -> str:
        """The answer with what stands between it and the prompt."""
        lead = ("" if self.after[-1:].isspace() else " ") if self.lead is None else self.lead
        return lead + answer


# The format is Stanford Alpaca's convention. The short one is for pictures of attention over the question
# (docs/method.md#attention-stages); the other's description of the task is in our own words.
ALPACA_SHORT = Template("### Instruction:\n", "\n\n### Response:\n")
_TASK = "The following instruction describes a task. Write a response that completes it well."
ALPACA = replace(ALPACA_SHORT, before=f"{_TASK}\n\n{ALPACA_SHORT.before}")
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


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], ends: Collection[int] = ()) -> str:
    """Generated tokens as text, up to the first of `ends`, without special tokens and surrounding white space.

    A turn's end is not always marked as special (Gemma's <end_of_turn>): give `ends` wherever there may be one.
    """
    before_end = list(takewhile(lambda token: token not in ends, tokens))
    return str(tokenizer.decode(before_end, skip_special_tokens=True)).strip()


def resolve_template(tokenizer: PreTrainedTokenizerBase, template: str | Template = "own") -> Template:
    """`"own"`: the chat template that came with the model; `"alpaca"`, `"alpaca_short"`; or a Template.

    Raises ValueError for an unknown name, or for "own" where the tokenizer has no chat template.
    """
    if isinstance(template, Template):
        return template
    if template in PLAIN_TEMPLATES:
        return PLAIN_TEMPLATES[template]
    if template != "own":
        raise ValueError(f"template {template!r}: expected one of {', '.join(('own', *PLAIN_TEMPLATES))}")
    if not tokenizer.chat_template:
        raise ValueError("template 'own': this model's tokenizer has no chat template; use 'alpaca' instead")
    return _own_template(tokenizer)


def render_chat(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]], *, open_answer: bool) -> str:
    """The turns in the model's chat template, thinking off where it can be, and always on the same day.

    `open_answer`: up to where the model's next answer begins.
    """
    settings: dict[str, Any] = {
        "enable_thinking": False,  # Qwen3 and most others
        "thinking": False,  # DeepSeek, Granite
        "date_string": TEMPLATE_DATE.strftime("%d %b %Y"),
        "strftime_now": TEMPLATE_DATE.strftime,
    }
    rendered = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=open_answer, **settings)
    return str(rendered)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """Render the chat template around a mark and cut it there; once more with an answer, to see what is around that."""
    mark, answer = "QUESTIONGOESHERE", "ANSWERGOESHERE"
    question = {"role": "user", "content": mark}
    prompt = render_chat(tokenizer, [question], open_answer=True)
    before, found, after = prompt.partition(mark)
    if not found or mark in after:
        raise ValueError("template 'own': the chat template does not hold the user's text exactly once")
    try:
        whole = render_chat(tokenizer, [question, {"role": "assistant", "content": answer}], open_answer=False)
    except TemplateError:
        whole = ""
    head, found, tail = whole.partition(answer)
    if not found:  # made for one turn only
        return Template(before, after, "" if after.endswith(tuple(special_texts(tokenizer))) else None)
    added, lead = _up_to_the_answer(prompt, head)
    if added and before.endswith(added):  # both turns look alike: nothing is known about answers
        return Template(before, after)
    _warn_of_thinking(tokenizer, after, added)
    return Template(before, after + added, lead, _turn_end(tokenizer, tail))


_OPEN_THOUGHT = re.compile(r"<([\w:]*think\w*)>\s*$")


def _up_to_the_answer(prompt: str, head: str) -> tuple[str, str]:
    """What must be added to the prompt so that the answer comes next, and the white space that the model then writes.

    `head` is what the template puts before an answer that is given. It may hold more than the prompt for an answer
    (an empty thought, gpt-oss' channel), or less (the prompt opens a thought): the thought is closed, empty.
    """
    if head.startswith(prompt):
        missing = head[len(prompt) :]
        return (missing, "") if missing.strip() else ("", missing)
    if opened := _OPEN_THOUGHT.search(prompt):
        return f"\n</{opened[1]}>\n\n", ""
    blank = head[len(head.rstrip()) :]
    return "", "" if prompt.startswith(head) or prompt[-1:].isspace() else blank


def _warn_of_thinking(tokenizer: PreTrainedTokenizerBase, after: str, added: str) -> None:
    if added:
        warnings.warn(
            f"this chat template has the model write (or think) before it answers, and cannot turn that off: {added!r} "
            "is put at the end of every prompt, so that refusals are measured where the answer begins",
            stacklevel=2,
        )
    elif "</think>" in str(tokenizer.chat_template) and "</think>" not in after:
        warnings.warn(
            "this chat template knows thinking blocks but neither opens nor closes one: an answer is measured from its "
            "first token on, a thought included; a Template whose `after` ends in '</think>\\n\\n' leaves it out",
            stacklevel=2,
        )


def _turn_end(tokenizer: PreTrainedTokenizerBase, tail: str) -> str:
    """The token that follows the answer, with the white space before it; "" where text of another kind follows."""
    rest = tail.lstrip()
    known = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    end = max((text for text in known if text.strip() and rest.startswith(text)), key=len, default="")
    return tail[: len(tail) - len(rest)] + end if end else ""


def end_tokens(model: HookedTransformer, template: str | Template = "own") -> frozenset[int]:
    """All tokens that end an answer: the template's turn end, that of the model's own chat template, the tokenizer's
    end-of-sequence token, and those of the model's generation config (set by conversion.py).
    """
    tokenizer = tokenizer_of(model)
    texts = [resolve_template(tokenizer, template).end, str(tokenizer.eos_token or "")]
    if tokenizer.chat_template:
        with suppress(ValueError):  # a chat template that cannot be used ends no answers
            texts.append(resolve_template(tokenizer).end)
    found = {_end_token(tokenizer, text) for text in texts if text}
    return frozenset(found | set(getattr(model, "generation_ends", ())))


def _end_token(tokenizer: PreTrainedTokenizerBase, end: str) -> int:
    token = tokenizer.convert_tokens_to_ids(end.strip())
    if not isinstance(token, int) or (token == tokenizer.unk_token_id and end.strip() != tokenizer.unk_token):
        raise ValueError(f"turn end {end!r}: expected one token of this tokenizer")
    return token


def encode_answer(
    tokenizer: PreTrainedTokenizerBase, template: Template, question: str, answer: str, *, finished: bool = False
) -> list[int]:
    """Token ids of an answer in its place, after the prompt's as `encode_chat` gives them.

    1. Encode prompt and answer (`finished`: and the end of the turn) as one text.
    2. Take what follows the prompt's ids. Where the tokenizer cuts the prompt's last characters otherwise with an
       answer behind them, take the tokens from the answer's first character on: generation reads the prompt alone.
    Raises ValueError where one token spans the border (generation could never give it), or without any end token.
    """
    prompt = template.render(question)
    end = str(template.end or tokenizer.eos_token or "") if finished else ""
    if finished and not end:
        raise ValueError("this tokenizer has no end-of-sequence token: mark the answers UNFINISHED")
    alone, _ = encode_text(tokenizer, prompt)
    ids, offsets = encode_text(tokenizer, prompt + template.in_place(answer) + end)
    if ids[: len(alone)] == alone:
        return ids[len(alone) :]
    first = next((index for index, (start, _) in enumerate(offsets) if start >= len(prompt)), len(ids))
    if first and offsets[first - 1][1] > len(prompt):
        raise ValueError(
            f"answer {template.in_place(answer)[:20]!r}: one token holds its beginning and the end of the prompt, "
            f"{prompt[-10:]!r}; use a Template that keeps white space before an answer in `lead`, not in `after`"
        )
    return ids[first:]


def phrase_tokens(
    tokenizer: PreTrainedTokenizerBase, template: str | Template, phrases: Sequence[str]
) -> list[tuple[int, ...]]:
    """Token ids of each phrase where an answer begins, whatever is asked."""
    shape = resolve_template(tokenizer, template)
    return [tuple(encode_answer(tokenizer, shape, "Why?", phrase)) for phrase in phrases]


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
    shape, specials = resolve_template(tokenizer, template), special_texts(tokenizer)
    chats = []
    for index, question in enumerate(prompt.strip() for prompt in prompts):
        if not question:
            raise ValueError(f"prompt {index} is empty: expected some text")
        if held := next((special for special in specials if special in question), None):
            raise ValueError(f"prompt {index} holds the special token {held!r}: take it out")
        ids, offsets = encode_text(tokenizer, shape.render(question))
        first, last = len(shape.before), len(shape.before) + len(question)
        inside = [pos for pos, (start, end) in enumerate(offsets) if end > first and start < last]
        chats.append(ChatTokens(torch.tensor(ids), range(inside[0], inside[-1] + 1)))
    return chats


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


def shared_prefix_length(chats: Sequence[ChatTokens]) -> int:
    """Number of leading tokens that all prompts share, leaving at least one token of each.

    With SmolLM2's own template 24 of about 37 tokens (docs/method.md#prefix-sharing). One prompt alone shares nothing.
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
    longest_first = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    for length, rows in groupby(longest_first, key=lengths.__getitem__):
        indices, size = list(rows), max(1, batch_tokens // length)
        for first in range(0, len(indices), size):
            yield indices[first : first + size]
