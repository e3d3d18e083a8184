"""Derivatives of softmax, log-softmax and log-sum-exp in closed form.

With p = softmax(z / T) and moments taken under p, everything follows from
three facts: a Jacobian-vector product is p (v - E v) / T, a Hessian-vector
product is p ((u - E u)(v - E v) - Cov(u, v)) / T^2, and the dense tensors
hold the same numbers for all unit vectors. Constants are in the null space
of each, so that a vector may be shifted before anything cancels.
"""

from torch import Tensor

from softmaxlib import _autograd, _check

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
    x, *at = _checked("softmax_jacobian", input, dim, temperature)
    return _autograd.SoftmaxJacobian.call(x, *at)


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
    x, *at = _checked("log_softmax_jacobian", input, dim, temperature)
    return _autograd.LogSoftmaxJacobian.call(x, *at)


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
    x, *at = _checked("softmax_hessian", input, dim, temperature)
    return _autograd.SoftmaxHessian.call(x, *at)


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
    x, *at = _checked("logsumexp_hessian", input, dim, 1.0, True)
    return _autograd.SoftmaxJacobian.call(x, *at)


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
    x, *at = _checked("softmax_jvp", input, dim, temperature)
    v = _check.like("softmax_jvp", "tangent", tangent, x)
    return _autograd.SoftmaxJVP.call(x, v, *at)


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
    x, *at = _checked("softmax_vjp", input, dim, temperature)
    u = _check.like("softmax_vjp", "cotangent", cotangent, x)
    return _autograd.SoftmaxJVP.call(x, u, *at)


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
    x, *at = _checked("softmax_hvp", input, dim, temperature)
    u = _check.like("softmax_hvp", "cotangent", cotangent, x)
    v = _check.like("softmax_hvp", "tangent", tangent, x)
    return _autograd.SoftmaxHVP.call(x, u, v, *at)


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
    x, *at = _checked("logsumexp_hvp", input, dim, 1.0, True)
    v = _check.like("logsumexp_hvp", "tangent", tangent, x)
    return _autograd.SoftmaxJVP.call(x, v, *at)


def _checked(
    name: str,
    input: Tensor,
    dim: int,
    temperature: float,
    promote: bool = False,
) -> tuple[Tensor, int, float]:
    x = _check.logits(name, input, None, promote)
    dim = _check.dimension(name, dim, x.ndim)
    return x, dim, _check.temperature(name, temperature)
