"""The rules of the book, one small test each.

They read the notebooks as they are committed and run nothing: a broken rule
is reported in a second, with the cell that breaks it.
"""

import ast
import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

import softmaxlib

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("*.ipynb"))
KERNEL = {
    "display_name": "Python 3 (ipykernel)",
    "language": "python",
    "name": "python3",
}
STATEMENTS = {"theorem", "lemma", "proposition", "corollary"}

each_chapter = pytest.mark.parametrize(
    "chapter", CHAPTERS, ids=[c.stem for c in CHAPTERS]
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


@each_chapter
def test_no_outputs_are_committed(chapter):
    for id_, _, cell in cells(chapter, "code"):
        assert not cell["outputs"], f"{id_} has outputs: run `make tidy`"
        assert cell["execution_count"] is None, f"{id_}: run `make tidy`"


@each_chapter
def test_cell_ids_are_the_chapter_and_a_running_number(chapter):
    number = chapter.stem.split("_")[0]
    found = [id_ for id_, _, _ in cells(chapter)]
    wanted = [f"{number}-{i:03d}" for i in range(1, len(found) + 1)]
    assert found == wanted, "run `make tidy`"


@each_chapter
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


@each_chapter
def test_imports_are_in_the_second_cell(chapter):
    found = [
        id_
        for id_, source, _ in cells(chapter, "code")
        if re.search(r"^(import|from) ", source, re.M)
    ]
    second = list(cells(chapter))[1][0]
    assert found == [second]


@each_chapter
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


@each_chapter
def test_every_section_opens_with_its_point_in_bold(chapter):
    exempt = {"Exercises", "What this chapter showed", "Next"}
    parts = re.split(r"^## (.*)$", prose(chapter), flags=re.M)[1:]
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        if heading not in exempt:
            opens = body.strip().startswith("**")
            assert opens, f"{heading!r} does not open with its point"


# --------------------------------------------------- statements and checks


@each_chapter
def test_every_statement_is_labelled(chapter):
    for kind, label in statements(chapter):
        if kind in STATEMENTS:
            assert label.startswith("thm-"), f"a {kind} has label {label!r}"
        elif kind == "definition":
            assert label.startswith("def-"), f"a {kind} has label {label!r}"
        elif label.startswith("false-"):
            assert kind == "remark", f"{label} is a {kind}, not a remark"


@each_chapter
def test_every_theorem_is_checked(chapter):
    wanted = {lb for kind, lb in statements(chapter) if kind in STATEMENTS}
    checked = set(labels_in_tags(chapter, "checks:"))
    assert wanted - checked == set(), "theorems without a `checks:` cell"
    assert checked - wanted == set(), "`checks:` tags without a theorem"


@each_chapter
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


@each_chapter
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
        for chapter in CHAPTERS
        for label in re.findall(r"^:label: *(\S+)", prose(chapter), re.M)
    )
    found.update(
        cell["metadata"]["mystnb"]["figure"]["name"]
        for chapter in CHAPTERS
        for _, _, cell in cells(chapter, "code")
        if "figure" in cell["metadata"].get("mystnb", {})
    )
    assert [label for label, n in found.items() if n > 1] == []


@each_chapter
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


@each_chapter
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


# -------------------------------------------------------------------- code


@each_chapter
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


@each_chapter
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


@each_chapter
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


@pytest.mark.parametrize("page", sorted(listed_files()))
def test_prose_does_not_belittle(page):
    source = ROOT / f"{page}.ipynb"
    text = prose(source) if source.exists() else None
    if text is None:
        text = (ROOT / f"{page}.md").read_text(encoding="utf-8")
    words = re.findall(r"\b(?:simply|obviously|just)\b.*", text, re.I)
    assert words == []
