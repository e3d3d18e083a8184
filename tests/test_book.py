"""The rules of the book, one small test each.

They read the notebooks as they are committed and run nothing: a broken rule
is reported in a second, with the cell that breaks it.
"""

import ast
import json
import re
import symtable
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import softmaxlib

ROOT = Path(__file__).resolve().parent.parent
# Front matter may be a notebook, too; it has no chapter's skeleton.
NOTEBOOKS = sorted((ROOT / "chapters").glob("*.ipynb"))
CHAPTERS = [n for n in NOTEBOOKS if re.match(r"\d\d_", n.name)]
KERNEL = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}
IMPORTS = re.compile(r"^(import|from) ", re.M)
STATEMENTS = {"theorem", "lemma", "proposition", "corollary"}

each_chapter = pytest.mark.parametrize(
    "chapter", CHAPTERS, ids=[c.stem for c in CHAPTERS]
)
each_notebook = pytest.mark.parametrize(
    "chapter", NOTEBOOKS, ids=[n.stem for n in NOTEBOOKS]
)


# ------------------------------------------------------------- how to read


@cache
def notebook(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(path, kind=None):
    """Yield (id, source, cell) for the cells of a kind, or for all."""
    for cell in notebook(path)["cells"]:
        if kind in (None, cell["cell_type"]):
            yield cell["id"], "".join(cell["source"]), cell


def prose(path):
    return "\n\n".join(source for _, source, _ in cells(path, "markdown"))


def tags(cell):
    return cell["metadata"].get("tags", [])


def directives(text, pattern):
    """Yield (name, argument, options) for each directive of a page."""
    found = re.finditer(
        rf"^:::+ ?{{({pattern})}} *(.*)\n((?::[\w-]+:.*\n?)*)", text, re.M
    )
    for name, argument, block in (match.groups() for match in found):
        options = dict(re.findall(r"^:([\w-]+): *(.*?) *$", block, re.M))
        yield name, argument.strip(), options


def statements(path):
    """Yield (kind, label) of everything in a box of sphinx-proof."""
    for name, _, options in directives(prose(path), r"prf:[\w-]+"):
        yield name.removeprefix("prf:"), options.get("label", "")


def promised(path):
    """Yield the labels of the sentences that promise something."""
    yield from re.findall(r"^\((prm-[\w-]+)\)=$", prose(path), re.M)


def labels_in_tags(path, prefix):
    return [
        tag.removeprefix(prefix)
        for _, _, cell in cells(path, "code")
        for tag in tags(cell)
        if tag.startswith(prefix)
    ]


def listed_files():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    yield toc["root"]
    for part in toc["parts"]:
        for entry in part["chapters"]:
            yield entry["file"]


# --------------------------------------------------------------- the files


def test_the_table_of_contents_lists_every_page_once():
    listed = Counter(listed_files())
    pages = {
        str(p.relative_to(ROOT).with_suffix(""))
        for suffix in ("ipynb", "md")
        for p in (ROOT / "chapters").glob(f"*.{suffix}")
    } | {"index"}
    assert set(listed) == pages
    assert max(listed.values()) == 1


@each_notebook
def test_no_outputs_are_committed(chapter):
    for id_, _, cell in cells(chapter, "code"):
        assert not cell["outputs"], f"{id_} has outputs: run `make tidy`"
        assert cell["execution_count"] is None, f"{id_}: run `make tidy`"


@each_notebook
def test_cell_ids_are_the_chapter_and_a_running_number(chapter):
    start = chapter.stem.replace("_", "-")
    if chapter in CHAPTERS:
        start = chapter.stem.split("_")[0]
    found = [id_ for id_, _, _ in cells(chapter)]
    wanted = [f"{start}-{i:03d}" for i in range(1, len(found) + 1)]
    assert found == wanted, "run `make tidy`"


@each_notebook
def test_the_kernel_is_python3(chapter):
    metadata = notebook(chapter)["metadata"]
    assert metadata["kernelspec"] == KERNEL, "run `make tidy`"
    assert set(metadata) == {"kernelspec", "language_info"}


# ------------------------------------------------------------ the skeleton


@each_chapter
def test_the_first_cell_has_title_promise_and_objectives(chapter):
    _, source, cell = next(cells(chapter))
    assert cell["cell_type"] == "markdown"
    lines = source.splitlines()
    assert lines[0].startswith("# "), "the first line is the title"
    table = [line for line in lines if line.startswith("|")]
    assert table, "the objectives table is missing"
    for head in ("You will be able to", "You need", "Minutes"):
        assert head in table[0], f"the table lacks {head!r}"
    promise = source.split("|")[0].splitlines()[1:]
    assert any(line.strip() for line in promise), "the promise is missing"


@each_notebook
def test_imports_are_in_one_cell_the_first_of_code(chapter):
    code = list(cells(chapter, "code"))
    found = [id_ for id_, source, _ in code if IMPORTS.search(source)]
    assert found == [code[0][0]]
    if chapter in CHAPTERS:
        assert found == [list(cells(chapter))[1][0]]


@each_notebook
def test_there_is_one_title(chapter):
    assert len(re.findall(r"^# ", prose(chapter), re.M)) == 1


@each_chapter
def test_the_last_sections_are_showed_and_next(chapter):
    headings = re.findall(r"^## (.*)$", prose(chapter), re.M)
    assert headings[-3:] == [
        "Exercises",
        "What this chapter showed",
        "Next",
    ]
    showed = prose(chapter).split("## What this chapter showed")[1]
    bullets = re.findall(r"^[-*] ", showed.split("## Next")[0], re.M)
    assert len(bullets) == 3, "three lines say what the chapter showed"


# ------------------------------------------------------------ two readings

WORDS, LINES = 1500, 120  # of a first reading
WORD = re.compile(r"[A-Za-z][\w'-]*")
FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$]+\$", re.S)
UNCOUNTED = re.compile(r"prf:proof|exercise|solution")


