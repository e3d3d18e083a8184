"""What the book's checks and the test suite share.

Hypothesis strategies for logits, an oracle in mpmath, errors in units in
the last place, and :func:`attack`, which searches for a counterexample to a
statement and returns its evidence. Needs Hypothesis and mpmath.
"""

import contextlib
import contextvars
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import hypothesis
import mpmath
import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = [
    "Evidence",
    "Oracle",
    "attack",
    "case_limit",
    "distributions",
    "enumerate_cases",
    "logits",
    "oracle",
    "smallest",
    "spacing",
    "ulp_error",
]

# A check raises where its statement fails, or returns a deviation: whatever
# `float` takes, or None.
Check = Callable[..., Any]
Example = TypeVar("Example")

_PRECISION = {
    torch.float16: (11, -14),
    torch.bfloat16: (8, -126),
    torch.float32: (24, -126),
    torch.float64: (53, -1022),
}


# --- evidence ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a check found: shown in one line, and collected by the ledger.

    Attributes:
        label: the statement, such as ``thm-order``.
        cases: how many cases were tried.
        worst: the largest deviation seen, in the unit of the check, or None
            where the check is exact.
        bound: what the deviation was allowed to be, or None.
        how: ``hypothesis``, ``enumeration`` or ``construction``.
        note: anything else worth a clause.
    """

    label: str
    cases: int
    worst: float | None = None
    bound: float | None = None
    how: str = "hypothesis"
    note: str = ""

    MIME = "application/vnd.softmaxlib.evidence+json"

    def __str__(self) -> str:
        done = "attacked with" if self.how == "hypothesis" else "tried on"
        cases = "case" if self.cases == 1 else "cases"
        parts = [f"{done} {self.cases:,} {cases}"]
        if self.worst is None:
            parts.append("none against it")
        else:
            parts.append(f"worst deviation {self.worst:.3g}")
            if self.bound is not None:
                parts[-1] += f" of {self.bound:.3g} allowed"
        said = ", ".join(parts)
        return f"{self.label}: {said}{self.note and f'; {self.note}'}"

    __repr__ = __str__

    def _repr_mimebundle_(
        self, include: Any = None, exclude: Any = None
    ) -> dict[str, str]:
        facts = dataclasses.asdict(self)
        return {"text/plain": str(self), self.MIME: json.dumps(facts)}


def _settings(cases: int, **options: Any) -> hypothesis.settings:
    """The same examples at every run and everywhere."""
    return hypothesis.settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        **options,
    )


_case_limit: contextvars.ContextVar[int | None] = contextvars.ContextVar(
    "case_limit", default=None
)


@contextlib.contextmanager
def case_limit(cases: int) -> Iterator[None]:
    """Let every :func:`attack` inside draw at most so many cases.

    For those who run many attacks and ask only whether one fails: a
    counterexample is raised as it was found, and not shrunk. Edge cases
    come first, so that few cases find most mistakes. Enumerations and
    :func:`smallest` keep their length.

    Args:
        cases: the largest number of cases, at least 1. The smallest limit
            counts where several are nested.

    Raises:
        ValueError: ``cases`` is less than one.

    Example:
        >>> from hypothesis import strategies as st
        >>> with case_limit(5):
        ...     @attack("thm-square", st.integers(-9, 9), cases=50)
        ...     def squares(n):
        ...         assert n * n >= 0
        >>> squares.cases
        5
    """
    if cases < 1:
        raise ValueError(
            f"case_limit(): cases must be at least 1, got {cases}"
        )
    outer = _case_limit.get()
    token = _case_limit.set(cases if outer is None else min(cases, outer))
    try:
        yield
    finally:
        _case_limit.reset(token)


def _attack_settings(cases: int) -> hypothesis.settings:
    """Those of an attack, under the limit of the context."""
    limit = _case_limit.get()
    if limit is None:
        return _settings(cases)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    return _settings(min(cases, limit), phases=phases)


def _deviation(
    label: str, check: Check, values: tuple[Any, ...], bound: float | None
) -> float | None:
    """Run one case; None if the check measures nothing."""
    measured = check(*values)
    if measured is None:
        return None
    deviation = float(measured)
    if bound is None:
        raise TypeError(f"{label}: a deviation needs a bound")
    # Written so that NaN fails.
    assert deviation <= bound, (
        f"{label}: deviation {deviation:.6g} exceeds {bound:.6g} for {values}"
    )
    return deviation


def _larger(worst: float | None, deviation: float | None) -> float | None:
    known = [d for d in (worst, deviation) if d is not None]
    return max(known, default=None)


def attack(
    label: str,
    *strategies: st.SearchStrategy,
    cases: int = 200,
    bound: float | None = None,
    note: str = "",
) -> Callable[[Check], Evidence]:
    """Search for a counterexample to a statement; a decorator.

    The decorated function takes one value from each strategy. It raises
    (``assert`` will do) where the statement fails, or returns the deviation
    it measured, which must not exceed ``bound``. Hypothesis draws ``cases``
    examples, the same ones at every run, edge cases first; on a failure it
    shrinks the counterexample and raises with it. Inside :func:`case_limit`
    it draws fewer and shrinks nothing.

    Args:
        label: the label of the statement under attack.
        strategies: Hypothesis strategies for the arguments.
        cases: how many examples to draw.
        bound: the largest deviation allowed; needed if the function
            returns deviations.
        note: a clause for the evidence.

    Returns:
        A decorator that runs the attack at once and binds the
        :class:`Evidence` to the function's name.

    Raises:
        AssertionError: a counterexample was found; it is in the message.

    Example:
        >>> from hypothesis import strategies as st
        >>> @attack("thm-square", st.integers(-9, 9), cases=50)
        ... def squares(n):
        ...     assert n * n >= 0
        >>> squares.label
        'thm-square'
    """

    def run(check: Check) -> Evidence:
        tried = 0
        worst: float | None = None

        def body(values: tuple[Any, ...]) -> None:
            nonlocal tried, worst
            tried += 1
            worst = _larger(worst, _deviation(label, check, values, bound))

        test = hypothesis.given(st.tuples(*strategies))(body)
        _attack_settings(cases)(test)()
        return Evidence(label, tried, worst, bound, "hypothesis", note)

    return run


def enumerate_cases(
    label: str,
    cases: Iterable[Any],
    check: Check,
    *,
    bound: float | None = None,
    note: str = "",
) -> Evidence:
    """Check every one of finitely many cases.

    Args:
        label: the label of the statement.
        cases: an iterable; each item is passed to ``check``, tuples
            unpacked.
        check: raises where the statement fails, or returns the deviation.
        bound: the largest deviation allowed.
        note: a clause for the evidence.

    Returns:
        The :class:`Evidence`, with the number of cases.

    Raises:
        AssertionError: a case fails, or there was none at all.

    Example:
        >>> enumerate_cases("thm-even", range(0, 9, 2), lambda n: n % 2,
        ...                 bound=0)
        thm-even: tried on 5 cases, worst deviation 0 of 0 allowed
    """
    tried = 0
    worst: float | None = None
    for case in cases:
        tried += 1
        values = case if isinstance(case, tuple) else (case,)
        worst = _larger(worst, _deviation(label, check, values, bound))
    assert tried, f"{label}: no case was tried"
    return Evidence(label, tried, worst, bound, "enumeration", note)


def smallest(
    strategy: st.SearchStrategy[Example],
    condition: Callable[[Example], Any],
) -> Example:
    """The smallest example for which `condition` holds, by shrinking.

    Args:
        strategy: where to search.
        condition: a predicate on examples.

    Returns:
        The example; the same one at every run.

    Raises:
        hypothesis.errors.NoSuchExample: nothing was found.

    Example:
        >>> from hypothesis import strategies as st
        >>> smallest(st.integers(), lambda n: n * n > 50)
        8
    """
    return hypothesis.find(strategy, condition, settings=_settings(5000))


# --- strategies ----------------------------------------------------------


def _to_tensor(values: list[float], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


@st.composite
def logits(
    draw: st.DrawFn,
    *,
    min_classes: int = 1,
    max_classes: int = 8,
    magnitude: float = 30.0,
    dtype: torch.dtype = torch.float64,
    kinds: Sequence[str] = ("real", "integer", "tied", "near", "offset"),
) -> Tensor:
    """Vectors of logits, shape (K,).

    Args:
        min_classes, max_classes: the range of K.
        magnitude: the largest \\|logit\\|.
        dtype: of the result.
        kinds: which sorts to mix: ``real`` numbers; small ``integer``
            values, which bring ties; all ``tied``; ``near`` ties, 1e-9 to
            1e-3 apart; an ``offset`` far larger than the spread; ``wide``,
            one entry far above the others.
    """
    size = draw(st.integers(min_classes, max_classes))
    kind = draw(st.sampled_from(tuple(kinds)))
    real = st.floats(-magnitude, magnitude, allow_subnormal=False)
    unit = st.floats(-1, 1, allow_subnormal=False)

    def vector(elements: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(elements, min_size=size, max_size=size))

    if kind == "real":
        return _to_tensor(vector(real), dtype)
    if kind == "integer":
        top = max(1, min(5, int(magnitude)))
        return _to_tensor(vector(st.integers(-top, top)), dtype)
    if kind == "tied":
        return _to_tensor([draw(real)] * size, dtype)
    base = draw(real)
    if kind == "near":
        step = draw(st.sampled_from((1e-9, 1e-6, 1e-3)))
        return _to_tensor([base + step * v for v in vector(unit)], dtype)
    if kind == "offset":
        values = [base + v for v in vector(unit)]
        return _to_tensor(values, dtype)
    if kind == "wide":
        values = vector(unit)
        values[draw(st.integers(0, size - 1))] += magnitude
        return _to_tensor(values, dtype)
    raise ValueError(f"unknown kind of logits: {kind!r}")


@st.composite
def distributions(
    draw: st.DrawFn,
    *,
    min_classes: int = 1,
    max_classes: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Probability vectors with full support, shape (K,).

    Normalised weights between 1e-3 and 1, with no softmax involved.
    """
    size = draw(st.integers(min_classes, max_classes))
    weights = draw(
        st.lists(st.floats(1e-3, 1.0), min_size=size, max_size=size)
    )
    total = math.fsum(weights)
    return _to_tensor([w / total for w in weights], dtype)


