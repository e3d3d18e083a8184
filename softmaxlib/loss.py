"""Cross-entropy with class indices and with distributions.

The loss of a row is evaluated from its logits, never from probabilities,
and its gradient in closed form: p - y, where p and y nearly agree from
what the other classes have. Rows are computed and reduced in float64 and
rounded once.
"""

import torch
from torch import Tensor

from softmaxlib import _arguments, _kernels
from softmaxlib._functions import (
    LogSoftmax,
    Softmax,
    _Kernel,
    _nestable,
    composite,
    is_batched,
)
from softmaxlib.derivatives import SoftmaxJVP

__all__ = [
    "cross_entropy",
    "cross_entropy_gradient",
    "soft_cross_entropy",
    "soft_cross_entropy_gradient",
]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of logits and class indices.

    .. math::
        \ell_n = -(1 - \varepsilon)\, w_t \log p_{nt} - \frac{\varepsilon}{K}
        \sum_k w_k \log p_{nk}, \qquad t = y_n

    with the softmax :math:`p_n` of the n-th row of ``input`` over its K
    classes, :math:`y` = ``target``, :math:`w` = ``weight`` (ones if None)
    and :math:`\varepsilon` = ``label_smoothing``. The mean is
    :math:`\sum_n \ell_n / \sum_n w_{y_n}` over the rows that are not
    ignored, as in PyTorch.

    Args:
        input: logits, shape (K) for a single row, else (N, K, \*); the
            class dimension is 1, or 0 for a single row. float16, bfloat16,
            float32 or float64.
        target: class indices in [0, K), or ``ignore_index``; shape () or
            (N, \*), any integer dtype.
        weight: weights of the classes, shape (K), floating point.
        ignore_index: rows with this target do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: between 0 and 1.

    Returns:
        The loss (nats) in the dtype of ``input``: 0-d, or of the shape of
        ``target`` for ``"none"``.

        A weight of zero times an infinite loss counts as zero. +inf if the
        target has logit -inf. Rows of -inf only, or with +inf or NaN, give
        NaN; where they are ignored they count for nothing, in the loss and
        in the gradient. The mean over no rows, or over weights that are all
        zero, is NaN, with zero gradient; the sum is 0.

    Raises:
        TypeError: ``input``, ``target`` or ``weight`` is not a tensor, or
            ``ignore_index`` not an int.
        IndexError: a target is out of range; its value is in the message.
        ValueError: unknown ``reduction``, or another batch size of
            ``target``.
        NotImplementedError: ``input`` is not floating point.
        RuntimeError: ``target`` has another shape or is not integer,
            ``weight`` has another shape or device, ``label_smoothing`` is
            out of range.

    Accuracy, also where all probability is on the target: for each row 0.5
    ulp and a hair for float16, bfloat16 and float32; 1e-13 relative for
    float64. While ``torch.compile`` traces, rows are computed in the input
    format instead (halves in float32).

    Complexity: O(N K) time; besides the loss a constant block of memory per
    thread, and the gradient in the backward pass.

    Example:
        >>> import torch
        >>> from softmaxlib import cross_entropy
        >>> logits = torch.tensor([[1.0, 2.0, 3.0], [40.0, 0.0, 0.0]])
        >>> cross_entropy(logits, torch.tensor([2, 0]), reduction="none")
        tensor([4.0761e-01, 8.4967e-18])

    Derived in the chapter *Gradients in the weights*. Label smoothing:
    Szegedy et al. (2016), doi:10.1109/CVPR.2016.308.
    """
    name = "cross_entropy"
    case = _IndexCase(
        name,
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
    )
    rows = _call(IndexLoss, case.x, case.target, case.dim, name)
    share = case.weights
    if label_smoothing:
        share = share * (1 - label_smoothing)
    rows = (share * rows).masked_fill(share == 0, 0)
    if label_smoothing:
        smooth = _call(SoftLoss, case.x, case.smooth, case.dim, name)
        smooth = smooth.masked_fill(~case.valid, 0)
        rows = rows + label_smoothing * smooth
    rows = rows.squeeze(case.dim)
    if reduction == "none":
        return rows.to(case.x.dtype)
    total = rows.sum()
    if reduction == "mean":
        total = total / case.weights.sum()
    return total.to(case.x.dtype)


def cross_entropy_gradient(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The gradient of :func:`cross_entropy` in the logits, in closed form.

    .. math::
        \frac{\partial \ell_n}{\partial z_{ni}} = (1 - \varepsilon)\, w_t
        (p_{ni} - \delta_{it}) + \frac{\varepsilon}{K} \Big(p_{ni} \sum_k w_k
        - w_i\Big), \qquad t = y_n

    divided by :math:`\sum_n w_{y_n}` for the mean; symbols as in
    :func:`cross_entropy`. At the target of a confident row, :math:`p - 1`
    is minus the sum of the other probabilities.

    Args:
        input, target, weight, ignore_index, reduction, label_smoothing: as
            in :func:`cross_entropy`. For ``reduction="none"`` each row is
            the gradient of its own loss, as for ``"sum"``.

    Returns:
        The gradient, of the shape and dtype of ``input``.

        Zero for ignored rows, whatever their logits, and for rows of weight
        zero. NaN for the others where the softmax is NaN. Finite where the
        target has logit -inf.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError,
        RuntimeError: as :func:`cross_entropy`.

    Accuracy: a relative error of each entry of 1e-13 for float64; the
    narrower formats are computed in float64 and rounded once, or with label
    smoothing once for either part.

    Complexity: O(N K) time, a constant block of memory per thread besides
    the result.

    Example:
        >>> import torch
        >>> from softmaxlib import cross_entropy_gradient
        >>> z = torch.tensor([40.0, 0.0, 0.0])
        >>> cross_entropy_gradient(z, torch.tensor(0))
        tensor([-8.4967e-18,  4.2484e-18,  4.2484e-18])

    Derived in the chapter *Gradients in the weights*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "cross_entropy_gradient"
    case = _IndexCase(
        name,
        input,
        target,
        weight,
        ignore_index,
        reduction,
        label_smoothing,
    )
    share = case.weights
    part = case.valid.to(share.dtype)
    if reduction == "mean":
        total = share.sum()
        share, part = share / total, part / total
    share = share.masked_fill(case.weights == 0, 0)
    if not label_smoothing:
        return _call(
            IndexGradient, case.x, case.target, share, case.dim, name
        )
    part = part.masked_fill(~case.valid, 0)
    share, part = share * (1 - label_smoothing), part * label_smoothing
    return _call(
        IndexGradient, case.x, case.target, share, case.dim, name
    ) + _call(SoftGradient, case.x, case.smooth, part, case.dim, name)


def soft_cross_entropy(
    input: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""Cross-entropy of logits and distributions.

    .. math:: \ell = -\sum_k y_k \log p_k, \qquad 0 \log 0 = 0

    with the softmax :math:`p` of ``input`` along ``dim`` and :math:`y` =
    ``target``. The gradient in ``input`` is :math:`s p - y` with :math:`s =
    \sum_k y_k`, which is :math:`p - y` for a distribution only: nothing is
    normalised behind your back. The gradient in ``target`` is :math:`-\log
    p`.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
        target: of the shape, dtype and device of ``input``; its values are
            not checked.
        dim: the class dimension, in [-ndim, ndim).
        reduction: ``"mean"`` over the rows, ``"sum"`` or ``"none"``.

    Returns:
        The loss (nats) in the dtype of ``input``: 0-d, or the shape of
        ``input`` without ``dim`` for ``"none"``.

        A target of 0 at a logit of -inf adds 0 (PyTorch: NaN), any other
        target there makes the loss infinite. Rows of -inf only, or with
        +inf or NaN, give NaN. The mean over no rows is NaN, the sum 0.

    Raises:
        TypeError: ``input`` or ``target`` is not a tensor, ``dim`` not an
            int.
        IndexError: ``dim`` is out of range.
        ValueError: unknown ``reduction``.
        NotImplementedError: ``input`` is not floating point.
        RuntimeError: shape, dtype or device of ``target`` differ.

    Accuracy and complexity: as :func:`cross_entropy`.

    Example:
        >>> import torch
        >>> from softmaxlib import soft_cross_entropy
        >>> z = torch.tensor([0.0, 0.0, -torch.inf])
        >>> soft_cross_entropy(z, torch.tensor([0.25, 0.75, 0.0]))
        tensor(0.6931)

    Derived in the chapter *Gradients in the weights*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "soft_cross_entropy"
    x, y, dim = _soft_arguments(name, input, target, dim, reduction)
    rows = _call(SoftLoss, x, y, dim, name).squeeze(dim)
    if reduction == "none":
        return rows.to(x.dtype)
    total = rows.sum() if reduction == "sum" else rows.mean()
    return total.to(x.dtype)


def soft_cross_entropy_gradient(
    input: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    reduction: str = "mean",
) -> Tensor:
    r"""The gradient of :func:`soft_cross_entropy` in the logits.

    .. math:: \frac{\partial \ell}{\partial z_i} = s p_i - y_i,
        \qquad s = \sum_k y_k

    divided by the number of rows for the mean; symbols as in
    :func:`soft_cross_entropy`. At the largest logit it is evaluated as
    :math:`\sum_{k \ne i} y_k - s (1 - p_i)` with :math:`1 - p_i` from the
    other weights.

    Args:
        input, target, dim, reduction: as in :func:`soft_cross_entropy`. For
            ``reduction="none"`` each row is the gradient of its own loss,
            as for ``"sum"``.

    Returns:
        The gradient, of the shape and dtype of ``input``. NaN where the
        softmax is NaN; finite at logits of -inf.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError,
        RuntimeError: as :func:`soft_cross_entropy`.

    Accuracy: for float64 a relative error of 1e-13 where the two terms do
    not cancel; the narrower formats are computed in float64 and rounded
    once.

    Complexity: as :func:`cross_entropy_gradient`.

    Example:
        >>> import torch
        >>> from softmaxlib import soft_cross_entropy_gradient
        >>> z, y = torch.zeros(3), torch.tensor([0.0, 0.5, 1.5])
        >>> soft_cross_entropy_gradient(z, y)
        tensor([ 0.6667,  0.1667, -0.8333])

    Derived in the chapter *Gradients in the weights*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "soft_cross_entropy_gradient"
    x, y, dim = _soft_arguments(name, input, target, dim, reduction)
    shape = _one_class(x, dim)
    rows = shape.numel() if reduction == "mean" else 1
    share = torch.full(
        shape, 1 / max(rows, 1), dtype=_wide(x), device=x.device
    )
    return _call(SoftGradient, x, y, share, dim, name)


