"""report.html: one page for one run, with everything inside it and nothing fetched.

Pure functions: data in, HTML out. Every piece is a `Markup`, whose `format` escapes whatever is put in that is not
itself Markup: a prompt or an answer that holds `<script>` is shown as text. A piece is a block (text, table, figure,
examples, CircuitsVis views, grid.py's picture); a `Section` is a title and blocks; `report_page` is the whole page.
An experiment passes the sections it has.

    page = report_page("My run", "One sentence.", [Section("Curves", [text("..."), figure(plot_gap(...), alt="...")])])
    write_run(..., texts={"report.html": page})
"""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from safety_mech.refusal.degenerate import is_degenerate
from safety_mech.refusal.text import is_refusal
from safety_mech.reporting.runs import environment, plain
from safety_mech.reporting.token_views import View, views_html

PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">{lead}</p>
<nav aria-label="sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<script>{js}</script>
</body>
</html>
""")

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The browser itself refuses whatever is not inside the page."""

SECTION = Markup('<section id="{anchor}">\n<h2>{title}</h2>\n{blocks}\n</section>')
FIGURE = Markup(
    '<figure class="{kind}">\n<div class="scroll"><img src="data:image/png;base64,{data}" alt="{alt}"></div>\n'
    "<figcaption>{caption}</figcaption>\n</figure>"
)
EXAMPLE = Markup(
    '<article class="example">\n<h3>{prompt}</h3>\n<dl class="answers">\n'
    "<div><dt>unscaled: {before_verdict}</dt><dd>{before}</dd></div>\n"
    "<div><dt>scaled: {scaled_verdict}</dt><dd>{scaled}</dd></div>\n</dl>\n</article>"
)


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Markup]


@dataclass(frozen=True)
class Example:
    """What the model answers to one prompt, as it is and while a range is scaled."""

    prompt: str
    unscaled: str
    scaled: str


def report_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole page; `lead` is the one sentence that a reader in a hurry takes away."""
    here = [section for section in sections if section.blocks]
    links = [Markup('<li><a href="#{}">{}</a></li>').format(anchor(s.title), s.title) for s in here]
    page = PAGE.format(
        policy=Markup(POLICY),
        title=title,
        lead=lead,
        css=_asset("html.css"),
        js=_asset("html.js"),
        links=_lines(links),
        sections=_lines(SECTION.format(anchor=anchor(s.title), title=s.title, blocks=_lines(s.blocks)) for s in here),
    )
    return str(page)


def text(sentence: str, kind: str = "") -> Markup:
    """A paragraph; `kind` "note" is smaller and paler."""
    return Markup('<p class="{}">{}</p>').format(kind, sentence)


def fixed_width(lines: str) -> Markup:
    """A table as the terminal shows it."""
    return Markup('<pre tabindex="0">{}</pre>').format(lines)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> Markup:
    """Scrolls inside its own box where it is wider than the page. The first cell of a row is its heading."""
    return Markup(
        '{shown}<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        "<thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    ).format(
        caption=caption or " / ".join(head),
        shown=text(caption, "caption") if caption else "",  # outside the box: it wraps and does not scroll
        head=_join(Markup('<th scope="col">{}</th>').format(cell) for cell in head),
        rows=_lines(_row(row) for row in rows),
    )


def _row(cells: Sequence[Any]) -> Markup:
    first, *rest = cells
    others = _join(Markup("<td>{}</td>").format(cell) for cell in rest)
    return Markup('<tr><th scope="row">{}</th>{}</tr>').format(first, others)


def figure(drawn: Figure, alt: str, caption: str = "", *, wide: bool = False) -> Markup:
    """A matplotlib figure as a PNG inside the page. `wide`: two panels, which scroll on a phone rather than shrink."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=130)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return FIGURE.format(kind="wide" if wide else "", data=data, alt=alt, caption=caption)


def examples(shown: Sequence[Example]) -> Markup:
    """Cards: the prompt, the answer before and while scaling, and what the text judge says of each."""
    return _lines(
        EXAMPLE.format(
            prompt=example.prompt,
            before=example.unscaled or "(nothing)",
            before_verdict=verdict(example.unscaled),
            scaled=example.scaled or "(nothing)",
            scaled_verdict=verdict(example.scaled),
        )
        for example in shown
    )


def verdict(answer: str) -> Markup:
    said = "degenerate output" if is_degenerate(answer) else "refuses" if is_refusal(answer) else "does not refuse"
    return Markup('<span class="verdict {}">{}</span>').format(said.split()[0], said)


def views(shown: Sequence[View]) -> Markup:
    """CircuitsVis views. Put all of a page's into one call: the package's code (1.3 MB) comes with each."""
    return Markup(views_html(shown)) if shown else Markup("")


def folded(summary: str, *blocks: Markup) -> Markup:
    """Closed until it is asked for."""
    return Markup("<details>\n<summary>{}</summary>\n{}\n</details>").format(summary, _lines(blocks))


def settings_section(config: Any, prompt_hashes: Mapping[str, str], sizes: Mapping[str, int] | None = None) -> Section:
    """The last section of every run's page: what the same numbers need."""
    return Section("Settings, prompt sets, versions", [settings_table(config), *provenance(prompt_hashes, sizes)])


def settings_table(config: Any) -> Markup:
    """The run's config, one line a flag."""
    return table(["setting", "value"], [[name, _shown(value)] for name, value in plain(config).items()], "Settings")


def provenance(prompt_hashes: Mapping[str, str], sizes: Mapping[str, int] | None = None) -> list[Markup]:
    """Hashes (and sizes) of the prompt sets, versions and machine: what the same numbers need."""
    sets = [[name, digest, (sizes or {}).get(name, "")] for name, digest in prompt_hashes.items()]
    found = environment()
    versions = [[name, version or "not installed"] for name, version in found["packages"].items()]
    machine = [[name, found[name]] for name in ("python", "machine", "threads", "written")]
    return [
        table(["prompt set", "SHA-256, first 16 digits", "prompts" if sizes else ""], sets, "Prompt sets"),
        table(["package", "version"], [*versions, *machine], "Versions and machine"),
    ]


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _asset(name: str) -> Markup:
    """The page's own style or script: part of the package, so it is trusted as it stands."""
    return Markup((files("safety_mech.reporting") / name).read_text(encoding="utf-8"))


def _join(parts: Any) -> Markup:
    return Markup("").join(parts)


def _lines(parts: Any) -> Markup:
    return Markup("\n").join(parts)
