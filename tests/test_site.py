"""The built site in a real browser.

Every page is served on localhost and opened in headless Chromium, on a phone
in the light and on a desktop in the dark. Build the book first: `make book`.
"""

import functools
import http.server
import json
import os
import re
import shutil
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
import torch

from softmaxlib import softmax

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
PAGES = sorted(
    str(page.relative_to(SITE))
    for page in SITE.rglob("*.html")
    if page.relative_to(SITE).parts[0] not in {"_static", "reports"}
)
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)
VIEWS = {
    "phone, light": ({"width": 390, "height": 844}, "light"),
    "desktop, dark": ({"width": 1280, "height": 900}, "dark"),
}

each_page = pytest.mark.parametrize("page", PAGES)


def refuse(reason):
    """Skip, saying so; where machines decide (CI), fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(f"THE SITE WAS NOT TESTED: {reason}")


def test_the_book_is_built():
    if "index.html" not in PAGES:
        refuse("the book is not built; run `make book`")


# --------------------------------------------------------- without a browser


class Page(HTMLParser):
    """The ids, links and images of one page."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.images = [], [], []
        self.feed((SITE / path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a" and "name" in attrs:
            self.ids.append(attrs["name"])
        if tag == "img":
            self.images.append(attrs)
        for key in ("href", "src"):
            if attrs.get(key):
                self.links.append(attrs[key])


read = functools.cache(Page)


@each_page
def test_links_and_anchors_lead_somewhere(page):
    broken = []
    for link in read(page).links:
        if re.match(r"[a-z]+:|//", link):
            continue
        target, anchor = urldefrag(urljoin(f"/{page}", link))
        target = unquote(target.split("?")[0]).lstrip("/")
        if target.endswith("/") or not target:
            target += "index.html"
        if not (SITE / target).is_file() or (
            anchor
            and target.endswith(".html")
            and unquote(anchor) not in read(target).ids
        ):
            broken.append(link)
    assert broken == []


@each_page
def test_ids_are_unique(page):
    ids = read(page).ids
    assert sorted({i for i in ids if ids.count(i) > 1}) == []


@each_page
def test_images_have_alt_text(page):
    for image in read(page).images:
        alt = image.get("alt", "").strip()
        # Without alt text of its own a figure gets its file name.
        named = re.search(r"\.(svg|png|jpe?g|gif)$|/", alt)
        assert alt and not named, f"{image.get('src')} says {alt!r}"  # noqa: PT018


# ------------------------------------------------------------ in the browser


@pytest.fixture(scope="session")
def address():
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        own = playwright.chromium.executable_path
        path = found or (own if Path(own).exists() else None)
        if path is None:
            refuse("no Chromium; install the package `chromium`")
        root = hasattr(os, "geteuid") and os.geteuid() == 0
        browser = playwright.chromium.launch(
            executable_path=path,
            # As root, as in a container, Chromium starts only without.
            args=["--no-sandbox"] if root else [],
        )
        yield browser
        browser.close()


UNFOLD = """() => {
  document.querySelectorAll("main details").forEach(d => d.open = true);
  document.querySelectorAll("main .toggle-button").forEach(b => b.click());
}"""

# Text against its background, for what a reader reads. Elements without a
# background of their own show their ancestor's.
FAINT_TEXT = """() => {
  const luminance = ([r, g, b]) => {
    const f = [r, g, b].map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2];
  };
  const colour = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const e of document.querySelectorAll("main *")) {
    const own = [...e.childNodes].some(
      n => n.nodeType === 3 && n.textContent.trim());
    // The anchors beside headings appear only under the pointer.
    if (!own || !e.checkVisibility() || e.matches(".headerlink")) continue;
    const ink = luminance(colour(getComputedStyle(e).color));
    const paper = luminance(behind(e));
    const ratio = (Math.max(ink, paper) + 0.05) /
      (Math.min(ink, paper) + 0.05);
    if (ratio < 4.5)
      faint.push(ratio.toFixed(2) + " " + e.textContent.slice(0, 40));
  }
  return faint;
}"""


@each_page
@pytest.mark.parametrize("view", VIEWS)
def test_page_in_chromium(page, view, browser, address):
    size, theme = VIEWS[view]
    context = browser.new_context(viewport=size, color_scheme=theme)
    requests, problems = [], []

    def console(message):
        if message.type == "error":
            problems.append(message.text)

    def response(answer):
        if answer.status >= 400:
            problems.append(f"{answer.status} {answer.url}")

    tab = context.new_page()
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("response", response)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("console", console)
    try:
        tab.goto(address + page, wait_until="load")
        tab.evaluate("() => window.MathJax?.startup?.promise.then(() => 0)")
        tab.wait_for_load_state("networkidle")

        # What is folded is looked at, too.
        tab.evaluate(UNFOLD)

        local = (address, "data:", "blob:", "about:")
        assert [url for url in requests if not url.startswith(local)] == []
        assert problems == []

        formulas = tab.locator("main .math").count()
        rendered = tab.locator("main mjx-container").count()
        assert rendered >= formulas, "formulas that were not rendered"
        # MathJax writes an unknown macro in red and calls it no error.
        bad = "mjx-merror, mjx-container [style*='color: red']"
        assert tab.locator(bad).all_inner_texts() == [], "broken TeX"

        shown = tab.evaluate("document.documentElement.dataset.theme")
        assert shown == theme
        width = tab.evaluate("document.documentElement.scrollWidth")
        assert width <= size["width"], "the page is wider than the screen"
        assert tab.evaluate(FAINT_TEXT) == [], "contrast below 4.5"
    finally:
        context.close()


FOLDED = '<details class="check">'


def pages_with_folded_checks():
    return [p for p in PAGES if FOLDED in (SITE / p).read_text("utf-8")]


@pytest.mark.parametrize("page", PAGES)
def test_every_check_is_folded(page):
    notebook = ROOT / Path(page).with_suffix(".ipynb")
    if not notebook.exists():
        return
    checks = sum(
        any(tag.startswith("checks:") for tag in cell["metadata"]["tags"])
        for cell in json.loads(notebook.read_text("utf-8"))["cells"]
        if "tags" in cell["metadata"]
    )
    assert (SITE / page).read_text("utf-8").count(FOLDED) == checks


@pytest.fixture
def first_check(browser, address):
    """A page without scripts, and the first of its folded checks."""
    pages = pages_with_folded_checks()
    if not pages:
        refuse("no page with a folded check is built")
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(address + pages[0])
    yield tab, tab.locator("details.check").first
    context.close()


def test_a_check_opens_by_keyboard_without_scripts(first_check):
    tab, check = first_check
    code = check.locator(".cell_input pre")
    assert not code.is_visible()
    check.locator("summary").focus()
    for key, shown in (("Enter", True), ("Space", False), ("Space", True)):
        tab.keyboard.press(key)
        assert code.is_visible() == shown


def test_a_check_is_printed_open(first_check):
    tab, check = first_check
    code = check.locator(".cell_input pre")
    assert code.bounding_box() is None or not code.is_visible()
    tab.emulate_media(media="print")
    assert code.is_visible()
    assert code.bounding_box()["height"] > 10
    # What follows stands below it, not upon it.
    cell = check.locator("xpath=..").bounding_box()
    bottom = code.bounding_box()["y"] + code.bounding_box()["height"]
    assert bottom <= cell["y"] + cell["height"] + 1


def test_a_screen_reader_says_the_verdict(first_check):
    tab, check = first_check
    session = tab.context.new_cdp_session(tab)
    tree = session.send("Accessibility.getFullAXTree")["nodes"]
    names = [
        node["name"]["value"]
        for node in tree
        if node.get("role", {}).get("value") == "DisclosureTriangle"
    ]
    verdict = check.locator("summary").inner_text()
    assert re.match("✓ (attacked with|tried on) ", verdict)
    assert verdict in names


@pytest.mark.skipif(not PAGES, reason="the book is not built")
def test_the_search_finds_softmax(browser, address):
    tab = browser.new_page()
    tab.goto(f"{address}search.html?q=softmax")
    tab.wait_for_selector("#search-results li a", timeout=20_000)
    tab.close()


@pytest.mark.skipif(not PAGES, reason="the book is not built")
@pytest.mark.parametrize(
    ("logits", "exponent"),
    [
        ((1, 2, 3), 0),
        ((-5, 5, 0.3), -1.3),
        ((0, 0, 0), 1.3),
        ((2, 2, -1), 1),
    ],
)
def test_the_first_figure_computes_softmax(
    logits, exponent, browser, address
):
    tab = browser.new_page()
    tab.goto(f"{address}index.html")
    names = [f"#logit-{k}" for k in (1, 2, 3)] + ["#temperature"]
    for name, value in zip(names, (*logits, exponent), strict=True):
        tab.locator(name).evaluate(
            "(input, value) => { input.value = value;"
            "input.dispatchEvent(new Event('input')); }",
            value,
        )
    figure = tab.locator("#softmax-figure")
    shown = json.loads(figure.get_attribute("data-p"))
    z = torch.tensor(logits, dtype=torch.float64)
    p = softmax(z, 0, temperature=10.0**exponent)
    # Exponents of up to 200, rounded once more in the browser.
    assert shown == pytest.approx(p.tolist(), rel=1e-13)
    said = tab.locator("#softmax-said").inner_text()
    assert f"probability {p.max():.3f}" in said
    # The keyboard moves it, too.
    tab.locator("#logit-1").focus()
    tab.keyboard.press("ArrowRight")
    assert json.loads(figure.get_attribute("data-p")) != shown
    tab.close()
