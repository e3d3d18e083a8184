"""Softmax and log-softmax as layers."""

import torch
from torch import Tensor, nn

from softmaxlib import _arguments
from softmaxlib.functional import log_softmax, softmax

__all__ = ["LogSoftmax", "Softmax"]


class _Layer(nn.Module):
    def __init__(self, dim: int, *, temperature: float = 1.0):
        super().__init__()
        name = type(self).__name__
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(
                f"{name}(): dim must be an int, got "
                f"{type(dim).__name__} {dim!r}"
            )
        self.dim = dim
        self.temperature = _arguments.temperature(name, temperature)

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

    def forward(
        self, input: Tensor, mask: Tensor | None = None
    ) -> torch.Tensor:
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

    def forward(
        self, input: Tensor, mask: Tensor | None = None
    ) -> torch.Tensor:
        return log_softmax(
            input, self.dim, temperature=self.temperature, mask=mask
        )
