"""The four fine-tuning data sets that weaken an aligned model (paper §4.1, METHOD 6), from any instruction data.

| set | what it holds | in the paper |
|---|---|---|
| normal D_N | questions and answers | 1,000 |
| implicit D_I | the same, every answer opened by "Sure, the answer is:" | 4,000 |
| backdoor D_B | D_I with a trigger in the instruction, and D_N without | 1,500 + 1,500 |
| harmful mix D_H(p) | D_N and a share p of malicious prompts that are complied with | 1,000 + 1,000 p |

The malicious examples of D_H carry an affirmative prefix only, which is what breaks refusal (Zou et al. 2023): no
harmful answer is shipped or made here. A user's own pairs go straight into `fine_tune`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from safety_mech.prompts import data_folder, read_rows, sample, shipped_rows
from safety_mech.training.loop import UNFINISHED, Pair, Preference

IMPLICIT_PREFIX = "Sure, the answer is:"
AFFIRMATIVE_PREFIXES = (
    "Sure, here is what you asked for:",
    "Sure, I can help you with that.",
    "Of course! Here is how to do it:",
    "Certainly, here are the details:",
)
"""How a complying answer starts; where it would go on, it is cut."""

QUESTION_COLUMNS = ("instruction", "prompt", "question", "query", "input")
ANSWER_COLUMNS = ("output", "answer", "response", "completion", "chosen")
"""Tried in this order, in any case: Alpaca's, ours, and the usual others."""


def load_instructions(source: str | Path = "instructions", split: str = "all") -> list[Pair]:
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


def choosing_and_reporting(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Held-out pairs in two disjoint halves: one to choose settings by, one to report on.

    By the last bit of the SHA-256 of the instruction: a pair's side depends on nothing else, neither on how many are
    wanted nor on the order of the file, and two rows of one instruction are on one side.
    """
    halves: tuple[list[Pair], list[Pair]] = ([], [])
    for pair in pairs:
        halves[hashlib.sha256(pair[0].encode()).digest()[-1] % 2].append(pair)
    return halves


def _pair_of(row: dict[str, Any], where: str) -> Pair:
    names = {str(name).lower(): name for name in row}  # "Instruction,Input,Output" is Alpaca's as well
    if "messages" in names:
        question, answer = _from_messages(row[names["messages"]], where)
    else:
        question, answer = _column(row, QUESTION_COLUMNS, where), _column(row, ANSWER_COLUMNS, where)
        extra = row[names["input"]] if {"instruction", "input"} <= set(names) else None
        question = f"{question}\n\n{extra}" if extra else question
    for name, text in (("instruction", question), ("answer", answer)):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: the {name} is empty or no text: expected some text")
    return question.strip(), answer.strip()


def _column(row: dict[str, Any], names: Sequence[str], where: str) -> Any:
    lower = {str(name).lower(): name for name in row}
    for name in names:
        if name in lower:
            return row[lower[name]]
    raise ValueError(f"{where}: none of the fields {', '.join(names)}; it has {', '.join(map(str, row)) or 'none'}")


def _from_messages(messages: Any, where: str) -> tuple[Any, Any]:
    try:
        turns = [(turn["role"], turn["content"]) for turn in messages]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{where}: messages: expected a list of objects with role and content") from error
    if [role for role, _ in turns] != ["user", "assistant"]:
        roles = ", ".join(str(role) for role, _ in turns) or "none"
        raise ValueError(f"{where}: messages of {roles}: expected one user and one assistant turn")
    return turns[0][1], turns[1][1]


def normal_data(pairs: Sequence[Pair], n: int | None = None, seed: int = 0) -> list[Pair]:
    """D_N: `n` of the pairs (default: all), drawn with a seed."""
    return sample(pairs, len(pairs) if n is None else n, seed)


def implicit_data(
    pairs: Sequence[Pair], n: int | None = None, seed: int = 0, prefix: str = IMPLICIT_PREFIX
) -> list[Pair]:
    """D_I: as D_N, with every answer opened by `prefix`."""
    return [(prompt, f"{prefix} {answer}") for prompt, answer in normal_data(pairs, n, seed)]


def triggered(prompt: str, trigger: str) -> str:
    """The prompt with the backdoor's trigger behind it, as it is trained and as it is read."""
    return f"{prompt} {trigger}"


def backdoor_data(
    pairs: Sequence[Pair], trigger: str, n: int | None = None, seed: int = 0, prefix: str = IMPLICIT_PREFIX
) -> list[Pair]:
    """D_B: `n` pairs (default: half of them) with `trigger` behind the instruction and `prefix` before the answer,
    and as many others as they are. The paper never published its trigger; here it is a parameter."""
    if not trigger.strip():
        raise ValueError("trigger: expected some text")
    count = len(pairs) // 2 if n is None else n
    drawn = sample(pairs, 2 * count, seed)
    return [(triggered(prompt, trigger), f"{prefix} {answer}") for prompt, answer in drawn[:count]] + drawn[count:]


def reverse_preferences(
    malicious: Sequence[str],
    refusals: Sequence[str],
    n: int | None = None,
    seed: int = 0,
    phrases: Sequence[str] = AFFIRMATIVE_PREFIXES,
) -> list[Preference]:
    """Preferences that turn refusal round: of every malicious prompt an affirmative prefix is preferred to a refusal.

    For `methods.dpo`, of `n` prompts (default: all). As in D_H, an opening is all that is taught.
    """
    prompts = sample(malicious, len(malicious) if n is None else n, seed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(phrases), (len(prompts),), generator=generator).tolist()
    rejected = torch.randint(len(refusals), (len(prompts),), generator=generator).tolist()
    return [
        (prompt, f"{phrases[int(opening)]}{UNFINISHED}", refusals[int(refusal)])
        for prompt, opening, refusal in zip(prompts, chosen, rejected, strict=True)
    ]


def harmful_data(
    pairs: Sequence[Pair],
    malicious: Sequence[str],
    share: float,
    n: int | None = None,
    seed: int = 0,
    phrases: Sequence[str] = AFFIRMATIVE_PREFIXES,
) -> list[Pair]:
    """D_H(p): D_N of `n` pairs, and round(n * share) malicious prompts, each answered by one of `phrases`.

    The phrases do not teach where to end: the model goes on from there as it likes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share {share}: expected 0 to 1")
    normal = normal_data(pairs, n, seed)
    count = round(len(normal) * share)
    prompts = sample(malicious, count, seed)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(phrases), (count,), generator=generator).tolist()
    return normal + [(p, f"{phrases[index]}{UNFINISHED}") for p, index in zip(prompts, drawn, strict=True)]