# --- arguments -----------------------------------------------------------


class _IndexCase:
    """Checked arguments of a loss with class indices.

    `target` and `weights` have the class dimension, with size 1; a target
    to be ignored is 0, of weight 0 and not `valid`.
    """

    def __init__(
        self,
        name,
        input,
        target,
        weight,
        ignore_index,
        reduction,
        smoothing,
    ):
        x = _arguments.logits(name, input, None)
        if x.ndim == 0:
            raise RuntimeError(
                f"{name}(): input must have a class dimension, shape (K) or "
                f"(N, K, ...), got a 0-d tensor"
            )
        dim = min(x.ndim - 1, 1)
        self.x, self.dim = x, dim
        target = _index_target(name, target, x, dim).unsqueeze(dim)
        _check_reduction(name, reduction)
        if isinstance(ignore_index, bool) or not isinstance(
            ignore_index, int
        ):
            raise TypeError(
                f"{name}(): ignore_index must be an int, got "
                f"{type(ignore_index).__name__} {ignore_index!r}"
            )
        if not 0 <= smoothing <= 1:
            raise RuntimeError(
                f"{name}(): label_smoothing must be between 0 and 1, got "
                f"{smoothing}"
            )
        self.valid = target != ignore_index
        self.target = target.masked_fill(~self.valid, 0)
        if x.shape[dim]:
            _check_range(name, self.target, x.shape[dim])
        elif target.numel():
            raise IndexError(f"{name}(): input has no classes, K = 0")
        self.weights = self.valid.to(_wide(x))
        if weight is not None:
            weight = _class_weight(name, weight, x, dim).to(_wide(x))
            chosen = weight[self.target]
            self.weights = chosen.masked_fill(~self.valid, 0)
        if smoothing:
            classes = x.shape[dim]
            if weight is None:
                weight = x.new_ones(classes, dtype=_wide(x))
            shape = [classes if d == dim else 1 for d in range(x.ndim)]
            self.smooth = (weight / classes).view(shape).expand(x.shape)


