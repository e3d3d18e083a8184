"""Blocks of whole rows, the working format, the limits of the temperature.

Two arithmetics share the walk over the blocks of a tensor:

* *wide*: float16, bfloat16 and float32 are computed in float64, where the
  shift is as good as exact and exp may be evaluated as a power of two;
* *compensated*: float64, or float32 on a device without float64. What the
  shift and the division by the temperature round away is kept as a second
  term, and the largest entry is summed apart.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Entries of a block that needs one buffer, and of one that needs several:
# 2**18 float64 numbers (2 MiB) stay in cache. A longer row is a block of its
# own.
SIZE = 2**18
SHARED = SIZE // 4
# Columns of a block over a strided dimension: at least a cache line.
_LANES = 16

# What stands for temperatures 0 and inf in the wide arithmetic: different
# float32 logits lie between 1e-45 and 1e39 apart, so that these products are
# beyond the range of exp, or too small to matter, and never 0 * inf.
_SMALLEST_INVERSE, _LARGEST_INVERSE = 1e-300, 1e300

# Below this sum of the other weights, subtracting the largest (exactly one)
# from the sum of all costs more than 2**-36 relative.
_CONFIDENT = 2.0**-16


def work_dtype(x: Tensor) -> torch.dtype:
    """The widest format of the device of a tensor."""
    return torch.float32 if x.is_mps else torch.float64


def compensates(x: Tensor) -> bool:
    """Whether there is no wider format to compute that of `x` in."""
    return x.dtype == torch.float64 or x.dtype == work_dtype(x)


def widen(x: Tensor) -> Tensor:
    """`x` in the widest format of its device."""
    return x.to(work_dtype(x))


def slope(T: float) -> float:
    """1 / T as a factor of derivatives: finite, and 0 at T = 0."""
    if T == 0:
        return 0.0
    return 1 / T if T > 1e-308 else torch.finfo(torch.float64).max


def exponents(z: Tensor, top: Tensor, T: float) -> Tensor:
    """(z - top) / T in plain operations, with its limits at 0 and inf.

    At T = 0 that is 0 on the arg max set and -inf elsewhere; at inf, 0 but
    for logits of -inf. NaN where `top` is infinite.
    """
    if T == 0:
        return torch.where(z < top, -math.inf, top - top)
    if T == math.inf:
        return torch.where(z == -math.inf, -math.inf, 0.0) + (top - top)
    if T > 2.0**1000:
        # Lest a difference overflow that the division would bring back.
        z, top, T = z * 0.5, top * 0.5, T * 0.5
    return z - top if T == 1 else (z - top).div_(T)


def as_rows(x: Tensor, dim: int) -> Tensor:
    """View `x` as (outer, inner, K); a copy only where strides forbid it."""
    shape = x.shape
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    return x.reshape(outer, shape[dim], inner).transpose(1, 2)


def blocks(
    dim: int, size: int, *tensors: Tensor | None
) -> Iterator[list[Any]]:
    """Cut tensors into blocks of whole rows, shape (outer, inner, K).

    The first has all entries, the others as many or one class; None stays
    None. Yields views of the same rows of all of them.
    """
    rows = [None if t is None else as_rows(t, dim) for t in tensors]
    first = rows[0]
    if first is None or not first.numel():
        return
    outer, inner, classes = first.shape
    lanes = min(inner, max(size // classes // _LANES, 1) * _LANES)
    height = max(1, size // (classes * lanes))
    for o in range(0, outer, height):
        for i in range(0, inner, lanes):
            at = slice(o, o + height), slice(i, i + lanes)
            yield [None if r is None else r[at] for r in rows]


def weighed(
    dim: int, T: float, x: Tensor, mask: Tensor | None, *others: Any
) -> Iterator[list[Any]]:
    """The blocks of `x` as `Rows`, each with its part of the others."""
    size = (SHARED if compensates(x) else SIZE) * torch.get_num_threads()
    buffers: dict[str, Tensor] = {}
    for part, covered, *rest in blocks(dim, size, x, mask, *others):
        yield [Rows(part, covered, T, size, buffers), *rest]


@dataclasses.dataclass
class Rows:
    """A block of rows, shape (outer, inner, K), in the working format.

    Logits, exponents and weights are computed over `pieces` of the classes:
    one as a rule, several of half a block where a row has more than four.
    What a method returns stands in a buffer that the next call reuses.
    """

    x: Tensor
    mask: Tensor | None
    T: float
    size: int
    buffers: dict[str, Tensor]
    held = False

    def __post_init__(self) -> None:
        if self.mask is not None:
            self.x = self.x.masked_fill(~self.mask, -math.inf)
        classes = self.x.shape[-1]
        width = classes if classes <= 4 * self.size else self.size // 2
        starts = range(0, classes, width)
        self.pieces = [slice(k, k + width) for k in starts]

    @functools.cached_property
    def top(self) -> Tensor:
        """The largest logit of each row, NaN if there is a NaN."""
        if 1 < self.x.shape[1] < 32:  # there, amax is four times slower
            return widen(self.x.max(-1, keepdim=True).values)
        return widen(self.x.amax(-1, keepdim=True))

    @functools.cached_property
    def index(self) -> Tensor:
        """The index of one of the largest logits of each row."""
        return self.x.argmax(-1, keepdim=True)

    def buffer(self, name: str, piece: slice) -> Tensor:
        """Working memory for a piece, in the memory order of the logits."""
        outer, inner, classes = self.x[..., piece].shape
        size = outer * inner * classes
        if name not in self.buffers:
            self.buffers[name] = torch.empty(
                size, dtype=work_dtype(self.x), device=self.x.device
            )
        flat = self.buffers[name][:size]
        return flat.view(outer, classes, inner).transpose(1, 2)

    def write(
        self, target: Tensor, piece: slice, values: Tensor, masked: float
    ) -> None:
        """Round values into a piece of the target."""
        self.held = False
        if self.mask is not None:
            values.masked_fill_(~self.mask[..., piece], masked)
        target[..., piece].copy_(values)

    def sum(self, part: Callable[[slice], Tensor]) -> Tensor:
        """The sum over all classes of what `part` gives for each piece."""
        sums = [part(piece).sum(-1, keepdim=True) for piece in self.pieces]
        if len(sums) == 1:
            return sums[0]
        return torch.cat(sums, -1).sum(-1, keepdim=True)

    def exponents(self, piece: slice) -> tuple[Tensor, Tensor | None]:
        """(z - top) / T, as one term or as two whose sum is meant."""
        self.held = False
        z = self.x[..., piece]
        if compensates(z):
            return self._two_terms(z, piece)
        high = self.buffer("weights", piece).copy_(z).sub_(self.top)
        return high if self.T == 1 else high.mul_(self._inverse()), None

    def weights(self, piece: slice) -> Tensor:
        """exp((z - top) / T), in the buffer "weights"."""
        weights, z = self.buffer("weights", piece), self.x[..., piece]
        if self.held:
            return weights
        if compensates(z):
            high, low = self._two_terms(z, piece)
            high.exp_()
            high.addcmul_(high, low)
        else:
            # exp2 is several times faster than exp. Rounding the exponent
            # costs 2**-45 relative where the result is above 1e-45.
            factor = math.log2(math.e) * self._inverse()
            weights.copy_(z).sub_(self.top).mul_(factor).exp2_()
        self.held = len(self.pieces) == 1
        return weights

    def total(self) -> Tensor:
        """The sum of the weights."""
        apart = compensates(self.x)
        return self.rest() + 1 if apart else self.sum(self.weights)

    def rest(self) -> Tensor:
        """The sum of the weights without the largest, which is one.

        The logarithm of the total is then log1p(rest), right even where the
        rest is far below the spacing of numbers near one.
        """
        if compensates(self.x):
            nan = self.top - self.top  # NaN where infinite, or 0
            rest = self.sum(lambda p: self._put_top(p, 0.0))
            if self.held:
                self._put_top(self.pieces[0], 1 + nan)
            return rest.add_(nan)
        rest = self.total() - 1
        confident = rest < _CONFIDENT
        if confident.any():
            # Here exactly one weight exceeds a half. In place, and lost.
            others = self.sum(
                lambda p: torch.threshold_(
                    self.weights(p).neg_(), -0.5, 0.0
                )
            )
            rest, self.held = torch.where(confident, -others, rest), False
        return rest

    def _put_top(self, piece: slice, new: Tensor | float) -> Tensor:
        """The weights with another value where the largest logits are."""
        weights, index = self.weights(piece), self.index - piece.start
        inside = (index >= 0) & (index < weights.shape[-1])
        index = torch.where(inside, index, 0)
        new = torch.where(inside, new, weights.gather(-1, index))
        return weights.scatter_(-1, index, new)

    def _inverse(self) -> float:
        """1 / T, with finite positive stand-ins for the limits."""
        if self.T == 0:
            return _LARGEST_INVERSE
        return min(max(1 / self.T, _SMALLEST_INVERSE), _LARGEST_INVERSE)

    def _two_terms(self, z: Tensor, piece: slice) -> tuple[Tensor, Tensor]:
        """(z - top) / T = high + low in compensated arithmetic."""
        T, top = self.T, self.top
        high, low = self.buffer("weights", piece), self.buffer("low", piece)
        if T in (0, math.inf):
            high.copy_(exponents(z, top, T))
            return high, low.zero_()
        # A power of two is divided out exactly: before the shift where T is
        # large, so that no difference overflows that the division would
        # bring back, and after it where T is small.
        power = math.frexp(T)[1]
        shift = 0 if power in (0, 1) else max(min(-power, 1000), -1024)
        scale = math.ldexp(1.0, shift)
        if shift < 0:
            z, top = z * scale, top * scale
        # Knuth: z - top = high + low exactly.
        back = self.buffer("back", piece)
        torch.sub(z, top, out=high)
        torch.sub(high, z, out=back)
        torch.sub(high, back, out=low)
        torch.sub(z, low, out=low).sub_(back.add_(top))
        if shift > 0:
            high.mul_(scale)
            low.mul_(scale)
        if T != 1:
            _divide(high, low, T * scale)
        # inf - inf where high is infinite: nothing to correct there.
        return high, low.nan_to_num_(0, 0, 0)


def _divide(high: Tensor, low: Tensor, divisor: float) -> None:
    """Divide high + low in place, to the digits of both."""
    d = high.new_tensor(divisor)
    quotient = high / d
    # Dekker: quotient * d = product + error exactly.
    split = 2.0**27 + 1 if high.dtype == torch.float64 else 2.0**12 + 1
    q_high, d_high = _upper_half(quotient, split), _upper_half(d, split)
    q_low, d_low = quotient - q_high, d - d_high
    product = quotient * d
    error = q_high * d_high - product + q_high * d_low + q_low * d_high
    error += q_low * d_low
    # What a narrow format has rounded off the divisor.
    error += quotient * (divisor - d.item())
    low.add_(high.sub_(product).sub_(error)).div_(d)
    high.copy_(quotient)


def _upper_half(a: Tensor, split: float) -> Tensor:
    c = a * split
    return c - (c - a)
