"""The only dispatcher: plain, watched, traced, batched, shape-only.

An `Operation` is one idea three times: a kernel (`_kernels`), the same in
plain operations (`_plain`), and rules for its derivatives. `call` chooses.
What PyTorch keeps to itself is asked here and nowhere else;
`tests/test_autograd.py` notices when it goes away.
"""

import contextlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from softmaxlib import _check, _kernels, _plain

_ORDINARY = (Tensor, torch.nn.Parameter)


def route(*values: Any) -> Literal["plain", "watched", "kernel"]:
    """How to compute with `values`.

    "plain": in PyTorch's operations, as a compiler or exporter is at work; or
    a tensor has no values (on the device "meta", or a fake one), is of
    another subclass, which these operations respect, or is one that PyTorch
    batches behind our back (`is_grads_batched=True` and
    `torch.autograd.functional.*(vectorize=True)` ask for no vmap rule).
    "watched": derivatives of the result may be asked for. Else "kernel".
    """
    if torch.compiler.is_compiling():
        return "plain"
    if torch._C._is_tracing():
        raise RuntimeError("torch.jit.trace would keep values: use export")
    # Private: no public function says that a tensor is batched.
    watched = is_transformed()
    batched = torch._C._functorch.is_legacy_batchedtensor
    grad = torch.is_grad_enabled()
    for x in values:
        if isinstance(x, Tensor):
            if type(x) not in _ORDINARY or x.is_meta or batched(x):
                return "plain"
            watched = watched or (grad and x.requires_grad)
    return "watched" if watched else "kernel"


def is_wrapped(value: Tensor) -> bool:
    """Whether a functorch transform hides the values of a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


def is_transformed() -> bool:
    """Whether functorch, or forward mode, is at work."""
    # Private: no public function says so.
    active = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


def is_all(flags: Tensor) -> bool:
    """Whether all flags are known to be true."""
    known = route(flags) != "plain" and not is_wrapped(flags)
    return known and bool(flags.all())


def is_shape_only(x: Tensor) -> bool:
    """Whether a tensor has a shape, but no values to draw by."""
    # Private: there is no other name for tensors that are fake.
    return x.is_meta or isinstance(x, torch._subclasses.FakeTensor)


def refuse_batches(function: str, x: Tensor) -> None:
    """Raise in words where PyTorch would map over a draw, or export it."""
    if torch.compiler.is_exporting():
        raise RuntimeError(f"{function}(): torch.export cannot hold draws")
    if torch.compiler.is_compiling():
        return
    route(x)  # refuses torch.jit.trace
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            what = "torch.vmap: pass the batch as leading dimensions"
            raise RuntimeError(f"{function}(): {what}")
        x = functorch.get_unwrapped(x)


def has_derivatives(*values: Tensor) -> bool:
    """Whether a derivative in one of `values` is being taken."""
    if torch.is_grad_enabled() and any(v.requires_grad for v in values):
        return True
    return forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(v).tangent is not None for v in values
    )


def autocast_dtype(name: str, x: Tensor) -> torch.dtype | None:
    """The format in which PyTorch's own function would answer, if it casts.

    Found by asking that function for one entry: the lists of autocast
    differ between devices and are private.
    """
    if not _casts(x):
        return None
    one = x.new_zeros(1, 1)
    if name.endswith("cross_entropy"):
        return torch.nn.functional.cross_entropy(one, one).dtype
    return getattr(torch, name)(one, 1).dtype  # type: ignore[no-any-return]


def exactly(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which autocast leaves matrix products alone."""
    if not _casts(x):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _casts(x: Tensor) -> bool:
    # Private, and twenty times faster to ask than the public function.
    # It does not count that of Apple's devices.
    if not (torch._C._is_any_autocast_enabled() or x.is_mps) or x.is_meta:
        return False
    return torch.is_autocast_enabled(x.device.type)


# p (v - p . v): two public operations, which suffice where PyTorch has lost
# this private one, take two to four times as long.
_deviation = _kernels.weighted_deviation


def _in_one_pass(p: Tensor, v: Tensor, dim: int) -> Tensor:
    if p.dtype != torch.float64 and p.shape[dim] > _kernels.SHORT:
        return _deviation(p, v, dim)
    # The mean is a plain running sum.
    return torch._softmax_backward_data(v, p, dim, p.dtype)


if hasattr(torch, "_softmax_backward_data"):
    _kernels.weighted_deviation = _in_one_pass


def call(function: type[Function], *arguments: Any) -> Any:
    """`apply`, which has no types."""
    return function.apply(*arguments)


