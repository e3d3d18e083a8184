"""The loss of a linear layer as one operation of our own.

A compiler sees no logits in it, and autograd one step with gradients. More
than that it has not: other derivatives and transforms are refused in words.
"""

from typing import Any

import torch
from torch import Tensor

from softmaxlib import _blocks, _linear
from softmaxlib._autograd import exactly, is_transformed, route

_REFUSED = (
    "linear_cross_entropy() has first derivatives in x, weight and bias, by "
    "backward passes; for other derivatives, torch.func and forward mode "
    "use cross_entropy(F.linear(x, weight, bias), target)"
)


def linear_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    case: _linear.Case,
    share: Tensor | None,
    fast: bool,
) -> Tensor:
    """The losses (N, 1), or for shares (N, 1) the sum of share times loss."""
    inputs, grad = (x, weight, bias, *case[:2]), torch.is_grad_enabled()
    asks = [t is not None and t.requires_grad and grad for t in inputs]
    if is_transformed() or any(asks[3:]):
        raise RuntimeError(_REFUSED)
    now, needs, arguments = None, [False] * 3, (*inputs[:3], softcap, *case)
    # A compiler would keep the gradients that the forward pass finds.
    if share is not None and any(asks) and route(x) != "plain":
        now, needs, share = share, asks[:3], None
    found: Tensor = _linear_loss(now, needs, fast, *arguments)[0]
    return found if share is None else (found * share).sum()


@torch.library.custom_op(
    "softmaxlib::linear_loss",
    mutates_args=(),
    schema="(Tensor? share, bool[] needs, bool fast, Tensor x, Tensor weight,"
    " Tensor? bias, float? softcap, Tensor target, Tensor? class_weight,"
    " float smoothing, float square) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_loss(
    share: Tensor | None, needs: Any, fast: bool, x: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    """The loss, and for shares the gradients that it needs, or nothing."""
    layer, case = _linear.Layer(*rest[:3]), _linear.Case(*rest[3:])
    with exactly(x):
        loss, found = _linear.losses(x, layer, case, share, needs, fast)
    return loss, *(x.new_empty(0) if g is None else g for g in found)


@_linear_loss.register_fake
def _(share: Any, needs: Any, _: bool, *inputs: Any) -> tuple[Tensor, ...]:
    x, pairs = inputs[0], zip(inputs[:3], needs, strict=True)
    shape = (len(x), 1) if share is None else ()
    loss = x.new_empty(shape, dtype=_blocks.work_dtype(x))
    return loss, *(x.new_empty(t.shape if need else 0) for t, need in pairs)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    share, _, fast, *layer, softcap, target, weight, eps, square = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(share, *layer, target, weight)
    ctx.options = fast, softcap, eps, square
    # Without a way back to what has this context, which would last.
    ctx.found = None if share is None else [g.detach() for g in output[1:]]


def _pull(ctx: Any, c: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """The first pass takes what the forward pass has, the next computes."""
    share, *layer, target, weight = ctx.saved_tensors
    fast, softcap, *rest = ctx.options
    needs, found, ctx.found = ctx.needs_input_grad[3:6], ctx.found, None
    if c is None:
        return (None,) * 11
    if torch.is_grad_enabled() or (found and route(c) == "plain"):
        raise RuntimeError(_REFUSED)
    if found is None:
        c = c if share is None else share * c
        case = *layer, softcap, target, weight, *rest
        found = _linear_loss(c, list(needs), fast, *case)[1:]
    elif c != 1:
        found = [g.mul_(c) for g in found]
    parts = [g if n else None for g, n in zip(found, needs, strict=True)]
    return None, None, None, *parts, *(None for _ in range(5))


_linear_loss.register_autograd(_pull, setup_context=_save)
