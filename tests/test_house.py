"""The house of the library: its budgets, its floors, and who may know whom.

Read from the sources alone. Every rule is tried on a bad snippet, too: a
rule that nothing breaks is an empty rule.
"""

import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import softmaxlib

ROOT = Path(__file__).resolve().parent.parent

# The arrows go down only: a module imports from the floors below its own.
FLOORS = {
    "_blocks": 1,
    "_check": 1,
    "_kernels": 2,
    "_linear": 2,
    "_plain": 2,
    "_autograd": 3,
    "_fused": 3.5,
    "calibration": 5,
    "derivatives": 4,
    "functional": 4,
    "loss": 4,
    "online": 4,
    "sampling": 4,
    "distributed": 5,
    "modules": 5,
    "regression": 5,
    "training": 6,
    "__init__": 7,
}
# These import the library, never the reverse, and may need other packages.
ASIDE = {"plotting", "processes", "testing"}

# The design allows 2,600 lines: the house is larger, and may not grow on.
TOTAL, MODULE, FUNCTION = 2980, 330, 45

# It alone may touch what PyTorch keeps to itself.
DISPATCHER = "_autograd"


def source(module: str) -> str:
    path = ROOT / "softmaxlib" / f"{module}.py"
    return path.read_text(encoding="utf-8")


MODULES = sorted(path.stem for path in (ROOT / "softmaxlib").glob("*.py"))
TREES = {module: ast.parse(source(module)) for module in MODULES}


# ------------------------------------------------------------- the budgets


def docstrings(tree: ast.AST) -> Iterator[ast.Constant]:
    scopes = (
        ast.Module,
        ast.ClassDef,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
    )
    for node in ast.walk(tree):
        if isinstance(node, scopes) and node.body:
            match node.body[0]:
                case ast.Expr(ast.Constant(str()) as text):
                    yield text


def code_lines(text: str) -> set[int]:
    """The numbers of the lines with code.

    Those are the lines with a token that is no comment and no part of a
    docstring. A string over several lines has a token on each of them.
    """
    spans = [
        ((d.lineno, d.col_offset), (d.end_lineno, d.end_col_offset))
        for d in docstrings(ast.parse(text))
    ]
    nothing = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in nothing:
            continue
        if not any(a <= token.start and token.end <= b for a, b in spans):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Every function with its lines of code, its decorators among them."""
    lines = code_lines(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(d.lineno for d in [node, *node.decorator_list])
            inside = range(first, node.end_lineno + 1)
            yield node.name, len(lines.intersection(inside))


SAMPLE = '''\
"""Two lines
of docstring."""

import math  # code

# A comment.


@decorator
def f(
    x,
):
    """One line."""

    def g():
        "Another."
        return """not

