"""Softmax, log-softmax and the cross-entropy as layers."""

from typing import Any

import torch
from torch import Tensor, nn

from softmaxlib import _check
from softmaxlib.functional import log_softmax, softmax
from softmaxlib.loss import Reduction, cross_entropy

__all__ = ["CrossEntropyLoss", "LogSoftmax", "Softmax"]


class _Layer(nn.Module):
    def __init__(self, dim: int, *, temperature: float = 1.0):
        super().__init__()
        name = type(self).__name__
        self.dim = _check.integer(name, "dim", dim)
        self.temperature = _check.temperature(name, temperature)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, temperature={self.temperature}"


class Softmax(_Layer):
    """:func:`softmaxlib.softmax` as a layer.

    Args:
        dim: the class dimension. There is no default: guessing it is how
            batches get normalised instead of classes.
        temperature: a number in [0, inf].

    Raises:
        TypeError: ``dim`` is not an int, ``temperature`` not a number.
        ValueError: ``temperature`` is negative or NaN.

    Shape: any, to the same shape.

    Example:
        >>> import torch
        >>> from softmaxlib import Softmax
        >>> Softmax(dim=-1)(torch.tensor([[0.0, 0.0]]))
        tensor([[0.5000, 0.5000]])

    Derived in the chapter *The softmax function*.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return softmax(
            input, self.dim, temperature=self.temperature, mask=mask
        )


class LogSoftmax(_Layer):
    """:func:`softmaxlib.log_softmax` as a layer.

    Args:
        dim: the class dimension.
        temperature: a number in [0, inf].

    Raises:
        TypeError: ``dim`` is not an int, ``temperature`` not a number.
        ValueError: ``temperature`` is negative or NaN.

    Shape: any, to the same shape.

    Example:
        >>> import torch
        >>> from softmaxlib import LogSoftmax
        >>> LogSoftmax(dim=-1)(torch.tensor([[0.0, 0.0]]))
        tensor([[-0.6931, -0.6931]])

    Derived in the chapter *Softmax on a computer*.
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        return log_softmax(
            input, self.dim, temperature=self.temperature, mask=mask
        )


class CrossEntropyLoss(nn.Module):
    """:func:`softmaxlib.cross_entropy` as a layer.

    Args:
        weight, ignore_index, reduction, label_smoothing, dtype: as in
            :func:`softmaxlib.cross_entropy`, by keyword. ``weight`` becomes
            a buffer, which moves with the module.

    Raises:
        TypeError, ValueError, RuntimeError: an option is not what
            :func:`softmaxlib.cross_entropy` takes.

    Shape: K or N x K x any others, and the target as in the function; to
    0-d, or to the shape of the class indices for ``"none"``.

    Example:
        >>> import torch
        >>> from softmaxlib import CrossEntropyLoss
        >>> loss = CrossEntropyLoss(label_smoothing=0.1)
        >>> loss(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([2]))
        tensor(0.5076)

    Derived in the chapter *Gradients in the weights*.
    """

    weight: Tensor | None

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        _check.choice(name, "reduction", reduction, "mean", "sum", "none")
        eps = _check.smoothing(name, label_smoothing)
        self.options: dict[str, Any] = {
            "ignore_index": _check.integer(
                name, "ignore_index", ignore_index
            ),
            "reduction": reduction,
            "label_smoothing": eps,
            "dtype": dtype and _check.floating(name, dtype),
        }
        if weight is not None:
            weight = _check.tensor(name, "weight", weight)
        self.register_buffer("weight", weight)

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.options.items())

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input, target, weight=self.weight, **self.options
        )
