"""Softmax in pieces: states that are updated, merged, and read at the end.

A state stands for the logits seen so far by their largest, the sum of their
weights and, for attention, the weighted sum of values. States form a
commutative monoid: pieces may come in any order and be merged in any tree.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from softmaxlib import _blocks, _check

__all__ = ["OnlineSoftmax", "streaming_logsumexp", "streaming_softmax"]

_NOTHING, _NO_WEIGHT = torch.tensor([-math.inf]), torch.tensor([0.0])


@dataclasses.dataclass(frozen=True, eq=False)
class OnlineSoftmax:
    r"""What is known of rows of logits of which some chunks were seen.

    .. math::
        (m, s, o) \oplus (n, t, r) = (M,\; s e^{m-M} + t e^{n-M},\;
        o e^{m-M} + r e^{n-M}), \qquad M = \max(m, n)

    with the largest logit :math:`m` = ``top``, the sum :math:`s` = ``total``
    of the weights :math:`e^{z_i - m}` and the weighted sum of the values
    :math:`o` = ``values``. The identity is ``OnlineSoftmax()``: :math:`m =
    -\infty`, :math:`s = 0`. The shift is guarded, so that nothing seen, or
    logits of -inf only, give no NaN.

    A state never changes: :meth:`update` and :meth:`merge` return new ones.
    Make states with these, not from tensors.

    Attributes:
        top: the largest logits, shape (\*batch, 1), in the working format:
            float64 for every format, float32 on a device without float64.
        total: the sums of the weights, likewise.
        values: the weighted sums of the values, shape (\*batch, V), or None.
        dtype: the format of the chunks and of the results; None if there
            was no chunk.

    Special values, read off at the end: a row of -inf or masked logits only
    has the log-sum-exp -inf; one with +inf has +inf, one with NaN has NaN,
    that row only. :meth:`finalize` and :meth:`softmax` say what they give.

    Accuracy: for float16, bfloat16 and float32 that of
    :func:`softmaxlib.logsumexp` and :func:`softmaxlib.softmax`, 0.5 ulp and
    a hair, in any order of up to 2**20 chunks. For float64 a chunk costs up
    to 3 ulp of the sum, and a probability as many more as its logit is units
    below the largest. The grouping changes the last bits.

    Derivatives: plain operations, so of any order and under ``torch.func``;
    the shift is held constant, as no result depends on it. That of the
    log-sum-exp is the softmax: 0 at -inf, NaN on a row of -inf only, and 0
    where masked. Autograd keeps the weights of all chunks: what streaming
    saves, it saves without gradients.

    Complexity: O(n) time for n logits, O(n V) with values; besides the
    state a float64 copy of the chunk and one of its values.

    Example:
        >>> import torch
        >>> from softmaxlib import OnlineSoftmax
        >>> one = OnlineSoftmax().update(torch.tensor([3.0]))
        >>> two = OnlineSoftmax().update(torch.tensor([5.0, 4.0]))
        >>> one.merge(two).total  # 1 + e**-1 + e**-2
        tensor([1.5032], dtype=torch.float64)
        >>> two.merge(one).logsumexp
        tensor(5.4076)

    Derived in the chapter *From ten classes to a vocabulary*. Source:
    Milakov and Gimelshein (2018), arXiv:1805.02867; with values: Rabe and
    Staats (2021), arXiv:2112.05682.
    """

    top: Tensor = _NOTHING
    total: Tensor = _NO_WEIGHT
    values: Tensor | None = None
    dtype: torch.dtype | None = None

    def update(
        self,
        input: Tensor,
        dim: int = -1,
        *,
        values: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> "OnlineSoftmax":
        r"""The state after one more chunk of logits.

        Args:
            input: logits of any shape, n classes along ``dim``; float16,
                bfloat16, float32 or float64. n = 0 adds nothing.
            dim: the class dimension, in [-ndim, ndim).
            values: the values of these classes, shape (\*, n, V), in the
                dtype of ``input``; multiplied by the weights, with ``dim``
                last, as by ``torch.matmul``. A value that is infinite or NaN
                makes its rows NaN, whatever its weight.
            mask: boolean, broadcastable to ``input``; True takes part.

        Raises:
            TypeError, IndexError, NotImplementedError, RuntimeError: as
                :func:`softmaxlib.softmax`; RuntimeError also for
                ``values`` or a batch of another shape, dtype or device.
            ValueError: some chunks have values and some have none.
        """
        name = "OnlineSoftmax.update"
        x, z = _rows(name, input, dim, mask)
        top = z.new_full((*z.shape[:-1], 1), -math.inf)
        if z.numel():
            top = z.detach().amax(-1, keepdim=True)
        weights = (z - _finite(top)).exp()
        if values is not None:
            v = _check.tensor(name, "values", values)
            shape = (*v.shape[:-2], z.shape[-1], *v.shape[-1:])
            v = _check.like(name, "values", v, x, shape)
            values = weights @ _blocks.widen(v)
        total = weights.sum(-1, keepdim=True)
        return self.merge(OnlineSoftmax(top, total, values, x.dtype))

    def merge(self, other: "OnlineSoftmax") -> "OnlineSoftmax":
        """The state after the chunks of both.

        Raises:
            ValueError: one has values and the other has none.
            RuntimeError: the batches have different shapes or devices.
        """
        name = "OnlineSoftmax.merge"
        if self.dtype is None or other.dtype is None:
            return self if other.dtype is None else other
        n = _check.like(name, "the batch", other.top, self.top, of="self")
        if (self.values is None) != (other.values is None):
            what = f"{name}(): values must come with all chunks or none"
            raise ValueError(f"{what}, got some with and some without")
        top = torch.maximum(self.top, n)
        a, b = ((t - _finite(top)).exp() for t in (self.top, n))
        values, r = self.values, other.values
        if values is not None:
            r = _check.like(name, "values", r, values, of="self")
            values = values * a + r * b
        total = self.total * a + other.total * b
        wider = torch.promote_types(self.dtype, other.dtype)
        return OnlineSoftmax(top, total, values, wider)

    @property
    def logsumexp(self) -> Tensor:
        r"""The log-sum-exp of all chunks, shape (\*batch)."""
        value = self.top + self.total.log()
        value = torch.where(self.top == math.inf, self.top, value)
        return value.squeeze(-1).to(self.dtype or value.dtype)

    def finalize(self) -> Tensor:
        r"""The mean of the values under the softmax of all chunks.

        Returns:
            Shape (\*batch, V). A row without weight, whose logits are all
            -inf or masked, is 0, with zero gradient, as in PyTorch's
            attention; one with +inf or NaN is NaN.

        Raises:
            ValueError: there are no values.
        """
        if self.values is None:
            what = "OnlineSoftmax.finalize(): every chunk must have values"
            raise ValueError(f"{what}, got none; logsumexp needs none")
        total = self.total.masked_fill(self.total == 0, 1)
        return (self.values / total).to(self.dtype)

    def softmax(
        self, input: Tensor, dim: int = -1, *, mask: Tensor | None = None
    ) -> Tensor:
        """The probabilities of a chunk among all that were seen.

        Args:
            input, dim, mask: as in :meth:`update`, of a chunk seen.

        Returns:
            Of the shape and dtype of ``input``; special values as in
            :func:`softmaxlib.softmax`.

        Raises:
            TypeError, IndexError, NotImplementedError, RuntimeError: as
                :meth:`update`.
        """
        name = "OnlineSoftmax.softmax"
        x, z = _rows(name, input, dim, mask)
        shape = (*z.shape[:-1], 1)
        top = _check.like(name, "the state", self.top, z, shape)
        p = ((z - _finite(top)).exp() / self.total).to(x.dtype)
        p = p.movedim(-1, dim) if x.ndim else p.view(())
        mask = _check.mask(name, mask, x)
        return p if mask is None else p.masked_fill(~mask, 0)


def streaming_logsumexp(chunks: Iterable[Tensor], dim: int) -> Tensor:
    r"""Log-sum-exp of logits that come in chunks, in one pass.

    .. math:: \operatorname{LSE}(z) = \log \sum_j e^{z_j}

    with :math:`z` the chunks one after the other along ``dim``, never
    together in memory. A tensor is cut by ``z.split(size, dim)``.

    Args:
        chunks: an iterable, such as a generator, of logits whose shapes
            differ along ``dim`` only; float16, bfloat16, float32 or float64.
        dim: the class dimension, in [-ndim, ndim).

    Returns:
        The log-sum-exp (nats), of the shape of a chunk without ``dim`` and
        in its dtype. Special values as in :func:`softmaxlib.logsumexp`; no
        chunks give -inf.

    Raises:
        TypeError: ``chunks`` is a tensor or no iterable.
        TypeError, IndexError, NotImplementedError, RuntimeError: as
            :meth:`OnlineSoftmax.update`.

    Accuracy and derivatives: as :class:`OnlineSoftmax`.

    Complexity: O(n) time, and a float64 copy of the longest chunk.

    Example:
        >>> import torch
        >>> from softmaxlib import streaming_logsumexp
        >>> chunks = (torch.full((1000,), float(k)) for k in range(3))
        >>> streaming_logsumexp(chunks, dim=0)
        tensor(9.3154)

    Derived in the chapter *From ten classes to a vocabulary*. Source:
    Milakov and Gimelshein (2018), arXiv:1805.02867.
    """
    _check.chunks("streaming_logsumexp", chunks)
    return _all_of(chunks, dim).logsumexp


def streaming_softmax(
    chunks: Iterable[Tensor], dim: int
) -> Iterator[Tensor]:
    r"""Softmax of logits that come in chunks, in two passes.

    .. math:: p_i = \frac{e^{z_i - m}}{s}

    with the logits :math:`z` as in :func:`streaming_logsumexp`, their
    maximum :math:`m` and sum of weights :math:`s` from the first pass, which
    is made at once. The second pass is made as the result is read.

    Args:
        chunks: as in :func:`streaming_logsumexp`, but such as can be read
            twice: a list or tuple, or an object whose ``__iter__`` starts
            again. Both passes must give the same chunks.
        dim: the class dimension, in [-ndim, ndim).

    Returns:
        An iterator over the probabilities, a tensor for each chunk, of its
        shape and dtype. Special values as in :func:`softmaxlib.softmax`.

    Raises:
        TypeError: ``chunks`` is a tensor, no iterable, or can be read only
            once, as a generator.
        TypeError, IndexError, NotImplementedError, RuntimeError: as
            :meth:`OnlineSoftmax.update`.

    Accuracy and derivatives: as :class:`OnlineSoftmax`.

    Complexity: O(n) time, and a float64 copy of the longest chunk.

    Example:
        >>> import torch
        >>> from softmaxlib import streaming_softmax
        >>> z = torch.tensor([1.0, 2.0, 3.0])
        >>> list(streaming_softmax(z.split(2), dim=0))
        [tensor([0.0900, 0.2447]), tensor([0.6652])]

    Derived in the chapter *From ten classes to a vocabulary*. Source:
    Milakov and Gimelshein (2018), arXiv:1805.02867.
    """
    _check.chunks("streaming_softmax", chunks, twice=True)
    state = _all_of(chunks, dim)
    return (state.softmax(chunk, dim) for chunk in chunks)


def _all_of(chunks: Iterable[Tensor], dim: int) -> OnlineSoftmax:
    nothing = OnlineSoftmax()
    return functools.reduce(lambda s, c: s.update(c, dim), chunks, nothing)


def _rows(
    name: str, input: Tensor, dim: int, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Logits, and in the working format, classes last, -inf if masked."""
    x = _check.logits(name, input)
    dim, mask = (
        _check.dimension(name, dim, x.ndim),
        _check.mask(name, mask, x),
    )
    z = _blocks.widen(x)
    z = z if mask is None else z.masked_fill(~mask, -math.inf)
    return x, z.movedim(dim, -1) if x.ndim else z.view(1)


def _finite(top: Tensor) -> Tensor:
    """A shift for which nothing seen weighs exp(-inf - 0) = 0, not NaN."""
    return top.masked_fill(top == -math.inf, 0)
