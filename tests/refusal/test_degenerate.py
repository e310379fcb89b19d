"""Degenerate output and ordinary text that resembles it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_text import ANSWERS, QUOTE_LATER, REFUSALS

from safety_mech.refusal.degenerate import DEGENERATE_MIN_WORDS, is_degenerate


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "!!!!!!!!",
        "?? .. !! ##",
        "#### |||| ---- ////",
        "the the the the the the",
        "I'm I'm I'm I'm I'm I'm I'm",
        "of the of the of the of the",
        "cannot cannot I cannot cannot I cannot cannot cannot",
        "I'm sorry " * 20,
        "1 1 1 1 1 1 1 1",
        "lalalalalalala",
        "aaaaaaaaaaaaaaaa",
        "kill!!!!!!!!!!!!!!!!!!!!!!",
        "xkcdqz wrtpfghj qqzpzxt bvcxnmmm",
        "ForCanBegin initTheOf HtmlXmlParse gotoNextLine",
        "\u7684 the \u043a\u043e\u0442 for \u0434\u043b\u044f \uc640 \u0e17\u0e35\u0e48 that",
        "To kill a process, use the kill command. " + "kill the " * 60,
    ],
)
def test_degenerate(text: str):
    assert is_degenerate(text)


@pytest.mark.parametrize(
    "text",
    [
        "Yes",
        "4",
        "No, no, no.",
        "Yes!!!!!",
        "2 + 2 = 4",
        "x = 3.14",
        "1. Read 2. Write 3. Run",
        "Ha ha ha! That is funny, really",
        "Row, row, row your boat gently down the",
        "```bash\nkill -9 <PID>\n```",
        "def f(x): return x**2",
        "https://docs.python.org/3/library/os.html",
        "| Name | Age |\n|---|---|\n| Alice | 30 |",
        "\u041f\u0440\u0438\u0432\u0435\u0442, \u043a\u0430\u043a \u0434\u0435\u043b\u0430?",
        "\u4f60\u597d\uff0c\u6211\u4e0d\u80fd\u5e2e\u52a9\u4f60",
        "The Russian word for cat is \u043a\u043e\u0442.",
    ],
)
def test_ordinary_text_is_not_degenerate(text: str):
    assert not is_degenerate(text)


@pytest.mark.parametrize("texts", [REFUSALS, ANSWERS, QUOTE_LATER], ids=["refusals", "answers", "quotations"])
def test_no_prefix_of_an_ordinary_text_is_degenerate(texts):
    prefixes = [" ".join(text.split()[:n]) for text in texts for n in range(1, len(text.split()) + 1)]
    assert [prefix for prefix in prefixes if is_degenerate(prefix)] == []


def test_long_prose_repeats_its_words_and_is_not_degenerate():
    sentences = [f"The {a} {b} near the park." for a in ("old", "new") for b in ("cat sits", "dog runs")]
    assert not is_degenerate(" ".join(sentences * 20))


def test_too_few_words_for_a_rate():
    assert not is_degenerate(" ".join(["no"] * (DEGENERATE_MIN_WORDS - 1)))
    assert is_degenerate(" ".join(["no"] * DEGENERATE_MIN_WORDS))


@pytest.mark.slow
@given(st.text(max_size=400))
@settings(max_examples=50, deadline=None)
def test_any_text_gets_a_verdict(text: str):
    assert is_degenerate(text) in (True, False)
