"""ROUGE-L by hand, MMLU's formats and their errors, and accuracy against a plain full forward."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from safety_mech.models.chat import PLAIN_TEMPLATES, Template, encode_text, resolve_template
from safety_mech.stats import Rate
from safety_mech.training.capabilities import (
    Question,
    letter_log_probs,
    letter_tokens,
    load_multiple_choice,
    multiple_choice_accuracy,
    multiple_choice_prompt,
    rouge_l,
    rouge_l_scores,
    shipped_multiple_choice,
)

CAPITAL = Question("What is the capital of France?", ("Rome", "Paris", "Oslo", "Bern"), 1)
SPACED = Template("user: ", "\nassistant:")
"""Answered by " A", which the tests' tokenizer spells with two tokens."""


# --- ROUGE-L ----------------------------------------------------------------------------------------------------------


def test_rouge_l_by_hand() -> None:
    """LCS "the sat down" of 4 and 5 words: P 3/4, R 3/5, F1 2/3. LCS "two cats" of 2 and 5: P 1, R 2/5, F1 4/7."""
    answers = ["The cat sat down.", "two cats"]
    references = ["the old dog sat down", "a cat or two cats"]
    assert rouge_l_scores(answers, references).tolist() == pytest.approx([2 / 3, 4 / 7])
    assert rouge_l(answers, references).f1 == pytest.approx((2 / 3 + 4 / 7) / 2)


def test_rouge_l_counts_the_order_of_words_and_stems_them() -> None:
    scores = rouge_l_scores(["a b", "b a", "cats", "", "!"], ["a b", "a b", "cat", "cat", "cat"])
    assert scores.tolist() == pytest.approx([1, 0.5, 1, 0, 0])
    assert rouge_l_scores(["running"], ["runs"]).item() == 1
    assert rouge_l_scores(["runner"], ["sits"]).item() == 0


def test_rouge_l_interval_is_a_bootstrap_over_pairs() -> None:
    answers, references = ["a b"] * 20 + ["c d"] * 20, ["a b"] * 40
    found = rouge_l(answers, references)
    assert found.f1 == 0.5
    assert found.total == 40
    # The mean of 40 fair coins has a standard error of 0.079: 1.96 of them on both sides, by the normal approximation.
    assert found.low == pytest.approx(0.5 - 0.155, abs=0.03)
    assert found.high == pytest.approx(0.5 + 0.155, abs=0.03)
    assert rouge_l(answers, references) == found
    assert rouge_l(answers[:1], references[:1]) == replace(found, f1=1.0, low=1.0, high=1.0, total=1)


def test_rouge_l_interval_is_one_of_95_percent() -> None:
    """Of 40 fair coins 14 is the 2.5 % quantile (P(13 or less) = 1.9 %, P(14 or less) = 4.0 %), and 26 the 97.5 %."""
    found = rouge_l(["a b"] * 20 + ["c d"] * 20, ["a b"] * 40, bootstrap=20_000)
    assert (found.low, found.high) == (14 / 40, 26 / 40)


def test_rouge_l_seed_is_used() -> None:
    answers = ["a b c d", "a", "b", "a c", "d e", "a f g"]
    references = ["a b c d e", "a b", "a b c", "a c", "d f", "a g"]
    assert len({rouge_l(answers, references, bootstrap=50, seed=seed).low for seed in range(5)}) > 1


