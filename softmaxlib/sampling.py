"""Draws from the softmax of logits: by inversion, by Gumbel noise, top-k.

The three public functions check their arguments alike and see the input as
rows of logits, -inf where masked; a row whose largest logit is not finite
has no distribution and is refused in words.
"""

import math

import numpy as np
import torch
from torch import Tensor

from softmaxlib import _arguments, _kernels

__all__ = ["gumbel_max", "gumbel_top_k", "sample"]

# Elements of a block: 2**18 float64 numbers (2 MiB) stay in cache.
_BLOCK = 2**18
# Up to this length weights are computed in float64 whatever the input.
_SHORT = 2**12
# Up to this many classes it is fastest to compare with every threshold: a
# binary search mispredicts a branch a step.
_FEW = 16
# Up to this many where a row is drawn alone: a single one, or each of a batch
# from so many draws on; how many of them are compared at a time.
_FEW_ALONE, _ALONE, _STRIP = 32, 2**12, 2**14
# From this many draws on, a search in order pays for the permutation.
_SORTED = 512
# The integers that are drawn for it: the smallest of 64 bits, taken apart
# into two without a sign, of which this is the largest.
_LOWEST, _LARGEST = -(2**63), 2**32 - 1
# A total that is one but for rounding.
_ABOVE = 1 + 2.0**-50

# Where float32 exponents (z - max) / T neither overflow nor vanish wrongly.
_MODERATE = 2.0**100
# Up to this exponent float64 holds the sum with a Gumbel noise to 2**-33.
_RESOLVED = 2.0**20


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
        its place in the batch, on ``num_samples`` and on the device.

    Raises:
        TypeError: ``input`` is not a tensor, ``num_samples`` or ``dim`` not
            an int, ``temperature`` not a number, ``mask`` not boolean.
        IndexError: ``dim`` is out of range.
        ValueError: ``num_samples`` or ``temperature`` is negative; a row
            holds NaN or +inf, or has no class that may be drawn: it is
            empty, fully masked or all -inf.
        NotImplementedError: ``input`` is integer, bool, an 8-bit float,
            complex or sparse.
        RuntimeError: ``mask`` cannot be broadcast, or is on another device.

    Accuracy: the weights are computed in float64 up to K = 4096 and for
    float64, else in float32, good to 3e-7 (1 + (max z - z) / T) relative
    while (max z - z) / T < 80, and zero from 104 on; they are added up in
    float64. Uniform numbers have 53 bits. For up to 32 classes, in a single
    row or from 4096 draws on, they have 32 bits and the sums are rounded at
    random: a draw has its probability to 5e-16, as float64 sums give it, and
    the probability of two draws is the product of theirs to 2e-20.

    Complexity, for n draws from each row: O(K + n log K) time a row; besides
    the result a few blocks of 2 MiB, or rows of K or n entries if those are
    longer, never a float64 copy of a large batch. On a CPU many draws are
    made in sorted order and then permuted at random, so that the search finds
    its branches predicted and its table in cache. For up to 16 classes,
    or 32 as said above, each number is compared with every sum.

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
    x, dim, temperature = _prepare(
        "sample", input, "num_samples", num_samples, dim, temperature, mask
    )
    if x.ndim == 1 and num_samples and x.shape[0]:
        index = _invert(x, num_samples, temperature, generator)
        if index is None:
            _refuse("sample", x)
        return index
    rows = _rows("sample", x, num_samples)
    index = rows.new_empty((len(rows), num_samples), dtype=torch.int64)
    classes = rows.shape[1]
    entries = max(classes, num_samples, 1)
    if classes <= _FEW and num_samples < _ALONE:
        entries = max(classes * num_samples, 1)
    size = max(1, _BLOCK // entries)
    for start in range(0, len(rows) if num_samples else 0, size):
        at = slice(start, start + size)
        # Contiguous: in another order of memory exp2 may round otherwise.
        block = rows[at].contiguous()
        some = _invert(block, num_samples, temperature, generator)
        if some is None:
            _refuse("sample", x)
        index[at] = some
    return _restore(index, x, dim)


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
    result a block of 2 MiB of noise, or one row if that is longer.

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
    x, dim, temperature = _prepare(
        "gumbel_max",
        input,
        "num_samples",
        num_samples,
        dim,
        temperature,
        mask,
    )
    rows = _rows("gumbel_max", x, num_samples)
    # One line of draws after the other, so that blocks need no transpose.
    index = rows.new_empty((num_samples, len(rows)), dtype=torch.int64)
    size = max(1, _BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows) if num_samples else 0, size):
        at = slice(start, start + size)
        z = _finite_exponent("gumbel_max", rows[at], x, temperature)
        draws = max(1, _BLOCK // z.numel())
        for first in range(0, num_samples, draws):
            here = slice(first, first + draws)
            noise = _gumbel((len(index[here]), *z.shape), z, generator)
            index[here, at] = noise.add_(z).argmax(-1)
    return _restore(index.t(), x, dim)


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
    x, dim, temperature = _prepare(
        "gumbel_top_k", input, "k", k, dim, temperature, mask
    )
    rows = _rows("gumbel_top_k", x, k)
    index = rows.new_empty((len(rows), k), dtype=torch.int64)
    size = max(1, _BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows) if k else 0, size):
        at = slice(start, start + size)
        some = rows[at]
        z = _finite_exponent("gumbel_top_k", some, x, temperature)
        possible = some > -math.inf
        if possible.sum(-1).min() < k:
            _too_few(k, x)
        noise = _gumbel(z.shape, z, generator)
        spread = z.masked_fill(~possible, 0).amin()
        if 0 < temperature < math.inf and spread < -_RESOLVED:
            order = _exact_order(some, noise, temperature)
        elif temperature == 0:
            order = _order(noise, some)
        else:
            order = noise.add_(z).topk(k).indices
        index[at] = order[:, :k]
    return _restore(index, x, dim)


