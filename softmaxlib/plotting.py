"""The figures of the book: one style, and the drawings it repeats.

Needs matplotlib. Colours are those of Okabe and Ito (2008), distinguishable
with every common form of colour vision.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib import rcsetup
from matplotlib.axes import Axes
from torch import Tensor

__all__ = [
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "bars",
    "simplex_axes",
    "simplex_point",
    "use_style",
]

BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"
RED, PURPLE, SKY = "#d55e00", "#cc79a7", "#56b4e9"
GREY = "#6e6e6e"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)

_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.prop_cycle": rcsetup.cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.dpi": 96,
    "figure.figsize": (7.2, 3.0),
    "font.size": 10,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    # Without a fixed salt every build would change every figure's bytes.
    "svg.hashsalt": "softmaxlib",
}


def use_style() -> None:
    """Switch matplotlib to the book's style; SVG inside a notebook."""
    plt.rcParams.update(_STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        # Has no types.
        choose: Callable[..., None] = set_matplotlib_formats
        choose("svg", metadata={"Date": None})
    except (ImportError, AttributeError):
        # Not in a notebook: nothing is shown inline.
        pass


def bars(
    ax: Axes,
    values: Tensor,
    labels: Iterable[object] | None = None,
    *,
    color: str = BLUE,
    title: str = "",
    digits: int = 3,
    limit: float | None = 1.0,
) -> None:
    """Draw one bar a class, with its value above.

    Args:
        ax: where to draw.
        values: shape (K,).
        labels: K names of the classes; 1 to K by default.
        color: of the bars.
        title: of the axes.
        digits: decimals of the printed values.
        limit: top of the axis; None for automatic.
    """
    heights = torch.as_tensor(values).detach().double().tolist()
    if labels is None:
        labels = range(1, len(heights) + 1)
    drawn = ax.bar(range(len(heights)), heights, color=color)
    texts = [f"{h:.{digits}f}" for h in heights]
    ax.bar_label(drawn, texts, padding=2, fontsize=8)
    ax.set_xticks(range(len(heights)), [str(name) for name in labels])
    if limit is not None:
        ax.set_ylim(0, limit * 1.08)
    ax.set_title(title)


def simplex_point(p: Tensor) -> tuple[Tensor, Tensor]:
    """Planar coordinates of distributions over three classes.

    Args:
        p: shape (..., 3), non-negative, summing to one.

    Returns:
        x and y, each of shape (...): class 1 is the lower left corner of a
        triangle of side one, class 2 the lower right, class 3 the top.
    """
    p = torch.as_tensor(p).double()
    return p[..., 1] + p[..., 2] / 2, p[..., 2] * math.sqrt(3) / 2


def simplex_axes(
    ax: Axes, labels: Iterable[str] = ("class 1", "class 2", "class 3")
) -> None:
    """Turn `ax` into an empty probability triangle with named corners."""
    height = math.sqrt(3) / 2
    ax.plot([0, 1, 0.5, 0], [0, 0, height, 0], color=GREY, linewidth=1)
    places = (
        (0, -0.03, "center", "top"),
        (1, -0.03, "center", "top"),
        (0.5, height + 0.03, "center", "bottom"),
    )
    for name, (x, y, ha, va) in zip(labels, places, strict=True):
        ax.text(x, y, name, ha=ha, va=va)
    ax.set_aspect("equal")
    ax.axis("off")
