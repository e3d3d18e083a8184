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

# Bytes of the line that the ranks tell each other before they begin.
_LINE = 512


def parallel_logsumexp(
    input: Tensor, dim: int, *, group: Any = None, keepdim: bool = False
) -> Tensor:
    name = "parallel_logsumexp"
    team = _Team(name, input, group)
    with team.agreement():
        x, dim = team.shard(input, dim)
        keepdim = _check.flag(name, "keepdim", keepdim)
        team.say(x.shape[dim], x, dim)
    rows = _autograd.call(_LogSumExp, team, x, dim).to(x.dtype)
    return team.whole(rows if keepdim else rows.squeeze(dim))


def parallel_softmax(
    input: Tensor, dim: int, *, group: Any = None, temperature: float = 1.0
) -> Tensor:
    name = "parallel_softmax"
    team = _Team(name, input, group)
    with team.agreement():
        x, dim = team.shard(input, dim)
        T = _check.temperature(name, temperature)
        team.say(x.shape[dim], x, dim, f"T = {T}, {_asked(x)}")
    return team.whole(_autograd.call(_Softmax, team, x, dim, T), input)


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
    with team.agreement():
        x, dim = team.shard(input, 1)
        t = _check.class_indices(name, team.local("target", target), x, dim)
        said = _said(name, t, *options)
        team.say(x.shape[dim], x, dim, said)
    goal = _goal(team, x, t.unsqueeze(dim), *options)
    rows = _autograd.call(_Loss, team, x, dim, goal)
    return team.whole(_reduced(rows, goal, reduction, dim).to(x.dtype))


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
    with team.agreement():
        rows = _check.samples(name, team.local("x", x))
        w = team.local("weight", weight)
        classes = _check.layer(name, w, "kd", rows)
        team.along(0)
        b = bias if bias is None else team.local("bias", bias)
        if b is not None:
            _check.like(name, "bias", b, w, (classes,))
        t = _check.class_indices(
            name, team.local("target", target), rows, rows.ndim - 1
        )
        said = f"D = {w.shape[1]}, bias {b is not None}, {_asked(rows)}, "
        said += _said(name, t, *options)
        team.say(classes, rows, rows.ndim - 1, said)
    goal = _goal(team, rows, t.reshape(-1, 1), *options)
    # Whatever stands in a row that is ignored.
    flat = rows.flatten(0, -2).masked_fill(goal.silent, 0)
    losses = _autograd.call(_LinearLoss, team, flat, w, b, goal)
    losses = losses.view(*t.shape, 1)
    return team.whole(_reduced(losses, goal, reduction, -1).to(rows.dtype))


# --- targets -------------------------------------------------------------


class _Goal(NamedTuple):
    """The targets of the rows; what belongs to a row has one class.

    Attributes:
        index: of the target among the classes here; outside if elsewhere.
        mass: the weight of the target, without its part of the smoothing.
        even: what every class has, the classes here, (K), or None.
        silent: the rows that do not count.
        count: what the mean divides by.
    """

    index: Tensor
    mass: Tensor
    even: Tensor | None
    silent: Tensor
    count: Tensor


