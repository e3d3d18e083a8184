"""Derivatives of softmax, log-softmax and log-sum-exp in closed form.

With p = softmax(z / T) and moments taken under p, everything follows from
three facts: a Jacobian-vector product is p (v - E v) / T, a Hessian-vector
product is p ((u - E u)(v - E v) - Cov(u, v)) / T^2, and the dense tensors
hold the same numbers for all unit vectors. Constants are in the null space
of each, so that a vector may be shifted before anything cancels.
"""

import math

import torch
from torch import Tensor

from softmaxlib import _arguments, _kernels
from softmaxlib._functions import (
    Softmax,
    _Kernel,
    _nestable,
    composite,
    is_batched,
    is_watched,
)

__all__ = [
    "log_softmax_jacobian",
    "logsumexp_hessian",
    "logsumexp_hvp",
    "softmax_hessian",
    "softmax_hvp",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
]

# Products of more than this many entries go block by block of rows, so that
# their float64 intermediates stay in cache: 2 MiB each.
_BLOCK = 2**18
# Columns of a block over a strided dimension: at least a cache line.
_LANES = 16

# Up to this many classes a running sum in float32 is good enough.
_LONG = 2**10

# Below this largest probability nothing cancels that a shift would save.
_CONFIDENT = 0.9


def softmax_jacobian(
    input: Tensor, dim: int, *, temperature: float = 1.0
) -> Tensor:
    r"""The matrix of first derivatives of softmax, one for each row.

    .. math::
        \frac{\partial p_i}{\partial z_j} = p_i (\delta_{ij} - p_j) / T

    with the logits :math:`z` = ``input`` along ``dim``, their softmax
    :math:`p` at the temperature :math:`T` = ``temperature``. Symmetric,
    positive semidefinite; rows and columns sum to zero. Where
    :math:`p_i > 1/2`, :math:`1 - p_i` is the sum of the others, so that the
    diagonal keeps its digits however confident the row is.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf], held constant in derivatives.

    Returns:
        Shape (\*batch, K, K): the dimensions of ``input`` but ``dim``, in
        their order, then the output class i, then the input class j. A 0-d
        input counts as K = 1 without a batch. Contiguous.

        A class with logit -inf has a row and a column of zeros. Rows whose
        softmax is NaN (+inf, NaN, or nothing but -inf) have a Jacobian of
        NaN. At temperature 0, where softmax is piecewise constant, and at
        inf it is 0. K = 0 gives an empty tensor.

    Raises:
        TypeError: ``input`` is not a tensor, ``dim`` not an int,
            ``temperature`` not a number.
        IndexError: ``dim`` is out of range.
        ValueError: ``temperature`` is negative or NaN.
        NotImplementedError: ``input`` is integer, bool, complex, sparse or
            an 8-bit float.

    Accuracy: relative error of each entry at most 1e-13 for float64 while no
    probability is subnormal (a few 1e-16 while logits lie within 30 of each
    other), 2 ulp for float32 and half an ulp and a hair for float16 and
    bfloat16, whose probabilities are computed in float64.

    Complexity: O(B K\ :sup:`2`) time and no second tensor of that size. To
    multiply with a vector, :func:`softmax_jvp` needs O(B K).

    Example:
        >>> import torch
        >>> from softmaxlib import softmax_jacobian
        >>> softmax_jacobian(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([[ 0.0819, -0.0220, -0.0599],
                [-0.0220,  0.1848, -0.1628],
                [-0.0599, -0.1628,  0.2227]])

    Derived in the chapter *The Jacobian*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "softmax_jacobian"
    return _dense(SoftmaxJacobian, name, input, dim, temperature)


def log_softmax_jacobian(
    input: Tensor, dim: int, *, temperature: float = 1.0
) -> Tensor:
    r"""The matrix of first derivatives of log-softmax, one for each row.

    .. math::
        \frac{\partial \log p_i}{\partial z_j} = (\delta_{ij} - p_j) / T

    with the logits :math:`z` = ``input`` along ``dim``, their softmax
    :math:`p` at the temperature :math:`T` = ``temperature``. At T = 1 an
    idempotent matrix, not symmetric; its rows sum to zero.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64.
        dim: the class dimension, in [-ndim, ndim).
        temperature: as in :func:`softmax_jacobian`.

    Returns:
        Shape (\*batch, K, K), laid out as in :func:`softmax_jacobian`.

        A class with logit -inf has a column of zeros but for its diagonal
        entry 1/T, the limit. Rows whose log-softmax is NaN give NaN.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError: as
            :func:`softmax_jacobian`.

    Accuracy: as :func:`softmax_jacobian`, rounded once.

    Complexity: as :func:`softmax_jacobian`.

    Example:
        >>> import torch
        >>> from softmaxlib import log_softmax_jacobian
        >>> log_softmax_jacobian(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        tensor([[ 0.9100, -0.2447, -0.6652],
                [-0.0900,  0.7553, -0.6652],
                [-0.0900, -0.2447,  0.3348]])

    Derived in the chapter *The Jacobian*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "log_softmax_jacobian"
    return _dense(LogSoftmaxJacobian, name, input, dim, temperature)


def softmax_hessian(
    input: Tensor, dim: int, *, temperature: float = 1.0
) -> Tensor:
    r"""The tensor of second derivatives of softmax, one for each row.

    .. math::
        \frac{\partial^2 p_i}{\partial z_j \partial z_k} = \frac{p_i
        \left[(\delta_{ij} - p_j)(\delta_{ik} - p_k)
        - p_j (\delta_{jk} - p_k)\right]}{T^2}

    with the logits :math:`z` = ``input`` along ``dim``, their softmax
    :math:`p` at the temperature :math:`T` = ``temperature``. One K x K
    Hessian for each output class. At T = 1 it is the third cumulant of a
    one-hot random vector: symmetric in all three indices, and zero when
    summed over any of them.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64.
        dim: the class dimension, in [-ndim, ndim).
        temperature: as in :func:`softmax_jacobian`.

    Returns:
        Shape (\*batch, K, K, K): the dimensions of ``input`` but ``dim``,
        in their order, the output class i, then j and k. Contiguous.

        Infinities, NaN, K = 0 and the limits of the temperature as in
        :func:`softmax_jacobian`.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError: as
            :func:`softmax_jacobian`.

    Accuracy: as :func:`softmax_jacobian`, but entries with j = i are
    relative to :math:`p_i p_k`, since :math:`1 - 2 p_i` has a zero at 1/2.

    Complexity: O(B K\ :sup:`3`) time and no second tensor of that size. To
    multiply with two vectors, :func:`softmax_hvp` needs O(B K).

    Example:
        >>> import torch
        >>> from softmaxlib import softmax_hessian
        >>> hessian = softmax_hessian(torch.tensor([1.0, 2.0, 3.0]), dim=0)
        >>> hessian.shape
        torch.Size([3, 3, 3])
        >>> hessian[0]
        tensor([[ 0.0672, -0.0181, -0.0491],
                [-0.0181, -0.0112,  0.0293],
                [-0.0491,  0.0293,  0.0198]])

    Derived in the chapter *The Hessian*. Cumulants of exponential families:
    McCullagh (1987), *Tensor Methods in Statistics*.
    """
    name = "softmax_hessian"
    return _dense(SoftmaxHessian, name, input, dim, temperature)


def logsumexp_hessian(input: Tensor, dim: int) -> Tensor:
    r"""The matrix of second derivatives of log-sum-exp, one for each row.

    .. math::
        \frac{\partial^2 \operatorname{LSE}}{\partial z_i \partial z_j}
        = p_i (\delta_{ij} - p_j)

    with :math:`z` = ``input`` along ``dim`` and its softmax :math:`p`: the
    Jacobian of softmax, which is the gradient of log-sum-exp. It is also
    the Hessian in the logits of the cross-entropy, whatever the label.

    Args:
        input: logits of any shape with K entries along ``dim``; float16,
            bfloat16, float32 or float64. Integers and bool are promoted to
            the default float, as in ``logsumexp``.
        dim: the class dimension, in [-ndim, ndim).

    Returns:
        Shape (\*batch, K, K), as :func:`softmax_jacobian`, with the same
        values at infinities and NaN.

    Raises:
        TypeError, IndexError, NotImplementedError: as
            :func:`softmax_jacobian`, but for integers and bool.

    Accuracy and complexity: as :func:`softmax_jacobian`.

    Example:
        >>> import torch
        >>> from softmaxlib import logsumexp_hessian
        >>> logsumexp_hessian(torch.tensor([0.0, 0.0]), dim=0)
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]])

    Derived in the chapter *The Hessian*. Source: Böhning (1992),
    doi:10.1007/BF00048682.
    """
    name = "logsumexp_hessian"
    return _dense(SoftmaxJacobian, name, input, dim, 1.0, promote=True)


def softmax_jvp(
    input: Tensor, tangent: Tensor, dim: int, *, temperature: float = 1.0
) -> Tensor:
    r"""The Jacobian of softmax times a vector, without the Jacobian.

    .. math:: (J v)_i = p_i (v_i - \textstyle\sum_j p_j v_j) / T

    with the softmax :math:`p` of ``input`` along ``dim`` at the temperature
    :math:`T` = ``temperature`` and :math:`v` = ``tangent``: the change of
    the probabilities when the logits move along ``tangent``. A confident
    row has ``tangent`` shifted by its value at the arg max first; without
    that, the change of the largest probability would cancel to nothing.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
        tangent: of the shape, dtype and device of ``input``.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf], held constant in derivatives.

    Returns:
        The product, of the shape of ``input``.

        0 where the logit is -inf and the tangent finite. Rows whose softmax
        is NaN give NaN, and so does a tangent with NaN or an infinity.
        Empty stays empty.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError: as
            :func:`softmax_jacobian`.
        RuntimeError: shape, dtype or device of ``tangent`` differ from
            those of ``input``.

    Accuracy: for float64 a relative error of 1e-13 at gaps of up to 700,
    unless the terms of the sum cancel; the narrower formats are computed in
    float64 and rounded once.

    Complexity: O(n) time for n entries; float64 intermediates of at most
    2\ :sup:`18` entries or one row.

    Example:
        >>> import torch
        >>> from softmaxlib import softmax_jvp
        >>> z, v = torch.tensor([60.0, 0.0]), torch.tensor([1.0, 2.0])
        >>> softmax_jvp(z, v, dim=0)
        tensor([-8.7565e-27,  8.7565e-27])

    Derived in the chapter *The Jacobian*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "softmax_jvp"
    x, dim, temperature = _checked(name, input, dim, temperature)
    v = _arguments.same_shape(name, "tangent", tangent, x)
    return _product(SoftmaxJVP, (x, v), dim, temperature)


def softmax_vjp(
    input: Tensor, cotangent: Tensor, dim: int, *, temperature: float = 1.0
) -> Tensor:
    r"""A vector times the Jacobian of softmax: what backpropagation needs.

    .. math:: (J^\top u)_j = p_j (u_j - \textstyle\sum_i p_i u_i) / T

    with :math:`u` = ``cotangent``, the gradient of some loss in the
    probabilities; the result is its gradient in ``input``. The Jacobian is
    symmetric, so that this is :func:`softmax_jvp` under the name by which
    it will be looked for.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
        cotangent: of the shape, dtype and device of ``input``.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf], held constant in derivatives.

    Returns:
        The product, of the shape of ``input``; special values as in
        :func:`softmax_jvp`.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError,
        RuntimeError: as :func:`softmax_jvp`.

    Accuracy and complexity: as :func:`softmax_jvp`.

    Example:
        >>> import torch
        >>> from softmaxlib import softmax_vjp
        >>> z, u = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0, 0])
        >>> softmax_vjp(z, u, dim=0)
        tensor([ 0.0819, -0.0220, -0.0599])

    Derived in the chapter *The Jacobian*. Source: Bridle (1990),
    doi:10.1007/978-3-642-76153-9_28.
    """
    name = "softmax_vjp"
    x, dim, temperature = _checked(name, input, dim, temperature)
    u = _arguments.same_shape(name, "cotangent", cotangent, x)
    return _product(SoftmaxJVP, (x, u), dim, temperature)


def softmax_hvp(
    input: Tensor,
    cotangent: Tensor,
    tangent: Tensor,
    dim: int,
    *,
    temperature: float = 1.0,
) -> Tensor:
    r"""The Hessian of ``cotangent . softmax(input)`` times a vector.

    .. math::
        (\nabla^2 (u \cdot \sigma)\, v)_k = p_k \left[(u_k - \bar u)
        (v_k - \bar v) - \operatorname{Cov}_p(u, v)\right] / T^2

    with the softmax :math:`p` of ``input`` along ``dim`` at the temperature
    :math:`T` = ``temperature``, :math:`u` = ``cotangent``, :math:`v` =
    ``tangent``, and means and covariance under :math:`p`. It is the tensor
    of :func:`softmax_hessian` contracted with both, and symmetric in them.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
        cotangent, tangent: of the shape, dtype and device of ``input``.
        dim: the class dimension, in [-ndim, ndim).
        temperature: a number in [0, inf], held constant in derivatives.

    Returns:
        The product, of the shape of ``input``; special values as in
        :func:`softmax_jvp`.

    Raises:
        TypeError, IndexError, ValueError, NotImplementedError: as
            :func:`softmax_jacobian`.
        RuntimeError: shape, dtype or device of ``cotangent`` or ``tangent``
            differ from those of ``input``.

    Accuracy: as :func:`softmax_jvp`, except float32, which is computed in
    float32: to 1e-6 of :math:`p_k \max|u| \max|v|` for logits within 10 of
    the largest, 5e-6 for the smallest.

    Complexity: as :func:`softmax_jvp`.

    Example:
        >>> import torch
        >>> from softmaxlib import softmax_hvp
        >>> z = torch.tensor([1.0, 2.0, 3.0])
        >>> u, v = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
        >>> softmax_hvp(z, u, v, dim=0)
        tensor([-0.0181, -0.0112,  0.0293])

    Derived in the chapter *The Hessian*. Hessian-vector products:
    Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.
    """
    name = "softmax_hvp"
    x, dim, temperature = _checked(name, input, dim, temperature)
    u = _arguments.same_shape(name, "cotangent", cotangent, x)
    v = _arguments.same_shape(name, "tangent", tangent, x)
    return _product(SoftmaxHVP, (x, u, v), dim, temperature)


def logsumexp_hvp(input: Tensor, tangent: Tensor, dim: int) -> Tensor:
    r"""The Hessian of log-sum-exp times a vector, without the Hessian.

    .. math:: (H v)_i = p_i (v_i - \textstyle\sum_j p_j v_j)

    with the softmax :math:`p` of ``input`` along ``dim`` and :math:`v` =
    ``tangent``. The Hessian of log-sum-exp is the Jacobian of softmax.

    Args:
        input: logits of any shape; float16, bfloat16, float32 or float64.
            Integers and bool are promoted to the default float.
        tangent: of the shape, device and (promoted) dtype of ``input``.
        dim: the class dimension, in [-ndim, ndim).

    Returns:
        The product, of the shape of ``input``; special values as in
        :func:`softmax_jvp`.

    Raises:
        TypeError, IndexError, NotImplementedError, RuntimeError: as
            :func:`softmax_jvp`, but for integers and bool.

    Accuracy and complexity: as :func:`softmax_jvp`.

    Example:
        >>> import torch
        >>> from softmaxlib import logsumexp_hvp
        >>> z, v = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0])
        >>> logsumexp_hvp(z, v, dim=0)
        tensor([ 0.2500, -0.2500])

    Derived in the chapter *The Hessian*. Hessian-vector products:
    Pearlmutter (1994), doi:10.1162/neco.1994.6.1.147.
    """
    name = "logsumexp_hvp"
    x, dim, _ = _checked(name, input, dim, 1.0, promote=True)
    v = _arguments.same_shape(name, "tangent", tangent, x)
    return _product(SoftmaxJVP, (x, v), dim, 1.0)


# --- from arguments to functions -----------------------------------------


def _checked(name, input, dim, temperature, promote=False):
    x = _arguments.logits(name, input, None, promote)
    dim = _arguments.dimension(name, dim, x.ndim)
    if type(temperature) is not float or temperature != 1:
        temperature = _arguments.temperature(name, temperature)
    return x, dim, temperature


def _dense(function, name, input, dim, temperature, promote=False):
    x, dim, temperature = _checked(name, input, dim, temperature, promote)
    if x.ndim == 0:
        x = x.reshape(1)
    if torch.compiler.is_compiling():
        return _evaluate(function, x, dim, temperature)
    return function.call(x, dim, temperature)


def _product(function, tensors, dim, temperature):
    if tensors[0].ndim == 0:
        tensors = [t.reshape(1) for t in tensors]
        return _product(function, tensors, dim, temperature).view(())
    if torch.compiler.is_compiling():
        x, *vectors = tensors
        y = composite("softmax", x, None, dim, temperature)
        return function.formula(y, *vectors, dim, temperature)
    if is_watched(*tensors):
        return function.apply(*tensors, dim, temperature)
    return _by_rows(function.rows, tensors, dim, temperature)


# --- arithmetic, on plain tensors ----------------------------------------


def _probabilities(x: Tensor, dim: int, temperature: float) -> Tensor:
    """Softmax in the widest format of the device.

    In float64 a difference of two logits is rounded by at most 2**-44 where
    its exponential does not underflow: that bounds the relative error.
    """
    wide = torch.float32 if x.is_mps else torch.float64
    if temperature == 1:
        return torch.softmax(x, dim, dtype=wide)
    p = torch.empty(x.shape, dtype=wide, device=x.device)
    _kernels.softmax(x, None, dim, temperature, p)
    return p


def _is_confident(p: Tensor) -> bool:
    return not p.amax().item() <= _CONFIDENT  # NaN may hide a confident row


def _complement(p: Tensor) -> Tensor:
    """1 - p over the last dimension, from the others where p is large."""
    rest = torch.rsub(p, 1)  # 1 - p, without a detour over Python
    if _is_confident(p):
        largest, index = p.max(-1, keepdim=True)
        others = p.scatter(-1, index, 0).sum(-1, keepdim=True)
        others = torch.where(largest > 0.5, others, 1 - largest)
        rest.scatter_(-1, index, others)
    return rest


def _last(x: Tensor, dim: int) -> Tensor:
    return x if dim == x.ndim - 1 else x.movedim(dim, -1)


def _square(x: Tensor, dim: int, power: int) -> Tensor:
    """An empty tensor with `power` class dimensions at the end."""
    shape = list(x.shape)
    classes = shape.pop(dim)
    return x.new_empty((*shape, *(classes,) * power))


def _finite(p: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """p times the scale, at most the largest number: inf * 0 is NaN."""
    if scale == 1:
        return _cast(p, dtype)
    return (p * scale).clamp(max=torch.finfo(dtype).max).to(dtype)


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of factors whose product is rounded to `dtype`.

    A half would round each of them, and lose the small to underflow.
    """
    return torch.float32 if dtype.itemsize < 4 else dtype


