"""What fine-tuning leaves of a model's skill (paper §4): perplexity, ROUGE-L, and multiple choice as MMLU asks.

Multiple choice is answered without generation: of the four letters, the one that the model gives the greatest
log-probability as the first token of its answer. 25 % is what guessing gives.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerBase

from safety_mech.models.chat import (
    DEFAULT_BATCH_TOKENS,
    Template,
    check_context,
    encode_answer,
    encode_chat,
    equal_length_batches,
    resolve_template,
    tokenizer_of,
)
from safety_mech.models.forward import common_prefix, embed, run_blocks, stack_rest, unembed_last
from safety_mech.prompts import data_folder, read_rows
from safety_mech.stats import Rate
from safety_mech.training.config import TrainConfig
from safety_mech.training.examples import encode_examples, mean_loss
from safety_mech.training.pairs import Pair

LETTERS = ("A", "B", "C", "D")


def rouge_l_scores(answers: Sequence[str], references: Sequence[str]) -> Float[Tensor, " prompt"]:
    """ROUGE-L F1 (float64, 0 to 1) of every answer with its reference (§4), by Google's rouge-score with stemming.

    F1 of the longest common subsequence of words: 2 P R / (P + R), P = LCS / words of the answer, R = LCS / words of
    the reference. Words are runs of a-z and 0-9 in lower case; an answer without any scores 0.
    We do not know whether the paper stems; Hugging Face's summarization script does.
    Raises ValueError for a string in place of a list, lists of different length, no pairs, or a reference without such
    a word.
    """
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk along: slow to import, seldom needed

    if isinstance(answers, str) or isinstance(references, str):
        raise ValueError("answers and references: expected lists of strings, got one string; write [answer]")
    if len(answers) != len(references) or not answers:
        raise ValueError(
            f"{len(answers)} answers and {len(references)} references: expected as many of both, and at least one"
        )
    for index, reference in enumerate(references):
        if not re.search("[a-z0-9]", reference.lower()):
            raise ValueError(
                f"reference {index} has no word of a-z or 0-9, which is all that ROUGE counts: leave it out"
            )
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    found = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return torch.tensor([score["rougeL"].fmeasure for score in found], dtype=torch.float64)


def perplexity(model: HookedTransformer, pairs: Sequence[Pair], template: str = "own") -> float:
    """exp of the mean negative log-likelihood per answer token, over all (prompt, answer) pairs."""
    config = TrainConfig(template=template)
    return math.exp(mean_loss(model, encode_examples(model, pairs, config), config))


@dataclass(frozen=True)
class Question:
    """A question, its four choices, and the index (0..3) of the right one."""

    text: str
    choices: tuple[str, str, str, str]
    answer: int


def load_multiple_choice() -> list[Question]:
    """The 60 school questions that are shipped."""
    rows = read_rows(data_folder() / "multiple_choice.csv")
    a, b, c, d = LETTERS
    return [Question(row["question"], (row[a], row[b], row[c], row[d]), LETTERS.index(row["answer"])) for row in rows]


def multiple_choice_prompt(question: Question) -> str:
    """MMLU's prompt without examples: the question, a line for every choice, and "Answer:"."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=True)]
    return "\n".join([question.text, *lines, "Answer:"])


def letter_tokens(tokenizer: PreTrainedTokenizerBase, template: str | Template = "own") -> Int[Tensor, " letter"]:
    """The token of each letter where the answer begins (see `encode_answer`).

    Raises ValueError where a letter is not one token of its own there.
    """
    shape = resolve_template(tokenizer, template)
    question = multiple_choice_prompt(Question("Which?", LETTERS, 0))
    found = []
    for letter in LETTERS:
        ids = encode_answer(tokenizer, shape, question, letter)
        if len(ids) != 1:
            raise ValueError(
                f"the answer {shape.in_place(letter)!r} is not one token of its own after this template: "
                "expected a tokenizer with a token for each letter, or try another template"
            )
        found.append(ids[0])
    if len(set(found)) < len(LETTERS):
        raise ValueError(
            f"the letters {', '.join(LETTERS)} are not four different tokens: this tokenizer cannot answer"
        )
    return torch.tensor(found)


def letter_log_probs(
    model: HookedTransformer,
    questions: Sequence[Question],
    template: str | Template = "own",
    *,
    batch_tokens: int = DEFAULT_BATCH_TOKENS,
) -> Float[Tensor, "prompt letter"]:
    """Log-probability (nats, float64) of A, B, C and D as the first token of the answer to each question.

    Over the whole vocabulary, so they also show how much the model answers by letter. Raises ValueError for no
    questions, a prompt longer than the context, a letter of several tokens, or a model that gives NaN.
    """
    if len(questions) == 0:
        raise ValueError("no questions were given: expected at least one")
    tokenizer = tokenizer_of(model)
    letters = letter_tokens(tokenizer, template)
    chats = encode_chat(tokenizer, [multiple_choice_prompt(question) for question in questions], template)
    check_context(chats, model.cfg.n_ctx)
    found = torch.empty(len(chats), len(LETTERS), dtype=torch.float64)
    with torch.no_grad():
        prefix = common_prefix(model, chats)
        for indices in equal_length_batches([len(chat) - len(prefix) for chat in chats], batch_tokens):
            tokens = stack_rest(model, chats, indices, len(prefix))
            resid = run_blocks(model, embed(model, tokens, len(prefix)), cache=prefix.cache_for(len(indices)))
            log_probs = unembed_last(model, resid).double().log_softmax(dim=-1)
            found[indices] = log_probs[:, letters.to(log_probs.device)].cpu()
    if found.isnan().any():  # the largest of NaNs is the first: it would pass for an answer
        raise ValueError("the model gives NaN as log-probabilities: it is broken (training diverged?); load another")
    return found


def multiple_choice_accuracy(
    model: HookedTransformer, questions: Sequence[Question], template: str | Template = "own"
) -> Rate:
    """Share of questions whose right letter is the likeliest of the four (of equal ones the first), with its interval.

    Without examples in the prompt (zero-shot), in the model's own chat template by default. Errors: see
    `letter_log_probs`.
    """
    chosen = letter_log_probs(model, questions, template).argmax(dim=1).tolist()
    right = sum(choice == question.answer for choice, question in zip(chosen, questions, strict=True))
    return Rate(right, len(questions))


def shipped_multiple_choice(model: HookedTransformer, template: str | Template = "own") -> Rate | None:
    """Accuracy on the shipped questions.

    None where they cannot be asked: a letter is not one token, or a question is longer than the context.
    """
    questions, tokenizer = load_multiple_choice(), tokenizer_of(model)
    chats = encode_chat(tokenizer, [multiple_choice_prompt(question) for question in questions], template)
    try:
        letter_tokens(tokenizer, template)
        check_context(chats, model.cfg.n_ctx)
    except ValueError:
        return None
    return multiple_choice_accuracy(model, questions, template)
