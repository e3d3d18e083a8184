"""The arithmetic under `softmaxlib.functional`, on plain tensors.

Nothing here checks arguments or is differentiable: `functional` does both.
A kernel walks over the tensor in tiles of rows, computes each tile in the
working precision and rounds once. Two arithmetics share one skeleton:

* *wide*: float16, bfloat16 and float32 are computed in float64, where the
  shift is as good as exact and exp may be evaluated as a power of two;
* *compensated*: float64, or float32 on a device without float64. What the
  shift and the division by the temperature round away is kept as a second
  term, and the largest entry is summed apart.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from softmaxlib import _doubledouble

# Elements of a tile: 2**18 float64 numbers (2 MiB) stay in cache. A longer
# row is held whole up to 2**20 (8 MiB); beyond, it is computed twice, for
# the sum and for the values. The compensated arithmetic, which holds four
# buffers, takes a quarter of both.
_TILE, _ROW = 2**18, 2**20
# Below this size the Python around a tile costs more than the arithmetic.
_SMALL = 2**12
# Columns of a tile over a strided dimension: at least a cache line.
_LANES = 16

# What stands for temperatures 0 and inf in the wide arithmetic: different
# float32 logits lie between 1e-45 and 1e39 apart, so that these products are
# beyond the range of exp, or too small to matter, and never 0 * inf.
_SMALLEST_INVERSE, _LARGEST_INVERSE = 1e-300, 1e300

# From this share of the total on, subtracting the largest weight (exactly
# one) from a float64 sum costs at most 2**-36 relative.
_CONFIDENT = 2.0**-16

# Below this offset 53 bits hold a base-2 exponent to 2**-33, so that scaling
# before shifting does no harm.
_MODERATE = 2.0**20

# Below this share of its terms, m + log(sum) has cancelled so far that 53
# bits do not round correctly to 24; see `_doubledouble`.
_CANCELLED = 2.0**-21


def work_dtype(device: torch.device) -> torch.dtype:
    """The widest format of the device."""
    return torch.float32 if device.type == "mps" else torch.float64


def compensates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` offers no wider format to compute `dtype` in."""
    return dtype == torch.float64 or dtype == work_dtype(device)


def as_rows(x: Tensor, dim: int) -> Tensor:
    """View `x` as (outer, inner, K); a copy only where strides forbid it."""
    shape = x.shape
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    return x.reshape(outer, shape[dim], inner).transpose(1, 2)


class Scratch:
    """Buffers that the tiles of one call share.

    A fresh buffer for every step would cost more in page faults than the
    arithmetic.
    """

    def __init__(self, x: Tensor, size: int):
        self.dtype, self.device = work_dtype(x.device), x.device
        self.size = size
        self.flat, self.shaped = {}, {}

    def __call__(self, name: str, like: Tensor) -> Tensor:
        """The buffer `name`, in the shape and memory order of `like`."""
        key = name, like.shape
        if key not in self.shaped:
            if name not in self.flat:
                self.flat[name] = torch.empty(
                    self.size, dtype=self.dtype, device=self.device
                )
            outer, inner, classes = like.shape
            flat = self.flat[name][: like.numel()]
            view = flat.view(outer, classes, inner).transpose(1, 2)
            self.shaped[key] = view
        return self.shaped[key]


