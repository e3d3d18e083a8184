"""Formulas become MathML when the book is built: the extension alone."""

import re
import sys
from pathlib import Path

import pytest
from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_ext"))
import formulas  # noqa: E402
import light_site  # noqa: E402


def text(made):
    return re.sub(r"<[^>]*>", "", made)


def test_a_transpose_and_a_prime():
    made = formulas.mathml(r"J^\top u'", display=False)
    assert "<msup><mi>J</mi><mi>⊤</mi></msup>" in made
    assert "′" in made


def test_rows_may_state_their_distance():
    tex = r"\begin{aligned}a &= 1 \\[1ex] &= [2]\end{aligned}"
    made = formulas.mathml(tex, display=True)
    assert text(made) == "a=1=[2]"
    assert made.count("<mtr>") == 2


def test_rows_without_an_environment():
    made = formulas.mathml(r"a &= 1 \\ b &= 2", display=True)
    assert made.count("<mtr>") == 2


def test_a_text_keeps_its_spaces():
    made = formulas.mathml(r"a \text{ if } b", display=False)
    assert text(made) == "a\N{NO-BREAK SPACE}if\N{NO-BREAK SPACE}b"


@pytest.mark.parametrize(
    ("tex", "parts"),
    [
        ("p_i = 0.5", ["p_i = 0.5"]),  # short: whole
        (
            r"\log p_i = z_i - \operatorname{LSE}(z) \le 0",
            [r"\log p_i =", r" z_i - \operatorname{LSE}(z) \le ", "0"],
        ),
        (
            r"f(a = b, c = d) = \left(x = \frac{y = 1}{2}\right) + 123456",
            [
                r"f(a = b, c = d) =",
                r" \left(x = \frac{y = 1}{2}\right) + 123456",
            ],
        ),
        # a long side breaks after its signs, but not after that of a number
        ("x = -a_1 - b_1", ["x = -a_1 - b_1"]),
        (
            "x = -aaaaaaaa + bbbbbbbb - cccc",
            ["x =", " -aaaaaaaa +", " bbbbbbbb -", " cccc"],
        ),
        # a very long list breaks inside its brackets
        (
            "x = (111.111, 222.222, 333.333, 444.444, 555.555)",
            [
                "x =",
                " (111.111,",
                " 222.222,",
                " 333.333,",
                " 444.444,",
                " 555.555)",
            ],
        ),
        (
            "a_1, a_2, a_3, a_4, a_5, 10,000,000",
            ["a_1,", " a_2,", " a_3,", " a_4,", " a_5,", " 10,000,000"],
        ),
    ],
)
def test_where_a_line_may_break(tex, parts):
    expected = [
        formulas.mathml(
            part if part is parts[-1] else part + "{}", display=False
        )
        for part in parts
    ]
    assert formulas.inline(tex) == expected


# ------------------------------------------------------------- in a document


@pytest.fixture
def page(tmp_path):
    """A function from reStructuredText to the page, and the warnings."""
    import io

    def build(source):
        (tmp_path / "index.rst").write_text(source, "utf-8")
        warnings = io.StringIO()
        app = Sphinx(
            str(tmp_path),
            None,
            str(tmp_path / "out"),
            str(tmp_path / "doctrees"),
            "html",
            confoverrides={
                "extensions": "formulas",
                "html_math_renderer": "mathml",
                "html_theme": "basic",
            },
            status=None,
            warning=warnings,
        )
        app.build()
        html = (tmp_path / "out" / "index.html").read_text("utf-8")
        return html, warnings.getvalue()

    return build


@pytest.mark.parametrize(
    "tex", [r"\frac{1}{", r"\nosuchthing x", r"x_1^", r"\left( x"]
)
def test_broken_tex_is_a_warning(tex, page):
    _, warnings = page(f"Title\n=====\n\nIt is :math:`{tex}` here.\n")
    assert "broken formula" in warnings
    assert "index.rst:4" in warnings


def test_punctuation_stays_with_its_formula(page):
    html, warnings = page(
        "Title\n=====\n\n"
        "A (:math:`x`), a :math:`y`-axis; :math:`z`. *And* :math:`w`\n"
    )
    assert "formula" not in warnings
    shown = re.findall(r'<span class="math">(.*?)</span>', html)
    assert [text(s) for s in shown] == ["(x),", "y-", "z.", "w"]
    # Nothing is lost or said twice.
    assert "A (x), a y-axis; z. And w" in text(html)


def test_a_display_has_its_number_and_its_box(page):
    html, warnings = page(
        "Title\n=====\n\n.. math:: a < b\n   :label: eq\n\nSee :eq:`eq`.\n"
    )
    assert "formula" not in warnings
    assert re.search(
        r'<div class="math" id="equation-eq">.*\(1\).*'
        r'<div class="display"><math display="block">.*</math></div></div>',
        html,
        re.DOTALL,
    )


# ------------------------------------------------------------------ the font


def test_the_font_has_each_sign_and_its_slanted_twin(tmp_path):
    from fontTools.ttLib import TTFont

    formula = formulas.mathml(
        r"h_\theta = \sum_{k \in \mathbb{R}} \partial\varepsilon",
        display=True,
    )
    light_site.cut_math_font(tmp_path, {None: f"<p>ж</p>{formula}"})
    file = tmp_path / "math.woff2"
    known = set(TTFont(file).getBestCmap())
    for sign in "=∑∈ℝ∂𝜕ℎ𝜃𝑘ε𝜀":
        assert ord(sign) in known, sign
    assert ord("ж") not in known
    assert ord("⨌") not in known
    assert file.stat().st_size < 60_000


def test_a_sign_without_a_font_stops_the_build(tmp_path):
    with pytest.raises(Exception, match="no font for 中"):
        light_site.cut_math_font(tmp_path, {None: "<math>中</math>"})
