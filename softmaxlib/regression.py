"""Softmax regression: the derivatives in the weights, and a model.

For logits z = W x + b of a sample x, the gradient of the cross-entropy is
(p - y) x^T and its Hessian J kron x x^T, with the Jacobian J of softmax.
Nothing else needs to be stored, and a batch goes by in blocks of samples.
"""

import math

import torch
from torch import Tensor, nn

from softmaxlib import _arguments
from softmaxlib._functions import is_watched
from softmaxlib.derivatives import (
    _is_confident,
    _weighted_deviation,
    softmax_jvp,
)
from softmaxlib.functional import log_softmax, softmax
from softmaxlib.loss import (
    _check_reduction,
    cross_entropy,
    cross_entropy_gradient,
    soft_cross_entropy,
    soft_cross_entropy_gradient,
)

__all__ = [
    "SoftmaxRegression",
    "weight_gradient",
    "weight_hessian",
    "weight_hvp",
]

# Entries of the logits of a block of samples: 4 MiB in float32.
_BLOCK = 2**20


def weight_gradient(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    layout: str = "kd",
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
    case = _Case("weight_gradient", x, weight, bias, reduction, layout)
    target = case.target(target)
    if case.watched(target):
        difference = case.difference(case.logits(), target)
        return case.finish(*case.product(difference))
    total = case.zeros()
    for rows in case.blocks():
        difference = case.difference(case.logits(rows), target[rows])
        case.add(total, difference, rows)
    return case.finish(*total)


def weight_hvp(
    x: Tensor,
    weight: Tensor,
    direction: Tensor,
    bias: Tensor | None = None,
    *,
    bias_direction: Tensor | None = None,
    reduction: str = "mean",
    layout: str = "kd",
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
    case = _Case("weight_hvp", x, weight, bias, reduction, layout)
    direction = case.like_weight("direction", direction, weight)
    if bias_direction is not None:
        if bias is None:
            raise RuntimeError(
                "weight_hvp(): bias_direction needs a bias, got None"
            )
        bias_direction = case.like("bias_direction", bias_direction, bias)
    if case.watched(direction, bias_direction):
        change = case.logits(slice(None), direction, bias_direction)
        return case.finish(
            *case.product(softmax_jvp(case.logits(), change, 1))
        )
    total = case.zeros()
    for rows in case.blocks():
        p = torch.softmax(case.logits(rows), 1)
        change = case.logits(rows, direction, bias_direction)
        if _is_confident(p):
            change -= change.gather(1, p.argmax(1, keepdim=True))
        case.add(total, _weighted_deviation(p, change, 1), rows)
    return case.finish(*total)


def weight_hessian(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    reduction: str = "mean",
    layout: str = "kd",
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
    case = _Case("weight_hessian", x, weight, bias, reduction, layout)
    classes, features = case.weight.shape
    shape = (classes, features) if layout == "kd" else (features, classes)
    diagonal = (0, 2) if layout == "kd" else (1, 3)
    size = classes * features
    watched = case.watched()
    total = case.x.new_zeros(size, size)
    blocks = case.x.new_zeros(features, features, classes)
    for rows in [slice(None)] if watched else case.blocks(size):
        z, part = case.logits(rows), case.x[rows]
        p = softmax(z, 1)
        rest = -torch.expm1(log_softmax(z, 1))
        if layout == "kd":
            outer = p.unsqueeze(-1) * part.unsqueeze(-2)
        else:
            outer = part.unsqueeze(-1) * p.unsqueeze(-2)
        outer = outer.flatten(1)
        total = torch.addmm(total, outer.mT, outer, alpha=-1)
        # Where the classes agree there is p (1 - p), and no cancellation.
        spread = (p * rest).unsqueeze(1) * part.unsqueeze(2)
        blocks = blocks + torch.einsum("nd,nek->dek", part, spread)
    total = total.view(*shape, *shape)
    total.diagonal(0, *diagonal).copy_(blocks)
    return (total.view(size, size) * case.scale).to(x.dtype)


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
        device=None,
        dtype=None,
    ):
        super().__init__()
        if in_features < 1 or num_classes < 1:
            raise ValueError(
                f"SoftmaxRegression(): in_features and num_classes must be "
                f"at least 1, got {in_features} and {num_classes}"
            )
        if not penalty >= 0:
            raise ValueError(
                f"SoftmaxRegression(): penalty must be at least 0, got "
                f"{penalty}"
            )
        options = {"device": device, "dtype": dtype}
        self.in_features, self.num_classes = in_features, num_classes
        self.penalty = penalty
        self.weight = nn.Parameter(
            torch.zeros(num_classes, in_features, **options)
        )
        vector = torch.zeros(num_classes, **options)
        self.bias = nn.Parameter(vector) if bias else None
        self.history, self.converged = [], False

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, "
            f"num_classes={self.num_classes}, "
            f"bias={self.bias is not None}, penalty={self.penalty}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits of the samples, shape (\\*batch, K)."""
        return nn.functional.linear(x, self.weight, self.bias)

    def predict_proba(self, x: Tensor) -> Tensor:
        """The probabilities of the classes, shape (\\*batch, K)."""
        return softmax(self(x), -1)

    def predict(self, x: Tensor) -> Tensor:
        """The most probable classes, shape (\\*batch)."""
        return self(x).argmax(-1)

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
        self.history, self.converged = [self._objective(x, target)], False
        for _ in range(max_iterations):
            gradient = self._gradient(x, target)
            self.converged = bool(gradient.abs().max() <= tolerance)
            if self.converged:
                break
            step = self._newton_step(x, gradient)
            if not self._search(x, target, gradient, step):
                break
        return self

    def _fitted(self):
        return [p for p in (self.weight, self.bias) if p is not None]

    def _objective(self, x, target) -> float:
        z = self(x).reshape(-1, self.num_classes)
        if _holds_indices(target):
            rows = cross_entropy(z, target.reshape(-1), reduction="none")
        else:
            y = target.reshape(-1, self.num_classes)
            rows = soft_cross_entropy(z, y, reduction="none")
        square = float(self.weight.square().sum())
        # Rounded once a row: the search compares small differences.
        loss = math.fsum(rows.tolist()) / max(len(rows), 1)
        return loss + self.penalty / 2 * square

    def _gradient(self, x, target):
        part, bias = weight_gradient(x, self.weight, target, self.bias)
        return self._flatten(part + self.penalty * self.weight, bias)

    def _hessian_times(self, x, vector):
        direction, bias_direction = self._split(vector)
        part, bias = weight_hvp(
            x,
            self.weight,
            direction,
            self.bias,
            bias_direction=bias_direction,
        )
        return self._flatten(part + self.penalty * direction, bias)

    def _newton_step(self, x, gradient):
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

    def _search(self, x, target, gradient, step) -> bool:
        """Halve the step until the objective falls as it should."""
        slope, length = float(gradient.dot(step)), 1.0
        # Near the minimum the objective is flat to within its rounding.
        slack = torch.finfo(step.dtype).eps * abs(self.history[-1])
        start = [p.clone() for p in self._fitted()]
        while length > 1e-10:
            changes = self._split(length * step)
            for parameter, origin, change in zip(
                self._fitted(), start, changes, strict=False
            ):
                parameter.copy_(origin + change)
            value = self._objective(x, target)
            if value <= self.history[-1] + 1e-4 * length * slope + slack:
                self.history.append(value)
                return True
            length /= 2
        for parameter, origin in zip(self._fitted(), start, strict=True):
            parameter.copy_(origin)
        return False

    def _flatten(self, weight, bias):
        parts = [weight.flatten()] + ([] if bias is None else [bias])
        return torch.cat(parts)

    def _split(self, vector):
        weight = vector[: self.weight.numel()].view_as(self.weight)
        rest = vector[self.weight.numel() :]
        return weight, None if self.bias is None else rest


def _holds_indices(target: Tensor) -> bool:
    return not target.dtype.is_floating_point


class _Case:
    """Checked arguments: x as (N, D), the weight as (K, D)."""

    def __init__(self, name, x, weight, bias, reduction, layout):
        self.name = name
        _check_reduction(name, reduction, ("mean", "sum"))
        if layout not in ("kd", "dk"):
            raise ValueError(
                f"{name}(): layout must be 'kd' for a weight of shape "
                f"(K, D) or 'dk' for (D, K), got {layout!r}"
            )
        self.layout = layout
        x = _arguments.logits(name, x, None)
        if x.ndim == 0:
            raise RuntimeError(
                f"{name}(): x must have shape (..., D), got a 0-d tensor"
            )
        weight = _arguments.tensor(name, "weight", weight)
        features = -1 if layout == "kd" else 0
        if weight.ndim != 2 or weight.shape[features] != x.shape[-1]:
            form = "(K, D)" if layout == "kd" else "(D, K)"
            raise RuntimeError(
                f"{name}(): weight must have shape {form} with D = "
                f"{x.shape[-1]} as in x, layout={layout!r}, got "
                f"{tuple(weight.shape)}"
            )
        self.batch, self.dtype, self.device = (
            x.shape[:-1],
            x.dtype,
            x.device,
        )
        half = x.dtype in (torch.float16, torch.bfloat16)
        self.working = torch.float32 if half else x.dtype
        self.x = x.reshape(-1, x.shape[-1]).to(self.working)
        self._same("weight", weight, weight.shape)
        self.weight = self._turn(weight).to(self.working)
        self.classes = self.weight.shape[0]
        self.bias = bias
        if bias is not None:
            bias = _arguments.tensor(name, "bias", bias)
            self._same("bias", bias, (self.classes,))
            self.bias = bias.to(self.working)
        samples = self.x.shape[0]
        # The mean over no samples is 0 / 0.
        self.scale = 1.0
        if reduction == "mean":
            self.scale = 1 / samples if samples else float("nan")

    def _turn(self, weight):
        return weight if self.layout == "kd" else weight.mT

    def _same(self, what, value, shape):
        if value.shape != torch.Size(shape):
            raise RuntimeError(
                f"{self.name}(): {what} must have shape {tuple(shape)}, "
                f"got {tuple(value.shape)}"
            )
        if value.dtype != self.dtype or value.device != self.device:
            raise RuntimeError(
                f"{self.name}(): {what} must have the dtype and device of "
                f"x, {self.dtype} on {self.device}, got {value.dtype} on "
                f"{value.device}"
            )

    def like(self, what, value, model):
        value = _arguments.tensor(self.name, what, value)
        self._same(what, value, model.shape)
        return value.to(self.working)

    def like_weight(self, what, value, weight):
        return self._turn(self.like(what, value, weight))

    def target(self, target):
        """Class indices (N) or distributions (N, K)."""
        target = _arguments.tensor(self.name, "target", target)
        if not _holds_indices(target):
            self._same("target", target, (*self.batch, self.classes))
            return target.reshape(-1, self.classes).to(self.working)
        if target.shape != self.batch:
            raise RuntimeError(
                f"{self.name}(): target must hold class indices, shape "
                f"{tuple(self.batch)}, or distributions, shape "
                f"{(*self.batch, self.classes)}, got {tuple(target.shape)}"
            )
        return target.reshape(-1)

    def watched(self, *others) -> bool:
        """Whether derivatives of the result may be asked for."""
        if torch.compiler.is_compiling():
            return True
        return is_watched(self.x, self.weight, self.bias, *others)

    def logits(self, rows=slice(None), weight=None, bias=None):
        x = self.x[rows]
        if weight is None:
            weight, bias = self.weight, self.bias
        if bias is None:
            return x @ weight.mT
        return torch.addmm(bias, x, weight.mT)

    def difference(self, z, target):
        """p - y for each sample."""
        if _holds_indices(target):
            # -100 is out of range here, and not to be ignored.
            return cross_entropy_gradient(
                z, target, reduction="sum", ignore_index=-(2**63)
            )
        return soft_cross_entropy_gradient(z, target, 1, reduction="sum")

    def blocks(self, width=None):
        """Slices that cover the samples."""
        samples = self.x.shape[0]
        size = max(1, _BLOCK // max(width or self.classes, 1))
        return [slice(n, n + size) for n in range(0, samples, size)]

    def zeros(self):
        return torch.zeros_like(self.weight), self.x.new_zeros(self.classes)

    def add(self, total, rows_of_z, rows):
        """Add what a block contributes; gradients have the form R^T x."""
        weight, bias = total
        weight.addmm_(rows_of_z.mT, self.x[rows])
        if self.bias is not None:
            bias += rows_of_z.sum(0)

    def product(self, rows_of_z):
        return rows_of_z.mT @ self.x, rows_of_z.sum(0)

    def finish(self, weight, bias):
        weight = (self._turn(weight) * self.scale).to(self.dtype)
        if self.bias is None:
            return weight, None
        return weight, (bias * self.scale).to(self.dtype)
