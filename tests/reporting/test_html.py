"""report.html: every piece is escaped, nothing points outside, sections are optional."""

import base64
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from io import BytesIO

import pytest
import torch
from markupsafe import Markup
from PIL import Image

from safety_mech import LayerRange
from safety_mech.reporting import html as report
from safety_mech.reporting.grid import grid_picture
from safety_mech.reporting.html import Example, Section, report_page
from safety_mech.reporting.plots import new_figure
from safety_mech.reporting.token_views import tokens_view

HOSTILE = "</script><script>window.hacked=1</script> <img src=x onerror=\"window.hacked=1\"> & 'quoted'"


@dataclass(frozen=True)
class Config:
    model: str = HOSTILE
    base: str | None = None
    alpha: float = 1.2


class Reader(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.shown = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.shown += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def hostile_page() -> str:
    """Every kind of block, with the hostile text in every place that takes text."""
    figure, _ = new_figure()
    blocks = [
        report.text(HOSTILE, HOSTILE),
        report.fixed_width(HOSTILE),
        report.table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]], HOSTILE),
        report.figure(figure, HOSTILE, HOSTILE),
        report.examples([Example(HOSTILE, HOSTILE, HOSTILE)]),
        report.folded(HOSTILE, report.text(HOSTILE)),
        *report.settings_section(Config(), {HOSTILE: HOSTILE}).blocks,
        report.views([tokens_view([HOSTILE], torch.ones(1), HOSTILE)]),
        grid_picture(torch.tensor([[0.5]]), HOSTILE, LayerRange(0, 0)),
    ]
    return report_page(HOSTILE, HOSTILE, [Section(HOSTILE, blocks)])


def test_hostile_text_is_text_everywhere() -> None:
    page = Reader(hostile_page())
    assert not page.open, "every tag is closed"
    assert {tag for tag, _ in page.tags} >= {"table", "figure", "svg", "article", "details", "section"}
    assert len(page.named("script")) == 3, "the views' code, the view, the grid's: none of the text's"
    assert [image["src"][:22] for image in page.named("img")] == ["data:image/png;base64,"]
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert page.shown.count(HOSTILE) >= 15


def test_the_reader_would_see_an_escape() -> None:
    """Control: one Markup made of the raw text, and the test above would fail."""
    page = Reader(report_page("t", "l", [Section("s", [Markup(f"<p>{HOSTILE.replace('</script>', '', 1)}</p>")])]))
    assert len(page.named("script")) == 2
    assert len(page.named("img")) == 1