# --- oracle and errors ---------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Softmax, log-softmax and log-sum-exp as mpmath numbers."""

    softmax: list[mpmath.mpf]
    log_softmax: list[mpmath.mpf]
    logsumexp: mpmath.mpf


def oracle(
    z: Tensor | Iterable[Any],
    temperature: float = 1.0,
    *,
    bits: int | None = None,
) -> Oracle:
    """Softmax in mpmath, independent of the library's arithmetic.

    Args:
        z: logits, a 1-d tensor or sequence of numbers; taken exactly.
        temperature: positive; ``logsumexp`` is that of z / T.
        bits: working precision; by default enough for the result to be
            right to more than 100 bits.

    Returns:
        An :class:`Oracle` of mpmath numbers.
    """
    values = z.tolist() if isinstance(z, Tensor) else list(z)
    exact = [mpmath.mpf(v) for v in values]
    if bits is None:
        # The winner's log-probability may be as small as exp(-range).
        spread = (max(exact) - min(exact)) / mpmath.mpf(temperature)
        bits = 160 + int(min(spread * 1.5, 6000))
    with mpmath.workprec(bits):
        scaled = [v / mpmath.mpf(temperature) for v in exact]
        top = max(scaled)
        weights = [mpmath.exp(v - top) for v in scaled]
        total = mpmath.fsum(weights)
        log_total = mpmath.log(total)
        return Oracle(
            [w / total for w in weights],
            [v - top - log_total for v in scaled],
            top + log_total,
        )


