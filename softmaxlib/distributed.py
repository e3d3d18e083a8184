"""Softmax and cross-entropy over classes that several processes share.

Each rank of a process group holds a slice of the classes. Of its slice a
rank tells the others, for each row, the largest logit, the sum of the
weights and the logit of the target if it has it: two small all-reduces,
whatever the number of classes.

The results that all ranks have are the same on each, and stand for one
value, not for one a rank: each rank goes on with it in the same way, and a
backward pass starts from it on every rank. Nothing is added up over ranks
or divided by their number but what the formulas say.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

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


Public = TypeVar("Public", bound=Callable[..., Tensor])


def _uncompiled(function: Public) -> Public:
    """Let a compiler that is at work go round a function."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Tensor:
        way = function
        if torch.compiler.is_compiling():
            way = torch.compiler.disable(function)
        return way(*arguments, **options)

    return call  # type: ignore[return-value]


@_uncompiled
def parallel_logsumexp(
    input: Tensor, dim: int, *, group: Any = None, keepdim: bool = False
) -> Tensor:
    r"""Log-sum-exp over all the classes of a process group.

    .. math:: \operatorname{LSE}(z) = \log \sum_r \sum_{j \in r} e^{z_j}

    with :math:`z` = ``input`` along ``dim``, and the classes j of rank r.

    Args:
        input: the logits of the classes of this rank; any shape with a
            dimension, the same on all ranks but for ``dim``, which may have
            any size, 0 among them. float16, bfloat16, float32 or float64.
            Or a DTensor on a mesh of one dimension, sharded along ``dim``.
        dim: the class dimension, in [-ndim, ndim).
        group: a process group of ``torch.distributed``, by default all
            processes; that of its mesh for a DTensor. Give it a timeout when
            you make it (``init_process_group``, ``new_group``): the default
            lets a rank wait for another for half an hour.
        keepdim: whether the result keeps ``dim`` with size 1.

    Returns:
        The log-sum-exp (nats), of the shape of ``input`` without ``dim``,
        the same on every rank; a DTensor, replicated, for a DTensor.

        Infinities, NaN and rows without classes as in
        :func:`softmaxlib.logsumexp`. A slice of -inf adds nothing.

    Raises:
        TypeError, IndexError, NotImplementedError, RuntimeError: as
            :func:`softmaxlib.softmax`.
        RuntimeError: no process group; ranks disagree about shape, dtype or
            options; another rank refused its arguments; a collective failed
            or timed out. With NCCL, PyTorch's watchdog may end the process
            instead. A 0-d ``input``; a DTensor that is sharded otherwise.

    Accuracy: computed in float64 and rounded once. Derivatives: one backward
    pass, which needs no communication. A second one, forward mode and
    ``torch.func`` are refused; ``torch.compile`` goes round these functions,
    unless ``fullgraph=True`` forbids it.

    Complexity: a few float64 tensors of the size of ``input``; two
    all-reduces of a number for each row, after an exchange of a few hundred
    bytes.

    Example:
        >>> import torch
        >>> from torch import distributed
        >>> from softmaxlib import parallel_logsumexp
        >>> distributed.init_process_group(  # a group of one
        ...     "gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> parallel_logsumexp(torch.tensor([0.0, 0.0]), 0)
        tensor(0.6931)
        >>> distributed.destroy_process_group()

    Derived in the chapter *From ten classes to a vocabulary*. Source: Shoeybi
    et al. (2019), arXiv:1909.08053.
    """
    with _Team("parallel_logsumexp", input, group) as team:
        x, dim = team.slice(input, dim)
        keepdim = _check.flag(team.name, "keepdim", keepdim)
    z, high = team.logits(x, dim)
    # What is infinite may well stand as it is.
    high = high.masked_fill(high.isinf(), 0)
    total = (z - high).exp().sum(dim, keepdim=True)
    total = _autograd.call(_Sum, team, True, total)
    value = (high + total.log()).to(team.dtype)
    return team.whole(value if keepdim else value.squeeze(dim))


