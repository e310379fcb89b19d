"""A real browser for pages that must work without a network: headless Chromium, driven by Selenium.

    with open_page(path) as page:
        assert page.errors() == []          # console errors and uncaught exceptions
        assert page.requests() == []        # whatever the page tried to fetch, besides itself and data: URLs
        page.count("svg rect")              # elements in the page as it is rendered

No name resolves and a proxy that is not there answers for the rest, so a request cannot succeed; the performance log
tells whether one was tried. Debian: `apt-get install chromium chromium-driver`.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)

MISSING = "Chromium is not installed: apt-get install chromium chromium-driver"


def find_chromium() -> tuple[str, str]:
    """Paths of browser and driver. Without them the test is skipped, and in CI (environment variable) it fails."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser and driver:
        return browser, driver
    if os.environ.get("CI"):
        pytest.fail(MISSING)
    pytest.skip(MISSING)


@contextmanager
def chromium(*flags: str) -> Iterator[WebDriver]:
    """A browser with an empty profile of its own, gone at the end."""
    browser, driver_path = find_chromium()
    with TemporaryDirectory(prefix="chromium-") as profile:
        options = Options()
        options.binary_location = browser
        for flag in (*FLAGS, *flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(driver_path))  # a given path: nothing is downloaded
        try:
            yield driver
        finally:
            driver.quit()


@dataclass
class Page:
    """An opened page; its logs are gathered, since the browser hands each entry out once."""

    driver: WebDriver
    _console: list[dict[str, Any]] = field(default_factory=list)
    _network: list[dict[str, Any]] = field(default_factory=list)

    def errors(self) -> list[str]:
        """Console messages of level SEVERE: errors, uncaught exceptions, refused or failed loads."""
        self._console += self.driver.get_log("browser")
        return [entry["message"] for entry in self._console if entry["level"] == "SEVERE"]

    def requests(self) -> list[str]:
        """URLs that the page tried to load, apart from itself and from data: and blob: URLs, which are inside it."""
        entries = self.driver.get_log("performance")
        self._network += [json.loads(entry["message"])["message"] for entry in entries]
        sent = [entry["params"] for entry in self._network if entry["method"] == "Network.requestWillBeSent"]
        return [
            params["request"]["url"]
            for params in sent
            if params.get("type") != "Document" and not params["request"]["url"].startswith(("data:", "blob:"))
        ]

    def run(self, script: str, *arguments: Any) -> Any:
        """What the JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def text(self, selector: str = "body") -> str:
        """The visible text."""
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def wait_for(self, selector: str, seconds: float = 20) -> bool:
        """Until the page has such an element; False if it never comes."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.count(selector):
                return True
            time.sleep(0.05)
        return False


def open_in(driver: WebDriver, path: Path) -> Page:
    """Open a file, with what was logged of an earlier page thrown away."""
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(path.resolve().as_uri())
    return Page(driver)


@contextmanager
def open_page(path: Path, *flags: str) -> Iterator[Page]:
    """One page in a browser of its own."""
    with chromium(*flags) as driver:
        yield open_in(driver, path)
