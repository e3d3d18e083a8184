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
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from softmaxlib import _blocks, _check

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
    class `label`, or the product of `y`.
    """

    label: Tensor  # (N), int64; -1 for a class that is elsewhere
    even: Tensor | None = None  # (K)
    y: tuple[Tensor, Tensor] | None = None  # (N, K) and (K)


class Statistics(NamedTuple):
    """What the loss of a row needs. But for `top`, all can be added up.

    To merge two, give them the same top: `rest` times exp(old - new).
    """

    top: Tensor  # the largest logit but for the target; -inf if none
    rest: Tensor  # the sum of exp(z - top), without the target
    picked: Tensor  # the logit of the target; 0 if it is elsewhere
    dot: Tensor  # the sum of q_k z_k, without the mass
    total: Tensor  # the sum of q_k, without the mass


class Kept(NamedTuple):
    """Memory, flat, for what `statistics` leaves to `gradients`.

    That is exp(z - top) with the largest logit so far, which is kept, too.
    A soft cap needs z itself for its slope: with it nothing may be kept.
    """

    memory: Tensor
    tops: list[Tensor]


class Values(NamedTuple):
    """The loss of rows, and what its derivative needs."""

    loss: Tensor
    logsumexp: Tensor
    surprise: Tensor  # -log p of the target
    total: Tensor  # the sum of q_k, without the mass


def statistics(
    x: Tensor, layer: Layer, target: Target, kept: Kept | None = None
) -> Statistics:
    """Of the rows of x, float32 or float64, over the classes of a layer.

    As many blocks as fit into `kept` stay there for `gradients`.
    """
    nothing = x.new_zeros((len(x), 1), dtype=_blocks.work_dtype(x))
    top, rest, picked = nothing - math.inf, nothing, nothing.clone()
    dot = total = nothing
    space = x.new_empty(len(x) * _width(x, layer))
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
        part = z.sub_(shift.to(z.dtype)).exp_().sum(1, True)
        rest, top = rest * (top - shift).exp_() + part, new
        if kept is not None:
            kept.tops.append(new)
    return Statistics(top, rest, picked, dot, total)


def values(
    found: Statistics, mass: Tensor, square: Tensor, anywhere: bool = True
) -> Values:
    """The loss sum_k q_k (log Z - z_k) + square (log Z)^2 of each row.

    `anywhere`: whether the rows have a target with `mass`.
    """
    others, picked = found.top + found.rest.log(), found.picked
    if not anywhere:
        picked = torch.full_like(picked, -math.inf)
    gap = others - picked
    surprise = torch.logaddexp(gap, torch.zeros_like(gap))
    # As a sum of the others has it: +inf is no logit.
    surprise = surprise.masked_fill(picked == math.inf, math.nan)
    logsumexp = torch.logaddexp(others, picked)
    loss = (mass * surprise).masked_fill(mass == 0, 0)
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
    """Where to write gradients, or None; the biases' are zeros, as x."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradients(
    x: Tensor,
    layer: Layer,
    target: Target,
    slope: Slopes,
    out: Gradients,
    kept: Kept | None = None,
    *,
    add: bool = False,
) -> None:
    """Write the gradients of rows; for the weight `add` them.

    The memory of `kept` may be that of the weight's gradient.
    """
    wide, cap = x.dtype, layer.softcap
    space = x.new_empty(len(x) * _width(x, layer))
    share, at_target = slope.share.to(wide), slope.at_target.to(wide)
    if out.x is not None:
        out.x.zero_()
    pieces = _pieces(x, layer, target, kept)
    for i, (classes, slot, rows, at) in enumerate(pieces):
        if kept is None or slot is None:
            # What the rounding of the shift costs, the scale gives back.
            top = slope.shift.to(wide)
            slot = _logits(x, layer, classes, space)
            bend = None if cap is None else 1 - (slot / cap).square_()
            slot.sub_(top).exp_()
        else:
            top, bend = kept.tops[i], None
        scale = slope.scale * (top - slope.shift).exp()
        p = space[: slot.numel()].view_as(slot)
        torch.mul(slot, scale.to(wide), out=p)
        for q in _given(target, classes):
            p -= share * q
        p[rows, at] = at_target[rows, 0]
        if bend is not None:
            p *= bend
        hit = p[rows, at].unsqueeze(1)
        # Small and many, large and few: apart they round less.
        p[rows, at] = 0
        if out.x is not None:
            w = layer.weight[classes].to(wide)
            out.x.addmm_(p, w).index_add_(0, rows, hit * w[at])
        if out.weight is not None:
            block = out.weight[classes]
            sums = block.to(wide).addmm_(p.mT, x, beta=float(add))
            block.copy_(sums.index_add_(0, at, hit * x[rows]))
        if out.bias is not None:
            sums = p.sum(0).index_add_(0, at, hit.squeeze(1))
            out.bias[classes] += sums