def _index_target(name, target, x, dim):
    target = _arguments.tensor(name, "target", target)
    integer = not (
        target.dtype.is_floating_point
        or target.dtype.is_complex
        or target.dtype == torch.bool
    )
    if not integer:
        raise RuntimeError(
            f"{name}(): target must hold class indices, of an integer "
            f"dtype such as int64, got {target.dtype}; for distributions "
            f"there is soft_cross_entropy"
        )
    expected = x.shape[:dim] + x.shape[dim + 1 :]
    if target.shape != expected:
        # As in PyTorch, which looks at the batch size first.
        batch = target.shape[:1] == expected[:1]
        raise (RuntimeError if batch else ValueError)(
            f"{name}(): target must have the shape of input without its "
            f"class dimension {dim}, {tuple(expected)}, got "
            f"{tuple(target.shape)}"
        )
    if target.device != x.device:
        raise RuntimeError(
            f"{name}(): target must be on the device of input, {x.device}, "
            f"got {target.device}"
        )
    return target.long()


def _class_weight(name, weight, x, dim):
    weight = _arguments.tensor(name, "weight", weight)
    classes = x.shape[dim]
    if weight.shape != (classes,):
        raise RuntimeError(
            f"{name}(): weight must have one entry for each class, shape "
            f"({classes},), got {tuple(weight.shape)}"
        )
    if not weight.dtype.is_floating_point or weight.device != x.device:
        raise RuntimeError(
            f"{name}(): weight must be floating point on {x.device}, got "
            f"{weight.dtype} on {weight.device}"
        )
    return weight