class Tile:
    """Some rows of the input, shape (outer, inner, K), and their weights.

    What a method returns stands in the scratch buffer that its docstring
    names, until the next call that uses it.
    """

    def __init__(self, x, mask, temperature, chunks, scratch):
        self.x, self.mask, self.temperature = x, mask, temperature
        self.chunks, self.scratch = chunks, scratch
        self.compensated = compensates(x.dtype, x.device)
        self.whole = len(chunks) == 1
        self.slope = math.log2(math.e) * inverse(temperature)

    def select(self, rows: Tensor) -> "Tile":
        """The rows where the boolean `rows` (outer, inner) is True."""
        x = self.x[rows].unsqueeze(1)
        mask = None if self.mask is None else self.mask[rows].unsqueeze(1)
        return Tile(x, mask, self.temperature, self.chunks, self.scratch)

    def logits(self, chunk: slice) -> Tensor:
        """Logits in the working precision, -inf where masked ("logits").

        Without a mask, float64 logits are the input itself: read only.
        """
        x = self.x if self.whole else self.x[..., chunk]
        if self.mask is None and x.dtype == self.scratch.dtype:
            return x
        z = self.scratch("logits", x).copy_(x)
        if self.mask is not None:
            z.masked_fill_(~self.mask[..., chunk], -math.inf)
        return z

    def top(self) -> Tensor:
        """The largest logit of each row, NaN if there is a NaN."""
        if self.mask is None and self.x.dtype == torch.float32:
            return _amax(self.x).to(self.scratch.dtype)
        tops = [_amax(self.logits(c)) for c in self.chunks]
        return tops[0] if self.whole else _amax(torch.cat(tops, -1))

    def exponent(self, chunk: slice, top: Tensor):
        """(z - top) / T as a pair whose sum is meant ("logits" or "high").

        In the wide arithmetic the second is None.
        """
        if self.compensated:
            return self._two_term_exponent(self.logits(chunk), top)
        z = self.logits(chunk).sub_(top)
        if self.temperature != 1:
            z *= inverse(self.temperature)
        return z, None

    def weights(self, chunk, top, total=None, offset=None) -> Tensor:
        """exp((z - top) / T), over `total` if given ("logits" or "high")."""
        if self.compensated:
            high, low = self.exponent(chunk, top)
            weights = high.exp_()
            weights.addcmul_(weights, low)
            return weights if total is None else weights.div_(total)
        # exp2 is several times faster than exp. Rounding the exponent costs
        # 2**-45 relative where the result is above 1e-45.
        z, slope = self.logits(chunk), self.slope
        if offset is not None:
            return torch.add(offset, z, alpha=slope, out=z).exp2_()
        weights = z.sub_(top).mul_(slope).exp2_()
        return weights if total is None else weights.div_(total)

    def offset(self, top: Tensor, total=None) -> Tensor | None:
        """What, added to slope * z, is the base-2 exponent of the weights.

        One pass instead of three over the chunks of a long row. None where
        the row is held whole, or so far from zero that adding would cost
        accuracy.
        """
        if self.whole or self.compensated:
            return None
        offset = top * -self.slope
        if total is not None:
            offset -= total.log2()
        return offset if (offset.abs() < _MODERATE).all() else None

    def total(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the weights, and the weights of the last chunk."""
        if self.compensated:
            rest, weights = self._rest_apart(top)
            return rest + 1, weights
        sums, offset = [], self.offset(top)
        for chunk in self.chunks:
            weights = self.weights(chunk, top, offset=offset)
            sums.append(weights.sum(-1, keepdim=True))
        return add_up(sums), weights

    def rest(self, top: Tensor) -> Tensor:
        """Sum of the weights without the largest, which is one.

        The logarithm of 1 + rest is then log1p(rest), right even where the
        rest is far below the spacing of numbers near one.
        """
        if self.compensated:
            return self._rest_apart(top)[0]
        total, weights = self.total(top)
        rest = total - 1
        confident = (rest < _CONFIDENT).squeeze(-1)
        if confident.any():
            if self.whole:
                parts = (weights[confident],)
            else:
                few, few_top = self.select(confident), top[confident]
                parts = (
                    few.weights(c, few_top.unsqueeze(1)).squeeze(1)
                    for c in self.chunks
                )
            # Here exactly one weight exceeds a half.
            rest[confident] = add_up(
                [
                    p.masked_fill(p > 0.5, 0).sum(-1, keepdim=True)
                    for p in parts
                ]
            )
        return rest

    def _rest_apart(self, top):
        index = self.argmax(top)
        sums = []
        for chunk in self.chunks:
            weights = self.weights(chunk, top)
            sums.append(_sum_without(weights, index - chunk.start))
        # Both the sum and the weight left out are NaN if top is infinite.
        nan = top - top
        _put(weights, index - chunk.start, 1 + nan)
        return add_up(sums).add_(nan), weights

    def argmax(self, top: Tensor) -> Tensor:
        """Index of one of the largest logits in each row."""
        if self.whole:
            plain = self.mask is None
            z = self.x if plain else self.logits(self.chunks[0])
            return z.argmax(-1, keepdim=True)
        index = torch.zeros_like(top, dtype=torch.int64)
        for chunk in self.chunks:
            z = self.logits(chunk)
            here = z.argmax(-1, keepdim=True)
            found = z.gather(-1, here) == top
            index = torch.where(found, here + chunk.start, index)
        return index

    def load(self, name: str, source: Tensor, chunk: slice) -> Tensor:
        """Another tensor's chunk, 0 where masked (buffer `name`)."""
        source = source[..., chunk]
        values = self.scratch(name, source).copy_(source)
        if self.mask is not None:
            values.masked_fill_(~self.mask[..., chunk], 0)
        return values

    def centre(self, source: Tensor, index: Tensor) -> Tensor:
        """Another tensor's value at `index`, 0 where masked."""
        value = source.gather(-1, index).to(self.scratch.dtype)
        if self.mask is not None:
            value.masked_fill_(~self.mask.gather(-1, index), 0)
        return value

    def write(self, target, chunk, values, masked: float):
        """Round `values` into `target`; masked entries become `masked`."""
        if self.mask is not None:
            values.masked_fill_(~self.mask[..., chunk], masked)
        if self.whole:
            target.copy_(values)
        else:
            target[..., chunk].copy_(values)

    def _two_term_exponent(self, z, top):
        temperature = self.temperature
        if temperature == 0:
            high = torch.where(z < top, -math.inf, z - top)
            return high, torch.zeros_like(high)
        if temperature == math.inf:
            # Not (z - top) * 0: the difference may overflow.
            high = z * 0 - top * 0
            high.masked_fill_(z == -math.inf, -math.inf)
            return high, torch.zeros_like(high)
        # Powers of two are divided out exactly: before the shift where
        # T > 1, so that no difference overflows that the division would
        # bring back.
        exponent = math.frexp(temperature)[1]
        if exponent > 1:
            scale = math.ldexp(1.0, -exponent)
            z, top = z * scale, top * scale
            temperature *= scale
        # Knuth: z - top = high + low exactly.
        high = torch.sub(z, top, out=self.scratch("high", z))
        back = torch.sub(high, z, out=self.scratch("back", z))
        low = torch.sub(high, back, out=self.scratch("low", z))
        torch.sub(z, low, out=low).sub_(back.add_(top))
        if temperature != 1:
            if exponent < 0:
                scale = math.ldexp(1.0, min(-exponent, 1000))
                high, low = high * scale, low * scale
                temperature *= scale
            divisor = torch.tensor(
                temperature, dtype=z.dtype, device=z.device
            )
            quotient = high / divisor
            product, error = _two_product(quotient, divisor)
            # What a narrow format has rounded off the temperature.
            error += quotient * (temperature - divisor.item())
            low = (high - product).sub_(error).add_(low).div_(divisor)
            high = quotient
        # inf - inf where high is infinite: nothing to correct there.
        return high, low.nan_to_num_(0, 0, 0)


def _amax(z: Tensor) -> Tensor:
    """Maximum over the last dimension of (outer, inner, K), kept."""
    _, inner, classes = z.shape
    if not 1 < inner < 64 or classes < 64:
        return z.amax(-1, keepdim=True)
    # Over a narrow strided dimension torch.amax is 30 times slower than
    # over a wide one: fold first.
    z = z.transpose(1, 2)
    fold = math.isqrt(classes)
    head = fold * (classes // fold)
    top = z[:, :head].unflatten(1, (fold, -1)).amax(1).amax(1, keepdim=True)
    if head < classes:
        top = torch.maximum(top, z[:, head:].amax(1, keepdim=True))
    return top.transpose(1, 2)


def _sum_without(x: Tensor, index: Tensor) -> Tensor:
    """Sum over the last dimension of `x` with x[index] set to zero.

    An index outside of [0, K) belongs to another chunk.
    """
    _put(x, index, torch.zeros_like(index, dtype=x.dtype))
    return x.sum(-1, keepdim=True)


def _put(x: Tensor, index: Tensor, value: Tensor) -> None:
    """x[index] = value in each row whose index lies in [0, K)."""
    inside = (index >= 0) & (index < x.shape[-1])
    index = torch.where(inside, index, 0)
    value = torch.where(inside, value, x.gather(-1, index))
    x.scatter_(-1, index, value)


def add_up(parts: list[Tensor]) -> Tensor:
    """Sum of tensors of shape (..., 1)."""
    return (
        parts[0]
        if len(parts) == 1
        else torch.cat(parts, -1).sum(-1, keepdim=True)
    )


def inverse(temperature: float) -> float:
    """1 / T, with finite positive stand-ins for the limits 0 and inf."""
    if temperature == 0:
        return _LARGEST_INVERSE
    return min(max(1 / temperature, _SMALLEST_INVERSE), _LARGEST_INVERSE)


def tiles(
    x: Tensor,
    mask: Tensor | None,
    dim: int,
    temperature: float,
    *others: Tensor,
) -> Iterator[tuple[Tile, ...]]:
    """Cover `x` with tiles; yields each with its part of the others."""
    if not x.numel():
        return
    x = as_rows(x, dim)
    mask = None if mask is None else as_rows(mask, dim)
    others = [as_rows(other, dim) for other in others]
    outer, inner, classes = x.shape
    size, longest = _TILE * torch.get_num_threads(), _ROW
    if compensates(x.dtype, x.device):
        size, longest = size // 4, longest // 4
    lanes = min(inner, max(size // classes // _LANES, 1) * _LANES)
    chunk = min(classes, max(size, longest) // lanes)
    rows = max(1, size // (classes * lanes))
    chunks = [
        slice(k, min(k + chunk, classes)) for k in range(0, classes, chunk)
    ]
    scratch = Scratch(x, min(rows, outer) * lanes * chunk)
    for o in range(0, outer, rows):
        for i in range(0, inner, lanes):
            at = slice(o, o + rows), slice(i, i + lanes)
            part = None if mask is None else mask[at]
            tile = Tile(x[at], part, temperature, chunks, scratch)
            yield tile, *(other[at] for other in others)


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Dekker: a * b = product + error exactly, barring over/underflow."""
    split = 2.0**27 + 1 if a.dtype == torch.float64 else 2.0**12 + 1
    a_high = _upper_half(a, split)
    b_high = _upper_half(b, split)
    a_low, b_low = a - a_high, b - b_high
    product = a * b
    error = a_high * b_high - product
    error += a_high * b_low
    error += a_low * b_high
    error += a_low * b_low
    return product, error


def _upper_half(a, split):
    c = a * split
    return c - (c - a)


def _has_cancelled(value, top, log_rest):
    """Where top + log_rest has lost too many bits."""
    return value.abs() < torch.maximum(top.abs(), log_rest) * _CANCELLED


def _is_small(x: Tensor, mask: Tensor | None) -> bool:
    """Whether to compute at once, in float64 and without a mask."""
    return (
        0 < x.numel() <= _SMALL
        and mask is None
        and x.dtype != torch.float64
        and work_dtype(x.device) == torch.float64
    )


def _direct(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """z - top, top and log(1 + rest) in float64, without tiles."""
    z = x.to(torch.float64)
    index = z.argmax(dim, keepdim=True)
    top = z.gather(dim, index)
    high = z - top
    weights = high.exp()
    # NaN where top is infinite, else 0: the largest weight is left out.
    weights.scatter_(dim, index, top - top)
    return high, top, weights.sum(dim, keepdim=True).log1p_()


def softmax(x, mask, dim, temperature, out, isolate=False):
    """Write the softmax of `x` into the contiguous `out` (may be `x`).

    With `isolate`, an infinite logit makes itself NaN and the others 0, as
    in the gradient of log-sum-exp, instead of the whole row NaN.
    """
    if temperature == 1 and not isolate and _is_small(x, mask):
        # PyTorch's own kernel in float64: on so few terms its serial sum is
        # good to far more than the formats it is rounded to.
        out.copy_(torch.softmax(x, dim, dtype=torch.float64))
        return
    for tile, target in tiles(x, mask, dim, temperature, out):
        top = tile.top()
        total, weights = tile.total(top)
        if isolate:
            total.masked_fill_(top == math.inf, 1)
        offset = tile.offset(top, total)
        # The weights of the last chunk are still there.
        if tile.compensated:
            weights /= total
        else:
            weights *= total.reciprocal()
        tile.write(target, tile.chunks[-1], weights, 0.0)
        for chunk in tile.chunks[:-1]:
            weights = tile.weights(chunk, top, total, offset)
            tile.write(target, chunk, weights, 0.0)


def logsumexp_gradient(x, mask, dim, temperature, out):
    """Write the softmax of `x`, isolating infinite logits."""
    softmax(x, mask, dim, temperature, out, isolate=True)


def log_softmax(x, mask, dim, temperature, out):
    """Write the log-softmax of `x` into the contiguous `out` (or `x`)."""
    if temperature == 1 and _is_small(x, mask):
        high, _, log_rest = _direct(x, dim)
        out.copy_(high.sub_(log_rest))
        return
    for tile, target in tiles(x, mask, dim, temperature, out):
        top = tile.top()
        log_total = tile.rest(top).log1p_()
        for chunk in tile.chunks:
            high, low = tile.exponent(chunk, top)
            high -= log_total if low is None else log_total - low
            tile.write(target, chunk, high, -math.inf)


def logsumexp(x, mask, dim, temperature, out):
    """Write the log-sum-exp of `x` into `out`, of shape (..., 1, ...).

    The temperature is there for the sake of a common signature, and 1.
    """
    if not x.shape[dim]:
        out.fill_(-math.inf)
    if _is_small(x, mask):
        _, top, log_rest = _direct(x, dim)
        value = torch.where(top.isinf(), top, top + log_rest)
        if not _has_cancelled(value, top, log_rest).any():
            out.copy_(value)
            return
    for tile, target in tiles(x, mask, dim, temperature, out):
        top = tile.top()
        # An infinite maximum is its own log-sum-exp, and inf - inf is not.
        infinite = top.isinf()
        shift = top.masked_fill(infinite, 0)
        log_rest = tile.rest(shift).log1p_()
        value = torch.where(infinite, top, shift + log_rest)
        if not tile.compensated:
            cancelled = _has_cancelled(value, shift, log_rest).squeeze(-1)
            if cancelled.any():
                few = tile.select(cancelled)
                value[cancelled] = _doubledouble.logsumexp(
                    [few.logits(c).squeeze(1).clone() for c in few.chunks],
                    shift[cancelled],
                )
        target.copy_(value)


def softmax_vjp(y, v, mask, dim, temperature, out):
    """Write y (v - y . v) / T into the contiguous `out` (may be `v`).

    The Jacobian sends constants to zero, so `v` may be centred at the
    largest probability first: what would cancel there never appears.
    """
    scale = slope(temperature)
    for tile, target, part in tiles(y, mask, dim, temperature, out, v):
        centre = tile.centre(part, tile.x.argmax(-1, keepdim=True))
        sums = []
        for chunk in tile.chunks:
            product = tile.load("product", part, chunk).sub_(centre)
            product *= tile.load("logits", tile.x, chunk)
            sums.append(product.sum(-1, keepdim=True))
        mean = add_up(sums)
        for chunk in tile.chunks:
            product = tile.load("product", part, chunk)
            # Not in one: that would bring the cancellation back.
            product.sub_(centre).sub_(mean)
            product *= tile.load("logits", tile.x, chunk)
            if scale != 1:
                product *= scale
            tile.write(target, chunk, product, 0.0)


def log_softmax_vjp(x, v, mask, dim, temperature, out):
    """Write (v - softmax(x) sum(v)) / T into the contiguous `out`.

    At the largest logit that is -sum(other v) + (1 - p) sum(v), with 1 - p
    from the other weights: there p itself would round to one.
    """
    scale = slope(temperature)
    for tile, target, part in tiles(x, mask, dim, temperature, out, v):
        top = tile.top()
        index = tile.argmax(top)
        rest = tile.rest(top)
        largest = tile.centre(part, index)
        sums = []
        for chunk in tile.chunks:
            product = tile.load("product", part, chunk)
            sums.append(_sum_without(product, index - chunk.start))
        others = add_up(sums)
        everything = others + largest
        total = rest + 1
        at_largest = rest / total * everything - others
        for chunk in tile.chunks:
            product = tile.load("product", part, chunk)
            weights = tile.weights(chunk, top).div_(total)
            product -= weights.mul_(everything)
            _put(product, index - chunk.start, at_largest)
            if scale != 1:
                product *= scale
            tile.write(target, chunk, product, 0.0)


def slope(temperature: float) -> float:
    """1 / T as a factor of derivatives: finite, and 0 at T = 0."""
    if temperature == 0:
        return 0.0
    return min(1 / temperature, torch.finfo(torch.float64).max)
