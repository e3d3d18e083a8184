"""The chapters notice every saboteur, and every check notices one."""

import ast
import collections
import functools
import math
import pathlib
from collections.abc import Iterable, Iterator

import pytest
import replay
import saboteurs
import torch
from hypothesis import strategies as st

import softmaxlib
from softmaxlib import testing

# Enough to catch, as the attacks put their edge cases first.
CASES = 60

# Every check of a statement about softmax must notice these.
ALWAYS = ("uniform", "doubled_temperature", "hard_arg_max")
# A statement is about softmax if its check calls one of these, itself or by
# a helper of the chapter.
ABOUT_SOFTMAX = {
    "LogSoftmax",
    "Softmax",
    "log_softmax",
    "log_softmax_jacobian",
    "softmax",
    "softmax_hessian",
    "softmax_hvp",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
}
# Except where a statement is about something else, and true with any of the
# three in the place of softmax: its label, and why, in a sentence.
EXCUSED = {
    "checks:thm-safe-step": "A flatter softmax obeys its bound, too.",
}

# What nobody sabotages: the foil is wrong already.
FOILS = {"naive_softmax"}


def together(name: str, chapter: str):
    """A parameter whose tests run in one process, where they share below."""
    return pytest.param(name, marks=pytest.mark.xdist_group(chapter))


@pytest.fixture(
    scope="module", params=[together(c, c) for c in replay.notebooks()]
)
def chapter(request):
    return request.param


# Whether a saboteur is caught by a cell: {(chapter, saboteur): {id: ...}}.
_known: dict[tuple[str, str], dict[str, bool]] = collections.defaultdict(
    dict
)


def run(
    chapter: str, name: str, wanted: Iterable[str]
) -> Iterator[replay.Outcome]:
    """Replay a chapter on the library as patched by a saboteur."""
    with pytest.MonkeyPatch.context() as patch, testing.case_limit(CASES):
        saboteurs.SABOTEURS[name](patch)
        yield from replay.replay(chapter, wanted)


def catches(
    chapter: str, name: str, wanted: Iterable[str]
) -> Iterator[str]:
    """The ids of those of the wanted cells that notice a saboteur."""
    known = _known[chapter, name]
    yield from [cell for cell in wanted if known.get(cell)]
    unknown = [cell for cell in wanted if cell not in known]
    for outcome in run(chapter, name, unknown) if unknown else ():
        known[outcome.cell.id] = outcome.caught
        if outcome.caught:
            yield outcome.cell.id


