"""The page in a headless browser, as a reader without a network sees it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pwm_fast.analysis.comparison import compare
from pwm_fast.analysis.options import Options
from pwm_fast.analysis.page import number
from pwm_fast.analysis.report import Report, outputs
from tests.analysis.browser import OUTSIDE, Browser, executable
from tests.analysis.conftest import write_run

BROWSER = pytest.mark.skipif(executable() is None, reason="no Chromium or Chrome is installed")


@pytest.fixture(scope="module")
def made(study: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The page of the study and of a second environment with a hostile name."""
    top = tmp_path_factory.mktemp("page")
    extra = top / "a<script>alert(1)</script>" / ("long_directory_name_" * 8) / "seed_0"
    changes = {"alg__world_model__substeps": 4, "alg__horizon": 8, "alg__gamma": 0.5}
    name = "pwm_tiny_flow_with_a_rather_long_name_<b>of_its_own</b>"
    write_run(extra, name, env={"name": "hopper"}, success=None)
    write_run(extra.with_name("seed_1"), name, env={"name": "hopper"}, success=None, **changes)
    options = Options([str(study / "runs"), str(top)], {"cartpole": 70.0})
    report = compare(options, top / "out")
    return outputs(top / "out")["page"], report


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    profile = tmp_path_factory.mktemp("browser") / "profile"
    with Browser(profile) as opened:
        yield opened
    shutil.rmtree(profile, ignore_errors=True)


@BROWSER
@pytest.mark.parametrize("width", [1280, 800])
def test_page_in_a_browser(width: int, made: tuple[Path, Report], browser: Browser) -> None:
    page, report = made
    browser.open(page, width)

    images = browser.value(
        "Promise.all([...document.images].map(i => i.decode().then(() => "
        "[i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width, i.alt])))"
    )
    assert len(images) == 7 + 6, "all but the share of held goals, which hopper has none of"
    for natural_width, natural_height, shown, alt in images:
        assert natural_width > 600 and natural_height > 300 and alt
        assert shown < natural_width <= 4 * shown, "neither blurred nor tiny"

    wrong = [
        event
        for event in browser.events
        if event["method"]
        in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    ]
    assert wrong == []
    urls = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert {url for url in urls if not url.startswith("data:")} == {page.resolve().as_uri()}

    assert browser.value("document.title") == report.title
    assert browser.value("document.scripts.length") == 0
    assert browser.value("document.documentElement.scrollWidth") <= width
    # Cards and tables stay in their places; only a table may scroll within its own frame.
    assert browser.value(OUTSIDE) == []
    if width == 1280:
        scrolling = browser.value(
            "[...document.querySelectorAll('.scroll')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1)"
            ".map(e => e.parentElement.querySelector('h3').textContent)"
        )
        assert scrolling == [], "every table fits"
        lines = browser.value(
            "[...document.querySelectorAll('th .whole')].map(e => e.getClientRects().length)"
        )
        assert set(lines) == {1}, "short labels are not broken"
        assert browser.value(
            "[...document.querySelectorAll('th .whole')].some(e => "
            "e.textContent == 'pwm_tiny_flow')"
        )
    smallest = browser.value(
        "Math.min(...[...document.querySelectorAll('td, th, p, li, figcaption, span')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
    )
    assert smallest >= 11.0


@BROWSER
def test_what_the_page_says(made: tuple[Path, Report], browser: Browser) -> None:
    page, _ = made
    browser.open(page, 1280)
    headings = browser.value("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    ends = ["Runs left out", "How the numbers are made"]
    assert headings == ["cartpole (start=hanging)", "hopper", *ends]
    tables = browser.value(
        "[...document.querySelectorAll('section.card')].filter(e => e.querySelector('table'))"
        ".map(e => [e.querySelector('h3').textContent, e.querySelectorAll('tbody tr').length])"
    )
    assert tables[0][0] == "Result" and dict(map(tuple, tables))["Not compared"] == 2
    text = browser.value("document.body.innerText")
    for said in (
        "returns have different scales",
        "1 run of 4 not finished (seed 3 unfinished at epoch 22 of 40",
        "A single seed, so no interval",
        "config.yaml is missing",
        "nothing has been logged yet",
        "environment steps",
        "3 of 4 runs",
        "1 of 4",
        "not reached",
        "<b>of_its_own</b>",
        "95 % confidence interval",
    ):
        assert said in text, said
    links = browser.value("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    assert links and all(link.startswith("#") for link in links)
    assert all(browser.value(f"!!document.getElementById('{link[1:]}')") for link in links)


def test_page_is_one_whole_file(made: tuple[Path, Report]) -> None:
    """Also without a browser: well-formed, nothing from outside, nothing that runs."""
    text = made[0].read_text("utf-8")
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "iframe", "object", "video")
            for name, value in attributes:
                assert not name.startswith("on")
                if name in ("src", "href"):
                    assert value is not None and value.startswith(("data:", "#"))
            if tag not in ("meta", "link", "img", "wbr", "br"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(text)
    assert opened == []
    assert not re.search(r"https?://", text)
    assert "url(" not in text and "@import" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-12345.6, "−12,346"),
        (-902.34, "−902.3"),
        (12.345, "12.35"),
        (0.01234, "0.012"),
        (0.0, "0"),
        (-0.0, "0"),
        (3e-7, "3.0e−07"),
        (float("nan"), "–"),
    ],
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text
    assert number(-0.2, 0) == "0"
