"""Sphinx extension of this book: where it is published, and how it is found.

* The repository that the book is built in, which GitHub names to its
  workflows as ``GITHUB_REPOSITORY``, gives the address of the site, the
  buttons (repository, issues, edit, Binder, Colab), the canonical address of
  each page and the sitemap. ``BOOK_URL`` names another address of the site.
  Where the repository is not known, as on your machine, none of them exist.
* Each page has a description for search engines and for those who share it:
  its first paragraph.
* What is not there has a page that says so, ``404.html``.
"""

import os
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from xml.sax.saxutils import escape as escape_xml

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

# ------------------------------------------------------------ the repository


def site_address(environ: Mapping[str, str]) -> str:
    """Return the address of the site, with a slash, or nothing."""
    if own := environ.get("BOOK_URL"):
        return own.rstrip("/") + "/"
    owner, _, name = environ.get("GITHUB_REPOSITORY", "").partition("/")
    if not name:
        return ""
    host = f"{owner.lower()}.github.io"
    return f"https://{host}/" + ("" if name.lower() == host else f"{name}/")


def repository(environ: Mapping[str, str]) -> dict:
    """Return the options of the theme that need a repository."""
    name = environ.get("GITHUB_REPOSITORY")
    if not name:
        return {}
    server = environ.get("GITHUB_SERVER_URL", "https://github.com")
    return {
        "repository_url": f"{server}/{name}",
        "repository_branch": environ.get("GITHUB_REF_NAME", "main"),
        "path_to_docs": "",
        "use_repository_button": True,
        "use_issues_button": True,
        "use_edit_page_button": True,
        "launch_buttons": {
            "binderhub_url": "https://mybinder.org",
            "colab_url": "https://colab.research.google.com",
            "notebook_interface": "jupyterlab",
        },
    }


def configure(app: Sphinx, config: Config) -> None:
    config.html_baseurl = site_address(os.environ)
    config.html_theme_options.update(repository(os.environ))


# --------------------------------------------------------- about each page

LONGEST = 160  # what search engines show


def description(doctree: nodes.document) -> str:
    """Return the first paragraph of a page, cut at the end of a word."""
    for paragraph in doctree.findall(nodes.paragraph):
        if isinstance(paragraph.parent, nodes.section):
            copy = paragraph.deepcopy()
            for formula in list(copy.findall(nodes.math)):
                formula.replace_self(nodes.Text(plain(formula.astext())))
            said = " ".join(copy.astext().split())
            if len(said) <= LONGEST:
                return said
            return said[: LONGEST - 1].rsplit(" ", 1)[0] + "…"
    return ""


def plain(tex: str) -> str:
    """Return a formula as somebody would write it without TeX."""
    tex = re.sub(r"\\(?:operatorname|mathrm|text)\{(\w+)\}", r"\1", tex)
    return re.sub(r"[{}\\$]|\\[,;]", "", tex)


def describe(app, pagename, templatename, context, doctree) -> None:
    if doctree is None:
        return
    title = re.sub(r"<[^>]*>", "", context.get("title", ""))
    said = escape(description(doctree))
    tags = [
        f'<meta name="description" content="{said}">',
        f'<meta property="og:title" content="{title}">',
        f'<meta property="og:description" content="{said}">',
        '<meta property="og:type" content="article">',
        f'<meta property="og:site_name" content="{app.config.html_title}">',
    ]
    if base := app.config.html_baseurl:
        page = f"{base}{app.builder.get_target_uri(pagename)}"
        tags.append(f'<meta property="og:url" content="{page}">')
    metatags = context.get("metatags", "")
    context["metatags"] = metatags + "\n".join(["", *tags, ""])


# ------------------------------------------------------ pages of their own


def missing_page(app: Sphinx):
    """Yield the page that a server shows for an address that is not there."""
    body = (
        "<section><h1>There is no such page</h1>"
        "<p>The address may have changed, or a sign of it is missing. "
        'Try the <a href="./index.html">first page</a>, which lists the '
        'chapters, or the <a href="./search.html">search</a>.</p></section>'
    )
    context = {"title": "There is no such page", "body": body}
    yield "404", context, "page.html"


ADDRESS = re.compile(r'\b(href|src)="(?!#|[a-z]+:|//)(?:\./)?([^"]*)"')


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Write the sitemap, and make the missing page work at any depth."""
    if exception is not None or app.builder.format != "html":
        return
    out, base = Path(app.outdir), app.config.html_baseurl
    if base:
        # The page stands in for others: its links start at the root.
        root = re.sub(r"^https?://[^/]*", "", base)
        page = out / "404.html"
        text = page.read_text("utf-8")
        page.write_text(ADDRESS.sub(rf'\1="{root}\2"', text), "utf-8")
        places = sorted(map(app.builder.get_target_uri, app.env.found_docs))
        lines = [
            f"<url><loc>{escape_xml(base + p)}</loc></url>" for p in places
        ]
        sitemap = "\n".join(
            [
                '<?xml version="1.0" encoding="UTF-8"?>',
                '<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">',
                *lines,
                "</urlset>\n",
            ]
        )
        (out / "sitemap.xml").write_text(sitemap, "utf-8")


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", configure)
    app.connect("html-page-context", describe)
    app.connect("html-collect-pages", missing_page)
    app.connect("build-finished", finish, priority=960)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
