"""The chapters notice every saboteur, and every check notices one."""

from collections.abc import Iterator

import pytest
import replay
import saboteurs

from softmaxlib import _kernels

# Enough to catch, as the attacks put their edge cases first.
CASES = 60


def run(chapter: str, name: str | None) -> Iterator[replay.Outcome]:
    """Replay a chapter on the library as patched by a saboteur."""
    with pytest.MonkeyPatch.context() as patch, replay.hurried(CASES):
        # Small tensors, too, go through the code that is sabotaged.
        patch.setattr(_kernels, "_SMALL", 0)
        if name is not None:
            saboteurs.SABOTEURS[name](patch)
        yield from replay.replay(chapter)


def labels(chapter: str) -> set[str]:
    return {
        label for cell in replay.cells(chapter) for label in cell.labels
    }


def caught(chapter: str, name: str) -> Iterator[str]:
    """The labels of the cells that notice a saboteur, as they do."""
    for outcome in run(chapter, name):
        if outcome.caught:
            yield from outcome.cell.labels


@pytest.mark.parametrize("chapter", replay.notebooks())
def test_the_untouched_library_passes(chapter):
    failed = [o for o in run(chapter, None) if o.error is not None]
    assert not failed, f"{failed[0].cell.id}: {failed[0].error!r}"


@pytest.mark.parametrize("chapter", replay.notebooks())
def test_every_check_notices_a_saboteur(chapter):
    empty = {t for t in labels(chapter) if t.startswith("checks:")}
    # The chapter's own saboteurs first, and no more than it takes.
    order = sorted(
        saboteurs.SABOTEURS,
        key=lambda name: saboteurs.SABOTEURS[name].chapter != chapter,
    )
    for name in order:
        if empty:
            empty -= set(caught(chapter, name))
    assert not empty, "checks that no saboteur makes fail"


@pytest.mark.parametrize("name", saboteurs.SABOTEURS)
def test_every_saboteur_is_noticed_by_a_chapter(name):
    first = saboteurs.SABOTEURS[name].chapter
    chapters = sorted(replay.notebooks(), key=lambda c: c != first)
    assert any(caught(chapter, name) for chapter in chapters)


def test_there_are_saboteurs_and_each_says_what_it_does():
    assert len(saboteurs.SABOTEURS) >= 10
    for function in saboteurs.SABOTEURS.values():
        assert function.__doc__.strip().endswith(".")
