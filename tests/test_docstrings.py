"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import softmaxlib

MODULES = [
    module.name
    for module in pkgutil.iter_modules(softmaxlib.__path__, "softmaxlib.")
    if not module.name.split(".")[-1].startswith("_")
]
PUBLIC = [name for name in softmaxlib.__all__ if not name.startswith("_")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(
        module,
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_and_names_its_chapter(name):
    text = inspect.getdoc(getattr(softmaxlib, name))
    assert ">>>" in text
    assert "chapter" in text
