"""A hook of mkdocs: the site also shows README, CONTRIBUTING, CHANGELOG and data/README.md, and links fit the site.

Links are written to work where the files lie. A link to a file that the site does not hold becomes plain text.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "data/README.md": "data.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"\[([^\]]+)\]\(([\w./-]+)(#[\w-]+)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    root = Path(config.config_file_path).parent
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(root / source).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    here = page.file.src_uri
    source = SOURCES.get(here, f"docs/{here}")

    def moved(link: re.Match[str]) -> str:
        text, target, anchor = link[1], normpath(join(dirname(source), link[2])), link[3] or ""
        in_site = PAGES.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if in_site is None:
            return text if target in text else f"{text} (`{target}`)"
        return f"[{text}]({relpath(in_site, dirname(here) or '.')}{anchor})"

    return LINK.sub(moved, markdown)