class Operation(Function):
    """A function of tensors, the class dimension and one option more.

    Each tensor may be None. The rules for derivatives come from the plain
    expression, unless an operation knows better: `pull` gives the gradients
    of the tensors for a cotangent c of the result, `push` the change of the
    result for changes of the tensors.
    """

    name: str
    tensors: int
    saves_output = False
    plain: Callable[..., Tensor]

    def __init_subclass__(cls) -> None:
        cls.plain = staticmethod(getattr(_plain, cls.name))

    @classmethod
    def call(cls, *arguments: Any) -> Tensor:
        """The result, in the way that suits the caller.

        A 0-d tensor counts as a row of one class.
        """
        if not arguments[0].ndim:
            return cls._of_one_class(*arguments)
        way = route(*arguments)
        if way == "kernel":
            return cls.run(*arguments)
        if way == "plain":
            return cls.plain(*arguments).contiguous()
        return call(cls, *arguments)  # type: ignore[no-any-return]

    @classmethod
    def _of_one_class(cls, *arguments: Any) -> Tensor:
        rows = (
            t.view(1) if isinstance(t, Tensor) else t for t in arguments
        )
        result = cls.call(*rows)
        return result.view(()) if result.ndim == 1 else result

    @classmethod
    def run(cls, *arguments: Any, **out: Tensor) -> Tensor:
        """The kernel, looked up by its name."""
        kernel: Callable[..., Tensor] = getattr(_kernels, cls.name)
        if not _casts(arguments[0]):
            return kernel(*arguments, **out)
        with exactly(arguments[0]):
            return kernel(*arguments, **out)

    @classmethod
    def forward(cls, *arguments: Any) -> Tensor:
        return cls.run(*arguments)

    @classmethod
    def setup_context(
        cls, ctx: Any, inputs: tuple[Any, ...], output: Tensor
    ) -> None:
        saved = inputs[: cls.tensors]
        if cls.saves_output:
            saved = (output, *saved[1:])
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.options = inputs[cls.tensors :]

    @classmethod
    def backward(cls, ctx: Any, c: Tensor) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[: cls.tensors]
        gradients = cls.pull(needs, ctx.saved_tensors, ctx.options, c)
        return *gradients, *(None for _ in ctx.options)

    @classmethod
    def jvp(cls, ctx: Any, *tangents: Any) -> Any:
        # PyTorch runs this with forward mode switched off, so that under a
        # second forward transform its operations would count as constant
        # and the derivative come back as a silent zero. Private: no public
        # function switches it on again.
        with forward_ad._set_fwd_grad_enabled(True):
            saved = [
                None if t is None else forward_ad.unpack_dual(t).primal
                for t in ctx.saved_tensors
            ]
            return cls.push(saved, ctx.options, tangents[: cls.tensors])

    @classmethod
    def vmap(
        cls, info: Any, in_dims: tuple[Any, ...], *arguments: Any
    ) -> tuple[Tensor, int]:
        """Move the batch to the front; it is one more leading dimension."""
        moved: list[Any] = []
        for value, batch in zip(arguments, in_dims, strict=True):
            if isinstance(value, Tensor):
                if batch is None:
                    value = value.expand(info.batch_size, *value.shape)
                else:
                    value = value.movedim(batch, 0)
            moved.append(value)
        moved[cls.tensors] += 1
        return call(cls, *moved), 0

    @classmethod
    def _vjp(cls, wanted: list[int], tensors: Any, options: Any) -> Any:
        """Of the plain expression as a function of some of the tensors."""

        def function(*values: Tensor) -> Tensor:
            inputs = list(tensors)
            for i, value in zip(wanted, values, strict=True):
                inputs[i] = value
            return cls.plain(*inputs, *options)

        return torch.func.vjp(function, *(tensors[i] for i in wanted))

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        wanted = [i for i, need in enumerate(needs) if need]
        _, transpose = cls._vjp(wanted, saved, options)
        found = dict(zip(wanted, transpose(c), strict=True))
        return [found.get(i) for i in range(cls.tensors)]

    @classmethod
    def push(cls, saved: Any, options: Any, tangents: Any) -> Any:
        # Reverse mode twice: torch.func.jvp would not nest in forward mode.
        wanted = [i for i, t in enumerate(tangents) if t is not None]
        result, transpose = cls._vjp(wanted, saved, options)
        twice = torch.func.vjp(transpose, torch.zeros_like(result))[1]
        return twice(tuple(tangents[i] for i in wanted))[0]


