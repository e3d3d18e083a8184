"""Cross-entropy with class indices or probabilities.

The loss of a row is evaluated from its logits, never from probabilities,
and its gradient in closed form: p - y, where p and y nearly agree from
what the other classes have. Rows are computed and reduced in float64 and
rounded once.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from softmaxlib import _autograd, _blocks, _check, _fused, _linear

__all__ = [
    "cross_entropy",
    "cross_entropy_gradient",
    "linear_cross_entropy",
    "soft_cross_entropy",
    "soft_cross_entropy_gradient",
]

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Cross-entropy of logits and class indices or probabilities.

    .. math::
        \ell_n = -\sum_k w_k \left((1 - \varepsilon)\, y_{nk} +
        \frac{\varepsilon}{K}\right) \log p_{nk}, \qquad 0 \log 0 = 0

    with the softmax :math:`p_n` of the n-th row of ``input`` over its K
    classes, :math:`y` = ``target`` (one-hot for class indices), :math:`w` =
    ``weight`` (ones if None) and :math:`\varepsilon` =
    ``label_smoothing``. The mean is, as in PyTorch, :math:`\sum_n \ell_n /
    \sum_n w_{t_n}` over the rows that are not ignored for class indices
    :math:`t`, and over the number of rows for probabilities.

    Args:
        input: logits, shape (K) for a single row, else (N, K, \*); the
            class dimension is 1, or 0 for a single row. float16, bfloat16,
            float32 or float64.
        target: class indices in [0, K), or ``ignore_index``, shape () or
            (N, \*), any integer dtype; or probabilities of the shape of
            ``input``, any of the four formats. Their values are not
            checked, and nothing is normalised.
        weight: weights of the classes, shape (K), floating point.
        ignore_index: rows with this class index do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: between 0 and 1.
        dtype: the format of the loss; by default that of ``input``, or that
            of PyTorch's loss under ``autocast``. Rows are computed and added
            up in float64 whatever it is, and gradients have the format of
            ``input``.

    Returns:
        The loss (nats): 0-d, or one for each row for ``"none"``.

        A target of zero times an infinite loss counts as zero. +inf if a
        class with logit -inf has a positive target. Rows of -inf only, or
        with +inf or NaN, give NaN; where they are ignored, or their class
        weighs nothing, they count for nothing, in the loss and in the
        gradient. The mean over no rows, or over weights that are all zero,
        is NaN, with zero gradient; the sum is 0.

    Raises:
        TypeError: ``input``, ``target`` or ``weight`` is not a tensor,
            ``ignore_index`` not an int, ``label_smoothing`` not a number.
        IndexError: a class index is out of range; it is in the message.
        ValueError: unknown ``reduction``, or another batch size of
            ``target``.
        NotImplementedError: ``input`` is not floating point.
        RuntimeError: ``target`` has another shape, or holds neither indices
            nor probabilities; ``weight`` has another shape or device;
            ``label_smoothing`` is out of range; a non-negative
            ``ignore_index`` stands beside probabilities.

    Accuracy, also where all probability is on the target: for each row 0.5
    ulp and a hair for float16, bfloat16 and float32; 1e-13 relative for
    float64. The same under ``torch.compile``, but for float64, where the
    rounded exponents cost as much as they do in PyTorch. Indices out of
    range are found where values can be read: not by a compiler.

    Complexity: O(N K) time; besides the loss three buffers of 2 MiB a
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
    options = weight, ignore_index, reduction, label_smoothing
    case = _prepare(name, input, target, *options)
    x = case.x
    wanted = dtype or _autograd.autocast_dtype(name, x) or x.dtype
    wanted = _check.floating(name, wanted)
    if case.silent is not None and _autograd.route(x) == "plain":
        # A compiler differentiates plain operations: 0 * NaN is NaN.
        x = x.masked_fill(case.silent, 0)
    rows = _autograd.Loss.call(x, *case.what)
    if case.silent is not None:
        rows = rows.masked_fill(case.silent, 0)
    if reduction == "none":
        return rows.squeeze(case.dim).to(wanted)
    total = rows.sum()
    return (total / case.rows if reduction == "mean" else total).to(wanted)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    dtype: torch.dtype | None = None,
    prefer: Literal["memory", "speed"] = "memory",
) -> Tensor:
    r"""Cross-entropy of a linear layer whose logits are never all there.

    .. math::
        \ell_n = -\sum_k q_{nk} \log p_{nk} + \zeta\, w_{t_n} (\log Z_n)^2,
        \qquad q_{nk} = w_k \left((1 - \varepsilon)\, y_{nk} +
        \frac{\varepsilon}{K}\right)

    with the softmax :math:`p_n` and its normaliser :math:`Z_n = \sum_k
    e^{z_{nk}}` of the logits :math:`z_n = W x_n + b`, or :math:`c \tanh(z_n
    / c)` for a ``softcap`` c; :math:`W` = ``weight``, :math:`b` = ``bias``,
    :math:`\zeta` = ``z_loss``; :math:`y` = ``target``, :math:`w` =
    ``class_weight``, :math:`\varepsilon` = ``label_smoothing`` and the mean
    as in :func:`cross_entropy`. For probabilities :math:`w_{t_n}` is one.

    Args:
        x: inputs of the layer, shape (\*batch, D); float16, bfloat16,
            float32 or float64.
        weight: shape (K, D), as in ``nn.Linear``; dtype and device of
            ``x``, but for ``autocast``, where formats may mix.
        target: class indices in [0, K), or ``ignore_index``, shape
            (\*batch), any integer dtype; or probabilities, shape (\*batch,
            K), any of the four formats, read a block at a time.
        bias: shape (K), or None.
        class_weight: weights of the classes, shape (K), floating point.
        ignore_index: rows with this class index do not count.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        label_smoothing: between 0 and 1.
        softcap: bound of the logits, positive; None for no bound.
        z_loss: factor of the squared log-normaliser, at least 0.
        dtype: the format of the loss; by default float32, or float64 for
            float64. Gradients have the formats of ``x``, ``weight`` and
            ``bias``.
        prefer: ``"memory"``, or ``"speed"``, which spends memory on fewer
            products. Without effect on halves and with a ``softcap``.

    Returns:
        The loss (nats): 0-d, or of shape (\*batch) for ``"none"``. Special
        values as in :func:`cross_entropy`: rows that do not count may hold
        anything, and leave no trace in a gradient.

    Raises:
        TypeError: an argument is of the wrong kind.
        IndexError: a class index is out of range; it is in the message.
        ValueError: unknown ``reduction`` or ``prefer``, ``softcap`` or
            ``z_loss`` out of range, or another batch size of ``target``.
        NotImplementedError: ``x`` is not floating point.
        RuntimeError: shapes, dtypes or devices do not fit,
            ``label_smoothing`` is out of range, or a derivative is asked
            for that there is not.

    Derivatives: one backward pass, to ``x``, ``weight`` and ``bias``. Second
    derivatives (``create_graph=True``), forward mode, ``torch.func`` and
    ``vmap``, and gradients in ``target`` and ``class_weight`` are refused:
    ``cross_entropy(F.linear(x, weight, bias), target)`` has them, with all
    N K logits.

    Accuracy: that of the matrix products, in float32 for halves; no logit
    is rounded to a half. The rest of a row is float64, and p - 1 comes from
    the other classes.

    Complexity: O(N D K) time. With gradients, ``"memory"`` takes four
    matrix products but for a part D / N of one, or four for halves and with
    a ``softcap``, and besides the gradients at most max(2\ :sup:`20`, 64 N)
    logits at a time; ``"speed"`` takes three products, and 3 D K / 8 logits.
    Reduction ``"none"`` and ``torch.compile`` take one product more, and
    compute the gradients in the backward pass; a compiler also copies ``x``.

    Example:
        >>> import torch
        >>> from softmaxlib import linear_cross_entropy
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.eye(2)
        >>> linear_cross_entropy(x, weight, torch.tensor([1]))
        tensor(0.3133)

    Derived in the chapter *From ten classes to a vocabulary*. Logits in
    blocks: Wijmans et al. (2024), arXiv:2411.09009; the sum over blocks:
    Milakov and Gimelshein (2018), arXiv:1805.02867.
    """
    name = "linear_cross_entropy"
    _check.choice(name, "prefer", prefer, "memory", "speed")
    x, weight, bias, model = _layer(name, x, weight, bias)
    options = class_weight, ignore_index, reduction, label_smoothing
    case = _prepare(name, model, target, *options, dim=model.ndim - 1)
    target, _, _, eps = case.what
    square = _check.number(name, "z_loss", z_loss)
    if softcap is not None:
        softcap = _check.number(name, "softcap", softcap, 2.0**-126)
        softcap = softcap if softcap < math.inf else None
    wanted = torch.promote_types(x.dtype, torch.float32)
    wanted = _check.floating(name, dtype or wanted)
    target = target.reshape(len(x), *target.shape[model.ndim - 1 :])
    counts = x.new_ones((len(x), 1), dtype=torch.bool)
    if case.silent is not None:
        counts = ~case.silent.view(counts.shape)
    x = x if _autograd.is_all(counts) else x.masked_fill(~counts, 0)
    share, divisor = None, torch.as_tensor(case.rows, device=x.device)
    if reduction != "none":
        share = counts.to(_blocks.work_dtype(x))
        if reduction == "mean":
            share = share / divisor.masked_fill(divisor == 0, 1)
    what = _linear.Case(target, class_weight, eps, square)
    layer, fast = (x, weight, bias, softcap), prefer == "speed"
    value = _fused.linear_loss(*layer, what, share, fast)
    if reduction == "none":
        value = value.masked_fill(~counts, 0).view(model.shape[:-1])
    elif reduction == "mean":
        value = value.masked_fill(divisor == 0, math.nan)
    return value.to(wanted)


def cross_entropy_gradient(
    input: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""The gradient of :func:`cross_entropy` in the logits, in closed form.

    .. math::
        \frac{\partial \ell_n}{\partial z_{ni}} = s_n p_{ni} - q_{ni},
        \qquad q_{nk} = w_k \left((1 - \varepsilon)\, y_{nk} +
        \frac{\varepsilon}{K}\right), \quad s_n = \sum_k q_{nk}

    divided as the loss is for the mean; symbols as in
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

    Accuracy: a relative error of each entry of 1e-13 for float64 where the
    two terms do not cancel; the narrower formats are computed in float64 and
    rounded once.

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
    options = weight, ignore_index, reduction, label_smoothing
    case = _prepare(name, input, target, *options)
    share = _ones(case.x, case.dim)
    if reduction == "mean":
        share = share / case.rows
    if case.silent is not None:
        share = share.masked_fill(case.silent, 0)
    target, weight, *at = case.what
    return _autograd.LossGradient.call(case.x, target, weight, share, *at)


def soft_cross_entropy(
    input: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    reduction: Reduction = "mean",
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
    rows = _autograd.Loss.call(x, y, None, dim, 0.0).squeeze(dim)
    if reduction != "none":
        rows = rows.mean() if reduction == "mean" else rows.sum()
    return rows.to(_autograd.autocast_dtype(name, x) or x.dtype)


def soft_cross_entropy_gradient(
    input: Tensor,
    target: Tensor,
    dim: int = -1,
    *,
    reduction: Reduction = "mean",
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
    share = _ones(x, dim)
    if reduction == "mean":
        share = share / max(share.numel(), 1)
    return _autograd.LossGradient.call(x, y, None, share, dim, 0.0)


class _Case(NamedTuple):
    """Checked arguments; what belongs to a row keeps the class dimension.

    `what` is the target (probabilities, or indices with 0 for ignored rows),
    the weight as a view of the shape of x or None, dim, label smoothing.
    """

    x: Tensor
    what: tuple[Any, ...]
    dim: int
    silent: Tensor | None  # the rows that do not count
    rows: Tensor | int  # what the mean divides by


def _prepare(
    name: str,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dim: int | None = None,
) -> _Case:
    """With `dim` for a layer, whose `weight` is another."""
    x = _check.logits(name, input)
    if x.ndim == 0:
        raise RuntimeError(f"{name}(): input must have classes, got 0-d")
    what = "weight" if dim is None else "class_weight"
    dim = min(x.ndim - 1, 1) if dim is None else dim
    target = _check.tensor(name, "target", target)
    _check.choice(name, "reduction", reduction, "mean", "sum", "none")
    ignore_index = _check.integer(name, "ignore_index", ignore_index)
    eps = _check.smoothing(name, label_smoothing)
    if weight is not None:
        weight = _check.class_weight(name, weight, x, dim, what)
        shape = [-1 if d == dim else 1 for d in range(x.ndim)]
        weight = _blocks.widen(weight).view(shape).expand(x.shape)
    if target.is_floating_point():
        y = _check.probabilities(name, target, x, ignore_index)
        rows = x.numel() // max(x.shape[dim], 1)
        return _Case(x, (y, weight, dim, eps), dim, None, rows)
    t = _check.class_indices(name, target, x, dim).unsqueeze(dim)
    silent = t == ignore_index
    t = t.masked_fill(silent, 0)
    share = (~silent).to(_blocks.work_dtype(x))
    if weight is not None:
        share = share * weight.gather(dim, t)
        silent = silent if eps else share == 0
    return _Case(x, (t, weight, dim, eps), dim, silent, share.sum())


def _layer(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Rows, weight and bias in one format, and what looks like logits."""
    x = _check.samples(name, x)
    weight = _check.tensor(name, "weight", weight)
    if _autograd.autocast_dtype(name, x) is not None:
        # A layer under autocast has its input as the last one left it.
        x = x.to(torch.promote_types(x.dtype, weight.dtype))
        weight = weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    classes = _check.layer(name, weight, "kd", x)
    if bias is not None:
        bias = _check.like(name, "bias", bias, x, (classes,), of="x")
    model = x.new_empty(()).expand(*x.shape[:-1], classes)
    return x.reshape(-1, x.shape[-1]), weight, bias, model


def _soft_arguments(
    name: str, input: Tensor, target: Tensor, dim: int, reduction: str
) -> tuple[Tensor, Tensor, int]:
    x = _check.logits(name, input)
    dim = _check.dimension(name, dim, x.ndim)
    y = _check.like(name, "target", target, x)
    _check.choice(name, "reduction", reduction, "mean", "sum", "none")
    return x, y, dim


def _ones(x: Tensor, dim: int) -> Tensor:
    """One for each row, in the working format."""
    shape = [*x.shape[:dim], 1, *x.shape[dim + 1 :]]
    return x.new_ones(shape, dtype=_blocks.work_dtype(x))