def _write_jacobian(x, dim, temperature):
    out = _square(x, dim, 2)
    if not out.numel():
        return out
    scale = _kernels.slope(temperature)
    p = _last(_probabilities(x, dim, temperature), dim)
    # The scale in equal parts, so that the result is exactly symmetric.
    factor = _finite(p, math.sqrt(scale), _factor_dtype(x.dtype))
    # Asked before the product drives p out of the cache.
    even = scale == 1 and factor.dtype == x.dtype and p.amax().item() <= 0.5
    torch.mul(factor.neg().unsqueeze(-1), factor.unsqueeze(-2), out=out)
    diagonal = out.diagonal(0, -2, -1)
    if even:
        # -p^2 stands there already, and p - p^2 does not cancel up to 1/2.
        diagonal.add_(factor)
    else:
        diagonal.copy_((p * _complement(p)).mul_(scale))
    return out


def _write_log_jacobian(x, dim, temperature):
    out = _square(x, dim, 2)
    if not out.numel():
        return out
    scale = _kernels.slope(temperature)
    p = _last(_probabilities(x, dim, temperature), dim)
    out.copy_((p * -scale).unsqueeze(-2))
    out.diagonal(0, -2, -1).copy_(_complement(p).mul_(scale))
    return out


def _write_hessian(x, dim, temperature):
    """2 p_i p_j p_k everywhere, then three planes, then their line."""
    out = _square(x, dim, 3)
    if not out.numel():
        return out
    scale = _kernels.slope(temperature)
    p = _last(_probabilities(x, dim, temperature), dim)
    share = math.cbrt(scale) ** 2
    part = p * share
    dtype = _factor_dtype(x.dtype)
    pair = _finite(part.unsqueeze(-1) * part.unsqueeze(-2), 2, dtype)
    third = _finite(p, share, dtype)
    torch.mul(pair.unsqueeze(-1), third[..., None, None, :], out=out)
    q = _complement(p)
    # T_iik = T_iki = T_kii = p_k p_i (p_i - q_i) where k differs from i.
    line = p * (p - q) * scale
    plane = (p * scale).unsqueeze(-1) * line.unsqueeze(-2)
    for first, second in ((-3, -2), (-3, -1), (-2, -1)):
        out.diagonal(0, first, second).copy_(plane)
    line = line.mul_(q).mul_(-scale)
    out.diagonal(0, -3, -2).diagonal(0, -2, -1).copy_(line)
    return out


