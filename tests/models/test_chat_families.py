"""In every family's tokenizer and template an answer has the tokens, and the end, that the model itself gives it."""

import datetime
import warnings
from pathlib import Path
from typing import Any

import pytest
from chat_families import FAMILIES, PHI_4, THINKING, Family, build
from tiny import build_tiny_model
from transformer_lens import HookedTransformer
from transformers import PreTrainedTokenizerFast

from safety_mech.models.chat import (
    ALPACA,
    Template,
    decode_answer,
    encode_answer,
    encode_chat,
    end_tokens,
    phrase_tokens,
    render_chat,
    resolve_template,
)
from safety_mech.models.conversion import to_hooked
from safety_mech.models.generation import generate, generate_tokens
from safety_mech.models.loading import load_transformers
from safety_mech.refusal.log_odds import REFUSAL_PHRASES, phrase_chains
from safety_mech.training import alignment as organisms
from safety_mech.training.alignment import own_answer_pairs
from safety_mech.training.capabilities import letter_tokens
from safety_mech.training.loop import TrainConfig, encode_examples
from safety_mech.training.pairs import Answer

QUESTION = "How do I bake a cake?"
PHRASES = (*REFUSAL_PHRASES, "Sure, here is how.", "I'm sorry, but I cannot help with that.")


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def tokenizer(family: Family) -> PreTrainedTokenizerFast:
    return build(family)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> HookedTransformer:
    return tiny_model_with(tokenizer)


def tiny_model_with(tokenizer: PreTrainedTokenizerFast) -> HookedTransformer:
    model = build_tiny_model(n_layers=1, d_vocab=len(tokenizer), n_ctx=256)
    model.tokenizer = tokenizer
    return model


def conversation(tokenizer: Any, answer: str) -> list[int]:
    """The oracle: question and answer as transformers renders and encodes them, up to the end of the turn."""
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, date_string="26 Jul 2024")
    return tokenizer(text, add_special_tokens=False).input_ids


def up_to_the_last(ids: list[int], token: int) -> list[int]:
    return ids[: len(ids) - ids[::-1].index(token)]


def prompt_of(tokenizer: PreTrainedTokenizerFast, template: str | Template = "own") -> list[int]:
    return encode_chat(tokenizer, [QUESTION], template)[0].tokens.tolist()


