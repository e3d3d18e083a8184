"""Sphinx extension of this book: a search that finds what the book says.

* Theorems, definitions and claims are results of their own, by their titles.
* TeX, code and what it printed are not searched, and a title is written as
  one would read it.

What a result shows of its page is chosen by ``_static/search_snippets.js``.
"""

from collections.abc import Iterator
from typing import ClassVar

from docutils import nodes
from site_links import plain
from sphinx.application import Sphinx
from sphinx.domains import Domain, ObjType

KINDS = ("theorem", "lemma", "proposition", "corollary", "definition")
KINDS += (
    "remark",
    "example",
    "algorithm",
    "conjecture",
    "axiom",
    "property",
)


class Statements(Domain):
    """What the search knows about the statements of the book."""

    name = "statement"
    label = "Statement"
    object_types: ClassVar = {kind: ObjType(kind) for kind in KINDS}
    initial_data: ClassVar = {"found": {}}  # page: [(kind, title, id)]

    def clear_doc(self, docname: str) -> None:
        self.data["found"].pop(docname, None)

    def merge_domaindata(self, docnames, otherdata) -> None:
        self.data["found"] |= {
            name: otherdata["found"].get(name, []) for name in docnames
        }

    def get_type_name(self, type: ObjType, primary: bool = False) -> str:
        return type.lname

    def get_objects(self) -> Iterator[tuple]:
        for docname, found in self.data["found"].items():
            for kind, title, place in found:
                # A dot would end the name of a module.
                name = title.replace(".", "\N{ONE DOT LEADER}")
                yield name, name, kind, docname, place, 0


def is_statement(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Element) and node.get("realtype") in KINDS


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Note the titled statements of a page."""
    found = []
    for node in doctree.findall(is_statement):
        title = str(node.get("title") or "").strip().strip("()")
        if title and node["ids"]:
            title = plain(title.replace("$", ""))
            found.append((node["realtype"], title, node["ids"][0]))
    domain = app.env.get_domain(Statements.name)
    domain.data["found"][app.env.docname] = found


def searched(doctree: nodes.document) -> nodes.document:
    """Return what of a page is searched."""
    copy = doctree.deepcopy()
    for title in list(copy.findall(nodes.title)):
        for formula in list(title.findall(nodes.math)):
            formula.replace_self(nodes.Text(plain(formula.astext())))
        if is_statement(title.parent):  # a result as a statement already
            said = nodes.paragraph("", title.astext())
            title.replace_self(said)
    unsaid = (nodes.literal_block, nodes.math, nodes.math_block)
    for node in list(copy.findall(lambda n: isinstance(n, unsaid))):
        node.parent.remove(node)
    return copy


def improve_index(app: Sphinx) -> None:
    if app.builder.name != "html":
        return
    index = app.builder.index_page

    def index_page(pagename, doctree, title):
        index(pagename, searched(doctree), title)

    app.builder.index_page = index_page


def setup(app: Sphinx) -> dict:
    app.add_domain(Statements)
    app.connect("doctree-read", collect)
    app.connect("builder-inited", improve_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
