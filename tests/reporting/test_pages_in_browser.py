"""In a real browser without a network: reports and CircuitsVis views are drawn, fetch nothing, and run no prompt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from browser import Page, find_chromium
from circuitsvis.tokens import colored_tokens
from markupsafe import Markup
from transformer_lens import HookedTransformer

from safety_mech import LayerRange
from safety_mech.reporting import html as report
from safety_mech.reporting.grid import grid_picture
from safety_mech.reporting.html import Example, Section, report_page
from safety_mech.reporting.plots import new_figure
from safety_mech.reporting.token_views import (
    attention_heads_view,
    heads_view,
    refusal_attribution_view,
    tokens_view,
    views_html,
)

pytestmark = pytest.mark.whole_run  # a browser is opened

Open = Callable[..., Page]

IMAGE = """<img/src="x"/onerror="window.hacked=1">"""
"""Without a space: CircuitsVis replaces those, which would spoil the tag."""
HOSTILE = f"</script><script>window.hacked=1</script>{IMAGE}"
SHELL = "<!doctype html><meta charset=utf-8><title>t</title><body>{}"
MEANS = torch.tensor([[0.0, 0.5, 1.0], [float("nan"), 0.25, -1.0], [float("nan"), float("nan"), 0.125]])


@pytest.fixture
def open_html(open_file: Callable[[Path], Page], tmp_path: Path) -> Open:
    """A page with this source."""

    def show(source: str) -> Page:
        path = tmp_path / "page.html"
        path.write_text(source, encoding="utf-8")
        return open_file(path)

    return show


def hacked(page: Page) -> bool:
    return page.run("return window.hacked !== undefined")


def settled(page: Page) -> None:
    """Two frames, and what React had put off, are through."""
    page.driver.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)))"
    )


def assert_clean(page: Page) -> None:
    settled(page)
    assert page.errors() == []
    assert page.requests() == []


# --- the browser helper itself ----------------------------------------------------------------------------------------


def test_an_error_a_request_and_a_canary_would_be_seen(open_html: Open) -> None:
    """Control for every test below."""
    page = open_html(
        SHELL.format("<script>window.hacked = 1; nonsense()</script><img src='https://example.org/x.png'>")
    )
    settled(page)
    assert hacked(page)
    assert any("nonsense is not defined" in message for message in page.errors())
    assert page.requests() == ["https://example.org/x.png"]
    assert any("ERR_NAME_NOT_RESOLVED" in message for message in page.errors())


def test_a_page_without_anything_is_clean_and_forgets_the_one_before(open_html: Open) -> None:
    open_html(SHELL.format("<script>nonsense()</script>"))
    assert_clean(open_html(SHELL.format("nothing")))


@pytest.mark.parametrize("in_ci", [True, False])
def test_without_chromium_tests_skip_but_fail_in_ci(monkeypatch: pytest.MonkeyPatch, in_ci: bool) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CI", "1" if in_ci else "")
    outcome = pytest.fail.Exception if in_ci else pytest.skip.Exception
    with pytest.raises(outcome, match="apt-get install chromium"):
        find_chromium()


# --- views ------------------------------------------------------------------------------------------------------------


def test_both_views_are_drawn(open_html: Open, tiny_model: HookedTransformer) -> None:
    prompt = "How do I help a cat?"
    heads, tokens = attention_heads_view(tiny_model, prompt, 2), refusal_attribution_view(tiny_model, prompt)
    page = open_html(SHELL.format(views_html([heads, tokens])))
    assert page.wait_for("canvas")
    assert page.wait_for(".colored-tokens span span")
    assert page.count("canvas") == tiny_model.cfg.n_heads + 1, "one a head, and the chosen one large"
    assert page.count(".colored-tokens > span") == len(tokens.properties["tokens"])
    spaces_alike = " ".join(page.text(".colored-tokens").split())
    assert prompt in spaces_alike
    assert page.run(
        """const canvas = [...document.querySelectorAll("canvas")].pop();
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        return new Set(new Uint32Array(data.buffer)).size > 10"""
    ), "more than one colour: something was painted"
    assert_clean(page)


def test_nothing_is_drawn_where_nothing_is_called(open_html: Open) -> None:
    """Control: the code alone makes no element."""
    page = open_html(SHELL.format(views_html([])))
    settled(page)
    assert page.count("canvas, .colored-tokens") == 0
    assert page.run("return typeof CircuitsVis.render") == "function"


def test_hostile_tokens_are_shown_and_do_not_run(open_html: Open) -> None:
    tokens = [HOSTILE, "<!--", "a & b", "&lt;"]
    views = [tokens_view(tokens, torch.ones(4), HOSTILE), heads_view(torch.ones(1, 4, 4), tokens, HOSTILE)]
    page = open_html(SHELL.format(views_html(views)))
    assert page.wait_for("canvas")
    assert page.wait_for(".colored-tokens span span")
    shown = page.run('return [...document.querySelectorAll(".colored-tokens > span")].map((e) => e.innerText)')
    assert [text.replace("\xa0", " ") for text in shown] == tokens
    assert page.count("img") == 0
    assert not hacked(page)
    assert_clean(page)


def test_the_packages_own_view_does_run_a_hostile_token(open_html: Open) -> None:
    """Control: this is what the escape in tokens_view is for."""
    theirs = colored_tokens([IMAGE], torch.ones(1)).local_src
    page = open_html(SHELL.format(theirs))
    assert page.wait_for(".colored-tokens img")
    settled(page)
    assert hacked(page)


# --- the report -------------------------------------------------------------------------------------------------------


def whole_page() -> str:
    figure, _ = new_figure()
    sections = [
        Section("Curves", [report.text(HOSTILE), report.figure(figure, "alt", "caption", wide=True)]),
        Section("Search", [grid_picture(MEANS, "nats", LayerRange(0, 2))]),
        Section("Answers", [report.examples([Example(HOSTILE, HOSTILE, "I'm sorry, but I can't help.")])]),
        Section("Tokens", [report.views([tokens_view([HOSTILE, "b"], torch.ones(2), HOSTILE)])]),
        Section("Wide", [report.table(["c"] * 20, [["wide" * 5] * 20])]),
        report.settings_section({}, {HOSTILE: "x"}),
    ]
    return report_page(HOSTILE, HOSTILE, sections)


def test_the_report_opens_clean_and_shows_hostile_text(open_html: Open) -> None:
    page = open_html(whole_page())
    assert page.wait_for(".colored-tokens span span")
    assert page.text("h1") == HOSTILE
    assert HOSTILE in page.text(".example")
    assert page.driver.title == HOSTILE
    assert page.run("return document.querySelector('figure img').naturalWidth") > 100
    assert not hacked(page)
    assert_clean(page)


def test_the_report_would_run_raw_text(open_html: Open) -> None:
    """Control: the same text without escape runs, and its image is refused by the page's own policy."""
    page = open_html(report_page("t", "l", [Section("s", [Markup(HOSTILE.removeprefix("</script>"))])]))
    settled(page)
    assert hacked(page)
    assert any("Content Security Policy" in message for message in page.errors())