def first_reading(found):
    """Yield (kind, text, tags) of the cells down to the heading Further."""
    for _, source, cell in found:
        text = source
        if cell["cell_type"] == "markdown":
            text = re.split(r"^#+ Further", source, maxsplit=1, flags=re.M)[
                0
            ]
        yield cell["cell_type"], text, tags(cell)
        if text != source:
            return


def without_blocks(text, kind):
    """The text without the boxes (``:::`` to ``:::``) of a kind."""
    kept, until = [], 0
    for line in text.splitlines():
        fence = re.match(r"(:{3,}|`{3,}) *(?:\{([\w:-]+)\})?", line)
        depth = len(fence[1]) if fence else 0
        if until:
            if depth >= until and not fence[2]:
                until = 0
        elif fence and fence[2] and kind.match(fence[2]):
            until = depth
        else:
            kept.append(line)
    return "\n".join(kept)


def count_words(found):
    """Words of a first reading, outside formulas, proofs and exercises."""
    read = first_reading(found)
    text = "\n".join(text for kind, text, _ in read if kind == "markdown")
    text = FORMULA.sub(" ", without_blocks(text, UNCOUNTED))
    return len(WORD.findall(text))


def count_lines(found):
    """Lines of code that stand open in a first reading."""
    return sum(
        bool(line.strip())
        for kind, text, marks in first_reading(found)
        if kind == "code" and not {"hide-input", "figure"} & set(marks)
        for line in text.splitlines()
    )


def markdown(source):
    return "", source, {"cell_type": "markdown", "metadata": {}}


def code(source, *marks):
    metadata = {"tags": list(marks)}
    return "", source, {"cell_type": "code", "metadata": metadata}


@each_chapter
def test_a_chapter_has_two_readings(chapter):
    headings = re.findall(r"^#+ Further.*$", prose(chapter), re.M)
    assert headings == ["## Further"]


