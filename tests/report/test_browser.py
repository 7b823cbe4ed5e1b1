"""The pages in a real browser: silent, offline, wide and narrow, light and dark, by keyboard, and on paper."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.report.runs import ANSWER, bare, full, put
from tests.report.test_report import HOSTILE

from mpunlearn.report.report import report

pytestmark = pytest.mark.slow
CONTRAST = """() => {
  const light = (color) => {
    const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = color.match(/[\\d.]+/g).map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|transparent/.test(color)) return color;
    }
    return "rgb(255, 255, 255)";
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("script, style, title, desc") || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(element.closest("svg") ? style.fill : style.color), light(background(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.data.trim(), parseFloat(style.opacity)]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run with its pages, and hostile text in its answers and names."""
    folder = full(tmp_path_factory.mktemp("report") / "run")
    long = "x" * 300
    put(
        folder / "client" / "answers.json",
        {"answers": [ANSWER, dict.fromkeys(ANSWER, HOSTILE), dict.fromkeys(ANSWER, long)]},
    )
    put(folder / "evaluations" / f"{HOSTILE.replace('/', '∕')}@1.json", {"metrics": {"forget_Q_A_Prob": 0.5}})
    report(folder)
    return folder


@contextmanager
def opened(browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    """A page, which must not say, raise or load anything."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    events: list[str] = []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("request", lambda request: events.append(request.url))
    try:
        page.goto(file.as_uri())
        yield page
        assert [event for event in events if not event.startswith("data:,")] == [file.as_uri()]
    finally:
        context.close()


@pytest.mark.parametrize("party", ["server", "client"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_pages_are_silent_fit_and_are_readable(browser, run: Path, party: str, scheme: str, width: int) -> None:
    with opened(browser, run / f"report-{party}.html", width, scheme) as page:
        page.eval_on_selector_all("details", "parts => parts.forEach(part => part.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        found = page.evaluate(CONTRAST)
        assert len(found) > 100
        weak = [(round(ratio, 2), text) for ratio, text, opacity in found if ratio < 4.5 or opacity < 1]
        assert not weak
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(251, 250, 247)" if scheme == "light" else "rgb(20, 24, 27)"
        )


def test_a_bare_page_fits_too(browser, tmp_path: Path) -> None:
    report(bare(tmp_path / "run"))
    for party in ("server", "client"):
        with opened(browser, tmp_path / "run" / f"report-{party}.html", 380) as page:
            assert page.evaluate("document.documentElement.scrollWidth") <= 380


COLUMN = """(column) => [...document.querySelectorAll("#metrics tbody tr")]
  .map((row) => row.cells[column].innerText.split("\\n")[0])"""


def test_tables_are_sorted_by_mouse_and_by_keyboard(browser, run: Path) -> None:
    with opened(browser, run / "report-server.html") as page:
        headers = page.locator("#metrics thead th")
        unsorted = page.evaluate(COLUMN, 2)
        assert "" in unsorted  # a metric that one model does not have
        headers.nth(2).locator("button").click()
        ascending = page.evaluate(COLUMN, 2)
        assert ascending[:-1] == sorted(unsorted, key=lambda text: float(text or "inf"))[:-1]
        assert ascending[-1] == ""
        assert headers.nth(2).get_attribute("aria-sort") == "ascending"
        headers.nth(2).locator("button").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(COLUMN, 2) == [*reversed(ascending[:-1]), ""]
        assert headers.nth(2).get_attribute("aria-sort") == "descending"
        headers.nth(0).locator("button").focus()
        page.keyboard.press("Space")
        names = page.evaluate(COLUMN, 0)
        assert names == sorted(names)
        assert headers.nth(2).get_attribute("aria-sort") is None
        assert "Sorted by metric, ascending." in page.locator("#metrics [role=status]").inner_text()


def test_the_keyboard_reaches_everything(browser, run: Path) -> None:
    with opened(browser, run / "report-client.html", 380) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "content"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className"))
        assert {"DIV.scroll", "BUTTON.", "SUMMARY."} <= reached
        wide = page.locator("#metrics .scroll")
        wide.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("document.querySelector('#metrics .scroll').scrollLeft > 0")


def test_markup_in_files_is_shown_and_never_run(browser, run: Path) -> None:
    with opened(browser, run / "report-client.html") as page:
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        assert HOSTILE in page.locator("#answers").inner_text()
        assert page.locator("img").count() == 0
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=late>late</p>')")
        assert page.locator("#late").count() == 1
    with (
        pytest.raises(AssertionError, match="Content Security Policy"),
        opened(browser, run / "report-client.html") as page,
    ):
        page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))")
        assert page.evaluate("window.ran === undefined")


@pytest.mark.parametrize("party", ["server", "client"])
def test_pages_print_on_a4_in_light_colors(browser, run: Path, party: str) -> None:
    with opened(browser, run / f"report-{party}.html", scheme="dark") as page:
        sheet = page.pdf(prefer_css_page_size=True, print_background=True)
        sizes = re.findall(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)\s*\]", sheet)
        assert 2 <= len(sizes) <= 12
        assert {(round(float(width)), round(float(height))) for width, height in sizes} == {(595, 842)}
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert min(ratio for ratio, _, _ in page.evaluate(CONTRAST)) >= 4.5
        assert page.locator("nav").is_hidden()
        cut = "parts => parts.filter(part => getComputedStyle(part).breakInside !== 'avoid').length"
        assert page.eval_on_selector_all("tr, figure, .card, .quote", cut) == 0
        page.set_viewport_size({"width": 680, "height": 900})  # A4 without its margins, in CSS pixels
        assert page.evaluate("document.documentElement.scrollWidth") <= 680
