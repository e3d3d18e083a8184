"""Softmax regression: the derivatives in the weights, and a model.

For logits z = W x + b of a sample x, the gradient of the cross-entropy is
(p - y) x^T and its Hessian J kron x x^T, with the Jacobian J of softmax.
Nothing else needs to be stored, and a batch goes by in blocks of samples.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from softmaxlib import _autograd, _blocks, _check, _kernels
from softmaxlib.functional import log_softmax, softmax
from softmaxlib.loss import cross_entropy

__all__ = [
    "SoftmaxRegression",
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


class SoftmaxRegression(nn.Module):
    r"""Multinomial logistic regression, fitted by Newton's method.

    The model is :math:`\operatorname{softmax}(W x + b)`. :meth:`fit`
    minimises the mean cross-entropy plus :math:`\frac{\lambda}{2}
    \|W\|^2`, which for :math:`\lambda > 0` and if every class occurs has
    one minimiser, up to a constant added to all biases. Each Newton step is
    solved by conjugate gradients with :func:`weight_hvp`, so that no Hessian
    is formed, and followed by a backtracking line search.

    Args:
        in_features: D, the number of features.
        num_classes: K, the number of classes.
        bias: whether there is a bias; it is not penalised.
        penalty: :math:`\lambda`, at least 0. With 0, separable classes have
            no minimiser, and the weights grow until ``max_iterations``.
        device, dtype: of the parameters.

    Attributes:
        weight: shape (K, D); zero before the fit.
        bias: shape (K), or None; zero before the fit.
        history: the objective before each step of the last fit, and after.
        converged: whether the last fit reached its tolerance.

    Raises:
        ValueError: a size is less than one, or ``penalty`` negative.

    Example:
        >>> import torch
        >>> from softmaxlib import SoftmaxRegression
        >>> x = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> model = SoftmaxRegression(1, 2, penalty=0.1)
        >>> model.fit(x, torch.tensor([0, 0, 1, 1])).predict(x)
        tensor([0, 0, 1, 1])

    Derived in the chapter *Gradients in the weights*. Truncated Newton
    methods: Nocedal and Wright (2006), *Numerical Optimization*, chapter 7.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        penalty: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        self.in_features = _check.integer(
            name, "in_features", in_features, 1
        )
        self.num_classes = _check.integer(
            name, "num_classes", num_classes, 1
        )
        self.penalty = _check.number(name, "penalty", penalty)
        zeros = functools.partial(torch.zeros, device=device, dtype=dtype)
        self.weight = nn.Parameter(zeros(num_classes, in_features))
        self.bias = nn.Parameter(zeros(num_classes)) if bias else None
        self.history: list[float] = []
        self.converged = False

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.num_classes}, bias="
        return f"{sizes}{self.bias is not None}, penalty={self.penalty}"

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the samples, shape (\\*batch, K)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def predict_proba(self, x: Tensor) -> Tensor:
        """The probabilities of the classes, shape (\\*batch, K)."""
        return softmax(self.forward(x), -1)

    def predict(self, x: Tensor) -> Tensor:
        """The most probable classes, shape (\\*batch)."""
        return self.forward(x).argmax(-1)

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        target: Tensor,
        *,
        max_iterations: int = 100,
        tolerance: float | None = None,
    ) -> "SoftmaxRegression":
        """Minimise from the present parameters; returns the model.

        Args:
            x: samples, shape (\\*batch, D).
            target: as in :func:`weight_gradient`.
            max_iterations: the largest number of Newton steps.
            tolerance: of the largest entry of the gradient; by default
                the square root of the precision of the format, times 1e-2.
        """
        if tolerance is None:
            tolerance = 1e-2 * torch.finfo(self.weight.dtype).eps ** 0.5
        # The gradient comes first, as it checks the arguments.
        with _autograd.exactly(x):
            gradient = self._gradient(x, target)
            self.history = [self._objective(x, target)]
            for _ in range(max_iterations):
                if gradient.abs().max() <= tolerance:
                    break
                if not self._search(x, target, gradient):
                    break
                gradient = self._gradient(x, target)
        self.converged = bool(gradient.abs().max() <= tolerance)
        return self

    def _objective(self, x: Tensor, target: Tensor) -> float:
        z = self.forward(x).reshape(-1, self.num_classes)
        y = target.reshape(len(z), *target.shape[x.ndim - 1 :])
        # Not rounded: the search compares small differences.
        loss = cross_entropy(z, y, dtype=_blocks.work_dtype(z))
        square = self.weight.square().sum()
        return float(loss) + self.penalty / 2 * float(square)

    def _gradient(self, x: Tensor, target: Tensor) -> Tensor:
        part, bias = weight_gradient(x, self.weight, target, self.bias)
        return _vector(part + self.penalty * self.weight, bias)

    def _hessian_times(self, x: Tensor, vector: Tensor) -> Tensor:
        direction, rest = vector.split(
            [self.weight.numel(), len(vector) - self.weight.numel()]
        )
        v = direction.view_as(self.weight)
        v_bias = None if self.bias is None else rest
        part, bias = weight_hvp(
            x, self.weight, v, self.bias, bias_direction=v_bias
        )
        return _vector(part + self.penalty * v, bias)

    def _newton_step(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Solve Hessian step = -gradient, roughly while far away."""
        step, residual = torch.zeros_like(gradient), -gradient
        direction, square = residual, residual.dot(residual)
        goal = min(0.25, float(square) ** 0.25) ** 2 * square
        for _ in range(2 * gradient.numel()):
            product = self._hessian_times(x, direction)
            curvature = direction.dot(product)
            if not curvature > torch.finfo(product.dtype).eps * square:
                break
            length = square / curvature
            step = step + length * direction
            residual = residual - length * product
            previous, square = square, residual.dot(residual)
            if square <= goal:
                break
            direction = residual + square / previous * direction
        # Flat in the very first direction: then downhill will do.
        return step if step.any() else -gradient

    def _search(self, x: Tensor, target: Tensor, gradient: Tensor) -> bool:
        """Halve a Newton step until the objective falls as it should."""
        step, last = self._newton_step(x, gradient), self.history[-1]
        slope, length = float(gradient.dot(step)), 1.0
        # Near the minimum the objective is flat to within its rounding.
        slack = torch.finfo(step.dtype).eps * abs(last)
        start = nn.utils.parameters_to_vector(self.parameters())
        while length > 1e-10:
            there = start + length * step
            nn.utils.vector_to_parameters(there, self.parameters())
            value = self._objective(x, target)
            if value <= last + 1e-4 * length * slope + slack:
                self.history.append(value)
                return True
            length /= 2
        nn.utils.vector_to_parameters(start, self.parameters())
        return False


def _vector(*parts: Tensor | None) -> Tensor:
    return torch.cat([p.flatten() for p in parts if p is not None])


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
