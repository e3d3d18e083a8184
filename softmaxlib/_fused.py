"""The loss of a linear layer, differentiable in every mode.

What the dispatcher is for operations on logits, this is for the one that has
none: eager as a function of autograd, compiled as two operations of our own,
and by way of all logits where PyTorch must see what is computed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from softmaxlib import _blocks, _linear, _plain
from softmaxlib._autograd import call, exactly, is_transformed, route


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
    if way != "kernel" and (is_transformed() or _wants(case)):
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