def test_the_grid_says_range_and_value(open_html: Open) -> None:
    page = open_html(whole_page())
    assert page.count(".grid .cell title") == 6
    read = 'return document.querySelector(".grid output").textContent'
    assert "Point at a cell" in page.run(read)
    page.run(
        """document.querySelector('[data-at="1-2"]').dispatchEvent(new PointerEvent("pointerover", {bubbles: true}))"""
    )
    assert page.run(read) == "layers 1 to 2: -1.000 nats"


def test_the_grid_obeys_the_arrow_keys(open_html: Open) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    page = open_html(whole_page())
    page.run("""document.querySelector('.cell[tabindex="0"]').focus()""")
    read = 'return document.querySelector(".grid output").textContent'
    assert page.run(read).startswith("layers 0 to 2")
    for key, expected in ((Keys.ARROW_LEFT, "0 to 1"), (Keys.ARROW_UP, "1 to 1"), (Keys.ARROW_LEFT, "1 to 1")):
        ActionChains(page.driver).send_keys(key).perform()
        assert page.run(read).startswith(f"layers {expected}")
    assert page.count('.cell[tabindex="0"]') == 1


@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_never_scrolls_sideways(open_html: Open, width: int) -> None:
    page = open_html(whole_page())
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        page.wait_for(".colored-tokens span span")
        settled(page)
        root = page.run("return [document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert root[0] <= root[1]
        assert page.run(
            "return [...document.querySelectorAll('.scroll')].some((box) => box.scrollWidth > box.clientWidth)"
        ), "the wide table does scroll, in its own box"
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_dark_scheme_is_dark(open_html: Open) -> None:
    page = open_html(whole_page())
    seen = {}
    for scheme in ("light", "dark"):
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        seen[scheme] = page.run("return getComputedStyle(document.body).backgroundColor")
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}


def test_the_large_map_keeps_its_size_when_the_page_is_resized(open_html: Open) -> None:
    """CircuitsVis' own box shrinks to nothing then, also where the page is printed."""
    pattern, tokens = torch.rand(2, 8, 8), [f"token {index}" for index in range(8)]
    page = open_html(SHELL.format(views_html([heads_view(pattern, tokens, "caption")])))
    assert page.wait_for("canvas")
    size = "return [...document.querySelectorAll('canvas')].pop().getBoundingClientRect().width"
    for width in (1200, 390, 700):
        command = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", command)
        settled(page)
        settled(page)
        assert page.run(size) > 250
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
