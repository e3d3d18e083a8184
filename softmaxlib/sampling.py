"""Draws from the softmax of logits: by inversion, by Gumbel noise, top-k.

The three public functions differ in how they draw from a block of rows; what
they check, the blocks and the shape of the result are one function's.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from softmaxlib import _autograd, _blocks, _check

__all__ = ["gumbel_max", "gumbel_top_k", "sample"]

# Up to this length weights are computed in float64 whatever the input.
_SHORT = 2**12

_Random = torch.Generator | None
# Indices (..., n), or None where a row has no distribution.
_Index = Tensor | None
# What makes them of logits (..., K), -inf where masked, of n and of T.
_Draw = Callable[[Tensor, int, float, _Random], _Index]


def sample(
    input: Tensor,
    num_samples: int,
    dim: int = -1,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Independent draws from the softmax of logits, by inversion.

    .. math::
        P(Y = i) = \frac{e^{z_i / T}}{\sum_j e^{z_j / T}}, \qquad
        Y = \min\{i : w_1 + \dots + w_i > U (w_1 + \dots + w_K)\}

    with the logits :math:`z` = ``input`` along ``dim``, the temperature
    :math:`T` = ``temperature``, the weights :math:`w_i = e^{(z_i - \max z) /
    T}` and :math:`U` uniform on [0, 1). The strict inequality is what keeps
    a class without weight from being drawn, be U = 0 or nearly one.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64.
        num_samples: how many draws from each row, at least 0.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf]. The logits are shifted first and
            divided after. 0 gives the limit, uniform over the arg max set;
            inf is uniform over the classes whose logit is not -inf.
        mask: boolean, broadcastable to ``input``; True takes part.
        generator: a ``torch.Generator`` on the device of ``input``; by
            default PyTorch's own.

    Returns:
        Class indices, int64, of the shape of ``input`` but for the size of
        ``dim``, which is ``num_samples``; contiguous. A 0-d input counts as
        K = 1. An empty batch, or no draws, gives an empty tensor.

        A logit of -inf and a masked entry, whatever its logit, are never
        drawn. The draws of a row are independent and in random order, and
        rows are independent of each other. No gradient flows.

        The same generator state gives the same draws, for the same rows in
        the same order: transposing the class dimension elsewhere, strides,
        or flattening the batch change nothing. A row's draws do depend on
        its place in the batch, on ``num_samples`` and on the device. On the
        device "meta", and for fake tensors, the result has a shape and no
        values, and no row is refused. ``torch.autocast`` changes nothing.

    Raises:
        TypeError: ``input`` is not a tensor, ``num_samples`` or ``dim`` not
            an integer of Python or NumPy, ``temperature`` not a number,
            ``mask`` not boolean.
        IndexError: ``dim`` is out of range.
        ValueError: ``num_samples`` or ``temperature`` is negative; a row
            holds NaN or +inf, or has no class that may be drawn: it is
            empty, fully masked or all -inf.
        NotImplementedError: ``input`` is integer, bool, an 8-bit float,
            complex or sparse.
        RuntimeError: ``mask`` cannot be broadcast, or is on another device;
            ``torch.vmap`` maps over ``input`` or ``mask`` (pass the batch as
            leading dimensions), or ``torch.jit.trace`` is at work.
            ``torch.compile`` breaks its graph here, and raises an error of
            its own with ``fullgraph=True``: whether a row has a distribution
            depends on its values.

    Accuracy: the weights are computed in float64 up to K = 4096 and for
    float64, else in float32, good to 3e-7 (1 + (max z - z) / T) relative
    while (max z - z) / T < 80, and zero from 104 on; they are added up in
    float64. Uniform numbers have 53 bits: a draw has its probability, as the
    sums give it, to 5e-16.

    Complexity, for n draws from each row: O(K + n log K) time a row; besides
    the result a few blocks of 2 MiB, or rows of K or n entries if those are
    longer, never a float64 copy of a large batch. A mask, and a class
    dimension that is not the last of three or more, cost a copy of the
    input in its own format.

    Example:
        >>> import torch
        >>> from softmaxlib import sample
        >>> logits = torch.tensor([0.0, 3.0, -torch.inf, 3.0])
        >>> draws = sample(logits, 1000, temperature=0)
        >>> draws.shape, draws.unique().tolist()
        (torch.Size([1000]), [1, 3])
        >>> sample(logits.expand(2, 4), 0, dim=0).shape
        torch.Size([0, 4])

    Derived in the chapter *Sampling*. Inversion: Devroye
    (1986), *Non-Uniform Random Variate Generation*, chapters II and III,
    doi:10.1007/978-1-4613-8643-8.
    """
    options = dim, temperature, mask, generator
    return _draw(_invert, "sample", input, num_samples, options)


