"""The source distribution and the wheel are built and tried elsewhere.

Nothing is downloaded: both are built by the setuptools of this environment,
from a copy of the sources, as `pip` would do it.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import softmaxlib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"softmaxlib-{softmaxlib.__version__}"


def python(*arguments, cwd, path):
    """Run this Python elsewhere; return what it prints."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("PYTEST", "COV_", "PYTHON"))
    }
    environment |= {"PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind, tree, folder):
    """Build a distribution of a tree where torch cannot be imported."""
    poisoned = folder / "poisoned"
    poisoned.mkdir(exist_ok=True)
    (poisoned / "torch.py").write_text("raise ImportError('torch')\n")
    code = f"from setuptools import build_meta as b; b.build_{kind}('..')"
    python("-c", code, cwd=tree, path=poisoned)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, unpacked in a folder of its own."""
    folder = tmp_path_factory.mktemp("packaging")
    ignored = ("[.]*", "_build", "build", "dist", "*.egg-info")
    shutil.copytree(
        ROOT,
        folder / "sources",
        ignore=shutil.ignore_patterns(*ignored, "__pycache__"),
    )
    build("sdist", folder / "sources", folder)
    with tarfile.open(folder / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def wheel(unpacked):
    """The wheel that the source distribution gives, as `pip` builds it."""
    build("wheel", unpacked, unpacked.parent)
    return unpacked.parent / f"{NAME}-py3-none-any.whl"


# ------------------------------------------------- the source distribution


def test_the_source_distribution_forgets_no_file(unpacked):
    sources = unpacked.parent / "sources"
    for folder in ("softmaxlib", "tests", "chapters", "tools", "_ext"):
        for file in (sources / folder).rglob("*"):
            there = unpacked / file.relative_to(sources)
            assert there.exists(), f"{there.name}: see MANIFEST.in"


def test_the_unpacked_tests_are_collected_and_pass(unpacked):
    """All of them are collected, or pytest fails; a fast part is run."""
    (unpacked / "tests" / "test_here.py").write_text(
        "import softmaxlib\n\n\ndef test_here():\n"
        f"    assert softmaxlib.__file__.startswith({str(unpacked)!r})\n"
    )
    said = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
        *("-k", "test_here or test_modules or test_golden", "tests"),
        cwd=unpacked,
        path=unpacked,
    )
    match = re.search(r"(\d+) passed, (\d+) deselected in", said)
    assert match, said
    passed, others = map(int, match.groups())
    assert passed > 10
    assert others > 500


# --------------------------------------------------------------- the wheel


def test_the_wheel_is_the_package_its_types_and_its_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        licence = f"{NAME}.dist-info/licenses/LICENSE"
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        text = archive.read(f"{NAME}.dist-info/METADATA").decode()
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "softmaxlib").iterdir()
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert "softmaxlib/py.typed" in package
    inside = {n for n in names if not n.startswith(f"{NAME}.dist-info/")}
    assert inside == package
    metadata = Parser().parsestr(text)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Version"] == softmaxlib.__version__
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == set(PROJECT["optional-dependencies"])


def test_the_installed_wheel_needs_torch_and_numpy_only(wheel, tmp_path):
    install = ["-m", "pip", "install", "--no-deps", "--no-index"]
    install += ["--disable-pip-version-check", "--target", tmp_path]
    python(*install, wheel, cwd=tmp_path, path=tmp_path)
    code = """
import json, sys
import numpy, torch

before = {name.split(".")[0] for name in sys.modules}
import softmaxlib

new = {name.split(".")[0] for name in sys.modules} - before
new -= {"softmaxlib", *sys.stdlib_module_names}
y = softmaxlib.softmax(torch.tensor([0.0, 0.0]), 0).tolist()
print(json.dumps([softmaxlib.__file__, softmaxlib.__version__, y, [*new]]))
"""
    said = python("-c", code, cwd=tmp_path, path=tmp_path)
    file, number, y, new = json.loads(said)
    assert Path(file).is_relative_to(tmp_path.resolve())
    assert number == softmaxlib.__version__
    assert y == [0.5, 0.5]
    assert new == [], "more than PyTorch and NumPy was imported"


# ------------------------------------------------------------- the version


def test_the_version_has_one_place_and_is_quoted_right():
    assert "version" in PROJECT["dynamic"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == softmaxlib.__version__
    released = re.findall(
        r"^## \[(\d\S*)\] - (\S+)$",
        (ROOT / "CHANGELOG.md").read_text(),
        re.M,
    )
    assert released[0] == (cited["version"], str(cited["date-released"]))
    assert cited["license"] == PROJECT["license"]
    assert cited["authors"] == PROJECT["authors"]


# ------------------------------------------------- what we say of installing


def test_every_install_line_works_with_the_repository_alone():
    """There is no softmaxlib on a package index: a dot must be named."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "chapters").glob("*.md")]
    pages += (ROOT / "softmaxlib").glob("*.py")
    lines = [
        (page.name, target)
        for page in pages
        for target in re.findall(
            r"pip install ([^`\n]+)", page.read_text(encoding="utf-8")
        )
    ]
    assert {name for name, _ in lines} >= {"README.md", "api.md"}
    for name, target in lines:
        if target == "-r requirements.txt":
            assert (ROOT / "requirements.txt").exists()
            continue
        match = re.fullmatch(r'(?:-e )?(?:\.|"\.\[([\w,]+)\]")', target)
        assert match, f"{name}: pip install {target}"
        extras = set(match[1].split(",") if match[1] else ())
        assert extras <= set(PROJECT["optional-dependencies"]), name


def needed(extra):
    """Return what an extra needs, with the dependencies of the library."""
    for line in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(line)
        if requirement.name != "softmaxlib":
            yield requirement
        for other in requirement.extras:
            yield from needed(other)
    yield from map(Requirement, PROJECT["dependencies"])


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_what_the_package_asks_for_allows_the_pinned_environment(extra):
    for requirement in needed(extra):
        found = version(requirement.name)
        assert requirement.specifier.contains(found), requirement


def test_the_extra_of_the_notebooks_has_all_that_they_import():
    provided = {requirement.name for requirement in needed("notebooks")}
    provided.add("softmaxlib")
    distributions = packages_distributions()
    chapters = sorted((ROOT / "chapters").glob("*.ipynb"))
    imported = set()
    for path in chapters:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                for node in ast.walk(ast.parse("".join(cell["source"]))):
                    if isinstance(node, ast.Import):
                        imported |= {alias.name for alias in node.names}
                    elif isinstance(node, ast.ImportFrom):
                        imported.add(node.module)
    names = {name.split(".")[0] for name in imported}
    names -= sys.stdlib_module_names
    assert "sklearn" in names
    for name in names:
        assert provided & set(distributions[name]), name