@each_chapter
def test_the_first_reading_is_short(chapter):
    found = list(cells(chapter))
    words, lines = count_words(found), count_lines(found)
    assert words <= WORDS, f"{words} words before Further"
    assert lines <= LINES, f"{lines} open lines of code before Further"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("One two, **three**; it's well-known.", 5),
        ("A $b + c$ d\n\n$$\ne = f\n$$\n\ng", 3),
        ("a\n\n## Further\n\nb c d", 1),
        ("a\n\n:::{prf:proof}\nb c\n:::\n\nd", 2),
        ("a\n\n::::{solution} ex-a\n:::{note}\nb\n:::\nc\n::::\nd", 2),
        (":::{prf:theorem} Two words\nare counted\n:::", 6),
        ("1 2 3", 0),
    ],
)
def test_words_are_counted(source, words):
    assert count_words([markdown(source)]) == words


def test_lines_are_counted():
    assert count_lines([code("a = 1\n\n\nb = 2\n")]) == 2
    folded = [code("a", "checks:thm-a", "hide-input"), code("b", "figure")]
    assert count_lines([*folded, code("c")]) == 1
    further = markdown("## Further")
    assert count_lines([code("a"), further, code("b\nc")]) == 1


def sections_without_point(text, level):
    """Yield the headings of a level that are not followed by bold."""
    exempt = {"Exercises", "What this chapter showed", "Next"}
    parts = re.split(rf"^{level} (.*)$", text, flags=re.M)[1:]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        if heading not in exempt and not body.strip().startswith("**"):
            yield heading


def further(text):
    """What stands between the headings Further and Exercises."""
    after = re.split(r"^## Further$", text, maxsplit=1, flags=re.M)[1:]
    return re.split(r"^## Exercises$", "".join(after), flags=re.M)[0]


@each_chapter
def test_every_section_opens_with_its_point_in_bold(chapter):
    assert list(sections_without_point(prose(chapter), "##")) == []
    deeper = further(prose(chapter))
    assert list(sections_without_point(deeper, "###")) == []


def test_the_guard_of_points_works():
    good = "## Further\n\n**All.**\n\n### One\n\n**It is.**\n\n### Two"
    assert list(sections_without_point(good, "##")) == []
    assert list(sections_without_point(further(good), "###")) == ["Two"]
    assert list(sections_without_point("## A\n\nb", "##")) == ["A"]
    rest = f"{good}\n\n**b**\n\n## Exercises\n\n### Three\n\nc"
    assert list(sections_without_point(further(rest), "###")) == []
    assert further("## Exercises\n\n### One") == ""


# ------------------------------------------------------------------- folds


def is_check(cell):
    return any(tag.startswith("checks:") for tag in tags(cell))


def unfolded(found):
    """Yield the cells that stand open and should be folded."""
    for id_, source, cell in found:
        if cell["cell_type"] != "code" or "hide-input" in tags(cell):
            continue
        if (
            is_check(cell)
            or "figure" in tags(cell)
            or IMPORTS.search(source)
        ):
            yield id_ or source


@each_notebook
def test_checks_figures_and_imports_are_folded(chapter):
    assert list(unfolded(cells(chapter))) == [], "run `make tidy`"


def folded_in_one_place(found):
    """Yield the cells that the site folds and JupyterLab not, or reverse."""
    for id_, source, cell in found:
        hidden = cell["metadata"].get("jupyter", {}) == {
            "source_hidden": True
        }
        if hidden != ("hide-input" in tags(cell)):
            yield id_ or source


@each_notebook
def test_jupyterlab_folds_what_the_site_folds(chapter):
    assert list(folded_in_one_place(cells(chapter))) == [], (
        "run `make tidy`"
    )


