"""The built site in a real browser.

Every page is served on localhost, below a sub-path as on GitHub Pages, and
opened in headless Chromium in the light and in the dark, on a desktop and on
two phones, with scrollbars that take room. Build the book first: `make book`.
"""

import contextlib
import functools
import gzip
import http.server
import json
import os
import posixpath
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
WIDTHS = (1280, 390, 320)
THEMES = ("light", "dark")

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


CODE = re.compile(
    r"<(pre|code|script|style|title)\b.*?</\1>|<[^>]*>", re.DOTALL
)


@each_page
def test_no_tex_is_left(page):
    words = CODE.sub("", (SITE / page).read_text(encoding="utf-8"))
    assert re.findall(r".{0,20}(?:\\\(|\\\[|\$\$).{0,20}", words) == []


@each_page
def test_a_page_says_what_it_is(page):
    text = (SITE / page).read_text(encoding="utf-8")
    said = re.findall(r'<meta name="description" content="([^"]*)"', text)
    assert len(said) <= 1
    generated = {"search.html", "genindex.html", "prf-prf.html", "404.html"}
    if page not in generated:
        assert len(said[0]) > 30
        assert "\\" not in said[0]


def test_the_lists_of_the_book_are_linked():
    for page in PAGES:
        links = {posixpath.basename(link) for link in read(page).links}
        assert {"prf-prf.html", "genindex.html"} <= links | {page}


def test_statements_have_links_to_themselves():
    found = 0
    for page in PAGES:
        source = (SITE / page).read_text("utf-8")
        for label in re.findall(
            r'class="proof [^"]*" id="(thm-[^"]*)"', source
        ):
            assert f'class="headerlink" href="#{label}"' in source
            found += 1
    assert found > 20 or not PAGES


# ------------------------------------------------------------ in the browser


