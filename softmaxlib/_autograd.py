"""The only dispatcher: plain, watched, traced, batched, shape-only.

An `Operation` is one idea three times: a kernel (`_kernels`), the same in
plain operations (`_plain`), and rules for its derivatives. `call` chooses.
What PyTorch keeps to itself is asked here and nowhere else;
`tests/test_autograd.py` notices when it goes away.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from softmaxlib import _blocks, _check, _kernels, _linear, _plain

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
    # Private: no public function says that a functorch transform is active,
    # that forward-mode differentiation is, or that a tensor is batched.
    watched = torch._C._are_functorch_transforms_active()
    watched = watched or forward_ad._current_level >= 0
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
    if x.is_meta or not (x.is_mps or torch._C._is_any_autocast_enabled()):
        return False
    return torch.is_autocast_enabled(x.device.type)


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


# --- the loss of a linear layer ------------------------------------------


def linear_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    case: _linear.Case,
    share: Tensor | None,
    fast: bool,
) -> Tensor:
    """The losses (N, 1), or for shares (N, 1) the sum of share times loss.

    No way of computing it has all logits, but that for derivatives of
    derivatives, of transforms and in targets and class weights.
    """
    arguments = x, weight, bias, softcap, *case
    rows: Tensor
    way = route(x, weight, bias, case.target, case.weight)
    if way != "kernel" and (_transforms() or _wants(case)):
        way = "plain"
    elif torch.compiler.is_compiling():
        rows = _linear_losses(*arguments, fast)
        return rows if share is None else (rows * share).sum()
    with exactly(x):
        if way == "watched":
            rows, share = call(LinearLoss, share, fast, *arguments), None
        elif way == "kernel":
            rows = _linear.losses(*_linear.parted(arguments))
        else:
            rows = _plain.linear_loss(*arguments)
    return rows if share is None else (rows * share).sum()


def _wants(case: _linear.Case) -> bool:
    """Whether a derivative in target or class weights may be asked for."""
    given = case.target, case.weight
    wanted = any(t is not None and t.requires_grad for t in given)
    return wanted and torch.is_grad_enabled()


def _transforms() -> bool:
    """Whether functorch, or forward mode, is at work."""
    active = torch._C._are_functorch_transforms_active()
    return active or forward_ad._current_level >= 0


class LinearLoss(Function):
    """(share, fast, x, weight, bias, softcap, *case).

    With shares the forward pass has the gradients, and the first backward
    pass takes them; another one computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any, share: Tensor | None, fast: bool, *arguments: Any
    ) -> Tensor:
        ctx.save_for_backward(*arguments[:3])
        ctx.options, ctx.found = (share, fast, arguments[3:]), None
        parts = _linear.parted(arguments)
        if share is None:
            return _linear.losses(*parts)
        needs = ctx.needs_input_grad[2:5]
        total, ctx.found = _linear.both(*parts, share, needs, fast)
        return total

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Any, ...]:
        share, fast, rest = ctx.options
        arguments, needs = (*ctx.saved_tensors, *rest), ctx.needs_input_grad
        found, ctx.found = ctx.found, None
        with exactly(c):
            if torch.is_grad_enabled() or route(c) == "plain":
                found = _again(arguments, needs[2:5], share, c)
            elif found is None:
                each = c if share is None else share * c
                parts = _linear.parted(arguments)
                _, found = _linear.both(*parts, each, needs[2:5], fast)
            elif c != 1:
                for part in found:
                    if part is not None:
                        part.mul_(c)
        return None, None, *found, *(None for _ in rest)


def _again(
    arguments: Any, needs: Sequence[bool], share: Tensor | None, c: Tensor
) -> list[Tensor | None]:
    """The gradients in differentiable operations, with all logits."""
    with torch.enable_grad():
        rows = _plain.linear_loss(*arguments)
        value = rows if share is None else (rows * share).sum()
        wanted = [i for i, need in enumerate(needs) if need]
        tensors = [arguments[i] for i in wanted]
        parts = torch.autograd.grad(value, tensors, c, create_graph=True)
    found = dict(zip(wanted, parts, strict=True))
    return [found.get(i) for i in range(3)]


# A compiler sees one operation in each direction, and no logits.
_ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor? bias, float? softcap, Tensor target, "
    "Tensor? class_weight, float smoothing, float square"
)


@torch.library.custom_op(
    "softmaxlib::linear_losses",
    mutates_args=(),
    schema=f"({_ARGUMENTS}, bool fast) -> Tensor",
)
def _linear_losses(*arguments: Any) -> Tensor:
    with exactly(arguments[0]):
        return _linear.losses(*_linear.parted(arguments[:-1]))


@torch.library.custom_op(
    "softmaxlib::linear_gradients",
    mutates_args=(),
    schema=f"(Tensor share, bool[] needs, {_ARGUMENTS}, bool fast)"
    " -> (Tensor, Tensor, Tensor)",
)
def _linear_gradients(
    share: Tensor, needs: Any, *arguments: Any
) -> tuple[Tensor, ...]:
    x, layer, case = _linear.parted(arguments[:-1])
    with exactly(x):
        _, found = _linear.both(x, layer, case, share, needs, arguments[-1])
    return tuple(x.new_empty(0) if g is None else g for g in found)


@_linear_losses.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((len(x), 1), dtype=_blocks.work_dtype(x))


@_linear_gradients.register_fake
def _(share: Tensor, needs: Any, x: Any, *rest: Any) -> tuple[Tensor, ...]:
    pairs = zip((x, *rest[:2]), needs, strict=True)
    return tuple(x.new_empty(t.shape if n else (0,)) for t, n in pairs)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:3], *inputs[4:6])
    ctx.options = inputs[3], inputs[6:]


def _pull(ctx: Any, c: Tensor) -> tuple[Any, ...]:
    *layer, target, weight = ctx.saved_tensors
    (softcap, rest), needs = ctx.options, ctx.needs_input_grad[:3]
    case = softcap, target, weight, *rest
    found = _linear_gradients(c, list(needs), *layer, *case)
    pairs = zip(found, needs, strict=True)
    return *(g if need else None for g, need in pairs), *(
        None for _ in range(6)
    )


_linear_losses.register_autograd(_pull, setup_context=_save)
