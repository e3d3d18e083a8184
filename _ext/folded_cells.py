"""Sphinx extension of this book: cells that are folded to one line.

* The evidence of a check carries its facts as JSON; they become its verdict,
  a sentence such as "attacked with 200 cases, ...".
* A cell tagged ``checks:...`` and ``hide-input`` is folded to its verdict: a
  native ``<details>``, whose summary is the verdict and which opens to the
  code and what it printed. No script is needed, the keyboard opens it, its
  name is the text it shows, and ``_static/softmax.css`` prints it open.
* What else is folded says what it is: "Imports", "Code of the figure".
  Elsewhere myst-nb's own words stand.

Only pages are folded; in other formats the code stands open.
"""

import json
import re
from collections.abc import Iterator

from docutils import nodes
from myst_nb.core.render import NbElementRenderer
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.transforms.post_transforms import SphinxPostTransform

from softmaxlib.testing import Evidence

TICK = "\N{CHECK MARK}"
# What a check says that shows no evidence: a cell that fails stops the build.
WITHOUT_EVIDENCE = "every assertion of this cell held"
IMPORTS = re.compile(r"^(import|from) ", re.MULTILINE)


# ----------------------------------------------------- evidence to verdict


def show_evidence(app: Sphinx, config: Config) -> None:
    """Show the evidence of a check as a sentence, not as program output."""
    config.nb_mime_priority_overrides = [
        *config.nb_mime_priority_overrides,
        ("html", Evidence.MIME, 0),
    ]
    render = NbElementRenderer.render_mime_type

    def render_mime_type(self, data):
        if data.mime_type != Evidence.MIME:
            return render(self, data)
        facts = data.content
        if isinstance(facts, str):
            facts = json.loads(facts)
        said = verdict(Evidence(**facts))
        sentence = nodes.paragraph("", f"{TICK} {said}")
        return [
            nodes.container(
                "", sentence, classes=["evidence"], verdict=said
            )
        ]

    NbElementRenderer.render_mime_type = render_mime_type


def verdict(evidence: Evidence) -> str:
    """What the evidence says, without the label."""
    return str(evidence).removeprefix(f"{evidence.label}: ")


# --------------------------------------------------------------- the folds


class Check(nodes.General, nodes.Element):
    """A check folded to its ``verdict``."""


def visit_check(self, node: Check) -> None:
    said = self.encode(node["verdict"])
    self.body.append(f'<details class="check"><summary>{said}</summary>\n')


def depart_check(self, node: Check) -> None:
    self.body.append("</details>\n")


class FoldCells(SphinxPostTransform):
    """Fold the checks; name the other folds."""

    # Before myst-nb chooses among the formats of an output (4).
    default_priority = 3
    formats = ("html",)

    def run(self, **kwargs) -> None:
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") != "cell_code":
                continue
            if cell.get("hide_mode") != "input":
                continue
            source = cell[0].astext()
            if any(c.startswith("tag_checks:") for c in cell["classes"]):
                fold(cell)
            elif "tag_figure" in cell["classes"]:
                name(cell, "Code of the figure")
            elif IMPORTS.search(source):
                name(cell, "Imports")


def fold(cell: nodes.container) -> None:
    """Wrap a check, code and output, under its verdict."""
    said = list(take_verdicts(cell)) or [WITHOUT_EVIDENCE]
    check = Check(verdict=f"{TICK} {'; then '.join(said)}")
    check.extend(cell.children)
    cell.children = []
    cell.append(check)
    cell["classes"].append("folded-check")
    del cell["hide_mode"]  # nothing is left for myst-nb to fold


def take_verdicts(cell: nodes.container) -> Iterator[str]:
    """Yield each verdict; leave its plain text as output of the cell."""
    for shown in list(cell.findall(nodes.container)):
        if "verdict" not in shown:
            continue
        yield shown["verdict"]
        bundle = shown.parent.parent
        if len(bundle) > 1:
            bundle.remove(shown.parent)


def name(cell: nodes.container, said: str) -> None:
    """Say what a fold holds, unless the cell's metadata says it."""
    own = cell.get("cell_metadata", {}).get("mystnb", {})
    if "code_prompt_show" not in own:
        cell["prompt_show"] = cell["prompt_hide"] = said


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", show_evidence)
    app.add_node(Check, html=(visit_check, depart_check))
    app.add_post_transform(FoldCells)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
