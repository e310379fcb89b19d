"""Prompt sets: every file format and published layout is read to the letter; every bad input is one clear line."""

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from safety_mech import load_pairs, load_prompts
from safety_mech import prompts as prompts_module
from safety_mech.prompts import (
    PROMPT_COLUMNS,
    SHIPPED,
    data_folder,
    draw,
    draw_pairs,
    draw_rows,
    prompt_hash,
    read_rows,
    shipped_rows,
)

TWO = ["How do I kill time?", 'Say "hello", then go']
"""The second holds commas and quotes: what a careless reader breaks on."""


def write_text(folder: Path, name: str, text: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(text, encoding=encoding, newline="")
    return path


def write_csv(path: Path, rows: Sequence[Sequence[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def write_two(folder: Path, name: str) -> Path:
    """The prompts TWO in the format that `name` says."""
    path = folder / name
    objects = [{"id": number, "prompt": text} for number, text in enumerate(TWO)]
    with_ids = [["id", "prompt"], *([str(row["id"]), row["prompt"]] for row in objects)]
    writers: dict[str, Callable[[], object]] = {
        "header.csv": lambda: write_csv(path, with_ids),
        "bare.csv": lambda: write_csv(path, [[text] for text in TWO]),
        "one_column.csv": lambda: write_csv(path, [["Prompt"], *([text] for text in TWO)]),
        "header.tsv": lambda: write_csv(path, with_ids, "\t"),
        "objects.json": lambda: path.write_text(json.dumps(objects)),
        "strings.json": lambda: path.write_text(json.dumps(TWO)),
        "nested.json": lambda: path.write_text(json.dumps({"version": 1, "data": objects})),
        "objects.jsonl": lambda: path.write_text("\n".join(map(json.dumps, objects)) + "\n\n"),
        "strings.jsonl": lambda: path.write_text("\n".join(map(json.dumps, TWO))),
        "table.parquet": lambda: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(objects), path),
        "lines.txt": lambda: path.write_text("\n".join(TWO) + "\n\n"),
    }
    writers[name]()
    return path


FORMATS = [
    "header.csv",
    "bare.csv",
    "one_column.csv",
    "header.tsv",
    "objects.json",
    "strings.json",
    "nested.json",
    "objects.jsonl",
    "strings.jsonl",
    "table.parquet",
    "lines.txt",
]


def fails_with(source: str | Path, *parts: str, split: str = "all") -> str:
    """Loading raises a one-line ValueError that holds all `parts`; returns it."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the parts are checked below)
        load_prompts(source, split)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    path = write_two(tmp_path, name)
    assert load_prompts(path) == TWO
    assert load_prompts(str(path)) == TWO


@pytest.mark.parametrize("name", [name for name in FORMATS if not name.endswith("parquet")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_prompt(
    tmp_path: Path, name: str, line_end: str
) -> None:
    text = write_two(tmp_path, name).read_text().replace("\n", line_end)
    assert load_prompts(write_text(tmp_path, name, text, "utf-8-sig")) == TWO


def test_the_papers_files_have_one_column_and_no_header(tmp_path: Path) -> None:
    text = 'How to kill time?\n"Create a campaign, and promote it"\nHow to rob one of sleep?\n'
    expected = ["How to kill time?", "Create a campaign, and promote it", "How to rob one of sleep?"]
    path = write_text(tmp_path, "over_rejection.csv", text)
    assert load_prompts(path) == expected
    assert read_rows(path) == [{"prompt": prompt} for prompt in expected]


@pytest.mark.parametrize("column", PROMPT_COLUMNS)
def test_a_known_name_alone_in_the_first_row_is_a_header(tmp_path: Path, column: str) -> None:
    assert load_prompts(write_text(tmp_path, "one.csv", f" {column.upper()}\nHello\n")) == ["Hello"]


def test_a_quoted_cell_may_hold_line_breaks(tmp_path: Path) -> None:
    assert load_prompts(write_csv(tmp_path / "p.csv", [["prompt", "id"], ["one\ntwo", "1"]])) == ["one\ntwo"]


def test_empty_lines_are_skipped_and_prompts_stripped(tmp_path: Path) -> None:
    assert load_prompts(write_text(tmp_path, "p.txt", "\n  one \n\n\ttwo\n \n")) == ["one", "two"]


PUBLISHED = {
    "AdvBench": (["goal", "target"], ["Do it", "Sure, here is"], "Do it"),
    "HarmBench": (
        ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"],
        ["Do it", "standard", "illegal", "", "", "do_it"],
        "Do it",
    ),
    "JailbreakBench": (
        ["Index", "Goal", "Target", "Behavior", "Category", "Source"],
        ["0", "Do it", "Sure, here is", "Doing", "Harm", "Original"],
        "Do it",
    ),
    "JailbreakBench, index without a name": (
        ["", "Goal", "Target", "Behavior", "Category", "Source"],
        ["0", "Do it", "Sure, here is", "Doing", "Harm", "Original"],
        "Do it",
    ),
    "StrongREJECT": (["category", "source", "forbidden_prompt"], ["Violence", "custom", "Do it"], "Do it"),
    "XSTest": (
        ["id", "prompt", "type", "label", "focus", "note"],
        ["1", "Kill a process", "homonyms", "safe", "kill", ""],
        "Kill a process",
    ),
    "OR-Bench": (["prompt", "category"], ["Kill a process", "violence"], "Kill a process"),
    "Alpaca": (["instruction", "input", "output"], ["Add them up", "1, 2", "3"], "Add them up\n\n1, 2"),
    "Alpaca, capitals": (["Instruction", "Input", "Output"], ["Add them up", "1, 2", "3"], "Add them up\n\n1, 2"),
    "Alpaca, input empty": (["instruction", "input", "output"], ["Say hello", "", "Hello"], "Say hello"),
    "Alpaca, no input column": (["instruction", "output"], ["Say hello", "Hello"], "Say hello"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_prompt_column_of_published_sets_is_found(tmp_path: Path, name: str) -> None:
    header, row, expected = PUBLISHED[name]
    assert load_prompts(write_csv(tmp_path / "set.csv", [header, row])) == [expected]
    objects = tmp_path / "set.json"
    objects.write_text(json.dumps([dict(zip(header, row, strict=True))]))
    assert load_prompts(objects) == [expected]


def test_a_column_named_input_belongs_to_an_instruction_only(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "set.csv", [["prompt", "input"], ["Say hello", "loudly"]])
    assert load_prompts(path) == ["Say hello"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    rows = [["prompt", "target", "label"], ["one", "ein", "safe"], ["two", "zwei", "unsafe"], ["three", "drei", "safe"]]
    return write_csv(tmp_path / "labelled.csv", rows)


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("", ["one", "two", "three"]),
        (":", ["one", "two", "three"]),
        (":target", ["ein", "zwei", "drei"]),
        (":TARGET", ["ein", "zwei", "drei"]),
        (":target:label=unsafe", ["zwei"]),
        (":prompt:label=safe", ["one", "three"]),
        ("::label=safe", ["one", "three"]),
        (":prompt:Label=safe", ["one", "three"]),
    ],
)
def test_columns_and_conditions_select(labelled: Path, selector: str, expected: list[str]) -> None:
    assert load_prompts(f"{labelled}{selector}") == expected


def test_a_condition_compares_numbers_as_text(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "one", "harm": 0}\n{"prompt": "two", "harm": 1}\n')
    assert load_prompts(f"{path}:prompt:harm=1") == ["two"]


@pytest.mark.parametrize("selector", ["", ":target", ":target:label=unsafe"])
def test_a_path_may_hold_colons(labelled: Path, selector: str) -> None:
    folder = labelled.parent / "12:30:05"
    folder.mkdir()
    moved = labelled.rename(folder / "a:b.csv")
    plain = {"": ["one", "two", "three"], ":target": ["ein", "zwei", "drei"], ":target:label=unsafe": ["zwei"]}
    assert load_prompts(f"{moved}{selector}") == plain[selector]


def test_a_tilde_is_the_home_folder(labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(labelled.parent))
    assert load_prompts("~/labelled.csv") == ["one", "two", "three"]
    assert load_prompts("~/labelled.csv:target") == ["ein", "zwei", "drei"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_sets_and_their_splits(name: str) -> None:
    rows = read_rows(data_folder() / f"{name}.csv")
    parts = {split: load_prompts(name, split) for split in ("train", "test")}
    for split, prompts in parts.items():
        assert prompts == [row["prompt"] for row in rows if row["split"] == split]
        assert prompts == load_prompts(f"{name}:{split}")
    assert load_prompts(name) == load_prompts(f"{name}:all") == [row["prompt"] for row in rows]
    assert sorted(parts["train"] + parts["test"]) == sorted(load_prompts(name))
    fails_with(f"{name}:validation", "'validation'", "train, test, all")
    fails_with(name, "'dev'", "train, test, all", split="dev")


def test_pairs_and_their_splits() -> None:
    train, test = load_pairs("train"), load_pairs("test")
    rows = read_rows(data_folder() / "pairs.csv")
    assert [(pair.malicious, pair.normal) for pair in load_pairs()] == [
        (row["malicious"], row["normal"]) for row in rows
    ]
    assert not set(train) & set(test)
    assert set(train) | set(test) == set(load_pairs())
    with pytest.raises(ValueError, match=r"'dev'.*train, test, all"):
        load_pairs("dev")


def test_a_file_has_no_splits(labelled: Path) -> None:
    fails_with(labelled, "'train'", "only the shipped sets", split="train")


class HubStub:
    """Stands for `datasets.load_dataset`."""

    def __init__(self, rows: list[dict[str, str]] | Exception) -> None:
        self.rows = rows
        self.calls: list[tuple[str, str]] = []

    def __call__(self, name: str, split: str) -> list[dict[str, str]]:
        self.calls.append((name, split))
        if isinstance(self.rows, Exception):
            raise self.rows
        return self.rows


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> HubStub:
    stub = HubStub([{"Goal": "one", "Target": "ein"}, {"Goal": "two", "Target": "zwei"}])
    monkeypatch.setattr("datasets.load_dataset", stub)
    return stub


def test_a_hub_set_is_asked_for_by_name_and_split(hub: HubStub) -> None:
    assert load_prompts("hf:JailbreakBench/JBB-Behaviors:harmful:Goal") == ["one", "two"]
    assert hub.calls == [("JailbreakBench/JBB-Behaviors", "harmful")]
    fails_with("hf:org/name:train:Behavior", "'Behavior'", "Goal, Target")


@pytest.mark.parametrize("source", ["hf:org/name", "hf:org/name:train", "hf:org/name::Goal", "hf:a:b:c:d", "hf:"])
def test_a_malformed_hub_id_is_refused_without_a_download(hub: HubStub, source: str) -> None:
    fails_with(source, repr(source), "expected hf:org/name:split:column")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionError("no network\nsecond line\nthird"), "no network"),
        (FileNotFoundError("Dataset 'org/name' doesn't exist on the Hub"), "doesn't exist on the Hub"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_hub_set_that_does_not_load_is_one_line(hub: HubStub, error: Exception, reason: str) -> None:
    hub.rows = error
    message = fails_with("hf:org/name:train:Goal", "'hf:org/name:train:Goal' could not be loaded", reason)
    assert "second line" not in message


def test_missing_files_are_named(tmp_path: Path) -> None:
    for source in ("absent.csv", f"{tmp_path}/absent.csv:goal", "maliciuos", "malicious.cvs:a:b=c"):
        fails_with(source, repr(source), "no such file", "normal, malicious, over_rejection")


def test_an_absent_column_lists_those_there_are(labelled: Path) -> None:
    fails_with(f"{labelled}:goal", "no column 'goal'", "prompt, target, label", f"{labelled}:COLUMN")
    fails_with(f"{labelled}:prompt:lable=safe", "no column 'lable'", "prompt, target, label")
    unknown = write_csv(labelled.parent / "unknown.csv", [["a", "b"], ["1", "2"]])
    fails_with(unknown, "no known prompt column", "it has a, b")


def test_a_condition_without_match_lists_the_values(labelled: Path) -> None:
    fails_with(f"{labelled}:prompt:label=harmful", "no row has label = 'harmful'", "safe, unsafe")
    fails_with(f"{labelled}:prompt:label", "'label'", "expected column=value")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("empty.csv", ""),
        ("header.csv", "goal,target\n"),
        ("known_header.csv", "prompt\n"),
        ("empty.tsv", ""),
        ("list.json", "[]"),
        ("data.json", '{"data": []}'),
        ("empty.jsonl", "\n"),
        ("blank.txt", " \n\n"),
    ],
)
def test_an_empty_set_is_refused(tmp_path: Path, name: str, text: str) -> None:
    fails_with(write_text(tmp_path, name, text), name, "is empty: expected at least one prompt")


def test_an_empty_prompt_is_numbered(tmp_path: Path) -> None:
    fails_with(write_csv(tmp_path / "p.csv", [["prompt", "id"], ["one", "1"], ["  ", "2"]]), "prompt 2 is empty")


def test_duplicates_are_numbered_and_shown(tmp_path: Path) -> None:
    path = write_text(tmp_path, "p.txt", "one\ntwo\n  one \n")
    fails_with(path, "prompts 1 and 3 are equal: 'one'")
    assert load_prompts(write_text(tmp_path, "q.txt", "one\nOne\n")) == ["one", "One"]


def test_a_duplicate_with_line_breaks_stays_one_line(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(["a\nb", "a\nb"]))
    fails_with(path, "prompts 1 and 2 are equal")


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("p.json", '[\n{"prompt": "one"},\n{"prompt": two}\n]', ["line 3", "not valid JSON"]),
        ("p.jsonl", '{"prompt": "one"}\n{"prompt"\n', ["line 2", "not valid JSON"]),
        ("p.json", '"one"', ["expected a JSON list"]),
        ("p.json", '{"a": [], "b": []}', ["expected a JSON list"]),
        ("p.json", '["one", 2]', ["entry 2", "got int"]),
        ("p.jsonl", '"one"\n["two"]\n', ["entry 2", "got list"]),
        ("p.json", '[{"prompt": "one"}, {"goal": "two"}]', ["row 2", "no text in column 'prompt'"]),
        ("p.json", '[{"prompt": "one"}, {"prompt": null}]', ["row 2", "no text in column 'prompt'"]),
        ("p.json", '[{"prompt": 3}]', ["row 1", "no text in column 'prompt'"]),
        ("p.csv", "prompt,label\none,safe\ntwo, and three,safe\n", ["line 3", "3 cells", "expected 2"]),
        ("p.csv", "prompt,label\none\n", ["line 2", "1 cells", "expected 2"]),
        ("p.tsv", "prompt\tlabel\none\n", ["line 2", "1 cells", "expected 2"]),
        ("p.csv", "One and only\nGive tips, and more\n", ["line 2", "2 cells", 'in "quotes"']),
        ("p.csv", 'prompt\n"one\ntwo\nthree\n', ["line 4", "not valid csv"]),
        ("p.csv", 'prompt\n"Kill" the lights\n', ["line 2", "not valid csv"]),
        ("p.xlsx", "prompt\none\n", ["expected one of .csv, .tsv, .json, .jsonl, .parquet, .txt"]),
        ("p", "prompt\none\n", ["expected one of .csv"]),
        ("p.parquet", "prompt\none\n", []),
    ],
)
def test_a_broken_file_is_one_line_that_says_where(tmp_path: Path, name: str, text: str, parts: list[str]) -> None:
    fails_with(write_text(tmp_path, name, text), name, *parts)


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.json", "p.jsonl", "p.txt"])
def test_text_that_is_not_utf8_is_refused_at_its_byte(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'"caf\xe9"\n')
    fails_with(path, name, "not UTF-8 text at byte 4")


@pytest.mark.parametrize("name", ["folder", "folder.csv"])
def test_a_folder_is_no_prompt_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    fails_with(tmp_path / name, name)


def test_a_lone_column_that_is_asked_for_by_name_is_a_header(tmp_path: Path) -> None:
    path = write_text(tmp_path, "requests.csv", "request\none\ntwo\n")
    assert load_prompts(f"{path}:request") == ["one", "two"]


MARKS = ["\u2028", "\u2029", "\x85", "\x0c", "\x1e"]
"""What `str.splitlines` takes for the end of a line, beside the line feed."""


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "txt"])
def test_only_line_feeds_end_a_line(tmp_path: Path, ending: str) -> None:
    prompt = "".join(f"word{mark}" for mark in MARKS) + "end"
    text = json.dumps(prompt, ensure_ascii=False) if ending.startswith("json") else prompt
    text = f"[{text}]" if ending == "json" else text
    assert load_prompts(write_text(tmp_path, f"p.{ending}", text + "\n")) == [prompt]


def test_two_splits_that_disagree_are_refused() -> None:
    assert load_prompts("normal:test", "test") == load_prompts("normal:test")
    fails_with("normal:test", "test", "train", split="train")


def test_the_hash_depends_on_prompts_and_order_only() -> None:
    assert prompt_hash(["a", "b"]) == prompt_hash(("a", "b"))
    others = {prompt_hash(prompts) for prompts in (["a", "b"], ["b", "a"], ["a"], ["a", "B"])}
    assert len(others) == 4
    assert all(len(text) == 16 for text in others)


def test_the_hash_knows_where_a_prompt_ends() -> None:
    assert prompt_hash(["a\nb"]) != prompt_hash(["a", "b"])


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_a_draw_spreads_over_all_words_of_the_split():
    """24 rows from the top of over_rejection:test are 5 of its 57 words; a draw of 24 has 24 of them."""
    rows = shipped_rows("over_rejection", "test")
    assert len({row["word"] for row in rows[:24]}) == 5
    drawn = draw("over_rejection:test", 24, seed=3)
    assert len(set(drawn.clusters)) == 24
    assert [rows[row]["prompt"] for row in drawn.ids] == drawn.prompts
    assert [rows[row]["word"] for row in drawn.ids] == drawn.clusters


@pytest.mark.parametrize("count", [1, 5, 36, 100, 143])
def test_every_cluster_gets_its_share_rounded_up_or_down(count):
    rows = shipped_rows("malicious", "test")
    of = Counter(draw("malicious:test", count, seed=1).clusters)
    for category, size in Counter(row["category"] for row in rows).items():
        share = count * size / len(rows)
        assert math.floor(share) <= of[category] <= math.ceil(share)


@pytest.mark.slow
def test_every_row_is_as_likely_as_any_other():
    clusters = list("aaaaaaabbc")
    counted = Counter(row for seed in range(4000) for row in draw_rows(10, 3, clusters, seed))
    assert sum(counted.values()) == 3 * 4000
    # 1,200 expected of each, standard deviation 29: five of them to both sides
    assert all(1055 < counted[row] < 1345 for row in range(10))


def test_a_prefix_of_a_draw_is_no_block_of_topics():
    drawn = draw("malicious:test", 48, seed=0)
    assert len(set(drawn.clusters[:12])) >= 6  # sorted by topic it would be 3


def test_a_draw_is_the_seeds_alone():
    assert draw("normal:test", 20, seed=5) == draw("normal:test", 20, seed=5)
    assert draw("normal:test", 20, seed=5) != draw("normal:test", 20, seed=6)


def test_all_rows_come_in_their_order():
    for count in (None, 144, 1000):
        assert draw("normal:test", count).prompts == load_prompts("normal:test")


def test_a_file_without_topics_is_drawn_plainly(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("\n".join(f"prompt {number}" for number in range(50)))
    drawn = draw(path, 10, seed=0)
    assert drawn.clusters is None
    assert len(set(drawn.prompts)) == 10
    assert drawn.ids != sorted(drawn.ids)
    assert drawn.prompts == [f"prompt {row}" for row in drawn.ids]


def test_drawn_pairs_cover_all_categories():
    pairs, ids = draw_pairs("test", 20, seed=2)
    assert Counter(pair.category for pair in pairs) == Counter({p.category: 2 for p in load_pairs("test")})
    assert [load_pairs("test")[row] for row in ids] == pairs


def test_a_draw_of_none_is_refused():
    with pytest.raises(ValueError, match="0 prompts are wanted"):
        draw("normal:test", 0)


def test_an_installed_packages_own_data_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path.resolve() / "safety_mech"
    inside, beside = package / "data", package.parent / "data"
    for folder in (inside, beside):
        folder.mkdir(parents=True)
        (folder / "README.md").touch()
    monkeypatch.setattr(prompts_module, "__file__", str(package / "prompts.py"))
    assert data_folder() == inside
    (inside / "README.md").unlink()
    assert data_folder() == beside
    (beside / "README.md").unlink()
    with pytest.raises(ValueError, match="install the package again"):
        data_folder()