@pytest.fixture(scope="session")
def address():
    class Below(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def translate_path(self, path):
            # What asks for the root of the host finds nothing.
            if not path.startswith("/a/book/"):
                return str(SITE / "nothing")
            return super().translate_path(path.removeprefix("/a/book"))

    handler = functools.partial(Below, directory=SITE)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a/book/"
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
            # As on most desktops; formulas have shown bars of their own.
            ignore_default_args=["--hide-scrollbars"],
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


# What is wrong with the formulas: none may be missing, clipped or reach out
# of the page, and only a display that is too wide may scroll and be a stop of
# the tab key.
WRONG_FORMULAS = """() => {
  const SCROLLING = ".pst-scrollable-table-container, .output.text_html";
  const wrong = [];
  const say = (what, e) => wrong.push(`${what}: ${e.textContent}`);
  const page = document.documentElement.clientWidth;
  for (const e of document.querySelectorAll("main .math")) {
    const drawn = e.querySelector("math");
    if (!drawn) { say("not drawn", e); continue; }
    const box = drawn.getBoundingClientRect();
    // Content of a folded page part has no size; here all is open.
    if (!box.width || !box.height) say("empty", e);
    const frame = e.querySelector(".display");
    if (!frame) {
      if (box.right > page + 1 && !e.closest(SCROLLING))
        say("out of the page", e);
      if (e.tabIndex >= 0) say("tab stop", e);
      continue;
    }
    const wide = frame.scrollWidth > frame.clientWidth;
    const bar = frame.offsetHeight - frame.clientHeight;
    if (bar > 1 && !wide) say("needless bar", e);
    if (frame.scrollHeight > frame.clientHeight) say("clipped below", e);
    if (box.top < frame.getBoundingClientRect().top) say("clipped above", e);
    if ((frame.tabIndex >= 0) !== wide) say("tab stop or none", e);
  }
  return wrong;
}"""


# axe-core, best practices included. Contrast is what FAINT_TEXT measures on
# every page, in a hundredth of the time.
AXE = """async () => {
  const found = await axe.run(document, {
    resultTypes: ["violations"],
    rules: {"color-contrast": {enabled: false}},
  });
  return found.violations.flatMap((v) =>
    v.nodes.map((n) => [v.id, n.html.slice(0, 160)])
  );
}"""


def is_a_mistake_of_axe(rule, html):
    """A formula is text for a screen reader, but not yet for axe-core."""
    return rule == "empty-table-header" and "<math" in html


def violations(tab):
    """What axe-core finds, best practices included."""
    import axe_playwright_python

    folder = Path(axe_playwright_python.__file__).parent
    tab.evaluate((folder / "axe.min.js").read_text("utf-8"))
    found = tab.evaluate(AXE)
    return [f for f in found if not is_a_mistake_of_axe(*f)]


@contextlib.contextmanager
def opened(browser, url, **options):
    """A tab with a page, its requests, and what the console complains of."""
    context = browser.new_context(**options)
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
        tab.goto(url, wait_until="load")
        tab.wait_for_load_state("networkidle")
        yield tab, requests, problems
    finally:
        context.close()


@functools.cache
def weight(name):
    """The bytes of a file as a server sends it."""
    content = (SITE / name).read_bytes()
    packed = {".html", ".css", ".js", ".svg", ".json", ".txt"}
    if Path(name).suffix in packed:
        content = gzip.compress(content, 6)
    return len(content)


@each_page
def test_page_in_chromium(page, browser, address):
    size = {"width": 1280, "height": 900}
    with opened(browser, address + page, viewport=size) as (
        tab,
        requests,
        problems,
    ):
        local = (address, "data:", "blob:", "about:")
        assert [url for url in requests if not url.startswith(local)] == []
        asked = [
            unquote(url.removeprefix(address).split("?")[0])
            for url in requests
            if url.startswith(address)
        ]
        assert len(asked) <= 30, "requests"
        assert sum(map(weight, asked)) <= 700_000, "bytes, compressed"

        # What is folded is looked at, too.
        tab.evaluate(UNFOLD)
        for theme in THEMES:
            tab.emulate_media(color_scheme=theme)
            tab.wait_for_function(
                "t => document.documentElement.dataset.theme === t",
                arg=theme,
            )
            assert tab.evaluate(FAINT_TEXT) == [], "contrast below 4.5"
        for width in WIDTHS:
            tab.set_viewport_size({"width": width, "height": 844})
            # Let what observes the sizes of boxes see them.
            tab.evaluate("() => new Promise(r => setTimeout(r, 50))")
            wide = "document.documentElement.scrollWidth -"
            wide += "document.documentElement.clientWidth"
            assert tab.evaluate(wide) <= 0, "wider than the screen"
            assert tab.evaluate(WRONG_FORMULAS) == []
        # Here the page is narrow, dark and unfolded, the hardest state.
        assert violations(tab) == []
        assert problems == []


def page_with_most(text):
    """The page that has most of something; skip without pages."""
    if not PAGES:
        refuse("the book is not built")
    return max(
        PAGES, key=lambda p: (SITE / p).read_text("utf-8").count(text)
    )


def test_a_folded_page_is_accessible(browser, address):
    page = page_with_most("<details")
    with opened(browser, address + page) as (tab, _, _):
        assert violations(tab) == []


def test_followed_links_keep_their_colour(browser, address):
    # A browser hides from scripts what was followed: look at the rules.
    rules = """() => [...document.styleSheets].flatMap(s => [...s.cssRules])
      .filter(r => r.selectorText === "a:visited").map(r => r.style.color)"""
    with opened(browser, f"{address}index.html") as (tab, _, _):
        assert tab.evaluate(rules)[-1] == "var(--pst-color-link)"


@pytest.mark.parametrize("theme", THEMES)
def test_the_theme_does_not_wait_for_the_scripts(theme, browser, address):
    with opened(browser, f"{address}index.html", color_scheme=theme) as (
        tab,
        _,
        _,
    ):
        tab.route("**/*.js*", lambda route: route.abort())
        tab.goto(f"{address}genindex.html")
        shown = tab.evaluate("document.documentElement.dataset.theme")
        assert shown == theme


@pytest.mark.parametrize("script", [True, False])
def test_formulas_from_a_folder_on_disk(script, browser):
    url = (SITE / page_with_most("<math")).as_uri()
    options = {"java_script_enabled": script, "offline": True}
    with opened(browser, url, **options) as (tab, requests, problems):
        assert [r for r in requests if not r.startswith("file:")] == []
        assert problems == []
        font = "document.fonts.check('1em \"Book Math\"')"
        if script:
            tab.reload()
            assert tab.evaluate(font)
        first = tab.locator("main .math math").first
        assert first.bounding_box()["height"] > 5


def test_a_screen_reader_finds_the_formulas(browser, address):
    page = page_with_most("<math")
    with opened(browser, address + page) as (tab, _, _):
        session = tab.context.new_cdp_session(tab)
        tree = session.send("Accessibility.getFullAXTree")["nodes"]
        roles = [node.get("role", {}).get("value") for node in tree]
        folded = tab.locator("main details math, main .toggle math").count()
        shown = tab.locator("main math").count() - folded
        assert roles.count("MathMLMath") >= shown


def test_our_own_files_are_light():
    own = sum(
        len(gzip.compress(file.read_bytes(), 6))
        for file in (ROOT / "_static").glob("*.*")
    )
    assert own <= 60_000


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


def test_a_check_is_printed_as_its_verdict(first_check):
    tab, check = first_check
    code = check.locator(".cell_input pre")
    tab.emulate_media(media="print")
    assert check.locator("summary").is_visible()
    assert not code.is_visible()


@pytest.mark.skipif(not PAGES, reason="the book is not built")
def test_the_book_is_printed_with_links_and_outline(
    browser, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(ROOT / "tools")
    import print_book

    # Two pages, which lead to each other and to pages that are not there.
    parts = [("", ["index"]), ("Part", ["chapters/notation"])]
    joined = SITE / "test-of-print.html"
    try:
        joined.write_text(print_book.join(parts), "utf-8")
        print_book.print_page(browser, joined, tmp_path / "book.pdf")
    finally:
        joined.unlink(missing_ok=True)
    made = (tmp_path / "book.pdf").read_bytes()
    assert made.startswith(b"%PDF")
    assert b"/Outlines" in made
    assert made.count(b"/Link") > 10


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


def results(tab, address, query):
    """The (link, text) of what the search finds first."""
    tab.goto(f"{address}search.html?q={query}")
    tab.wait_for_selector("#search-results li p.context", timeout=20_000)
    tab.wait_for_load_state("networkidle")
    return tab.locator("#search-results > ul > li").evaluate_all(
        "items => items.slice(0, 20).map(e => "
        "[e.querySelector('a').getAttribute('href'), e.innerText])"
    )


@pytest.mark.skipif(not PAGES, reason="the book is not built")
def test_the_search_finds_statements_and_shows_sentences(browser, address):
    tab = browser.new_page()
    found = results(tab, address, "jacobian")
    assert any("#thm-jacobian" in link for link, _ in found)
    for _, said in found + results(tab, address, "overflow"):
        assert not re.search(r"\\[a-z]+|\$|import |Print to PDF|#", said), (
            said
        )
    # TeX and code are not words of the book.
    tab.goto(f"{address}search.html?q=operatorname")
    tab.wait_for_function(
        "document.querySelector('.search-summary')?.innerText.length > 20"
    )
    assert tab.locator("#search-results li a").count() == 0
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
