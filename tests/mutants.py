"""The mutation check: does some test notice each of the mutants of mutant_list.py? On demand, not in CI.

    python tests/mutants.py                                 all of them: about an hour on one core
    python tests/mutants.py --file sufficiency.py           those of one file
    python tests/mutants.py --only core_ties --list         what would be run; without --list it is

1. copy the tree to a temporary folder;
2. for every mutant, put it into the copy, run its test files, and put the file back;
3. run the tests that failed once more, without any mutant: now they must pass.

Killed: a test failed (pytest's status 1, and a test's name). Anything else but status 0 is an error, and no kill: a
mutant must be importable. Answers are stored in results/mutants.json by mutant, source file and test files: a second
run does what has changed. Tests that load the real model, and long runs, are left out. The status is 1 below 95 %
killed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = ROOT / "results" / "mutants.json"
NOT_COPIED = shutil.ignore_patterns(".git", ".venv", "results", "__pycache__", ".*_cache")
SLOW_TO_IMPORT = ("torch", "transformer_lens", "transformers", "matplotlib.figure", "peft", "pytest")
SECONDS = 900
"""A run of tests that takes longer has gone wrong: an error, and no kill."""
WANTED = 0.95

Answer = dict[str, Any]


def the_one(found: list[Path], what: str) -> Path:
    if len(found) != 1:
        raise SystemExit(f"{what}: found {len(found)} times, expected once")
    return found[0]


def source_of(mutant: Mutant) -> Path:
    """By its name, wherever in the package it lies, or by its path from the root; relative to the root."""
    named = [path for path in (ROOT / "safety_mech" / mutant.file, ROOT / mutant.file) if path.is_file()]
    found = named or [*(ROOT / "safety_mech").rglob(Path(mutant.file).name)]
    return the_one(found, f"{mutant.name}: safety_mech/{mutant.file}").relative_to(ROOT)


def tests_of(mutant: Mutant) -> list[str]:
    names = mutant.tests.split() or [Path(mutant.file).stem]
    found = [the_one([*(ROOT / "tests").rglob(f"test_{name}.py")], f"{mutant.name}: test_{name}.py") for name in names]
    return [str(path.relative_to(ROOT)) for path in found]


def mutated(mutant: Mutant, text: str) -> str:
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} is {text.count(mutant.old)} times in {source_of(mutant)}")
    return text.replace(mutant.old, mutant.new)


def key_of(mutant: Mutant, tree: Path) -> str:
    files = [source_of(mutant), Path("tests/conftest.py"), Path("tests/tiny.py"), *map(Path, tests_of(mutant))]
    return digest([mutant.name, mutant.old, mutant.new], [tree / file for file in files])


def digest(texts: list[str], files: list[Path]) -> str:
    contents = [path.read_bytes() for path in files]
    return hashlib.sha256("\0".join(texts).encode() + b"\0".join(contents)).hexdigest()[:16]


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's status (negative: ended by that signal) and output, of a child that has the slow imports already."""
    log = tree.parent / "log.txt"
    child = os.fork()
    if child == 0:
        try:
            os._exit(in_child(tree, tests, log))
        finally:
            os._exit(70)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, log.read_text(errors="replace")


