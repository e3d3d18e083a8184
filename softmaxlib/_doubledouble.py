"""Log-sum-exp in double-double arithmetic, for the rows that cancel.

Near its zero set the log-sum-exp of float32 logits, m + log(1 + rest), is
the difference of two numbers that agree in almost all of their bits; 53 bits
then do not suffice to round it to 24. A double-double (the unevaluated sum of
two float64 numbers) carries about 104.

The arithmetic is that of Dekker (1971), https://doi.org/10.1007/BF01397083.
"""

import math

import torch
from torch import Tensor

_SPLIT = 2.0**27 + 1
# log 2 to 160 bits, as an unevaluated sum.
_LN2 = (
    float.fromhex("0x1.62e42fefa39efp-1"),
    float.fromhex("0x1.abc9e3b39803fp-56"),
    float.fromhex("0x1.7b57a079a1934p-111"),
)
_SQUARINGS = 8
_TERMS = 9


def _two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a, b):
    p = a * b
    c, d = _SPLIT * a, _SPLIT * b
    a1, b1 = c - (c - a), d - (d - b)
    a2, b2 = a - a1, b - b1
    return p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2


def _add(x, y):
    s, e = _two_sum(x[0], y[0])
    return _two_sum(s, e + x[1] + y[1])


def _multiply(x, y):
    p, e = _two_product(x[0], y[0])
    return _two_sum(p, e + x[0] * y[1] + x[1] * y[0])


def _expm1(x):
    """exp(x) - 1 of a double-double, and the binary exponent still owed.

    Returns (m, n) with exp(x) = 2**n * (1 + m).
    """
    n = torch.round(x[0] / math.log(2)).clamp(-1100, 1100)
    r = x
    for part in _LN2:
        r = _add(r, _two_product(n, torch.full_like(n, -part)))
    r = tuple(t * 2.0**-_SQUARINGS for t in r)
    # Taylor, by Horner: r (1 + r/2 (1 + r/3 (...))), |r| < 0.0014.
    one = (torch.ones_like(n), torch.zeros_like(n))
    series = one
    for k in range(_TERMS, 1, -1):
        term = _multiply(series, r)
        series = _add(one, _divide(term, float(k)))
    m = _multiply(series, r)
    for _ in range(_SQUARINGS):
        # exp(2r) - 1 = m (m + 2)
        m = _add(_multiply(m, m), (2 * m[0], 2 * m[1]))
    return m, n


def _divide(x, k: float):
    q = x[0] / k
    p, e = _two_product(q, torch.full_like(q, k))
    return _two_sum(q, ((x[0] - p) - e + x[1]) / k)


def _exp(m, n):
    """2**n (1 + m), in two steps as 2**n alone may underflow."""
    x = _add(m, (torch.ones_like(n), torch.zeros_like(n)))
    half = torch.floor(n / 2)
    a, b = torch.exp2(half), torch.exp2(n - half)
    return x[0] * a * b, x[1] * a * b


def _sum(x):
    """Sum over the last dimension, pairwise."""
    high, low = x
    while high.shape[-1] > 1:
        if high.shape[-1] % 2:
            pad = (0, 1)
            high = torch.nn.functional.pad(high, pad)
            low = torch.nn.functional.pad(low, pad)
        high, low = _add(
            (high[..., ::2], low[..., ::2]),
            (high[..., 1::2], low[..., 1::2]),
        )
    return high, low


def logsumexp(chunks: list[Tensor], top: Tensor) -> Tensor:
    """Log-sum-exp over the last dimension, rounded to float64.

    chunks: float64 logits (N, K_1), (N, K_2), ...; top: (N, 1), their
    largest, finite. Returns (N, 1). About 30 times the work of float64.
    """
    zero = torch.zeros_like(top)
    rest, found = (zero, zero), torch.zeros_like(top, dtype=torch.bool)
    for z in chunks:
        # The largest weight is exactly one; the rest is summed apart from
        # it, since log1p(rest) may be as small as the smallest logit.
        index = z.argmax(-1, keepdim=True)
        largest = (z.gather(-1, index) == top) & ~found
        found |= largest
        drop = torch.zeros_like(z, dtype=torch.bool)
        drop = drop.scatter(-1, index, largest) | (z < top - 800)
        difference = _two_sum(z.masked_fill(drop, 0), -top)
        weights = _exp(*_expm1(difference))
        weights = tuple(w.masked_fill(drop, 0) for w in weights)
        rest = _add(rest, _sum(weights))
    # One Newton step on expm1(v) = rest, from the float64 value of v.
    v = torch.log1p(rest[0])
    m, n = _expm1((v, zero))
    back = _add(_exp(m, n), (-torch.ones_like(v), zero))
    back = tuple(
        torch.where(n == 0, a, b) for a, b in zip(m, back, strict=True)
    )
    gap = _add(rest, (-back[0], -back[1]))
    step = gap[0] / (1 + rest[0])
    s, e = _two_sum(top, v)
    return s + (e + step)