def gumbel_max(
    input: Tensor,
    num_samples: int,
    dim: int = -1,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Independent draws from the softmax of logits, by the Gumbel trick.

    .. math::
        Y = \operatorname{arg\,max}_i \left(\frac{z_i}{T} + G_i\right),
        \qquad G_i = -\log(-\log U_i)

    with the logits :math:`z` = ``input`` along ``dim``, the temperature
    :math:`T` = ``temperature`` and independent uniform :math:`U_i`. The
    index of the largest noisy logit has the softmax as its distribution,
    with no exponential and no sum. :func:`sample` draws from the same
    distribution at a fraction of the cost.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64.
        num_samples: how many draws from each row, at least 0.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf], as in :func:`sample`.
        mask: boolean, broadcastable to ``input``; True takes part.
        generator: a ``torch.Generator`` on the device of ``input``; by
            default PyTorch's own.

    Returns:
        Class indices, int64, of the shape of ``input`` but for the size of
        ``dim``, which is ``num_samples``; contiguous. Infinities, masks,
        empty tensors and the meaning of ``generator`` are as in
        :func:`sample`, but not the draws that it gives.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError, RuntimeError:
            as :func:`sample`.

    Accuracy: float64 throughout, whatever the input. U has 53 bits, so that
    probabilities below 1e-16 are not resolved.

    Complexity, for n draws from each row: O(n K) time a row; besides the
    result a few blocks of 2 MiB, or rows of K or n entries if those are
    longer.

    Example:
        >>> import torch
        >>> from softmaxlib import gumbel_max
        >>> logits = torch.tensor([0.0, 3.0, -torch.inf, 3.0])
        >>> draws = gumbel_max(logits, 1000, temperature=0)
        >>> draws.shape, draws.unique().tolist()
        (torch.Size([1000]), [1, 3])

    Derived in the chapter *Sampling*. Source: Gumbel (1954), *Statistical
    Theory of Extreme Values*; Yellott (1977),
    doi:10.1016/0022-2496(77)90026-8; Maddison, Tarlow and Minka (2014),
    arXiv:1411.0030.
    """
    options = dim, temperature, mask, generator
    return _draw(_noisy_max, "gumbel_max", input, num_samples, options)


def gumbel_top_k(
    input: Tensor,
    k: int,
    dim: int = -1,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draws without replacement: the k largest of the noisy logits.

    .. math::
        P(Y_1, \dots, Y_k) = \prod_{r=1}^{k}
        \frac{e^{z_{Y_r} / T}}{\sum_{j \notin \{Y_1, \dots, Y_{r-1}\}}
        e^{z_j / T}}

    with the logits :math:`z` = ``input`` along ``dim`` and the temperature
    :math:`T` = ``temperature``: the indices of the k largest of
    :math:`z_i / T + G_i` with independent Gumbel noise :math:`G_i`, in
    descending order. Each is a draw from the softmax of the classes left.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64.
        k: how many different classes to draw from each row: at least 0 and
            at most the number that may be drawn, -inf and masked entries
            apart.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf]. 0 gives the limit, the k largest
            logits in descending order, ties in random order; inf gives
            random k of the classes, in random order.
        mask: boolean, broadcastable to ``input``; True takes part.
        generator: a ``torch.Generator`` on the device of ``input``; by
            default PyTorch's own.

    Returns:
        Class indices, int64, of the shape of ``input`` but for the size of
        ``dim``, which is k; different along ``dim``, in the order in which
        they were drawn; contiguous. Infinities, masks, empty tensors and the
        meaning of ``generator`` are as in :func:`sample`.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError, RuntimeError:
            as :func:`sample`; and ValueError where k exceeds the number of
            classes that may be drawn.

    Accuracy: float64 throughout, whatever the input. Where the logits lie so
    far apart that float64 would round the noise away, sums of logit and
    noise are compared exactly, to twice its digits.

    Complexity: O(K log k) time a row, O(K log K) where the logits lie that
    far apart; besides the result a few blocks of 2 MiB, or rows if those are
    longer.

    Example:
        >>> import torch
        >>> from softmaxlib import gumbel_top_k
        >>> logits = torch.tensor([0.0, 3.0, -torch.inf, 2.0])
        >>> gumbel_top_k(logits, 3, temperature=0)
        tensor([1, 3, 0])
        >>> gumbel_top_k(logits, 3).sort().values
        tensor([0, 1, 3])

    Derived in the chapter *Sampling*. Source: Yellott (1977),
    doi:10.1016/0022-2496(77)90026-8; Kool, van Hoof and Welling (2019),
    arXiv:1903.06059.
    """
    options = dim, temperature, mask, generator
    return _draw(_noisy_top_k, "gumbel_top_k", input, k, options)