def _width(x: Tensor, layer: Layer) -> int:
    """The classes of a block."""
    fewest = max(_FEWEST, _SIZE // max(len(x), 1))
    return max(1, min(len(layer.weight), fewest))


def _pieces(
    x: Tensor, layer: Layer, target: Target, kept: Kept | None
) -> Iterator[tuple[slice, Tensor | None, Tensor, Tensor]]:
    """Blocks of classes, with the place of their logits in `kept`.

    In the memory of the weight's gradient a place is no earlier than the
    block's own gradient: written in turn, that meets what is done with.
    Besides, the rows whose target is in the block, and where in it.
    """
    classes, width = len(layer.weight), _width(x, layer)
    rows = len(x)
    bounds = [*range(0, classes, width), classes]
    found, order = target.label.sort()
    places = torch.searchsorted(found, found.new_tensor(bounds)).tolist()
    for i, start in enumerate(bounds[:-1]):
        stop, slot = bounds[i + 1], None
        if kept is not None:
            size = rows * (stop - start)
            place = start * max(rows, kept.memory.numel() // classes)
            if place + size <= kept.memory.numel():
                slot = kept.memory[place:][:size].view(rows, stop - start)
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
        yield target.y[0][:, classes] * target.y[1][classes]


# --- all classes in one place --------------------------------------------


class Case(NamedTuple):
    """The targets of N rows, and how their losses are made of them."""

    target: Tensor  # (N, 1), int64, or (N, K), floating point
    weight: Tensor | None  # (K), of the classes
    smoothing: float = 0.0
    square: float = 0.0  # the factor of (log Z)^2


def losses(
    x: Tensor,
    layer: Layer,
    case: Case,
    share: Tensor | None,
    needs: Sequence[bool],
    fast: bool,
) -> tuple[Tensor, Gradients]:
    """The losses of all rows, (N, 1), or for shares the sum of share times
    loss, and the gradients that it needs.

    The memory of the weight's gradient holds exponentials until it is
    written: those of D rows, or a part of those of all. If `fast`, more rows
    than these go by in blocks, with a memory for all the exponentials.
    """
    dtype, weight, size, memory = x.dtype, layer[0], max(len(x), 1), None
    x = x.to(torch.promote_types(dtype, torch.float32))
    out = Gradients(
        x.new_empty(x.shape) if needs[0] else None,
        weight.new_empty(weight.shape) if needs[1] else None,
        x.new_zeros(len(weight)) if needs[2] else None,
    )
    # A sum of halves over blocks of rows would be rounded in each.
    if any(needs) and weight.dtype == x.dtype and layer.softcap is None:
        memory = None if out.weight is None else out.weight.flatten()
        if fast and len(x) > x.shape[1]:
            size = max(1, 3 * x.shape[1] // 8)
            memory = x.new_empty(size * len(weight))
    total = x.new_zeros((), dtype=_blocks.work_dtype(x))
    for start in range(0, max(len(x), 1), size):
        at = slice(start, start + size)
        some = Case(case.target[at], *case[1:])
        target, mass, square, even = _targets(x[at], layer, some)
        kept = None if memory is None else Kept(memory, [])
        found = statistics(x[at], layer, target, kept)
        value = values(found, mass, square, target.y is None)
        if share is None:
            return value.loss, out
        total += (value.loss * share[at]).sum()
        slope = slopes(value, mass, square, share[at], even)
        in_x = None if out.x is None else out.x[at]
        part = Gradients(in_x, *out[1:])
        gradients(x[at], layer, target, slope, part, kept, add=start > 0)
    parts = [None if g is None else g.to(dtype) for g in out]
    return total, Gradients(*parts)


def _targets(
    x: Tensor, layer: Layer, case: Case
) -> tuple[Target, Tensor, Tensor, Tensor | float]:
    """The target, its mass, the factor of (log Z)^2, `even` at it."""
    t, w, eps, classes = case.target, case.weight, case.smoothing, layer[0]
    one = x.new_ones((len(x), 1), dtype=_blocks.work_dtype(x))
    square, size = one * case.square, len(classes)
    each = one.new_ones(size) if w is None else w.to(one.dtype)
    even = (each * (eps / max(size, 1))).to(x.dtype) if eps else None
    if t.is_floating_point():
        gain = (each * (1 - eps)).to(x.dtype)
        nowhere = t.new_full((len(t),), -1, dtype=torch.long)
        return Target(nowhere, even, (t, gain)), one * 0, square, 0.0
    # Here, as only here the values can be read in every mode.
    _check.in_range("linear_cross_entropy", t, size)
    mass, at = each[t], 0.0 if even is None else even[t]
    return Target(t.squeeze(1), even), mass * (1 - eps), mass * square, at
