"""Sphinx extension of this book: formulas that the browser itself draws.

* TeX becomes MathML Core when the book is built, so that no page waits for
  a script, and a screen reader finds what it knows how to read. A formula
  that is broken is a warning, hence an error of the strict build.
* STIX Two Math draws them, so that they look alike on every system. It comes
  with the package ``ziamath``, under the SIL Open Font License, and is cut to
  the signs of the book in ``light_site.py``.
* A sentence breaks neither between a formula and the punctuation that
  follows it, nor inside a short formula; a long one may break after a
  relation, and a long side of it after a sign, as in TeX.
* A display that is wider than the screen scrolls in a box of its own.

Why so: `CONTRIBUTING.md` has the measurements.
"""

import html
import re

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

LOG = logging.getLogger(__name__)
CONVERTER = LatexToMathML(fancy_error=False)

# ------------------------------------------------------------ TeX to MathML

# The distance of two rows is the style sheet's; math-core shows it as text.
ROW_DISTANCE = re.compile(r"(\\\\)\s*\[\s*-?[\d.]+\s*[a-z]{2}\s*\]")
ENVIRONMENT = re.compile(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", re.DOTALL)
# A browser drops the spaces at the ends of a text.
OUTER_SPACE = re.compile(r"(?<=<mtext>) | (?=</mtext>)")


def mathml(tex: str, *, display: bool) -> str:
    """Return the MathML of a formula."""
    tex = ROW_DISTANCE.sub(r"\1", tex)
    if r"\\" in ENVIRONMENT.sub("", tex):
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    made = CONVERTER.convert_with_local_state(tex, displaystyle=display)
    made = made.replace("&ApplyFunction;", "\N{FUNCTION APPLICATION}")
    return OUTER_SPACE.sub("\N{NO-BREAK SPACE}", made)


# --------------------------------------------------- where a line may break

TOKEN = re.compile(r"\\[a-zA-Z]+\s*|\\.|.", re.DOTALL)
BRACKETS = {"(": 1, "[": 1, r"\{": 1, ")": -1, "]": -1, r"\}": -1}
GROUPS = {"{": 1, r"\left": 1, r"\begin": 1, r"\lVert": 1, r"\lvert": 1}
GROUPS |= {
    "}": -1,
    r"\right": -1,
    r"\end": -1,
    r"\rVert": -1,
    r"\rvert": -1,
}
RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\ne", r"\neq", r"\in"}
RELATIONS |= {r"\to", r"\approx", r"\iff", r"\propto", r"\sim", r"\equiv"}
RELATIONS |= {r"\notin", r"\mapsto", r"\subseteq", r"\preceq"}
OPERATORS = {"+", "-", r"\pm", r"\cdot", r"\times"}
LONG = 16  # signs, about a third of a phone's line


def width(made: str) -> int:
    """Count the signs of a formula, roughly its width."""
    return len(re.sub(r"<[^>]*>|\s", "", made))


def pieces(tex: str, behind: set[str], brackets: int = 0) -> list[str]:
    """Split a formula behind signs in at most so many brackets."""
    found, start, groups, depth, before = [], 0, 0, 0, ""
    for match in TOKEN.finditer(tex):
        token = match[0].strip()
        groups += GROUPS.get(token, 0)
        depth += BRACKETS.get(token, 0)
        # A sign behind another one, or in front, has no left side.
        ends = before and before not in RELATIONS | OPERATORS
        ends = (
            ends and token in behind and groups == 0 and depth <= brackets
        )
        if token == ",":  # of a list, not of a large number
            ends = ends and tex[match.end() :][:1].isspace()
        if ends:
            # With nothing behind it, the sign would lose its space.
            found.append(tex[start : match.end()] + "{}")
            start = match.end()
        before = token or before
    return [p for p in (*found, tex[start:]) if p.strip()]


# How a formula is split, each way for the parts that are still too long.
WAYS = (
    (RELATIONS | {","}, 0, LONG),
    (OPERATORS, 0, LONG),
    (OPERATORS | RELATIONS | {","}, 1, 2 * LONG),
)


def inline(tex: str) -> list[str]:
    """Return the parts of a formula in a line, between which it breaks."""
    parts = [(tex, mathml(tex, display=False))]
    for behind, brackets, longest in WAYS:
        split = []
        for part, made in parts:
            if width(made) <= longest:
                split.append((part, made))
                continue
            try:
                split += [
                    (p, mathml(p, display=False))
                    for p in pieces(part, behind, brackets)
                ]
            except LatexError:  # a delimiter that closes in another part
                split.append((part, made))
        parts = split
    return [made for _, made in parts]


class HoldPunctuation(SphinxPostTransform):
    """Move the punctuation around a formula into it."""

    default_priority = 900
    formats = ("html",)

    BEFORE = re.compile(r"[(\[“‘\"]+$")
    AFTER = re.compile(r"^[.,;:!?)\]”’\"…]+|^-(?=\w)")

    def run(self, **kwargs) -> None:
        for formula in list(self.document.findall(nodes.math)):
            for side, pattern in (
                ("before", self.BEFORE),
                ("after", self.AFTER),
            ):
                at = formula.parent.index(formula)
                at += 1 if side == "after" else -1
                if not 0 <= at < len(formula.parent):
                    continue
                text = formula.parent[at]
                if not isinstance(text, nodes.Text):
                    continue
                if held := pattern.search(text):
                    formula[side] = held[0]
                    formula.parent[at] = nodes.Text(pattern.sub("", text))


# ------------------------------------------------------------ into the page


def broken(node: nodes.Element, error: LatexError) -> str:
    LOG.warning(
        "broken formula: %s in %s", error, node.astext(), location=node
    )
    return f"<code>{html.escape(node.astext())}</code>"


def visit_math(self, node: nodes.math) -> None:
    try:
        parts = inline(node.astext())
    except LatexError as error:
        parts = [broken(node, error)]
    parts[0] = self.encode(node.get("before", "")) + parts[0]
    parts[-1] += self.encode(node.get("after", ""))
    for part in parts:
        self.body.append(f'<span class="math">{part}</span>')
        if part is not parts[-1]:
            self.body.append("<wbr>")
    raise nodes.SkipNode


def visit_display(self, node: nodes.math_block) -> None:
    try:
        made = mathml(node.astext(), display=True)
    except LatexError as error:
        made = broken(node, error)
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node["number"]:
        number = get_node_equation_number(self, node)
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(f'<div class="display">{made}</div></div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict:
    app.add_html_math_renderer(
        "mathml", (visit_math, None), (visit_display, None)
    )
    app.add_post_transform(HoldPunctuation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