def _check_reduction(name, reduction, allowed=("mean", "sum", "none")):
    if reduction not in allowed:
        raise ValueError(
            f"{name}(): reduction must be one of "
            f"{', '.join(map(repr, allowed))}, got {reduction!r}"
        )


def _check_range(name, target, classes):
    """Where the values can be read; `IndexLoss.forward` sees the others."""
    if torch.compiler.is_compiling():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(target):
        return
    outside = (target < 0) | (target >= classes)
    if outside.any():
        raise IndexError(
            f"{name}(): target out of range, expected class indices in "
            f"[0, {classes - 1}] or ignore_index, got "
            f"{int(target[outside][0])}"
        )


def _soft_arguments(name, input, target, dim, reduction):
    x = _arguments.logits(name, input, None)
    dim = _arguments.dimension(name, dim, x.ndim)
    y = _arguments.same_shape(name, "target", target, x)
    _check_reduction(name, reduction)
    if x.ndim == 0:
        x, y = x.reshape(1), y.reshape(1)
    return x, y, dim


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.is_mps else torch.float64


def _one_class(x: Tensor, dim: int) -> torch.Size:
    return x.shape[:dim] + (1,) + x.shape[dim + 1 :]


# --- kernels, on plain tensors -------------------------------------------


def _write_index_loss(x, target, dim, out):
    for tile, t, o in _kernels.tiles(x, None, dim, 1.0, target, out):
        top = tile.top()
        log_rest = tile.rest(top).log1p_()
        # Two terms that are not negative: nothing cancels.
        o.copy_(top - tile.centre(tile.x, t) + log_rest)


def _write_soft_loss(x, y, dim, out):
    for tile, y_part, o in _kernels.tiles(x, None, dim, 1.0, y, out):
        top = tile.top()
        log_rest = tile.rest(top).log1p_()
        parts = []
        for chunk in tile.chunks:
            weight = tile.load("product", y_part, chunk)
            z = tile.logits(chunk)
            gap = torch.sub(top, z, out=tile.scratch("high", z))
            gap.mul_(weight).masked_fill_(weight == 0, 0)
            parts.append(gap.sum(-1, keepdim=True))
            parts.append(weight.sum(-1, keepdim=True) * log_rest)
        o.copy_(_kernels.add_up(parts))


def _write_index_gradient(x, target, share, dim, out):
    tiles = _kernels.tiles(x, None, dim, 1.0, target, share, out)
    for tile, t, g, o in tiles:
        top = tile.top()
        index = tile.argmax(top)
        rest = tile.rest(top)
        total = rest + 1
        at_largest = rest / -total
        for chunk in tile.chunks:
            p = tile.weights(chunk, top, total)
            here, inside = _locate(t, chunk)
            found = p.gather(-1, here)
            value = torch.where(t == index, at_largest, found - 1)
            p.scatter_(-1, here, torch.where(inside, value, found))
            p.mul_(g).masked_fill_(g == 0, 0)
            tile.write(o, chunk, p, 0.0)


