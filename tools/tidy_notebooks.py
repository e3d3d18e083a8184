"""Give every notebook its one committed form.

    python tools/tidy_notebooks.py [NOTEBOOK ...]

No outputs, the plain ``python3`` kernel, cell ids from the chapter and a
running number, and one way to write the JSON, so that a diff shows what an
author changed and nothing else. JupyterLab undoes all of it when it saves:
``make tidy`` restores it. What is folded on the site gets its tag: checks,
code that only draws, imports. JupyterLab hides the source of the same cells
but for its first line, so that line says what the cell holds.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
KEPT = ("tags", "mystnb")  # what the book reads of a cell's metadata

IMPORTS = re.compile(r"^(import|from) ", re.MULTILINE)


def prefix(path: Path) -> str:
    """How the ids of a notebook begin: 06 of 06_stability, else its name."""
    number = path.stem.split("_")[0]
    return number if number.isdigit() else path.stem.replace("_", "-")


def is_folded(source: str, tags: list[str]) -> bool:
    """Whether a code cell is one of those that are folded on the site."""
    checks = any(tag.startswith("checks:") for tag in tags)
    return checks or "figure" in tags or bool(IMPORTS.search(source))


def named(source: str, tags: list[str]) -> str:
    """The source of a folded cell, its first line a name of the cell."""
    found = [t.removeprefix("checks:") for t in tags if "checks:" in t]
    if found:
        name = f"# The check of {', '.join(found)}"
    elif "figure" in tags:
        name = "# Code of the figure"
    elif IMPORTS.search(source):
        name = "# Imports"
    else:
        return source
    old = re.match(
        r"# (The check of .*|Code of the figure|Imports)\n", source
    )
    return f"{name}\n{source[old.end() if old else 0 :]}"


def tidy(path: Path) -> bool:
    """Rewrite one notebook if it needs it; return whether it did."""
    before = path.read_text(encoding="utf-8")
    notebook = json.loads(before)
    cells = []
    for old in notebook["cells"]:
        kind = old["cell_type"]
        source = "".join(old["source"]).strip("\n")
        if not source.strip():
            continue
        tags = old["metadata"].get("tags", [])
        if kind == "code" and is_folded(source, tags):
            folded = [t for t in tags if t != "hide-input"]
            old["metadata"]["tags"] = [*folded, "hide-input"]
            source = named(source, tags)
        metadata = {
            k: old["metadata"][k] for k in KEPT if k in old["metadata"]
        }
        if kind == "code" and "hide-input" in metadata.get("tags", []):
            metadata["jupyter"] = {"source_hidden": True}
        cell = {"cell_type": kind, "id": "", "metadata": metadata}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        cell["source"] = source.splitlines(keepends=True)
        cells.append(cell)
    for i, cell in enumerate(cells, start=1):
        cell["id"] = f"{prefix(path)}-{i:03d}"
        if cell["cell_type"] == "code":  # the order in which Jupyter writes
            order = ("cell_type", "execution_count", "id", "metadata")
            order += ("outputs", "source")
            cells[i - 1] = {key: cell[key] for key in order}
    notebook = {
        "cells": cells,
        "metadata": METADATA,
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    after = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    if after != before:
        path.write_text(after, encoding="utf-8", newline="\n")
    return after != before


if __name__ == "__main__":
    chosen = [Path(name) for name in sys.argv[1:]]
    for path in chosen or sorted((ROOT / "chapters").glob("*.ipynb")):
        if tidy(path):
            print(f"tidied {path.name}")
