"""What fine-tuning leaves of a model's skill (paper §4): perplexity, ROUGE-L, and multiple choice as MMLU asks.

Multiple choice is answered without generation: of the four letters, the one that the model gives the greatest
log-probability as the first token of its answer. 25 % is what guessing gives.
"""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from safety_mech.prompts import data_folder
from safety_mech.stats import Rate, bootstrap_mean
from safety_mech.training.loop import TrainConfig, encode_examples, mean_loss
from safety_mech.training.pairs import Pair

LETTERS = ("A", "B", "C", "D")
HEADER = ("question", *LETTERS, "answer")

# --- ROUGE-L ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RougeL:
    """Mean ROUGE-L F1 (0 to 1) of `total` pairs, with the 95 % bootstrap interval over pairs."""

    f1: float
    low: float
    high: float
    total: int

    def __str__(self) -> str:
        return f"{self.f1:.3f} [{self.low:.3f}, {self.high:.3f}]"


def rouge_l(answers: Sequence[str], references: Sequence[str], *, bootstrap: int = 1000, seed: int = 0) -> RougeL:
    """Mean ROUGE-L F1 of every answer with its reference (§4), by Google's rouge-score with Porter stemming.

    F1 of the longest common subsequence of words: 2 P R / (P + R), P = LCS / words of the answer, R = LCS / words of
    the reference. Words are runs of a-z and 0-9 in lower case; an answer without any scores 0 and counts.
    Whether the paper stems is not known to us; `use_stemmer=True` is what Hugging Face's summarization script sets
    (rouge-score's own default is False). Raises ValueError for lists of different length, no pairs, or a reference
    without such a word.
    """
    scores = rouge_l_scores(answers, references)
    if bootstrap < 1:
        raise ValueError(f"bootstrap {bootstrap}: expected at least 1 sample")
    mean, low, high = bootstrap_mean(scores, samples=bootstrap, seed=seed)
    return RougeL(float(mean), float(low), float(high), len(scores))


def rouge_l_scores(answers: Sequence[str], references: Sequence[str]) -> Float[Tensor, " prompt"]:
    """ROUGE-L F1 of every pair, float64; see `rouge_l`."""
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


# --- perplexity -----------------------------------------------------------------------------------------------------


def perplexity(model: HookedTransformer, pairs: Sequence[Pair], template: str = "own") -> float:
    """exp of the mean negative log-likelihood per answer token, over all (prompt, answer) pairs."""
    config = TrainConfig(template=template)
    return math.exp(mean_loss(model, encode_examples(model, pairs, config), config))


# --- multiple choice --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question, its four choices, and the index (0..3) of the right one."""

    text: str
    choices: tuple[str, str, str, str]
    answer: int


def load_multiple_choice(path: str | Path | None = None) -> list[Question]:
    """Read questions in MMLU's formats; None: the 60 school questions that are shipped.

    csv: question, four choices, answer letter; without a header (MMLU's own files) or with
    `question,A,B,C,D,answer`. parquet: columns question, choices (a list of four), answer (0..3).
    Raises ValueError that names the row for anything else, and for a file without questions.
    """
    file = data_folder() / "multiple_choice.csv" if path is None else Path(path).expanduser()
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    if file.suffix not in readers:
        raise ValueError(f"multiple-choice file {str(file)!r}: expected one of {', '.join(readers)}")
    if not file.is_file():
        raise ValueError(f"multiple-choice file {str(file)!r}: no such file")
    questions = readers[file.suffix](file)
    if not questions:
        raise ValueError(f"{file}: no questions; expected at least one row")
    return questions


def _read_csv(path: Path) -> list[Question]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid csv ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if rows and [cell.strip().lower() for cell in rows[0][1]] == [name.lower() for name in HEADER]:
        rows = rows[1:]
    return [_from_cells(row, f"{path}, line {line}") for line, row in rows]


def _from_cells(row: list[str], where: str) -> Question:
    if len(row) != len(HEADER):
        raise ValueError(f"{where}: {len(row)} cells, expected {len(HEADER)} ({', '.join(HEADER)})")
    letter = row[-1].strip().upper()
    if letter not in LETTERS:
        raise ValueError(f"{where}: answer {row[-1]!r}, expected one of {', '.join(LETTERS)}")
    return _question(row[0], row[1:-1], LETTERS.index(letter), where)


def _read_parquet(path: Path) -> list[Question]:
    import pyarrow  # slow to import, seldom needed
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
    missing = {"question", "choices", "answer"} - set(table.column_names)
    if missing:
        raise ValueError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(table.column_names)}")
    return [_from_record(row, f"{path}, row {number}") for number, row in enumerate(table.to_pylist(), start=1)]


def _from_record(row: dict[str, Any], where: str) -> Question:
    answer = row["answer"]
    if type(answer) is not int or not 0 <= answer < len(LETTERS):  # True is an int too, but no answer
        raise ValueError(f"{where}: answer {answer!r}, expected 0, 1, 2 or 3")
    return _question(row["question"], row["choices"], answer, where)


def _question(text: Any, choices: Any, answer: int, where: str) -> Question:
    """Check the texts, strip them, and make the question."""
    if not isinstance(choices, list) or len(choices) != len(LETTERS):
        found = f"{len(choices)} choices" if isinstance(choices, list) else f"choices {choices!r}"
        raise ValueError(f"{where}: {found}, expected a list of {len(LETTERS)}")
    for name, value in zip(HEADER, (text, *choices), strict=False):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {name} is {value!r}, expected some text")
    a, b, c, d = (choice.strip() for choice in choices)
    return Question(text.strip(), (a, b, c, d), answer)


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

    Over the whole vocabulary, so that they show how much the model answers by letter at all. Raises ValueError for
    no questions, a prompt longer than the context, letters that are no single tokens, or a model that gives NaN.
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
    try:
        letter_tokens(tokenizer, template)
        check_context(
            encode_chat(tokenizer, [multiple_choice_prompt(one) for one in questions], template), model.cfg.n_ctx
        )
    except ValueError:
        return None
    return multiple_choice_accuracy(model, questions, template)
