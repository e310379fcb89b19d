"""Which kind of words the last token attends to: function words or content words (paper §3.6).

The paper's claim as a number over many prompts (docs/method.md#attention-stages): the share of the question's attention
that falls on

- function words: the closed list below. Determiners and quantifiers, pronouns, question words, prepositions and
  particles, conjunctions, all forms of be, have and do (also as main verbs), modals, "not"; and their contractions;
- content words: every other word, numbers among them;
- punctuation: tokens that are part of no word.

A word may be several tokens ("crip" + "ple", "neighbour" + "'s"); its attention is their sum. Three caveats:

- Shares depend on how many tokens a kind has: compare with `uniform`.
- The question's first token often draws attention whatever it says, and some words are attention sinks (in layers 3 to
  10 of SmolLM2-135M the first "the" takes some 80 % where there is one): `first`, `skip_first`, `skip_words`.
- Many questions begin with function words and end in content words and a mark. A layer that reads whatever is nearest
  to the end therefore looks like one that reads content words.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from safety_mech.attention.question import QuestionAttention

Kind = Literal["function", "content", "punctuation"]
KINDS: tuple[Kind, ...] = ("function", "content", "punctuation")

_LIST = """
a an the this that these those some any no every each either neither both all half much many more most less least
few fewer several enough such other another own same
i me my mine myself you your yours yourself yourselves he him his himself she her hers herself it its itself
we us our ours ourselves they them their theirs themselves one ones oneself someone somebody something anyone
anybody anything everyone everybody everything nobody nothing none
who whom whose which what when where why how whoever whomever whichever whatever whenever wherever
about above across after against along among amongst around as at before behind below beneath beside besides
between beyond by despite down during except for from in inside into like near of off on onto out outside over
past per round since through throughout till to toward towards under underneath until unto up upon via with
within without away back apart
and or but nor so yet if unless because although though while whereas whether than once
be am is are was were been being have has had having do does did doing done
can could may might must shall should will would ought can't won't shan't cannot
not there here then too also just only very
"""
FUNCTION_WORDS = frozenset(_LIST.split())
"""Closed classes of English, in lower case. Adverbs of degree and place are in only where they are as short and
common as these; "please", numbers and names of things are content."""

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
"""Letters and digits, with apostrophes and hyphens inside: "don't", "brother-in-law" are one word."""


@dataclass(frozen=True)
class Word:
    """A word, or one token that is part of none. `tokens`: its positions among the question's tokens."""

    text: str
    kind: Kind
    tokens: tuple[int, ...]


def is_function_word(word: str) -> bool:
    """Whether a word is on the list, or a contraction of one that is: "I'm", "who's", "don't".

    A noun's "'s" stays with its noun: "neighbour's" is a content word.
    """
    plain = word.lower().replace("\u2019", "'")
    return plain in FUNCTION_WORDS or plain.removesuffix("n't").partition("'")[0] in FUNCTION_WORDS


def split_words(prompt: str, spans: Sequence[tuple[int, int]]) -> list[Word]:
    """The words that tokens with these `spans` (characters of the prompt) make up, in order.

    A token belongs to the word it shares most characters with (a leading space counts for nothing); one that shares
    none is punctuation, and stands alone.
    """
    found = [match.span() for match in WORD.finditer(prompt)]
    words: list[Word] = []
    last = None
    for token, (start, end) in enumerate(spans):
        shared = [min(end, word[1]) - max(start, word[0]) for word in found]
        index = max(range(len(found)), key=shared.__getitem__) if max(shared, default=0) > 0 else None
        if index is None:
            words.append(Word(prompt[start:end].strip() or prompt[start:end], "punctuation", (token,)))
        elif index == last:
            words[-1] = Word(words[-1].text, words[-1].kind, (*words[-1].tokens, token))
        else:
            text = prompt[slice(*found[index])]
            words.append(Word(text, "function" if is_function_word(text) else "content", (token,)))
        last = index
    return words


def by_word(attention: QuestionAttention) -> QuestionAttention:
    """The same with one column a word: a word's attention is the sum over its tokens."""
    words = split_words(attention.prompt, attention.spans)
    return QuestionAttention(
        attention.prompt,
        tuple(word.text for word in words),
        tuple((attention.spans[word.tokens[0]][0], attention.spans[word.tokens[-1]][1]) for word in words),
        torch.stack([attention.weights[:, list(word.tokens)].sum(dim=1) for word in words], dim=1),
    )


@dataclass(frozen=True)
class WordShares:
    """How the attention over the question is shared out between KINDS of words, by layer.

    `shares`: of every prompt, summing to 1 over kinds. `uniform`: what equal attention to every token would give.
    `first`: the share of the question's first token, and `first_uniform` (one over the number of tokens).
    `question`: what the question gets of the last token's whole attention; all shares are shares of this.
    """

    shares: Float[Tensor, "prompt layer kind"]
    uniform: Float[Tensor, "prompt kind"]
    first: Float[Tensor, "prompt layer"]
    first_uniform: Float[Tensor, " prompt"]
    question: Float[Tensor, "prompt layer"]

    @property
    def n_layers(self) -> int:
        return self.shares.shape[1]

    def of_words(self) -> Float[Tensor, "prompt layer"]:
        """Content words' part of the attention that falls on words, punctuation left out; nan where none does."""
        return self.shares[..., 1] / (self.shares[..., 0] + self.shares[..., 1])


def word_shares(
    attentions: Sequence[QuestionAttention], *, skip_first: bool = False, skip_words: Collection[str] = ()
) -> WordShares:
    """The share of the question's attention on each kind of word, of every prompt and layer (float64).

    `skip_first`: the question's first token is left out, for it may be looked at for its place alone.
    `skip_words`: these words (in lower case) are left out, wherever they stand.
    Raises ValueError for no prompts, or a prompt of which nothing is left.
    """
    if not attentions:
        raise ValueError("no prompts were given: expected at least one")
    rows = [_shares(attention, number, skip_first, skip_words) for number, attention in enumerate(attentions)]
    return WordShares(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _shares(
    attention: QuestionAttention, number: int, skip_first: bool, skip_words: Collection[str]
) -> tuple[Tensor, ...]:
    """One row of each field of WordShares."""
    weights = attention.weights.double()
    kinds = torch.zeros(weights.shape[1], len(KINDS), dtype=torch.float64)
    counted = torch.ones(weights.shape[1], dtype=torch.bool)
    counted[0] = not skip_first
    for word in split_words(attention.prompt, attention.spans):
        kinds[list(word.tokens), KINDS.index(word.kind)] = 1.0
        if word.text.lower() in skip_words:
            counted[list(word.tokens)] = False
    question = weights.sum(dim=1)
    first = weights[:, 0] / question
    weights, kinds = weights[:, counted], kinds[counted]
    total = weights.sum(dim=1, keepdim=True)
    if not (total > 0).all():
        raise ValueError(f"prompt {number}, {attention.prompt[:60]!r}: no attention is left to share out")
    first_uniform = torch.tensor(1 / attention.weights.shape[1], dtype=torch.float64)
    return weights @ kinds / total, kinds.mean(dim=0), first, first_uniform, question
