"""softmaxlib: the softmax function, its derivatives and its numerics.

The library of a book in which every claim is run; each function names the
chapter that derives it.
"""

from softmaxlib.functional import (
    log_softmax,
    logsumexp,
    naive_softmax,
    softmax,
)
from softmaxlib.modules import LogSoftmax, Softmax

__all__ = [
    "LogSoftmax",
    "Softmax",
    "log_softmax",
    "logsumexp",
    "naive_softmax",
    "softmax",
]
__version__ = "0.1.0"
