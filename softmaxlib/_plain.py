"""The functions of `_kernels` in plain, differentiable operations.

For everything that cannot run a kernel: a tracing compiler, shapes without
values, PyTorch's own batching; and for the derivatives of derivatives. The
narrow formats are computed in the widest format of the device here, too, and
rounded once; float64 has what one pass of it gives.
"""

import math

import torch
from torch import Tensor

from softmaxlib._blocks import exponents, slope, widen

# An optional tensor.
Mask = Tensor | None


def softmax(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    return _softmax(x, mask, dim, T).to(x.dtype)


# But for infinite logits, of which only a kernel is ever asked.
logsumexp_gradient = softmax


def log_softmax(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    return _log_softmax(x, mask, dim, T).to(x.dtype)


def logsumexp(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    if not x.shape[dim]:
        return x.sum(dim, keepdim=True) - math.inf
    z = _unmasked(widen(x), mask, -math.inf)
    here = _largest(z, dim)
    top = _at(here, z, dim)
    infinite = top.isinf()
    # An infinite logit is its own log-sum-exp, with a derivative of NaN;
    # where nothing is infinite it does not take part, and vice versa.
    special = torch.where(infinite & (z == top), z, 1)
    special = special.reciprocal().reciprocal().sum(dim, keepdim=True)
    high = z.masked_fill(infinite, 0) - top.masked_fill(infinite, 0)
    value = top + torch.log1p(_rest(high, here, dim))
    return torch.where(infinite, special, value).to(x.dtype)


def softmax_vjp(
    y: Tensor, v: Tensor, mask: Mask, dim: int, T: float
) -> Tensor:
    p, v = widen(y), widen(v)
    result = p * _deviation(p, _unmasked(v, mask, 0.0), dim) * slope(T)
    return _unmasked(result, mask, 0.0).to(y.dtype)


def log_softmax_vjp(
    x: Tensor, v: Tensor, mask: Mask, dim: int, T: float
) -> Tensor:
    p, v = _softmax(x, mask, dim, T), _unmasked(widen(v), mask, 0.0)
    result = _difference(p, v, dim) * -slope(T)
    return _unmasked(result, mask, 0.0).to(x.dtype)


def softmax_jvp(x: Tensor, v: Tensor, dim: int, T: float) -> Tensor:
    p = _softmax(x, None, dim, T)
    result = p * _deviation(p, widen(v), dim)
    return (result * slope(T)).to(x.dtype)


def softmax_hvp(
    x: Tensor, u: Tensor, v: Tensor, dim: int, T: float
) -> Tensor:
    p = _softmax(x, None, dim, T)
    product = _deviation(p, widen(u), dim) * _deviation(p, widen(v), dim)
    # Once each: the square may overflow where the result does not.
    result = p * _deviation(p, product, dim) * slope(T)
    return (result * slope(T)).to(x.dtype)


def softmax_jacobian(x: Tensor, dim: int, T: float) -> Tensor:
    p, unit = _differences(x, dim, T)
    return (p.unsqueeze(-1) * unit * slope(T)).to(x.dtype)


def log_softmax_jacobian(x: Tensor, dim: int, T: float) -> Tensor:
    return (_differences(x, dim, T)[1] * slope(T)).to(x.dtype)


def softmax_hessian(x: Tensor, dim: int, T: float) -> Tensor:
    p, unit = _differences(x, dim, T)
    product = unit.unsqueeze(-1) * unit.unsqueeze(-2)
    covariance = (p.unsqueeze(-1) * unit).unsqueeze(-3)
    result = p[..., None, None] * (product - covariance) * slope(T)
    return (result * slope(T)).to(x.dtype)


def _differences(x: Tensor, dim: int, T: float) -> tuple[Tensor, Tensor]:
    """p, and d_ij - p_j: unit vectors j minus their means, at i."""
    p = _softmax(x, None, dim, T).movedim(dim, -1)
    rows = p.unsqueeze(-2).expand(*p.shape, p.shape[-1])
    one = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return p, _deviation(rows, one.expand_as(rows), -1).mT


def loss(
    x: Tensor, target: Tensor, weight: Mask, dim: int, eps: float
) -> Tensor:
    log_p = _log_softmax(x, None, dim, 1.0)
    if target.is_floating_point() or eps:
        y = _targets(x, target, weight, dim, eps)
        # Finite where y is 0, for the product and the derivative in y.
        lowest = log_p.detach().clamp(min=torch.finfo(log_p.dtype).min)
        terms = y * torch.where(y == 0, lowest, log_p)
        return -terms.sum(dim, keepdim=True)
    value = -log_p.gather(dim, target)
    if weight is None:
        return value
    share = weight.gather(dim, target)
    return (value * share).masked_fill(share == 0, 0)


def loss_gradient(
    x: Tensor,
    target: Tensor,
    weight: Mask,
    share: Tensor,
    dim: int,
    eps: float,
) -> Tensor:
    p = _softmax(x, None, dim, 1.0)
    y = _targets(x, target, weight, dim, eps)
    result = share * _difference(p, y, dim)
    return result.masked_fill(share == 0, 0).to(x.dtype)


def _difference(p: Tensor, y: Tensor, dim: int) -> Tensor:
    """s p - y with s = sum(y), where p is largest from the others.

    All add up to zero, and p itself may have rounded to one.
    """
    here, result = _largest(p, dim), p * y.sum(dim, keepdim=True) - y
    others = torch.where(here, p - p, result).sum(dim, keepdim=True)
    return torch.where(here, -others, result)


def _deviation(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """v minus its mean under p, centred where p is largest first.

    What would cancel in the mean of a confident row then never appears.
    """
    v = centred(v, p, None, dim)
    return v - (p * v).sum(dim, keepdim=True)


def centred(v: Tensor, p: Tensor, mask: Mask, dim: int) -> Tensor:
    """v minus its value where p is largest, 0 where masked."""
    v = _unmasked(v, mask, 0.0)
    return _unmasked(v - _at(_largest(p, dim), v, dim), mask, 0.0)


def _softmax(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    high, rest = _shifted(x, mask, dim, T)
    return _unmasked(high.exp() / (1 + rest), mask, 0.0)


def _log_softmax(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    high, rest = _shifted(x, mask, dim, T)
    return _unmasked(high - torch.log1p(rest), mask, -math.inf)


def _shifted(
    x: Tensor, mask: Mask, dim: int, T: float
) -> tuple[Tensor, Tensor]:
    """(z - top) / T, and the sum of the weights without the largest.

    The shift is not held constant: derivatives are centred by it, so that
    nothing cancels in them where one class has almost everything.
    """
    z = _unmasked(widen(x), mask, -math.inf)
    here = _largest(z, dim)
    top = _at(here, z, dim)
    if mask is not None:
        # A fully masked row has no weight instead of NaN weights.
        top = torch.where(mask.any(dim, keepdim=True), top, 0)
    high = exponents(z, top, T)
    # At the largest logit it is 0 whatever that is.
    high = torch.where(here, high.detach(), high)
    return high, _rest(high, here, dim)


def _rest(high: Tensor, here: Tensor, dim: int) -> Tensor:
    """The sum of the weights but the largest; NaN if `high` is there.

    There `high` is 0 or NaN. A compiler takes NaN * 0 for 0.
    """
    weights = torch.where(here, high.detach(), high.exp())
    return weights.sum(dim, keepdim=True)


def _largest(x: Tensor, dim: int) -> Tensor:
    """Whether an entry is the largest, one of each row."""
    if not x.shape[dim]:
        return x > x
    classes = torch.arange(x.shape[dim], device=x.device)
    shape = [-1 if d == dim % x.ndim else 1 for d in range(x.ndim)]
    return classes.view(shape) == x.detach().argmax(dim, keepdim=True)


def _at(here: Tensor, x: Tensor, dim: int) -> Tensor:
    """The one entry of each row that is there."""
    return torch.where(here, x, 0).sum(dim, keepdim=True)


def _targets(
    x: Tensor, target: Tensor, weight: Mask, dim: int, eps: float
) -> Tensor:
    """w_k ((1 - eps) y_k + eps / K), y the target or one-hot for indices."""
    if target.is_floating_point():
        y = widen(target)
    else:
        one = torch.ones_like(target, dtype=widen(x).dtype)
        y = torch.zeros_like(x, dtype=one.dtype)
        y = y.scatter(dim, target, one)
    if eps:
        y = y * (1 - eps) + eps / x.shape[dim]
    return y if weight is None else y * weight


def _unmasked(value: Tensor, mask: Mask, masked: float) -> Tensor:
    return value if mask is None else value.masked_fill(~mask, masked)
