"""Print the built book into one PDF: what `make pdf` runs.

    python tools/print_book.py            # _build/pdf/softmax.pdf

The articles of all pages are joined into one page, in the order of the table
of contents, so that every link between them is a link inside the document.
Chromium prints it; the headings become the outline of the PDF.
"""

import html
import os
import posixpath
import re
import shutil
import sys
from pathlib import Path
from urllib.parse import urldefrag

import yaml

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "_build" / "html"
OUT = ROOT / "_build" / "pdf"
BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "google-chrome-stable",
)

ARTICLE = re.compile(r'<article class="bd-article">(.*?)</article>', re.S)
TITLE = re.compile(r"<h1>(.*?)</h1>", re.S)
HEADERLINK = re.compile(r'<a class="headerlink".*?</a>', re.S)
SCRIPT = re.compile(r"<script\b.*?</script>", re.S)
ATTRIBUTE = re.compile(r'\s(id|href|src)="([^"]*)"')

# Paper has no width to scroll, nobody to press a button, and no second theme.
STYLE = """
@page { size: A4; margin: 18mm 16mm; }
html { font-size: 10.5pt; }
body { background: #fff; }
body > div.bd-content { break-before: page; display: block; }
.bd-article { padding: 0; }
button, .headerlink, .sliders { display: none !important; }
nav a { text-decoration: none; }
"""


def order() -> list[tuple[str, list[str]]]:
    """Return the captions of the parts and their pages."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    parts = [("", [toc["root"]])]
    for part in toc["parts"]:
        pages = [chapter["file"] for chapter in part["chapters"]]
        parts.append((part["caption"], pages))
    return parts


def name(page: str, anchor: str = "") -> str:
    """Return the id of a page, or of a place in it, in the joined page."""
    joined = page.replace("/", "-")
    return f"{joined}--{anchor}" if anchor else joined


def article(page: str, pages: set[str], site: Path = SITE) -> str:
    """Return what a page says, its links from the joined page."""
    text = (site / f"{page}.html").read_text("utf-8")
    found = ARTICLE.search(text)
    if found is None:
        raise SystemExit(
            f"{page}.html has no article: has the theme changed?"
        )
    body = SCRIPT.sub("", HEADERLINK.sub("", found[1]))

    def moved(match: re.Match) -> str:
        attribute, value = match[1], html.unescape(match[2])
        if attribute == "id":
            value = name(page, value)
        elif not re.match(r"[a-z]+:|//", value):
            target, anchor = urldefrag(value)
            path = posixpath.normpath(
                posixpath.join(posixpath.dirname(page), target)
            )
            other = path.removesuffix(".html") if target else page
            if other in pages:
                value = "#" + name(other, anchor)
            elif not target:
                value = f"#{name(page, anchor)}"
            else:
                value = path + (f"#{anchor}" if anchor else "")
        return f' {attribute}="{html.escape(value)}"'

    return ATTRIBUTE.sub(moved, body)


def join(parts: list[tuple[str, list[str]]], site: Path = SITE) -> str:
    """Return the whole book as one page."""
    pages = {page for _, listed in parts for page in listed}
    lines, bodies = [], []
    for caption, listed in parts:
        entries = []
        for page in listed:
            body = article(page, pages, site)
            title = TITLE.search(body)
            entries.append(
                f'<li><a href="#{name(page)}">'
                f"{title[1] if title else page}</a></li>"
            )
            bodies.append(
                f'<div class="bd-content" id="{name(page)}">'
                f'<article class="bd-article">{body}</article></div>'
            )
        heading = f"<p><strong>{html.escape(caption)}</strong></p>"
        lines.append(
            f"{heading if caption else ''}<ul>{''.join(entries)}</ul>"
        )
    return (
        '<!DOCTYPE html><html lang="en" data-theme="light"><head>'
        '<meta charset="utf-8"><title>Softmax</title>'
        '<link rel="stylesheet" href="_static/book.css">'
        f"<style>{STYLE}</style></head><body>"
        f'<nav aria-label="Contents"><h1>Contents</h1>'
        f"{''.join(lines)}</nav>{''.join(bodies)}</body></html>"
    )


def print_page(chromium, source: Path, target: Path) -> None:
    """Print a page from the disk."""
    tab = chromium.new_page()
    tab.goto(source.as_uri(), wait_until="load")
    tab.evaluate("document.fonts.ready.then(() => 0)")
    tab.pdf(
        path=target,
        outline=True,
        tagged=True,
        prefer_css_page_size=True,
        display_header_footer=True,
        header_template="<span></span>",
        footer_template=(
            '<div style="font-size:8px;width:100%;text-align:center">'
            '<span class="pageNumber"></span></div>'
        ),
    )
    tab.close()


def print_joined(source: Path, target: Path) -> None:
    """Print a page with an installed Chromium."""
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("no Chromium; install the package `chromium`")
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser,
            # As root, as in a container, Chromium starts only without.
            args=["--no-sandbox"] if root else [],
        )
        print_page(chromium, source, target)
        chromium.close()


def main() -> int:
    if not (SITE / "index.html").is_file():
        print("The book is not built. Next: make book")
        return 1
    OUT.mkdir(exist_ok=True)
    joined = SITE / "all-pages.html"
    try:
        joined.write_text(join(order()), "utf-8")
        print_joined(joined, OUT / "softmax.pdf")
    finally:
        joined.unlink(missing_ok=True)
    print(f"Read it: open {OUT / 'softmax.pdf'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
