"""Softmax and cross-entropy over classes that several processes share.

Each rank of a process group holds a slice of the classes. Of its slice a
rank tells the others, for each row, the largest logit and the sum of the
weights: two small all-reduces, whatever the number of classes.
"""

import math
from collections.abc import Callable
from typing import Any

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
    with _Team("parallel_logsumexp", input, group) as team:
        x, dim = team.slice(input, dim)
        keepdim = _check.flag(team.name, "keepdim", keepdim)
    z = _wide(x, dim)
    high = team.largest(z.detach().amax(dim, keepdim=True))
    # Infinite logits may well stand as they are.
    high = high.masked_fill(high.isinf(), 0)
    total = team.sum((z - high).exp().sum(dim, keepdim=True))
    value = (high + total.log()).to(team.dtype)
    return team.whole(value if keepdim else value.squeeze(dim))


def parallel_softmax(
    input: Tensor, dim: int, *, group: Any = None, temperature: float = 1.0
) -> Tensor:
    with _Team("parallel_softmax", input, group) as team:
        x, dim = team.slice(input, dim)
        T = _check.temperature(team.name, temperature)
        team.said["temperature"] = T
    z = _wide(x, dim)
    high = team.largest(z.detach().amax(dim, keepdim=True))
    weights = _blocks.exponents(z, high, T).exp()
    total = team.sum(weights.sum(dim, keepdim=True))
    # Every rank needs it for classes of its own.
    p = weights / _autograd.call(_Sum, team, False, total)
    return team.whole(p.narrow(dim, 0, team.here).to(team.dtype), input)


def parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    options = ignore_index, reduction, label_smoothing
    with _Team("parallel_cross_entropy", input, group) as team:
        x, dim = team.slice(input)
        t = team.targets(target, x, dim, *options)
    index, silent = team.place(t.unsqueeze(dim), ignore_index)
    z = _wide(x.masked_fill(silent, 0), dim)
    top = z.detach().amax(dim, keepdim=True)
    high = team.largest(top)
    here = (index >= 0) & (index < team.here)
    at = index.where(here, 0)
    found = z.gather(dim, at)
    others = z.scatter(dim, at, found.masked_fill(here, -math.inf))
    rest = (others - high).exp().sum(dim, keepdim=True)
    dot = z.narrow(dim, 0, team.here).sum(dim, keepdim=True)
    sums = rest, found.where(here, 0), dot
    loss = _loss(team, high, sums, silent, reduction, label_smoothing)
    return team.whole(loss.squeeze(dim) if reduction == "none" else loss)


def parallel_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    group: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    options = ignore_index, reduction, label_smoothing
    with _Team("parallel_linear_cross_entropy", weight, group) as team:
        x = _check.samples(team.name, team.local("x", x))
        w, _ = team.slice(weight, 0)
        _check.layer(team.name, w, "kd", x)
        if bias is not None:
            bias = team.local("bias", bias)
            _check.like(team.name, "bias", bias, w, (len(w),), "weight")
        t = team.targets(target, x, x.ndim - 1, *options)
        team.said |= {"bias": bias is not None, "x": x.requires_grad}
    index, silent = team.place(t.flatten().unsqueeze(1), ignore_index)
    # In the format of the sums, and nothing from rows that are ignored.
    x = x.flatten(0, -2).masked_fill(silent, 0)
    x = x if x.dtype == torch.float64 else x.float()
    x = _autograd.call(_Sum, team, False, x)
    found = _autograd.call(_Totals, x, w, bias, index, label_smoothing)
    top, rest, *others = found
    high = team.largest(top)
    rest = rest * (top - high).exp().masked_fill(top == high, 1)
    sums = rest, *others
    loss = _loss(team, high, sums, silent, reduction, label_smoothing)
    return team.whole(loss.view(t.shape) if reduction == "none" else loss)


def _wide(x: Tensor, dim: int) -> Tensor:
    """In the widest format; where there is no class, one of weight 0."""
    z = _blocks.widen(x)
    if not x.shape[dim]:
        shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
        z = torch.cat([z, z.new_full(shape, -math.inf)], dim)
    return z


def _loss(
    team: "_Team",
    high: Tensor,
    sums: tuple[Tensor, ...],
    silent: Tensor,
    reduction: str,
    eps: float,
) -> Tensor:
    """From what each rank has found in its classes, for each row.

    The sum of exp(z - high) without the target, the logit of the target or
    0, the sum of z.
    """
    rest, picked, dot = team.sum(torch.stack(sums)).unbind()
    # Relative to the largest logit, the target among them.
    shift = torch.maximum(high, picked.detach())
    rest, gap = rest * (high - shift).exp(), picked - shift
    log_total = (rest + gap.exp()).log()
    # -log p of the target; from the others where it has most.
    near = torch.log1p(rest * (-gap.clamp(min=-1)).exp())
    loss = torch.where(gap > -1, near, log_total - gap)
    if eps:
        mean = dot / team.classes
        loss = (1 - eps) * loss + eps * (log_total + shift - mean)
    loss = loss.masked_fill(silent, 0)
    if reduction == "mean":
        loss = loss.sum() / (~silent).sum()
    return (loss.sum() if reduction == "sum" else loss).to(team.dtype)


# --- the ranks of a group ------------------------------------------------


