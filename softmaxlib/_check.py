"""Argument checks: what was wrong, what was expected, the value seen.

The exception types are those of PyTorch's own functions. Every check takes
the name of the public function first, for the message.
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NoReturn

import torch
from torch import Tensor

_SUPPORTED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FORMATS = "float16, bfloat16, float32 or float64"


def _refuse(
    error: type[Exception], what: str, must: str, got: Any
) -> NoReturn:
    raise error(f"{what} must be {must}, got {got}")


def _seen(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"


def _kind(x: Tensor) -> str:
    return f"{x.dtype} on {x.device}"


# --- numbers and words ---------------------------------------------------


def integer(
    function: str, name: str, value: Any, low: float = -math.inf
) -> int:
    """What Python or NumPy calls an integer, but no bool."""
    if type(value) is int and value >= low:
        return value
    if isinstance(value, bool) or not isinstance(value, Integral):
        _refuse(TypeError, f"{function}(): {name}", "an int", _seen(value))
    if value < low:
        what = f"{function}(): {name}"
        _refuse(ValueError, what, f"at least {low}", value)
    return int(value)


def flag(function: str, name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        _refuse(TypeError, f"{function}(): {name}", "a bool", _seen(value))
    return value


def number(
    function: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    error: type[Exception] = ValueError,
    hint: str = "",
) -> float:
    """What Python or NumPy calls a real number, in [low, high]."""
    what = f"{function}(): {name}"
    if isinstance(value, bool) or not isinstance(value, Real):
        must = "a real number, held constant in derivatives"
        _refuse(TypeError, what, must, _seen(value))
    if not low <= value <= high:  # type: ignore[operator]  # nor NaN
        _refuse(error, what, f"in [{low:g}, {high:g}]", f"{value}{hint}")
    try:
        return float(value)
    except OverflowError:
        must = "a float or inf"
        _refuse(ValueError, what, must, "an integer beyond float64")


def temperature(function: str, value: Any) -> float:
    """A temperature in [0, inf]."""
    if type(value) is float and value >= 0:
        return value
    hint = "; for the reversed ranking pass -input and -temperature"
    return number(function, "temperature", value, hint=hint)


def smoothing(function: str, value: Any) -> float:
    """A label smoothing in [0, 1]."""
    name, error = "label_smoothing", RuntimeError
    return number(function, name, value, 0.0, 1.0, error)


def choice(function: str, name: str, value: Any, *allowed: str) -> None:
    """One of a few words."""
    if value not in allowed:
        must = f"one of {', '.join(map(repr, allowed))}"
        _refuse(ValueError, f"{function}(): {name}", must, repr(value))


def dimension(function: str, dim: Any, ndim: int) -> int:
    """`dim` as a non-negative index; a 0-d tensor counts as 1-d."""
    if type(dim) is int and 0 <= dim < ndim:
        return dim
    dim, size = integer(function, "dim", dim), max(ndim, 1)
    if not -size <= dim < size:
        must = f"in [{-size}, {size - 1}] for a {ndim}-d input"
        _refuse(IndexError, f"{function}(): dim out of range,", must, dim)
    return int(dim % size)


def dimensions(function: str, dim: Iterable[Any], ndim: int) -> list[int]:
    """Several dimensions, in ascending order; all of them for none."""
    found = sorted(dimension(function, d, ndim) for d in dim)
    if len(set(found)) < len(found):
        _refuse(RuntimeError, f"{function}(): dim", "without repeats", dim)
    return found or list(range(max(ndim, 1)))


# --- tensors -------------------------------------------------------------


def tensor(function: str, name: str, value: Any) -> Tensor:
    """A dense tensor, which these functions know how to read."""
    if type(value) is Tensor and value.layout is torch.strided:  # noqa: SIM102
        if not value.is_nested:
            return value
    what = f"{function}(): {name}"
    if not isinstance(value, Tensor):
        hint = f"{type(value).__name__}; torch.as_tensor({name}) makes one"
        _refuse(TypeError, what, "a torch.Tensor", hint)
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested one" if value.is_nested else f"{value.layout}"
        hint = (
            "; to_dense() or to_padded_tensor() makes one, but mask what "
        )
        hint = f"{kind}{hint}was absent, or it counts as a logit"
        _refuse(NotImplementedError, what, "a strided (dense) tensor", hint)
    if type(value).__name__ == "DTensor":
        hint = "a DTensor; pass full_tensor(), or to_local() where the "
        hint += "class dimension is whole on every process"
        _refuse(NotImplementedError, what, "of one process", hint)
    return value


def logits(
    function: str,
    value: Any,
    dtype: torch.dtype | None = None,
    promote: bool = False,
) -> Tensor:
    """The input, cast to `dtype` if given, in a supported format.

    Integers are promoted to the default float if `promote`, else refused.
    """
    x = tensor(function, "input", value)
    if dtype is None and x.dtype in _SUPPORTED:
        return x
    wanted = x.dtype if dtype is None else dtype
    if x.dtype.is_complex or getattr(wanted, "is_complex", False):
        hint = "complex numbers, which have no order and hence no softmax; "
        hint += "pass input.real or input.abs()"
        _refuse(NotImplementedError, f"{function}(): input", "real", hint)
    if dtype is not None:
        return x.to(floating(function, dtype))
    if promote and not x.dtype.is_floating_point:
        return x.to(torch.get_default_dtype())
    kind = "8-bit floats" if x.dtype.is_floating_point else "integers"
    hint = f"{x.dtype}; {kind} cannot hold the result: pass "
    hint += "dtype=torch.float32 to convert first"
    what = f"{function}(): input"
    _refuse(NotImplementedError, what, f"of dtype {_FORMATS}", hint)


def floating(function: str, dtype: Any) -> torch.dtype:
    """One of the four formats."""
    what = f"{function}(): dtype"
    if not isinstance(dtype, torch.dtype):
        _refuse(TypeError, what, "a torch.dtype", _seen(dtype))
    if dtype not in _SUPPORTED:
        _refuse(NotImplementedError, what, _FORMATS, dtype)
    return dtype


def like(
    function: str,
    name: str,
    value: Any,
    model: Tensor,
    shape: Sequence[int] | None = None,
    of: str = "input",
) -> Tensor:
    """Shape (or `shape`), dtype and device of the tensor called `of`."""
    x = tensor(function, name, value)
    if x.shape != (model.shape if shape is None else shape):
        why = f", that of {of}" if shape is None else ""
        _shaped(f"{function}(): {name}", x, shape or model.shape, why)
    if x.dtype != model.dtype or x.device != model.device:
        must = f"of dtype and device of {of}, {_kind(model)}"
        _refuse(RuntimeError, f"{function}(): {name}", must, _kind(x))
    return x


def _shaped(
    what: str, x: Tensor, shape: Sequence[int], why: str = ""
) -> None:
    if tuple(x.shape) != tuple(shape):
        must = f"of shape {tuple(shape)}{why}"
        _refuse(RuntimeError, what, must, tuple(x.shape))


def _together(what: str, value: Tensor, x: Tensor) -> Tensor:
    if value.device != x.device:
        must = f"on the device of input, {x.device}"
        _refuse(RuntimeError, what, must, value.device)
    return value


def mask(function: str, value: Any, x: Tensor) -> Tensor | None:
    """The mask, expanded to the shape of the input."""
    if value is None:
        return None
    m, what = tensor(function, "mask", value), f"{function}(): mask"
    if m.dtype != torch.bool:
        must = "of dtype bool (True takes part)"
        _refuse(TypeError, what, must, f"{m.dtype}; pass mask.bool()")
    _together(what, m, x)
    try:
        return m.expand(x.shape)
    except RuntimeError:
        must = f"broadcastable to the shape of input, {tuple(x.shape)}"
        _refuse(RuntimeError, what, must, tuple(m.shape))


def out(function: str, value: Tensor, shape: Any, x: Tensor) -> Tensor:
    """An output tensor of the right dtype and device; resized if empty."""
    what = f"{function}(): out"
    if value.dtype != x.dtype or value.device != x.device:
        _refuse(RuntimeError, what, f"of dtype {_kind(x)}", _kind(value))
    if value.numel():
        _shaped(what, value, shape, " or empty")
    elif tuple(value.shape) != tuple(shape):
        value.resize_(*shape)
    return value


# --- targets and weights -------------------------------------------------


def class_weight(
    function: str, value: Any, x: Tensor, dim: int, name: str = "weight"
) -> Tensor:
    """Weights of the classes, shape (K)."""
    weight, what = tensor(function, name, value), f"{function}(): {name}"
    _shaped(what, weight, x.shape[dim : dim + 1], ", one for each class")
    if not weight.dtype.is_floating_point:
        _refuse(RuntimeError, what, "floating point", weight.dtype)
    return _together(what, weight, x)


def class_indices(
    function: str, target: Tensor, x: Tensor, dim: int, soft: bool = True
) -> Tensor:
    """Class indices as int64, of the shape of `x` without `dim`.

    They might have been probabilities where `soft`.
    """
    what, shape = (
        f"{function}(): target",
        (*x.shape[:dim], *x.shape[dim + 1 :]),
    )
    kind = target.dtype
    if kind == torch.bool or kind.is_complex or kind.is_floating_point:
        must = "class indices, of an integer dtype"
        must += ", or probabilities" if soft else ""
        _refuse(RuntimeError, what, must, target.dtype)
    if target.shape[:1] != x.shape[: min(dim, 1)]:
        # PyTorch looks at the batch size first.
        must = f"of shape {shape}, that of input without its classes"
        _refuse(ValueError, what, must, tuple(target.shape))
    _shaped(what, target, shape, ", that of input without its classes")
    return _together(what, target, x).long()


def in_range(function: str, target: Tensor, classes: int) -> None:
    """Class indices in [0, K)."""
    if not target.numel():
        return
    if not classes:
        raise IndexError(f"{function}(): input has no classes, K = 0")
    low, high = (bound.item() for bound in target.aminmax())
    if low < 0 or high >= classes:
        what = f"{function}(): target out of range, class indices"
        must = f"in [0, {classes - 1}] or ignore_index"
        _refuse(IndexError, what, must, low if low < 0 else high)


def probabilities(
    function: str, target: Tensor, x: Tensor, ignore_index: int
) -> Tensor:
    """Class probabilities of the shape of `x`; their values are free."""
    what = f"{function}(): target"
    if target.shape != x.shape:
        must = "class indices, of an integer dtype such as int64, or "
        must += f"probabilities of the shape of input, {tuple(x.shape)}"
        hint = f"{target.dtype} of shape {tuple(target.shape)}"
        _refuse(RuntimeError, what, must, hint)
    if ignore_index >= 0:
        what_else = f"{function}(): ignore_index is for class indices and"
        must = "negative beside probabilities"
        _refuse(RuntimeError, what_else, must, ignore_index)
    return _together(what, target, x)


def shares(function: str, p: Tensor) -> None:
    """Probabilities, each in [0, 1]; rows need not sum to one."""
    if p.numel():
        low, high = (bound.item() for bound in p.aminmax())
        if not (low >= 0 and high <= 1):  # nor NaN
            hint = low if not low >= 0 else high
            must = (
                "probabilities in [0, 1], such as softmax makes of logits"
            )
            _refuse(ValueError, f"{function}(): input", must, hint)


def finite_loss(function: str, value: float) -> None:
    """What is summed over all samples has a finite value."""
    if not math.isfinite(value):
        must = (
            "one sample or more, of finite logits; -inf for a class that "
        )
        must += "is not the target"
        hint = f"a loss whose slope is {value}"
        _refuse(ValueError, f"{function}(): input", must, hint)


def samples(function: str, value: Any) -> Tensor:
    """Samples, shape (*batch, D)."""
    x = logits(function, value)
    if x.ndim == 0:
        what = f"{function}(): x"
        _refuse(RuntimeError, what, "of shape (..., D)", "a 0-d tensor")
    return x


def layer(function: str, weight: Any, layout: str, x: Tensor) -> int:
    """A weight (K, D), or (D, K) in the layout "dk"; returns K."""
    w, features = tensor(function, "weight", weight), x.shape[-1]
    classes, shape = w.shape[:1], w.shape[1:]
    if layout == "dk":
        classes, shape = w.shape[1:], w.shape[:1]
    if w.ndim != 2 or shape[0] != features:
        form = "(K, D)" if layout == "kd" else "(D, K)"
        must = f"of shape {form} with D = {features} as in x"
        hint = f"{tuple(w.shape)} for layout={layout!r}"
        _refuse(RuntimeError, f"{function}(): weight", must, hint)
    like(function, "weight", w, x, w.shape, of="x")
    return int(classes[0])
