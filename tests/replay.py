"""Run the check cells of a chapter in this process, on any library.

A check cell runs after the cells above it, from the top of its notebook.
Figures and the solutions of exercises are passed over: nothing depends on
them. The chapter's code is plain Python, so `exec` is all it takes.
"""

import ast
import collections
import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import sys
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator

import pytest

import softmaxlib
from softmaxlib import testing

CHAPTERS = pathlib.Path(__file__).parent.parent / "chapters"
SABOTEURS = pathlib.Path(__file__).parent / "saboteurs"


@dataclasses.dataclass
class Cell:
    """A code cell: its id, its source, and what it checks or shows."""

    id: str
    source: str
    labels: list[str]

    @property
    def checks(self) -> bool:
        """Whether it is tagged as the check of a statement."""
        return any(label.startswith("checks:") for label in self.labels)

    @property
    def promises(self) -> bool:
        """Whether it checks what the library promises, not a statement."""
        return any(label.startswith("checks:prm-") for label in self.labels)


@dataclasses.dataclass
class Outcome:
    """What became of a cell: the exception it raised, or None."""

    cell: Cell
    error: BaseException | None

    @property
    def caught(self) -> bool:
        """Whether the cell noticed that the library is wrong.

        A name that an earlier failure left undefined is no notice, nor is a
        saboteur that fails itself.
        """
        return not (
            self.error is None
            or isinstance(self.error, NameError)
            or self.crashed
        )

    @property
    def crashed(self) -> bool:
        """Whether the error was raised by the code of a saboteur."""
        if self.error is None:
            return False
        *_, (frame, _) = traceback.walk_tb(self.error.__traceback__)
        return SABOTEURS in pathlib.Path(frame.f_code.co_filename).parents


def notebooks() -> list[str]:
    """The names of the chapters that are notebooks."""
    return sorted(path.stem for path in CHAPTERS.glob("*.ipynb"))


@functools.cache
def cells(name: str) -> list[Cell]:
    """The code cells of a chapter that a check may depend on."""
    text = (CHAPTERS / f"{name}.ipynb").read_text(encoding="utf-8")
    found, solving = [], False
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if "{solution-start}" in source:
                solving = True
            if "{solution-end}" in source:
                solving = False
            continue
        tags = cell["metadata"].get("tags", [])
        if solving or "figure" in tags:
            continue
        labels = [t for t in tags if t.startswith(("checks:", "shows:"))]
        found.append(Cell(cell["id"], source, labels))
    return found


@functools.cache
def tagged(name: str) -> dict[str, Cell]:
    """The cells of a chapter that check or show a statement, by id."""
    return {cell.id: cell for cell in cells(name) if cell.labels}


def replay(
    name: str, wanted: Collection[str] | None = None
) -> Iterator[Outcome]:
    """Run a chapter cell by cell, going on after failures.

    Args:
        name: of the chapter, without the suffix.
        wanted: the ids of the tagged cells whose outcome is asked for. The
            others are passed over, unless a later cell needs a name of
            theirs, and so is all that follows the last one. None for all.

    Yields:
        The outcome of each cell that was asked for, when it has run.
    """
    chosen = [(c, True) for c in cells(name)]
    if wanted is not None:
        chosen = [
            (cell, cell.id in wanted) for cell in _needed(name, wanted)
        ]
    scope = {"__name__": "__main__"}
    for cell, asked in chosen:
        error = _run(name, cell, scope)
        if asked:
            yield Outcome(cell, error)


def _run(name: str, cell: Cell, scope: dict) -> BaseException | None:
    silence = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(silence),
        contextlib.redirect_stderr(silence),
    ):
        warnings.simplefilter("ignore")
        try:
            exec(_compiled(name, cell.id, cell.source), scope)
        except Exception as exception:
            return exception
    return None


@functools.cache
def _compiled(name: str, cell: str, source: str):
    return compile(source, f"{name}:{cell}", "exec")


def _needed(name: str, wanted: Collection[str]) -> list[Cell]:
    """The cells wanted, and above them those that they depend on."""
    chosen: list[Cell] = []
    missing: set[str] = set()
    for cell in reversed(cells(name)):
        bound, changed, used = _names(cell.source)
        if cell.id in wanted or (bound | changed) & missing:
            chosen.append(cell)
            missing = missing - bound | changed | used
    return chosen[::-1]


@functools.cache
def _names(source: str) -> tuple[set[str], set[str], set[str]]:
    """The names that a cell binds, changes in place, and takes from above.

    Changed is what stands before a dot or a bracket that is assigned to, or
    before the method that a statement calls for its effect, as in
    `rows.append(1)` or `torch.manual_seed(0)`.
    """
    bound, changed, used = set(), set(), set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Name(id, ast.Load()):
                used.add(id)
            case ast.Name(id):
                bound.add(id)
            case ast.AugAssign(ast.Name(id)):
                changed.add(id)
            case (
                ast.Attribute(ctx=ast.Store())
                | ast.Subscript(ctx=ast.Store())
            ):
                changed |= _root(node)
            case ast.Expr(ast.Call(ast.Attribute() as method)):
                changed |= _root(method)
            case ast.FunctionDef(name) | ast.ClassDef(name):
                bound.add(name)
            case ast.Import(names) | ast.ImportFrom(names=names):
                bound |= {(a.asname or a.name).split(".")[0] for a in names}
    return bound - changed, changed, used - bound


def _root(node: ast.expr) -> set[str]:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()


# --- what a chapter calls ------------------------------------------------


@functools.cache
def calls(name: str) -> dict[str, set[str]]:
    """The public names of softmaxlib that each cell calls, by its id.

    A function counts where the chapter's own code calls it, in this cell or
    by a helper of an earlier one, and not where the library calls it.
    """
    found = collections.defaultdict(set)
    here = [""]

    def note(public: str) -> None:
        found[here[0]].add(public)

    with pytest.MonkeyPatch.context() as patch, testing.case_limit(1):
        for public in softmaxlib.__all__:
            value = getattr(softmaxlib, public)
            if not isinstance(value, type):
                noting = _noting(value, public, note, name)
                patch.setattr(softmaxlib, public, noting)
                continue
            for key, method in list(vars(value).items()):
                if callable(method) and (
                    key[0] != "_" or key == "__init__"
                ):
                    patch.setattr(value, key, _noting(method, public, note))
        scope = {"__name__": "__main__"}
        for cell in cells(name):
            here[0] = cell.id
            _run(name, cell, scope)
    return found


def _noting(function: Callable, public: str, note: Callable, chapter=None):
    """The function, which notes that it is called (from a chapter)."""

    @functools.wraps(function)
    def noting(*arguments, **options):
        caller = sys._getframe(1).f_code.co_filename
        if chapter is None or caller.startswith(f"{chapter}:"):
            note(public)
        return function(*arguments, **options)

    return noting
