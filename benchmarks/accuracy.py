"""The worst error of the library and its peers, against mpmath."""

import math
import pathlib

import mpmath
import scipy.special
import torch

import softmaxlib
from benchmarks.measure import SUMMARY, table
from softmaxlib.testing import oracle, ulp_error

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("softmax", "log_softmax", "logsumexp")
LIBRARIES = ("softmaxlib", "PyTorch", "SciPy")
PICTURE = pathlib.Path(__file__).with_name("accuracy.svg")
SIZES = (1, 2, 10, 1000, 20_000, 131_072)


def families(size):
    """The kinds of rows on which softmax implementations differ."""
    generator = torch.Generator().manual_seed(0)
    double = {"generator": generator, "dtype": torch.float64}
    normal = torch.randn(size, **double)
    unit = torch.rand(size, **double)
    dominant = normal.clone()
    dominant[size // 2] = normal.max() + math.log(size) + 20
    tail = -60 - 45 * unit
    tail[0] = 0
    return {
        "normal": normal,
        "wide": 2000 * unit - 1000,
        "dominant": dominant,
        "tied": torch.full((size,), 3.3, dtype=torch.float64),
        "nearly tied": 1e-3 * normal,
        "offset": 300 + 5 * normal,
        "tail": tail,
    }


def by_scipy(name):
    def function(x, dim):
        if x.dtype == torch.bfloat16:
            return None
        value = getattr(scipy.special, name)(x.numpy(), axis=dim)
        return torch.as_tensor(value, dtype=x.dtype)

    return function


def worst():
    """Largest errors in ulp, by (function, format, library)."""
    found = {}
    for size in SIZES:
        for z in families(size).values():
            for dtype in FORMATS:
                x = z.to(dtype)
                # Enough bits for these rows; the default assumes the worst.
                exact = oracle(x, bits=200 if size > 10_000 else None)
                _compare(found, x, exact)
    return found


def _compare(found, x, exact):
    for name in NAMES:
        libraries = {
            "softmaxlib": getattr(softmaxlib, name),
            "PyTorch": getattr(torch, name),
            "SciPy": by_scipy(name),
        }
        expect, scale = getattr(exact, name), None
        if name == "logsumexp":
            expect = [expect]
            if x.dtype == torch.float64:
                # Ill-conditioned near zero: see the docstring.
                top = abs(mpmath.mpf(x.max().item()))
                scale = max(abs(expect[0]), top, mpmath.log(len(x)))
        for library, function in libraries.items():
            got = function(x, 0)
            if got is None:
                continue
            error = ulp_error(got.reshape(-1), expect, scale=scale)
            key = (name, x.dtype, library)
            found[key] = max(found.get(key, 0.0), error)


def show(error):
    if error is None:
        return "–"
    return f"{error:.2f}" if error < 100 else f"{error:.2g}"


def draw(found):
    """The picture of the README, from the same numbers."""
    import matplotlib.pyplot as plt

    from softmaxlib import plotting

    plotting.use_style()
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
    colors = (plotting.BLUE, plotting.ORANGE, plotting.GREEN)
    for ax, name in zip(axes, NAMES, strict=True):
        for k, library in enumerate(LIBRARIES):
            errors = [found.get((name, f, library), 0) for f in FORMATS]
            places = [i + 0.27 * (k - 1) for i in range(len(FORMATS))]
            ax.bar(places, errors, 0.25, color=colors[k], label=library)
        ax.axhline(0.5, color=plotting.GREY, linewidth=0.8)
        ax.set_yscale("log", base=10)
        ax.set_ylim(0.1, 1e17)
        ax.set_title(name)
        labels = [str(f).removeprefix("torch.") for f in FORMATS]
        ax.set_xticks(range(len(FORMATS)), labels, fontsize=8)
    axes[0].set_ylabel("worst error in ulp")
    axes[0].legend(fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def report() -> str:
    found = worst()
    draw(found)
    rows = [
        [name, str(dtype).removeprefix("torch.")]
        + [show(found.get((name, dtype, library))) for library in LIBRARIES]
        for name in NAMES
        for dtype in FORMATS
    ]
    SUMMARY["accuracy"] = table(["function", "format", *LIBRARIES], rows)
    return "\n\n".join(
        [
            "## Accuracy",
            "Worst error in units in the last place (ulp) against mpmath, "
            "over normal, wide (±1000), dominant, tied, nearly tied, offset "
            f"and extreme-tail rows of {SIZES[0]} to {SIZES[-1]:,} classes. "
            "For log-sum-exp in float64 an ulp is that of the largest of "
            "|LSE|, |max z| and log K. SciPy knows no bfloat16; inf "
            "stands for an infinity or NaN where a number belongs.",
            SUMMARY["accuracy"],
        ]
    )


if __name__ == "__main__":
    print(report())