a docstring"""

    """Not a docstring, either."""
    return g  # code


class C: "A docstring beside code."
'''


def test_only_lines_of_code_are_counted():
    assert code_lines(SAMPLE) == {
        *(4, 9, 10, 11, 12, 15, 17, 18, 19, 21, 22, 25)
    }
    assert dict(functions(SAMPLE)) == {"f": 10, "g": 4}


def test_the_library_is_small():
    sizes = {m: len(code_lines(source(m))) for m in FLOORS}
    total = sum(sizes.values())
    assert total <= TOTAL, f"{total} lines of code: {sizes}"


@pytest.mark.parametrize("module", MODULES)
def test_no_module_and_no_function_is_long(module):
    assert len(code_lines(source(module))) <= MODULE
    sizes = functions(source(module))
    assert [(name, n) for name, n in sizes if n > FUNCTION] == []


# ---------------------------------------------------- what a file refers to


def imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(What is imported, the name it gets here), both dotted.

    A relative import is one of softmaxlib, which has no packages inside.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                # `import a.b` binds a, and so a.b under its own name.
                yield alias.name, alias.asname or alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = ["softmaxlib"] if node.level else []
            parts += [node.module] if node.module else []
            for alias in node.names:
                name = alias.asname or alias.name
                yield ".".join([*parts, alias.name]), name


def dotted(node: ast.AST) -> str:
    """The dotted name that an expression is, with its start: a.b, ?.b."""
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(value, name):
            return f"{dotted(value)}.{name}"
        case ast.Call(ast.Name("super")):
            return "super"
    return "?"


def references(tree: ast.AST) -> set[str]:
    """Every dotted name in a file, those of its imports written out.

    So are the names in `getattr(a, "b")`, and in strings such as
    "softmaxlib.loss", by which one may import or patch.
    """
    bound = {name: path for path, name in imports(tree)}
    found = {path for path, _ in imports(tree)}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute():
                name = dotted(node)
            case ast.Call(
                ast.Name("getattr" | "setattr" | "delattr" | "hasattr"),
                [value, ast.Constant(str(attribute)), *_],
            ):
                name = f"{dotted(value)}.{attribute}"
            case ast.Constant(str(text)) if re.fullmatch(
                r"softmaxlib(\.\w+)+", text
            ):
                name = text
            case _:
                continue
        start, _, rest = name.partition(".")
        found.add(f"{bound.get(start, start)}.{rest}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def neighbours(tree: ast.AST) -> set[str]:
    """The modules of softmaxlib that a file imports or refers to.

    A name that is no module is one of the package, and so of `__init__`.
    """
    paths = [path.split(".") for path in references(tree)]
    names = {p[1] for p in paths if p[0] == "softmaxlib" and len(p) > 1}
    return {n if n in MODULES else "__init__" for n in names}


def neighbours_secrets(tree: ast.AST) -> set[str]:
    """Private names inside the modules of softmaxlib, or below them."""
    return {
        path
        for path in references(tree)
        if path.startswith("softmaxlib.")
        and any(map(is_private, path.split(".")[2:]))
    }


def foreign_secrets(tree: ast.AST) -> set[str]:
    """Private names of anything but softmaxlib and the file's own classes.

    Whose attribute it is cannot be told in general: that of any expression
    but `self`, `cls`, `super()` or a class of the file counts.
    """
    own = {"self", "cls", "super", "softmaxlib"}
    own |= {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    found = set()
    for path in references(tree):
        start, *parts = path.split(".")
        # self._x is its own, self.x._y is not.
        if any(map(is_private, parts[start in own :])):
            found.add(path)
    return found - neighbours_secrets(tree)


# -------------------------------------------------------------- the floors


def broken_arrows(module: str, tree: ast.AST) -> set[str]:
    """The modules that one refers to, though they are not below it."""
    aside = max(FLOORS.values()) + 1
    floor = FLOORS.get(module, aside)
    return {n for n in neighbours(tree) if FLOORS.get(n, aside) >= floor}


def test_every_module_has_its_floor():
    assert set(MODULES) == FLOORS.keys() | ASIDE


@pytest.mark.parametrize("module", MODULES)
def test_arrows_go_down_only(module):
    assert broken_arrows(module, TREES[module]) == set()


@pytest.mark.parametrize(
    "text",
    [
        "from softmaxlib import loss",  # beside
        "from softmaxlib import modules as below",  # above
        "from softmaxlib.loss import cross_entropy",
        "import softmaxlib.testing",  # aside
        "def f():\n    from . import regression",
        "from .modules import Softmax",
        "from softmaxlib import softmax",  # from the roof
        "import softmaxlib\nsoftmaxlib.softmax(x, 0)",
        "import softmaxlib as s\ns.loss.cross_entropy(x, y)",
        'importlib.import_module("softmaxlib.loss")',
    ],
)
def test_an_arrow_beside_or_up_is_noticed(text):
    tree = ast.parse(f"from softmaxlib import _check\n{text}\n")
    assert len(broken_arrows("functional", tree)) == 1


def test_the_whole_house_hangs_together():
    """Every room is entered from above: nothing in it is forgotten."""
    used = set().union(*(neighbours(TREES[m]) for m in FLOORS))
    assert used == FLOORS.keys() - {"__init__"}


def packages(tree: ast.AST) -> set[str]:
    return {path.split(".")[0] for path, _ in imports(tree)}


@pytest.mark.parametrize("module", FLOORS)
def test_the_library_needs_torch_and_numpy_only(module):
    needed = packages(TREES[module]) - sys.stdlib_module_names
    assert needed <= {"torch", "numpy", "softmaxlib"}


def test_a_further_package_is_noticed():
    tree = ast.parse("import math\ndef f():\n    import scipy.special")
    assert packages(tree) - sys.stdlib_module_names == {"scipy"}


# ------------------------------------------------------- the private names


@pytest.mark.parametrize("module", MODULES)
def test_no_private_name_crosses_a_module(module):
    assert neighbours_secrets(TREES[module]) == set()


@pytest.mark.parametrize(
    "text",
    [
        "from softmaxlib._check import _fail",
        "from ._check import _fail as fail",
        "from softmaxlib import _check as c\nc._fail()",
        "import softmaxlib._check\nsoftmaxlib._check._fail()",
        "from softmaxlib import _check\ngetattr(_check, '_fail')",
        "from softmaxlib.loss import Case\nCase._of(x)",
        "from softmaxlib._blocks import Rows\nx = Rows._inverse",
    ],
)
def test_a_private_name_that_crosses_is_noticed(text):
    assert len(neighbours_secrets(ast.parse(text))) == 1


def test_only_the_dispatcher_touches_private_names_of_pytorch():
    found = {
        (module, name)
        for module in MODULES
        if module != DISPATCHER
        for name in foreign_secrets(TREES[module])
    }
    assert found == set()
    assert foreign_secrets(TREES[DISPATCHER]), "why have a dispatcher?"


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._C",
        "import torch as t\nt._foreach_add(x, y)",
        "from torch._C import thing",
        "from torch import _dynamo",
        "import torch._dynamo",
        "from torch.autograd import forward_ad as f\nf._current_level",
        "x._version",
        "x.detach()._version",
        "getattr(torch.ops.aten, '_softmax')",
        "rows[0].x._base",
        "class A:\n    def f(self):\n        return self.x._base",
    ],
)
def test_a_private_name_of_pytorch_is_noticed(text):
    assert len(foreign_secrets(ast.parse(text))) == 1


def test_what_a_class_keeps_to_itself_is_its_own():
    text = "class A:\n    def f(self, x):\n"
    text += "        return self._y, super()._f, A._z, x.__class__\n"
    assert foreign_secrets(ast.parse(text)) == set()


# ------------------------------------------- the book knows the public side


def readers() -> Iterator[tuple[str, str]]:
    """(Name, code) of all that stands outside the house.

    The chapters, the benchmarks, the extensions of the book, the modules
    aside, and the roof: `softmaxlib/__init__.py`.
    """
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = ["".join(c["source"]) for c in cells if is_code(c)]
        yield path.name, "\n\n".join(code)
    for folder in ("benchmarks", "_ext"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield f"{folder}/{path.name}", path.read_text(encoding="utf-8")
    for module in sorted(ASIDE | {"__init__"}):
        yield f"softmaxlib/{module}.py", source(module)


def is_code(cell: dict) -> bool:
    return cell["cell_type"] == "code"


def library_secrets(tree: ast.AST) -> set[str]:
    """Private modules and names of softmaxlib."""
    return {
        path
        for path in references(tree)
        if path.startswith("softmaxlib.")
        and any(map(is_private, path.split(".")))
    }


READERS = dict(readers())


@pytest.mark.parametrize("name", READERS)
def test_the_book_uses_no_private_module(name):
    assert library_secrets(ast.parse(READERS[name])) == set()


def test_the_chapters_and_the_benchmarks_are_read():
    assert sum(name.endswith(".ipynb") for name in READERS) >= 13
    assert "benchmarks/measure.py" in READERS
    using = {
        n for n, code in READERS.items() if neighbours(ast.parse(code))
    }
    assert len(using) > 13


@pytest.mark.parametrize(
    "text",
    [
        "from softmaxlib import _kernels",
        "from softmaxlib._kernels import softmax",
        "import softmaxlib._kernels as k",
        "import softmaxlib as s\ns._kernels",
        "from softmaxlib import testing\ntesting._settings(3)",
        'patch("softmaxlib._kernels.softmax")',
    ],
)
def test_a_private_module_in_the_book_is_noticed(text):
    assert len(library_secrets(ast.parse(text))) == 1


# ---------------------------------------------------------------- the roof


PUBLIC = [m for m in MODULES if FLOORS.get(m, 0) >= 4 and m != "__init__"]


def test_the_roof_lets_every_public_name_through_once():
    exported = Counter()
    for module in PUBLIC:
        inside = importlib.import_module(f"softmaxlib.{module}")
        exported.update(inside.__all__)
        for name in inside.__all__:
            assert getattr(softmaxlib, name) is getattr(inside, name)
    assert Counter(softmaxlib.__all__) == exported
    assert set(exported.values()) == {1}
    assert exported.keys() <= set(dir(softmaxlib))


@pytest.mark.parametrize("module", PUBLIC)
def test_what_looks_public_in_a_module_is_public(module):
    """A function or class without an underscore is in `__all__`."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = {n.name for n in TREES[module].body if isinstance(n, kinds)}
    inside = importlib.import_module(f"softmaxlib.{module}")
    public = {name for name in defined if not is_private(name)}
    assert public == set(inside.__all__) & defined
    constants = set(inside.__all__) - defined
    assert all(name.isupper() for name in constants), constants


