"""softmax, log_softmax and logsumexp, and the textbook formula as a foil.

The arithmetic is in `softmaxlib._kernels`, its derivatives in
`softmaxlib._autograd`; here are the signatures and what they promise.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softmaxlib import _autograd, _check

__all__ = ["log_softmax", "logsumexp", "naive_softmax", "softmax"]


def softmax(
    input: Tensor,
    dim: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Softmax along one dimension, correct to the last bit or nearly so.

    .. math:: p_i = \frac{e^{z_i / T}}{\sum_j e^{z_j / T}}

    with the logits :math:`z` = ``input`` along ``dim`` and the temperature
    :math:`T` = ``temperature``.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf], held constant in derivatives.
            The logits are shifted first and divided after, so that tiny
            temperatures neither overflow nor lose accuracy. 0 gives the
            limit, uniform over the arg max set; inf is uniform.
        mask: boolean, broadcastable to ``input``; True takes part.
        dtype: the format to cast ``input`` to before computing, and that of
            the result.
        out: a tensor to write to, as in PyTorch (no autograd through it).
            ``out=input`` works in place.

    Returns:
        Probabilities of the shape of ``input``, contiguous.

        A logit of -inf has probability 0. A row whose logits are all -inf,
        or that holds +inf or NaN, is NaN, that row only. Masked entries are
        0, whatever their logit; a fully masked row is all 0, with zero
        gradient. Empty stays empty. A 0-d input gives 1.

    Raises:
        TypeError: ``input`` is not a tensor, ``dim`` not an int,
            ``temperature`` not a number, ``mask`` not boolean.
        IndexError: ``dim`` is out of range.
        ValueError: ``temperature`` is negative or NaN.
        NotImplementedError: ``input`` is integer, bool or an 8-bit float
            and ``dtype`` is not given, or it is complex or sparse.
        RuntimeError: ``mask`` cannot be broadcast; ``out`` has the wrong
            shape, dtype or device, or autograd would have to go through it.

    Accuracy, worst case over all finite inputs: 0.5 ulp and a hair for
    float16, bfloat16 and float32, at any temperature; 5 ulp for float64,
    where neighbouring logits may come out in the wrong order by an ulp. The
    hair of float16 is 2\ :sup:`-14` ulp, as PyTorch rounds to it by way of
    float32. ``torch.compile``, ``torch.export`` and tensors without values
    get plain operations instead: as accurate for the narrow formats, which
    are computed in float64 there, too; for float64 the error grows with the
    range of the logits, as that of ``torch.softmax`` does, by an ulp for
    each unit.

    Derivatives of any order, in both modes and under ``torch.func``; a
    compiled function has as many as PyTorch gives it, at present one
    backward pass. The backward pass keeps the result, not the input.

    Complexity: O(n) time for n entries; besides the output a few blocks of 2
    MiB a thread, or 8 MiB if a row is longer, never a float64 copy of the
    input. A mask costs a copy of a block, or of a row if that is longer, and
    the backward pass a few rows in float64 where one is longer than a block.

    Example:
        >>> import torch
        >>> from softmaxlib import softmax
        >>> softmax(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([0.0900, 0.2447, 0.6652])
        >>> softmax(torch.tensor([1.0, 2.0, 2.0]), dim=0, temperature=0)
        tensor([0.0000, 0.5000, 0.5000])

    Derived in the chapters *The softmax function*, *Softmax on a computer*
    and *Temperature*. The name and the use in classification: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28. The rounding errors of the shifted
    formula: Blanchard, Higham and Higham (2021), doi:10.1093/imanum/draa038.
    """
    name, options = "softmax", (temperature, mask, dtype, out)
    return _evaluate(name, _autograd.Softmax, input, dim, *options)


