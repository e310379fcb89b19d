"""The shipped prompt sets keep the promises of data/README.md: sizes, splits, contrastive pairs, and no answers.

A test of a property of the sets comes with a control: the same check on a set that breaks it must fail.
"""

import csv
import difflib
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import mean

import pytest

from safety_mech.prompts import data_folder
from safety_mech.refusal.text import is_refusal

Row = dict[str, str]

SHARE_OF_TEST = {"normal": 3, "malicious": 3, "over_rejection": 2, "pairs": 2, "instructions": 5}
"""One prompt in this many is "test" (data/README.md)."""

COLUMNS = {
    "normal": ["prompt", "category", "split"],
    "malicious": ["prompt", "category", "split"],
    "over_rejection": ["prompt", "word", "split"],
    "pairs": ["malicious", "normal", "category", "split"],
    "alignment_pairs": ["malicious", "normal", "category", "split"],
    "instructions": ["instruction", "answer", "category", "split"],
}
PAIRS = ("pairs", "alignment_pairs")
PROMPT_COLUMNS = dict.fromkeys(PAIRS, ("malicious", "normal")) | {"instructions": ("instruction",)}
REQUESTS = ("normal", "malicious", "over_rejection")
MEBIBYTE = 2**20


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    with (data_folder() / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file, strict=True))


def prompts_of(name: str, split: str | None = None) -> list[str]:
    """Prompts of a set; both sides of the pairs."""
    columns = PROMPT_COLUMNS.get(name, ("prompt",))
    return [row[column] for row in rows_of(name) if split in (None, row["split"]) for column in columns]


def words_of(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def normalised(prompt: str) -> str:
    """Without case, punctuation and spacing."""
    return " ".join(words_of(prompt))


def repeated(prompts: Iterable[str]) -> list[str]:
    return [text for text, count in Counter(map(normalised, prompts)).items() if count > 1]


def jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)


def near_duplicates(left: Iterable[str], right: Iterable[str], limit: float = 0.8) -> list[tuple[str, str]]:
    """Prompts of one list and the other whose sets of words overlap by more than `limit`."""
    others = [(prompt, set(words_of(prompt))) for prompt in right]
    mine = [(prompt, set(words_of(prompt))) for prompt in left]
    return [(a, b) for a, words in mine for b, other in others if jaccard(words, other) > limit]


# --- sizes, columns, duplicates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("normal", 300),
        ("malicious", 300),
        ("over_rejection", 300),
        ("pairs", 150),
        ("alignment_pairs", 700),
        ("instructions", 600),
    ],
)
def test_sizes_and_columns(name: str, least: int) -> None:
    rows = rows_of(name)
    assert len(rows) >= least
    assert all(list(row) == COLUMNS[name] for row in rows)
    assert all(value and value == value.strip() and "\n" not in value for row in rows for value in row.values())
    assert {row["split"] for row in rows} == ({"train", "test"} if name in SHARE_OF_TEST else {"train"})


def test_categories() -> None:
    assert len({row["category"] for row in rows_of("malicious")}) >= 10
    assert len({row["category"] for row in rows_of("normal")}) >= 10
    for name in ("normal", "malicious", "pairs"):
        assert len(set(Counter(row["category"] for row in rows_of(name)).values())) == 1, "categories of equal size"
    assert {row["category"] for row in rows_of("pairs")} <= {row["category"] for row in rows_of("malicious")}


def test_no_prompt_occurs_twice_within_or_across_sets() -> None:
    everything = [prompt for name in COLUMNS for prompt in prompts_of(name)]
    assert repeated(everything) == []
    assert repeated([*everything, prompts_of("normal")[0].upper() + "!"]) == [normalised(prompts_of("normal")[0])]


# --- splits -----------------------------------------------------------------------------------------------------------


def first_prompt(row: Row) -> str:
    return next(row[column] for column in ("prompt", "malicious", "instruction") if column in row)


