"""Prompt sets: the ones that the project ships, and readers for the field's file formats.

Torch is imported only where prompts are drawn: a command line checks its prompt files before it loads anything slow.
A set is a plain `list[str]`. Where to read it from is one string:

    "malicious"                        a shipped set (see SHIPPED); "malicious:test" one split of it
    "advbench.csv"                     csv, tsv, json, jsonl, parquet or txt, by the file's ending
    "file.csv:column"                  one column of it
    "file.csv:column:label=unsafe"     only the rows where `label` is "unsafe"
    "hf:org/name:split:column"         a data set of the hub, through the `datasets` library
"""

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SHIPPED = ("normal", "malicious", "over_rejection")
"""Shipped sets of prompts; contrastive pairs are read by `load_pairs`."""

CLUSTER_COLUMNS = {"normal": "category", "malicious": "category", "over_rejection": "word"}
"""What rows of a shipped set have in common: prompts of one topic, or about one word, are not independent."""

SPLITS = ("train", "test", "all")

PROMPT_COLUMNS = ("prompt", "goal", "forbidden_prompt", "behavior", "instruction", "question", "query", "text")
"""Column names tried in this order, in any case: ours, XSTest and OR-Bench; AdvBench and JailbreakBench;
StrongREJECT; HarmBench; Alpaca; and the usual others."""

Row = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class PromptPair:
    """A contrastive pair: one sentence frame, once harmful and once harmless."""

    malicious: str
    normal: str
    category: str


def data_folder() -> Path:
    """The folder of the shipped prompt sets and adapters: inside an installed package, beside a checkout's."""
    package = Path(__file__).resolve().parent
    for folder in (package / "data", package.parent / "data"):
        if (folder / "README.md").is_file():
            return folder
    raise ValueError(f"the shipped data was not found beside {package}: install the package again")


def load_prompts(source: str | Path, split: str = "all") -> list[str]:
    """Read a prompt set; see the module's docstring for what `source` may be.

    `split`: "train", "test" or "all"; the shipped sets have fixed splits, other files only "all".
    Raises ValueError, in one line, for a missing file, an absent column (naming those there are), an unknown
    format, no prompts, or empty or duplicate prompts (naming the first).
    """
    text = str(source)
    name, _, named_split = text.partition(":")
    if name in SHIPPED:
        if named_split and split not in ("all", named_split):
            raise ValueError(f"prompt set {text!r} with split {split!r}: say the split once")
        rows = shipped_rows(name, named_split or split)
        return _checked([row["prompt"] for row in rows], text)
    if split != "all":
        raise ValueError(f"split {split!r} of {text!r}: only the shipped sets {', '.join(SHIPPED)} have splits")
    if text.startswith("hf:"):
        return _checked(_read_hub(text), text)
    path, column, condition = _parse_path(text)
    rows = read_rows(path, column)
    if condition:
        rows = _select_rows(rows, condition, path)
    return _checked(_pick_column(rows, column, path), text)


@dataclass(frozen=True)
class Drawn:
    """Prompts drawn from a set, in random order. `ids`: their rows in it, from 0. `clusters`: the topic or word of
    each; None where the set does not tell."""

    prompts: list[str]
    ids: list[int]
    clusters: list[str] | None

    def __len__(self) -> int:
        return len(self.prompts)


def draw(source: str | Path, count: int | None = None, seed: int = 0) -> Drawn:
    """`count` prompts of a set as `load_prompts` reads it (default, and where it has no more: all, in their order).

    Shipped sets are sorted by topic or word, so their first rows are a few topics only. The draw is stratified: of
    every topic or word comes its share of `count`, rounded up or down, and every row is as likely as any other. A file
    of yours has no such column: plainly at random.
    """
    prompts = load_prompts(source)
    name, _, split = str(source).partition(":")
    column = CLUSTER_COLUMNS.get(name)
    clusters = [str(row[column]) for row in shipped_rows(name, split or "all")] if column else None
    ids = draw_rows(len(prompts), count, clusters, seed)
    return Drawn([prompts[row] for row in ids], ids, [clusters[row] for row in ids] if clusters else None)


def draw_pairs(split: str = "all", count: int | None = None, seed: int = 0) -> tuple[list[PromptPair], list[int]]:
    """`count` of the shipped pairs, stratified by category as `draw` does, and their rows."""
    pairs = load_pairs(split)
    ids = draw_rows(len(pairs), count, [pair.category for pair in pairs], seed)
    return [pairs[row] for row in ids], ids