@each_notebook
def test_a_folded_cell_says_on_its_first_line_what_it_is(chapter):
    for id_, source, cell in cells(chapter, "code"):
        first = source.splitlines()[0]
        if is_check(cell):
            labels = [t.removeprefix("checks:") for t in tags(cell)]
            wanted = f"# The check of {', '.join(labels[:-1])}"
        elif "figure" in tags(cell):
            wanted = "# Code of the figure"
        elif IMPORTS.search(source):
            wanted = "# Imports"
        else:
            continue
        assert first == wanted, f"{id_}: run `make tidy`"


def test_the_guard_of_both_folds_works():
    def both(source, hidden, *marks):
        made = code(source, *marks)
        made[2]["metadata"] |= {"jupyter": {"source_hidden": hidden}}
        return made

    bad = [
        code("a", "hide-input"),
        both("b", True),
        both("c", False, "hide-input"),
    ]
    assert list(folded_in_one_place(bad)) == ["a", "b", "c"]
    good = [both("a", True, "hide-input"), code("b"), markdown("c")]
    assert list(folded_in_one_place(good)) == []


def test_the_guard_of_folds_works():
    bad = [code("import a"), code("b", "figure"), code("c", "checks:thm-c")]
    assert list(unfolded(bad)) == ["import a", "b", "c"]
    good = [
        markdown("import a"),
        code("import a", "hide-input"),
        code("b", "figure", "hide-input"),
        code("c", "checks:thm-c", "hide-input"),
        code("d", "shows:false-d"),
        code("e"),
    ]
    assert list(unfolded(good)) == []


def names(source):
    """The names that a cell takes from cells above it, and those it binds.

    A name that a cell binds itself is not taken from above.
    """
    top = symtable.symtable(source, "cell", "exec")
    bound = {s.get_name() for s in top.get_symbols() if is_bound(s)}
    loaded, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        loaded |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (table is top or s.is_global())
        }
    return loaded - bound, bound


def is_bound(symbol):
    return symbol.is_assigned() or symbol.is_imported()