# --- what the three share ------------------------------------------------


def _draw(
    draw: _Draw, function: str, input: Any, count: Any, options: Any
) -> Tensor:
    """Check the arguments, draw, and put the draws in the place of K."""
    dim, temperature, mask, generator = options
    x = _check.logits(function, input, None).detach()
    dim = _check.dimension(function, dim, x.ndim)
    temperature = _check.temperature(function, temperature)
    name = "k" if function == "gumbel_top_k" else "num_samples"
    count = _check.integer(function, name, count, 0)
    mask = _check.mask(function, mask, x)
    x = x if mask is None else x.masked_fill(~mask, -math.inf)
    _autograd.refuse_batches(function, x)
    if dim + 1 != x.ndim:
        x = x.movedim(dim, -1) if x.ndim else x.view(1)
    index = _blockwise(draw, x, count, temperature, generator)
    if index is None:
        _refuse(function, x, count if name == "k" else 1)
    return index.movedim(-1, dim).contiguous()


def _blockwise(
    draw: _Draw, x: Tensor, n: int, t: float, random: _Random
) -> _Index:
    """Draw from one block of rows after another."""
    *batch, classes = x.shape
    shape, rows = (*batch, n), math.prod(batch)
    if 0 in shape or _autograd.is_shape_only(x):
        return x.new_empty(shape, dtype=torch.int64)
    if not classes:
        return None
    size = max(1, _blocks.SIZE // max(classes, n))
    if rows <= size:
        # Contiguous: in another order of memory exp2 may round otherwise.
        return draw(x.contiguous(), n, t, random)
    index = x.new_empty((rows, n), dtype=torch.int64)
    parts = torch.split(x.reshape(rows, classes), size)
    for part, into in zip(parts, torch.split(index, size), strict=True):
        some = draw(part.contiguous(), n, t, random)
        if some is None:
            return None
        into.copy_(some)
    return index.view(shape)


def _refuse(function: str, x: Tensor, least: int) -> NoReturn:
    """Raise in words about the first row from which nothing can be drawn."""
    strange, possible = ~(x < math.inf), (x > -math.inf).sum(-1)
    bad = strange.any(-1) | (possible < least)
    row = tuple(bad.nonzero()[0].tolist())
    if strange[row].any():
        kind = "NaN" if x[row].isnan().any() else "+inf"
        what = f"holds {kind}; mask the entry, or find out where it is from"
    else:
        cure = "allow more classes" if least == 1 else "pass a smaller k"
        what = (
            f"has {possible[row]} of {x.shape[-1]} classes to draw from, "
            f"logits that are -inf or masked apart, expected at least "
            f"{least}; leave such rows out, or {cure}"
        )
    name = f"row {row} of input" if row else "input"
    raise ValueError(f"{function}(): {name} {what}")


def _exponents(x: Tensor, t: float, dtype: torch.dtype) -> Tensor:
    """(x - max) / T, -inf where nothing may be drawn.

    The largest of a row is 0, or not finite where that of `x` is not.
    """
    return _blocks.exponents(x, x.amax(-1, keepdim=True).to(dtype), t)


# --- one block of rows ---------------------------------------------------


def _invert(x: Tensor, n: int, t: float, random: _Random) -> _Index:
    """The first class whose cumulative weight exceeds u times the total.

    As u is at most 1 - 2**-53, that product is below the total also when
    rounded: it is exact where the total is a power of two, and elsewhere more
    than half of the spacing below the total.
    """
    dtype = wide = _blocks.work_dtype(x)
    narrow = x.shape[-1] > _SHORT and x.dtype != torch.float64
    if narrow and 2.0**-100 < t < 2.0**100:  # lest float32 overflow
        dtype = torch.float32
    if t == 1 and x.numel() <= _SHORT:
        # One call: with few numbers it is the calls that cost.
        weights = x.softmax(-1, dtype)
    else:
        # In place, and exp2, which is several times faster than exp.
        z = _exponents(x, t, dtype).mul_(math.log2(math.e))
        weights = z.exp2_().to(wide)
    sums = weights.cumsum_(-1) if x.is_cpu else _ascending(weights)
    total = sums.narrow(-1, -1, 1)
    if not total.min().item() > 0:
        return None
    u = sums.new_empty((*x.shape[:-1], n)).uniform_(generator=random)
    return torch.searchsorted(sums, u.mul_(total), right=True)


def _ascending(weights: Tensor) -> Tensor:
    """Cumulative sums that rise where the weight is positive, and only there.

    Added up in parallel, they may go up or down where it is zero.
    """
    return weights.cumsum(-1).masked_fill(weights == 0, 0).cummax(-1)[0]


def _noisy_max(x: Tensor, n: int, t: float, random: _Random) -> _Index:
    """The largest of the noisy logits, for a block of draws at a time."""
    z = _exponents(x, t, _blocks.work_dtype(x))
    if z.amax(-1).any():
        return None
    index = x.new_empty((n, *x.shape[:-1]), dtype=torch.int64)
    for some in torch.split(index, max(1, _blocks.SIZE // z.numel())):
        noise = _gumbel((len(some), *z.shape), z, random)
        torch.argmax(noise.add_(z), -1, out=some)
    return index.movedim(0, -1)


def _noisy_top_k(x: Tensor, k: int, t: float, random: _Random) -> _Index:
    """The k largest of the noisy logits, in descending order."""
    z = _exponents(x, t, _blocks.work_dtype(x))
    possible = x > -math.inf
    if z.amax(-1).any() or possible.sum(-1).min() < k:
        return None
    noise = _gumbel(z.shape, z, random)
    # Up to 2**20 float64 holds the sum of exponent and noise to 2**-33.
    if (possible & (z < -(2.0**20))).any():
        return _exact_order(x, noise, t)[..., :k]
    return noise.add_(z).topk(k).indices


def _gumbel(shape: tuple[int, ...], z: Tensor, random: _Random) -> Tensor:
    """Standard Gumbel noise in the format of `z`, always finite."""
    u = z.new_empty(shape).uniform_(generator=random)
    # 0 is drawn every 2**53 times. 1 is not, so that log(u) < 0.
    u.clamp_(min=torch.finfo(u.dtype).eps / 4)
    return u.log_().neg_().log_().neg_()


def _exact_order(x: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Indices in descending order of x + T G, to twice 53 bits.

    Unlike (x - max) / T + G it needs no shift that would round the smaller
    logits away, and the noise is not lost beside a large one: the sum is
    split into its rounded value and the rest, which is NaN for logits of
    -inf. Ties go on to the rest, and then to the noise.
    """
    if temperature > 1:
        # Lest the product overflow; the powers of two cancel.
        x, temperature = x * 2.0**-8, temperature * 2.0**-8
    addend = noise * temperature
    high = x + addend
    back = high - x
    low = (x - (high - back)) + (addend - back)
    order = noise.argsort(-1, descending=True)
    for key in (-low, -high):
        order = order.gather(-1, key.gather(-1, order).argsort(stable=True))
    return order
