"""Softmax regression: a model, and its fit by Newton's method.

What a fit keeps are the samples, the parameters and the logits. Gradient and
products with the Hessian have the closed forms of `regression`.
"""

import functools
import importlib
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from softmaxlib import _autograd, _blocks, _check, _kernels
from softmaxlib.functional import softmax
from softmaxlib.regression import weight_gradient

__all__ = ["ConvergenceWarning", "SoftmaxRegression"]

# Up to this many parameters the Hessian itself is factored, which takes as
# long as a few products with it.
_SMALL = 64
# The preconditioner of an earlier step serves while the conjugate gradients
# need no more turns than this; a new one costs as much as about ten.
_PATIENCE = 8

_CONVERGED = "converged"
_SEPARATED = (
    "every sample is on the right side: without a penalty the loss has no "
    "minimiser, it falls for ever as the weights grow; set penalty > 0"
)
_STUCK = "no step lowers the objective {:.6g}, its gradient is {:.1e}"
_ADRIFT = (
    "the gradient of {:.1e} is small, but a step still moves a logit by "
    "{:.2g}: there seems to be no minimiser; set penalty > 0, and give "
    "samples of every class"
)


class ConvergenceWarning(UserWarning):
    """A fit has stopped where there is no minimum; the message says why.

    Example:
        >>> import warnings
        >>> import torch
        >>> from softmaxlib import ConvergenceWarning, SoftmaxRegression
        >>> model = SoftmaxRegression(1, 2)
        >>> x, target = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", ConvergenceWarning)
        ...     model.fit(x, target)
        Traceback (most recent call last):
        softmaxlib.training.ConvergenceWarning: ...

    Seen in the chapter *Training*.
    """