def evidence(source):
    """The names of the evidence in a cell: nothing is computed with it."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            if any(
                "attack(" in ast.unparse(d) for d in node.decorator_list
            ):
                yield node.name
        elif isinstance(node, ast.Assign):
            value = ast.unparse(node.value)
            if value.startswith("enumerate_cases("):
                yield from map(ast.unparse, node.targets)


def needed_from_checks(found):
    """Yield (cell, name, check): what a cell uses of a folded check."""
    origin = {}
    for id_, source, cell in found:
        if cell["cell_type"] != "code":
            continue
        used, bound = names(source)
        for name in sorted(used & origin.keys()):
            if origin[name] is not None:
                yield id_, name, origin[name]
        shown = bound - set(evidence(source))
        origin |= dict.fromkeys(shown, id_ if is_check(cell) else None)


@each_notebook
def test_nothing_that_is_needed_is_defined_in_a_folded_check(chapter):
    assert list(needed_from_checks(cells(chapter))) == []


@pytest.mark.parametrize(
    ("check", "later", "needed"),
    [
        ("a = 1", "a + 1", {"a"}),
        ("def f(): pass", "[f() for _ in range(3)]", {"f"}),
        ("for a in b: pass", "def g():\n    return a", {"a"}),
        ("with f() as a: pass", "lambda x: a", {"a"}),
        ("a, (b, c) = d", "b", {"b"}),
        ("if (a := 1): pass", "a", {"a"}),
        ("a = 1", "a = 2\na", set()),
        ("a = 1", "def f(a):\n    return a", set()),
        ("a = 1", "def f():\n    a = 2\n    return a", set()),
        ("a = 1", "[a for a in range(3)]", set()),
        ("a = 1", "b.a", set()),
        ("def f():\n    a = 1", "a", set()),
        ("@attack('thm-a')\ndef found(z): pass", "found.cases", set()),
        ("found = enumerate_cases('thm-a', c, d)", "found", set()),
        ("@cache\ndef f(): pass", "f()", {"f"}),
        ("a = 1", "def a(): pass\na()", set()),
    ],
)
def test_the_guard_of_what_is_needed_works(check, later, needed):
    cells = [code(check, "checks:thm-a"), code(later)]
    assert {name for _, name, _ in needed_from_checks(cells)} == needed
    # An open cell between the two gives the name again.
    fresh = code("\n".join(f"{name} = 0" for name in needed))
    assert not list(needed_from_checks([cells[0], fresh, cells[1]]))
    # What is open may be used.
    assert not list(needed_from_checks([code(check), code(later)]))


# --------------------------------------------------- statements and checks


@each_notebook
def test_every_statement_is_labelled(chapter):
    for kind, label in statements(chapter):
        if kind in STATEMENTS:
            assert label.startswith("thm-"), f"a {kind} has label {label!r}"
        elif kind == "definition":
            assert label.startswith("def-"), f"a {kind} has label {label!r}"
        elif label.startswith("false-"):
            assert kind == "remark", f"{label} is a {kind}, not a remark"


@each_notebook
def test_every_theorem_is_checked(chapter):
    wanted = {lb for kind, lb in statements(chapter) if kind in STATEMENTS}
    wanted |= set(promised(chapter))
    checked = set(labels_in_tags(chapter, "checks:"))
    assert wanted - checked == set(), "theorems without a `checks:` cell"
    assert checked - wanted == set(), "`checks:` tags without a theorem"


@each_notebook
def test_every_check_gives_evidence_for_its_theorem(chapter):
    # The evidence carries the label to the ledger.
    for label in set(labels_in_tags(chapter, "checks:")):
        code = [
            source
            for _, source, cell in cells(chapter, "code")
            if f"checks:{label}" in tags(cell)
        ]
        named = any(f'"{label}"' in source for source in code)
        assert named, f"no `checks:` cell names {label} in its evidence"


@each_notebook
def test_every_false_claim_is_shown_to_be_false(chapter):
    wanted = {
        lb for _, lb in statements(chapter) if lb.startswith("false-")
    }
    shown = set(labels_in_tags(chapter, "shows:"))
    assert wanted - shown == set(), "false claims without a `shows:` cell"
    assert shown - wanted == set(), "`shows:` tags without a false claim"


def test_labels_are_unique_in_the_book():
    found = Counter(
        label
        for chapter in NOTEBOOKS
        for label in re.findall(r"^:label: *(\S+)", prose(chapter), re.M)
    )
    found.update(
        cell["metadata"]["mystnb"]["figure"]["name"]
        for chapter in NOTEBOOKS
        for _, _, cell in cells(chapter, "code")
        if "figure" in cell["metadata"].get("mystnb", {})
    )
    assert [label for label, n in found.items() if n > 1] == []


@each_notebook
def test_boxes_are_written_with_colons(chapter):
    # A backtick fence loses its title where MyST is not rendered.
    found = re.findall(
        r"^```+ ?\{(?:prf:|exercise|solution).*", prose(chapter), re.M
    )
    assert found == []


# --------------------------------------------------------------- exercises


@each_chapter
def test_exercises_have_folded_executed_solutions(chapter):
    text = prose(chapter)
    asked = [o["label"] for _, _, o in directives(text, r"exercise\S*?")
             if "label" in o]  # fmt: skip
    assert 3 <= len(asked) <= 5, f"{len(asked)} exercises"
    assert all(label.startswith("ex-") for label in asked), asked
    solved = list(directives(text, r"solution|solution-start"))
    assert sorted(label for _, label, _ in solved) == sorted(asked)
    for _, label, options in solved:
        folded = "dropdown" in options.get("class", "")
        assert folded, f"the solution of {label} is not folded"

    with_code, inside = set(), None
    for id_, source, cell in cells(chapter):
        if cell["cell_type"] == "markdown":
            for name, label, _ in directives(source, r"solution-\w+"):
                opened = name == "solution-start"
                assert opened == (inside is None), f"{id_}: unpaired {name}"
                inside = label if opened else None
        elif inside:
            with_code.add(inside)
    assert inside is None, f"the solution of {inside} does not end"
    assert len(with_code) >= 2, "fewer than two exercises to code"


# ----------------------------------------------------------------- figures


@each_notebook
def test_every_figure_has_alt_text_caption_and_name(chapter):
    for id_, source, cell in cells(chapter, "code"):
        draws = re.search(r"\bplt\.(show|subplots|figure)\(", source)
        if not draws and "figure" not in tags(cell):
            continue
        assert "figure" in tags(cell), f"{id_} draws without tag `figure`"
        mystnb = cell["metadata"].get("mystnb", {})
        alt = mystnb.get("image", {}).get("alt", "")
        figure = mystnb.get("figure", {})
        caption, name = figure.get("caption", ""), figure.get("name", "")
        assert len(alt) >= 30, f"{id_}: what does the figure show? {alt!r}"
        assert caption, f"{id_} has no caption"
        assert caption != alt, f"{id_}: alt text and caption are the same"
        assert name.startswith("fig-"), f"{id_} is named {name!r}"
        reference = f"{{numref}}`{name}`"
        said = reference in prose(chapter)
        assert said, f"{id_}: the prose does not mention {reference}"


# ------------------------------------------------------------- look-ups


def sections(found):
    """Yield (heading, markdown, code) of each ``##`` section."""
    heading, text, source = None, "", ""
    for _, body, cell in found:
        if cell["cell_type"] == "code":
            source += f"{body}\n"
            continue
        before, *rest = re.split(r"^## (.*)$", body, flags=re.M)
        text += before
        for name, after in zip(rest[::2], rest[1::2], strict=True):
            if heading:
                yield heading, text, source
            heading, text, source = name, after, ""
    yield heading, text, source


