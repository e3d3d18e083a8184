"""The worst error of the library and its peers, against mpmath."""

import math

import mpmath
import scipy.special
import torch

import softmaxlib
from benchmarks.measure import table
from softmaxlib.testing import oracle, ulp_error

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = (2, 10, 1000, 20_000)


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
                exact = oracle(x)
                _compare(found, x, exact)
    return found


def _compare(found, x, exact):
    for name in ("softmax", "log_softmax", "logsumexp"):
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


def report() -> str:
    found = worst()
    libraries = ("softmaxlib", "PyTorch", "SciPy")
    rows = [
        [name, str(dtype).removeprefix("torch.")]
        + [show(found.get((name, dtype, library))) for library in libraries]
        for name in ("softmax", "log_softmax", "logsumexp")
        for dtype in FORMATS
    ]
    return "\n\n".join(
        [
            "## Accuracy",
            "Worst error in units in the last place (ulp) against mpmath, "
            "over normal, wide (±1000), dominant, tied, nearly tied, offset "
            f"and extreme-tail rows of {SIZES[0]} to {SIZES[-1]:,} classes. "
            "For log-sum-exp in float64 an ulp is that of the largest of "
            "|LSE|, |max z| and log K. SciPy knows no bfloat16.",
            table(["function", "format", *libraries], rows),
        ]
    )


if __name__ == "__main__":
    print(report())