@_uncompiled
def parallel_softmax(
    input: Tensor, dim: int, *, group: Any = None, temperature: float = 1.0
) -> Tensor:
    r"""Softmax over all the classes of a process group.

    .. math:: p_i = \frac{e^{z_i / T}}{\sum_r \sum_{j \in r} e^{z_j / T}}

    with :math:`z` = ``input`` along ``dim``, the classes j of rank r, and
    :math:`T` = ``temperature``.

    Args:
        input, dim, group: as in :func:`parallel_logsumexp`.
        temperature: as in :func:`softmaxlib.softmax`.

    Returns:
        The probabilities of the classes of this rank, of the shape of
        ``input``; a DTensor, sharded as it was, for a DTensor. Infinities
        and NaN as in :func:`softmaxlib.softmax`: a row with a NaN is NaN on
        every rank.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError: as
            :func:`softmaxlib.softmax`.
        RuntimeError: as :func:`parallel_logsumexp`.

    Accuracy: computed in float64 and rounded once; for float64 itself the
    error grows with the range of the logits, by an ulp for each unit.
    Derivatives: one backward pass, with one all-reduce, as accurate as that
    of :func:`softmaxlib.softmax`.

    Complexity: as :func:`parallel_logsumexp`.

    Example:
        >>> import torch
        >>> from torch import distributed
        >>> from softmaxlib import parallel_softmax
        >>> distributed.init_process_group(  # a group of one
        ...     "gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> parallel_softmax(torch.tensor([1.0, 2.0, 3.0]), 0)
        tensor([0.0900, 0.2447, 0.6652])
        >>> distributed.destroy_process_group()

    Derived in the chapter *From ten classes to a vocabulary*. Source: Shoeybi
    et al. (2019), arXiv:1909.08053.
    """
    with _Team("parallel_softmax", input, group) as team:
        x, dim = team.slice(input, dim)
        T = _check.temperature(team.name, temperature)
        team.said["temperature"] = T
    x = x.to(team.dtype)
    return team.whole(_autograd.call(_Softmax, team, x, dim, T), input)