def unproved(found):
    """Yield the sections that no code backs, or that lead to no chapter."""
    for heading, text, source in sections(found):
        backed = re.search(r"^ *(assert|agree)\b", source, re.M)
        if not backed or not re.search(r"\{doc\}`\d\d_\w+`", text):
            yield heading


@pytest.mark.parametrize("page", ["which_call", "symptoms"])
def test_every_row_is_run_and_leads_to_a_chapter(page):
    found = list(cells(ROOT / "chapters" / f"{page}.ipynb"))
    assert list(unproved(found)) == []
    # The table on top has a row for each section, and no other.
    rows = re.findall(r"\(#([\w-]+)\) *\|", found[0][1])
    names = [heading for heading, _, _ in sections(found)]
    anchors = [re.sub(r"\W+", "-", n.lower()).strip("-") for n in names]
    assert rows == anchors


def test_the_guard_of_rows_works():
    good = [markdown("## A\n\n{doc}`06_stability`"), code("assert x")]
    assert list(unproved(good)) == []
    bad = [
        markdown("# T\n\n## A\n\n{doc}`06_stability`"),
        code("print(x)"),
        markdown("b\n\n## B\n\n{doc}`notation`"),
        code("assert x"),
        *good,
    ]
    assert list(unproved(bad)) == ["A", "B"]


def unlinked(text):
    """Yield the questions whose folded answer leads nowhere."""
    for part in re.split(r"^\*\*(?=\d+\. )", text, flags=re.M)[1:]:
        question, _, answer = part.partition("**")
        folded = ":class: dropdown" in answer
        if not folded or not re.search(r"\{(?:prf:ref|doc)\}`", answer):
            yield question


def test_every_answer_is_folded_and_leads_to_its_proof():
    text = text_of("chapters/interview")
    assert list(unlinked(text)) == []
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\. ", text, re.M)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 44


def test_the_guard_of_answers_works():
    answer = ":::{admonition} Answer\n:class: dropdown\nYes. See %s.\n:::"
    good = f"**1. Why?**\n\n{answer % '{doc}`notation`'}\n"
    bad = f"**2. Who?**\n\n{answer % 'there'}\n\n**3. Where?**\n\nHere.\n"
    assert list(unlinked(good + bad)) == ["2. Who?", "3. Where?"]