def spacing(value: Any, dtype: torch.dtype) -> mpmath.mpf:
    """The unit in the last place of `dtype` at a real number."""
    digits, smallest_exponent = _PRECISION[dtype]
    value = abs(mpmath.mpf(value))
    exponent = smallest_exponent
    if value:
        exponent = max(exponent, mpmath.frexp(value)[1] - 1)
    return mpmath.ldexp(mpmath.mpf(1), exponent - digits + 1)


def ulp_error(
    computed: Tensor, exact: Sequence[Any], *, scale: Any = None
) -> float:
    r"""The largest error of a tensor, in units in the last place.

    Args:
        computed: any shape, flattened.
        exact: as many mpmath numbers.
        scale: measure every error in the spacing of numbers at ``scale``
            instead of at the exact value.

    Returns:
        The maximum of \|computed - exact\| / ulp(exact). inf where NaN was
        computed, or an infinity in the place of a representable value. 0 for
        no entries.

    Raises:
        ValueError: the numbers of computed and exact values differ.

    Example:
        >>> import torch
        >>> from softmaxlib import softmax
        >>> z = torch.tensor([1.0, 2.0, 3.0])
        >>> ulp_error(softmax(z, 0), oracle(z).softmax) <= 0.51
        True
    """
    digits, smallest_exponent = _PRECISION[computed.dtype]
    got = computed.detach().double().flatten().numpy()
    # Each exact value as the sum of two floats.
    high = np.array([float(b) for b in exact])
    low = np.array(
        [
            float(b - h) if math.isfinite(h) else 0.0
            for b, h in zip(exact, high.tolist(), strict=True)
        ]
    )
    if got.shape != high.shape:
        raise ValueError(
            f"ulp_error(): {got.size} computed values, {high.size} exact"
        )
    if not got.size:
        return 0.0
    with np.errstate(all="ignore"):
        error = np.abs((got - high) - low)
        fraction, exponent = np.frexp(np.abs(high))
        # The exact value lies below the power of two that it rounds to.
        below = (fraction == 0.5) & (np.sign(low) == -np.sign(high))
        exponent = np.where(
            high == 0, smallest_exponent, exponent - 1 - below
        )
        exponent = np.maximum(exponent, smallest_exponent)
        unit = np.ldexp(1.0, exponent - digits + 1)
        if scale is not None:
            unit = float(spacing(scale, computed.dtype))
        error = error / unit
    # Infinity is right where the exact value is beyond the format.
    beyond = np.abs(high) > torch.finfo(computed.dtype).max
    right = np.isinf(got) & beyond & (np.sign(got) == np.sign(high))
    error = np.where(right, 0.0, error)
    return math.inf if np.isnan(error).any() else float(error.max())