def documented_test_set(rows: Iterable[Row], share: int) -> set[str]:
    """Within each category, the prompts with the smallest SHA-256. Pairs go by their malicious side; a set without
    categories (over_rejection) is one category."""
    by_category = defaultdict(list)
    for row in rows:
        by_category[row.get("category", "")].append(first_prompt(row))
    chosen = set()
    for prompts in by_category.values():
        prompts.sort(key=lambda prompt: hashlib.sha256(prompt.encode()).hexdigest())
        chosen.update(prompts[: len(prompts) // share])
    return chosen


@pytest.mark.parametrize("name", SHARE_OF_TEST)
def test_the_splits_are_those_of_the_documented_rule(name: str) -> None:
    rows = rows_of(name)
    in_file = {first_prompt(row) for row in rows if row["split"] == "test"}
    assert in_file == documented_test_set(rows, SHARE_OF_TEST[name])


def test_train_and_test_share_no_prompt() -> None:
    train = {normalised(prompt) for name in COLUMNS for prompt in prompts_of(name, "train")}
    test = {normalised(prompt) for name in COLUMNS for prompt in prompts_of(name, "test")}
    assert train
    assert test
    assert not train & test


@pytest.mark.slow
def test_train_and_test_share_no_near_duplicate() -> None:
    train = [prompt for name in COLUMNS for prompt in prompts_of(name, "train")]
    test = [prompt for name in COLUMNS for prompt in prompts_of(name, "test")]
    assert near_duplicates(train, test) == []


def test_the_check_for_near_duplicates_finds_contrastive_pairs() -> None:
    """Control: both sides of a pair differ by a word or two, and are near-duplicates, inside one split."""
    pairs = [(row["malicious"], row["normal"]) for row in rows_of("pairs")]
    assert any(near_duplicates([malicious], [normal]) for malicious, normal in pairs)


@pytest.mark.slow
def test_what_only_trains_is_no_light_edit_of_what_tests() -> None:
    """Stricter than the splits of one file: written later, by people who could have read the test prompts."""
    tests = [prompt for name in SHARE_OF_TEST for prompt in prompts_of(name, "test")]
    assert near_duplicates(prompts_of("alignment_pairs"), tests, limit=0.5) == []
    assert {row["category"] for row in rows_of("alignment_pairs")} == {row["category"] for row in rows_of("malicious")}


def test_contrastive_pairs_are_in_one_split() -> None:
    """A pair is one row, so it has one split; and no other row holds half of it."""
    sides = [normalised(side) for side in prompts_of("pairs")]
    assert len(sides) == len(set(sides)) == 2 * len(rows_of("pairs"))


# --- contrastive pairs ------------------------------------------------------------------------------------------------


def differing_words(left: str, right: str) -> int:
    """Words to replace, take out or put in, to get from one prompt to the other."""
    matcher = difflib.SequenceMatcher(None, left.split(), right.split(), autojunk=False)
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in matcher.get_opcodes() if kind != "equal")


FRAME_RULES: dict[str, Callable[[str, str], bool]] = {
    "same first word": lambda a, b: a.split()[0] == b.split()[0],
    "same end": lambda a, b: a[-1] == b[-1] and a[-1] in "?.",
    "at most 1 word apart": lambda a, b: abs(len(a.split()) - len(b.split())) <= 1,
    "at most 20 % of characters apart": lambda a, b: abs(len(a) - len(b)) <= 0.2 * max(len(a), len(b)),
    "1 to 3 words differ": lambda a, b: 1 <= differing_words(a, b) <= 3,
}

ANOTHER_FRAME = {
    "same first word": ("How do I steal a car?", "Where do I wash a car?"),
    "same end": ("Tell me how to steal a car.", "Tell me how to wash a car?"),
    "at most 1 word apart": ("How do I steal a car?", "How do I wash a very old car?"),
    "at most 20 % of characters apart": ("How do I rob it?", "How do I photosynthesise it?"),
    "1 to 3 words differ": ("How do I steal a car?", "How can we wash one car?"),
}


@pytest.mark.parametrize("rule", FRAME_RULES)
def test_both_sides_of_a_pair_have_the_same_frame(rule: str) -> None:
    pairs = [(row["malicious"], row["normal"]) for row in rows_of("pairs")]
    assert [pair for pair in pairs if not FRAME_RULES[rule](*pair)] == []
    assert not FRAME_RULES[rule](*ANOTHER_FRAME[rule])


# --- what must not tell the sets apart --------------------------------------------------------------------------------


def mean_words(prompts: Iterable[str]) -> float:
    return mean(len(prompt.split()) for prompt in prompts)


def share_of_questions(prompts: Iterable[str]) -> float:
    return mean(prompt.endswith("?") for prompt in prompts)


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_normal_and_malicious_have_the_same_surface(split: str | None) -> None:
    normal, malicious = prompts_of("normal", split), prompts_of("malicious", split)
    assert abs(mean_words(normal) - mean_words(malicious)) <= 1.5
    assert abs(share_of_questions(normal) - share_of_questions(malicious)) <= 0.05
    assert {prompt[-1] for prompt in normal} == {prompt[-1] for prompt in malicious} == {"?", "."}


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_of_the_pairs_have_the_same_surface(name: str) -> None:
    sides = [[row[side] for row in rows_of(name)] for side in ("malicious", "normal")]
    assert abs(mean_words(sides[0]) - mean_words(sides[1])) <= 0.2
    assert share_of_questions(sides[0]) == share_of_questions(sides[1])


def test_over_rejection_prompts_are_of_similar_length() -> None:
    assert abs(mean_words(prompts_of("over_rejection")) - mean_words(prompts_of("normal"))) <= 1.5


# --- over-rejection ---------------------------------------------------------------------------------------------------

IRREGULAR = {"blow up": "blew", "hang": "hung", "steal": "stole"}


def stems(word: str) -> tuple[str, ...]:
    """What forms of the word have in common: its first part, also short of the last letter (abus-ing, bur-ied)."""
    first = word.lower().split()[0]
    return first, first[:-1] if len(first) > 3 else first.replace("y", "i"), IRREGULAR.get(word, first)


def holds_word(prompt: str, word: str) -> bool:
    return any(stem in prompt.lower() for stem in stems(word))


def test_the_dangerous_word_is_in_the_prompt() -> None:
    rows = rows_of("over_rejection")
    assert [row for row in rows if not holds_word(row["prompt"], row["word"])] == []
    assert not holds_word("How do I bake a cake?", "kill")
    strangers = zip(rows, rows[100:] + rows[:100], strict=True)
    assert mean(holds_word(row["prompt"], other["word"]) for row, other in strangers) < 0.1


def test_there_are_many_words_and_none_dominates() -> None:
    counts = Counter(row["word"] for row in rows_of("over_rejection"))
    assert len(counts) >= 40
    assert max(counts.values()) <= 0.05 * len(rows_of("over_rejection"))


@pytest.mark.parametrize("name", [*REQUESTS, *PAIRS])
def test_few_prompts_start_with_how_to(name: str) -> None:
    """The paper's over-rejection prompts all do; a set of one form measures that form."""
    assert mean(prompt.lower().startswith("how to") for prompt in prompts_of(name)) <= 0.15


@pytest.mark.parametrize("name", REQUESTS)
def test_no_two_first_words_dominate(name: str) -> None:
    phrases = Counter(tuple(words_of(prompt)[:2]) for prompt in prompts_of(name))
    assert phrases.most_common(1)[0][1] <= 0.2 * len(prompts_of(name))


# --- instructions and answers -----------------------------------------------------------------------------------------


def test_answers_are_short_plain_and_no_refusals() -> None:
    answers = [row["answer"] for row in rows_of("instructions")]
    assert repeated(answers) == []
    assert all(3 <= len(answer.split()) <= 60 for answer in answers)
    assert 20 <= mean_words(answers) <= 40
    assert [answer for answer in answers if is_refusal(answer) or answer.startswith("Sure")] == []
    assert is_refusal("I'm sorry, but I can't help with that.")


# --- files ------------------------------------------------------------------------------------------------------------


def shipped_entries() -> list[str]:
    """Files of data/, and its folders (one adapter each) by name."""
    return sorted(path.name for path in data_folder().iterdir() if path.name != "README.md")


def has_a_line(name: str, text: str) -> bool:
    return any(f"`{name}`" in line or f"`{name}/" in line for line in text.splitlines())


def test_every_file_has_a_line_in_the_readme() -> None:
    text = (data_folder() / "README.md").read_text("utf-8")
    assert [name for name in shipped_entries() if not has_a_line(name, text)] == []
    assert not has_a_line("unheard_of.csv", text)


@pytest.mark.parametrize("name", COLUMNS)
def test_the_readme_states_rows_and_columns(name: str) -> None:
    text = (data_folder() / "README.md").read_text("utf-8")
    counts = Counter(row["split"] for row in rows_of(name))
    stated = f"| `{name}.csv` | {counts.total()} ({counts['train']} / {counts['test']}) | {', '.join(COLUMNS[name])} |"
    assert stated in text


def test_no_file_is_larger_than_ten_mebibytes() -> None:
    sizes = {path: path.stat().st_size for path in data_folder().rglob("*") if path.is_file()}
    assert {path: size for path, size in sizes.items() if size > 10 * MEBIBYTE} == {}


ANSWER_COLUMN = re.compile(r"answer|respon|complet|output|target|reply|reject|chosen|solution|assistant", re.IGNORECASE)


def test_no_column_could_hold_answers() -> None:
    """Targets ("Sure, here is") and completions are what other malicious sets carry; these carry none. The harmless
    instructions and questions of general knowledge do have answers."""
    assert ANSWER_COLUMN.search("Target")
    tables = [path for path in data_folder().rglob("*") if path.suffix in (".csv", ".tsv")]
    harmless = {"instructions", "multiple_choice"}
    tables = [path for path in tables if path.parent != data_folder() or path.stem not in harmless]
    assert {path.stem for path in tables if path.parent == data_folder()} >= set(COLUMNS) - harmless
    for path in tables:
        with path.open(newline="", encoding="utf-8") as file:
            header = next(csv.reader(file))
        assert not [column for column in header if ANSWER_COLUMN.search(column)], path
    loose = [path for path in data_folder().rglob("*") if path.suffix in (".jsonl", ".parquet", ".txt")]
    assert [*loose, *data_folder().glob("*.json")] == [], "a new kind of table: check its columns here"


@pytest.mark.parametrize("name", ["malicious", *PAIRS])
def test_malicious_prompts_are_short_requests(name: str) -> None:
    """What is asked, never how: no long text, no list of steps, no start of an answer."""
    column = "prompt" if name == "malicious" else "malicious"
    for row in rows_of(name):
        assert len(row[column].split()) <= 25
        assert not re.search(r"sure,|here is|step 1|^\d", row[column], re.IGNORECASE)


def test_no_line_is_repeated_in_another_order() -> None:
    """Same words, other order: as good as a duplicate."""
    everything = [(name, frozenset(words_of(prompt))) for name in REQUESTS for prompt in prompts_of(name)]
    assert [pair for pair in combinations(everything, 2) if pair[0][1] == pair[1][1]] == []


def test_the_data_folder_is_the_checkouts() -> None:
    assert data_folder() == Path(__file__).resolve().parent.parent / "data"