class SoftmaxRegression(nn.Module):
    r"""Multinomial logistic regression, fitted by Newton's method.

    The model is :math:`\operatorname{softmax}(W x + b)`. :meth:`fit`
    minimises the mean cross-entropy plus :math:`\frac{\lambda}{2}
    \|W\|^2`, which for :math:`\lambda > 0` and if every class occurs has
    one minimiser, up to a constant added to all biases.

    Args:
        in_features: D, the number of features.
        num_classes: K, the number of classes.
        bias: whether there is a bias; it is not penalised.
        penalty: :math:`\lambda`, at least 0. scikit-learn's ``C`` is
            :math:`1 / (\lambda N)` for N samples (or weights of that sum);
            with two classes, for which it has one weight vector and not
            two, :math:`2 / (\lambda N)`.
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

    Derived in the chapter *Training*. Truncated Newton methods: Nocedal and
    Wright (2006), *Numerical Optimization*, chapter 7.
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
        class_weight: Tensor | None = None,
        max_iterations: int = 100,
        tolerance: float | None = None,
        progress: bool = False,
    ) -> "SoftmaxRegression":
        r"""Minimise from the present parameters.

        Each Newton step is solved by conjugate gradients with products of
        :func:`weight_hvp`, whose softmax is computed once a step, and
        followed by a line search that halves the step until the objective
        falls. The conjugate gradients are preconditioned by the blocks of
        the Hessian on its diagonal, one a class.

        Args:
            x: samples, shape (\*batch, D), dtype and device of the model.
            target: as in :func:`weight_gradient`.
            class_weight: weights of the classes, shape (K), floating point,
                none negative. Sample n counts with that of its class in a
                weighted mean; that of class k multiplies ``target[n, k]``
                of distributions, as in :func:`cross_entropy`.
            max_iterations: the largest number of Newton steps.
            tolerance: of the largest entry of the gradient; by default
                the square root of the precision of the format, times 1e-2.
            progress: whether to show a bar of the package ``tqdm``.

        Returns:
            The model. At least one step is made; then the fit has converged
            if the gradient is within the tolerance and the step before
            moved no logit by 1/4.

            Otherwise a :class:`ConvergenceWarning` says why it stopped.
            Without a penalty that is as soon as every sample is on the
            right side: then there is no minimiser, only ever larger
            weights. Halves are fitted in float32 and rounded after each
            step.

        Raises:
            TypeError, IndexError, NotImplementedError, RuntimeError: as
                :func:`weight_gradient`; also for a ``class_weight`` that is
                no tensor, or of another shape.
            ValueError: an option is out of range, or there are no samples.
            ImportError: ``progress`` without ``tqdm``.

        Complexity: O(N K D) time for a step of the conjugate gradients,
        O(N K D\ :sup:`2`) for the blocks, which are used while they serve;
        memory for a few matrices of shape (N, K), a copy of the samples and
        blocks of K D\ :sup:`2` numbers if K D is at most N.
        """
        name = f"{type(self).__name__}.fit"
        limit = _check.integer(name, "max_iterations", max_iterations, 0)
        tight = 1e-2 * torch.finfo(self.weight.dtype).eps ** 0.5
        if tolerance is None:
            tolerance = tight
        tolerance = _check.number(name, "tolerance", tolerance)
        steps: Any = range(limit)
        if _check.flag(name, "progress", progress):
            steps = _bar(name, steps)
        with _autograd.exactly(x):
            fit = _Fit(name, self, x, target, class_weight)
            self.history, why = [fit.value], ""
            try:
                for _ in steps:
                    if moving := fit.step():
                        self.history.append(fit.value)
                    why = fit.verdict(moving, tolerance, tight)
                    if progress:
                        steps.set_postfix(gradient=fit.slope)
                    if why:
                        break
            finally:  # also where somebody interrupts
                self.weight.copy_(fit.theta[:, : self.in_features])
                if self.bias is not None:
                    self.bias.copy_(fit.theta[:, -1])
        self.converged = why == _CONVERGED
        if not self.converged:
            why = (
                why or f"{limit} steps leave a gradient of {fit.slope:.1e}"
            )
            warnings.warn(f"{name}(): {why}", ConvergenceWarning, 3)
        return self


class _Fit:
    """A fit under way, its parameters (K, D) with the bias as a column."""

    solve: Callable[[Tensor], Tensor]
    turns, moved = math.inf, 0.0

    def __init__(
        self,
        name: str,
        model: SoftmaxRegression,
        x: Tensor,
        target: Tensor,
        class_weight: Tensor | None,
    ):
        # It checks the arguments.
        weight_gradient(x, model.weight, target, model.bias)
        # Products of halves would be rounded one by one.
        self.dtype = torch.float32 if x.dtype.itemsize < 4 else x.dtype
        classes, features = model.weight.shape
        self.x = x.reshape(-1, features).to(self.dtype)
        if not len(self.x):
            raise ValueError(f"{name}(): x must hold samples, got none")
        theta = model.weight.to(self.dtype)
        self.penalty = self.x.new_full((features,), model.penalty)
        if model.bias is not None:
            bias = model.bias.to(self.dtype).unsqueeze(1)
            theta = torch.cat([theta, bias], 1)
            self.x = nn.functional.pad(self.x, (0, 1), value=1.0)
            self.penalty = nn.functional.pad(self.penalty, (0, 1))
        soft = target.is_floating_point()
        if not soft:
            target = nn.functional.one_hot(target.long(), classes)
        y = _blocks.widen(target.reshape(len(self.x), classes))
        if class_weight is not None:
            word = "class_weight"
            weight = _check.class_weight(name, class_weight, y, 1, word)
            _check.number(name, word, float(weight.min()))
            y = y * _blocks.widen(weight)
        # Divided by what the mean divides by.
        self.y = y / (y.new_tensor(len(y)) if soft else y.sum())
        mass = self.y.sum(1, keepdim=True)
        self.mass = mass.to(self.dtype)
        # Without a penalty: the only class of each sample, if it has one.
        free = model.penalty == 0 and classes > 1 and (self.y >= 0).all()
        self.alone = self.y == mass if free else None
        self._arrive(theta, *self._evaluate(theta))

    def _evaluate(self, theta: Tensor) -> tuple[Tensor, float]:
        """The logarithms of the probabilities, and the objective."""
        z = self.x @ theta.mT
        # In float64: the search compares small differences.
        log_p = torch.log_softmax(z, 1, dtype=self.y.dtype)
        square = float(self.penalty @ theta.square().sum(0))
        return log_p, square / 2 - float((self.y * log_p).sum())

    def _arrive(self, theta: Tensor, log_p: Tensor, value: float) -> None:
        self.theta, self.log_p, self.value = theta, log_p, value
        p = log_p.exp()
        residual = (p * self.mass - self.y).to(self.dtype)
        self.p = p.to(self.dtype)
        self.gradient = residual.mT @ self.x + self.penalty * theta
        self.slope = float(self.gradient.abs().max())

    def step(self) -> bool:
        """Halve a Newton step until the objective falls as it should."""
        if not math.isfinite(self.value):
            return False
        step, length = self._newton(), 1.0
        slope = _dot(self.gradient, step)
        # Near the minimum the objective is flat to within its rounding,
        # that of a logarithm of numbers near 1 if it is small itself.
        slack = 4 * torch.finfo(self.dtype).eps * (1 + abs(self.value))
        while length > 1e-10:
            theta = self.theta + length * step
            log_p, value = self._evaluate(theta)
            if value <= self.value + 1e-4 * length * slope + slack:
                change = log_p - self.log_p
                change -= change.mean(1, keepdim=True)
                self.moved = float(change.abs().max())
                self._arrive(theta, log_p, value)
                return True
            length /= 2
        return False

    def verdict(self, moving: bool, tolerance: float, tight: float) -> str:
        """Why to stop here; empty to go on."""
        if self.alone is not None and self._separates(self.alone):
            return _SEPARATED
        # Near a minimum Newton steps shrink with the gradient; where there
        # is none, each moves the gap of some logits by about 1.
        if self.slope <= tolerance and self.moved < 0.25:
            return _CONVERGED
        if not moving:
            return _STUCK.format(self.value, self.slope)
        if self.slope <= min(tolerance, tight):
            return _ADRIFT.format(self.slope, self.moved)
        return ""

    def _separates(self, alone: Tensor) -> bool:
        """Whether every sample is on the right side, beyond rounding."""
        others = self.log_p.masked_fill(alone, -math.inf).amax(1)
        own = self.log_p.masked_fill(~alone, -math.inf).amax(1)
        rounding = 1e3 * torch.finfo(self.dtype).eps
        right = own - others > rounding * (1 - others)
        return bool((right | (self.mass[:, 0] == 0)).all())

    def _newton(self) -> Tensor:
        """Solve Hessian step = -gradient, roughly while far away."""
        step, residual = torch.zeros_like(self.theta), -self.gradient
        if self.turns > (0 if step.numel() <= _SMALL else _PATIENCE):
            self.solve = self._preconditioner()
        direction = ahead = self.solve(residual)
        square = _dot(residual, ahead)
        goal = min(0.25, _dot(residual, residual) ** 0.25) ** 2 * square
        for self.turns in range(1, 2 * step.numel() + 1):
            t = self.x @ direction.mT
            t = _kernels.weighted_deviation(self.p, t, 1) * self.mass
            product = t.mT @ self.x + self.penalty * direction
            curvature = _dot(direction, product)
            if not curvature > torch.finfo(self.dtype).eps * square:
                break
            length = square / curvature
            step.add_(direction, alpha=length)
            residual.sub_(product, alpha=length)
            ahead = self.solve(residual)
            previous, square = square, _dot(residual, ahead)
            if square <= goal:
                break
            direction = ahead + square / previous * direction
        # Flat in the very first direction: then downhill will do.
        return step if step.any() else -self.gradient

    def _preconditioner(self) -> Callable[[Tensor], Tensor]:
        """Solve with a part of the Hessian: blocks, or the diagonal."""
        size, p, x = self.theta.numel(), self.p, self.x
        small, ridge = size <= _SMALL, torch.finfo(self.dtype).eps ** 0.5
        w = p * self.mass if small else p * (1 - p) * self.mass
        if size > max(len(x), _SMALL):
            diagonal = w.mT @ x.square() + self.penalty
            diagonal += ridge * diagonal.amax()
            return lambda r: self._centred(r, lambda v: v / diagonal)
        blocks = torch.stack([(x * v.unsqueeze(1)).mT @ x for v in w.mT])
        blocks.diagonal(0, 1, 2).add_(self.penalty)
        if small:  # all of it, made definite where softmax sees nothing
            outer = (p.unsqueeze(2) * x.unsqueeze(1)).flatten(1)
            free = torch.diag((self.penalty == 0) * blocks.amax())
            rest = (outer * self.mass).mT @ outer
            rest -= torch.kron(p.new_ones(p.shape[1], p.shape[1]), free)
            blocks = (torch.block_diag(*blocks) - rest).unsqueeze(0)
        diagonal = blocks.diagonal(0, 1, 2)
        diagonal.add_(ridge * diagonal.amax())
        factor, shape = torch.linalg.cholesky_ex(blocks)[0], len(blocks)

        def solve(r: Tensor) -> Tensor:
            columns = r.reshape(shape, -1, 1)
            return torch.cholesky_solve(columns, factor).view_as(r)

        return lambda r: self._centred(r, solve)

    def _centred(
        self, r: Tensor, solve: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Solve roughly, but exactly along what softmax cannot see.

        There, for one vector added to all rows, only the penalty counts.
        """
        mean = r.mean(0, keepdim=True)
        v = solve(r - mean)
        blind = torch.where(self.penalty > 0, mean / self.penalty, 0)
        return v - v.mean(0, keepdim=True) + blind


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten(), b.flatten()))


def _bar(name: str, steps: range) -> Any:
    """The steps with a bar of tqdm, which is imported here only."""
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError as error:
        hint = (
            "progress=True needs the package tqdm, which is not installed"
        )
        raise ImportError(f"{name}(): {hint}") from error
    return tqdm.tqdm(steps, desc=name, unit="step")