def test_nothing_points_outside() -> None:
    page = hostile_page()
    for tag, attributes in Reader(page).tags:
        for name in ("src", "href"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", page, flags=re.DOTALL))
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = [meta["content"] for meta in Reader(page).named("meta") if "http-equiv" in meta]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_a_section_without_blocks_is_left_out_with_its_link() -> None:
    sections = [Section("Curves", [report.text("a curve")]), Section("The search", [])]
    page = Reader(report_page("Run", "Lead.", sections))
    assert [section["id"] for section in page.named("section")] == ["curves"]
    assert [link["href"] for link in page.named("a")] == ["#curves"]
    assert "The search" not in page.shown


def test_a_page_for_phones_and_for_both_colour_schemes() -> None:
    page = report_page("Run", "Lead.", [])
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert '<html lang="en">' in page


def test_a_figure_is_a_png_of_its_own_with_alt_text() -> None:
    figure, _ = new_figure(width=4.0, height=2.0)
    (image,) = Reader(str(report.figure(figure, "what is seen", "caption"))).named("img")
    assert image["alt"] == "what is seen"
    data = base64.b64decode((image["src"] or "").removeprefix("data:image/png;base64,"))
    assert Image.open(BytesIO(data)).size == (520, 260)


def test_a_table_scrolls_in_its_own_box_and_has_headings() -> None:
    table = Reader(str(report.table(["layer", "gap"], [[0, 0.5], [1, 1.5]], "Gaps")))
    assert table.tags[1] == ("div", {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": "Gaps"})
    assert [cell["scope"] for cell in table.named("th")] == ["col", "col", "row", "row"]
    assert re.sub(r"\s+", " ", table.shown.replace("\n", " ")).strip().startswith("Gaps")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("I'm sorry, but I can't help with that.", "refuses"),
        ("Paris is the capital of France.", "does not refuse"),
        ("the the the the the the the the the the", "degenerate output"),
        (
            "I cannot cannot cannot cannot cannot cannot cannot cannot",
            "degenerate output",
        ),  # it reads as a refusal, too
    ],
)
def test_verdicts_are_the_judges(answer: str, said: str) -> None:
    assert report.verdict(answer) == said
    assert said in Reader(str(report.examples([Example("p", answer, "")]))).shown


def test_an_answer_of_nothing_is_said() -> None:
    assert "(nothing)" in Reader(str(report.examples([Example("p", "", "x")]))).shown


def test_settings_and_provenance() -> None:
    section = report.settings_section(Config("m"), {"normal": "abc123"}, {"normal": 144})
    shown = "".join(Reader(str(block)).shown for block in section.blocks)
    assert "alpha1.2" in shown
    assert "basenot given" in shown
    assert "normalabc123144" in shown
    assert f"torch{torch.__version__.split('+')[0]}" in shown


# --- the grid ---------------------------------------------------------------------------------------------------------

MEANS = torch.tensor([[0.0, 0.5, 1.0], [float("nan"), 0.25, -1.0], [float("nan"), float("nan"), 0.125]])


def cells_of(picture: str) -> dict[str, dict[str, str | None]]:
    return {str(rect["data-at"]): rect for rect in Reader(picture).named("rect") if rect.get("class") == "cell"}


def test_every_range_is_a_cell_that_says_range_and_value() -> None:
    picture = str(grid_picture(MEANS, "nats", LayerRange(0, 2)))
    assert set(cells_of(picture)) == {"0-0", "0-1", "0-2", "1-1", "1-2", "2-2"}
    titles = re.findall(r"<title>(.*?)</title>", picture)
    assert titles == [
        "layers 0 to 0: 0.000 nats",
        "layers 0 to 1: 0.500 nats",
        "layers 0 to 2: 1.000 nats",
        "layers 1 to 1: 0.250 nats",
        "layers 1 to 2: -1.000 nats",
        "layers 2 to 2: 0.125 nats",
    ]


def test_cells_stand_where_the_axes_say() -> None:
    """End to the right, start upwards; least value darkest, greatest brightest."""
    cells = cells_of(str(grid_picture(MEANS, "nats")))
    x = {at: float(cell["x"] or "nan") for at, cell in cells.items()}
    y = {at: float(cell["y"] or "nan") for at, cell in cells.items()}
    assert x["0-0"] < x["0-1"] == x["1-1"] < x["0-2"]
    assert y["2-2"] < y["1-2"] == y["1-1"] < y["0-2"]
    assert (cells["1-2"]["fill"], cells["0-2"]["fill"]) == ("#00224e", "#fee838")


def test_the_located_range_is_framed_and_is_where_the_keys_start() -> None:
    picture = str(grid_picture(MEANS, "nats", LayerRange(1, 2), LayerRange(0, 2)))
    cells = cells_of(picture)
    assert [at for at, cell in cells.items() if cell["tabindex"] == "0"] == ["1-2"]
    marks = [rect for rect in Reader(picture).named("rect") if rect.get("class") == "mark"]
    where = [(rect["x"], rect["y"], "stroke-dasharray" in rect) for rect in marks]
    found, best = ((cells[at]["x"], cells[at]["y"]) for at in ("1-2", "0-2"))
    assert where == [(*found, False), (*found, False), (*best, False), (*best, True)]
    assert "layers 1 to 2" in picture.split("<figcaption>")[1]


def test_the_best_is_framed_once_where_it_is_the_located_one() -> None:
    picture = str(grid_picture(MEANS, "nats", LayerRange(0, 2), LayerRange(0, 2)))
    assert picture.count('class="mark"') == 2
    assert "also the best" in picture


def test_the_values_are_in_a_table_too() -> None:
    table = Reader(str(grid_picture(MEANS, "nats")).split("<details>")[1].replace("</details>", ""))
    assert "00.000.501.00" in table.shown
    assert "10.25-1.00" in table.shown


def test_a_grid_of_one_value_or_none() -> None:
    assert len(cells_of(str(grid_picture(torch.zeros(1, 1), "nats")))) == 1
    with pytest.raises(ValueError, match="grid: no finite value"):
        grid_picture(torch.full((2, 2), float("nan")), "nats")