def log_softmax(
    input: Tensor,
    dim: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Logarithm of the softmax along one dimension.

    .. math:: \log p_i = z_i / T - \log \sum_j e^{z_j / T}

    with the logits :math:`z` = ``input`` along ``dim`` and the temperature
    :math:`T` = ``temperature``. The largest entry is evaluated as
    :math:`-\log(1 + \text{rest})` by ``log1p``, where the rest is the sum of
    the other weights: it keeps all of its digits where one minus rounding
    would make it 0.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
        dim: the class dimension, in [-ndim, ndim).
        temperature: as in :func:`softmax`. At 0 the arg max set has
            :math:`-\log m` (m its size) and everything else -inf.
        mask: boolean, broadcastable to ``input``; True takes part.
        dtype: the format to cast ``input`` to before computing, and that of
            the result.
        out: a tensor to write to, as in :func:`softmax`.

    Returns:
        Log-probabilities (nats) of the shape of ``input``, contiguous.

        A logit of -inf has log-probability -inf; so has one whose true value
        exceeds the format. Rows of -inf only, or with +inf or NaN, are NaN,
        that row only. Masked entries are -inf and have zero gradient, fully
        masked rows included. Empty stays empty. A 0-d input gives 0.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError, RuntimeError:
            as :func:`softmax`.

    Accuracy, worst case over all finite inputs: 0.5 ulp and a hair for
    float16, bfloat16 and float32, at any temperature; 5 ulp for float64.
    Compiled, exported and shape-only as :func:`softmax`; the ``log1p`` is
    there, too.

    Derivatives as :func:`softmax`, but the backward pass keeps the input,
    where PyTorch's keeps the result: from rounded log-probabilities the
    gradient of a confident row could not be had. To change the input in
    place between the two raises PyTorch's error.

    Complexity: as :func:`softmax`.

    Example:
        >>> import torch
        >>> from softmaxlib import log_softmax
        >>> log_softmax(torch.tensor([17.0, 0.0]), dim=0)
        tensor([-4.1399e-08, -1.7000e+01])

    Derived in the chapter *Softmax on a computer*. Source: Blanchard, Higham
    and Higham (2021), doi:10.1093/imanum/draa038, Algorithm 4.1.
    """
    name, options = "log_softmax", (temperature, mask, dtype, out)
    return _evaluate(name, _autograd.LogSoftmax, input, dim, *options)


def logsumexp(
    input: Tensor,
    dim: int | Sequence[int],
    keepdim: bool = False,
    *,
    mask: Tensor | None = None,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    r"""Logarithm of the sum of exponentials along one dimension.

    .. math:: \operatorname{LSE}(z) = \log \sum_j e^{z_j}

    with :math:`z` = ``input`` along ``dim``. There is no temperature: the
    smooth maximum at temperature T is ``T * logsumexp(z / T, dim)``.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
            Integers and bool are promoted to the default float, as in
            PyTorch.
        dim: the class dimension, in [-ndim, ndim), or a tuple or list of
            several, added up together; an empty one stands for all.
        keepdim: whether the result keeps ``dim`` with size 1.
        mask: boolean, broadcastable to ``input``; True takes part.
        dtype: the format to cast ``input`` to before computing, and that of
            the result.
        out: a tensor to write to, as in :func:`softmax`.

    Returns:
        The log-sum-exp (nats), of the shape of ``input`` without ``dim``.

        A row of -inf only, a fully masked row and a row of no entries give
        -inf; +inf gives +inf; NaN gives NaN, that row only. The gradient is
        the softmax: NaN on a row of -inf only, but zero where masked; at a
        logit of +inf NaN, and 0 at the others of its row.

    Raises:
        TypeError, IndexError, NotImplementedError, RuntimeError: as
            :func:`softmax`, but for integers and bool.

    Accuracy, worst case over all finite inputs, with s the largest of
    \|LSE\|, \|max z\| and log K: 0.5 ulp of the result and 2\ :sup:`-50` s
    for float16, bfloat16 and float32; 4 ulp of s for float64. Not of the
    result alone: near its zero set, where max z + log(sum) cancels, the
    problem is ill-conditioned, and no fixed precision mends that. Compiled,
    exported and shape-only as :func:`softmax`.

    Complexity: as :func:`softmax`, without an output of the input's size.
    The time hardly depends on the values: at most a third more where
    rows are so confident that their sum needs a second look.

    Example:
        >>> import torch
        >>> from softmaxlib import logsumexp
        >>> logsumexp(torch.tensor([0.0, -40.0]), dim=0)
        tensor(4.2484e-18)

    Derived in the chapter *Softmax on a computer*. Source: Blanchard, Higham
    and Higham (2021), doi:10.1093/imanum/draa038.
    """
    name = "logsumexp"
    x = _converted(name, input, dtype, promote=True)
    keepdim = _check.flag(name, "keepdim", keepdim)
    several = dim if isinstance(dim, tuple | list) else (dim,)
    dims = _check.dimensions(name, several, x.ndim)
    mask = _check.mask(name, mask, x)
    shape = [1 if d in dims else size for d, size in enumerate(x.shape)]
    if not keepdim:
        shape = [size for d, size in enumerate(x.shape) if d not in dims]
    last = dims[0]
    if len(dims) > 1:
        x, last = _together(x, dims), x.ndim - len(dims)
        mask = mask if mask is None else _together(mask, dims)
    if out is None:
        return _autograd.LogSumExp.call(x, mask, last, 1.0).view(shape)
    arguments = x, mask, last, 1.0
    return _write(name, _autograd.LogSumExp, arguments, shape, out)


def naive_softmax(input: Tensor, dim: int) -> Tensor:
    r"""The textbook formula, unshifted: this book's foil, not for use.

    .. math:: p_i = \frac{e^{z_i}}{\sum_j e^{z_j}}

    Computed as written, in the format of ``input``. The exponentials
    overflow (inf / inf is NaN), their sum overflows (all probabilities 0) or
    they all underflow (0 / 0 is NaN); otherwise it is a fair softmax.

    Args:
        input: logits of any shape, floating point.
        dim: the class dimension, in [-ndim, ndim).

    Returns:
        What the formula gives, of the shape of ``input``.

    Raises:
        Whatever PyTorch raises: this function checks nothing.

    Complexity: O(n) time, three tensors of the size of the input.

    Example:
        >>> import torch
        >>> from softmaxlib import naive_softmax
        >>> naive_softmax(torch.tensor([88.5, 88.5]), dim=0)
        tensor([0., 0.])

    Examined in the chapter *Softmax on a computer*.
    """
    exponentials = torch.exp(input)
    return exponentials / exponentials.sum(dim, keepdim=True)


def _evaluate(
    name: str,
    operation: type[_autograd.Operation],
    input: Tensor,
    dim: int,
    temperature: float,
    mask: Tensor | None,
    dtype: torch.dtype | None,
    out: Tensor | None,
) -> Tensor:
    """Check the arguments, then compute, freshly or into `out`."""
    x = _converted(name, input, dtype)
    dim = _check.dimension(name, dim, x.ndim)
    temperature = _check.temperature(name, temperature)
    mask = _check.mask(name, mask, x)
    arguments = x, mask, dim, temperature
    if out is None:
        return operation.call(*arguments)
    return _write(name, operation, arguments, x.shape, out)


def _write(
    name: str,
    operation: type[_autograd.Operation],
    arguments: tuple[Any, ...],
    shape: Sequence[int],
    out: Tensor,
) -> Tensor:
    """Compute into `out`, directly if it is contiguous and lies apart."""
    x, out = arguments[0], _check.tensor(name, "out", out)
    if _autograd.has_derivatives(x, out):
        why = "out= does not support automatic differentiation, detach"
        raise RuntimeError(f"{name}(): {why}")
    out = _check.out(name, out, shape, x)
    direct = x.ndim and _autograd.route(x, out) == "kernel"
    if direct and out.is_contiguous() and not _overlap(x, out):
        operation.run(*arguments, out=out)
        return out
    return out.copy_(operation.call(*arguments).view(shape))


def _converted(
    name: str,
    input: Tensor,
    dtype: torch.dtype | None,
    promote: bool = False,
) -> Tensor:
    """The input in the format of the result."""
    x = _check.logits(name, input, dtype, promote)
    wanted = dtype or _autograd.autocast_dtype(name, x)
    return x if wanted is None else x.to(wanted)


def _together(x: Tensor, dims: list[int]) -> Tensor:
    """All of some dimensions as the last one."""
    n = len(dims)
    return x.movedim(dims, list(range(-n, 0))).flatten(-n)


def _overlap(x: Tensor, out: Tensor) -> bool:
    """Whether the two may share memory other than element by element."""
    if x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr():
        return False
    places = [(t.data_ptr(), t.stride(), t.shape) for t in (x, out)]
    return places[0] != places[1]
