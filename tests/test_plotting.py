"""The drawings say what they were given."""

import math

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
import torch

from softmaxlib import plotting


@pytest.fixture
def ax():
    mpl.use("Agg")
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_bars(ax):
    plotting.bars(ax, torch.tensor([0.25, 0.75]), title="two")
    assert [bar.get_height() for bar in ax.patches] == [0.25, 0.75]
    assert [text.get_text() for text in ax.texts] == ["0.250", "0.750"]
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names == ["1", "2"]
    assert ax.get_title(loc="left") == "two" or ax.get_title() == "two"
    plotting.bars(ax, [5.0], ["five"], limit=None, digits=1)
    assert ax.texts[-1].get_text() == "5.0"


def test_simplex(ax):
    x, y = plotting.simplex_point(torch.eye(3))
    assert x.tolist() == [0, 1, 0.5]
    assert y.tolist() == [0, 0, math.sqrt(3) / 2]
    centre = plotting.simplex_point(torch.full((3,), 1 / 3))
    assert centre[1].item() == pytest.approx(math.sqrt(3) / 6)
    plotting.simplex_axes(ax, ("a", "b", "c"))
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c"]


def test_style_is_reproducible():
    with mpl.rc_context():
        plotting.use_style()
        assert mpl.rcParams["svg.hashsalt"] == "softmaxlib"
    assert len(set(plotting.CYCLE)) == 6