@_uncompiled
def parallel_cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    group: Any = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy over all the classes of a process group.

    .. math::
        \ell_n = -\sum_k \left((1 - \varepsilon)\, y_{nk} +
        \frac{\varepsilon}{K}\right) \log p_{nk}

    with the softmax :math:`p_n` of the n-th row over the K classes of all
    ranks, :math:`y` the one-hot ``target`` and :math:`\varepsilon` =
    ``label_smoothing``.

    Args:
        input: the logits of the classes of this rank, shape (K_r) for a
            single row, else (N, K_r, \*), as in :func:`parallel_logsumexp`;
            the class dimension is 1, or 0 for a single row.
        target: class indices in [0, K), counted through the ranks in their
            order, or ``ignore_index``; shape () or (N, \*), any integer
            dtype, the same on every rank.
        group: as in :func:`parallel_logsumexp`.
        ignore_index, reduction, label_smoothing: as in
            :func:`softmaxlib.cross_entropy`.

    There are no weights of classes: with w of shape (K) on every rank and
    ``reduction="none"``, ``(w[target] * losses).sum() / w[target].sum()`` is
    the weighted mean. Class probabilities are refused as well.

    Returns:
        The loss (nats), the same on every rank: 0-d, or one for each row;
        a DTensor, replicated, for a DTensor. Infinities, NaN and ignored
        rows as in :func:`softmaxlib.cross_entropy`.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError: as
            :func:`softmaxlib.cross_entropy`.
        RuntimeError: as :func:`parallel_logsumexp`; the targets of the ranks
            differ.

    Accuracy: computed in float64 and rounded once, loss and gradient, also
    where all probability is on the target. With label smoothing in float64,
    2\ :sup:`-50` of the largest \|logit\|. Derivatives: one backward pass,
    without communication.

    Complexity: as :func:`parallel_logsumexp`, with three numbers for each
    row; :func:`parallel_linear_cross_entropy` needs no logits.

    Example:
        >>> import torch
        >>> from torch import distributed
        >>> from softmaxlib import parallel_cross_entropy
        >>> distributed.init_process_group(  # a group of one
        ...     "gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [40.0, 0.0, 0.0]])
        >>> target = torch.tensor([2, 0])
        >>> parallel_cross_entropy(logits, target, reduction="none")
        tensor([4.0761e-01, 8.4967e-18])
        >>> distributed.destroy_process_group()

    Derived in the chapter *From ten classes to a vocabulary*. Source: Shoeybi
    et al. (2019), arXiv:1909.08053.
    """
    options = ignore_index, reduction, label_smoothing
    with _Team("parallel_cross_entropy", input, group) as team:
        x, dim = team.slice(input)
        t = team.targets(target, x, dim, options)
    index, silent = team.place(t.unsqueeze(dim), ignore_index)
    z, high = team.logits(x.masked_fill(silent, 0), dim)
    here = (index >= 0) & (index < team.here)
    at = index.where(here, 0)
    found = z.gather(dim, at)
    others = z.scatter(dim, at, found.masked_fill(here, -math.inf))
    rest = (others - high).exp().sum(dim, keepdim=True)
    dot = z.narrow(dim, 0, team.here).sum(dim, keepdim=True)
    sums = rest, found.where(here, 0), dot
    return _loss(team, high, sums, silent, options)


@_uncompiled
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
    r"""Cross-entropy of a linear layer whose classes a process group shares.

    :func:`parallel_cross_entropy` of the logits :math:`W x_n + b`, which are
    never all there, on no rank.

    Args:
        x: samples, shape (\*batch, D), the same on every rank; float16,
            bfloat16, float32 or float64, or a replicated DTensor.
        weight: the rows of W for the classes of this rank, shape (K_r, D),
            dtype and device of ``x``; or a DTensor, sharded along dimension
            0.
        target: class indices in [0, K), or ``ignore_index``, shape (\*batch),
            as in :func:`parallel_cross_entropy`.
        bias: that of the classes of this rank, shape (K_r), or None on every
            rank.
        group, ignore_index, reduction, label_smoothing: as in
            :func:`parallel_cross_entropy`.

    Returns:
        As :func:`parallel_cross_entropy`; ``"none"`` gives the shape of
        ``target``.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError, RuntimeError:
            as :func:`parallel_cross_entropy`.

    Accuracy: that of the matrix products, which are float32 for halves, too.
    Derivatives: one backward pass, with one all-reduce, of the gradient of
    ``x``. That is the whole gradient on every rank, and those of ``weight``
    and ``bias`` are of the rank's own classes.

    Complexity: O(N D K / R) time for R ranks: three matrix products, and a
    part of a fourth for the logits that did not find room where the gradient
    of the weight will be. Besides the gradients a block of logits of 4 MiB,
    or of 64 classes; three all-reduces, of 1 and of 3 numbers for each row,
    and of the gradient of ``x``.

    Example:
        >>> import torch
        >>> from torch import distributed
        >>> from softmaxlib import parallel_linear_cross_entropy
        >>> distributed.init_process_group(  # a group of one
        ...     "gloo", rank=0, world_size=1, store=distributed.HashStore())
        >>> x, target = torch.ones(2, 3), torch.tensor([0, 3])
        >>> parallel_linear_cross_entropy(x, torch.zeros(4, 3), target)
        tensor(1.3863)
        >>> distributed.destroy_process_group()

    Derived in the chapter *From ten classes to a vocabulary*. Source: Shoeybi
    et al. (2019), arXiv:1909.08053.
    """
    options = ignore_index, reduction, label_smoothing
    with _Team("parallel_linear_cross_entropy", weight, group) as team:
        x = _check.samples(team.name, team.local("x", x))
        _check.layer(team.name, team.local("weight", weight), "kd", x)
        w, _ = team.slice(weight, 0)
        if bias is not None:
            bias = team.local("bias", bias)
            _check.like(team.name, "bias", bias, w, w.shape[:1], "weight")
        t = team.targets(target, x, x.ndim - 1, options)
        team.said |= {"bias": bias is not None, "for x": x.requires_grad}
    index, silent = team.place(t.reshape(-1, 1), ignore_index)
    # In the format of the sums, and nothing from rows that are ignored.
    rows = x.reshape(-1, x.shape[-1]).masked_fill(silent, 0)
    rows = rows if x.dtype == torch.float64 else rows.float()
    rows = _autograd.call(_Sum, team, False, rows)
    top, rest, *others = _autograd.call(
        _Totals, rows, w, bias, index, label_smoothing
    )
    high = team.reduce(top, "MAX")
    rest = rest * (top - high).exp().masked_fill(top == high, 1)
    return _loss(team, high, (rest, *others), silent, options)


def _loss(
    team: "_Team", high: Tensor, sums: Any, silent: Tensor, options: Any
) -> Tensor:
    """From what each rank has found in its classes, for each row.

    That is the sum of exp(z - high) without the target, the logit of the
    target or 0, and the sum of z.
    """
    _, reduction, eps = options
    rest, picked, dot = _autograd.call(_Sum, team, True, torch.stack(sums))
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
    loss = loss.masked_fill(silent, 0).view(team.shape)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / (~silent).sum()
    return team.whole(loss.to(team.dtype))


# --- the ranks of a group ------------------------------------------------


class _Team:
    """The ranks of a group, and what they tell each other.

    A context in which arguments are checked: all ranks leave it with the
    same, or none does.

    Attributes:
        here, offset, classes: how many classes are on this rank, on those
            before it, on all.
        said: what must be the same on all.
        dtype, shape: those of the result, of a loss without reduction.
    """

    here = 0

    def __init__(self, name: str, model: Any, group: Any):
        self.name, self.said = name, dict[str, Any]()
        if not (
            distributed.is_available() and distributed.is_initialized()
        ):
            self.fail("init_process_group(..., timeout=...) comes first")
        self.mesh = getattr(model, "device_mesh", None)
        self.group = group if self.mesh is None else self.mesh.get_group()
        self.rank = distributed.get_rank(self.group)
        if self.rank < 0:
            self.fail("this process is not in the group")

    def fail(
        self, why: str, error: type[Exception] = RuntimeError
    ) -> NoReturn:
        raise error(f"{self.name}(): {why}")

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
            if isinstance(other, str):
                self.fail(f"rank {rank} refused its arguments, {other}")
            if other[1] != self.said:
                why = f"rank {self.rank} has {self.said}, "
                why += f"rank {rank} has {other[1]}"
                self.fail(f"ranks must agree, but {why}")
        sizes = [size for size, _ in found]
        self.offset, self.classes = sum(sizes[: self.rank]), sum(sizes)

    # --- arguments

    def local(self, name: str, value: Any) -> Tensor:
        """What is here of a DTensor, or of a tensor everything."""
        value = value.to_local() if hasattr(value, "to_local") else value
        x = _check.tensor(self.name, name, value)
        if _autograd.is_wrapped(x):
            why = "torch.func cannot transform what other ranks do"
            self.fail(why, NotImplementedError)
        return x

    def slice(self, value: Any, dim: Any = None) -> tuple[Tensor, int]:
        """The classes that are here, by default along dimension 1 or 0."""
        x = _check.logits(self.name, self.local("input", value))
        if not x.ndim:
            self.fail("0-d, where are the classes?")
        dim = min(x.ndim - 1, 1) if dim is None else dim
        dim = _check.dimension(self.name, dim, x.ndim)
        if self.mesh is not None and not value.placements[0].is_shard(dim):
            seen = value.placements[0]
            self.fail(f"the classes must be Shard({dim}), got {seen}")
        name = self.name.removeprefix("parallel_")
        self.dtype = _autograd.autocast_dtype(name, x) or x.dtype
        self.here = x.shape[dim]
        rows = (*x.shape[:dim], *x.shape[dim + 1 :])
        grad = x.requires_grad and torch.is_grad_enabled()
        self.said |= {"dtype": x.dtype, "rows": rows, "derivative": grad}
        return x, dim

    def targets(
        self, target: Any, x: Tensor, dim: int, options: tuple[Any, ...]
    ) -> Tensor:
        """Class indices; they and their options are checked and said."""
        name, (ignored, reduction, smoothing) = self.name, options
        t = self.local("target", target)
        if t.is_floating_point():
            why = f"target must be class indices, integers, got {t.dtype}"
            self.fail(why, NotImplementedError)
        t = _check.class_indices(name, t, x, dim)
        _check.choice(name, "reduction", reduction, "mean", "sum", "none")
        self.said["options"] = (
            _check.integer(name, "ignore_index", ignored),
            reduction,
            _check.smoothing(name, smoothing),
        )
        place = torch.arange(t.numel(), device=t.device) % 997 + 1
        self.shape, digest = t.shape, (t.flatten() * place).sum().item()
        self.said["targets"] = tuple(t.shape), f"digest {digest}"
        return t

    def place(self, t: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
        """Targets counted from the first class here; which are ignored."""
        silent = t == ignored
        _check.in_range(self.name, t[~silent], self.classes)
        return (t - self.offset).masked_fill(silent, -1), silent

    def logits(self, x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """In the widest format, with the largest over all ranks.

        Where there is no class here, there is one of no weight.
        """
        z = _blocks.widen(x)
        if not x.shape[dim]:
            shape = (*x.shape[:dim], 1, *x.shape[dim + 1 :])
            z = torch.cat([z, z.new_full(shape, -math.inf)], dim)
        return z, self.reduce(z.detach().amax(dim, keepdim=True), "MAX")

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

    # --- collectives

    def _run(self, function: Callable[..., Any], *arguments: Any) -> None:
        try:
            function(*arguments, group=self.group)
        except RuntimeError as error:
            why = f"rank {self.rank} waited in vain: another rank failed, "
            why += "left, or is later than the timeout of the group allows"
            raise RuntimeError(f"{self.name}(): {why} ({error})") from error

    def reduce(self, value: Tensor, operation: str) -> Tensor:
        """All-reduce, "SUM" or "MAX", into a new tensor."""
        value = value.clone(memory_format=torch.contiguous_format)
        if operation == "MAX":
            # It may lose a NaN; the sum that follows does not.
            value.nan_to_num_(math.inf, math.inf, -math.inf)
        how = getattr(distributed.ReduceOp, operation)
        self._run(distributed.all_reduce, value, how)
        return value


class _Sum(Function):
    """The sum over all ranks: of values, or else of derivatives."""

    @staticmethod
    def forward(ctx: Any, team: _Team, values: bool, x: Tensor) -> Tensor:
        ctx.options = team, values
        return team.reduce(x, "SUM") if values else x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, c: Tensor) -> Any:
        team, values = ctx.options
        return None, None, c if values else team.reduce(c, "SUM")


class _Softmax(Function):
    """(team, x, dim, T): the softmax of the classes here."""

    @staticmethod
    def forward(
        ctx: Any, team: _Team, x: Tensor, dim: int, T: float
    ) -> Tensor:
        z, high = team.logits(x, dim)
        weights = _blocks.exponents(z, high, T).exp_()
        total = team.reduce(weights.sum(dim, keepdim=True), "SUM")
        y = weights.div_(total).narrow(dim, 0, team.here).to(x.dtype)
        ctx.save_for_backward(y)
        ctx.options = team, dim, T
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> Any:
        (y,), (team, dim, T) = ctx.saved_tensors, ctx.options
        # Of all ranks one at most has a class with more than half: relative
        # to its v nothing cancels in the mean.
        sure, v = y > 0.5, _blocks.widen(v)
        others = _blocks.widen(y.masked_fill(sure, 0))
        parts = v.where(sure, 0), others, others * v
        sums = torch.stack([part.sum(dim, keepdim=True) for part in parts])
        centre, rest, mean = team.reduce(sums, "SUM")
        v = v - centre - (mean - centre * rest)
        gradient = v.mul_(y).mul_(_blocks.slope(T)).to(y.dtype)
        return None, gradient, None, None


class _Totals(Function):
    """(x, weight, bias, index, asked): of logits x W^T + b, for each row the
    largest but for the target, held constant; the sum of exp(z - largest),
    also without it; the logit of the target or 0; the sum of z, if asked.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        x, weight, bias, index, asked = inputs
        even = x.new_ones(len(weight)) if asked else None
        layer = _linear.Layer(weight, bias)
        target, kept = _linear.Target(index.squeeze(1), even), None
        if ctx.needs_input_grad[1] and weight.dtype == x.dtype:
            # The place of the gradient is one for weights until then.
            kept = _linear.Kept(x.new_empty(weight.numel()), [])
        with _autograd.exactly(x):
            found = _linear.statistics(x, layer, target, kept)
        ctx.save_for_backward(x, weight, bias)
        ctx.options, ctx.kept = (target, found.top), kept
        ctx.mark_non_differentiable(found.top)
        # Without classes the library has one tensor for both sums.
        return *found[:3], found.dot.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *c: Tensor) -> Any:
        (x, weight, bias), (target, top) = ctx.saved_tensors, ctx.options
        rest, picked, dot = c
        # A second backward pass computes the logits again.
        kept, ctx.kept = ctx.kept, None
        place = torch.empty_like(weight) if kept is None else kept.memory
        needs = ctx.needs_input_grad
        out = _linear.Gradients(
            torch.empty_like(x) if needs[0] else None,
            place.view(weight.shape) if needs[1] else None,
            x.new_zeros(len(weight)) if needs[2] else None,
        )
        top = top.masked_fill(top == -math.inf, 0)
        slopes = _linear.Slopes(top, rest, -dot, picked + dot)
        layer = _linear.Layer(weight, bias)
        with _autograd.exactly(x):
            _linear.gradients(x, layer, target, slopes, out, kept)
        return *out, None, None
