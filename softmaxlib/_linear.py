"""The cross-entropy of a linear layer, whose logits are never all there.

A block of logits at a time is made, used and forgotten: `statistics` takes
from it what the loss of a row needs, and `gradients` makes it again. The
target stands apart in both, so that its loss and its p - 1 come from what
the other classes have. As statistics of slices of the classes merge, the
slices may be on different machines.

Everything of a row has shape (N, 1); where it decides on digits, in the
widest format of the device.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from softmaxlib import _blocks

# Logits that are there at a time, and the fewest classes of a block.
_SIZE, _FEWEST = 2**20, 64


class Layer(NamedTuple):
    """Logits x W^T + b, which c tanh(z / c) may keep within c."""

    weight: Tensor  # (K, D)
    bias: Tensor | None = None  # (K)
    softcap: float | None = None


class Target(NamedTuple):
    """What a class has of the target of a row, q_k.

    That is `even` for each class, and besides `mass` of the row for the
    class `index`, or `gain` times `y`.
    """

    index: Tensor | None  # (N), int64; -1 for a class that is elsewhere
    even: Tensor | None = None  # (K)
    y: Tensor | None = None  # (N, K)
    gain: Tensor | None = None  # (K)


class Statistics(NamedTuple):
    """What the loss of a row needs. But for `top`, all can be added up.

    To merge two, give them the same top: `rest` times exp(old - new).
    """

    top: Tensor  # the largest logit but for the target; -inf if none
    rest: Tensor  # the sum of exp(z - top), without the target
    picked: Tensor  # the logit of the target; 0 if it is elsewhere
    dot: Tensor  # the sum of q_k z_k, without the mass
    total: Tensor  # the sum of q_k, without the mass


class Values(NamedTuple):
    """The loss of rows, and what its derivative needs."""

    loss: Tensor
    logsumexp: Tensor
    surprise: Tensor  # -log p of the target
    total: Tensor  # the sum of q_k, without the mass


def statistics(
    x: Tensor, layer: Layer, target: Target, kept: Tensor | None = None
) -> Statistics:
    """Of the rows of x, float32 or float64, over the classes of a layer.

    As many logits as fit into `kept`, flat, stay there for `gradients`.
    """
    nothing = x.new_zeros((len(x), 1), dtype=_blocks.work_dtype(x))
    top, rest, picked = nothing - math.inf, nothing, nothing.clone()
    dot = total = nothing
    space = _space(x, layer)
    for classes, slot, rows, at in _pieces(x, layer, target, kept):
        z = _logits(x, layer, classes, space if slot is None else slot)
        for q in _given(target, classes):
            dot = dot + (z * q).masked_fill_(q == 0, 0).sum(1, True)
            total = total + q.sum(-1, True, dtype=total.dtype)
        found = z[rows, at]
        picked[rows, 0] = found.to(picked.dtype)
        z[rows, at] = -math.inf
        new = torch.maximum(top, z.amax(1, True))
        shift = new.masked_fill(new == -math.inf, 0)
        weights = torch.sub(z, shift.to(z.dtype), out=_like(space, z))
        part = weights.exp_().sum(1, True)
        rest, top = rest * (top - shift).exp_() + part, new
        if slot is not None:
            slot[rows, at] = found
    return Statistics(top, rest, picked, dot, total)


def values(
    found: Statistics, mass: Tensor, square: Tensor, anywhere: bool = True
) -> Values:
    """The loss sum_k q_k (log Z - z_k) + square (log Z)^2 of each row.

    `anywhere`: whether the rows have a target with `mass`.
    """
    others = found.top + found.rest.log()
    if anywhere:
        gap = others - found.picked
        surprise = torch.logaddexp(gap, torch.zeros_like(gap))
        # As a sum of the others has it: +inf is no logit.
        surprise = surprise.masked_fill(found.picked == math.inf, math.nan)
        logsumexp = torch.logaddexp(others, found.picked)
        loss = (mass * surprise).masked_fill(mass == 0, 0)
    else:
        surprise, logsumexp = torch.full_like(others, math.inf), others
        loss = torch.zeros_like(others)
    # A total of zero is one of nothing, or of zeros.
    rest = (found.total * logsumexp).masked_fill(found.total == 0, 0)
    loss = loss + (rest - found.dot)
    penalty = (square * logsumexp.square()).masked_fill(square == 0, 0)
    return Values(loss + penalty, logsumexp, surprise, found.total)


class Slopes(NamedTuple):
    """The derivative in a logit: scale exp(z - shift) - share q_k.

    But at the target it is `at_target`, which has everything.
    """

    shift: Tensor
    scale: Tensor
    share: Tensor
    at_target: Tensor


def slopes(
    value: Values,
    mass: Tensor,
    square: Tensor,
    share: Tensor,
    even: Tensor | float = 0.0,
) -> Slopes:
    """Of the loss of each row times its share; `even` at its target."""
    rest = value.total + 2 * square * value.logsumexp
    # p - 1 from the others; and (mass + rest) p - mass - even.
    minus = torch.expm1(-value.surprise)
    at_target = mass * minus + rest * torch.exp(-value.surprise) - even
    shift = value.logsumexp
    return Slopes(shift, share * (mass + rest), share, share * at_target)


class Gradients(NamedTuple):
    """Where to write gradients, or None; the biases' in x's format."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradients(
    x: Tensor,
    layer: Layer,
    target: Target,
    slope: Slopes,
    out: Gradients,
    kept: Tensor | None = None,
    *,
    add: bool = False,
) -> None:
    """Write the gradients of rows; for weight and bias `add` them.

    `kept` may be the memory of the weight's gradient.
    """
    space, wide = _space(x, layer), x.dtype
    # What the rounding of the shift costs, the scale gives back.
    shift = slope.shift.to(wide)
    scale = slope.scale * (shift - slope.shift).exp()
    scale, share, at_target = (
        v.to(wide) for v in (scale, slope.share, slope.at_target)
    )
    if out.x is not None:
        out.x.zero_()
    for classes, slot, rows, at in _pieces(x, layer, target, kept):
        z = slot
        if z is None:
            z = _logits(x, layer, classes, space)
        cap = None
        if layer.softcap is not None:
            cap = (z / layer.softcap).square_().neg_().add_(1)
        p = torch.sub(z, shift, out=_like(space, z)).exp_().mul_(scale)
        for q in _given(target, classes):
            p -= share * q
        p[rows, at] = at_target[rows, 0]
        if cap is not None:
            p *= cap
        hit = p[rows, at].unsqueeze(1)
        # Small and many, large and few: apart they round less.
        p[rows, at] = 0
        if out.x is not None:
            w = layer.weight[classes].to(wide)
            out.x.addmm_(p, w).index_add_(0, rows, hit * w[at])
        if out.weight is not None:
            block = out.weight[classes]
            same = block.dtype == wide
            sums = block if same else block.to(wide)
            sums = sums.addmm_(p.mT, x, beta=float(add))
            sums.index_add_(0, at, hit * x[rows])
            if not same:
                block.copy_(sums)
        if out.bias is not None:
            sums = p.sum(0).index_add_(0, at, hit.squeeze(1))
            out.bias[classes] = out.bias[classes] * float(add) + sums


