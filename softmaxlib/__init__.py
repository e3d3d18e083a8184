"""softmaxlib: the softmax function, its derivatives and its numerics.

The library of a book in which every claim is run; each function names the
chapter that derives it.
"""

from softmaxlib.derivatives import (
    log_softmax_jacobian,
    logsumexp_hessian,
    logsumexp_hvp,
    softmax_hessian,
    softmax_hvp,
    softmax_jacobian,
    softmax_jvp,
    softmax_vjp,
)
from softmaxlib.functional import (
    log_softmax,
    logsumexp,
    naive_softmax,
    softmax,
)
from softmaxlib.loss import (
    cross_entropy,
    cross_entropy_gradient,
    soft_cross_entropy,
    soft_cross_entropy_gradient,
)
from softmaxlib.modules import LogSoftmax, Softmax
from softmaxlib.regression import (
    SoftmaxRegression,
    weight_gradient,
    weight_hessian,
    weight_hvp,
)
from softmaxlib.sampling import gumbel_max, gumbel_top_k, sample

__all__ = [
    "LogSoftmax",
    "Softmax",
    "SoftmaxRegression",
    "cross_entropy",
    "cross_entropy_gradient",
    "gumbel_max",
    "gumbel_top_k",
    "log_softmax",
    "log_softmax_jacobian",
    "logsumexp",
    "logsumexp_hessian",
    "logsumexp_hvp",
    "naive_softmax",
    "sample",
    "soft_cross_entropy",
    "soft_cross_entropy_gradient",
    "softmax",
    "softmax_hessian",
    "softmax_hvp",
    "softmax_jacobian",
    "softmax_jvp",
    "softmax_vjp",
    "weight_gradient",
    "weight_hessian",
    "weight_hvp",
]
__version__ = "0.1.0"