def draw_rows(n_rows: int, count: int | None, clusters: Sequence[str] | None, seed: int) -> list[int]:
    """Numbers of `count` rows out of `n_rows`, in random order; of all rows, in order, where `count` is not smaller.

    Systematic sampling: clusters in random order, rows of a cluster in random order, then every (n_rows / count)-th
    row from a random start. Raises ValueError for a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"{count} prompts are wanted: expected at least 1")
    if count is None or count >= n_rows:
        return list(range(n_rows))
    import torch  # slow to import, and only needed for a draw

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n_rows, generator=generator).tolist()
    if clusters is not None:
        first_seen = {cluster: rank for rank, cluster in enumerate(dict.fromkeys(clusters[row] for row in order))}
        order.sort(key=lambda row: first_seen[clusters[row]])  # stable: rows of a cluster stay in random order
    start = torch.rand(1, generator=generator, dtype=torch.float64).item()
    chosen = [order[int((number + start) * n_rows / count)] for number in range(count)]
    return [chosen[index] for index in torch.randperm(count, generator=generator).tolist()]


def load_pairs(split: str = "all", name: str = "pairs") -> list[PromptPair]:
    """The shipped contrastive pairs, of one split or all; `name` "alignment_pairs": those for training only."""
    return [PromptPair(row["malicious"], row["normal"], row["category"]) for row in shipped_rows(name, split)]


def sample(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """`count` of the items, drawn with a seed; raises ValueError if there are not as many."""
    if not 0 <= count <= len(items):
        raise ValueError(f"{count} examples are wanted, but there are {len(items)}")
    import torch  # slow to import, and only needed for a draw

    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[index] for index in order[:count].tolist()]


def prompt_hash(prompts: Sequence[str]) -> str:
    """Short SHA-256 of a prompt set, order included: written into every run's metrics."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def shipped_rows(name: str, split: str) -> list[Row]:
    """Rows of a file of data/, of one split or all."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} of {name!r}: expected one of {', '.join(SPLITS)}")
    rows = read_rows(data_folder() / f"{name}.csv")
    return [row for row in rows if split in ("all", row["split"])]


def _parse_path(text: str) -> tuple[Path, str | None, str | None]:
    """Split "path[:column[:name=value]]"; a path that exists as it stands is taken whole."""
    if Path(text).expanduser().exists():
        return Path(text).expanduser(), None, None
    parts = text.split(":")
    for count in (len(parts) - 1, len(parts) - 2):
        path = Path(":".join(parts[:count])).expanduser() if count > 0 else None
        if path is not None and path.is_file():
            column, condition = [*parts[count:], None][:2]
            return path, column or None, condition
    raise ValueError(f"prompt set {text!r}: no such file, and no shipped set ({', '.join(SHIPPED)})")


def read_rows(path: Path, column: str | None = None) -> list[Row]:
    """Read a csv, tsv, json, jsonl, parquet or txt file as one dictionary a row.

    A csv whose first row holds no known column name (nor the name `column`) and which has one column is taken to have
    no header (the paper's own files); its column is called "prompt". A txt file has one prompt a line.
    """
    readers = {
        ".csv": lambda: _read_delimited(path, ",", column),
        ".tsv": lambda: _read_delimited(path, "\t", column),
        ".json": lambda: _read_json(path),
        ".jsonl": lambda: _read_jsonl(path),
        ".parquet": lambda: _read_parquet(path),
        ".txt": lambda: [{"prompt": line} for line in _lines(path) if line.strip()],
    }
    if path.suffix not in readers:
        raise ValueError(f"prompt file {str(path)!r}: expected one of {', '.join(readers)}")
    if not path.is_file():
        raise ValueError(f"prompt file {str(path)!r}: no such file")
    try:
        return readers[path.suffix]()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompt file {str(path)!r}: not UTF-8 text at byte {error.start}") from error


def _lines(path: Path) -> list[str]:
    """Lines as an editor counts them: `str.splitlines` would also cut at form feeds and Unicode separators."""
    return path.read_text("utf-8-sig").split("\n")


def _read_delimited(path: Path, delimiter: str, column: str | None) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            rows = [(reader.line_num, row) for row in reader if row]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid csv ({error})") from error
    if not rows:
        return []
    header = [cell.strip() for cell in rows[0][1]]
    if len(header) == 1 and header[0].lower() not in {*PROMPT_COLUMNS, (column or "").lower()}:
        header = ["prompt"]
    else:
        rows = rows[1:]
    for line, row in rows:
        if len(row) != len(header):
            hint = '; put prompts that hold a comma in "quotes"' if len(header) == 1 else ""
            raise ValueError(f"{path}, line {line}: {len(row)} cells, expected {len(header)}{hint}")
    return [dict(zip(header, row, strict=True)) for _, row in rows]


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {line or error.lineno}: not valid JSON ({error.msg})") from error


def _read_json(path: Path) -> list[Row]:
    data = _parsed(path.read_text("utf-8-sig"), path)
    if isinstance(data, dict):  # {"data": [...]}, or {"column": [...]}
        lists = [value for value in data.values() if isinstance(value, list)]
        data = lists[0] if len(lists) == 1 else data
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a JSON list of objects or of strings")
    return [_as_row(item, path, number) for number, item in enumerate(data, start=1)]


def _read_jsonl(path: Path) -> list[Row]:
    lines = enumerate(_lines(path), start=1)
    return [_as_row(_parsed(line, path, number), path, number) for number, line in lines if line.strip()]


def _as_row(item: Any, path: Path, number: int) -> Row:
    if isinstance(item, str):
        return {"prompt": item}
    if isinstance(item, dict):
        return item
    raise ValueError(f"{path}, entry {number}: expected an object or a string, got {type(item).__name__}")


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow.parquet  # slow to import, seldom needed

    return pyarrow.parquet.read_table(path).to_pylist()


def _read_hub(text: str) -> list[str]:
    parts = text.split(":")
    if len(parts) != 4 or not all(parts):
        raise ValueError(f"prompt set {text!r}: expected hf:org/name:split:column")
    from datasets import load_dataset  # slow to import, seldom needed

    _, name, split, column = parts
    try:
        rows = load_dataset(name, split=split)
    except Exception as error:  # the library raises a dozen kinds: network, missing, gated, bad split
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"prompt set {text!r} could not be loaded: {reason}") from error
    return _pick_column([dict(row) for row in rows], column, Path(name))


def find_column(row: Row, names: Iterable[str]) -> str | None:
    """The first of the columns that the row has, in any letter case, as the row spells it."""
    spelled = {str(name).lower(): name for name in row}
    return next((spelled[name] for name in names if name in spelled), None)


def with_input(row: Row, column: str) -> Any:
    """The cell; an instruction of Alpaca's may come with an input of its own, which belongs to it."""
    extra_column = find_column(row, ["input"]) if column.lower() == "instruction" else None
    extra = row[extra_column] if extra_column is not None else None
    return f"{row[column]}\n\n{extra}" if extra else row[column]


def _column_name(row: Row, column: str | None, path: Path) -> str:
    """The named column, or the first known one, in any letter case."""
    found = find_column(row, [column.lower()] if column else PROMPT_COLUMNS)
    if found is None:
        wanted = f"no column {column!r}" if column else "no known prompt column"
        raise ValueError(f"{path}: {wanted}; it has {', '.join(map(str, row)) or 'none'}; name one as {path}:COLUMN")
    return found


def _pick_column(rows: list[Row], column: str | None, path: Path) -> list[str]:
    name = _column_name(rows[0], column, path) if rows else ""
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{path}, row {number}: no text in column {name!r}")
    return [with_input(row, name) for row in rows]


def _select_rows(rows: list[Row], condition: str, path: Path) -> list[Row]:
    name, equals, value = condition.partition("=")
    if not equals:
        raise ValueError(f"{path}: condition {condition!r}: expected column=value")
    column = _column_name(rows[0], name, path) if rows else name
    chosen = [row for row in rows if str(row.get(column)) == value]
    if not chosen:
        values = ", ".join(sorted({str(row.get(column)) for row in rows})[:10])
        raise ValueError(f"{path}: no row has {column} = {value!r}; there are {values}")
    return chosen


def _checked(prompts: Iterable[str], source: str) -> list[str]:
    """Strip; refuse an empty set, empty prompts and duplicates: a duplicate would count as a pair at 0 degrees."""
    stripped = [prompt.strip() for prompt in prompts]
    if not stripped:
        raise ValueError(f"prompt set {source!r} is empty: expected at least one prompt")
    seen: dict[str, int] = {}
    for number, prompt in enumerate(stripped, start=1):
        if not prompt:
            raise ValueError(f"prompt set {source!r}: prompt {number} is empty")
        if prompt in seen:
            raise ValueError(f"prompt set {source!r}: prompts {seen[prompt]} and {number} are equal: {prompt[:60]!r}")
        seen[prompt] = number
    return stripped
