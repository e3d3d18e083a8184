"""Softmax regression: the derivatives in the weights.

For logits z = W x + b of a sample x, the gradient of the cross-entropy is
(p - y) x^T and its Hessian J kron x x^T, with the Jacobian J of softmax.
Nothing else needs to be stored, and a batch goes by in blocks of samples.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softmaxlib import _autograd, _blocks, _check, _kernels
from softmaxlib.functional import log_softmax, softmax

__all__ = [
    "weight_gradient",
    "weight_hessian",
    "weight_hvp",
]

Layout = Literal["kd", "dk"]


def weight_gradient(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    layout: Layout = "kd",
) -> tuple[Tensor, Tensor | None]:
    r"""The gradient of the cross-entropy in the weights of a linear layer.

    .. math::
        \frac{\partial L}{\partial W} = \frac1N \sum_n (p_n - y_n) x_n^\top,
        \qquad \frac{\partial L}{\partial b} = \frac1N \sum_n (p_n - y_n)

    with :math:`p_n` the softmax of the logits :math:`W x_n + b` of the n-th
    of N samples and :math:`y` = ``target``; without the 1/N for the sum.

    Args:
        x: samples, shape (\*batch, D); float16, bfloat16, float32 or
            float64.
        weight: shape (K, D), as in ``nn.Linear``, or (D, K) for ``layout``
            ``"dk"``; dtype and device of ``x``.
        target: class indices in [0, K), shape (\*batch), any integer dtype;
            or distributions, shape (\*batch, K), dtype of ``x``. With a
            distribution that sums to s, p is multiplied by s.
        bias: shape (K), or None.
        reduction: ``"mean"`` or ``"sum"`` over the samples.
        layout: ``"kd"`` for a weight of shape (K, D), ``"dk"`` for (D, K).

    Returns:
        The gradients of ``weight`` and ``bias``, of their shapes; None for
        no bias. Zero samples give NaN for the mean, and zeros for the sum.
        A sample with NaN or infinite logits makes all of it NaN.

    Raises:
        TypeError: one of the tensors is none.
        ValueError: unknown ``reduction`` or ``layout``.
        IndexError: a class index is out of range.
        NotImplementedError: ``x`` is not floating point.
        RuntimeError: shapes, dtypes or devices do not fit.

    Accuracy: that of the matrix products; halves are computed in float32
    and rounded once.

    Complexity: O(N D K) time, in two matrix products; besides the result a
    few blocks of 4 MiB. Where autograd or ``torch.func`` follows, plain
    differentiable operations run instead, on all samples at once.

    Example:
        >>> import torch
        >>> from softmaxlib import weight_gradient
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.zeros(3, 2)
        >>> weight_gradient(x, weight, torch.tensor([0]))[0]
        tensor([[-0.6667, -1.3333],
                [ 0.3333,  0.6667],
                [ 0.3333,  0.6667]])

    Derived in the chapter *Gradients in the weights*. Source: Bishop
    (2006), *Pattern Recognition and Machine Learning*, eq. 4.109.
    """
    name = "weight_gradient"
    model = _linear(name, x, weight, bias, reduction, layout)
    y = _targets(name, target, model)

    def difference(rows: slice) -> Tensor:
        z = model.logits(rows)
        one = z.new_ones(len(z), 1, dtype=_blocks.work_dtype(z))
        return _autograd.LossGradient.call(z, y[rows], None, one, 1, 0.0)

    return _outer_sums(model, difference, y)


def weight_hvp(
    x: Tensor,
    weight: Tensor,
    direction: Tensor,
    bias: Tensor | None = None,
    *,
    bias_direction: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    layout: Layout = "kd",
) -> tuple[Tensor, Tensor | None]:
    r"""The Hessian of the cross-entropy in the weights, times a direction.

    .. math::
        H_W = \frac1N \sum_n J_n (V x_n + v)\, x_n^\top, \qquad
        H_b = \frac1N \sum_n J_n (V x_n + v)

    with :math:`J_n` the Jacobian of softmax at the logits :math:`W x_n + b`
    of the n-th of N samples, :math:`V` = ``direction`` and :math:`v` =
    ``bias_direction``. It is the same for all targets that sum to one, and
    positive semidefinite.

    Args:
        x, weight, bias, reduction, layout: as in :func:`weight_gradient`.
        direction: of the shape of ``weight``.
        bias_direction: of the shape of ``bias``; zero if None.

    Returns:
        The parts of the product for ``weight`` and ``bias``, of their
        shapes; None for no bias. Special values as in
        :func:`weight_gradient`.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as
            :func:`weight_gradient`; also for a ``bias_direction`` without
            ``bias``.

    Accuracy: as :func:`weight_gradient`.

    Complexity: O(N D K) time, in three matrix products; memory as
    :func:`weight_gradient`.

    Example:
        >>> import torch
        >>> from softmaxlib import weight_hvp
        >>> x, weight = torch.tensor([[1.0, 2.0]]), torch.zeros(2, 2)
        >>> direction = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
        >>> weight_hvp(x, weight, direction)[0]
        tensor([[ 0.2500,  0.5000],
                [-0.2500, -0.5000]])

    Derived in the chapter *Gradients in the weights*. Source: Böhning
    (1992), doi:10.1007/BF00048682.
    """
    name = "weight_hvp"
    model = _linear(name, x, weight, bias, reduction, layout)
    v = _check.like(name, "direction", direction, weight, of="weight")
    v = (v if layout == "kd" else v.mT).to(model.x.dtype)
    v_bias = bias_direction
    if v_bias is not None:
        if bias is None:
            raise RuntimeError(f"{name}(): bias_direction needs a bias")
        _check.like(name, "bias_direction", v_bias, bias, of="bias")
        v_bias = v_bias.to(model.x.dtype)
    way = _autograd.route(x, weight, bias, v, v_bias)

    def change(rows: slice) -> Tensor:
        z = model.logits(rows)
        t = nn.functional.linear(model.x[rows], v, v_bias)
        if way != "kernel":
            return _autograd.SoftmaxJVP.call(z, t, 1, 1.0)
        p = torch.softmax(z, 1)
        if _kernels.is_confident(p):
            t -= t.gather(1, p.argmax(1, keepdim=True))
        return _kernels.weighted_deviation(p, t, 1)

    return _outer_sums(model, change, v, v_bias)


def weight_hessian(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    layout: Layout = "kd",
) -> Tensor:
    r"""The Hessian of the cross-entropy in the flattened weight.

    .. math::
        \nabla^2 L = \frac1N \sum_n J_n \otimes x_n x_n^\top
        \quad (\text{or } x_n x_n^\top \otimes J_n)

    with :math:`J_n` as in :func:`weight_hvp`, for ``weight.flatten()`` in
    the layout ``"kd"`` (or ``"dk"``). Symmetric positive semidefinite, of
    rank at most (K - 1) D: adding one vector to all rows of the weight
    changes nothing.

    Args:
        x, weight, bias, reduction, layout: as in :func:`weight_gradient`.
            The derivative is in ``weight`` only.

    Returns:
        Shape (K D, K D), in the dtype of ``x``. Special values as in
        :func:`weight_gradient`.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as
            :func:`weight_gradient`.

    Accuracy: as :func:`weight_gradient`.

    Complexity: O(N K\ :sup:`2` D\ :sup:`2`) time, a block of 4 MiB besides
    the result.

    Example:
        >>> import torch
        >>> from softmaxlib import weight_hessian
        >>> weight_hessian(torch.tensor([[2.0]]), torch.zeros(2, 1))
        tensor([[ 1., -1.],
                [-1.,  1.]])

    Derived in the chapter *Gradients in the weights*. Source: Böhning
    (1992), doi:10.1007/BF00048682.
    """
    model = _linear("weight_hessian", x, weight, bias, reduction, layout)
    classes, features = model.weight.shape
    size = classes * features
    watched = _autograd.route(x, weight, bias) != "kernel"
    total = model.x.new_zeros(size, size)
    blocks = model.x.new_zeros(features, features, classes)
    with _autograd.exactly(x):
        for rows in _samples(len(model.x), size, watched):
            z, part = model.logits(rows), model.x[rows]
            p = softmax(z, 1)
            rest = -torch.expm1(log_softmax(z, 1))
            pair = (p, part) if layout == "kd" else (part, p)
            outer = pair[0].unsqueeze(-1) * pair[1].unsqueeze(-2)
            outer = outer.flatten(1)
            total = torch.addmm(total, outer.mT, outer, alpha=-1)
            # Where the classes agree there is p (1 - p): no cancellation.
            spread = (p * rest).unsqueeze(1) * part.unsqueeze(2)
            blocks = blocks + torch.einsum("nd,nek->dek", part, spread)
    total = total.view(*weight.shape, *weight.shape)
    total.diagonal(0, *((0, 2) if layout == "kd" else (1, 3))).copy_(blocks)
    return (total.view(size, size) * model.scale).to(x.dtype)


@dataclasses.dataclass
class _Linear:
    """Checked arguments in the working format, the weight as (K, D)."""

    x: Tensor  # (N, D)
    weight: Tensor
    bias: Tensor | None
    batch: torch.Size
    scale: float
    layout: Layout
    dtype: torch.dtype

    def logits(self, rows: slice) -> Tensor:
        return nn.functional.linear(self.x[rows], self.weight, self.bias)


def _linear(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reduction: str,
    layout: Layout,
) -> _Linear:
    _check.choice(name, "reduction", reduction, "mean", "sum")
    _check.choice(name, "layout", layout, "kd", "dk")
    x = _check.samples(name, x)
    classes = _check.layer(name, weight, layout, x)
    if bias is not None:
        bias = _check.like(name, "bias", bias, x, (classes,), of="x")
    # Products of halves would be rounded one by one.
    working = torch.float32 if x.dtype.itemsize < 4 else x.dtype
    samples = x.shape[:-1].numel()
    # The mean over no samples is 0 / 0.
    mean = 1 / samples if samples else float("nan")
    return _Linear(
        x.reshape(-1, x.shape[-1]).to(working),
        (weight if layout == "kd" else weight.mT).to(working),
        None if bias is None else bias.to(working),
        x.shape[:-1],
        mean if reduction == "mean" else 1.0,
        layout,
        x.dtype,
    )


def _targets(name: str, target: Tensor, model: _Linear) -> Tensor:
    """Class indices (N, 1) or probabilities (N, K)."""
    target = _check.tensor(name, "target", target)
    classes = model.weight.shape[0]
    if target.is_floating_point():
        shape = (*model.batch, classes)
        model_x = model.x.to(model.dtype)
        y = _check.like(name, "target", target, model_x, shape, of="x")
        return y.reshape(-1, classes).to(model.x.dtype)
    if target.shape != model.batch:
        raise RuntimeError(
            f"{name}(): target must hold class indices, shape "
            f"{tuple(model.batch)}, or distributions, shape "
            f"{(*model.batch, classes)}, got {tuple(target.shape)}"
        )
    plain = _autograd.route(target) == "plain"
    if not (plain or _autograd.is_wrapped(target)):
        _check.in_range(name, target, classes)
    return target.reshape(-1, 1).long()


def _samples(n: int, width: int, watched: bool) -> list[slice]:
    """Blocks of samples of that many numbers each; one if watched."""
    size = max(1, n if watched else 4 * _blocks.SIZE // max(width, 1))
    return [slice(i, i + size) for i in range(0, n, size)]


def _outer_sums(
    model: _Linear, part: Callable[[slice], Tensor], *others: Any
) -> tuple[Tensor, Tensor | None]:
    """The sum of r x^T over samples, and of r, for `part` the rows r."""
    x, classes = model.x, len(model.weight)
    tensors = x, model.weight, model.bias, *others
    watched = _autograd.route(*tensors) != "kernel"
    weight, bias = torch.zeros_like(model.weight), x.new_zeros(classes)
    with _autograd.exactly(x):
        for rows in _samples(len(x), classes, watched):
            r = part(rows)
            weight = torch.addmm(weight, r.mT, x[rows])
            bias = bias + r.sum(0)
    weight = (weight * model.scale).to(model.dtype)
    weight = weight if model.layout == "kd" else weight.mT
    if model.bias is None:
        return weight, None
    return weight, (bias * model.scale).to(model.dtype)