def in_child(tree: Path, tests: list[str], log: Path) -> int:
    signal.alarm(SECONDS)
    with log.open("w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    os.chdir(tree)
    sys.path[:] = [str(tree), *(path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests"))]
    os.environ["PYTHONPATH"] = str(tree)
    spec = importlib.util.find_spec("safety_mech")
    assert str(spec and spec.origin).startswith(str(tree)), f"the tests would run {spec}"
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-m", "not real_model and not long_run"]
    status = importlib.import_module("pytest").main([*tests, *options])
    sys.stdout.flush()
    return int(status)


def prepare() -> None:
    """One thread, and the slow imports."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    for module in SLOW_TO_IMPORT:
        importlib.import_module(module)


def write(path: Path, text: str) -> None:
    """With a time of its own: by size and second alone, Python would take a mutant's bytecode for that of the file."""
    later = int(path.stat().st_mtime) + 2
    path.write_text(text, "utf-8")
    os.utime(path, (later, later))


def judged(mutant: Mutant, tree: Path, killer: str) -> Answer:
    """`killer`: the test that killed it before, tried alone at first."""
    path = tree / source_of(mutant)
    whole, key, started = path.read_text("utf-8"), key_of(mutant, tree), perf_counter()
    write(path, mutated(mutant, whole))
    try:
        for tests in ([f"tests/{killer}"] if killer else [], tests_of(mutant)):
            status, log = run_tests(tree, tests) if tests else (0, "")
            if status == 1:
                break
    finally:
        write(path, whole)
    failed = re.search(r"^(?:FAILED|ERROR) tests/([\w./]+(?:::\w+)+)", log, re.MULTILINE)
    said = "survived" if status == 0 else "killed" if status == 1 and failed else f"error (status {status})"
    return {"said": said, "by": failed[1] if failed else "", "seconds": round(perf_counter() - started), "key": key}


def check_unmutated(tree: Path, mutants: list[Mutant], answers: dict[str, Answer]) -> None:
    """The tests that kill must pass where no mutant is: nothing is killed by a test that fails anyway."""
    by = sorted(
        {f"tests/{answers[mutant.name]['by']}" for mutant in mutants if answers[mutant.name]["said"] == "killed"}
    )
    files = sorted({tree / test.split("::")[0] for test in by} | {*(tree / "safety_mech").rglob("*.py")})
    key = digest(by, files)
    if by and answers.get("", {}).get("key") != key:
        status, log = run_tests(tree, by)
        if status != 0:
            raise SystemExit(f"the tests fail without any mutant (status {status}):\n{log[-2000:]}")
        answers[""] = {"said": "passed", "by": "", "key": key}


def report(mutants: list[Mutant], answers: dict[str, Answer]) -> float:
    """Print what became of them; return the share that was killed, of those that can be."""
    counts = Counter((mutant.operator, answers[mutant.name]["said"].split()[0]) for mutant in mutants)
    print(f"\n{'operator':<10} {'killed':>7} {'survived':>9} {'error':>6}")
    for operator in sorted({mutant.operator for mutant in mutants}):
        print(f"{operator:<10}" + "".join(f" {counts[operator, said]:>7}" for said in ("killed", "survived", "error")))
    for mutant in mutants:
        if (said := answers[mutant.name]["said"]) != "killed":
            print(f"{said}: {mutant.name} ({source_of(mutant)}){'; ' * bool(mutant.equivalent)}{mutant.equivalent}")
    killable = [answers[mutant.name]["said"] == "killed" for mutant in mutants if not mutant.equivalent]
    print(f"killed: {sum(killable)} of {len(killable)} ({len(mutants) - len(killable)} more are equivalent)")
    return sum(killable) / max(1, len(killable))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--file", help="the mutants of this file")
    parser.add_argument("--list", action="store_true", help="say what would be run, and whether it can be")
    chosen = parser.parse_args()
    name = Path(chosen.file).name if chosen.file else None
    mutants = [m for m in MUTANTS if (not chosen.only or m.name in chosen.only) and name in (None, Path(m.file).name)]
    if not mutants or len({m.name for m in MUTANTS}) < len(MUTANTS):
        raise SystemExit("no such mutant, or two of one name")
    for mutant in mutants:
        mutated(mutant, (ROOT / source_of(mutant)).read_text("utf-8"))
        if chosen.list:
            print(f"{mutant.operator:<9} {mutant.name:<28} {source_of(mutant)}: {' '.join(tests_of(mutant))}")
    if chosen.list:
        return 0
    answers: dict[str, Answer] = json.loads(ANSWERS.read_text()) if ANSWERS.is_file() else {}
    ANSWERS.parent.mkdir(exist_ok=True)
    prepare()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(shutil.copytree(ROOT, Path(folder) / "tree", ignore=NOT_COPIED))
        for mutant in mutants:
            if answers.get(mutant.name, {}).get("key") != key_of(mutant, tree):
                answers[mutant.name] = judged(mutant, tree, answers.get(mutant.name, {}).get("by", ""))
                ANSWERS.write_text(json.dumps(answers, indent=1))
            answer = answers[mutant.name]
            print(f"{answer['said']:<9} {answer['seconds']:>4} s  {mutant.name}  {answer['by']}", flush=True)
        check_unmutated(tree, mutants, answers)
    ANSWERS.write_text(json.dumps(answers, indent=1))
    return int(report(mutants, answers) < WANTED)


if __name__ == "__main__":
    sys.exit(main())