def test_importing_the_library_warns_of_nothing():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-W", "error", "-c", "import softmaxlib"],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )


# What somebody writes who uses the library, and what it is told about it.
CALLS = {
    "softmax(z, 0)": "torch._tensor.Tensor",
    "softmaxlib.logsumexp(z, (0, 1))": "torch._tensor.Tensor",
    "cross_entropy(z, z, reduction='none')": "torch._tensor.Tensor",
    "SoftmaxRegression(3, 2).fit(z, z)": "softmaxlib.training.",
    "cross_entropy(z, z, reduction='maen')": "error: Argument",
    "softmaxlib.softmax(z)": "error: Missing positional argument",
    "softmaxlib.softmaks(z, 0)": "error: Module has no attribute",
}


def test_types_reach_whoever_imports_the_library(tmp_path):
    lines = [
        "import softmaxlib",
        "import torch",
        "from softmaxlib import SoftmaxRegression, cross_entropy, softmax",
        "z = torch.zeros(3, 3)",
        *(f"reveal_type({call})" for call in CALLS),
    ]
    (tmp_path / "use.py").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy", "--strict"),
            *("--config-file", ROOT / "pyproject.toml"),
            *("--cache-dir", ROOT / ".mypy_cache", tmp_path / "use.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for number, (call, said) in enumerate(CALLS.items(), 5):
        found = re.findall(rf"use\.py:{number}: (.*)", done.stdout)
        assert any(said in line for line in found), (call, done.stdout)
    expected = sum(said.startswith("error") for said in CALLS.values())
    assert done.stdout.count("error:") == expected, done.stdout
