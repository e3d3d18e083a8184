"""The arithmetic on plain tensors: values, products, matrices, losses.

Nothing here checks arguments or is differentiable: the public modules and
`_autograd` do that. A kernel takes checked tensors, the class dimension and
the temperature T, computes in the working format, rounds once, and returns
the result; those of values can write it into `out`, contiguous, which may be
the first tensor.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from softmaxlib import _blocks
from softmaxlib._blocks import Rows

# An optional tensor.
Mask = Tensor | None

# Up to this size PyTorch's own kernels are used, in float64: the Python
# around a block would cost more than the arithmetic, and on so few terms
# their serial sums are good to far more than the formats rounded to.
_SMALL = 2**12
# Where they lose digits of small results: nearer to zero than this.
_NEAR_ZERO = 2.0**-10
# Up to this largest probability nothing cancels that a shift would save.
_UNSURE = 0.9
# Up to this many classes a running sum in float32 is good enough.
SHORT = 2**10


# --- values --------------------------------------------------------------


def softmax(
    x: Tensor, mask: Mask, dim: int, T: float, out: Mask = None
) -> Tensor:
    """The softmax."""
    if T == 1 and _is_small(x, mask):
        return _round(torch.softmax(x, dim, dtype=torch.float64), x, out)
    out = x.new_empty(x.shape) if out is None else out
    for rows, target in _blocks.weighed(dim, T, x, mask, out):
        _write_shares(rows, target, rows.total())
    return out


def logsumexp_gradient(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    """The softmax, but where a logit is +inf it is NaN and the others 0."""
    out = x.new_empty(x.shape)
    for rows, target in _blocks.weighed(dim, T, x, mask, out):
        total = rows.total().masked_fill_(rows.top == math.inf, 1)
        _write_shares(rows, target, total)
    return out


def _write_shares(rows: Rows, target: Tensor, total: Tensor) -> None:
    """Write the weights over their total."""
    for piece in rows.pieces:
        weights = rows.weights(piece)
        if _blocks.compensates(rows.x):
            weights /= total
        else:  # a product is faster, and exact enough
            weights *= total.reciprocal()
        rows.write(target, piece, weights, 0.0)


def log_softmax(
    x: Tensor, mask: Mask, dim: int, T: float, out: Mask = None
) -> Tensor:
    """The logarithm of the softmax."""
    if T == 1 and _is_small(x, mask):
        value = torch.log_softmax(x, dim, dtype=torch.float64)
        if value.amax().item() < -_NEAR_ZERO:
            return _round(value, x, out)
    out = x.new_empty(x.shape) if out is None else out
    for rows, target in _blocks.weighed(dim, T, x, mask, out):
        log_total = rows.rest().log1p_()
        for piece in rows.pieces:
            high, low = rows.exponents(piece)
            high -= log_total if low is None else log_total - low
            rows.write(target, piece, high, -math.inf)
    return out


def logsumexp(
    x: Tensor, mask: Mask, dim: int, T: float, out: Mask = None
) -> Tensor:
    """The log-sum-exp, with the class dimension kept; T is 1."""
    if _is_small(x, mask):
        value = x.to(torch.float64).logsumexp(dim, keepdim=True)
        if value.abs().amin().item() > _NEAR_ZERO:
            return _round(value, x, out)
    shape = _one_class(x, dim)
    out = x.new_empty(shape) if out is None else out.view(shape)
    if not x.shape[dim]:
        out.fill_(-math.inf)
    for rows, target in _blocks.weighed(dim, T, x, mask, out):
        # An infinite maximum is its own log-sum-exp, and inf - inf is not.
        value = rows.top + rows.rest().log1p_()
        target.copy_(torch.where(rows.top.isinf(), rows.top, value))
    return out


def _one_class(x: Tensor, dim: int) -> list[int]:
    return [*x.shape[:dim], 1, *x.shape[dim + 1 :]]


def _round(value: Tensor, x: Tensor, out: Mask) -> Tensor:
    """A result of a few numbers in the format of x."""
    if out is None:
        return value.to(x.dtype)
    return out.view(value.shape).copy_(value)


def _is_small(x: Tensor, mask: Mask) -> bool:
    wide = _blocks.compensates(x) or x.is_mps
    return mask is None and not wide and 0 < x.numel() <= _SMALL


# --- products with derivatives -------------------------------------------


def softmax_vjp(
    y: Tensor, v: Tensor, mask: Mask, dim: int, T: float
) -> Tensor:
    """y (v - y . v) / T for the softmax y."""

    def block(d: int, p: Tensor, t: Tensor, m: Mask) -> Tensor:
        t = t if m is None else t.masked_fill(~m, 0)
        result = _multiply(_blocks.widen(p), _blocks.widen(t), d, T)
        return result if m is None else result.masked_fill_(~m, 0)

    return _by_blocks(block, dim, y, v, mask)


def log_softmax_vjp(
    x: Tensor, v: Tensor, mask: Mask, dim: int, T: float
) -> Tensor:
    """(v - softmax(x) sum(v)) / T: minus s p - y, with v for the targets."""

    def block(d: int, z: Tensor, t: Tensor, m: Mask) -> Tensor:
        y = t.to(_blocks.work_dtype(z), copy=True)
        if m is not None:
            z, y = z.masked_fill(~m, -math.inf), y.masked_fill_(~m, 0)
        result = _difference(_probabilities(z, d, T), y, d)
        result *= -_blocks.slope(T)
        return result if m is None else result.masked_fill_(~m, 0)

    return _by_blocks(block, dim, x, v, mask)


def softmax_jvp(x: Tensor, v: Tensor, dim: int, T: float) -> Tensor:
    """The Jacobian of softmax at the logits x times v."""

    def block(d: int, z: Tensor, t: Tensor) -> Tensor:
        p = _probabilities(z, d, T)
        return _multiply(p, _cast(t, p.dtype), d, T)

    return _by_blocks(block, dim, x, v)


def _multiply(p: Tensor, v: Tensor, dim: int, T: float) -> Tensor:
    """p (v - p . v) / T for probabilities in the working format.

    The Jacobian sends constants to zero, so `v` is centred at the largest
    probability first: what would cancel there never appears.
    """
    if is_confident(p):
        v = v - v.gather(dim, p.argmax(dim, keepdim=True))
    result = weighted_deviation(p, v, dim)
    return result if T == 1 else result.mul_(_blocks.slope(T))


def softmax_hvp(
    x: Tensor, u: Tensor, v: Tensor, dim: int, T: float
) -> Tensor:
    """The second derivative of softmax contracted with u and v."""
    single = x.dtype == torch.float32

    def block(d: int, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if single and T == 1 and z.shape[d] <= SHORT:
            # Conversions would take half of the time of a short row.
            p = torch.softmax(z, d)
        else:
            p = _probabilities(z, d, T)
        if single:
            # Where the largest p rounds to one, the means are its a and b:
            # the products of their errors are nothing to the covariance.
            p = _cast(p, x.dtype)
        else:
            a, b = _cast(a, p.dtype), _cast(b, p.dtype)
            if is_confident(p):
                index = p.argmax(d, keepdim=True)
                a, b = a - a.gather(d, index), b - b.gather(d, index)
        product = _deviation(p, a, d).mul_(_deviation(p, b, d))
        result = weighted_deviation(p, product, d)
        if T != 1:
            # One by one: the square may overflow where the result does not.
            result.mul_(_blocks.slope(T)).mul_(_blocks.slope(T))
        return result

    return _by_blocks(block, dim, x, u, v)


def _by_blocks(
    block: Callable[..., Tensor], dim: int, x: Tensor, *others: Mask
) -> Tensor:
    """Compute all rows at once, or a cacheful of rows at a time."""
    size, entries = _blocks.SHARED * torch.get_num_threads(), x.numel()
    if not entries:
        return x.new_empty(x.shape)
    if entries <= size or entries == x.shape[dim]:
        return _cast(block(dim, x, *others), x.dtype)
    out = x.new_empty(x.shape)
    for *part, target in _blocks.blocks(dim, size, x, *others, out):
        target.copy_(block(2, *part))
    return out


def is_confident(p: Tensor) -> bool:
    """Whether some probability is large, or NaN: it may hide such a row."""
    return not p.amax().item() <= _UNSURE


def weighted_deviation(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """p times (v minus its mean under p); `_autograd` has a faster way."""
    return _deviation(p, v, dim).mul_(p)


def _deviation(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """v minus its mean under p."""
    vecdot: Callable[..., Tensor] = torch.linalg.vecdot
    if p.ndim == 1:
        return v - torch.dot(p, v)
    return v - vecdot(p, v, dim=dim).unsqueeze(dim)


def _probabilities(x: Tensor, dim: int, T: float) -> Tensor:
    """Softmax in the widest format of the device.

    In float64 a difference of two logits is rounded by at most 2**-44 where
    its exponential does not underflow: that bounds the relative error.
    """
    wide = _blocks.work_dtype(x)
    if T == 1:
        return torch.softmax(x, dim, dtype=wide)
    return softmax(x, None, dim, T, out=x.new_empty(x.shape, dtype=wide))


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`to`, which is slow to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


# --- dense derivatives ---------------------------------------------------


def softmax_jacobian(x: Tensor, dim: int, T: float) -> Tensor:
    """p_i (d_ij - p_j) / T."""

    def fill(out: Tensor, p: Tensor, scale: float) -> None:
        # The scale in equal parts, so that the result is exactly symmetric.
        factor = _factor(p, math.sqrt(scale), x.dtype)
        # Asked before the product drives p out of the cache.
        even = scale == 1 and factor.dtype == x.dtype
        even = even and p.amax().item() <= 0.5
        torch.mul(factor.neg().unsqueeze(-1), factor.unsqueeze(-2), out=out)
        diagonal = out.diagonal(0, -2, -1)
        if even:
            # -p^2 stands there already, and p - p^2 cancels above 1/2 only.
            diagonal.add_(factor)
        else:
            diagonal.copy_((p * _complement(p)).mul_(scale))

    return _dense(fill, 2, x, dim, T)


def log_softmax_jacobian(x: Tensor, dim: int, T: float) -> Tensor:
    """(d_ij - p_j) / T."""

    def fill(out: Tensor, p: Tensor, scale: float) -> None:
        out.copy_((p * -scale).unsqueeze(-2))
        out.diagonal(0, -2, -1).copy_(_complement(p).mul_(scale))

    return _dense(fill, 2, x, dim, T)


def softmax_hessian(x: Tensor, dim: int, T: float) -> Tensor:
    """2 p_i p_j p_k everywhere, then three planes, then their line."""

    def fill(out: Tensor, p: Tensor, scale: float) -> None:
        share = math.cbrt(scale) ** 2
        part = p * share
        pair = part.unsqueeze(-1) * part.unsqueeze(-2)
        pair, third = _factor(pair, 2, x.dtype), _factor(p, share, x.dtype)
        torch.mul(pair.unsqueeze(-1), third[..., None, None, :], out=out)
        q = _complement(p)
        # T_iik = T_iki = T_kii = p_k p_i (p_i - q_i) where k differs from i.
        line = p * (p - q) * scale
        plane = (p * scale).unsqueeze(-1) * line.unsqueeze(-2)
        for first, second in ((-3, -2), (-3, -1), (-2, -1)):
            out.diagonal(0, first, second).copy_(plane)
        line = line.mul_(q).mul_(-scale)
        out.diagonal(0, -3, -2).diagonal(0, -2, -1).copy_(line)

    return _dense(fill, 3, x, dim, T)


_Fill = Callable[[Tensor, Tensor, float], None]


def _dense(fill: _Fill, n: int, x: Tensor, dim: int, T: float) -> Tensor:
    """Filled from p, classes last, and 1 / T; n class dimensions, last."""
    batch = [*x.shape[:dim], *x.shape[dim + 1 :]]
    out = x.new_empty(batch + [x.shape[dim]] * n)
    if out.numel():
        p = _probabilities(x, dim, T).movedim(dim, -1)
        fill(out, p, _blocks.slope(T))
    return out


def _complement(p: Tensor) -> Tensor:
    """1 - p over the last dimension, from the others where p is large."""
    rest = torch.rsub(p, 1)  # 1 - p, without a detour over Python
    if is_confident(p):
        largest, index = p.max(-1, keepdim=True)
        others = p.scatter(-1, index, 0).sum(-1, keepdim=True)
        others = torch.where(largest > 0.5, others, 1 - largest)
        rest.scatter_(-1, index, others)
    return rest


def _factor(p: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """p times the scale, for a product that is rounded to `dtype`.

    At most the largest number, as inf * 0 is NaN; at least float32, as a
    half would round each factor, and lose the small to underflow.
    """
    dtype = torch.float32 if dtype.itemsize < 4 else dtype
    if scale == 1:
        return _cast(p, dtype)
    return (p * scale).clamp(max=torch.finfo(dtype).max).to(dtype)


# --- losses of rows ------------------------------------------------------


def loss(
    x: Tensor, target: Tensor, weight: Mask, dim: int, eps: float
) -> Tensor:
    """-sum_k y_k log softmax(x)_k, with 0 log 0 = 0, in the working format.

    The targets y are those of `_targets`, eps is the label smoothing.
    """
    wide = _blocks.work_dtype(x)
    # Nothing to lose where there is no class.
    out = x.new_zeros(_one_class(x, dim), dtype=wide)
    parts = _blocks.weighed(dim, 1.0, x, None, target, weight, out)
    for rows, t, w, result in parts:
        log_total = rows.rest().log1p_()
        if t.is_floating_point() or eps:
            gap = rows.top - rows.x
            y = _targets(gap, t, w, -1, eps)
            everything = y.sum(-1, keepdim=True)
            gap = gap.mul_(y).masked_fill_(y == 0, 0)
            gap = gap.sum(-1, keepdim=True)
            result.copy_(gap + everything * log_total)
            continue
        # Two terms that are not negative: nothing cancels.
        value = rows.top - rows.x.gather(-1, t) + log_total
        if w is not None:
            share = w.gather(-1, t)
            value = (value * share).masked_fill(share == 0, 0)
        result.copy_(value)
    return out


def loss_gradient(
    x: Tensor,
    target: Tensor,
    weight: Mask,
    share: Tensor,
    dim: int,
    eps: float,
) -> Tensor:
    """share (s softmax(x) - y) with s = sum(y); 0 where the share is."""

    def block(d: int, z: Tensor, t: Tensor, w: Mask, g: Tensor) -> Tensor:
        p = _probabilities(z, d, 1.0)
        if t.is_floating_point() or eps:
            result = _difference(p, _targets(p, t, w, d, eps), d)
        else:
            if w is not None:
                g = g * w.gather(d, t)
            index, rest = _rest(p, d)
            at_target = torch.where(t == index, -rest, p.gather(d, t) - 1)
            result = p.scatter_(d, t, at_target)
        return result.mul_(g).masked_fill_(g == 0, 0)

    return _by_blocks(block, dim, x, target, weight, share)


def _targets(p: Tensor, t: Tensor, w: Mask, dim: int, eps: float) -> Tensor:
    """w_k ((1 - eps) y_k + eps / K), afresh, in the format of p.

    y is the target t itself, or one-hot for class indices.
    """
    if t.is_floating_point():
        y = t.to(p.dtype, copy=True)
    else:
        y = torch.zeros_like(p).scatter_(dim, t, 1)
    if eps:
        y.mul_(1 - eps).add_(eps / p.shape[dim])
    return y if w is None else y.mul_(w)


def _rest(p: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Where p is largest, and the sum of the others."""
    index = p.argmax(dim, keepdim=True)
    largest = p.gather(dim, index)
    rest = p.scatter_(dim, index, 0).sum(dim, keepdim=True)
    p.scatter_(dim, index, largest)
    return index, rest.add_(largest - largest)  # NaN where that is


def _difference(p: Tensor, y: Tensor, dim: int) -> Tensor:
    """s p - y with s = sum(y), in the place of p; y is lost.

    At the largest p that is sum(other y) - s (1 - p), with 1 - p from the
    others: there p itself would round to one.
    """
    index, rest = _rest(p, dim)
    everything = y.sum(dim, keepdim=True)
    result = p.mul_(everything).sub_(y)
    others = y.scatter_(dim, index, 0).sum(dim, keepdim=True)
    return result.scatter_(dim, index, others - rest * everything)
