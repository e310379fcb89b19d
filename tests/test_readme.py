"""README.md: short enough to be read, narrow enough not to scroll, and its example runs as written."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_its_code_is_narrow() -> None:
    assert len(README.splitlines()) <= 150
    assert [
        line for block in re.findall(r"```.*?```", README, re.DOTALL) for line in block.splitlines() if len(line) > 100
    ] == []


def test_its_python_compiles_and_its_links_lead_somewhere() -> None:
    assert len(blocks("python")) >= 3
    for number, block in enumerate(blocks("python")):
        compile(block, f"README block {number}", "exec")
    root = Path(__file__).resolve().parent.parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)]
    missing = [link for link in links if link and "://" not in link and not (root / link).exists()]
    assert missing == []


@pytest.mark.real_model
def test_the_example_prints_what_stands_below_it() -> None:
    """The verdicts word for word; of the answers another machine's rounding may change a word."""
    code, shown = re.search(r"## Ten lines.*?```python\n(.*?)```\n```\n(.*?)```", README, re.DOTALL).groups()  # pyright: ignore
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})

    def verdicts(text: str) -> list[str]:
        return [line.split("|")[0].rstrip() for line in text.rstrip().splitlines()]

    assert verdicts(printed.getvalue()) == verdicts(shown)
    assert any("scaled:   True" in line for line in verdicts(shown)), "an effect that a reader sees"