# -------------------------------------------------------------------- code


@each_notebook
def test_cells_are_plain_python(chapter):
    for id_, source, _ in cells(chapter, "code"):
        try:
            ast.parse(source)
        except SyntaxError as error:
            pytest.fail(f"{id_}: no magics, no `!`: {error}")


# Draws from a generator that nobody seeded, unless the keyword is given.
NEEDS_KEYWORD = {
    name: keyword
    for keyword, names in {
        "generator": "rand randn randint randperm normal multinomial "
        "bernoulli poisson rand_like randn_like randint_like normal_ "
        "uniform_ random_ exponential_ bernoulli_ cauchy_ geometric_ "
        "log_normal_",
        "random_state": "train_test_split rvs make_blobs "
        "make_classification",
    }.items()
    for name in names.split()
}
# Parameters are drawn when these are made.
DRAWN_LAYERS = {"Linear", "Embedding", "Conv1d", "Conv2d", "LazyLinear"}


def random_calls(source):
    """Yield what draws from a generator that the notebook did not seed."""
    calls = [n for n in ast.walk(ast.parse(source)) if type(n) is ast.Call]
    names = [ast.unparse(call.func) for call in calls]
    seeded = "torch.manual_seed" in names
    for call, name in zip(calls, names, strict=True):
        parts = name.split(".")
        keywords = {keyword.arg for keyword in call.keywords}
        own = re.match(r"(rng|\w*_rng|np\.random\.default_rng)\b", name)
        if parts[-1] == "default_rng":
            if not call.args and "seed" not in keywords:
                yield f"{name}() without a seed"
        elif parts[0] == "random" and name != "random.Random":
            yield name
        elif name.startswith(("np.random.", "numpy.random.")) and not own:
            yield f"{name}: use np.random.default_rng(seed)"
        elif parts[-1] in NEEDS_KEYWORD and not own:
            wanted = NEEDS_KEYWORD[parts[-1]]
            if wanted not in keywords:
                yield f"{name}(...) without {wanted}="
        elif parts[-1] in DRAWN_LAYERS and not seeded:
            yield f"{name}(...) without torch.manual_seed in its cell"


@each_notebook
def test_everything_random_is_seeded(chapter):
    for id_, source, _ in cells(chapter, "code"):
        assert list(random_calls(source)) == [], f"in {id_}"


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("torch.randn(3)", True),
        ("torch.randn(3, generator=g)", False),
        ("z.normal_()", True),
        ("np.random.normal(3)", True),
        ("np.random.default_rng()", True),
        ("np.random.default_rng(0).normal(3)", False),
        ("rng = np.random.default_rng(0)\nrng.normal(3)", False),
        ("random.random()", True),
        ("torch.nn.Linear(2, 3)", True),
        ("torch.manual_seed(0)\ntorch.nn.Linear(2, 3)", False),
        ("train_test_split(x, y)", True),
    ],
)
def test_the_guard_of_randomness_works(source, refused):
    assert bool(list(random_calls(source))) == refused


@each_notebook
def test_cells_stay_in_their_folder(chapter):
    # Absolute paths, tricks with the import path, and the network.
    pattern = (
        r"""["'](?:/\w+(?:/[\w.]+)+|[A-Z]:\\)|\bsys\.path\b|https?://"""
    )
    for id_, source, _ in cells(chapter, "code"):
        found = re.findall(pattern, source)
        assert found == [], f"{id_}: {found}"


def test_every_public_name_appears_in_a_chapter():
    code = "\n".join(
        source
        for chapter in CHAPTERS
        for _, source, _ in cells(chapter, "code")
    )
    public = [n for n in softmaxlib.__all__ if not n.startswith("_")]
    missing = [n for n in public if not re.search(rf"\b{n}\b", code)]
    assert missing == []