def _width(x: Tensor, layer: Layer) -> int:
    """The classes of a block."""
    fewest = max(_FEWEST, _SIZE // max(len(x), 1))
    return max(1, min(len(layer.weight), fewest))


def _space(x: Tensor, layer: Layer) -> Tensor:
    return x.new_empty(len(x) * _width(x, layer))


def _like(space: Tensor, z: Tensor) -> Tensor:
    return space[: z.numel()].view_as(z)


def _pieces(
    x: Tensor, layer: Layer, target: Target, kept: Tensor | None
) -> Iterator[tuple[slice, Tensor | None, Tensor, Tensor]]:
    """Blocks of classes, with the place of their logits in `kept`.

    A place is no earlier than the block's own gradient in the weight, and
    at least as large: written in turn, that meets only what is done with.
    Besides, the rows whose target is in the block, and where in it.
    """
    classes, width = len(layer.weight), _width(x, layer)
    rows, features = x.shape
    stride = width * max(rows, features)
    bounds = [*range(0, classes, width), classes]
    index = target.index
    if index is None:
        index = torch.full((rows,), -1, device=x.device)
    found, order = index.sort()
    places = torch.searchsorted(found, found.new_tensor(bounds)).tolist()
    for i, start in enumerate(bounds[:-1]):
        stop, slot = bounds[i + 1], None
        if kept is not None and (i + 1) * stride <= kept.numel():
            slot = kept[i * stride :][: rows * (stop - start)]
            slot = slot.view(rows, stop - start)
        here = slice(places[i], places[i + 1])
        yield slice(start, stop), slot, order[here], found[here] - start


def _logits(x: Tensor, layer: Layer, classes: slice, out: Tensor) -> Tensor:
    weight = layer.weight[classes].to(x.dtype)
    out = out.flatten()[: len(x) * len(weight)].view(len(x), len(weight))
    z = torch.mm(x, weight.mT, out=out)
    if layer.bias is not None:
        z += layer.bias[classes]
    if layer.softcap is not None:
        z.div_(layer.softcap).tanh_().mul_(layer.softcap)
    return z


def _given(target: Target, classes: slice) -> Iterator[Tensor]:
    """What classes have of the target, but for its mass."""
    if target.even is not None:
        yield target.even[classes]
    if target.y is not None:
        y = target.y[:, classes]
        yield y if target.gain is None else y * target.gain[classes]