class _Team:
    """The ranks of a group, and what they tell each other.

    A context in which arguments are checked: all ranks leave it with the
    same, or none does.

    Attributes:
        here, offset, classes: the number of classes on this rank, on those
            before it, on all.
        said: what must be the same on all.
        dtype: that of the result.
    """

    def __init__(self, name: str, model: Any, group: Any):
        self.name, self.said = name, dict[str, Any]()
        if not (
            distributed.is_available() and distributed.is_initialized()
        ):
            why = "init_process_group(..., timeout=...) comes first"
            raise RuntimeError(f"{name}(): torch.distributed.{why}")
        self.mesh = getattr(model, "device_mesh", None)
        self.group = group if self.mesh is None else self.mesh.get_group()
        self.rank = distributed.get_rank(self.group)
        if self.rank < 0:
            raise RuntimeError(
                f"{name}(): this process is not in the group"
            )

    def __enter__(self) -> "_Team":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        mine: Any = self.here, self.said
        if kind is not None:
            mine = f"{kind.__name__}: {error}"
        found = [mine] * distributed.get_world_size(self.group)
        self._run(distributed.all_gather_object, found, mine)
        if kind is not None:
            return
        for rank, other in enumerate(found):
            why = f"rank {self.rank} has {self.said}, but rank {rank} "
            if isinstance(other, str):
                raise RuntimeError(f"{self.name}(): {why}refused: {other}")
            if other[1] != self.said:
                raise RuntimeError(f"{self.name}(): {why}has {other[1]}")
        sizes = [size for size, _ in found]
        self.offset, self.classes = sum(sizes[: self.rank]), sum(sizes)

    def local(self, name: str, value: Any) -> Tensor:
        """What is here of a DTensor, or of a tensor everything."""
        value = value.to_local() if hasattr(value, "to_local") else value
        return _check.tensor(self.name, name, value)

    def slice(
        self, value: Any, dim: int | None = None
    ) -> tuple[Tensor, int]:
        """The classes that are here, along dimension 1 if that is there."""
        x = _check.logits(self.name, self.local("input", value))
        if not x.ndim:
            raise RuntimeError(
                f"{self.name}(): 0-d, where are the classes?"
            )
        dim = min(x.ndim - 1, 1) if dim is None else dim
        dim = _check.dimension(self.name, dim, x.ndim)
        if self.mesh is not None and not value.placements[0].is_shard(dim):
            must = f"sharded along its classes, Shard({dim})"
            seen = value.placements[0]
            raise RuntimeError(f"{self.name}(): must be {must}, got {seen}")
        self.here, self.dtype = x.shape[dim], x.dtype
        rows = (*x.shape[:dim], *x.shape[dim + 1 :])
        grad = x.requires_grad and torch.is_grad_enabled()
        self.said |= {"dtype": x.dtype, "rows": rows, "derivative": grad}
        return x, dim

    def targets(
        self,
        target: Any,
        x: Tensor,
        dim: int,
        ignore_index: int,
        reduction: str,
        smoothing: float,
    ) -> Tensor:
        """Class indices; they and their options are checked and said."""
        t = self.local("target", target)
        t = _check.class_indices(self.name, t, x, dim)
        _check.choice(
            self.name, "reduction", reduction, "mean", "sum", "none"
        )
        ignored = _check.integer(self.name, "ignore_index", ignore_index)
        place = torch.arange(t.numel(), device=t.device) % 997 + 1
        self.said |= {
            "targets' digest": (t.flatten() * place).sum().item(),
            "ignore_index": ignored,
            "reduction": reduction,
            "label_smoothing": _check.smoothing(self.name, smoothing),
        }
        return t

    def place(self, t: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
        """Targets counted from the first class here; which are ignored."""
        silent = t == ignored
        _check.in_range(self.name, t[~silent], self.classes)
        return (t - self.offset).masked_fill(silent, -1), silent

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

    def largest(self, top: Tensor) -> Tensor:
        """The largest over all ranks; inf for NaN, which a maximum loses."""
        top = top.nan_to_num(math.inf, math.inf, -math.inf)
        return self.reduce(top, distributed.ReduceOp.MAX)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, for results that all of them have."""
        return _autograd.call(_Sum, self, True, value)  # type: ignore[no-any-return]

    def whole(self, value: Tensor, like: Any = None) -> Tensor:
        """The result, as a DTensor where the input was one."""
        if self.mesh is None:
            return value
        from torch.distributed.tensor import DTensor, Replicate

        if like is None:
            return DTensor.from_local(value, self.mesh, [Replicate()])
        shape = {"shape": like.shape, "stride": like.stride()}
        return DTensor.from_local(
            value, self.mesh, like.placements, **shape
        )


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


class _Totals(Function):
    """Of logits x W^T + b that are never all there, for each row: the
    largest but for the target, the sum of exp(z - largest), also without it,
    the logit of the target or 0, the sum of z if it is asked for.

    The largest is held constant. Where there is no class, it is -inf.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        index: Tensor,
        asked: float,
    ) -> tuple[Tensor, ...]:
        even = x.new_ones(len(weight)) if asked else None
        target = _linear.Target(index.squeeze(1), even)
        with _autograd.exactly(x):
            found = _linear.statistics(
                x, _linear.Layer(weight, bias), target
            )
        ctx.save_for_backward(x, weight, bias)
        ctx.options = target, found.top
        ctx.mark_non_differentiable(found.top)
        # Without classes the library has one tensor for both sums.
        return *found[:3], found.dot.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *c: Tensor) -> Any:
        (x, weight, bias), (target, top) = ctx.saved_tensors, ctx.options
        rest, picked, dot = c
        needs = ctx.needs_input_grad
        out = _linear.Gradients(
            torch.empty_like(x) if needs[0] else None,
            torch.empty_like(weight) if needs[1] else None,
            x.new_zeros(len(weight)) if needs[2] else None,
        )
        top = top.masked_fill(top == -math.inf, 0)
        slopes = _linear.Slopes(top, rest, -dot, picked + dot)
        layer = _linear.Layer(weight, bias)
        with _autograd.exactly(x):
            _linear.gradients(x, layer, target, slopes, out)
        return *out, None, None
