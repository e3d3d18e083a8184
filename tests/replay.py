"""Run the check cells of a chapter in this process, on any library.

A check cell runs after the cells above it, from the top of its notebook.
Figures and the solutions of exercises are passed over: nothing depends on
them. The chapter's code is plain Python, so `exec` is all it takes.
"""

import ast
import collections
import contextlib
import dataclasses
import dis
import functools
import io
import json
import pathlib
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Collection, Iterator

import pytest
import torch

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
    name: str, wanted: Collection[str], before: Callable = lambda cell: None
) -> Iterator[Outcome]:
    """Run cells of a chapter one by one, going on after failures.

    Args:
        name: of the chapter, without the suffix.
        wanted: the ids of the tagged cells whose outcome is asked for. The
            others are passed over, unless a later cell needs a name of
            theirs, and so is all that follows the last one.
        before: called with each cell that is about to run.

    Yields:
        The outcome of each cell that was asked for, when it has run.
    """
    scope = {"__name__": "__main__"}
    for cell in _needed(name, wanted):
        before(cell)
        error = _run(name, cell, scope)
        if cell.id in wanted:
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

    Those of the notebook: what is local to a function is not among them.
    Changed is what stands before a dot or a bracket that is assigned to, or
    before the method that a statement calls for its effect, as in
    `rows.append(1)` or `torch.manual_seed(0)`.
    """
    bound, used = set(), set()
    for code in _codes(compile(source, "a cell", "exec")):
        for step in dis.get_instructions(code):
            name = step.argval
            if step.opname in ("STORE_NAME", "STORE_GLOBAL"):
                bound.add(name)
            elif step.opname in ("LOAD_NAME", "LOAD_GLOBAL"):
                used.add(name)
    changed = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.AugAssign(ast.Name(id)):
                changed.add(id)
            case (
                ast.Attribute(ctx=ast.Store())
                | ast.Subscript(ctx=ast.Store())
            ):
                changed |= _root(node)
            case ast.Expr(ast.Call(ast.Attribute() as method)):
                changed |= _root(method)
    changed &= bound | used
    return bound - changed, changed, used - bound


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a cell and, inside it, of its functions and classes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _root(node: ast.expr) -> set[str]:
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return {node.id} if isinstance(node, ast.Name) else set()


# --- the right library ---------------------------------------------------


@functools.cache
def untouched(
    name: str, cases: int
) -> tuple[list[Outcome], dict[str, set[str]]]:
    """Run the tagged cells of a chapter on the library as it is, once.

    Args:
        name: of the chapter, without the suffix.
        cases: the limit of its attacks.

    Returns:
        The outcome of each, and the public names of softmaxlib that it
        calls, by its id. A function counts where the chapter's own code
        calls it, in this cell or by a helper of an earlier one, and not
        where the library calls it.
    """
    found = collections.defaultdict(set)
    here = [""]

    def note(public: str) -> None:
        found[here[0]].add(public)

    def begin(cell: Cell) -> None:
        here[0] = cell.id

    with pytest.MonkeyPatch.context() as patch, testing.case_limit(cases):
        for public in softmaxlib.__all__:
            value = getattr(softmaxlib, public)
            if not isinstance(value, type):
                noting = _noting(value, public, note, name)
                patch.setattr(softmaxlib, public, noting)
                # Where other processes look for it by its name.
                home = sys.modules[value.__module__]
                patch.setattr(home, public, noting)
                continue
            for key, method in list(vars(value).items()):
                if callable(method) and (
                    key[0] != "_" or key == "__init__"
                ):
                    patch.setattr(value, key, _noting(method, public, note))
        return list(replay(name, tagged(name), begin)), found


def _noting(function: Callable, public: str, note: Callable, chapter=None):
    """The function, which notes that it is called (from a chapter)."""

    @functools.wraps(function)
    def noting(*arguments, **options):
        if torch.compiler.is_compiling():
            return function(*arguments, **options)
        caller = sys._getframe(1).f_code.co_filename
        if chapter is None or caller.startswith(f"{chapter}:"):
            note(public)
        return function(*arguments, **options)

    return noting
