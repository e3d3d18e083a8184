"""Softmax and its derivatives as the formulas say, in plain PyTorch.

Right, in float64, and written out so that a saboteur may change one place.
A mask is None or boolean of the shape of x, `dim` is not negative, and the
temperature lies in [0, inf].
"""

import math

import torch


def exponent(x, mask, dim, temperature, shift=None, dtype=torch.float64):
    """(z - shift) / T, with -inf where masked, and the shift, max z."""
    z = x.to(dtype)
    if mask is not None:
        z = z.masked_fill(~mask, -math.inf)
    if shift is None:
        shift = z.amax(dim, keepdim=True)
        if mask is not None:
            # A fully masked row has no weights instead of NaN.
            none = ~mask.any(dim, keepdim=True)
            shift = shift.masked_fill(none, 0)
    z = z - shift
    if temperature == 0:
        return z.masked_fill(z < 0, -math.inf), shift
    if temperature == math.inf:
        return torch.where(z.isinf(), z, z * 0), shift
    return z / temperature, shift


def softmax(x, mask, dim, temperature=1.0, eps=0.0, **options):
    """The softmax; `eps` is added to the denominator."""
    if not x.numel():
        return x.double()
    z, _ = exponent(x, mask, dim, temperature, **options)
    p = z.exp()
    p = p / (p.sum(dim, keepdim=True) + eps)
    return p if mask is None else p.masked_fill(~mask, 0)


def log_softmax(x, mask, dim, temperature=1.0, eps=0.0, **options):
    """The logarithm of `softmax`."""
    if not x.numel():
        return x.double()
    z, _ = exponent(x, mask, dim, temperature, **options)
    z = z - log_total(z, dim, eps)
    return z if mask is None else z.masked_fill(~mask, -math.inf)


def logsumexp(x, mask, dim, temperature=1.0, eps=0.0, **options):
    """log sum exp, with `dim` kept."""
    if not x.shape[dim]:
        return x.double().sum(dim, keepdim=True) - math.inf
    z, shift = exponent(x, mask, dim, temperature, **options)
    value = shift + log_total(z, dim, eps)
    return torch.where(shift.isinf(), shift, value)


def log_total(z, dim, eps=0.0):
    """log(sum exp z), where the largest z is 0, without loss at 1."""
    index = z.argmax(dim, keepdim=True)
    top = z.gather(dim, index)
    rest = z.scatter(dim, index, -math.inf).exp().sum(dim, keepdim=True)
    return torch.where(
        top == 0,
        torch.log1p(rest + eps),
        torch.log(z.exp().sum(dim, keepdim=True) + eps),
    )


def slope(temperature):
    """1 / T as a factor of derivatives, 0 at T = 0."""
    return 1 / temperature if temperature else 0.0


def mean(p, v, dim):
    """The mean of v under p."""
    return (p * v).sum(dim, keepdim=True)


def targets(x, target, weight, dim, smoothing):
    """What the loss multiplies -log p by: indices become weights, too."""
    classes = x.shape[dim]
    y = target.double()
    if not target.dtype.is_floating_point:
        y = torch.zeros(x.shape, dtype=torch.float64)
        y = y.scatter(dim, target, 1)
    y = (1 - smoothing) * y + smoothing / max(classes, 1)
    return y if weight is None else y * weight
