"""Checks are folded to their verdict: the extension on a small notebook."""

import re

import nbformat
import pytest
from nbformat import v4
from sphinx.application import Sphinx
from test_book import ROOT

from softmaxlib.testing import Evidence

SENTENCE = (
    "attacked with 200 cases, worst deviation 3.6e-15 of 1e-14 allowed"
)


def result(value):
    data = value._repr_mimebundle_()
    return v4.new_output("execute_result", data, execution_count=1)


def cell(source, *outputs, tags=(), **metadata):
    return v4.new_code_cell(
        source,
        outputs=list(outputs),
        execution_count=1,
        metadata=metadata | ({"tags": list(tags)} if tags else {}),
    )


def check(*outputs, source="assert 1 < 2", label="thm-order"):
    tags = [f"checks:{label}", "hide-input"]
    return cell(source, *outputs, tags=tags)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A function from cells to the page that they become."""
    monkeypatch.syspath_prepend(ROOT / "_ext")

    def build(*cells, builder="html"):
        title = v4.new_markdown_cell("# A page")
        notebook = v4.new_notebook(
            cells=[title, *cells],
            metadata={
                "kernelspec": {"name": "python3", "display_name": ""}
            },
        )
        source = tmp_path / "source"
        source.mkdir()
        nbformat.write(notebook, source / "index.ipynb")
        app = Sphinx(
            str(source),
            None,
            str(tmp_path / "out"),
            str(tmp_path / "doctrees"),
            builder,
            confoverrides={
                "extensions": "myst_nb,folded_cells",
                "nb_execution_mode": "off",
                "html_theme": "basic",
                "suppress_warnings": "mystnb.lexer",
            },
            status=None,
        )
        app.build()
        suffix = {"html": "html", "text": "txt"}[builder]
        return (tmp_path / "out" / f"index.{suffix}").read_text("utf-8")

    return build


def folds(html):
    """The (summary, content) of each folded check."""
    pattern = (
        r'<details class="check"><summary>(.*?)</summary>(.*?)</details>'
    )
    return re.findall(pattern, html, re.DOTALL)


ATTACKED = Evidence("thm-order", 200, 3.6e-15, 1e-14)


def test_a_check_is_folded_to_its_verdict(page):
    [(said, content)] = folds(page(check(result(ATTACKED))))
    assert said == f"✓ {SENTENCE}"
    # It opens to the code and what it printed.
    assert "assert" in content
    assert "cell_input" in content
    assert f"thm-order: {SENTENCE}" in content


def test_prints_and_pictures_stay_inside(page):
    printed = v4.new_output("stream", name="stdout", text="said aloud\n")
    [(_, content)] = folds(page(check(printed, result(ATTACKED))))
    assert "said aloud" in content


def test_two_pieces_of_evidence_are_one_line(page):
    listed = Evidence("thm-order", 1, how="enumeration")
    [(said, _)] = folds(page(check(result(ATTACKED), result(listed))))
    assert said == f"✓ {SENTENCE}; then tried on 1 case, none against it"


def test_a_check_without_evidence_claims_no_more_than_it_knows(page):
    [(said, _)] = folds(page(check()))
    assert said == "✓ every assertion of this cell held"


def test_a_note_is_text_not_markup(page):
    evidence = Evidence("thm-order", 3, note="a < b & <b>bold</b>")
    [(said, _)] = folds(page(check(result(evidence))))
    assert said.endswith("; a &lt; b &amp; &lt;b&gt;bold&lt;/b&gt;")


def test_evidence_elsewhere_is_a_sentence_and_stays_open(page):
    html = page(
        cell("evidence", result(ATTACKED)),
        cell("evidence", result(ATTACKED), tags=["checks:thm-order"]),
    )
    assert folds(html) == []
    assert html.count(f"<p>✓ {SENTENCE}</p>") == 2


def test_the_other_folds_say_what_they_hold(page):
    html = page(
        cell("import math\nfrom torch import nn", tags=["hide-input"]),
        cell("draw()", tags=["figure", "hide-input"]),
        cell("x = 1", tags=["hide-input"]),
        cell(
            "import os",
            tags=["hide-input"],
            mystnb={"code_prompt_show": "In plain PyTorch"},
        ),
        cell("import sys"),
    )
    said = re.findall(r'<p class="collapsed[^>]*>(.*?)</p>', html)
    assert said[:2] == ["Imports", "Code of the figure"]
    assert said[2].startswith("Show code")
    assert len(said) == 4
    assert said[3] == "In plain PyTorch"


def test_other_formats_show_the_code(page):
    text = page(check(result(ATTACKED)), builder="text")
    assert "assert 1 < 2" in text
    assert SENTENCE in text


@pytest.mark.parametrize(
    ("evidence", "said"),
    [
        (ATTACKED, f"thm-order: {SENTENCE}"),
        (
            Evidence("thm-a", 1000, how="enumeration", note="K to 5"),
            "thm-a: tried on 1,000 cases, none against it; K to 5",
        ),
        (
            Evidence("thm-a", 1, 0.0, 0, how="construction"),
            "thm-a: tried on 1 case, worst deviation 0 of 0 allowed",
        ),
        (
            Evidence("thm-a", 2, 0.5),
            "thm-a: attacked with 2 cases, worst deviation 0.5",
        ),
    ],
)
def test_what_evidence_says(evidence, said):
    assert str(evidence) == said


# ---------------------------------------------------------------- the tags


@pytest.fixture
def tidied(tmp_path, monkeypatch):
    """A function from cells to the cells that `make tidy` leaves."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    from tidy_notebooks import tidy

    def run(*cells, name="06_test.ipynb"):
        path = tmp_path / name
        nbformat.write(v4.new_notebook(cells=list(cells)), path)
        assert tidy(path)
        assert not tidy(path), "once is enough"
        return nbformat.read(path, as_version=4).cells

    return run


def test_tidy_tags_what_is_folded(tidied):
    picture = {"figure": {"name": "fig-x"}}
    found = tidied(
        v4.new_markdown_cell("import nothing"),
        cell("import math\n\nmath.pi"),
        cell("x = 1  # an import or\nimportant = from_here = 2"),
        cell("assert x", tags=["checks:thm-x"]),
        cell("draw()", tags=["hide-input", "figure"], mystnb=picture),
        cell("x", tags=["shows:false-x"]),
        cell("y", mystnb=picture),
    )
    assert [c.metadata.get("tags", []) for c in found] == [
        [],
        ["hide-input"],
        [],
        ["checks:thm-x", "hide-input"],
        ["figure", "hide-input"],
        ["shows:false-x"],
        [],
    ]
    assert found[4].metadata["mystnb"] == picture
    assert not any(c.get("outputs") for c in found)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("06_test.ipynb", "06-001"),
        ("how_to_read.ipynb", "how-to-read-001"),
        ("symptoms.ipynb", "symptoms-001"),
    ],
)
def test_ids_come_from_the_name(tidied, name, first):
    assert tidied(cell("x"), name=name)[0].id == first
