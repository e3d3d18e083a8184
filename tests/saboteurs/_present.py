"""How `saboteurs` reaches the kernels and the checks of the library.

With kernels that are looked up by name in `softmaxlib._kernels`, this is
`getattr` and `setattr`. The library of version 0.1.0 keeps them as methods
of its autograd functions; what translates between the two goes with it.
"""

import importlib

import torch

from softmaxlib import _kernels

_OLD = not hasattr(_kernels, "softmax_jacobian")
_NAME = "_arguments" if _OLD else "_check"
checks = importlib.import_module(f"softmaxlib.{_NAME}")


def find(name):
    """The kernel that the library would call now."""
    if not _OLD:
        return getattr(_kernels, name)
    return _old_find(name)


def put(patch, name, function):
    """Let the library call `function`."""
    if not _OLD:
        patch.setattr(_kernels, name, function)
    else:
        _old_put(patch, name, function)


# --- version 0.1.0 -------------------------------------------------------

_CLASSES = {
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
    "logsumexp": "LogSumExp",
    "logsumexp_gradient": "LogSumExpGradient",
    "softmax_vjp": "SoftmaxVJP",
    "log_softmax_vjp": "LogSoftmaxVJP",
    "softmax_jvp": "SoftmaxJVP",
    "softmax_hvp": "SoftmaxHVP",
    "softmax_jacobian": "SoftmaxJacobian",
    "log_softmax_jacobian": "LogSoftmaxJacobian",
    "softmax_hessian": "SoftmaxHessian",
}


def _class(name):
    from softmaxlib import _functions, derivatives

    name = _CLASSES[name]
    return getattr(_functions, name, None) or getattr(derivatives, name)


def _old_find(name):
    from softmaxlib import loss

    if name == "loss":
        index, soft = loss.IndexLoss.kernel, loss.SoftLoss.kernel

        def rows(x, target, weight, dim, smoothing, out):
            given = soft if target.dtype.is_floating_point else index
            given(x, target, dim, out)

        return rows
    if name == "loss_gradient":
        index, soft = loss.IndexGradient.kernel, loss.SoftGradient.kernel

        def gradient(x, target, weight, share, dim, smoothing, out):
            given = soft if target.dtype.is_floating_point else index
            given(x, target, share, dim, out)

        return gradient
    function = _class(name)
    if hasattr(function, "kernel"):
        return function.kernel
    old = function.rows if hasattr(function, "rows") else function.write

    def kernel(*arguments):
        *given, out = arguments
        out.copy_(old(*given))

    return kernel


def _old_put(patch, name, kernel):
    from softmaxlib import loss

    if name == "loss":

        def rows(x, target, dim, out):
            kernel(x, target, None, dim, 0.0, out)

        for function in (loss.IndexLoss, loss.SoftLoss):
            patch.setattr(function, "kernel", staticmethod(rows))
        return
    if name == "loss_gradient":

        def gradient(x, target, share, dim, out):
            kernel(x, target, None, share, dim, 0.0, out)

        for function in (loss.IndexGradient, loss.SoftGradient):
            patch.setattr(function, "kernel", staticmethod(gradient))
        return
    function = _class(name)
    if hasattr(function, "kernel"):
        patch.setattr(function, "kernel", staticmethod(kernel))
    elif hasattr(function, "rows"):

        def rows(*arguments):
            out = torch.empty_like(arguments[0])
            kernel(*arguments, out)
            return out

        patch.setattr(function, "rows", staticmethod(rows))
    else:
        power = 3 if name == "softmax_hessian" else 2

        def write(x, dim, temperature):
            batch = [n for d, n in enumerate(x.shape) if d != dim]
            out = x.new_empty((*batch, *[x.shape[dim]] * power))
            kernel(x, dim, temperature, out)
            return out

        patch.setattr(function, "write", staticmethod(write))