# --- arguments and results -----------------------------------------------


def _prepare(function, input, name, count, dim, temperature, mask):
    """The logits (*batch, K), -inf where masked; dimension; temperature."""
    x = _arguments.logits(function, input, None)
    dim = _arguments.dimension(function, dim, x.ndim)
    temperature = _arguments.temperature(function, temperature)
    if type(count) is not int:
        raise TypeError(
            f"{function}(): {name} must be an int, got "
            f"{type(count).__name__} {count!r}"
        )
    if count < 0:
        raise ValueError(
            f"{function}(): {name} must be at least 0, got {count}"
        )
    if x.requires_grad:
        x = x.detach()
    if mask is not None:
        mask = _arguments.mask(function, mask, x)
        x = x.masked_fill(~mask, -math.inf)
    if x.ndim == 0:
        x = x.reshape(1)
    return x if dim == x.ndim - 1 else x.movedim(dim, -1), dim, temperature


def _rows(function: str, x: Tensor, count: int) -> Tensor:
    """The logits as (rows, K), some K, if anything is to be drawn."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    if len(rows) and count and not x.shape[-1]:
        _refuse(function, x)
    return rows


def _restore(index: Tensor, x: Tensor, dim: int) -> Tensor:
    """Indices (rows, n), with the batch of `x` and n in the place of K."""
    index = index.reshape(*x.shape[:-1], index.shape[-1])
    return index.movedim(-1, dim).contiguous()


def _refuse(function: str, x: Tensor):
    """Raise in words about the first row without a distribution."""
    if not x.shape[-1]:
        raise ValueError(
            f"{function}(): there are no classes to draw from: the size of "
            f"the class dimension is 0"
        )
    top = x.amax(-1)
    position = tuple(torch.nonzero(~top.isfinite())[0].tolist())
    value = top[position].item()
    if value == -math.inf:
        what = "has no class to draw: every logit is -inf or masked"
        cure = "leave such rows out, or allow one of their classes"
    else:
        what = f"holds {'NaN' if math.isnan(value) else '+inf'}"
        cure = "mask the entry, or find out where it comes from"
    raise ValueError(f"{function}(): {_named(position)} {what}; {cure}")


def _too_few(k: int, x: Tensor):
    counts = (x > -math.inf).sum(-1)
    position = tuple(torch.nonzero(counts < k)[0].tolist())
    raise ValueError(
        f"gumbel_top_k(): k = {k} draws without replacement, but "
        f"{_named(position)} has only {counts[position]} of "
        f"{x.shape[-1]} classes whose logit is not -inf or masked; pass a "
        f"smaller k, or draw with replacement by sample()"
    )


def _named(position: tuple) -> str:
    """A row in words, by its index in the dimensions other than `dim`."""
    return f"row {position} of input" if position else "input"


# --- arithmetic ----------------------------------------------------------


def _exponent(x: Tensor, top: Tensor, temperature: float, dtype) -> Tensor:
    """(x - top) / T as a new tensor, -inf where nothing may be drawn.

    NaN, in every entry or in that of the largest logit, where `top` is not
    finite.
    """
    if temperature == 0:
        drawn = x == top
    elif temperature == math.inf:
        drawn = x > -math.inf
    else:
        if temperature > 2.0**1000:
            # Lest a difference overflow that the division would bring back.
            x, top, temperature = x * 0.5, top * 0.5, temperature * 0.5
        z = x.to(dtype) - top.to(dtype)
        return z if temperature == 1 else z.div_(temperature)
    z = torch.zeros(x.shape, dtype=dtype, device=x.device)
    # top - top is 0, or NaN.
    return z.masked_fill_(~drawn, -math.inf).add_((top - top).to(dtype))


def _finite_exponent(function, rows, x, temperature) -> Tensor:
    top = rows.amax(-1, keepdim=True)
    if not top.isfinite().all():
        _refuse(function, x)
    dtype = _kernels.work_dtype(rows.device)
    return _exponent(rows, top, temperature, dtype)


def _weights(x: Tensor, temperature: float) -> Tensor:
    """exp((x - max) / T), in float32 or float64; NaN for a bad row, or 0."""
    top = x.amax(-1, keepdim=True)
    dtype = _kernels.work_dtype(x.device)
    fast = x.shape[-1] > _SHORT and x.dtype != torch.float64
    if fast and 1 / _MODERATE <= temperature <= _MODERATE:
        dtype = torch.float32
    z = _exponent(x, top, temperature, dtype)
    # exp2 is several times faster than exp.
    return z.mul_(math.log2(math.e)).exp2_()


def _cumulative(x: Tensor, temperature: float) -> Tensor:
    """Cumulative sums of the weights of each row, NaN for a bad one."""
    dtype = _kernels.work_dtype(x.device)
    if temperature == 1 and x.shape[-1] <= _SHORT:
        return _accumulate(torch.softmax(x, -1, dtype=dtype))
    return _accumulate(_weights(x, temperature).to(dtype))


def _accumulate(weights: Tensor) -> Tensor:
    """Cumulative sum, in place, constant exactly where a weight is zero."""
    if weights.device.type == "cpu":
        return weights.cumsum_(-1)
    return _monotone(weights.cumsum(-1), weights)


def _monotone(sums: Tensor, weights: Tensor) -> Tensor:
    """Mend cumulative sums added up in parallel, which may go up or down."""
    return sums.masked_fill_(weights == 0, 0).cummax(-1).values


def _invert(x: Tensor, n: int, temperature: float, generator):
    """n draws from each row of `x`, (rows, K) or (K,); None if one is bad.

    u < 1 times a total is below the total also when rounded: for u = 1 -
    2**-53, the largest, the product lies in the middle of two neighbours if
    the total is a power of two, where the spacing below is half as wide, and
    nearer to the lower neighbour everywhere else.
    """
    classes = x.shape[-1]
    if (
        classes <= _FEW_ALONE
        and x.is_cpu
        and (n >= _ALONE or x.numel() == classes)
    ):
        return _invert_few(x, n, temperature, generator)
    many = classes > _FEW and n >= _SORTED and x.is_cpu
    sums = _cumulative(x, temperature)
    total = sums.select(-1, -1)
    smallest = total.item() if x.ndim == 1 else total.min().item()
    if not smallest > 0:
        return None
    u = torch.rand(
        (*x.shape[:-1], n),
        dtype=sums.dtype,
        device=x.device,
        generator=generator,
    )
    if x.ndim > 1:
        u.mul_(total.unsqueeze(-1))
    elif not 1 <= smallest <= _ABOVE:
        u.mul_(smallest)
    if many:
        numbers = u.numpy()
        numbers.sort(-1)
        if x.ndim == 1:
            index = _search(sums.numpy(), numbers)
        else:
            rows = zip(sums.numpy(), numbers, strict=True)
            index = np.stack([_search(*row) for row in rows])
        return _permute(torch.from_numpy(index), generator)
    if classes > _FEW or n >= _ALONE:
        return torch.searchsorted(sums, u, right=True)
    return (u.unsqueeze(-2) >= sums.unsqueeze(-1)).sum(-2)


def _invert_few(x: Tensor, n: int, temperature: float, generator):
    """The same on a CPU, for rows of few classes and one after the other.

    For a thousand draws of five classes an operation costs what it costs to
    call: Python's numbers for the weights, NumPy for the rest.
    """
    if not 1 / _MODERATE <= temperature <= _MODERATE:
        top = x.amax(-1, keepdim=True)
        x, temperature = _exponent(x, top, temperature, torch.float64), 1.0
    if x.ndim == 1 and n <= _STRIP:
        sums = _sums(x.tolist(), temperature)
        if sums is None:
            return None
        draws = _strip(sums, n, generator)
        return torch.from_numpy(draws.astype(np.int64))
    rows = x.reshape(-1, x.shape[-1]).tolist()
    all_sums = [_sums(row, temperature) for row in rows]
    if None in all_sums:
        return None
    draws = np.empty((*x.shape[:-1], n), np.int64)
    for row, sums in zip(draws.reshape(-1, n), all_sums, strict=True):
        for start in range(0, n, _STRIP):
            size = min(_STRIP, n - start)
            row[start : start + size] = _strip(sums, size, generator)
    return torch.from_numpy(draws)


def _sums(logits: list[float], temperature: float):
    """Cumulative sums of the weights from zero on; None for a bad row."""
    top, total = max(logits), 0.0
    sums = [total]
    for z in logits:
        total += math.exp((z - top) / temperature)
        sums.append(total)
    return sums if total > 0 else None


def _strip(sums: list[float], n: int, generator):
    """n draws from uniform integers of 32 bits, as an array of int8.

    One more integer rounds the sums to 32 bits, up as often as their other
    bits say: each draw has the probability that the sums give it to 64 bits.
    The rounding is all that the draws of a strip share; it moves the
    probability of what two of them are by at most 2**-66.
    """
    bits = np.empty(n // 2 + 1, np.int64)
    torch.from_numpy(bits).random_(_LOWEST, None, generator=generator)
    bits = bits.view(np.uint32)
    rounding = int(bits[n])
    total = sums[-1]
    # Where the classes 1, 2, ... begin. One that begins at the total, because
    # no weight is left for it, begins beyond all integers.
    begin = [
        b
        for part in sums[1:-1]
        if (b := int(part / total * 2.0**64) + rounding >> 32) <= _LARGEST
    ]
    reached = bits[:n] >= np.array(begin, np.uint32)[:, None]
    return np.add.reduce(reached, 0, np.int8)


def _search(sums, u):
    """Which classes the ascending numbers `u` fall into, by their sums.

    A search for sorted numbers finds its branches predicted and its table in
    cache. Where there are fewer classes than numbers, the ends of the classes
    are searched for among the numbers.
    """
    if 2 * len(sums) > len(u):
        return sums.searchsorted(u, "right")
    counts = np.diff(u.searchsorted(sums), prepend=0)
    return np.arange(len(sums)).repeat(counts)


def _permute(index: Tensor, generator) -> Tensor:
    """Each row in random order.

    A random permutation, independent of sorted values, makes an independent
    sequence of them again. Every row needs its own: with a common one, the
    rows would rise and fall together.
    """
    n = index.shape[-1]
    if index.ndim == 1:
        order = torch.randperm(n, generator=generator, device=index.device)
        return index.index_select(0, order)
    order = torch.empty_like(index)
    for row in order:
        torch.randperm(n, generator=generator, out=row, device=row.device)
    return index.gather(-1, order)


def _gumbel(shape, like: Tensor, generator) -> Tensor:
    """Standard Gumbel noise, always finite."""
    u = torch.empty(shape, dtype=like.dtype, device=like.device)
    u.uniform_(generator=generator)
    # 0 is drawn every 2**53 times. 1 is not, so that log(u) < 0.
    u.clamp_(min=torch.finfo(u.dtype).eps / 4)
    return u.log_().neg_().log_().neg_()


def _order(*keys: Tensor) -> Tensor:
    """Indices in descending order of the last key, ties by those before."""
    order = keys[0].argsort(-1, descending=True)
    for key in keys[1:]:
        here = key.gather(-1, order)
        step = here.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, step)
    return order


def _exact_order(rows, noise, temperature) -> Tensor:
    """Indices in descending order of x + T G, to twice 53 bits.

    Unlike (x - max) / T + G it needs no shift that would round the smaller
    logits away, and the noise is not lost beside a large one: the sum is
    split into its rounded value and the rest, and ties go on to the rest.
    """
    x = rows.to(noise.dtype)
    if temperature > 1:
        # Lest the product overflow; the powers of two cancel.
        x, temperature = x * 2.0**-8, temperature * 2.0**-8
    addend = noise * temperature
    high = x + addend
    back = high - x
    low = (x - (high - back)) + (addend - back)
    # -inf where x is: the rest would be NaN.
    low.masked_fill_(x == -math.inf, -math.inf)
    return _order(noise, low, high)
