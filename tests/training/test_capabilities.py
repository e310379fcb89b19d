"""ROUGE-L by hand, the shipped questions, and accuracy against a plain full forward."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

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
    rouge_l_scores,
    shipped_multiple_choice,
)

CAPITAL = Question("What is the capital of France?", ("Rome", "Paris", "Oslo", "Bern"), 1)
SPACED = Template("user: ", "\nassistant:")
"""Answered by " A", which the tests' tokenizer spells with two tokens."""


# --- ROUGE-L ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_rouge_l_by_hand() -> None:
    """LCS "the sat down" of 4 and 5 words: P 3/4, R 3/5, F1 2/3. LCS "two cats" of 2 and 5: P 1, R 2/5, F1 4/7."""
    answers = ["The cat sat down.", "two cats"]
    references = ["the old dog sat down", "a cat or two cats"]
    assert rouge_l_scores(answers, references).tolist() == pytest.approx([2 / 3, 4 / 7])


@pytest.mark.slow
def test_rouge_l_counts_the_order_of_words_and_stems_them() -> None:
    scores = rouge_l_scores(["a b", "b a", "cats", "", "!"], ["a b", "a b", "cat", "cat", "cat"])
    assert scores.tolist() == pytest.approx([1, 0.5, 1, 0, 0])
    assert rouge_l_scores(["running"], ["runs"]).item() == 1
    assert rouge_l_scores(["runner"], ["sits"]).item() == 0


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
        rouge_l_scores(answers, references)


# --- questions --------------------------------------------------------------------------------------------------------


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


@pytest.mark.slow
@pytest.mark.parametrize("template", ["own", *PLAIN_TEMPLATES])
def test_accuracy_is_that_of_a_plain_forward(model: HookedTransformer, template: str) -> None:
    questions = load_multiple_choice()[:24]
    expected = torch.stack([plain_log_probs(model, question, template) for question in questions])
    torch.testing.assert_close(letter_log_probs(model, questions, template), expected, atol=1e-4, rtol=0)
    right = sum(int(row.argmax()) == q.answer for row, q in zip(expected, questions, strict=True))
    assert multiple_choice_accuracy(model, questions, template) == Rate(right, 24)


@pytest.mark.slow
def test_the_shipped_questions_where_they_can_be_asked(model: HookedTransformer, tiny_model: HookedTransformer) -> None:
    """The tiny model's context is too short for the longest of them."""
    assert shipped_multiple_choice(model) == multiple_choice_accuracy(model, load_multiple_choice())
    assert shipped_multiple_choice(tiny_model) is None


@pytest.mark.slow
def test_accuracy_follows_the_answers(model: HookedTransformer) -> None:
    """With what the model says as the key all are right; with the key permuted none is."""
    questions = load_multiple_choice()[:24]
    said = letter_log_probs(model, questions).argmax(dim=1).tolist()
    assert len(set(said)) == 4, "a model that always says the same letter would hide mixed-up rows"
    agreeing = [replace(q, answer=letter) for q, letter in zip(questions, said, strict=True)]
    permuted = [replace(q, answer=(letter + 1) % 4) for q, letter in zip(questions, said, strict=True)]
    assert multiple_choice_accuracy(model, agreeing) == Rate(24, 24)
    assert multiple_choice_accuracy(model, permuted) == Rate(0, 24)


@pytest.mark.slow
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
