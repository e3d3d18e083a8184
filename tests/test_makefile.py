"""`make` leaves no environment that looks finished and is not.

GNU make 3.81, which macOS has, ignores `.SHELLFLAGS`; every case is tried
with the flags that it then uses. No case downloads or installs anything.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAMP = Path(".venv", ".installed")
MISSING = "./no_such_package-1.0-py3-none-any.whl\n"

each_shell = pytest.mark.parametrize(
    "flags",
    [(), (".SHELLFLAGS=-c",), ("SHELL=/bin/bash", ".SHELLFLAGS=-c")],
)


@pytest.fixture
def copy(tmp_path):
    """A copy of the files that `make` reads, in a folder of its own."""
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "build_book.py").write_text("print('built')\n")
    return tmp_path


def provide(folder, requirements, failing="nothing"):
    """Give a folder its requirements, and this Python as environment.

    The failing command of pip fails.
    """
    (folder / "requirements.txt").write_text(requirements)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *" {failing}") exit 4;; esac\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    python.chmod(0o755)


def make(folder, *arguments):
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["make", *arguments],
        cwd=folder,
        env=environment | {"PIP_NO_INDEX": "1"},
        capture_output=True,
        text=True,
    )


@each_shell
def test_a_failed_pip_leaves_no_stamp_and_builds_nothing(copy, flags):
    provide(copy, MISSING)
    done = make(copy, "book", *flags)
    assert done.returncode != 0
    assert "no_such_package" in done.stderr
    assert "built" not in done.stdout
    assert not (copy / STAMP).exists()


def test_a_failed_pip_takes_an_old_stamp_away(copy):
    provide(copy, MISSING)
    (copy / STAMP).touch()
    os.utime(copy / STAMP, (0, 0))  # older than the requirements
    assert make(copy, "book").returncode != 0
    assert not (copy / STAMP).exists()


def test_a_failed_pip_leaves_no_stamp_even_if_errors_are_ignored(copy):
    provide(copy, MISSING)
    make(copy, "--ignore-errors", "book")
    assert not (copy / STAMP).exists()


@each_shell
def test_packages_that_do_not_fit_leave_no_stamp(copy, flags):
    provide(copy, "pip\n", failing="check")
    done = make(copy, "book", *flags)
    assert done.returncode != 0
    assert "pip in " in done.stdout  # it was installed, and then checked
    assert not (copy / STAMP).exists()


def test_a_pip_that_succeeds_leaves_a_stamp_and_goes_on(copy):
    provide(copy, "pip\n")  # which is there
    done = make(copy, "book")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("built\n")
    assert (copy / STAMP).exists()
    assert make(copy, "book").stdout == "built\n"


@each_shell
def test_a_python_that_cannot_make_an_environment(copy, flags):
    python = copy / "python"
    python.write_text(
        '#!/bin/sh\ntest "$1" != -m || { echo "no venv" >&2; exit 3; }\n'
    )
    python.chmod(0o755)
    done = make(copy, "book", f"PYTHON={python}", *flags)
    assert done.returncode != 0
    assert "no venv" in done.stderr
    assert not (copy / ".venv").exists()


@each_shell
def test_no_python_is_new_enough(copy, flags):
    done = make(copy, "book", "PYTHON=false", *flags)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed; tried: false." in done.stderr
    assert not (copy / ".venv").exists()


def test_no_recipe_has_a_pipe():
    recipes = (ROOT / "Makefile").read_text().split("\n\t")[1:]
    assert len(recipes) > 20
    for recipe in recipes:
        line = recipe.split("\n")[0].replace("||", "")
        assert "|" not in line, line


def test_every_command_is_in_the_help(copy):
    text = (ROOT / "Makefile").read_text()
    phony = text.split(".PHONY:")[1].split("\n")[0].split()
    said = make(copy, "help").stdout
    for name in set(phony) - {"help"}:
        assert f"make {name} " in said


def test_the_kernel_of_the_book_says_nothing_when_it_starts():
    code = """
import os, sys
sys.path.append(sys.argv[1])
from build_book import KERNEL_ENVIRONMENT

os.environ.update(KERNEL_ENVIRONMENT)
from jupyter_client.manager import start_new_kernel

manager, client = start_new_kernel(kernel_name="python3")
client.execute_interactive("import sys; print(sys.executable)")
client.stop_channels()
manager.shutdown_kernel(now=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "tools")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{sys.executable}\n"
    assert done.stderr == ""
