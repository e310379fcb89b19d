"""Words from tokens, their kinds, and the shares of attention, by hand."""

import pytest
import torch

from safety_mech import QuestionAttention, by_word, question_attention, word_shares
from safety_mech.attention.word_classes import FUNCTION_WORDS, KINDS, is_function_word, split_words

PROMPT = "How do I trick my neighbour's cat?"
PIECES = ["How", " do", " I", " tri", "ck", " my", " neighbour", "'s", " cat", "?"]
KIND_OF = ["function"] * 3 + ["content"] * 2 + ["function"] + ["content"] * 3 + ["punctuation"]


def spans_of(pieces: list[str], trimmed: bool) -> list[tuple[int, int]]:
    """Characters that the pieces cover; tokenizers differ in whether a leading space is one of them."""
    spans, at = [], 0
    for piece in pieces:
        lead = len(piece) - len(piece.lstrip()) if trimmed else 0
        spans.append((at + lead, at + len(piece)))
        at += len(piece)
    return spans


def attention_of(weights: list[list[float]]) -> QuestionAttention:
    return QuestionAttention(PROMPT, tuple(PIECES), tuple(spans_of(PIECES, True)), torch.tensor(weights))


@pytest.mark.parametrize("trimmed", [True, False])
def test_words_are_rebuilt_from_their_tokens(trimmed):
    words = split_words(PROMPT, spans_of(PIECES, trimmed))
    assert [word.text for word in words] == ["How", "do", "I", "trick", "my", "neighbour's", "cat", "?"]
    assert [word.tokens for word in words] == [(0,), (1,), (2,), (3, 4), (5,), (6, 7), (8,), (9,)]
    by_token = [word.kind for word in words for _ in word.tokens]
    assert by_token == KIND_OF


def test_every_token_is_in_just_one_word_whatever_the_tokenizer(tiny_model):
    prompts = [
        PROMPT,
        "  Say: \u201cdon't\u201d, at 3.50 \u20ac!\n\nbrother-in-law...",
        "?!",
        "caf\u00e9 \u2014 na\u00efve",
        "I",
    ]
    for attention in question_attention(tiny_model, prompts):
        words = split_words(attention.prompt, attention.spans)
        assert [token for word in words for token in word.tokens] == list(range(len(attention.tokens)))


def test_words_of_a_real_byte_level_tokenizer(tiny_model):
    (attention,) = question_attention(
        tiny_model, ["\u201cDon't\u201d hurt my brother-in-law's 3 na\u00efve cats, please."]
    )
    words = split_words(attention.prompt, attention.spans)
    kinds = {word.text: word.kind for word in words if word.kind != "punctuation"}
    assert list(kinds) == ["Don't", "hurt", "my", "brother-in-law's", "3", "na\u00efve", "cats", "please"]
    assert [text for text, kind in kinds.items() if kind == "function"] == ["Don't", "my"]
    marks = [word.text for word in words if word.kind == "punctuation"]
    assert [mark for mark in marks if mark.strip()][-2:] == [",", "."]


def test_a_token_over_two_words_belongs_to_the_one_it_covers_more_of():
    words = split_words("of murder", [(0, 6), (6, 9)])
    assert [(word.text, word.tokens) for word in words] == [("murder", (0, 1))]


def test_the_same_word_twice_is_two_words():
    assert [word.tokens for word in split_words("no no", [(0, 2), (3, 5)])] == [(0,), (1,)]


@pytest.mark.parametrize(
    "word", ["the", "The", "WHAT", "I'm", "don't", "can\u2019t", "won't", "Isn't", "who's", "they've", "it's", "cannot"]
)
def test_function_words(word):
    assert is_function_word(word)


@pytest.mark.parametrize(
    "word", ["neighbour's", "kill", "please", "3", "two", "make", "well-known", "android", "canter"]
)
def test_content_words(word):
    assert not is_function_word(word)


def test_the_list_is_lower_case_and_of_words_only():
    assert all(word == word.lower() and word.replace("'", "").isalpha() for word in FUNCTION_WORDS)
    assert 200 < len(FUNCTION_WORDS) < 300


def test_shares_by_hand():
    row = [4.0, 1, 1, 2, 2, 0, 1, 1, 3, 5]  # function 6, content 9, punctuation 5 of 20
    shares = word_shares([attention_of([[value / 40 for value in row], [0.0] * 9 + [0.5]])])
    assert KINDS == ("function", "content", "punctuation")
    torch.testing.assert_close(shares.shares, torch.tensor([[[0.3, 0.45, 0.25], [0, 0, 1]]]).double())
    torch.testing.assert_close(shares.uniform, torch.tensor([[0.4, 0.5, 0.1]]).double())
    torch.testing.assert_close(shares.first, torch.tensor([[0.2, 0]]).double())
    torch.testing.assert_close(shares.first_uniform, torch.tensor([0.1]).double())
    torch.testing.assert_close(shares.question, torch.tensor([[0.5, 0.5]]).double())
    torch.testing.assert_close(shares.of_words()[0, 0], torch.tensor(9 / 15).double())


def test_shares_without_the_first_token_by_hand():
    row = [4.0, 1, 1, 2, 2, 0, 1, 1, 3, 5]
    shares = word_shares([attention_of([row])], skip_first=True)
    torch.testing.assert_close(shares.shares, torch.tensor([[[2, 9, 5]]]).double() / 16)
    torch.testing.assert_close(shares.uniform, torch.tensor([[3, 5, 1]]).double() / 9)
    torch.testing.assert_close(shares.first, torch.tensor([[0.2]]).double())


def test_shares_without_some_words_by_hand():
    row = [4.0, 1, 1, 2, 2, 0, 1, 1, 3, 5]
    shares = word_shares([attention_of([row])], skip_words={"how", "trick", "?"})
    torch.testing.assert_close(shares.shares, torch.tensor([[[2, 5, 0]]]).double() / 7)
    torch.testing.assert_close(shares.uniform, torch.tensor([[3, 3, 0]]).double() / 6)


def test_equal_attention_gives_the_uniform_share():
    shares = word_shares([attention_of([[0.03] * 10] * 2)])
    torch.testing.assert_close(shares.shares, shares.uniform[:, None].expand(-1, 2, -1))


def test_a_words_attention_is_the_sum_of_its_tokens():
    merged = by_word(attention_of([[4.0, 1, 1, 2, 2, 0, 1, 1, 3, 5]]))
    assert merged.tokens == ("How", "do", "I", "trick", "my", "neighbour's", "cat", "?")
    assert merged.weights.tolist() == [[4, 1, 1, 4, 0, 2, 3, 5]]
    assert [PROMPT[slice(*span)] for span in merged.spans] == list(merged.tokens)


def test_nothing_to_share_out_is_reported():
    with pytest.raises(ValueError, match="no prompts were given"):
        word_shares([])
    with pytest.raises(ValueError, match=r"prompt 1, .How do I trick"):
        word_shares([attention_of([[1.0] * 10]), attention_of([[0.0] * 10])])
    alone = QuestionAttention("Why", ("Why",), ((0, 3),), torch.ones(2, 1))
    assert word_shares([alone]).shares[0, 0].tolist() == [1, 0, 0]
    with pytest.raises(ValueError, match="no attention is left"):
        word_shares([alone], skip_first=True)