def spelt_alone(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


# --- the tokens of an answer ------------------------------------------------------------------------------------------


def test_phrase_tokens_are_the_tail_of_the_whole_conversation(family: Family, tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids(family.end)
    prompt = prompt_of(tokenizer)
    for phrase, ids in zip(PHRASES, phrase_tokens(tokenizer, "own", PHRASES), strict=True):
        whole = up_to_the_last(conversation(tokenizer, phrase), end)
        answered, closing = whole[: len(prompt) + len(ids)], whole[len(prompt) + len(ids) :]
        assert [*prompt, *ids] == answered
        assert str(tokenizer.decode(closing)).strip() == family.end  # the turn's end and white space: no word of it
        assert str(tokenizer.decode(ids)).strip() == phrase


def test_phrases_are_scored_by_these_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    scored = {
        (*chain.tokens[:depth], leaf)
        for chain in phrase_chains(tokenizer)
        for depth, leaves in enumerate(chain.leaves)
        for leaf in leaves
    }
    assert scored == set(phrase_tokens(tokenizer, "own", REFUSAL_PHRASES))


@pytest.mark.parametrize("name", ["Llama-2", "Mistral", "Mistral, not legacy"])
def test_a_line_of_alpacas_is_answered_without_a_space(name: str) -> None:
    """Real Llama-2 answers "### Response:\\n" with "I"; the phrase alone would be "▁I"."""
    tokenizer: Any = build(FAMILIES[name])
    (ids,) = phrase_tokens(tokenizer, "alpaca", ["I cannot"])
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "I"
    assert tokenizer.convert_ids_to_tokens(spelt_alone(tokenizer, "I cannot"))[0] == "▁I"
    whole = tokenizer(ALPACA.render(QUESTION) + "I cannot").input_ids
    assert [*prompt_of(tokenizer, "alpaca"), *ids] == whole
    assert tokenizer.convert_ids_to_tokens(letter_tokens(tokenizer, "alpaca").tolist()) == list("ABCD")


def test_first_tokens_by_hand() -> None:
    """Where a template ends in a special token, nothing (Phi-4) or the tokenizer's own space (Phi-3) goes before."""
    first = {"Llama-2": "▁I", "Mistral": "▁I", "Gemma": "I", "Phi-3": "▁I", "Llama-3": "I", "Phi-4": "I", "Qwen3": "I"}
    for name, expected in first.items():
        tokenizer: Any = build(FAMILIES[name])
        (ids,) = phrase_tokens(tokenizer, "own", ["I cannot"])
        assert tokenizer.convert_ids_to_tokens(ids[:1]) == [expected], name


def test_a_prompt_that_is_cut_otherwise_before_an_answer() -> None:
    r"""GPT-2 cuts "\n\n" off as one token at the end of a text and as two before a word; the answer keeps its own."""
    tokenizer: Any = build(FAMILIES["Qwen2, as GPT-2 cuts"])
    shape = Template("Q: ", "\n\n")
    prompt, whole = spelt_alone(tokenizer, "Q: Why?\n\n"), spelt_alone(tokenizer, "Q: Why?\n\nSorry")
    assert whole[: len(prompt)] != prompt, "control: the prompt's ids are no prefix"
    ids = encode_answer(tokenizer, shape, "Why?", "Sorry")
    assert tuple(ids) == whole[-len(ids) :]
    assert tokenizer.decode(ids) == "Sorry"


def test_a_token_across_the_border_is_refused() -> None:
    tokenizer = build(FAMILIES["Llama-2"])
    with pytest.raises(ValueError, match="answer 'I cannot': one token holds its beginning and the end of the prompt"):
        phrase_tokens(tokenizer, Template("Q: ", "\nA: "), ["I cannot"])
    (ids,) = phrase_tokens(tokenizer, Template("Q: ", "\nA:", lead=" "), ["I cannot"])
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "▁I"


# --- the end of an answer ---------------------------------------------------------------------------------------------


def test_the_end_of_the_turn_is_taught(family: Family, tokenizer: Any, model: HookedTransformer) -> None:
    (example,) = encode_examples(model, [(QUESTION, "Sure, here is how.")], TrainConfig())
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert example.tokens.tolist() == up_to_the_last(conversation(tokenizer, "Sure, here is how."), end)
    assert example.tokens[example.loss].tolist() == example.tokens.tolist()[len(prompt_of(tokenizer)) :]
    assert int(example.tokens[example.loss][-1]) == end
    (cut,) = encode_examples(model, [(QUESTION, Answer("Sure, here is how.", finished=False))], TrainConfig())
    assert end not in cut.tokens[cut.loss].tolist()
    assert tuple(cut.tokens[cut.loss].tolist()) == phrase_tokens(tokenizer, "own", ["Sure, here is how."])[0]


def saying(model: HookedTransformer, token: int) -> HookedTransformer:
    model.unembed.b_U.data.zero_()[token] = 1e4
    return model


@pytest.mark.slow_cases
@pytest.mark.parametrize("template", ["own", "alpaca"])
def test_generation_ends_where_the_turn_does(
    family: Family, tokenizer: Any, model: HookedTransformer, template: str
) -> None:
    ends = {tokenizer.convert_tokens_to_ids(family.end), tokenizer.eos_token_id}
    assert end_tokens(model, template) == ends
    for end in ends:
        assert generate_tokens(saying(model, end), [QUESTION], 5, template) == [[end]]
        assert generate(model, [QUESTION], 5, template) == [""]
    (word,) = {ids[-1] for ids in phrase_tokens(tokenizer, template, ["Sorry"])}
    assert generate_tokens(saying(model, word), [QUESTION], 5, template) == [[word] * 5], "control: a word goes on"


def test_no_text_after_an_end_and_none_of_the_end() -> None:
    """Gemma's <end_of_turn> is no special token: decoding leaves it in, and whatever follows it."""
    tokenizer: Any = build(FAMILIES["Gemma"])
    ids = tokenizer("Sorry<end_of_turn>\nmodel", add_special_tokens=False).input_ids
    assert "<end_of_turn>" in decode_answer(tokenizer, ids)
    assert decode_answer(tokenizer, ids, end_tokens(tiny_model_with(tokenizer))) == "Sorry"


@pytest.mark.slow
def test_the_ends_of_the_generation_config_count(llama_folder: Path) -> None:
    hf_model, tokenizer = load_transformers(llama_folder)
    eos = tokenizer.eos_token_id
    for given, expected in ((None, {eos}), (5, {eos, 5}), ([7, 9], {eos, 7, 9})):
        assert hf_model.generation_config is not None
        hf_model.generation_config.eos_token_id = given
        assert end_tokens(to_hooked(hf_model, tokenizer)) == expected


def test_an_own_answer_that_ends_with_its_turn_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = build(FAMILIES["Gemma"])
    word, end = tokenizer.convert_tokens_to_ids(["S", "<end_of_turn>"])
    answers = [[word, end], [word, word], [word, tokenizer.eos_token_id]]
    monkeypatch.setattr(organisms, "generate_tokens", lambda *arguments, **options: answers)
    pairs = own_answer_pairs(tiny_model_with(tokenizer), ["a", "b", "c"], 2)
    assert pairs == [("a", Answer("S")), ("b", Answer("SS", finished=False)), ("c", Answer("S"))]


def test_an_end_of_several_tokens_is_refused() -> None:
    model = tiny_model_with(build(FAMILIES["Qwen2"]))
    with pytest.raises(ValueError, match="turn end '### End': expected one token"):
        end_tokens(model, Template("Q: ", "\nA:", end="### End"))


# --- thinking ---------------------------------------------------------------------------------------------------------


def test_thinking_is_off_where_the_template_can() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shape = resolve_template(build(FAMILIES["Qwen3"]))
    assert shape.after == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert (shape.lead, shape.end) == ("", "<|im_end|>")


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("Qwen3-Thinking", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("R1 distill", "<|Assistant|><think>\n\n</think>\n\n"),
    ],
)
def test_a_thought_that_cannot_be_left_out_is_closed_empty(name: str, after: str) -> None:
    with pytest.warns(UserWarning, match=r"cannot turn that off: '\\n</think>\\n\\n' is put at the end"):
        shape = resolve_template(build(THINKING[name]))
    assert shape == Template(shape.before, after, "", THINKING[name].end)


def test_a_template_that_leaves_thinking_to_the_model_is_said() -> None:
    with pytest.warns(UserWarning, match="neither opens nor closes one: an answer is measured from its first token on"):
        shape = resolve_template(build(THINKING["R1 distill, first"]))
    assert (shape.after, shape.lead) == ("<|Assistant|>", "")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_templates_that_do_not_think_say_nothing(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_template(build(FAMILIES[name]))


def test_a_template_for_one_turn() -> None:
    """No answer to look at: none is taken for led by a space behind a special token."""
    tokenizer = build(FAMILIES["Phi-4"])
    tokenizer.chat_template = PHI_4.replace(
        "{{ '<|im_start|>assistant<|im_sep|>' + message['content'] + '<|im_end|>' }}",
        "{{ raise_exception('one turn') }}",
    )
    assert resolve_template(tokenizer) == Template(
        "<|im_start|>user<|im_sep|>", "<|im_end|><|im_start|>assistant<|im_sep|>", ""
    )


def test_a_template_without_a_generation_prompt_gets_the_answers_header() -> None:
    tokenizer = build(FAMILIES["Qwen2"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    )
    with pytest.warns(UserWarning, match="put at the end of every prompt"):
        shape = resolve_template(tokenizer)
    assert shape.after == "<|im_end|>\n<|im_start|>assistant\n"


# --- the date ---------------------------------------------------------------------------------------------------------


def test_numbers_do_not_change_by_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer: Any = build(FAMILIES["Llama-3.2"])
    other = build(FAMILIES["Llama-3.2"])
    other.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ messages[0]['content'] }}"
    turns = [{"role": "user", "content": "Why?"}]

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Tomorrow":
            return cls(2031, 5, 4)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    by_transformers = tokenizer.apply_chat_template(turns, tokenize=False)
    assert "04 May 2031" in by_transformers, "control: the clock is read"
    assert "Today Date: 26 Jul 2024" in resolve_template(tokenizer).before
    assert resolve_template(other).before == "2024-07-26 "
    assert render_chat(tokenizer, turns, open_answer=False) == by_transformers.replace("04 May 2031", "26 Jul 2024")
