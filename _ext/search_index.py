"""Sphinx extension of this book: a search that finds what the book says.

* Theorems, definitions and claims are results of their own, by their titles.
* TeX, code and what it printed are not searched, and a title is written as
  one would read it.

What a result shows of its page is chosen by ``_static/search_snippets.js``.
"""

from docutils import nodes
from site_links import plain
from sphinx.application import Sphinx


def statements(doctree: nodes.document) -> list[tuple[str, str]]:
    """Return title and id of each numbered statement."""
    found = []
    for node in doctree.findall(nodes.Element):
        title = node.get("title")
        if node.get("label") and node["ids"] and "realtype" in node:
            named = f"{node['realtype'].title()}: {title or node['label']}"
            found.append((plain(named.replace("$", "")), node["ids"][0]))
    return found


def searched(doctree: nodes.document) -> nodes.document:
    """Return what of a page is searched."""
    copy = doctree.deepcopy()
    for title in copy.findall(nodes.title):
        for formula in list(title.findall(nodes.math)):
            formula.replace_self(nodes.Text(plain(formula.astext())))
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
        titles = app.builder.indexer._all_titles.get(pagename)
        if titles is not None:
            titles.extend(statements(doctree))

    app.builder.index_page = index_page


def setup(app: Sphinx) -> dict:
    app.connect("builder-inited", improve_index)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
