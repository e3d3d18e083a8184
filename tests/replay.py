"""Run the check cells of a chapter in this process, on any library.

A check cell runs after the cells above it, from the top of its notebook.
Figures and the solutions of exercises are passed over: nothing depends on
them. The chapter's code is plain Python, so `exec` is all it takes.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import warnings
from collections.abc import Iterator

import hypothesis

from softmaxlib import testing

CHAPTERS = pathlib.Path(__file__).parent.parent / "chapters"


@dataclasses.dataclass
class Cell:
    """A code cell: its id, its source, and what it checks or shows."""

    id: str
    source: str
    labels: list[str]


@dataclasses.dataclass
class Outcome:
    """What became of a cell: the exception it raised, or None."""

    cell: Cell
    error: BaseException | None

    @property
    def caught(self) -> bool:
        """Whether the cell noticed that the library is wrong.

        A name that an earlier failure left undefined is no notice.
        """
        return self.error is not None and not isinstance(
            self.error, NameError
        )


def notebooks() -> list[str]:
    """The names of the chapters that are notebooks."""
    return sorted(path.stem for path in CHAPTERS.glob("*.ipynb"))


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


@contextlib.contextmanager
def hurried(cases: int):
    """Attacks of at most `cases` cases, whose counterexamples stay raw."""
    right = testing._settings
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)

    def fewer(limit):
        # A search for the smallest example needs its length and shrinking.
        if limit >= 5000:
            return right(limit)
        return right(min(limit, cases), phases=phases)

    testing._settings = fewer
    try:
        yield
    finally:
        testing._settings = right


def replay(name: str) -> Iterator[Outcome]:
    """Run a chapter cell by cell, going on after failures.

    Args:
        name: of the chapter, without the suffix.

    Yields:
        The outcome of each cell, when it has run.
    """
    scope = {"__name__": "__main__"}
    for cell in cells(name):
        error = None
        silence = io.StringIO()
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            warnings.simplefilter("ignore")
            try:
                exec(
                    compile(cell.source, f"{name}:{cell.id}", "exec"), scope
                )
            except Exception as exception:
                error = exception
        yield Outcome(cell, error)