class Softmax(Operation):
    """(x, mask, dim, T)."""

    name, tensors, saves_output = "softmax", 2, True

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        y, mask = saved
        return [SoftmaxVJP.call(y, c, mask, *options), None]

    @classmethod
    def push(cls, saved: Any, options: Any, tangents: Any) -> Any:
        # The Jacobian is symmetric.
        y, mask = saved
        return SoftmaxVJP.call(y, tangents[0], mask, *options)


class LogSumExpGradient(Softmax):
    """(x, mask, dim, 1): softmax, but an infinite logit stands alone."""

    name = "logsumexp_gradient"


class SoftmaxVJP(Operation):
    """(y, v, mask, dim, T): the Jacobian at the softmax y times v."""

    name, tensors = "softmax_vjp", 3

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        # As y sums to one, a constant in c does nothing but cancel.
        y, _, mask = saved
        c = _plain.centred(c, y, mask, options[0])
        return super().pull(needs, saved, options, c)


class LogSoftmax(Operation):
    """(x, mask, dim, T)."""

    name, tensors = "log_softmax", 2

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        x, mask = saved
        return [LogSoftmaxVJP.call(x, c, mask, *options), None]


class LogSoftmaxVJP(Operation):
    """(x, v, mask, dim, T)."""

    name, tensors = "log_softmax_vjp", 3


class LogSumExp(Operation):
    """(x, mask, dim, 1), with the class dimension kept."""

    name, tensors = "logsumexp", 2

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        x, mask = saved
        gradient = c * LogSumExpGradient.call(x, mask, *options)
        if mask is not None:
            gradient = gradient.masked_fill(~mask, 0)
        return [gradient, None]

    @classmethod
    def push(cls, saved: Any, options: Any, tangents: Any) -> Any:
        x, mask = saved
        change = LogSumExpGradient.call(x, mask, *options) * tangents[0]
        if mask is not None:
            change = change.masked_fill(~mask, 0)
        return change.sum(options[0], keepdim=True)


class SoftmaxJVP(Operation):
    """(x, v, dim, T): the Jacobian at the logits x times v."""

    name, tensors = "softmax_jvp", 2

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        x, v = saved
        in_x = SoftmaxHVP.call(x, c, v, *options) if needs[0] else None
        in_v = SoftmaxJVP.call(x, c, *options) if needs[1] else None
        return [in_x, in_v]

    @classmethod
    def push(cls, saved: Any, options: Any, tangents: Any) -> Any:
        # The second derivative and the Jacobian are symmetric.
        needs = [t is not None for t in tangents]
        in_x = cls.pull((needs[0], 0), saved, options, tangents[0])[0]
        in_v = cls.pull((0, needs[1]), saved, options, tangents[1])[1]
        return sum(part for part in (in_x, in_v) if part is not None)


class SoftmaxHVP(Operation):
    """(x, u, v, dim, T): the second derivative contracted with both."""

    name, tensors = "softmax_hvp", 3


class SoftmaxJacobian(Operation):
    """(x, dim, T), with two class dimensions at the end."""

    name, tensors = "softmax_jacobian", 1


class LogSoftmaxJacobian(Operation):
    """(x, dim, T), with two class dimensions at the end."""

    name, tensors = "log_softmax_jacobian", 1


class SoftmaxHessian(Operation):
    """(x, dim, T), with three class dimensions at the end."""

    name, tensors = "softmax_hessian", 1


class LossGradient(Operation):
    """(x, target, weight, share, dim, smoothing)."""

    name, tensors, function = "loss_gradient", 4, "cross_entropy_gradient"

    @classmethod
    def run(cls, *arguments: Any, **out: Tensor) -> Tensor:
        # Here, as only here the values can be read in every mode.
        x, target, dim = *arguments[:2], arguments[cls.tensors]
        if not target.is_floating_point():
            _check.in_range(cls.function, target, x.shape[dim])
        return super().run(*arguments, **out)


class Loss(LossGradient):
    """(x, target, weight, dim, smoothing): in the working format."""

    name, tensors, function = "loss", 3, "cross_entropy"

    @classmethod
    def pull(cls, needs: Any, saved: Any, options: Any, c: Tensor) -> Any:
        x, target, weight = saved
        found: list[Tensor | None] = [None, None, None]
        if needs[0]:
            found[0] = LossGradient.call(x, target, weight, c, *options)
        if needs[1]:
            # -log p also where y is 0, which the expression leaves out.
            dim, eps = options
            log_p = LogSoftmax.call(x, None, dim, 1.0)
            change = (-c * log_p).masked_fill(c == 0, 0) * (1 - eps)
            change = change if weight is None else change * weight
            found[1] = change.to(target.dtype)
        if needs[2]:
            only = (False, False, True)
            found[2] = super().pull(only, saved, options, c)[2]
        return found
