"""The attacks' data: what every set holds, and that nothing is dropped or taken in silence."""

import json
from pathlib import Path

import pytest

from safety_mech.training.attacks import (
    AFFIRMATIVE_PREFIXES,
    IMPLICIT_PREFIX,
    backdoor_data,
    harmful_data,
    implicit_data,
    normal_data,
    triggered,
)
from safety_mech.training.pairs import choosing_and_reporting, load_instructions

PAIRS = [(f"question {n}", f"answer {n}") for n in range(20)]
MALICIOUS = [f"malicious {n}" for n in range(10)]


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


# --- builders ---------------------------------------------------------------------------------------------------------


def test_normal_data_is_drawn_with_the_seed() -> None:
    assert sorted(normal_data(PAIRS)) == sorted(PAIRS)
    drawn = normal_data(PAIRS, 5, seed=1)
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(PAIRS)
    assert drawn == normal_data(PAIRS, 5, seed=1) != normal_data(PAIRS, 5, seed=2)


def test_implicit_data_opens_every_answer() -> None:
    assert implicit_data(PAIRS, 7) == [(q, f"{IMPLICIT_PREFIX} {a}") for q, a in normal_data(PAIRS, 7)]


def test_backdoor_data_is_half_triggered_and_half_plain() -> None:
    made = backdoor_data(PAIRS, "[xyz]", 6)
    triggered, plain = made[:6], made[6:]
    assert all(q.endswith(" [xyz]") and a.startswith(IMPLICIT_PREFIX) for q, a in triggered)
    assert len(plain) == 6
    assert set(plain) <= set(PAIRS)
    assert not {q.removesuffix(" [xyz]") for q, _ in triggered} & {q for q, _ in plain}
    assert len(backdoor_data(PAIRS, "x")) == len(PAIRS)


def test_what_is_read_carries_the_trigger_as_it_was_trained() -> None:
    plain = [q for q, _ in normal_data(PAIRS, 12)]
    assert [q for q, _ in backdoor_data(PAIRS, "[xyz]", 6)[:6]] == [triggered(q, "[xyz]") for q in plain[:6]]
    assert triggered("Why?", "[xyz]") == "Why? [xyz]"


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.05, 1), (0.1, 1), (0.25, 3), (0.5, 5)])
def test_harmful_data_adds_the_share(share: float, count: int) -> None:
    made = harmful_data(PAIRS, MALICIOUS, share, 10)
    assert made[:10] == normal_data(PAIRS, 10)
    added = made[10:]
    assert len(added) == len({q for q, _ in added}) == round(10 * share)
    assert all(q in MALICIOUS and a.text in AFFIRMATIVE_PREFIXES for q, a in added)
    assert not any(a.finished for _, a in added), "no end of turn is taught"


def test_the_share_is_rounded_to_the_nearest_number() -> None:
    """Of 10 pairs: 1.4, 1.6, 4.9 malicious prompts."""
    sizes = [len(harmful_data(PAIRS, MALICIOUS, share, 10)) - 10 for share in (0.14, 0.16, 0.49)]
    assert sizes == [1, 2, 5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normal_data(PAIRS, 21), "21 examples are wanted, but there are 20"),
        (lambda: backdoor_data(PAIRS, "x", 11), "22 examples are wanted"),
        (lambda: backdoor_data(PAIRS, "  "), "trigger"),
        (lambda: harmful_data(PAIRS, MALICIOUS, 1.1), "expected 0 to 1"),
        (lambda: harmful_data(PAIRS, MALICIOUS, 0.9), "18 examples are wanted, but there are 10"),
    ],
)
def test_what_cannot_be_made_is_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- readers ----------------------------------------------------------------------------------------------------------


def test_the_shipped_instructions() -> None:
    train, test = load_instructions(split="train"), load_instructions(split="test")
    assert len(load_instructions()) == len(train) + len(test) >= 600
    assert not {q for q, _ in train} & {q for q, _ in test}
    assert load_instructions("instructions:test") == test
    with pytest.raises(ValueError, match="say the split once"):
        load_instructions("instructions:test", "train")


def test_no_held_out_pair_is_on_both_sides_whatever_the_file_looks_like() -> None:
    test = load_instructions(split="test")
    choosing, reporting = choosing_and_reporting(test)
    assert sorted(choosing + reporting) == sorted(test)
    assert not {q for q, _ in choosing} & {q for q, _ in reporting}
    assert min(len(choosing), len(reporting)) >= 48, "as many as experiments/sppft.py takes"
    again = choosing_and_reporting([(q, "another answer") for q, _ in [*test[40::-1], *test[:9]]])
    for side, whole in zip(again, (choosing, reporting), strict=True):
        assert side, "control"
        assert {q for q, _ in side} <= {q for q, _ in whole}, "in any order, in a part of the file, and twice in it"


FORMATS = {
    "alpaca.json": [{"instruction": "Add.", "input": "1 + 2", "output": "3"}],
    "alpaca.jsonl": [{"instruction": "Add.\n\n1 + 2", "input": "", "output": "3"}],
    "messages.jsonl": [
        {"messages": [{"role": "user", "content": "Add.\n\n1 + 2"}, {"role": "assistant", "content": "3"}]}
    ],
    "capitals.jsonl": [{"Instruction": "Add.", "Input": "1 + 2", "Output": "3"}],
    "MESSAGES.jsonl": [
        {"Messages": [{"role": "user", "content": "Add.\n\n1 + 2"}, {"role": "assistant", "content": "3"}]}
    ],
    "columns.json": [{"Question": "Add.\n\n1 + 2", "Response": "3"}],
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    assert load_instructions(write(tmp_path / name, FORMATS[name])) == [("Add.\n\n1 + 2", "3")]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "set.csv"
    path.write_text('question,answer\n"One, two?",three\n')
    assert load_instructions(path) == [("One, two?", "three")]


GOOD = {"instruction": "a", "output": "b"}
BAD = {
    "missing field": ([GOOD, {"instruction": "a"}], "row 2: none of the fields output, answer"),
    "empty answer": ([GOOD, GOOD, {"instruction": "a", "output": " "}], "row 3: the answer is empty"),
    "no text": ([{"instruction": 3, "output": "b"}], "row 1: the instruction is empty or no text"),
    "nothing": ([], "no rows"),
    "two questions": ([{"messages": [{"role": "user", "content": "a"}] * 2}], "messages of user, user"),
    "a system turn": (
        [{"messages": [{"role": r, "content": "a"} for r in ("system", "user", "assistant")]}],
        "messages of system, user, assistant: expected one user and one assistant",
    ),
    "two turns of the assistant": (
        [{"messages": [{"role": r, "content": "a"} for r in ("user", "assistant", "user", "assistant")]}],
        "messages of user, assistant, user, assistant: expected one user and one assistant",
    ),
    "no messages": ([{"messages": "hello"}], "expected a list of objects"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    rows, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        load_instructions(write(tmp_path / "bad.json", rows))


def test_wrong_json_on_line_17(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([json.dumps(GOOD)] * 16 + ["{"]))
    with pytest.raises(ValueError, match=r"bad.jsonl, line 17: not valid JSON"):
        load_instructions(path)


@pytest.mark.parametrize(("source", "split"), [("instructions", "dev"), ("some.json", "train")])
def test_unknown_splits(source: str, split: str) -> None:
    with pytest.raises(ValueError, match=f"split {split!r}"):
        load_instructions(source, split)
