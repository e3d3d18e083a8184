"""Run every test of the project: what `make test` runs.

    python tools/run_tests.py              # all steps
    python tools/run_tests.py unit book    # some of them

All steps run even when one fails, and the last lines say how each went. The
notebooks are run once, through nbmake, and the site is then built from these
very runs.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

from build_book import BUILD, KERNEL_ENVIRONMENT, ROOT, tool

EXECUTED = ROOT / ".exec" / "chapters"

# The tests of the book are not unit tests: they do not count for coverage.
BOOK = ("test_book.py", "test_saboteurs.py")
SITE = ("test_site.py",)


def pytest(*arguments: str) -> list[str]:
    return [tool("pytest"), *arguments]


def here(*names: str) -> list[str]:
    """Return those test files that exist."""
    return [f"tests/{n}" for n in names if (ROOT / "tests" / n).exists()]


def style() -> list[list[str]]:
    """ruff, nbstripout, mypy: style, no outputs in the notebooks, types."""
    notebooks = map(str, sorted((ROOT / "chapters").glob("*.ipynb")))
    return [
        [tool("ruff"), "check", "."],
        [tool("ruff"), "format", "--check", "."],
        [tool("nbstripout"), "--verify", "--keep-id", *notebooks],
        [tool("mypy")],
    ]


def unit() -> list[list[str]]:
    """The tests of the library, and their coverage of its branches."""
    ignored = [f"--ignore=tests/{name}" for name in BOOK + SITE]
    coverage = ["--cov=softmaxlib", "--cov-branch", "--cov-fail-under=95"]
    return [pytest("-n", "2", *ignored, *coverage, "tests")]


def notebooks() -> list[list[str]]:
    """Every chapter from top to bottom, through nbmake."""
    # nbmake writes the outputs into the notebooks, so it gets a copy.
    shutil.rmtree(EXECUTED.parent, ignore_errors=True)
    skipped = shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__")
    shutil.copytree(ROOT / "chapters", EXECUTED, ignore=skipped)
    options = ["--nbmake", "--overwrite", "--nbmake-timeout=600"]
    return [pytest("-n", "2", *options, str(EXECUTED.relative_to(ROOT)))]


def build() -> list[list[str]]:
    """The book, strictly, from the notebooks that nbmake has run."""
    script = [sys.executable, str(ROOT / "tools" / "build_book.py")]
    return [[*script, "--executed", str(EXECUTED)]]


def book() -> list[list[str]]:
    """The rules of the book, and the saboteurs."""
    # What is known of a chapter is kept in the process that tests it.
    return [pytest("-n", "2", "--dist", "loadgroup", *here(*BOOK))]


def site() -> list[list[str]]:
    """The built site in headless Chromium."""
    return [pytest("-n", "2", *here(*SITE))]


STEPS = {f.__name__: f for f in (style, unit, notebooks, build, book, site)}
# What pytest says of a run, and of its coverage.
SUMMARY = re.compile(
    r"^=* ?(\d+ (?:passed|failed|error|skipped).*?) ?=*$"
    r"|^(?:FAIL )?(Required test coverage.*?)$",
    re.MULTILINE,
)

# A step that cannot work when another has failed.
NEEDS = {"build": "notebooks", "site": "build"}


def run(command: list[str]) -> tuple[int, str]:
    """Run a command, show what it prints, and return it as well."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | KERNEL_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    printed = b""
    while chunk := process.stdout.read1():
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        printed += chunk
    return process.wait(), printed.decode(errors="replace")


def total(lines: list[str]) -> str:
    """Add up what pytest counted in all steps."""
    counts = Counter()
    for number, word in re.findall(
        r"(\d+) (passed|failed|errors?|skipped|xfailed)", " ".join(lines)
    ):
        counts[word.removesuffix("s")] += int(number)
    said = ", ".join(f"{counts[word]} {word}" for word in sorted(counts))
    return f"in all: {said or 'no tests'}"


def main(chosen: list[str]) -> int:
    unknown = set(chosen) - set(STEPS)
    if unknown:
        print(f"No such step: {unknown}. Steps: {', '.join(STEPS)}")
        return 2
    (BUILD / ".jupyter_cache").parent.mkdir(exist_ok=True)
    failed, lines = set(), []
    for name in chosen or STEPS:
        step = STEPS[name]
        if NEEDS.get(name) in failed:
            failed.add(name)
            lines.append(f"{name:10} not run: {NEEDS[name]} failed")
            continue
        print(f"\n=== {name}: {step.__doc__}", flush=True)
        start, summaries = time.monotonic(), []
        for command in step():
            code, printed = run(command)
            if code:
                failed.add(name)
            summaries += ["".join(m) for m in SUMMARY.findall(printed)]
        verdict = "FAILED" if name in failed else "passed"
        seconds = time.monotonic() - start
        said = "; ".join(summaries)
        lines.append(f"{name:10} {verdict} {seconds:6.0f} s  {said}")
    print("\n=== summary")
    print("\n".join(lines))
    print(total(lines))
    if failed:
        print(f"Next: mend what failed ({', '.join(sorted(failed))}).")
        return 1
    print("Everything passed. Next: `make book` to read it.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