def _write_soft_gradient(x, y, share, dim, out):
    tiles = _kernels.tiles(x, None, dim, 1.0, y, share, out)
    for tile, y_part, g, o in tiles:
        top = tile.top()
        index = tile.argmax(top)
        rest = tile.rest(top)
        total = rest + 1
        parts = []
        for chunk in tile.chunks:
            values = tile.load("product", y_part, chunk)
            here, inside = _locate(index, chunk)
            found = values.gather(-1, here)
            values.scatter_(-1, here, found.masked_fill(inside, 0))
            parts.append(values.sum(-1, keepdim=True))
        others = _kernels.add_up(parts)
        everything = others + tile.centre(y_part, index)
        at_largest = others - rest / total * everything
        for chunk in tile.chunks:
            values = tile.weights(chunk, top, total).mul_(everything)
            values -= tile.load("product", y_part, chunk)
            here, inside = _locate(index, chunk)
            found = values.gather(-1, here)
            value = torch.where(inside, at_largest, found)
            values.scatter_(-1, here, value).mul_(g).masked_fill_(g == 0, 0)
            tile.write(o, chunk, values, 0.0)


def _locate(index: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """The index within a chunk, or 0, and whether it lies there."""
    inside = (index >= chunk.start) & (index < chunk.stop)
    return torch.where(inside, index - chunk.start, 0), inside


# --- autograd ------------------------------------------------------------


class _Loss(_Kernel):
    """A function (x, target, dim, name): a loss for each row, in float64."""

    @classmethod
    def run(cls, x, target, dim, name):
        if is_batched(x, target):
            return cls.formula(x, target, dim, name)
        shape = _one_class(x, dim)
        out = torch.zeros(shape, dtype=_wide(x), device=x.device)
        cls.kernel(x, target, dim, out)
        return out


class _Gradient(_Kernel):
    """A function (x, target, share, dim, name), linear in the share."""

    @classmethod
    def run(cls, x, target, share, dim, name):
        if is_batched(x, target, share):
            return cls.formula(x, target, share, dim, name)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        cls.kernel(x, target, share, dim, out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.dim, ctx.name = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class IndexLoss(_Loss):
    """(x, target) -> -log softmax(x)[target]."""

    kernel = staticmethod(_write_index_loss)

    @staticmethod
    def forward(x, target, dim, name):
        _check_range(name, target, x.shape[dim])
        return IndexLoss.run(x, target, dim, name)

    @staticmethod
    def formula(x, target, dim, name):
        log_p = composite("log_softmax", x, None, dim, 1.0)
        return -log_p.gather(dim, target)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, target, ctx.dim, ctx.name = inputs
        ctx.save_for_backward(x, target)
        ctx.save_for_forward(x, target)

    @staticmethod
    def backward(ctx, share):
        x, target = ctx.saved_tensors
        gradient = IndexGradient.call(x, target, share, ctx.dim, ctx.name)
        return gradient, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, *_):
        return _index_change(*saved, x_tangent, ctx.dim)


class IndexGradient(_Gradient):
    """(x, target, share) -> share (softmax(x) - one_hot(target))."""

    kernel = staticmethod(_write_index_gradient)

    @staticmethod
    def forward(x, target, share, dim, name):
        _check_range(name, target, x.shape[dim])
        return IndexGradient.run(x, target, share, dim, name)

    @staticmethod
    def formula(x, target, share, dim, name):
        p = composite("softmax", x, None, dim, 1.0)
        one = torch.ones_like(target, dtype=p.dtype)
        result = share * p.scatter_add(dim, target, -one)
        return result.masked_fill(share == 0, 0).to(x.dtype)

    @staticmethod
    def backward(ctx, w):
        x, target, share = ctx.saved_tensors
        x_gradient = share_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = _curvature(x, w, share, ctx.dim)
        if ctx.needs_input_grad[2]:
            share_gradient = _index_change(x, target, w, ctx.dim)
        return x_gradient, None, share_gradient, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, target_tangent, share_tangent, *_):
        x, target, share = saved
        result = 0
        if x_tangent is not None:
            result = _curvature(x, x_tangent, share, ctx.dim)
        if share_tangent is not None:
            result = result + IndexGradient.apply(
                x, target, share_tangent, ctx.dim, ctx.name
            )
        return result


