"""README.md: short enough to be read, narrow enough not to scroll, and its example runs as written."""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

README = (Path(__file__).resolve().parent.parent / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_it_is_short_and_its_code_is_narrow() -> None:
    assert len(README.splitlines()) <= 150
    assert [
        line for block in re.findall(r"```.*?```", README, re.DOTALL) for line in block.splitlines() if len(line) > 96
    ] == []


def test_its_python_compiles_and_its_links_lead_somewhere() -> None:
    assert len(blocks("python")) >= 3
    for number, block in enumerate(blocks("python")):
        compile(block, f"README block {number}", "exec")
    root = Path(__file__).resolve().parent.parent
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README)]
    missing = [link for link in links if link and "://" not in link and not (root / link).exists()]
    assert missing == []


COLUMN = """<style>body { margin: 0 auto; width: 830px; font: 16px sans-serif }
pre { overflow: auto; padding: 16px; font: 13.6px monospace } td, th { border: 1px solid; padding: 6px 13px }
table { display: block; overflow: auto } img { max-width: 100% }</style>"""
"""Of a repository's page on GitHub in a window of 1280 px: 830 px wide, code in 13.6 px."""


@pytest.mark.slow
def test_nothing_has_to_be_scrolled_sideways_at_1280_pixels(open_file: Callable[[Path], Any], tmp_path: Path) -> None:
    page = tmp_path / "readme.html"
    body = MarkdownIt("commonmark").enable("table").render(README)
    page.write_text(COLUMN + body + f"<pre id='control'>{'x' * 101}</pre>")
    opened = open_file(page)
    opened.driver.set_window_size(1280, 900)
    wide = opened.run(
        "return [...document.querySelectorAll('body, pre, table')].filter(e => e.scrollWidth > e.clientWidth)"
        ".map(e => e.id || e.innerText.slice(0, 60))"
    )
    assert wide == ["control"]


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