def test_every_public_name_is_on_the_api_page():
    text = (ROOT / "chapters" / "api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"auto(?:function|class):: (\w+)", text))
    public = {n for n in softmaxlib.__all__ if not n.startswith("_")}
    assert public - shown == set()


# ------------------------------------------------------------------- prose


each_page = pytest.mark.parametrize("page", sorted(listed_files()))
BELITTLING = re.compile(r"\b(?:simply|obviously|just)\b.*", re.I)
# Who says so? Cite it, or call it a common slip.
HEARSAY = re.compile(
    r"\b(?:popular\s+tutorials?|public\s+notes|one\s+often\s+reads)\b",
    re.I,
)


def text_of(page):
    source = ROOT / f"{page}.ipynb"
    if source.exists():
        return prose(source)
    return (ROOT / f"{page}.md").read_text(encoding="utf-8")


@each_page
def test_prose_does_not_belittle(page):
    assert BELITTLING.findall(text_of(page)) == []


@each_page
def test_prose_cites_and_does_not_say_what_one_hears(page):
    assert HEARSAY.findall(text_of(page)) == []


def test_the_guards_of_prose_work():
    assert BELITTLING.findall("It is just so.")
    assert not BELITTLING.findall("An adjustment is justified.")
    for bad in (
        "A popular tutorial adds",
        "in several public\nnotes",
        "One often reads that",
    ):
        assert HEARSAY.findall(bad)
    assert not HEARSAY.findall("a tutorial popular with nobody")


# ---------------------------------------------------------------- notation


def symbols(text):
    """The symbols of the first column of the table, as they are written."""
    for row in re.findall(r"^\| *(\$.*?) *\| ", text, re.M):
        yield from re.findall(r"\$(.+?)\$", row)


def heads(text):
    """Yield each letter that the table defines: p of p = softmax(z)."""
    for symbol in symbols(text):
        first = re.split(r"\\in\b|\\ge\b|=|\(", symbol)[0].strip()
        # Several in one go: i, j, k.
        yield from (part.strip() for part in first.split(","))


def test_one_symbol_has_one_meaning():
    text = (ROOT / "chapters" / "notation.md").read_text(encoding="utf-8")
    found = Counter(heads(text))
    assert len(found) > 20
    assert [symbol for symbol, n in found.items() if n > 1] == []


def test_the_guard_of_notation_works():
    table = "| $K \\ge 1$ | n |\n| $i, j$ | m |\n| $p = \\sigma(z)$ | o |\n"
    assert list(heads(table)) == ["K", "i", "j", "p"]
    twice = Counter(heads(f"{table}| $p$, $q$ | x |\n"))
    assert twice["p"] == 2


# What would be a second meaning of a symbol in the table.
CLASHES = {
    r"-\\Delta|\\Delta *(?:[_<>/]|[A-Za-z]|\\[gl]e|=(?! *\\\{))": (
        "Δ is the simplex, not a difference"
    ),
}


def clashes(text):
    formulas = " ".join(FORMULA.findall(text))
    for pattern, meaning in CLASHES.items():
        for match in re.finditer(pattern, formulas):
            at = match.start()
            yield meaning, formulas[at : at + 30]


@each_page
def test_no_symbol_is_used_for_something_else(page):
    assert list(clashes(text_of(page))) == []


@pytest.mark.parametrize(
    ("formula", "clash"),
    [
        (r"$\Delta_j$", True),
        (r"$\Delta = z_1 - z_2$", True),
        (r"$\Delta z$", True),
        (r"$e^{-\Delta}$", True),
        (r"$\Delta \ge 0$", True),
        (r"$q \in \Delta$", False),
        (r"$\Delta^\circ$", False),
        (r"$\Delta^{K-1}$", False),
        (r"$\Delta = \{q : q_i \ge 0\}$", False),
        (r"$\partial \Delta \subset A$", False),
    ],
)
def test_the_guard_of_clashes_works(formula, clash):
    assert bool(list(clashes(formula))) == clash