class SoftLoss(_Loss):
    """(x, y) -> -y . log softmax(x), with 0 log 0 = 0."""

    kernel = staticmethod(_write_soft_loss)

    @staticmethod
    def forward(x, y, dim, name):
        return SoftLoss.run(x, y, dim, name)

    @staticmethod
    def formula(x, y, dim, name):
        log_p = composite("log_softmax", x, None, dim, 1.0)
        terms = (y * log_p).masked_fill(y == 0, 0)
        return -terms.sum(dim, keepdim=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, ctx.dim, ctx.name = inputs
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def backward(ctx, share):
        x, y = ctx.saved_tensors
        x_gradient = y_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = SoftGradient.call(x, y, share, ctx.dim, ctx.name)
        if ctx.needs_input_grad[1]:
            log_p = LogSoftmax.call(x, None, ctx.dim, 1.0)
            y_gradient = (-share * log_p).masked_fill(share == 0, 0)
            y_gradient = y_gradient.to(y.dtype)
        return x_gradient, y_gradient, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, y_tangent, *_):
        x, y = saved
        result = 0
        if x_tangent is not None:
            result = _soft_change(x, y, x_tangent, ctx.dim)
        if y_tangent is not None:
            result = result + SoftLoss.apply(
                x, y_tangent, ctx.dim, ctx.name
            )
        return result


class SoftGradient(_Gradient):
    """(x, y, share) -> share (sum(y) softmax(x) - y)."""

    kernel = staticmethod(_write_soft_gradient)

    @staticmethod
    def forward(x, y, share, dim, name):
        return SoftGradient.run(x, y, share, dim, name)

    @staticmethod
    def formula(x, y, share, dim, name):
        p = composite("softmax", x, None, dim, 1.0)
        result = share * (p * y.sum(dim, keepdim=True) - y)
        return result.masked_fill(share == 0, 0).to(x.dtype)

    @staticmethod
    def backward(ctx, w):
        x, y, share = ctx.saved_tensors
        dim = ctx.dim
        gradients = [None] * 3
        if ctx.needs_input_grad[0]:
            total = share * y.sum(dim, keepdim=True)
            gradients[0] = _curvature(x, w, total, dim)
        if ctx.needs_input_grad[1]:
            p = Softmax.call(x, None, dim, 1.0)
            mean = (p * w).sum(dim, keepdim=True)
            gradients[1] = (share * (mean - w)).to(y.dtype)
        if ctx.needs_input_grad[2]:
            gradients[2] = _soft_change(x, y, w, dim)
        return *gradients, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, y_tangent, share_tangent, *_):
        x, y, share = saved
        options = ctx.dim, ctx.name
        result = 0
        if x_tangent is not None:
            total = share * y.sum(ctx.dim, keepdim=True)
            result = _curvature(x, x_tangent, total, ctx.dim)
        if y_tangent is not None:
            result = result + SoftGradient.apply(
                x, y_tangent, share, *options
            )
        if share_tangent is not None:
            result = result + SoftGradient.apply(
                x, y, share_tangent, *options
            )
        return result


def _curvature(x, w, share, dim):
    """share J(x) w: the loss has the same Hessian for every target."""
    product = SoftmaxJVP.call(x, w, dim, 1.0)
    return (share * product).masked_fill(share == 0, 0).to(x.dtype)


def _index_change(x, target, w, dim):
    """(softmax(x) - one_hot(target)) . w for each row."""
    p = Softmax.call(x, None, dim, 1.0)
    change = p * (w - w.gather(dim, target))
    return change.sum(dim, keepdim=True).to(_wide(x))


def _soft_change(x, y, w, dim):
    """(sum(y) softmax(x) - y) . w for each row."""
    p = Softmax.call(x, None, dim, 1.0)
    change = y * ((p * w).sum(dim, keepdim=True) - w)
    return change.sum(dim, keepdim=True).to(_wide(x))


def _call(function, *arguments):
    """While a compiler traces, plain operations."""
    if torch.compiler.is_compiling():
        return function.formula(*arguments)
    return function.call(*arguments)
