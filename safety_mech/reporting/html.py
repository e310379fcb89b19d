"""report.html: one page for one run, with everything inside it and nothing fetched.

A block (text, table, figure, examples, CircuitsVis views, grid.py's picture) is a `Markup` that a template has made.
The templates escape what they are given: a prompt or an answer that holds `<script>` is shown as text. A `Section` is a
title and its blocks, `report_page` the whole page; a section without blocks is left out.

    page = report_page("My run", "One sentence.", [Section("Curves", [text("..."), figure(plot_gap(...), alt="...")])])
    write_run(..., texts={"report.html": page})
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.text import is_refusal
from safety_mech.reporting.runs import environment, plain
from safety_mech.reporting.templates import macros, render
from safety_mech.reporting.token_views import View, views_html

_BLOCKS = macros("blocks.html")
text, fixed_width, table, folded = _BLOCKS.text, _BLOCKS.fixed_width, _BLOCKS.table, _BLOCKS.folded
"""From text to `Markup`; blocks.html says what each takes."""


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Markup]

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Example:
    """The model's answers to one prompt: unscaled, and with a range scaled."""

    prompt: str
    unscaled: str
    scaled: str


def report_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page; `lead` is the one sentence that a reader in a hurry takes away."""
    return str(render("page.html", title=title, lead=lead, sections=[part for part in sections if part.blocks]))


def figure(drawn: Figure, alt: str, caption: str = "", *, wide: bool = False) -> Markup:
    """A matplotlib figure as a PNG inside the page. `wide`: two panels, which scroll on a phone rather than shrink."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=130)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return _BLOCKS.figure(png, alt, caption, "wide" if wide else "")


def examples(shown: Sequence[Example]) -> Markup:
    """A card an example: the prompt, both answers, and the text judge's verdict on each."""
    return _BLOCKS.examples(shown, verdict)


def verdict(answer: str) -> str:
    return "degenerate output" if is_degenerate(answer) else "refuses" if is_refusal(answer) else "does not refuse"


def views(shown: Sequence[View]) -> Markup:
    """CircuitsVis views. Put all of a page's into one call: each call brings the package's code (1.3 MB)."""
    return Markup(views_html(shown)) if shown else Markup("")


def settings_section(config: Any, prompt_hashes: Mapping[str, str], sizes: Mapping[str, int] | None = None) -> Section:
    """The last section of every run's page: what it takes to get the same numbers. `sizes`: of the prompt sets."""
    settings = [[name, "not given" if value is None else str(value)] for name, value in plain(config).items()]
    sets = [[name, digest, (sizes or {}).get(name, "")] for name, digest in prompt_hashes.items()]
    found = environment()
    versions = [[name, version or "not installed"] for name, version in found["packages"].items()]
    machine = [[name, found[name]] for name in ("python", "machine", "threads", "written")]
    tables = [
        table(["setting", "value"], settings, "Settings"),
        table(["prompt set", "SHA-256, first 16 digits", "prompts" if sizes else ""], sets, "Prompt sets"),
        table(["package", "version"], [*versions, *machine], "Versions and machine"),
    ]
    return Section("Settings, prompt sets, versions", tables)
