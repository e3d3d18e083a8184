"""The cross-entropy of a linear layer, whose logits are never all there.

A block of logits at a time is made, used and forgotten: `statistics` takes
from it what the loss of a row needs, and `gradients` makes it again. The
target stands apart in both, so that its loss and its p - 1 come from what
the other classes have. As statistics of slices of the classes merge, the
slices may be on different machines.

Everything of a row has shape (N, 1); where it decides on digits, in the
widest format of the device.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    class `label`, or `gain` times `y`.
    """

    label: Tensor | None  # (N), int64; -1 for a class that is elsewhere
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


class Kept(NamedTuple):
    """Memory, flat, for what `statistics` leaves to `gradients`.

    That is exp(z - top) with the largest logit so far, which is kept, too;
    or z itself, where a soft cap needs it for its slope.
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
        raw = slot is not None and layer.softcap is not None
        weights = _like(space, z) if raw else z
        torch.sub(z, shift.to(z.dtype), out=weights)
        part = weights.exp_().sum(1, True)
        rest, top = rest * (top - shift).exp_() + part, new
        if raw:
            z[rows, at] = found
        if kept is not None:
            kept.tops.append(new)
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
    kept: Kept | None = None,
    *,
    add: bool = False,
) -> None:
    """Write the gradients of rows; for weight and bias `add` them.

    The memory of `kept` may be that of the weight's gradient.
    """
    space, wide = _space(x, layer), x.dtype
    share, at_target = slope.share.to(wide), slope.at_target.to(wide)
    if out.x is not None:
        out.x.zero_()
    pieces = _pieces(x, layer, target, kept)
    for i, (classes, slot, rows, at) in enumerate(pieces):
        top = None if kept is None or slot is None else kept.tops[i]
        p, cap = _scaled(x, layer, classes, slot, top, slope, space)
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


def _scaled(
    x: Tensor,
    layer: Layer,
    classes: slice,
    slot: Tensor | None,
    top: Tensor | None,
    slope: Slopes,
    space: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """scale exp(z - shift) of a block, and the slope of the soft cap."""
    if slot is not None and top is not None and layer.softcap is None:
        scale = slope.scale * (top - slope.shift).exp()
        return torch.mul(
            slot, scale.to(x.dtype), out=_like(space, slot)
        ), None
    z = _logits(x, layer, classes, space) if slot is None else slot
    cap = None
    if layer.softcap is not None:
        cap = (z / layer.softcap).square_().neg_().add_(1)
    # What the rounding of the shift costs, the scale gives back.
    shift = slope.shift.to(x.dtype)
    scale = slope.scale * (shift - slope.shift).exp()
    p = torch.sub(z, shift, out=_like(space, z)).exp_()
    return p.mul_(scale.to(x.dtype)), cap


def _width(x: Tensor, layer: Layer) -> int:
    """The classes of a block."""
    fewest = max(_FEWEST, _SIZE // max(len(x), 1))
    return max(1, min(len(layer.weight), fewest))


def _space(x: Tensor, layer: Layer) -> Tensor:
    return x.new_empty(len(x) * _width(x, layer))


def _like(space: Tensor, z: Tensor) -> Tensor:
    return space[: z.numel()].view_as(z)


def _pieces(
    x: Tensor, layer: Layer, target: Target, kept: Kept | None
) -> Iterator[tuple[slice, Tensor | None, Tensor, Tensor]]:
    """Blocks of classes, with the place of their logits in `kept`.

    In the memory of the weight's gradient a place is no earlier than the
    block's own gradient: written in turn, that meets what is done with.
    Besides, the rows whose target is in the block, and where in it.
    """
    classes, width = len(layer.weight), _width(x, layer)
    rows, stride = len(x), 0
    if kept is not None:
        stride = max(
            width * rows, width * kept.memory.numel() // max(classes, 1)
        )
    bounds = [*range(0, classes, width), classes]
    label = target.label
    if label is None:
        label = torch.full((rows,), -1, device=x.device)
    found, order = label.sort()
    places = torch.searchsorted(found, found.new_tensor(bounds)).tolist()
    for i, start in enumerate(bounds[:-1]):
        stop, slot = bounds[i + 1], None
        size = rows * (stop - start)
        if kept is not None and i * stride + size <= kept.memory.numel():
            slot = kept.memory[i * stride :][:size].view(rows, stop - start)
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


# --- all classes in one place --------------------------------------------


class Case(NamedTuple):
    """The targets of N rows, and how their losses are made of them."""

    target: Tensor  # (N), int64, or (N, K), floating point
    weight: Tensor | None  # (K), of the classes, in the widest format
    smoothing: float = 0.0
    square: float = 0.0  # the factor of (log Z)^2


def parted(arguments: Sequence[Any]) -> tuple[Tensor, Layer, Case]:
    """(x, weight, bias, softcap, *case) as what they belong to."""
    x, weight, bias, softcap, *case = arguments
    return x, Layer(weight, bias, softcap), Case(*case)


def losses(x: Tensor, layer: Layer, case: Case) -> Tensor:
    """Of all rows, (N, 1), in one product."""
    x = _widened(x)
    target, mass, square, _ = _targets(x, layer, case)
    found = statistics(x, layer, target)
    return values(found, mass, square, target.label is not None).loss


def both(
    x: Tensor,
    layer: Layer,
    case: Case,
    share: Tensor,
    needs: Sequence[bool],
    fast: bool,
) -> tuple[Tensor, Gradients]:
    """The sum of share times loss, and the gradients that it needs.

    The memory of the weight's gradient holds logits until it is written:
    those of D rows, or a part of those of all. If `fast`, the rows that
    follow the first D go by in blocks whose logits are kept, too.
    """
    dtype, x, weight = x.dtype, _widened(x), layer.weight
    out = Gradients(
        torch.empty_like(x) if needs[0] else None,
        weight.new_empty(weight.shape) if needs[1] else None,
        x.new_zeros(len(weight)) if needs[2] else None,
    )
    rows, features = x.shape
    own = None
    if out.weight is not None and not out.weight.numel() % 2:
        own = out.weight.flatten().view(x.dtype)  # two halves hold one
    # A sum of halves over blocks of rows would be rounded in each.
    fast = fast and weight.dtype == x.dtype and rows > features
    size = max(1, 3 * features // 8 if fast else rows)
    memory = x.new_empty(size * len(weight)) if fast else None
    first = features if fast and own is not None else size
    total, starts = (
        share.new_zeros(()),
        [0, *range(first, rows, size), rows],
    )
    for start, stop in itertools.pairwise(starts):
        at = slice(start, stop)
        some = Case(case.target[at], *case[1:])
        target, mass, square, even = _targets(x[at], layer, some)
        place = own if start == 0 and own is not None else memory
        kept = None if place is None else Kept(place, [])
        found = statistics(x[at], layer, target, kept)
        value = values(found, mass, square, target.label is not None)
        total += (value.loss * share[at]).sum()
        slope = slopes(value, mass, square, share[at], even)
        in_x = None if out.x is None else out.x[at]
        part = Gradients(in_x, *out[1:])
        gradients(x[at], layer, target, slope, part, kept, add=start > 0)
    in_x, in_weight, in_bias = out
    in_x = None if in_x is None else in_x.to(dtype)
    in_bias = None if in_bias is None else in_bias.to(dtype)
    return total, Gradients(in_x, in_weight, in_bias)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _targets(
    x: Tensor, layer: Layer, case: Case
) -> tuple[Target, Tensor, Tensor, Tensor | float]:
    """The target, its mass, the factor of (log Z)^2, `even` at it."""
    t, w, eps, classes = case.target, case.weight, case.smoothing, layer[0]
    one = x.new_ones((len(x), 1), dtype=_blocks.work_dtype(x))
    square, size = one * case.square, len(classes)
    each = one.new_ones(size) if w is None else w
    even = (each * (eps / max(size, 1))).to(x.dtype) if eps else None
    if t.is_floating_point():
        gain = (each * (1 - eps)).to(x.dtype)
        return Target(None, even, t, gain), one * 0, square, 0.0
    # Here, as only here the values can be read in every mode.
    _check.in_range("linear_cross_entropy", t, size)
    mass = one if w is None else w[t].unsqueeze(1)
    at = 0.0 if even is None else even[t].unsqueeze(1)
    return Target(t, even), mass * (1 - eps), mass * square, at