def _deviation(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """v minus its mean under p."""
    if p.ndim == 1:
        return v - torch.dot(p, v)
    return v - torch.linalg.vecdot(p, v, dim=dim).unsqueeze(dim)


def _weighted_deviation(p: Tensor, v: Tensor, dim: int) -> Tensor:
    """p times (v minus its mean under p)."""
    if p.dtype != torch.float64 and p.shape[dim] > _LONG:
        return _deviation(p, v, dim).mul_(p)
    # The same in a single operation, but the mean is a plain running sum.
    return torch._softmax_backward_data(v, p, dim, p.dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`to`, which is slow to find that there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _jvp_rows(x, v, dim, temperature):
    p = _probabilities(x, dim, temperature)
    v = _cast(v, p.dtype)
    if _is_confident(p):
        v = v - v.gather(dim, p.argmax(dim, keepdim=True))
    result = _weighted_deviation(p, v, dim)
    if temperature != 1:
        result *= _kernels.slope(temperature)
    return _cast(result, x.dtype)


def _hvp_rows(x, u, v, dim, temperature):
    if (
        x.dtype == torch.float32
        and temperature == 1
        and x.shape[dim] <= _LONG
    ):
        # Conversions would take half of the time of a short row.
        p = torch.softmax(x, dim)
    else:
        p = _probabilities(x, dim, temperature)
    if x.dtype == torch.float32:
        # Where the largest p rounds to one, the means are its u and v: the
        # products of their errors are nothing beside the covariance.
        p = _cast(p, x.dtype)
    else:
        u, v = _cast(u, p.dtype), _cast(v, p.dtype)
        if _is_confident(p):
            index = p.argmax(dim, keepdim=True)
            u, v = u - u.gather(dim, index), v - v.gather(dim, index)
    product = _deviation(p, u, dim).mul_(_deviation(p, v, dim))
    result = _weighted_deviation(p, product, dim)
    if temperature != 1:
        # One by one: the square may overflow where the result does not.
        slope = _kernels.slope(temperature)
        result.mul_(slope).mul_(slope)
    return _cast(result, x.dtype)


def _by_rows(function, tensors, dim, temperature):
    """Apply `function` to all rows, or to a cacheful of rows at a time."""
    x = tensors[0]
    if not x.numel():
        return torch.empty_like(x)
    if x.numel() <= _BLOCK:
        return function(*tensors, dim, temperature)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    target, *parts = [_kernels.as_rows(t, dim) for t in (out, *tensors)]
    outer, inner, classes = target.shape
    lanes = min(inner, max(_BLOCK // classes // _LANES, 1) * _LANES)
    rows = max(1, _BLOCK // (classes * lanes))
    for o in range(0, outer, rows):
        for i in range(0, inner, lanes):
            at = slice(o, o + rows), slice(i, i + lanes)
            block = [part[at] for part in parts]
            target[at].copy_(function(*block, 2, temperature))
    return out


# --- autograd ------------------------------------------------------------


class _Product(_Kernel):
    """A function (x, *vectors, dim, temperature), linear in each vector."""

    @classmethod
    def run(cls, *arguments):
        *tensors, dim, temperature = arguments
        if is_batched(*tensors):
            y = Softmax.run(tensors[0], None, dim, temperature)
            return cls.formula(y, *tensors[1:], dim, temperature)
        return _by_rows(cls.rows, tensors, dim, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)


class SoftmaxJVP(_Product):
    """(x, v) -> J(x) v, and by symmetry the VJP."""

    rows = staticmethod(_jvp_rows)

    @staticmethod
    def forward(x, v, dim, temperature):
        return SoftmaxJVP.run(x, v, dim, temperature)

    @staticmethod
    def formula(y, v, dim, temperature):
        return y * _deviate(y, v, dim) * _kernels.slope(temperature)

    @staticmethod
    def backward(ctx, w):
        x, v = ctx.saved_tensors
        options = ctx.dim, ctx.temperature
        x_gradient = v_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = SoftmaxHVP.call(x, w, v, *options)
        if ctx.needs_input_grad[1]:
            v_gradient = SoftmaxJVP.call(x, w, *options)
        return x_gradient, v_gradient, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, v_tangent, *_):
        x, v = saved
        options = ctx.dim, ctx.temperature
        result = 0
        if v_tangent is not None:
            result = SoftmaxJVP.apply(x, v_tangent, *options)
        if x_tangent is not None:
            result = result + SoftmaxHVP.apply(x, v, x_tangent, *options)
        return result


class SoftmaxHVP(_Product):
    """(x, u, v) -> the second derivative of softmax contracted with both."""

    rows = staticmethod(_hvp_rows)

    @staticmethod
    def forward(x, u, v, dim, temperature):
        return SoftmaxHVP.run(x, u, v, dim, temperature)

    @staticmethod
    def formula(y, u, v, dim, temperature):
        u, v = (_deviate(y, t, dim) for t in (u, v))
        slope = _kernels.slope(temperature)
        return y * _deviate(y, u * v, dim) * slope * slope

    @staticmethod
    def _third(x, u, v, w, dim, temperature):
        """The third derivative, a fourth cumulant, contracted with all."""
        y = Softmax.apply(x, None, dim, temperature)
        u, v, w = (_deviate(y, t, dim) for t in (u, v, w))
        result = _deviate(y, u * v * w, dim)
        for a, b, c in ((u, v, w), (v, w, u), (w, u, v)):
            covariance = (y * b * c).sum(dim, keepdim=True)
            result = result - a * covariance
        slope = _kernels.slope(temperature)
        return y * result * slope * slope * slope

    @staticmethod
    def backward(ctx, w):
        x, u, v = ctx.saved_tensors
        options = ctx.dim, ctx.temperature
        gradients = [None] * 3
        if ctx.needs_input_grad[0]:
            gradients[0] = SoftmaxHVP._third(x, u, v, w, *options)
        if ctx.needs_input_grad[1]:
            gradients[1] = SoftmaxHVP.call(x, w, v, *options)
        if ctx.needs_input_grad[2]:
            gradients[2] = SoftmaxHVP.call(x, u, w, *options)
        return *gradients, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, u_tangent, v_tangent, *_):
        x, u, v = saved
        options = ctx.dim, ctx.temperature
        result = 0
        if u_tangent is not None:
            result = SoftmaxHVP.apply(x, u_tangent, v, *options)
        if v_tangent is not None:
            result = result + SoftmaxHVP.apply(x, u, v_tangent, *options)
        if x_tangent is not None:
            result = result + SoftmaxHVP._third(
                x, u, v, x_tangent, *options
            )
        return result


class _Dense(_Kernel):
    """A function (x, dim, temperature) with class dimensions at the end.

    A subclass knows how to `write` it, and, in terms of the probabilities y
    (classes last) at T = 1: its `expression`; the `differential` of that
    along a change of y; and its transpose, `pull`.
    """

    power = 1

    @classmethod
    def run(cls, x, dim, temperature):
        if is_batched(x):
            return _evaluate(cls, x, dim, temperature)
        return cls.write(x, dim, temperature)

    @classmethod
    def forward(cls, x, dim, temperature):
        return cls.run(x, dim, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @classmethod
    def backward(cls, ctx, cotangent):
        (x,) = ctx.saved_tensors
        dim, temperature = ctx.dim, ctx.temperature
        y = _last(Softmax.call(x, None, dim, temperature), dim)
        change = _scaled(cls.pull(y, cotangent), temperature, cls.power)
        change = change.movedim(-1, dim)
        return SoftmaxJVP.call(x, change, dim, temperature), None, None

    @classmethod
    def jvp(cls, ctx, tangent, *_):
        return _nestable(cls._push)(ctx, tangent)

    @classmethod
    def _push(cls, ctx, saved, tangent):
        (x,) = saved
        dim, temperature = ctx.dim, ctx.temperature
        y = _last(Softmax.apply(x, None, dim, temperature), dim)
        change = _last(SoftmaxJVP.apply(x, tangent, dim, temperature), dim)
        return _scaled(cls.differential(y, change), temperature, cls.power)


class SoftmaxJacobian(_Dense):
    write = staticmethod(_write_jacobian)

    @staticmethod
    def expression(y):
        return torch.diag_embed(y) - _outer(y, y)

    @staticmethod
    def differential(y, change):
        return (
            torch.diag_embed(change) - _outer(change, y) - _outer(y, change)
        )

    @staticmethod
    def pull(y, cotangent):
        both = cotangent + cotangent.mT
        return cotangent.diagonal(0, -2, -1) - _apply(both, y)


class LogSoftmaxJacobian(_Dense):
    write = staticmethod(_write_log_jacobian)

    @staticmethod
    def expression(y):
        classes = y.shape[-1]
        one = torch.eye(classes, dtype=y.dtype, device=y.device)
        return one - y.unsqueeze(-2)

    @staticmethod
    def differential(y, change):
        square = *change.shape, change.shape[-1]
        return -change.unsqueeze(-2).expand(square)

    @staticmethod
    def pull(y, cotangent):
        return -cotangent.sum(-2)


class SoftmaxHessian(_Dense):
    power = 2
    write = staticmethod(_write_hessian)

    @staticmethod
    def expression(y):
        pair = _outer(y, y)
        triple = 2 * _outer(y, pair, 2)
        return SoftmaxHessian._assemble(y, pair, triple)

    @staticmethod
    def differential(y, change):
        pair = _outer(change, y) + _outer(y, change)
        triple = _outer(change, _outer(y, y), 2) + _outer(y, pair, 2)
        return SoftmaxHessian._assemble(change, pair, 2 * triple)

    @staticmethod
    def _assemble(line, pair, triple):
        """Sum of d_ijk line_i, of triple, and of -d_ij pair_ik and alike."""
        first = torch.diag_embed(torch.diag_embed(line) - pair, 0, -3, -2)
        second = torch.diag_embed(pair, 0, -3, -1)
        third = torch.diag_embed(pair, 0, -2, -1)
        return triple + first - second - third

    @staticmethod
    def pull(y, cotangent):
        planes = 0
        for first, second in ((-3, -2), (-3, -1), (-2, -1)):
            planes = planes + cotangent.diagonal(0, first, second)
        line = cotangent.diagonal(0, -3, -2).diagonal(0, -2, -1)
        result = line - _apply(planes + planes.mT, y)
        for moved in (-3, -2, -1):
            slices = cotangent.movedim(moved, -3)
            once = (slices * y[..., None, None, :]).sum(-1)
            result = result + 2 * _apply(once, y)
        return result


def _evaluate(function, x, dim, temperature):
    """A `_Dense` function in plain PyTorch operations."""
    y = _last(composite("softmax", x, None, dim, temperature), dim)
    value = function.expression(y)
    return _scaled(value, temperature, value.ndim - y.ndim)


def _scaled(value, temperature, power):
    for _ in range(power):
        value = value * _kernels.slope(temperature)
    return value


def _outer(a: Tensor, b: Tensor, dims: int = 1) -> Tensor:
    """a_i b_j, or a_i b_jk for two dims of b."""
    return a[(..., *(None,) * dims)] * b.unsqueeze(-1 - dims)


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix * vector.unsqueeze(-2)).sum(-1)


def _deviate(y: Tensor, v: Tensor, dim: int) -> Tensor:
    """v minus its mean under y, centred first; differentiable."""
    v = v - v.gather(dim, y.argmax(dim, keepdim=True))
    return v - (y * v).sum(dim, keepdim=True)
