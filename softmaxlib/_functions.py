"""The kernels as differentiable functions.

Each class takes tensors, then `dim` and `temperature`, all checked. The
derivatives are themselves such functions, or plain differentiable
expressions, so that every order and every mix of modes is available.
"""

import functools
import math

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from softmaxlib import _kernels


def _nestable(jvp):
    """Let a `jvp` rule be differentiated forwards once more.

    PyTorch runs the rule with forward mode switched off altogether, so that
    under a second forward transform its operations would count as constant
    and the derivative come back as a silent zero. Here forward mode stays
    on, and the rule works on the primal part of what was saved.
    """

    @functools.wraps(jvp)
    def wrapper(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [
                None if t is None else forward_ad.unpack_dual(t).primal
                for t in ctx.saved_tensors
            ]
            return jvp(ctx, saved, *tangents)

    return wrapper


# What PyTorch keeps to itself about a call is asked here and nowhere else.


def is_watched(*values) -> bool:
    """Whether derivatives of a result of `values` may be asked for."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for value in values:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


def is_batched(*values) -> bool:
    """Whether PyTorch batches one of `values` behind our back.

    `is_grads_batched=True` and `torch.autograd.functional.*(vectorize=True)`
    do not ask for a vmap rule; kernels cannot run on what they pass.
    """
    batched = torch._C._functorch.is_legacy_batchedtensor
    return any(isinstance(v, Tensor) and batched(v) for v in values)


class _Kernel(Function):
    """A kernel under `torch.func.vmap`, and its allocation."""

    @staticmethod
    def result_shape(x: Tensor, dim: int) -> torch.Size:
        return x.shape

    @classmethod
    def call(cls, *arguments) -> Tensor:
        """`apply`, or at a third of its cost `run` if nobody watches."""
        if is_watched(*arguments):
            return cls.apply(*arguments)
        return cls.run(*arguments)

    @classmethod
    def run(cls, x: Tensor, *arguments) -> Tensor:
        """Call the kernel with a fresh contiguous output."""
        if is_batched(*arguments):
            return cls.expression(x, *arguments)
        shape = cls.result_shape(x, arguments[-2])
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        cls.kernel(x, *arguments, out)
        return out

    @classmethod
    def vmap(cls, info, in_dims, *arguments):
        """Move the batch to the front; it is one more leading dimension."""
        moved = []
        for value, batch in zip(arguments, in_dims, strict=True):
            if isinstance(value, Tensor):
                if batch is None:
                    value = value.expand(info.batch_size, *value.shape)
                else:
                    value = value.movedim(batch, 0)
            moved.append(value)
        *tensors, dim, temperature = moved
        return cls.apply(*tensors, dim + 1, temperature), 0


class Softmax(_Kernel):
    kernel = staticmethod(_kernels.softmax)

    @staticmethod
    def forward(x, mask, dim, temperature):
        return Softmax.run(x, mask, dim, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(output, mask)
        ctx.save_for_forward(output, mask)

    @staticmethod
    def backward(ctx, cotangent):
        y, mask = ctx.saved_tensors
        gradient = SoftmaxVJP.apply(
            y, cotangent, mask, ctx.dim, ctx.temperature
        )
        return gradient, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, tangent, *_):
        # The Jacobian is symmetric.
        y, mask = saved
        return SoftmaxVJP.apply(y, tangent, mask, ctx.dim, ctx.temperature)


class SoftmaxVJP(_Kernel):
    """(y, v) -> y (v - y . v) / T, the Jacobian at softmax y times v."""

    kernel = staticmethod(_kernels.softmax_vjp)

    @staticmethod
    def forward(y, v, mask, dim, temperature):
        return SoftmaxVJP.run(y, v, mask, dim, temperature)

    @staticmethod
    def expression(y, v, mask, dim, temperature):
        v = _centre(v, y, mask, dim)
        result = y * (v - _dot(y, v, dim))
        return result * _kernels.slope(temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, v, mask, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(y, v, mask)
        ctx.save_for_forward(y, v, mask)

    @staticmethod
    def backward(ctx, cotangent):
        y, v, mask = ctx.saved_tensors
        dim, temperature = ctx.dim, ctx.temperature
        v_gradient = SoftmaxVJP.apply(y, cotangent, mask, dim, temperature)
        # y sums to one, so v and the cotangent may both be centred.
        v = _centre(v, y, mask, dim)
        w = _centre(cotangent, y, mask, dim)
        y_gradient = w * (v - _dot(y, v, dim)) - _dot(y, w, dim) * v
        scale = _kernels.slope(temperature)
        return y_gradient * scale, v_gradient, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, y_tangent, v_tangent, *_):
        y, v, mask = saved
        dim, temperature = ctx.dim, ctx.temperature
        result = 0
        if v_tangent is not None:
            result = SoftmaxVJP.apply(y, v_tangent, mask, dim, temperature)
        if y_tangent is not None:
            v = _centre(v, y, mask, dim)
            change = y_tangent * (v - _dot(y, v, dim))
            change = change - y * _dot(y_tangent, v, dim)
            result = result + change * _kernels.slope(temperature)
        return result


class LogSoftmax(_Kernel):
    kernel = staticmethod(_kernels.log_softmax)

    @staticmethod
    def forward(x, mask, dim, temperature):
        return LogSoftmax.run(x, mask, dim, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, mask, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(x, mask)
        ctx.save_for_forward(x, mask)

    @staticmethod
    def backward(ctx, cotangent):
        x, mask = ctx.saved_tensors
        gradient = LogSoftmaxVJP.apply(
            x, cotangent, mask, ctx.dim, ctx.temperature
        )
        return gradient, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, tangent, *_):
        x, mask = saved
        dim, temperature = ctx.dim, ctx.temperature
        y = Softmax.apply(x, mask, dim, temperature)
        return _log_softmax_jvp(y, tangent, mask, dim, temperature)


class LogSoftmaxVJP(_Kernel):
    """(x, v) -> (v - softmax(x / T) sum(v)) / T."""

    kernel = staticmethod(_kernels.log_softmax_vjp)

    @staticmethod
    def forward(x, v, mask, dim, temperature):
        return LogSoftmaxVJP.run(x, v, mask, dim, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, v, mask, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(x, v, mask)
        ctx.save_for_forward(x, v, mask)

    @staticmethod
    def expression(x, v, mask, dim, temperature):
        y = Softmax.run(x, mask, dim, temperature)
        if mask is not None:
            v = v.masked_fill(~mask, 0)
        result = v - y * v.sum(dim, keepdim=True)
        return result * _kernels.slope(temperature)

    @staticmethod
    def _x_part(x, v, w, mask, dim, temperature):
        """Derivative in x, a multiple of the (symmetric) Jacobian."""
        y = Softmax.apply(x, mask, dim, temperature)
        if mask is not None:
            v = v.masked_fill(~mask, 0)
        scale = -_kernels.slope(temperature) * v.sum(dim, keepdim=True)
        return y, scale * SoftmaxVJP.apply(y, w, mask, dim, temperature)

    @staticmethod
    def backward(ctx, cotangent):
        x, v, mask = ctx.saved_tensors
        options = mask, ctx.dim, ctx.temperature
        y, x_gradient = LogSoftmaxVJP._x_part(x, v, cotangent, *options)
        v_gradient = _log_softmax_jvp(y, cotangent, *options)
        return x_gradient, v_gradient, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, x_tangent, v_tangent, *_):
        x, v, mask = saved
        options = mask, ctx.dim, ctx.temperature
        result = 0
        if v_tangent is not None:
            result = LogSoftmaxVJP.apply(x, v_tangent, *options)
        if x_tangent is not None:
            result = (
                result + LogSoftmaxVJP._x_part(x, v, x_tangent, *options)[1]
            )
        return result


class LogSumExp(_Kernel):
    """Log-sum-exp with `dim` kept; its temperature is always 1."""

    kernel = staticmethod(_kernels.logsumexp)

    @staticmethod
    def result_shape(x, dim):
        return x.shape[:dim] + (1,) + x.shape[dim + 1 :]

    @staticmethod
    def forward(x, mask, dim, temperature):
        return LogSumExp.run(x, mask, dim, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, mask, ctx.dim, ctx.temperature = inputs
        ctx.save_for_backward(x, mask)
        ctx.save_for_forward(x, mask)

    @staticmethod
    def backward(ctx, cotangent):
        x, mask = ctx.saved_tensors
        y = LogSumExpGradient.apply(x, mask, ctx.dim, ctx.temperature)
        gradient = cotangent * y
        if mask is not None:
            gradient = gradient.masked_fill(~mask, 0)
        return gradient, None, None, None

    @staticmethod
    @_nestable
    def jvp(ctx, saved, tangent, *_):
        x, mask = saved
        y = LogSumExpGradient.apply(x, mask, ctx.dim, ctx.temperature)
        if mask is not None:
            tangent = tangent.masked_fill(~mask, 0)
        return _dot(y, tangent, ctx.dim)


class LogSumExpGradient(Softmax):
    """Softmax, but where a logit is +inf only that entry is NaN."""

    kernel = staticmethod(_kernels.logsumexp_gradient)

    @staticmethod
    def forward(x, mask, dim, temperature):
        return LogSumExpGradient.run(x, mask, dim, temperature)


def _dot(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (a * b).sum(dim, keepdim=True)


def _centre(v: Tensor, y: Tensor, mask: Tensor | None, dim: int) -> Tensor:
    """v minus its value where y is largest, 0 where masked."""
    if mask is not None:
        v = v.masked_fill(~mask, 0)
    v = v - v.gather(dim, y.argmax(dim, keepdim=True))
    return v if mask is None else v.masked_fill(~mask, 0)


def _log_softmax_jvp(y, v, mask, dim, temperature):
    """(v - y . v) / T, without the cancellation where y is nearly one."""
    v = _centre(v, y, mask, dim)
    result = (v - _dot(y, v, dim)) * _kernels.slope(temperature)
    return result if mask is None else result.masked_fill(~mask, 0)


def composite(name, x, mask, dim, temperature):
    """The function `name` in plain PyTorch operations.

    For tracing compilers, which fuse them into one loop. Halves are computed
    in float32, the others in their own format.
    """
    z = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    if mask is not None:
        z = z.masked_fill(~mask, -math.inf)
    if not z.shape[dim]:
        if name == "logsumexp":
            return x.new_full(LogSumExp.result_shape(x, dim), -math.inf)
        return x.clone()
    if name == "softmax":
        # Constant in the derivatives: they do not depend on the shift.
        index, top = None, z.detach().amax(dim, keepdim=True)
    else:
        # Not constant: the largest entry is in no other term of log_rest.
        index = z.detach().argmax(dim, keepdim=True)
        top = z.gather(dim, index)
    shift = top
    if mask is not None:
        # A fully masked row has no weight instead of NaN weights.
        shift = torch.where(mask.any(dim, keepdim=True), top, 0)
    high = z - shift
    if temperature == 0:
        high = torch.where(high < 0, -math.inf, high)
    elif temperature == math.inf:
        high = torch.where(z == -math.inf, -math.inf, z * 0 - shift * 0)
    elif temperature != 1:
        high = high / temperature
    weights = torch.exp(high)
    if name == "softmax":
        value = weights / weights.sum(dim, keepdim=True)
        return _finish(value, mask, 0.0, x.dtype)
    classes = torch.arange(x.shape[dim], device=x.device)
    classes = classes.view([-1 if d == dim else 1 for d in range(x.ndim)])
    # NaN where the largest logit is infinite.
    rest = torch.where(classes == index, shift - shift, weights)
    log_rest = torch.log1p(rest.sum(dim, keepdim=True))
    if name == "log_softmax":
        return _finish(high - log_rest, mask, -math.inf, x.dtype)
    return torch.where(top.isinf(), top, shift + log_rest).to(x.dtype)


def _finish(value, mask, masked, dtype):
    if mask is not None:
        value = value.masked_fill(~mask, masked)
    return value.to(dtype)
