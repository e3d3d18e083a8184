"""Softmax and cross-entropy over classes that several processes share.

Each rank of a process group holds a slice of the classes. Of its slice a
rank tells the others, for each row, the largest logit and the sum of the
weights: two small all-reduces, whatever the number of classes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from softmaxlib import _autograd, _blocks, _check, _linear
from softmaxlib.loss import Reduction

__all__ = [
    "parallel_cross_entropy",
    "parallel_linear_cross_entropy",
    "parallel_logsumexp",
    "parallel_softmax",
]


def parallel_logsumexp(
    input: Tensor, dim: int, *, group: Any = None, keepdim: bool = False
) -> Tensor:
    name = "parallel_logsumexp"
    team = _Team(name, input, group)
    with team.agreement() as said:
        x, dim = team.slice("input", input, dim)
        keepdim = _check.flag(name, "keepdim", keepdim)
        said += [x.shape[dim], x.dtype, _rows(x, dim)]
    nowhere = torch.full(_rows(x, dim, 1), -1, device=x.device)
    top, rest, *_ = _autograd.call(_Totals, x, dim, nowhere, None)
    # An infinite logit is its own log-sum-exp.
    rest = rest.masked_fill(top == math.inf, 1)
    high, (rest,) = team.merge(top, rest)
    value = (high + rest.log()).to(x.dtype)
    return team.whole(value if keepdim else value.squeeze(dim))


def parallel_softmax(
    input: Tensor, dim: int, *, group: Any = None, temperature: float = 1.0
) -> Tensor:
    name = "parallel_softmax"
    team = _Team(name, input, group)
    with team.agreement() as said:
        x, dim = team.slice("input", input, dim)
        T = _check.temperature(name, temperature)
        said += [x.shape[dim], x.dtype, _rows(x, dim), T, _asked(x)]
    z, classes = _blocks.widen(x), x.shape[dim]
    nothing = z.new_full(_rows(x, dim, 1), -math.inf)
    top = z.detach().amax(dim, keepdim=True) if classes else nothing
    weights = _blocks.exponents(z, team.largest(top), T).exp()
    total = team.sum(weights.sum(dim, keepdim=True))
    # Each rank needs it for classes of its own.
    total = _autograd.call(_Sum, team, False, total)
    return team.whole((weights / total).to(x.dtype), input)


def parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    name = "parallel_cross_entropy"
    team = _Team(name, input, group)
    options = weight, ignore_index, reduction, label_smoothing
    with team.agreement() as said:
        x, dim = team.slice("input", input, 1)
        t = _check.class_indices(name, team.local("target", target), x, dim)
        said += [x.shape[dim], x.dtype, *_said(name, t, *options)]
    goal = _goal(team, x, t.unsqueeze(dim), *options)
    found = _autograd.call(_Totals, x, dim, goal.index, goal.even)
    loss = _loss(team, found, goal, reduction)
    loss = loss.squeeze(dim) if reduction == "none" else loss
    return team.whole(loss.to(x.dtype))


def parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    name = "parallel_linear_cross_entropy"
    team = _Team(name, weight, group)
    options = class_weight, ignore_index, reduction, label_smoothing
    with team.agreement() as said:
        z = _check.samples(name, team.local("x", x))
        w, _ = team.slice("weight", weight, 0)
        classes = _check.layer(name, w, "kd", z)
        if bias is not None:
            bias = team.local("bias", bias)
            _check.like(name, "bias", bias, w, (classes,))
        t = team.local("target", target)
        t = _check.class_indices(name, t, z, z.ndim - 1)
        said += [classes, z.dtype, z.shape[-1], bias is None, _asked(z)]
        said += _said(name, t, *options)
    goal = _goal(team, z, t.reshape(-1, 1), *options)
    # In the format of the sums, and nothing from rows that are ignored.
    rows = z.flatten(0, -2).masked_fill(goal.silent, 0)
    rows = rows if z.dtype == torch.float64 else rows.float()
    rows = _autograd.call(_Sum, team, False, rows)
    found = _autograd.call(
        _LinearTotals, rows, w, bias, goal.index, goal.even
    )
    loss = _loss(team, found, goal, reduction)
    loss = loss.view(t.shape) if reduction == "none" else loss
    return team.whole(loss.to(z.dtype))


# --- the ranks of a group ------------------------------------------------


class _Team:
    """The ranks of a group, and what they tell each other.

    Attributes:
        here: the number of classes on this rank.
        offset: that on the ranks before it.
        classes: that on all of them.
    """

    def __init__(self, name: str, model: Any, group: Any):
        self.name, self.model, self.group = name, model, group
        self.sharded = type(model).__name__ == "DTensor"
        if not (
            distributed.is_available() and distributed.is_initialized()
        ):
            why = "init_process_group(..., timeout=...) comes first"
            raise RuntimeError(f"{name}(): torch.distributed.{why}")
        if self.sharded:
            if group is not None or model.device_mesh.ndim > 1:
                why = (
                    "a DTensor has one group, that of its mesh, which must "
                )
                why += "have one dimension; or pass to_local() and a group"
                raise NotImplementedError(f"{name}(): {why}")
            self.group = model.device_mesh.get_group()
        self.rank = distributed.get_rank(self.group)
        if self.rank < 0:
            raise RuntimeError(
                f"{name}(): this process is not in the group"
            )

    def local(self, name: str, value: Any) -> Tensor:
        """What is here of a DTensor, or of a tensor everything."""
        if type(value).__name__ == "DTensor":
            value = value.to_local()
        return _check.tensor(self.name, name, value)

    def slice(self, name: str, value: Any, dim: int) -> tuple[Tensor, int]:
        """The classes that are here, in a supported format, and `dim`."""
        x = _check.logits(self.name, self.local(name, value))
        dim = _check.dimension(self.name, min(dim, x.ndim - 1), x.ndim)
        if not x.ndim:
            raise RuntimeError(
                f"{self.name}(): a 0-d {name} has no classes"
            )
        if self.sharded and not value.placements[0].is_shard(dim):
            must = f"{name} must be sharded along its classes, Shard({dim})"
            seen = value.placements[0]
            raise RuntimeError(f"{self.name}(): {must}, got {seen}")
        return x, dim

    def whole(self, value: Tensor, like: Any = None) -> Tensor:
        """The result, as a DTensor where the input was one."""
        if not self.sharded:
            return value
        from torch.distributed.tensor import DTensor, Replicate

        mesh = self.model.device_mesh
        if like is None:
            return DTensor.from_local(value, mesh, [Replicate()])
        shape = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(value, mesh, like.placements, **shape)

    @contextlib.contextmanager
    def agreement(self) -> Iterator[list[Any]]:
        """Check arguments: all ranks go on with the same, or none does.

        Takes a list: how many classes are here, and what must be the same.
        """
        said: list[Any] = []
        try:
            yield said
        except Exception as error:
            self._exchange(f"{type(error).__name__}: {error}")
            raise
        everywhere = self._exchange(said)
        for rank, other in enumerate(everywhere):
            why = None
            if isinstance(other, str):
                why = f"rank {rank} refused its arguments, {other}"
            elif other[1:] != said[1:]:
                why = f"ranks must agree, but rank {self.rank} has "
                why += f"{said[1:]} and rank {rank} has {other[1:]}"
            if why:
                raise RuntimeError(f"{self.name}(): {why}")
        sizes = [classes for classes, *_ in everywhere]
        self.here, self.classes = sizes[self.rank], sum(sizes)
        self.offset = sum(sizes[: self.rank])

    def _exchange(self, what: Any) -> list[Any]:
        found = [None] * distributed.get_world_size(self.group)
        self._run(distributed.all_gather_object, found, what)
        return found

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments, group=self.group)
        except RuntimeError as error:
            why = f"rank {self.rank} waited in vain: another rank failed, "
            why += "left, or is later than the timeout of the group allows"
            raise RuntimeError(f"{self.name}(): {why} ({error})") from error

    def reduce(self, value: Tensor, operation: Any) -> Tensor:
        """All-reduce, into a new tensor."""
        value = value.clone(memory_format=torch.contiguous_format)
        self._run(distributed.all_reduce, value, operation)
        return value

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, which is then the same on each."""
        return _autograd.call(_Sum, self, True, value)

    def largest(self, top: Tensor) -> Tensor:
        """The largest over all ranks; inf for NaN, which a maximum loses."""
        top = top.nan_to_num(math.inf, math.inf, -math.inf)
        return self.reduce(top, distributed.ReduceOp.MAX)

    def merge(
        self, top: Tensor, rest: Tensor, *others: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The largest of all, and the sums: `rest` is relative to it."""
        high = self.largest(top)
        factor = (top - high).exp().masked_fill(top == high, 1)
        sums = self.sum(torch.stack([rest * factor, *others]))
        return high, sums.unbind()


class _Sum(Function):
    """The sum over all ranks: of values, or else of derivatives."""

    @staticmethod
    def forward(ctx: Any, team: _Team, values: bool, x: Tensor) -> Tensor:
        ctx.options = team, values
        add = distributed.ReduceOp.SUM
        return team.reduce(x, add) if values else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> Any:
        team, values = ctx.options
        add = distributed.ReduceOp.SUM
        return None, None, c if values else team.reduce(c, add)


# --- targets -------------------------------------------------------------


class _Goal(NamedTuple):
    """The targets of the rows; what belongs to a row has one class.

    Attributes:
        index: of the target among the classes here; outside if elsewhere.
        mass: the weight of the target, without its part of the smoothing.
        even: what every class here has besides, (K), or None.
        total: the sum of that over all ranks.
        silent: the rows that do not count.
        count: what the mean divides by.
    """

    index: Tensor
    mass: Tensor
    even: Tensor | None
    total: Tensor
    silent: Tensor
    count: Tensor


def _rows(x: Tensor, dim: int, *classes: int) -> tuple[int, ...]:
    """The shape without the classes, or with so many."""
    return (*x.shape[:dim], *classes, *x.shape[dim + 1 :])


def _asked(x: Tensor) -> str:
    asked = torch.is_grad_enabled() and x.requires_grad
    return "differentiable" if asked else "not differentiable"


def _said(
    name: str,
    target: Tensor,
    weight: Any,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> list[Any]:
    """The options, checked, and a digest of the targets."""
    _check.choice(name, "reduction", reduction, "mean", "sum", "none")
    smoothing = _check.smoothing(name, smoothing)
    ignored = target == _check.integer(name, "ignore_index", ignore_index)
    counted = target.masked_fill(ignored, -1).flatten()
    place = torch.arange(len(counted), device=target.device) % 997 + 1
    digest = f"targets with digest {(counted * place).sum()}"
    if weight is not None:
        weight = _check.tensor(name, "weights of classes", weight)
        weight = weight.dtype, tuple(weight.shape)
    return [tuple(target.shape), digest, weight, reduction, smoothing]


def _goal(
    team: _Team,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> _Goal:
    """What is known once all ranks have said how many classes they have."""
    silent = target == ignore_index
    known = target.masked_fill(silent, 0)
    _check.in_range(team.name, target[~silent], team.classes)
    ones = x.new_ones(team.classes, dtype=_blocks.work_dtype(x))
    weight = ones if weight is None else weight
    weight = _check.class_weight(team.name, weight, ones, 0).to(ones)
    share = weight[known].masked_fill(silent, 0)
    even = weight * (smoothing / max(team.classes, 1))
    here = slice(team.offset, team.offset + team.here)
    return _Goal(
        (known - team.offset).masked_fill(silent, -1),
        share * (1 - smoothing),
        even[here] if smoothing else None,
        even.sum(),
        silent if smoothing else share == 0,
        share.sum(),
    )


def _loss(
    team: _Team, found: tuple[Tensor, ...], goal: _Goal, reduction: str
) -> Tensor:
    """The loss from what each rank has found in its classes."""
    top, rest, picked, dot = found
    high, (rest, picked, dot) = team.merge(top, rest, picked, dot)
    # Whatever stands in a row that does not count.
    high = high.masked_fill(goal.silent, 0)
    rest = rest.masked_fill(goal.silent, 0)
    # Relative to the largest logit, the target among them.
    shift = torch.maximum(high, picked.detach())
    rest, gap = rest * (high - shift).exp(), picked - shift
    log_total = (rest + gap.exp()).log()
    # -log p of the target; from the others where it has most.
    near = torch.log1p(rest * (-gap.clamp(min=-1)).exp())
    loss = goal.mass * torch.where(gap > -1, near, log_total - gap)
    loss = loss.masked_fill(goal.mass == 0, 0)
    if goal.even is not None:
        loss = loss + (goal.total * (log_total + shift) - dot)
    loss = loss.masked_fill(goal.silent, 0)
    if reduction == "none":
        return loss
    return loss.sum() / goal.count if reduction == "mean" else loss.sum()


# --- slices of the classes -----------------------------------------------


def _inside(index: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Whether an index is one of these classes, and 0 where it is not."""
    here = (index >= 0) & (index < classes)
    return here, index.where(here, 0)


class _Totals(Function):
    """Of the classes here, for each row: the largest logit; the sum of
    exp(z - largest) without the target; its logit, or 0; the sum of even z.

    The largest is held constant. Where no class is here, it is -inf.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, index: Tensor, even: Tensor | None
    ) -> tuple[Tensor, ...]:
        wide = _blocks.work_dtype(x)
        sums = x.new_zeros((4, *_rows(x, dim, 1)), dtype=wide).unbind()
        sums[0].fill_(-math.inf)
        parts = _blocks.weighed(dim, 1.0, x, None, index, *sums)
        for rows, i, top, rest, picked, dot in parts:
            top.copy_(rows.top)
            # In the place of a maximum of -inf anything else does.
            rows.top = rows.top.masked_fill(rows.top == -math.inf, 0)
            if even is not None:
                terms = (rows.x * even).masked_fill_(even == 0, 0)
                dot.copy_(terms.sum(-1, keepdim=True))
            here, i = _inside(i, rows.x.shape[-1])
            z = rows.x.gather(-1, i)
            picked.copy_(z.where(here, 0))
            rows.x = rows.x.scatter(-1, i, z.masked_fill(here, -math.inf))
            rest.copy_(rows.sum(rows.weights))
        ctx.save_for_backward(x, index, even)
        ctx.options = dim, sums[0]
        ctx.mark_non_differentiable(sums[0])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *c: Tensor) -> Any:
        (x, index, even), (dim, top) = ctx.saved_tensors, ctx.options
        out = x.new_empty(x.shape)
        parts = _blocks.weighed(dim, 1.0, x, None, out, top, index, *c)
        for rows, target, rows.top, i, rest, picked, dot in parts:
            for piece in rows.pieces:
                values = rows.weights(piece).mul_(rest)
                values.masked_fill_(rest == 0, 0)
                if even is not None:
                    values += dot * even[piece]
                rows.write(target, piece, values, 0.0)
            here, i = _inside(i, rows.x.shape[-1])
            if even is not None:
                picked = picked + dot * even[i]
            there = target.gather(-1, i)
            picked = picked.to(out.dtype).where(here, there)
            target.scatter_(-1, i, picked)
        return out, None, None, None


class _LinearTotals(Function):
    """The same of the logits x W^T + b, which are never all there."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        even: Tensor | None,
    ) -> tuple[Tensor, ...]:
        layer = _linear.Layer(weight, bias)
        target = _linear.Target(index.squeeze(1), even)
        with _autograd.exactly(x):
            found = _linear.statistics(x, layer, target)
        ctx.save_for_backward(x, weight, bias)
        ctx.options = target, found.top
        ctx.mark_non_differentiable(found.top)
        # Without classes the library gives one tensor for two sums.
        return *found[:3], found.dot.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *c: Tensor) -> Any:
        (x, weight, bias), (target, top) = ctx.saved_tensors, ctx.options
        rest, picked, dot = c
        if target.even is not None and len(weight):
            _, i = _inside(target.index, len(weight))
            picked = picked + dot * target.even[i].unsqueeze(1)
        top = top.masked_fill(top == -math.inf, 0)
        needs = ctx.needs_input_grad
        out = _linear.Gradients(
            torch.empty_like(x) if needs[0] else None,
            torch.empty_like(weight) if needs[1] else None,
            x.new_empty(len(weight)) if needs[2] else None,
        )
        slopes = _linear.Slopes(top, rest, -dot, picked)
        layer = _linear.Layer(weight, bias)
        with _autograd.exactly(x):
            _linear.gradients(x, layer, target, slopes, out)
        return *out, None, None
