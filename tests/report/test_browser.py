"""Both report pages, opened from disk in a real browser, make no requests, fit a phone, and are interactive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from ixi_etl.dataset import metadata
from ixi_etl.dataset.publish import PublishedVersion

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.stack
DESKTOP, PHONE = 1280, 390  # pixels
PAGES_OF_A_VERSION = {"dataset": metadata.REPORT, "compared": metadata.COMPARED_PAGE}


@pytest.fixture(scope="module")
def pages(every_split: PublishedVersion, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Page -> file, for a version with subjects in every split and a tiny training on it."""
    assert set(metadata.read_metadata(every_split.folder)["splits"]) == {"train", "val", "test"}
    made = {name: every_split.folder / page for name, page in PAGES_OF_A_VERSION.items()}
    if not find_spec("torch"):  # an environment without the extra `train`
        return made
    return made | {"run": request.getfixturevalue("finished_run").folder / "report.html"}


class Opened:
    """An open page; `faults` collects its requests and errors."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page, self.faults = page, list[str]()
        page.on("console", lambda message: self.faults.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.faults.append(f"error: {error}"))
        page.on("request", lambda request: self._requested(request.url, path))
        page.goto(path.as_uri())

    def _requested(self, url: str, path: Path) -> None:
        if url != path.as_uri() and not url.startswith("data:"):
            self.faults.append(f"request: {url}")


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser, pages: dict[str, Path]) -> Iterator[Open]:
    """Open `dataset` or `run`, at a width, with options of a browser context."""
    contexts = []

    def opened(name: str, width: int = DESKTOP, **options: Any) -> Opened:
        if name not in pages:
            pytest.skip(
                "the report of a run needs a training, and torch is not installed; `make test-stack` installs it"
            )
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        return Opened(contexts[-1].new_page(), pages[name])

    yield opened
    for context in contexts:
        context.close()


# -- both pages -------------------------------------------------------------------------------------------------------

# Texts that extend beyond their chart, where they are cut off.
CUT_OFF = """[...document.querySelectorAll('svg text')].filter((text) => {
  const [chart, box] = [text.ownerSVGElement.getBoundingClientRect(), text.getBoundingClientRect()];
  return box.left < chart.left - 0.5 || box.right > chart.right + 0.5 || box.bottom > chart.bottom + 2;
}).map((text) => text.textContent)"""

BOTH = pytest.mark.parametrize("name", ["dataset", "run"])


@BOTH
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_a_page_makes_no_requests_and_fits_the_screen(open_page: Open, name: str, width: int) -> None:
    opened = open_page(name, width)
    page = opened.page
    page.wait_for_function("[...document.images].every((image) => image.complete)")
    assert page.evaluate("[...document.images].filter((image) => !image.naturalWidth || !image.alt).length") == 0
    assert page.evaluate("document.images.length") > 0
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_OFF) == []
        red = int(page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]"))
        assert (red > 200) == (scheme == "light")
    assert opened.faults == []


@pytest.mark.parametrize("width", [DESKTOP, PHONE])
def test_the_comparison_makes_no_requests_and_leads_to_the_report(open_page: Open, width: int) -> None:
    opened = open_page("compared", width)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.page.locator("table").count() == opened.page.locator("table > caption").count() > 0
    assert opened.faults == []
    opened.page.get_by_role("link", name="report.html").click()
    opened.page.get_by_role("link", name="compared.html").click()
    assert "compared" in opened.page.title()


@BOTH
def test_charts_tables_and_fields_have_labels(open_page: Open, name: str) -> None:
    page = open_page(name).page
    assert page.locator("svg").count() > 0
    assert page.locator("svg:not([role=img][aria-label])").count() == 0
    assert page.locator("table").count() == page.locator("table > caption").count() > 0
    assert page.locator("th:not([scope])").count() == 0
    unnamed = "[...document.querySelectorAll('input')].filter((i) => !i.labels.length && !i.ariaLabel).length"
    assert page.evaluate(unnamed) == 0


@BOTH
def test_print_has_no_controls_and_no_dark_background(open_page: Open, name: str) -> None:
    page = open_page(name, color_scheme="dark").page
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator(".control").first.is_visible()
    assert page.locator("figure svg").first.is_visible()


@BOTH
def test_everything_is_visible_without_javascript(open_page: Open, name: str) -> None:
    page = open_page(name, java_script_enabled=False).page
    assert page.locator("input[type=search], input[type=range]").count() > 0
    assert not any(control.is_visible() for control in page.locator(".control").all())
    parts = page.locator("tbody tr, [data-frame], .layers").all()
    assert parts
    assert all(part.is_visible() for part in parts)


@BOTH
def test_a_request_of_a_page_is_blocked_and_detected(open_page: Open, name: str) -> None:
    opened = open_page(name)
    with opened.page.expect_event("requestfailed") as failed:
        opened.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    assert failed.value.failure == "csp"
    assert "request: http://127.0.0.1:9/x.png" in opened.faults
    assert any("Content Security Policy" in fault for fault in opened.faults)


# -- interaction ------------------------------------------------------------------------------------------------------


def test_the_search_shows_rows_that_contain_all_words(open_page: Open) -> None:
    page = open_page("dataset").page
    rows, field = page.locator("#excluded tbody tr"), page.get_by_label("Search")
    total = rows.count()
    field.focus()
    page.keyboard.type("GUYS missing_t")
    shown = [row.inner_text() for row in rows.all() if row.is_visible()]
    assert 0 < len(shown) < total
    assert all("Guys" in text and "missing_t" in text for text in shown)
    assert page.locator("output[for=excluded-search]").inner_text() == f"{len(shown)} of {total} rows"
    field.fill("no such name")
    assert not any(row.is_visible() for row in rows.all())
    field.fill("")
    assert all(row.is_visible() for row in rows.all())


def animations(opened: Opened, card: int = 0) -> list[str]:
    """The animations of the T1 in one card, and of its tag."""
    over = opened.page.locator(".pair").nth(card).locator(".over")
    return [part.evaluate("(e) => getComputedStyle(e).animationName") for part in over.all()]


def test_a_pair_flickers_under_the_mouse_and_with_keyboard_focus(open_page: Open) -> None:
    opened = open_page("dataset")
    assert animations(opened) == ["none", "none"]
    opened.page.locator(".pair").first.hover()
    assert animations(opened) == ["flicker", "flicker"]
    opened.page.mouse.move(0, 0)
    assert animations(opened) == ["none", "none"]
    opened.page.locator("#edges").focus()
    opened.page.keyboard.press("Tab")
    assert animations(opened) == ["flicker", "flicker"]
    opened.page.keyboard.press("Space")  # ticks the box: all pairs flicker without focus
    opened.page.keyboard.press("Tab")
    assert animations(opened) == ["flicker", "flicker"]
    assert animations(opened, card=1) == ["flicker", "flicker"]


def test_a_tap_starts_and_stops_the_flicker_of_a_pair(open_page: Open) -> None:
    opened = open_page("dataset", PHONE, has_touch=True, is_mobile=True)
    card = opened.page.locator(".pair").first
    card.tap()
    assert animations(opened) == ["flicker", "flicker"]
    card.tap()
    assert animations(opened) == ["none", "none"]


def test_reduced_motion_shows_the_t1_without_flicker(open_page: Open) -> None:
    opened = open_page("dataset", reduced_motion="reduce")
    opened.page.locator(".pair").first.hover()
    assert animations(opened) == ["none", "none"]
    assert opened.page.locator(".pair .over").first.evaluate("(e) => getComputedStyle(e).opacity") == "1"


def test_the_edges_can_be_hidden(open_page: Open) -> None:
    page = open_page("dataset").page
    assert page.locator(".edges").first.is_visible()
    page.get_by_label("edges of the T1").and_(page.locator("input")).uncheck()
    assert not any(picture.is_visible() for picture in page.locator(".edges").all())


def test_the_slider_steps_through_the_training(open_page: Open) -> None:
    page = open_page("run", PHONE).page
    slider, frames = page.get_by_role("slider"), page.locator("[data-frame]")
    shown = lambda: {f.get_attribute("data-frame") for f in frames.all() if f.is_visible()}  # noqa: E731
    assert shown() == {"2"}
    assert page.locator("output[for=step]").inner_text() == "step 6"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert shown() == {"1"}
    assert slider.get_attribute("aria-valuetext") == page.locator("output[for=step]").inner_text() == "step 4"
    page.keyboard.press("Home")
    assert shown() == {"0"}
    assert page.locator("[data-frame='0']").first.is_visible()


def test_the_run_is_compared_with_its_baselines(open_page: Open) -> None:
    page = open_page("run").page
    table = page.locator("table", has=page.locator("caption", has_text="the generator is better by")).first
    baselines = ["source as it is", "mean training target", "intensity mapping"]
    assert table.locator("tbody th").all_inner_texts() == [name for name in baselines for _ in range(3)]
    assert page.get_by_role("img", name="Generator: reconstruction").count() == 1
    assert page.get_by_role("img", name="Validation, PSNR").count() == 1
