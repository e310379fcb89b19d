"""Templates, tokens and batches: one last token for all prompts, the question found exactly, BOS once, no padding."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from safety_mech.models.chat import (
    ALPACA,
    ALPACA_SHORT,
    DEFAULT_BATCH_TOKENS,
    PLAIN_TEMPLATES,
    ChatTokens,
    Template,
    check_context,
    encode_chat,
    encode_text,
    equal_length_batches,
    resolve_template,
    shared_prefix_length,
)

MakeTokenizer = Callable[[], PreTrainedTokenizerFast]

QUESTIONS = [
    "How do I kill time?",
    "Name a fruit",
    "End with a full stop.",
    "two\nlines\n\nand a gap",
    "tabs\tand  two  spaces",
    "Grüße, naïve café",
    "Что такое хлеб?",
    "天気はどうですか",
    "An emoji 🍞 inside, and at the end 🧑‍🍳",
    "🍞",
    "x",
    "### Response:",
    "<s> is no special token here",
    "QUESTIONGOESHERE",
]
TEMPLATES = ["own", "alpaca", "alpaca_short", Template("User:\n", "\nModel:")]
"""Every way to say which template."""


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """ChatML template; adds no BOS of its own, like SmolLM2's."""
    return make_tokenizer()


@pytest.fixture
def bos_tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    """Puts a BOS first by itself, and its chat template writes the BOS out as well, like Llama's."""
    tokenizer = make_tokenizer()
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]\n{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert tokenizer("").input_ids == [tokenizer.bos_token_id]
    return tokenizer


def decode(tokenizer: PreTrainedTokenizerFast, tokens: torch.Tensor) -> str:
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def chats_of(rows: list[list[int]]) -> list[ChatTokens]:
    return [ChatTokens(torch.tensor(row), range(0, len(row))) for row in rows]


# --- templates --------------------------------------------------------------------------------------------------------


def test_the_models_own_template_is_cut_around_the_question(tokenizer: PreTrainedTokenizerFast) -> None:
    own = resolve_template(tokenizer)
    assert own == resolve_template(tokenizer, "own")
    assert own.after == "<|im_end|>\n<|im_start|>assistant\n"
    assert own.before == "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"


@pytest.mark.parametrize("question", [question for question in QUESTIONS if question != "QUESTIONGOESHERE"])
def test_the_own_template_gives_what_the_tokenizer_would(tokenizer: PreTrainedTokenizerFast, question: str) -> None:
    message = [{"role": "user", "content": question}]
    expected = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert encode_chat(tokenizer, [question])[0].tokens.tolist() == expected


@pytest.mark.parametrize(("name", "expected"), PLAIN_TEMPLATES.items())
def test_plain_templates_hold_the_fields_marks(
    tokenizer: PreTrainedTokenizerFast, name: str, expected: Template
) -> None:
    assert resolve_template(tokenizer, name) == expected
    assert expected.before.endswith("### Instruction:\n")
    assert expected.after == "\n\n### Response:\n"


def test_the_short_template_lacks_the_task_description_only() -> None:
    assert ALPACA.before.endswith("\n\n" + ALPACA_SHORT.before)
    assert ALPACA_SHORT.render("Hello") == "### Instruction:\nHello\n\n### Response:\n"


def test_a_template_object_is_used_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    mine = Template("Q: ", "\nA:")
    assert resolve_template(tokenizer, mine) is mine
    assert decode(tokenizer, encode_chat(tokenizer, ["Why?"], mine)[0].tokens) == "Q: Why?\nA:"


@pytest.mark.parametrize("name", ["chatml", "", "Alpaca"])
def test_an_unknown_template_lists_the_known_ones(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    with pytest.raises(ValueError, match=f"template '{name}': expected one of own, alpaca, alpaca_short"):
        encode_chat(tokenizer, ["Hello"], name)


def test_a_tokenizer_without_chat_template_says_what_to_use(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; use 'alpaca'"):
        encode_chat(tokenizer, ["Hello"])
    assert len(encode_chat(tokenizer, ["Hello"], "alpaca")) == 1


@pytest.mark.parametrize(
    "chat_template",
    ["{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "nothing", "{{ messages[0]['content'] | lower }}"],
)
def test_a_chat_template_that_does_not_hold_the_question_once_is_refused(
    make_tokenizer: MakeTokenizer, chat_template: str
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match="exactly once"):
        encode_chat(tokenizer, ["Hello"])


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_last_token_is_the_same_for_all_prompts(
    tokenizer: PreTrainedTokenizerFast, template: str | Template
) -> None:
    chats = encode_chat(tokenizer, QUESTIONS, template)
    assert len({int(chat.tokens[-1]) for chat in chats}) == 1
    assert len({int(chat.tokens[chat.question[-1]]) for chat in chats}) > 1, "control: the question's last token is not"


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_question_range_decodes_to_the_question(
    tokenizer: PreTrainedTokenizerFast, template: str | Template
) -> None:
    shape = resolve_template(tokenizer, template)
    for question, chat in zip(QUESTIONS, encode_chat(tokenizer, QUESTIONS, template), strict=True):
        inside = chat.question
        parts = (chat.tokens[: inside.start], chat.tokens[list(inside)], chat.tokens[inside.stop :])
        assert tuple(decode(tokenizer, part) for part in parts) == (shape.before, question, shape.after)
        assert len(chat) == len(chat.tokens)


def test_a_token_that_joins_template_and_question_is_the_questions(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = encode_chat(tokenizer, ["France"], Template("A b", " c"))[0]
    assert decode(tokenizer, chat.tokens[list(chat.question)]) == "France"
    joined = encode_chat(tokenizer, ["is the capital"], Template("What ", " c"))[0]
    assert decode(tokenizer, joined.tokens[list(joined.question)]) == " is the capital"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("padded", ["  Why not?", "Why not?  ", "\n\t Why not?\n\n"])
def test_white_space_around_a_prompt_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, template: str | Template, padded: str
) -> None:
    stripped, given = encode_chat(tokenizer, ["Why not?", padded], template)
    assert torch.equal(stripped.tokens, given.tokens)
    assert stripped.question == given.question


@pytest.mark.slow
@given(st.text(min_size=1, max_size=40).filter(str.strip))
def test_the_question_is_found_in_any_text(tokenizer: PreTrainedTokenizerFast, question: str) -> None:
    question = question.encode("utf-8", "ignore").decode().strip() or "x"
    chat = encode_chat(tokenizer, [question])[0]
    assert decode(tokenizer, chat.tokens[list(chat.question)]) == question


def test_a_prompt_is_encoded_alike_alone_and_among_others(tokenizer: PreTrainedTokenizerFast) -> None:
    together = encode_chat(tokenizer, QUESTIONS)
    for question, chat in zip(QUESTIONS, together, strict=True):
        alone = encode_chat(tokenizer, [question])[0]
        assert torch.equal(alone.tokens, chat.tokens)
        assert alone.question == chat.question


# --- BOS --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_tokenizer_that_adds_bos_gives_exactly_one(
    bos_tokenizer: PreTrainedTokenizerFast, template: str | Template
) -> None:
    """Own template: the BOS is in its text, and not put a second time. Alpaca: it is put before the text."""
    chats = encode_chat(bos_tokenizer, QUESTIONS, template)
    shape = resolve_template(bos_tokenizer, template)
    for question, chat in zip(QUESTIONS, chats, strict=True):
        assert chat.tokens[0] == bos_tokenizer.bos_token_id
        assert chat.tokens.tolist().count(bos_tokenizer.bos_token_id) == 1
        assert decode(bos_tokenizer, chat.tokens[list(chat.question)]) == question
        assert decode(bos_tokenizer, chat.tokens[chat.question.stop :]) == shape.after


def test_a_tokenizer_that_adds_no_bos_gets_none(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.bos_token_id is not None
    chat = encode_chat(tokenizer, ["Hello"], "alpaca")[0]
    assert tokenizer.bos_token_id not in chat.tokens.tolist()
    assert decode(tokenizer, chat.tokens) == ALPACA.render("Hello")


def test_a_tokenizer_without_bos_token(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    assert decode(tokenizer, encode_chat(tokenizer, ["Hello"], "alpaca")[0].tokens) == ALPACA.render("Hello")


def test_offsets_go_with_the_text(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, offsets = encode_text(bos_tokenizer, "Why?")
    assert len(ids) == len(offsets)
    assert offsets[0] == (0, 0), "the BOS stands for no character"
    assert (offsets[1][0], offsets[-1][1]) == (0, 4)


# --- bad prompts ------------------------------------------------------------------------------------------------------


def test_no_prompts_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no prompts were given"):
        encode_chat(tokenizer, [])


@pytest.mark.parametrize("empty", ["", " ", "\n\t "])
def test_an_empty_prompt_is_numbered(tokenizer: PreTrainedTokenizerFast, empty: str) -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        encode_chat(tokenizer, ["Hello", empty])


@pytest.mark.parametrize("special", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_special_token_in_a_prompt_is_refused(tokenizer: PreTrainedTokenizerFast, special: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared whole)
        encode_chat(tokenizer, ["Hello", f"Ignore that.{special}\nBye"])
    assert str(caught.value) == f"prompt 1 holds the special token {special!r}: take it out"
    assert encode_chat(tokenizer, [special.replace("|", "")])


def test_a_special_token_without_a_role_is_refused(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<|eot_id|>", special=True)])
    assert len(tokenizer("<|eot_id|>").input_ids) == 1
    with pytest.raises(ValueError, match="prompt 0 holds the special token"):
        encode_chat(tokenizer, ["Hello<|eot_id|>"])


# --- context, phrases, batches ---------------------------------------------------------------------------------------


def test_check_context_counts_the_new_tokens() -> None:
    chats = chats_of([[1, 2, 3], [1, 2, 3, 4, 5]])
    check_context(chats, 5)
    check_context(chats, 7, new_tokens=2)
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens: the context holds 4; shorten it"):
        check_context(chats, 4)
    with pytest.raises(ValueError, match="prompt 1 has 5 tokens and 2 to generate: the context holds 6"):
        check_context(chats, 6, new_tokens=2)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),
        ([[1, 2], [1, 2, 3, 4]], 1),
        ([[1, 2, 3, 4], [1, 2], [1, 2, 3]], 1),
        ([[1, 2, 3, 9], [1, 2, 5, 9], [1, 7, 3, 9]], 1),
        ([[1, 2], [3, 2]], 0),
        ([[1], [1, 2, 3]], 0),
    ],
)
def test_shared_prefix_by_hand(rows: list[list[int]], expected: int) -> None:
    """At least one token of each prompt stays, also where one prompt is the beginning of another."""
    assert shared_prefix_length(chats_of(rows)) == expected


@pytest.mark.slow
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=2, max_size=5))
def test_shared_prefix_is_the_longest_there_is(rows: list[list[int]]) -> None:
    shared = shared_prefix_length(chats_of(rows))
    assert len({tuple(row[:shared]) for row in rows}) == 1
    assert all(len(row) > shared for row in rows)
    more_would_do = len({tuple(row[: shared + 1]) for row in rows}) == 1 and all(len(row) > shared + 1 for row in rows)
    assert not more_would_do


def test_the_shared_prefix_holds_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = encode_chat(tokenizer, QUESTIONS)
    shared = shared_prefix_length(chats)
    assert decode(tokenizer, chats[0].tokens[:shared]) == resolve_template(tokenizer).before
    assert shared <= min(chat.question.start for chat in chats)


@pytest.mark.slow
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60))
def test_batches_hold_every_prompt_once_in_equal_lengths(lengths: list[int], batch_tokens: int) -> None:
    batches = list(equal_length_batches(lengths, batch_tokens))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len({lengths[index] for index in batch}) == 1
        assert len(batch) == 1 or len(batch) * lengths[batch[0]] <= batch_tokens
    firsts = [lengths[batch[0]] for batch in batches]
    assert firsts == sorted(firsts, reverse=True), "the longest first: what will not fit in memory fails at once"


@pytest.mark.slow
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 60))
def test_batches_are_as_few_as_can_be(lengths: list[int], batch_tokens: int) -> None:
    rooms = {length: max(1, batch_tokens // length) for length in set(lengths)}
    fewest = sum(-(-lengths.count(length) // room) for length, room in rooms.items())
    assert len(list(equal_length_batches(lengths, batch_tokens))) == fewest


def test_batches_by_hand() -> None:
    assert list(equal_length_batches([3, 5, 3, 3, 9], batch_tokens=6)) == [[4], [1], [0, 2], [3]]
    assert list(equal_length_batches([2] * 3)) == [[0, 1, 2]]
    assert [len(batch) for batch in equal_length_batches([1] * (DEFAULT_BATCH_TOKENS + 1))] == [DEFAULT_BATCH_TOKENS, 1]
    assert list(equal_length_batches([])) == []
