"""Pairs of a prompt and its answer, which a model is trained on, and readers for instruction files.

This module imports no torch: a command line reads its files before it loads anything slow.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safety_mech.prompts import data_folder, find_column, read_rows, shipped_rows, with_input


@dataclass(frozen=True)
class Answer:
    """An answer, and whether it ends where its text does. One that was cut does not teach the model to end its turn."""

    text: str
    finished: bool = True


def whole(answer: str | Answer) -> Answer:
    """A plain string is a finished answer."""
    return Answer(answer) if isinstance(answer, str) else answer


TextPair = tuple[str, str]
"""(prompt, whole answer)"""
Pair = tuple[str, str | Answer]
"""(prompt, answer); a plain string is a whole answer."""
Preference = tuple[str, str | Answer, str | Answer]
"""(prompt, preferred answer, other answer)"""

QUESTION_COLUMNS = ("instruction", "prompt", "question", "query", "input")
ANSWER_COLUMNS = ("output", "answer", "response", "completion", "chosen")
"""Tried in this order, in any case: Alpaca's, ours, and the usual others."""


def load_instructions(source: str | Path = "instructions", split: str = "all") -> list[TextPair]:
    """Read (instruction, answer) pairs.

    `source`: "instructions" (shipped, with splits "train" and "test"; also "instructions:test"), or a csv, tsv, json,
    jsonl or parquet file in Alpaca's format (instruction, input, output), with columns of QUESTION_COLUMNS and
    ANSWER_COLUMNS, or in the messages format (one user and one assistant turn); column names in any letter case.
    Raises ValueError, naming the row, for missing fields, empty texts, invalid JSON, or conversations of more turns.
    """
    name, _, named_split = str(source).partition(":")
    if name == "instructions":
        if named_split and split not in ("all", named_split):
            raise ValueError(f"{str(source)!r} with split {split!r}: say the split once")
        path = data_folder() / "instructions.csv"
        rows = shipped_rows("instructions", named_split or split)
    else:
        if split != "all":
            raise ValueError(f"split {split!r} of {str(source)!r}: only the shipped 'instructions' have splits")
        path = Path(source).expanduser()
        rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no rows, expected at least one instruction with its answer")
    return [_pair_of(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1)]


def choosing_and_reporting(pairs: Sequence[TextPair]) -> tuple[list[TextPair], list[TextPair]]:
    """Held-out pairs in two disjoint halves: one to choose settings by, one to report on.

    By the last bit of the SHA-256 of the instruction: a pair's side depends on nothing else, neither on how many are
    wanted nor on the order of the file, and two rows of one instruction are on one side.
    """
    halves: tuple[list[TextPair], list[TextPair]] = ([], [])
    for pair in pairs:
        halves[hashlib.sha256(pair[0].encode()).digest()[-1] % 2].append(pair)
    return halves


def _pair_of(row: dict[str, Any], where: str) -> TextPair:
    if messages := find_column(row, ["messages"]):
        question, answer = _from_messages(row[messages], where)
    else:
        question, answer = (with_input(row, _column(row, names, where)) for names in (QUESTION_COLUMNS, ANSWER_COLUMNS))
    for name, text in (("instruction", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: the {name} is empty or no text: expected some text")
    return question.strip(), answer.strip()


def _column(row: dict[str, Any], names: Sequence[str], where: str) -> str:
    found = find_column(row, names)
    if found is None:
        raise ValueError(f"{where}: none of the fields {', '.join(names)}; it has {', '.join(map(str, row)) or 'none'}")
    return found


def _from_messages(messages: Any, where: str) -> tuple[Any, Any]:
    try:
        turns = [(turn["role"], turn["content"]) for turn in messages]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: messages: expected a list of objects with role and content") from error
    if [role for role, _ in turns] != ["user", "assistant"]:
        roles = ", ".join(str(role) for role, _ in turns) or "none"
        raise ValueError(f"{where}: messages of {roles}: expected one user and one assistant turn")
    return turns[0][1], turns[1][1]