@pytest.mark.parametrize(
    ("answers", "references", "message"),
    [
        (["a"], ["a", "b"], "1 answers and 2 references"),
        ([], [], "at least one"),
        (["a", "b"], ["a", "..."], "reference 1 has no word"),
        ("a", ["a"], "write \\[answer\\]"),
    ],
)
def test_rouge_l_errors(answers: list[str], references: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rouge_l(answers, references)


def test_rouge_l_wants_a_bootstrap() -> None:
    with pytest.raises(ValueError, match="bootstrap 0"):
        rouge_l(["a"], ["a"], bootstrap=0)


# --- formats ----------------------------------------------------------------------------------------------------------

ROW = "What is the capital of France?,Rome,Paris,Oslo,Bern,B\n"


def write_csv(folder: Path, text: str) -> Path:
    path = folder / "questions.csv"
    path.write_text(text, "utf-8")
    return path


def write_parquet(folder: Path, rows: list[dict[str, object]]) -> Path:
    path = folder / "questions.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("header", ["", "question,A,B,C,D,answer\n", "\ufeffQuestion, a, b, c, d, Answer\n"])
@pytest.mark.parametrize("letter", ["B", "b", " B "])
def test_csv_with_and_without_header(tmp_path: Path, header: str, letter: str) -> None:
    path = write_csv(tmp_path, header + ROW.replace(",B\n", f",{letter}\n"))
    assert load_multiple_choice(path) == load_multiple_choice(str(path)) == [CAPITAL]


def test_csv_keeps_commas_and_lines_inside_quotes(tmp_path: Path) -> None:
    path = write_csv(tmp_path, '"One,\ntwo ""x""?",1,"2,5",3,4,D\n\n' + ROW)
    assert load_multiple_choice(path) == [Question('One,\ntwo "x"?', ("1", "2,5", "3", "4"), 3), CAPITAL]


def test_parquet(tmp_path: Path) -> None:
    row = {"question": CAPITAL.text, "subject": "geography", "choices": list(CAPITAL.choices), "answer": 1}
    assert load_multiple_choice(write_parquet(tmp_path, [row, {**row, "answer": 3}])) == [
        CAPITAL,
        replace(CAPITAL, answer=3),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW + "Why?,1,2,3,B\n", "line 2: 5 cells, expected 6"),
        (ROW + "Why?,1,2,3,4,E\n", "line 2: answer 'E', expected one of A, B, C, D"),
        (ROW + "Why?,1,2,3,4,1\n", "line 2: answer '1'"),
        (ROW + "Why?,1, ,3,4,A\n", "line 2: B is ' ', expected some text"),
        (ROW + ",1,2,3,4,A\n", "line 2: question is ''"),
        (ROW + '"Why?"x,1,2,3,4,A\n', "line 2: not valid csv"),
        ("question,A,B,C,D,answer\n", "no questions"),
        ("", "no questions"),
    ],
)
def test_csv_errors_name_the_row(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_multiple_choice(write_csv(tmp_path, text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 4}, "row 2: answer 4, expected 0, 1, 2 or 3"),
        ({"answer": None}, "row 2: answer None"),
        ({"choices": ["1", "2", "3"]}, "row 2: 3 choices, expected a list of 4"),
        ({"choices": None}, "row 2: choices None"),
        ({"choices": ["1", "2", "", "4"]}, "row 2: C is ''"),
        ({"question": None}, "row 2: question is None"),
    ],
)
def test_parquet_errors_name_the_row(tmp_path: Path, change: dict[str, object], message: str) -> None:
    row = {"question": CAPITAL.text, "choices": list(CAPITAL.choices), "answer": 1}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_multiple_choice(write_parquet(tmp_path, [row, {**row, **change}]))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column choices; it has question, answer"):
        load_multiple_choice(write_parquet(tmp_path, [{"question": "Why?", "answer": 1}]))
    (tmp_path / "broken.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="not a parquet file"):
        load_multiple_choice(tmp_path / "broken.parquet")
    (tmp_path / "latin.csv").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        load_multiple_choice(tmp_path / "latin.csv")
    with pytest.raises(ValueError, match="no such file"):
        load_multiple_choice(tmp_path / "missing.csv")
    with pytest.raises(ValueError, match=re.escape("expected one of .csv, .parquet")):
        load_multiple_choice(tmp_path / "questions.txt")


def test_the_shipped_questions() -> None:
    questions = load_multiple_choice()
    assert len(questions) == 60
    assert Counter(question.answer for question in questions) == {0: 15, 1: 15, 2: 15, 3: 15}
    assert len({question.text.lower() for question in questions}) == 60
    assert all(len({choice.lower() for choice in question.choices}) == 4 for question in questions)


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(make_tiny_model: Callable[..., HookedTransformer]) -> HookedTransformer:
    """A context for whole questions, and no bias on the logits: with this seed it says each of the four letters."""
    tiny = make_tiny_model(seed=1, n_layers=3, n_ctx=512)
    tiny.unembed.b_U.data.zero_()
    return tiny


def plain_log_probs(model: HookedTransformer, question: Question, template: str) -> torch.Tensor:
    """One question alone, by TransformerLens' own forward; letters looked up by their text."""
    shape = resolve_template(model.tokenizer, template)
    ids, _ = encode_text(model.tokenizer, shape.render(multiple_choice_prompt(question)))
    with torch.no_grad():
        logits = model(torch.tensor([ids]), prepend_bos=False)[0, -1].double()
    letters = [model.tokenizer.convert_tokens_to_ids(letter) for letter in "ABCD"]
    return logits.log_softmax(dim=0)[letters]


def test_the_prompt_is_mmlus() -> None:
    assert multiple_choice_prompt(CAPITAL) == (
        "What is the capital of France?\nA. Rome\nB. Paris\nC. Oslo\nD. Bern\nAnswer:"
    )


@pytest.mark.parametrize("template", ["own", *PLAIN_TEMPLATES])
def test_accuracy_is_that_of_a_plain_forward(model: HookedTransformer, template: str) -> None:
    questions = load_multiple_choice()[:24]
    expected = torch.stack([plain_log_probs(model, question, template) for question in questions])
    torch.testing.assert_close(letter_log_probs(model, questions, template), expected, atol=1e-4, rtol=0)
    right = sum(int(row.argmax()) == q.answer for row, q in zip(expected, questions, strict=True))
    assert multiple_choice_accuracy(model, questions, template) == Rate(right, 24)


def test_the_shipped_questions_where_they_can_be_asked(model: HookedTransformer, tiny_model: HookedTransformer) -> None:
    """The tiny model's context is too short for the longest of them."""
    assert shipped_multiple_choice(model) == multiple_choice_accuracy(model, load_multiple_choice())
    assert shipped_multiple_choice(tiny_model) is None


def test_accuracy_follows_the_answers(model: HookedTransformer) -> None:
    """With what the model says as the key all are right; with the key permuted none is."""
    questions = load_multiple_choice()[:24]
    said = letter_log_probs(model, questions).argmax(dim=1).tolist()
    assert len(set(said)) == 4, "a model that always says the same letter would hide mixed-up rows"
    agreeing = [replace(q, answer=letter) for q, letter in zip(questions, said, strict=True)]
    permuted = [replace(q, answer=(letter + 1) % 4) for q, letter in zip(questions, said, strict=True)]
    assert multiple_choice_accuracy(model, agreeing) == Rate(24, 24)
    assert multiple_choice_accuracy(model, permuted) == Rate(0, 24)


def test_batches_and_order_change_nothing(model: HookedTransformer) -> None:
    questions = load_multiple_choice()[:12]
    whole = letter_log_probs(model, questions)
    torch.testing.assert_close(letter_log_probs(model, questions, batch_tokens=1), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(letter_log_probs(model, questions[::-1]).flip(0), whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(letter_log_probs(model, questions[:1]), whole[:1], atol=1e-4, rtol=0)


# --- letters ----------------------------------------------------------------------------------------------------------


def test_letters_without_a_space(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.convert_ids_to_tokens(letter_tokens(tokenizer).tolist()) == ["A", "B", "C", "D"]


def test_letters_with_a_space_where_the_template_wants_one(
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make_tokenizer()
    assert SPACED.in_place("A") == " A"
    assert len(tokenizer(" A", add_special_tokens=False).input_ids) == 2
    with pytest.raises(ValueError, match="the answer ' A' is not one token of its own"):
        letter_tokens(tokenizer, SPACED)
    tokenizer.add_tokens([" A", " B", " C", " D"])
    assert tokenizer.convert_ids_to_tokens(letter_tokens(tokenizer, SPACED).tolist()) == [" A", " B", " C", " D"]
    # In a template that ends in a line break the same tokenizer still answers by the bare letters.
    assert tokenizer.convert_ids_to_tokens(letter_tokens(tokenizer).tolist()) == ["A", "B", "C", "D"]


def test_letters_that_are_all_unknown_are_refused(make_tokenizer: Callable[[], PreTrainedTokenizerFast]) -> None:
    core = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    unknowing = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(ValueError, match="not four different tokens"):
        letter_tokens(unknowing, "alpaca")
    assert len(set(letter_tokens(make_tokenizer(), "alpaca").tolist())) == 4


def test_accuracy_errors(
    model: HookedTransformer, tiny_model: HookedTransformer, make_tiny_model: Callable[..., HookedTransformer]
) -> None:
    with pytest.raises(ValueError, match="no questions"):
        multiple_choice_accuracy(model, [])
    with pytest.raises(ValueError, match="the context holds 128"):
        multiple_choice_accuracy(tiny_model, [replace(CAPITAL, text="Why is that so? " * 40)])
    with pytest.raises(ValueError, match="template 'unheard'"):
        multiple_choice_accuracy(model, [CAPITAL], "unheard")
    broken = make_tiny_model(n_layers=1, n_ctx=512)
    broken.unembed.W_U.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        multiple_choice_accuracy(broken, [CAPITAL])
