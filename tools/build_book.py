"""Build the book strictly, and never leave a stale page.

    python tools/build_book.py                    # what `make book` runs
    python tools/build_book.py --executed FOLDER  # reuse executed notebooks

Two things could leave stale pages. The execution cache is keyed on the code
of the notebooks alone, so it does not see a change of the library. And
Sphinx reads only the pages that changed, so that it neither repeats the
warnings of the others nor updates the numbers of theorems that they mention.
Two digests settle both:

* **execution**: the library, the pinned environment, the interpreter. When
  it changes, ``_build`` is deleted whole.
* **site**: everything that a page is made of. When it changes, or when the
  last build failed, every page is made again, from cached executions. When
  it does not, there is nothing to do.

With ``--executed`` the cache is first filled with notebooks that have been
run already (``make test`` runs them through nbmake), so that no notebook is
run twice.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
STATE = BUILD / "digests.json"
INDEX = BUILD / "html" / "index.html"

EXECUTION = ("softmaxlib", "requirements.txt", "pyproject.toml")
SITE = (
    "index.md",
    "chapters",
    "benchmarks",
    "_config.yml",
    "_toc.yml",
    "_ext",
    "_static",
    "_templates",
    "references.bib",
    "CHANGELOG.md",
    "tools",
)
IGNORED = {"__pycache__", ".ipynb_checkpoints"}

# Notebooks run on one thread, so that two of them can share a machine, and
# a numerical warning is an error in them; what pyzmq warns of on Windows is
# none. Their kernel is that of tools/jupyter: it says nothing below an
# error, because ipykernel warns at every start that its messages are not
# encrypted, and they are signed and never leave this machine.
KERNEL_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "error::RuntimeWarning,"
    "ignore:Proactor event loop:RuntimeWarning",
    "PYTHONUTF8": "1",  # files are UTF-8 on every system
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "JUPYTER_PATH": str(ROOT / "tools" / "jupyter"),
}


def tool(name: str) -> str:
    """Return the path of a command of this interpreter's environment."""
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        raise SystemExit(
            f"{name} is missing beside {sys.executable}: "
            "install requirements.txt there, or use `make`."
        )
    return found


def digest(*names: str) -> str:
    """Return a digest of the names and contents of files and folders."""
    total = hashlib.sha256(sys.version.encode())
    for name in names:
        top = ROOT / name
        files = [top] if top.is_file() else sorted(top.rglob("*"))
        for file in files:
            if file.is_file() and not IGNORED & set(file.parts):
                total.update(str(file.relative_to(ROOT)).encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def discard_what_is_stale(execution: str, site: str) -> bool:
    """Delete what must not be reused; return whether all of it is fresh."""
    try:
        before = json.loads(STATE.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        before = {}
    if before.get("execution") != execution:
        shutil.rmtree(BUILD, ignore_errors=True)
    elif before.get("site") == site and INDEX.is_file():
        return True
    for folder in ("html", ".doctrees", "jupyter_execute"):
        shutil.rmtree(BUILD / folder, ignore_errors=True)
    # Until this build has succeeded, no page counts as fresh.
    BUILD.mkdir(exist_ok=True)
    STATE.write_text(json.dumps({"execution": execution}))
    return False


def fill_cache(folder: Path) -> None:
    """Put executed notebooks into the cache that the book reads."""
    import nbformat
    from jupyter_cache import get_cache

    cache = get_cache(str(BUILD / ".jupyter_cache"))
    for file in sorted(folder.glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        for cell in notebook.cells:
            # The cache compares all metadata, and nbmake adds timings.
            cell.metadata.pop("execution", None)
        nbformat.write(notebook, file)
        cache.cache_notebook_file(
            file, check_validity=False, overwrite=True
        )


def report_failures() -> None:
    """Print the tracebacks of the notebooks that failed."""
    for log in sorted((BUILD / "html" / "reports").rglob("*.err.log")):
        text = log.read_text(encoding="utf-8")
        print(f"\n{log.relative_to(BUILD)}\n{text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executed", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()

    start = time.monotonic()
    os.chdir(ROOT)
    execution, site = digest(*EXECUTION), digest(*EXECUTION, *SITE)
    if discard_what_is_stale(execution, site):
        print("The book is up to date.")
        print(f"Read it: open {INDEX}")
        return 0
    if arguments.executed:
        fill_cache(arguments.executed)
    command = [tool("jupyter-book"), "build", "."]
    # -W: a warning is an error; -n: so is a reference that leads nowhere.
    command += ["-W", "-n", "--keep-going"]
    code = subprocess.call(command, env=os.environ | KERNEL_ENVIRONMENT)
    if code:
        report_failures()
        print("The book was not built: see the warnings above.")
        return code
    STATE.write_text(json.dumps({"execution": execution, "site": site}))
    print(f"The book was built in {time.monotonic() - start:.0f} s.")
    print(f"Read it: open {INDEX}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
