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
        shape = [*x.shape]
        shape[dim] = 1
        return x.new_full(shape, -math.inf)
    z = _unmasked(widen(x), mask, -math.inf)
    index = z.detach().argmax(dim, keepdim=True)
    top = z.gather(dim, index)
    infinite = top.isinf()
    # An infinite logit is its own log-sum-exp, with a derivative of NaN;
    # where nothing is infinite it does not take part, and vice versa.
    special = torch.where(infinite & (z == top), z, 1)
    special = special.reciprocal().reciprocal().sum(dim, keepdim=True)
    high = z.masked_fill(infinite, 0) - top.masked_fill(infinite, 0)
    value = top + torch.log1p(_rest(high, index, dim))
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
    result = v - p * v.sum(dim, keepdim=True)
    return _unmasked(result * slope(T), mask, 0.0).to(x.dtype)


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
    p = _softmax(x, None, dim, T).movedim(dim, -1)
    outer = p.unsqueeze(-1) * p.unsqueeze(-2)
    result = torch.diag_embed(p) - outer
    return (result * slope(T)).to(x.dtype)


def log_softmax_jacobian(x: Tensor, dim: int, T: float) -> Tensor:
    p = _softmax(x, None, dim, T).movedim(dim, -1)
    one = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    result = one - p.unsqueeze(-2)
    return (result * slope(T)).to(x.dtype)


def softmax_hessian(x: Tensor, dim: int, T: float) -> Tensor:
    p = _softmax(x, None, dim, T).movedim(dim, -1)
    pair = p.unsqueeze(-1) * p.unsqueeze(-2)
    result = 2 * p[..., None, None] * pair.unsqueeze(-3)
    line = torch.diag_embed(p) - pair
    result = result + torch.diag_embed(line, 0, -3, -2)
    result = result - torch.diag_embed(pair, 0, -3, -1)
    result = result - torch.diag_embed(pair, 0, -2, -1)
    scale = slope(T)
    return (result * scale * scale).to(x.dtype)


def loss(
    x: Tensor, target: Tensor, weight: Mask, dim: int, eps: float
) -> Tensor:
    log_p = _log_softmax(x, None, dim, 1.0)
    if target.is_floating_point() or eps:
        y = _targets(x, target, weight, dim, eps)
        terms = (y * log_p).masked_fill(y == 0, 0)
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
    result = share * (p * y.sum(dim, keepdim=True) - y)
    return result.masked_fill(share == 0, 0).to(x.dtype)


def _deviation(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """v minus its mean under p, centred where p is largest first.

    What would cancel in the mean of a confident row then never appears.
    """
    v = centred(v, p, None, dim)
    return v - (p * v).sum(dim, keepdim=True)


def centred(v: Tensor, p: Tensor, mask: Mask, dim: int) -> Tensor:
    """v minus its value where p is largest, 0 where masked."""
    if not p.shape[dim]:
        return v
    v = _unmasked(v, mask, 0.0)
    index = p.detach().argmax(dim, keepdim=True)
    return _unmasked(v - v.gather(dim, index), mask, 0.0)


def _softmax(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    if not x.shape[dim]:
        return widen(x).clone()
    high, rest = _shifted(x, mask, dim, T)
    return _unmasked(high.exp() / (1 + rest), mask, 0.0)


def _log_softmax(x: Tensor, mask: Mask, dim: int, T: float) -> Tensor:
    if not x.shape[dim]:
        return widen(x).clone()
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
    index = z.detach().argmax(dim, keepdim=True)
    top = z.gather(dim, index)
    if mask is not None:
        # A fully masked row has no weight instead of NaN weights.
        top = torch.where(mask.any(dim, keepdim=True), top, 0)
    high = exponents(z, top, T)
    return high, _rest(high, index, dim)


def _rest(high: Tensor, index: Tensor, dim: int) -> Tensor:
    """The sum of the weights but that at the index; NaN if `high` is."""
    classes = torch.arange(high.shape[dim], device=high.device)
    shape = [-1 if d == dim else 1 for d in range(high.ndim)]
    here = classes.view(shape) == index
    # At the largest logit 0, or NaN where it is infinite.
    weights = torch.where(here, high * 0, high.exp())
    return weights.sum(dim, keepdim=True)


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