def _said(
    name: str,
    target: Tensor,
    weight: Any,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> str:
    """The options, checked, and a digest of the targets."""
    _check.choice(name, "reduction", reduction, "mean", "sum", "none")
    smoothing = _check.smoothing(name, smoothing)
    ignored = target == _check.integer(name, "ignore_index", ignore_index)
    known = target.masked_fill(ignored, 0)
    place = torch.arange(known.numel(), device=known.device) % 997 + 1
    said = f"{reduction}, smoothing {smoothing}, targets "
    said += f"{ignored.sum()} ignored, {(known.flatten() * place).sum()}, "
    if weight is not None:
        weight = _check.tensor(name, "weights of classes", weight)
        said += f"weights {weight.dtype} {tuple(weight.shape)}"
    return said


def _goal(
    team: "_Team",
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    smoothing: float,
) -> _Goal:
    """What is known once all ranks have said how many classes they hold."""
    silent = target == ignore_index
    known = target.masked_fill(silent, 0)
    _check.in_range(team.name, target[~silent], team.total)
    here = slice(team.offset, team.offset + team.classes)
    share = (~silent).to(_blocks.work_dtype(x))
    even = share.new_full([team.classes], smoothing / max(team.total, 1))
    if weight is not None:
        like = x.new_empty(0).expand(team.total, 0)
        wide = _blocks.widen(
            _check.class_weight(team.name, weight, like, 0)
        )
        share, even = share * wide[known], even * wide[here]
    if not smoothing:
        silent = share == 0
    index = (known - team.offset).masked_fill(silent, -1)
    mass = share * (1 - smoothing)
    return _Goal(
        index, mass, even if smoothing else None, silent, share.sum()
    )


def _reduced(rows: Tensor, goal: _Goal, reduction: str, dim: int) -> Tensor:
    rows = rows.masked_fill(goal.silent.view(rows.shape), 0)
    if reduction == "none":
        return rows.squeeze(dim)
    return rows.sum() / goal.count if reduction == "mean" else rows.sum()


def _asked(x: Tensor) -> str:
    asked = torch.is_grad_enabled() and x.requires_grad
    return "with a derivative" if asked else "without derivatives"


# --- the ranks of a group ------------------------------------------------


class _Team:
    """The ranks of a group, and what they tell each other.

    Attributes:
        classes: here; offset: before those of this rank; total: everywhere.
    """

    classes, offset, total = 0, 0, 0

    def __init__(self, name: str, model: Any, group: Any):
        self.name, self.model, self.group = name, model, group
        self.sharded = type(model).__name__ == "DTensor"
        if not (
            distributed.is_available() and distributed.is_initialized()
        ):
            why = "needs torch.distributed.init_process_group(timeout=...)"
            raise RuntimeError(f"{name}(): {why} first")
        if self.sharded:
            if group is not None or model.device_mesh.ndim > 1:
                why = "a DTensor has one group, that of its mesh of one "
                why += "dimension; else pass to_local() and a group"
                raise NotImplementedError(f"{name}(): {why}")
            self.group = model.device_mesh.get_group()
        self.rank = distributed.get_rank(self.group)
        self.size = distributed.get_world_size(self.group)
        if self.rank < 0:
            raise RuntimeError(
                f"{name}(): this process is not in the group"
            )

    # --- arguments

    def local(self, name: str, value: Any) -> Tensor:
        """What is here of a DTensor, or of a tensor everything."""
        if type(value).__name__ == "DTensor":
            value = value.to_local()
        return _check.tensor(self.name, name, value)

    def shard(self, value: Any, dim: int) -> tuple[Tensor, int]:
        """The logits that are here, and their class dimension."""
        x = _check.logits(self.name, self.local("input", value))
        dim = _check.dimension(self.name, dim, x.ndim)
        self.along(dim)
        return x, dim

    def along(self, dim: int) -> None:
        """See that the classes of a DTensor are what is sharded."""
        if self.sharded and not self.model.placements[0].is_shard(dim):
            must = f"sharded along its classes, Shard({dim})"
            seen = self.model.placements[0]
            raise RuntimeError(f"{self.name}(): must be {must}, got {seen}")

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

    # --- agreement

    def say(
        self, classes: int, x: Tensor, dim: int, more: str = ""
    ) -> None:
        rows = [*x.shape[:dim], *x.shape[dim + 1 :]]
        self.classes, self.line = classes, f"{x.dtype}, rows {rows}, {more}"

    @contextlib.contextmanager
    def agreement(self) -> Iterator[None]:
        """Check arguments: all ranks go on with the same, or none does."""
        try:
            yield
        except Exception as error:
            self._exchange(f"!|{type(error).__name__}: {error}")
            raise
        lines = self._exchange(f"{self.classes}|{self.line}")
        known = [line.split("|", 1) for line in lines]
        for rank, (size, text) in enumerate(known):
            why = None
            if size == "!":
                why = f"rank {rank} refused its arguments: {text}"
            elif text != known[0][1]:
                why = f"ranks must agree, but rank 0 has {known[0][1]}; "
                why += f"and rank {rank} has {text}"
            if why:
                raise RuntimeError(f"{self.name}(): {why}")
        sizes = [int(size) for size, _ in known]
        self.offset, self.total = sum(sizes[: self.rank]), sum(sizes)

    def _exchange(self, line: str) -> list[str]:
        """The lines of all ranks, in their order."""
        device = getattr(self.model, "device", "cpu")
        code = list(line.encode()[:_LINE].ljust(_LINE))
        mine = torch.tensor(code, dtype=torch.uint8, device=device)
        lines = [torch.empty_like(mine) for _ in range(self.size)]
        self._run("check", distributed.all_gather, lines, mine)
        texts = (
            bytes(each.tolist()).decode(errors="ignore") for each in lines
        )
        return [text.strip() for text in texts]

    def _run(
        self, what: str, function: Callable[..., Any], *of: Any
    ) -> None:
        try:
            function(*of, group=self.group)
        except RuntimeError as error:
            why = f"rank {self.rank} of {self.size} gave up in the {what}: "
            why += (
                "another rank failed, left, or is later than the timeout "
            )
            why += f"of the group allows ({error})"
            raise RuntimeError(f"{self.name}(): {why}") from error

    # --- sums

    def add(self, what: str, *parts: Tensor) -> tuple[Tensor, ...]:
        """The sums over all ranks, in one all-reduce."""
        together = torch.stack(parts)
        self._run(what, distributed.all_reduce, together)
        return together.unbind()

    def common(
        self, top: Tensor, rest: Tensor, T: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The largest logit of all, and what is here relative to it."""
        # A maximum may lose a NaN; the sum, which follows, does not.
        high = top.nan_to_num(math.inf, math.inf, -math.inf)
        maximum = distributed.ReduceOp.MAX
        self._run("maximum", distributed.all_reduce, high, maximum)
        factor = _blocks.exponents(top, high, T).exp()
        return high, rest * factor.masked_fill(top == high, 1)


# --- slices of logits ----------------------------------------------------


def _statistics(
    x: Tensor, dim: int, T: float, index: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the classes here the largest logit, the sum of the weights
    relative to it without the target's, and the target's logit.

    -inf and 0 where there are none.
    """
    shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    rest = x.new_zeros(shape, dtype=_blocks.work_dtype(x))
    top, picked = rest - math.inf, torch.zeros_like(rest)
    parts = _blocks.weighed(dim, T, x, None, top, rest, picked, index)
    for rows, t, r, p, i in parts:
        t.copy_(rows.top)
        # In the place of a maximum of -inf anything else does.
        rows.top = rows.top.masked_fill(rows.top == -math.inf, 0)
        if i is not None:
            here = (i >= 0) & (i < rows.x.shape[-1])
            i = i.where(here, 0)
            z = rows.x.gather(-1, i)
            p.copy_(z.where(here, 0))
            rows.x = rows.x.scatter(-1, i, z.masked_fill(here, -math.inf))
        r.copy_(rows.sum(rows.weights))
    return top, rest, picked


def _shares(
    x: Tensor,
    dim: int,
    T: float,
    high: Tensor,
    scale: Tensor,
    even: Tensor | None = None,
    share: Tensor | None = None,
    index: Tensor | None = None,
    at_target: Tensor | None = None,
) -> Tensor:
    """scale exp((x - high) / T) - share even, or what is at the target."""
    out = x.new_empty(x.shape)
    more = high, scale, share, index, at_target
    for rows, target, rows.top, factor, s, i, a in _blocks.weighed(
        dim, T, x, None, out, *more
    ):
        for piece in rows.pieces:
            values = rows.weights(piece).mul_(factor)
            if even is not None:
                values -= s * even[piece]
            rows.write(target, piece, values, 0.0)
        if i is not None:
            here = (i >= 0) & (i < rows.x.shape[-1])
            i = i.where(here, 0)
            a = torch.where(here, a.to(out.dtype), target.gather(-1, i))
            target.scatter_(-1, i, a)
            target.masked_fill_(s == 0, 0)
    return out


class _LogSumExp(Function):
    @staticmethod
    def forward(ctx: Any, team: _Team, x: Tensor, dim: int) -> Tensor:
        top, rest, _ = _statistics(x, dim, 1.0)
        # An infinite logit is its own log-sum-exp.
        rest = rest.masked_fill(top == math.inf, 1)
        high, rest = team.common(top, rest)
        (rest,) = team.add("sum", rest)
        ctx.save_for_backward(x, high, rest)
        ctx.dim = dim
        return high + rest.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> Any:
        x, high, rest = ctx.saved_tensors
        return None, _shares(x, ctx.dim, 1.0, high, c / rest), None


class _Softmax(Function):
    @staticmethod
    def forward(
        ctx: Any, team: _Team, x: Tensor, dim: int, T: float
    ) -> Tensor:
        top, rest, _ = _statistics(x, dim, T)
        high, rest = team.common(top, rest, T)
        (total,) = team.add("sum", rest)
        y = _shares(x, dim, T, high, total.reciprocal())
        ctx.save_for_backward(y)
        ctx.options = team, dim, T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> Any:
        (y,), (team, dim, T) = ctx.saved_tensors, ctx.options
        out = y.new_empty(y.shape)
        shape = [3, *y.shape[:dim], 1, *y.shape[dim + 1 :]]
        parts = y.new_zeros(shape, dtype=_blocks.work_dtype(y))
        size = _blocks.SHARED * torch.get_num_threads()
        for p, u, *sums in _blocks.blocks(dim, size, y, v, *parts):
            p, u = _blocks.widen(p), _blocks.widen(u)
            i = p.argmax(-1, keepdim=True)
            largest = p.gather(-1, i)
            sure = (
                largest > 0.5
            )  # of all ranks at most one has such a class
            p = p.scatter(-1, i, largest.masked_fill(sure, 0))
            sums[0].copy_(u.gather(-1, i).where(sure, 0))
            sums[1].copy_(p.sum(-1, keepdim=True))
            sums[2].copy_((p * u).sum(-1, keepdim=True))
        centre, others, mean = team.add("derivative", *parts)
        # Relative to the v of a sure class the mean does not cancel.
        mean = mean - centre * others
        for p, u, o, c, m in _blocks.blocks(
            dim, size, y, v, out, centre, mean
        ):
            o.copy_((u - c - m).mul_(p).mul_(_blocks.slope(T)))
        return None, out, None, None


class _Loss(Function):
    @staticmethod
    def forward(
        ctx: Any, team: _Team, x: Tensor, dim: int, goal: _Goal
    ) -> Tensor:
        top, rest, picked = _statistics(x, dim, 1.0, goal.index)
        high, rest = team.common(top, rest)
        here = (goal.index >= 0) & (goal.index < x.shape[dim])
        picked = torch.where(here, picked - high, 0)
        dot = torch.zeros_like(rest)
        total = torch.zeros_like(rest)
        if goal.even is not None:
            total += goal.even.sum()
            for z, h, d in _blocks.blocks(
                dim, _blocks.SHARED, x, high, dot
            ):
                part = (z - h).mul_(goal.even)
                part = part.masked_fill_(goal.even == 0, 0)
                d.copy_(part.sum(-1, keepdim=True))
        sums = team.add("sum", rest, picked, dot, total)
        found = _linear.Statistics(torch.zeros_like(high), *sums)
        square = torch.zeros_like(high)
        value = _linear.values(found, goal.mass, square)
        ctx.save_for_backward(x)
        ctx.options = dim, goal, high, found, value, square
        return value.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dim, goal, high, found, value, square = ctx.options
        slope = _slope(found, value, goal, square, c)
        scale = slope.scale * torch.exp(-slope.shift)
        gradient = _shares(
            x,
            dim,
            1.0,
            high,
            scale,
            goal.even,
            c,
            goal.index,
            slope.at_target,
        )
        return None, gradient, None, None


def _slope(
    found: Any, value: Any, goal: _Goal, square: Tensor, c: Tensor
) -> _linear.Slopes:
    even: Any = 0.0
    if goal.even is not None and len(goal.even):
        even = goal.even[goal.index.clamp(0, len(goal.even) - 1)]
    return _linear.slopes(found, value, goal.mass, square, c, even)


class _LinearLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        team: _Team,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        goal: _Goal,
    ) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        layer = _linear.Layer(weight, bias)
        target = _linear.Target(goal.index.squeeze(1), goal.even)
        kept = None
        with _autograd.exactly(x):
            found = _linear.statistics(wide, layer, target, kept)
        high, rest = team.common(found.top, found.rest)
        sums = team.add("sum", rest, *found[2:])
        found = _linear.Statistics(high, *sums)
        square = torch.zeros_like(high)
        value = _linear.values(found, goal.mass, square)
        ctx.save_for_backward(x, weight, bias)
        ctx.options = team, goal, found, value, square
        return value.loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        team, goal, found, value, square = ctx.options
        needs = ctx.needs_input_grad
        wide = x if x.dtype == torch.float64 else x.float()
        slope = _slope(found, value, goal, square, c)
        out = _linear.Gradients(
            torch.empty_like(wide) if needs[1] else None,
            torch.empty_like(weight) if needs[2] else None,
            wide.new_empty(len(weight)) if needs[3] else None,
        )
        target = _linear.Target(goal.index.squeeze(1), goal.even)
        layer = _linear.Layer(weight, bias)
        with _autograd.exactly(x):
            _linear.gradients(wide, layer, target, slope, out, None)
        if out.x is not None:
            team._run("derivative", distributed.all_reduce, out.x)
        return None, *out, None
