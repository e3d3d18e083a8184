"""Sphinx extension of this book: what the site needs beyond its theme.

* The mathematics is served by the site itself: MathJax is copied out of the
  ``sphinx-mathjax-offline`` wheel, the parts that a page can ask for only.
* The script of sphinx-thebe is dropped: it names a third-party host, it is
  declared twice, and the book has no live kernel.
* Ids that the extensions write more than once are removed, a deprecated ARIA
  role is replaced, and labels that hide the visible words from speech input
  are dropped, so that the pages are valid and accessible.
* In tables long names in code may break after a dot, an underscore or a
  bracket, so that they need not break within a word on a phone.
* A claim that the book refutes (label ``false-...``) and a proof get classes
  of their own, for ``_static/softmax.css``.
* A broken formula is an error: MathJax shows it in red in the browser and
  says nothing at build time, so ``tests/test_site.py`` looks for it.
"""

import re
from importlib.metadata import distribution
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.fileutil import copy_asset

# What a page loads: the bundle, its fonts, and what the bundle fetches on
# demand: TeX extensions, and the reader for screen-reader users.
MATHJAX_PARTS = (
    "tex-chtml.js",
    "output/chtml/fonts/woff-v2",
    "input/tex/extensions",
    "a11y",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
)

# sphinx-proof and sphinx-exercise give every box of a page the same id.
REPEATED_ID = re.compile(
    r' id="(?:proof|proof-content|exercise-content|solution-content)"'
)


# The words of code in a table, and where a long one may break.
TABLE_CELL = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)
CODE_WORD = re.compile(r'(<span class="pre">)([^<]+)(?=</span>)')
BREAK = re.compile(r"(?<=[._(])(?=[A-Za-z])")

# sphinx-exercise puts the space into the link, where it is underlined.
SOLUTION_TITLE = re.compile(r'Solution to(<a class="[^"]*" href="[^"]*">) ')


def copy_mathjax(app: Sphinx, exception: Exception | None) -> None:
    """Copy the parts of MathJax that the pages can ask for."""
    if exception is not None or app.builder.format != "html":
        return
    wheel = distribution("sphinx-mathjax-offline")
    bundle = next(
        (f for f in wheel.files or [] if f.match("mathjax/tex-chtml.js")),
        None,
    )
    if bundle is None:
        raise ExtensionError("sphinx-mathjax-offline has no tex-chtml.js")
    source = Path(wheel.locate_file(bundle)).parent
    target = Path(app.outdir, "_static", "mathjax")
    for part in MATHJAX_PARTS:
        place = (target / part).parent if "." in part else target / part
        place.mkdir(parents=True, exist_ok=True)
        copy_asset(str(source / part), str(place))


def _is_thebe(script: object) -> bool:
    body = getattr(script, "attributes", {}).get("body") or ""
    return "thebe" in str(script).lower() or "thebe" in body.lower()


def breakable(cell: re.Match) -> str:
    """A cell of a table whose code may break between words."""
    return CODE_WORD.sub(
        lambda word: word[1] + BREAK.sub("<wbr>", word[2]), cell[0]
    )


def mend_page(app, pagename, templatename, context, doctree) -> None:
    """Drop the scripts of thebe, repeated ids and deprecated roles."""
    context["script_files"] = [
        s for s in context.get("script_files", []) if not _is_thebe(s)
    ]
    if "body" in context:
        body = REPEATED_ID.sub("", context["body"])
        body = body.replace('role="doc-biblioentry"', 'role="listitem"')
        body = SOLUTION_TITLE.sub(r"Solution to \1", body)
        body = body.replace(
            '<summary aria-label="Toggle hidden content">', "<summary>"
        )
        body = TABLE_CELL.sub(breakable, body)
        context["body"] = body


def mark_statements(app: Sphinx, doctree: nodes.document) -> None:
    """Give refuted claims and proofs their classes, and a proof its title."""
    for node in doctree.findall(nodes.Element):
        if str(node.get("label", "")).startswith("false-"):
            node["classes"].append("false-claim")
    for proof in doctree.findall(nodes.admonition):
        if proof["ids"] != ["proof"]:
            continue
        proof["classes"].append("proof-text")
        # sphinx-proof writes the word into the first line as plain text.
        text = next(iter(proof.findall(nodes.Text)), None)
        if text is not None and text.startswith("Proof. "):
            parent = text.parent
            at = parent.index(text)
            parent[at] = nodes.Text(text[len("Proof.") :])
            parent.insert(at, nodes.emphasis("", "Proof."))


def setup(app: Sphinx) -> dict:
    app.connect("build-finished", copy_mathjax)
    app.connect("doctree-read", mark_statements)
    # Late, so that it sees the scripts that the other extensions add.
    app.connect("html-page-context", mend_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
