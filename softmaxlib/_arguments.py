"""Argument checks: what was wrong, what was expected, the value seen.

The exception types are those of PyTorch's own functions.
"""

import math
from numbers import Real

import torch
from torch import Tensor

_SUPPORTED = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


def tensor(function: str, name: str, value) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): {name} must be a torch.Tensor, got "
            f"{type(value).__name__}; torch.as_tensor({name}) makes one"
        )
    if value.layout != torch.strided:
        raise NotImplementedError(
            f"{function}(): {name} must be a strided (dense) tensor, got "
            f"layout {value.layout}; {name}.to_dense() makes one, but "
            f"mind that absent entries then count as logit 0"
        )
    return value


def logits(function: str, value, dtype, promote: bool = False) -> Tensor:
    """The input, cast to `dtype` if given, in a supported format.

    Integers are promoted to the default float if `promote`, else refused.
    """
    value = tensor(function, "input", value)
    if dtype is None and value.dtype in _SUPPORTED:
        return value
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"{function}(): dtype must be a torch.dtype or None, got "
            f"{type(dtype).__name__} {dtype!r}"
        )
    if value.dtype.is_complex or (dtype is not None and dtype.is_complex):
        raise NotImplementedError(
            f"{function}(): complex numbers have no order and hence no "
            f"softmax; expected a real floating-point dtype, got "
            f"{value.dtype if dtype is None else dtype}; pass input.real "
            f"or input.abs()"
        )
    if dtype is not None:
        if dtype not in _SUPPORTED:
            raise NotImplementedError(
                f"{function}(): dtype must be float16, bfloat16, float32 "
                f"or float64, got {dtype}"
            )
        return value.to(dtype)
    if promote and not value.dtype.is_floating_point:
        return value.to(torch.get_default_dtype())
    kind = "8-bit floats" if value.dtype.is_floating_point else "integers"
    raise NotImplementedError(
        f"{function}(): {kind} cannot hold the result; expected an input "
        f"of dtype float16, bfloat16, float32 or float64, got "
        f"{value.dtype}; pass dtype=torch.float32 to convert first"
    )


def dimension(function: str, dim, ndim: int) -> int:
    """`dim` as a non-negative index; a 0-d tensor counts as 1-d."""
    if type(dim) is not int and (
        isinstance(dim, bool) or not isinstance(dim, int)
    ):
        raise TypeError(
            f"{function}(): dim must be an int, got "
            f"{type(dim).__name__} {dim!r}"
        )
    size = max(ndim, 1)
    if not -size <= dim < size:
        raise IndexError(
            f"{function}(): dim out of range, expected to be in "
            f"[{-size}, {size - 1}] for a {ndim}-d input, got {dim}"
        )
    return dim % size


def temperature(function: str, value) -> float:
    # A float first: to ask whether a number is Real takes longer.
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, Real)
    ):
        raise TypeError(
            f"{function}(): temperature must be a real number, held "
            f"constant in derivatives, got {type(value).__name__}; to "
            f"differentiate in it, divide the logits yourself"
        )
    try:
        value = float(value)
    except OverflowError:
        raise ValueError(
            f"{function}(): temperature must be a float or inf, got an "
            f"integer beyond the range of float64; pass math.inf"
        ) from None
    if math.isnan(value) or value < 0:
        raise ValueError(
            f"{function}(): temperature must be in [0, inf], got {value}; "
            f"for the reversed ranking of a negative temperature pass "
            f"-input and -temperature"
        )
    return value


def same_shape(function: str, name: str, value, input: Tensor) -> Tensor:
    """A tangent or cotangent: shape, dtype and device of the input."""
    value = tensor(function, name, value)
    if value.shape != input.shape:
        raise RuntimeError(
            f"{function}(): {name} must have the shape of input, "
            f"{tuple(input.shape)}, got {tuple(value.shape)}"
        )
    if value.dtype != input.dtype or value.device != input.device:
        raise RuntimeError(
            f"{function}(): {name} must have the dtype and device of "
            f"input, {input.dtype} on {input.device}, got {value.dtype} "
            f"on {value.device}"
        )
    return value


def mask(function: str, value, input: Tensor) -> Tensor | None:
    """The mask, expanded to the shape of the input."""
    if value is None:
        return None
    value = tensor(function, "mask", value)
    if value.dtype != torch.bool:
        raise TypeError(
            f"{function}(): mask must be of dtype bool (True takes part), "
            f"got {value.dtype}; pass mask.bool()"
        )
    if value.device != input.device:
        raise RuntimeError(
            f"{function}(): mask must be on the device of input, "
            f"{input.device}, got {value.device}"
        )
    try:
        return value.expand(input.shape)
    except RuntimeError:
        raise RuntimeError(
            f"{function}(): mask must be broadcastable to the shape of "
            f"input, {tuple(input.shape)}, got {tuple(value.shape)}"
        ) from None


def out(function: str, value, shape, like: Tensor) -> Tensor:
    """An output tensor of the right dtype and device; resized if empty."""
    value = tensor(function, "out", value)
    if value.dtype != like.dtype or value.device != like.device:
        raise RuntimeError(
            f"{function}(): out must be of dtype {like.dtype} on "
            f"{like.device}, got {value.dtype} on {value.device}"
        )
    if torch.is_grad_enabled() and (
        like.requires_grad or value.requires_grad
    ):
        raise RuntimeError(
            f"{function}(): out= does not support automatic "
            f"differentiation, but one of the tensors requires grad; "
            f"detach it or use torch.no_grad()"
        )
    if value.shape != shape:
        if value.numel():
            raise RuntimeError(
                f"{function}(): out must be empty or of shape "
                f"{tuple(shape)}, got {tuple(value.shape)}"
            )
        value.resize_(shape)
    return value
