"""Sphinx extension of this book: what the site needs beyond its theme.

* Ids that the extensions write more than once are removed, a deprecated ARIA
  role is replaced, and labels that hide the visible words from speech input
  are dropped, so that the pages are valid and accessible.
* In tables long names in code may break after a dot, an underscore or a
  bracket, so that they need not break within a word on a phone.
* Statements and exercises have links to themselves, as sections have, and the
  footer leads to the list of statements and the index of names.
* Columns of numbers are told from columns of words.
* A claim that the book refutes (label ``false-...``) and a proof get classes
  of their own, for ``_static/softmax.css``.
"""

import re

from docutils import nodes
from sphinx.application import Sphinx

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


# The corner of a table heads nothing.
CORNER = re.compile(r"<th([^>]*)>(?:<p></p>)?</th>")


# The title of a statement or of an exercise.
BOX = re.compile(
    r'(<div class="(?:proof|exercise)[^"]*" id="([^"]+)">\s*'
    r'<p class="admonition-title">.*?)(</p>)',
    re.DOTALL,
)
PERMALINK = (
    r'\1<a class="headerlink" href="#\2" title="Link to this">#</a>\3'
)


def add_lists(context: dict) -> None:
    """Let the footer of each page lead to the lists of the book."""
    pathto = context["pathto"]
    context["theme_extra_footer"] = (
        f'<p><a href="{pathto("prf-prf")}">All statements</a>, '
        f'<a href="{pathto("genindex")}">index of names</a></p>'
        + context.get("theme_extra_footer", "")
    )


def breakable(cell: re.Match) -> str:
    """A cell of a table whose code may break between words."""
    return CODE_WORD.sub(
        lambda word: word[1] + BREAK.sub("<wbr>", word[2]), cell[0]
    )


def mend_page(app, pagename, templatename, context, doctree) -> None:
    """Drop repeated ids and deprecated roles; add links."""
    if app.builder.name == "html":
        add_lists(context)
    if "body" in context:
        body = REPEATED_ID.sub("", context["body"])
        body = body.replace('role="doc-biblioentry"', 'role="listitem"')
        body = BOX.sub(PERMALINK, body)
        body = CORNER.sub(r"<td\1></td>", body)
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


NUMBER = re.compile(
    r"[-−+±~<≤]?\s*[\d.,]+(e[-+]?\d+)?\s*(%|x|×|ms|µs|us|s)?"
)


def mark_numbers(app: Sphinx, doctree: nodes.document) -> None:
    """Give the cells of a column that holds numbers only their class."""
    for table in doctree.findall(nodes.tgroup):
        rows = [row.children for row in table.findall(nodes.row)]
        head = sum(len(part) for part in table.findall(nodes.thead))
        for column in zip(*rows, strict=False):
            said = [entry.astext().strip() for entry in column[head:]]
            filled = [s for s in said if s and s != "–"]
            if filled and all(NUMBER.fullmatch(s) for s in filled):
                for entry in column:
                    entry["classes"].append("number")


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", mark_statements)
    app.connect("doctree-read", mark_numbers)
    app.connect("html-page-context", mend_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