class _Noting(pytest.MonkeyPatch):
    """Notes the names of what is patched, and of its class."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def setattr(self, target, name, *value, **options):
        self.names |= {name, getattr(target, "__name__", name)}
        super().setattr(target, name, *value, **options)


@functools.cache
def touches(name: str) -> set[str]:
    """The names of the functions and kernels that a saboteur replaces."""
    patch = _Noting()
    try:
        saboteurs.SABOTEURS[name](patch)
    finally:
        patch.undo()
    return patch.names


def likely(chapter: str, name: str, wanted: Iterable[str]) -> list[str]:
    """The cells that call what a saboteur replaces, by its own name.

    They are asked first: a cell that notices nothing takes longest.
    """
    _, calls = replay.untouched(chapter, CASES)
    return [cell for cell in wanted if calls[cell] & touches(name)]


def everything(chapter: str, name: str, wanted: list[str]) -> list[str]:
    return wanted


def described(chapter: str, ids: Iterable[str]) -> list[str]:
    cells = replay.tagged(chapter)
    return [f"{cell} {' '.join(cells[cell].labels)}" for cell in ids]


def about_softmax(chapter: str) -> list[str]:
    """The check cells that must notice each of the three saboteurs."""
    _, calls = replay.untouched(chapter, CASES)
    return [
        cell.id
        for cell in replay.tagged(chapter).values()
        if cell.checks
        and calls[cell.id] & ABOUT_SOFTMAX
        and not cell.promises
        and not EXCUSED.keys() & cell.labels
    ]


def computing(chapter: str) -> list[str]:
    """The cells that check a statement, or show it with the library."""
    _, calls = replay.untouched(chapter, CASES)
    return [
        cell.id
        for cell in replay.tagged(chapter).values()
        if cell.checks or calls[cell.id] - FOILS
    ]


def test_the_untouched_library_passes(chapter):
    outcomes, _ = replay.untouched(chapter, CASES)
    assert len(outcomes) == len(replay.tagged(chapter))
    failed = [o for o in outcomes if o.error is not None]
    assert not failed, f"{failed[0].cell.id}: {failed[0].error!r}"


@pytest.mark.parametrize("name", ALWAYS)
def test_statements_about_softmax_notice_another_softmax(chapter, name):
    wanted = about_softmax(chapter)
    caught = set(catches(chapter, name, wanted))
    blind = [cell for cell in wanted if cell not in caught]
    assert not blind, f"{name} survives {described(chapter, blind)}"


def test_every_cell_notices_a_saboteur(chapter):
    empty = computing(chapter)
    # The chapter's own saboteurs first, and no more than it takes.
    order = sorted(
        saboteurs.SABOTEURS,
        key=lambda name: (
            name not in ALWAYS,
            saboteurs.SABOTEURS[name].chapter != chapter,
        ),
    )
    for some in (likely, everything):
        for name in order:
            wanted = some(chapter, name, empty)
            caught = set(catches(chapter, name, wanted))
            empty = [cell for cell in empty if cell not in caught]
    assert not empty, f"nothing fails {described(chapter, empty)}"


@pytest.mark.parametrize(
    "name", [together(n, f.chapter) for n, f in saboteurs.SABOTEURS.items()]
)
def test_every_saboteur_is_noticed_by_a_chapter(name):
    first = saboteurs.SABOTEURS[name].chapter
    chapters = sorted(replay.notebooks(), key=lambda c: c != first)
    # Where it was caught before, it need not run again.
    chapters.sort(key=lambda c: not any(_known[c, name].values()))
    assert any(
        cell
        for chapter in chapters
        for some in (likely, everything)
        for cell in catches(
            chapter, name, some(chapter, name, list(replay.tagged(chapter)))
        )
    )


def test_there_are_saboteurs_and_each_says_what_it_does():
    assert len(saboteurs.SABOTEURS) >= 57
    for function in saboteurs.SABOTEURS.values():
        assert function.__doc__.strip().endswith(".")
        assert function.chapter in replay.notebooks()


def test_every_excuse_names_a_check_and_its_reason():
    labels = {
        label
        for chapter in replay.notebooks()
        for cell in replay.tagged(chapter).values()
        for label in cell.labels
    }
    assert labels >= EXCUSED.keys()
    assert all(reason.endswith(".") for reason in EXCUSED.values())


def test_saboteurs_know_nothing_private():
    folder = pathlib.Path(saboteurs.__file__).parent
    for path in folder.glob("*.py"):
        if path.stem == "__init__":
            continue  # it makes the seams
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            match node:
                case ast.ImportFrom(module, names):
                    parts = [*module.split("."), *[a.name for a in names]]
                    if parts[0] == "softmaxlib":
                        assert not any(p.startswith("_") for p in parts)
                case ast.Attribute(ast.Name("softmaxlib"), name):
                    assert not name.startswith("_"), path


# --- the seams -----------------------------------------------------------


def test_a_replaced_function_is_wrong_wherever_it_is_used():
    x, weight = torch.ones(1, 2), torch.zeros(3, 2)
    target = torch.tensor([0])
    right = softmaxlib.weight_gradient

    def doubled(*arguments, **options):
        part, bias = right(*arguments, **options)
        return 2 * part, bias

    with pytest.MonkeyPatch.context() as patch:
        saboteurs.replace(patch, "weight_gradient", doubled)
        wrong = softmaxlib.weight_gradient(x, weight, target)[0]
        assert softmaxlib.regression.weight_gradient is doubled
    assert softmaxlib.weight_gradient is right
    assert softmaxlib.regression.weight_gradient is right
    assert torch.equal(wrong, 2 * right(x, weight, target)[0])


@pytest.mark.parametrize("size", [3, 10_000])
def test_a_wrong_kernel_is_used_for_any_size(size):
    z = torch.randn(size, generator=torch.Generator().manual_seed(1))
    with pytest.MonkeyPatch.context() as patch:
        saboteurs.kernel(patch, "softmax", lambda *a: a[-1].fill_(7))
        assert softmaxlib.softmax(z, 0).eq(7).all()
    assert softmaxlib.softmax(z, 0).sum() < 7


def test_a_wrong_check_is_asked():
    z = torch.zeros(2, 3)
    with pytest.MonkeyPatch.context() as patch:
        saboteurs.check(patch, "dimension", lambda *a: 0)
        assert softmaxlib.softmax(z, 1)[0, 0] == 0.5
    assert softmaxlib.softmax(z, 1)[0, 0] < 0.5


@pytest.mark.parametrize("mask", [None, [True, False, True, True]])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0, math.inf])
def test_the_plain_formulas_are_right(temperature, mask):
    z = torch.tensor([[1.0, 40.0, 1.0, -math.inf]], dtype=torch.float64)
    mask = None if mask is None else torch.tensor([mask])
    options = {"temperature": temperature, "mask": mask}
    for name in ("softmax", "log_softmax"):
        value = getattr(saboteurs.plain, name)(z, mask, 1, temperature)
        known = getattr(softmaxlib, name)(z, 1, **options)
        torch.testing.assert_close(value, known, rtol=1e-14, atol=0)
    value = saboteurs.plain.logsumexp(z, mask, 1)
    known = softmaxlib.logsumexp(z, 1, keepdim=True, mask=mask)
    torch.testing.assert_close(value, known, rtol=1e-14, atol=0)


# --- fewer cases ---------------------------------------------------------


def test_a_case_limit_shortens_attacks_and_nothing_else():
    @testing.attack("thm-a", st.integers(), cases=2)
    def free(n):
        pass

    with testing.case_limit(7):

        @testing.attack("thm-a", st.integers(), cases=50)
        def limited(n):
            pass

        with testing.case_limit(20):

            @testing.attack("thm-a", st.integers(), cases=50)
            def nested(n):
                pass

        whole = testing.enumerate_cases("thm-a", range(30), lambda n: None)
        assert testing.smallest(st.integers(), lambda n: n > 99) == 100

    @testing.attack("thm-a", st.integers(), cases=50)
    def after(n):
        pass

    tried = [e.cases for e in (free, limited, nested, whole, after)]
    assert tried == [2, 7, 7, 30, 50]


def test_a_case_limit_is_at_least_one():
    with (
        pytest.raises(ValueError, match="at least 1, got 0"),
        testing.case_limit(0),
    ):
        pass
