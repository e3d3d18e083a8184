"""What is promised holds however a function is called.

One set of cases, whose values and gradients mpmath knows, runs in every mode:
eager, compiled, exported, under vmap, under autocast, in other threads; and
for its shapes and formats on tensors without values. Below that, what each
mode promises or refuses on its own.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable

import mpmath
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import softmaxlib as s
from softmaxlib.testing import spacing

F16, BF16 = torch.float16, torch.bfloat16
F32, F64 = torch.float32, torch.float64
INF, NAN = math.inf, math.nan
TINY = 1e-300
ONES = itertools.repeat(True)


# --- the truth -----------------------------------------------------------
# An entry is a pair of mpmath numbers: the value, and the size of the terms
# that add up to it, of which an error may be so many units.


def sized(value, scale=None):
    return value, abs(value if scale is None else scale)


# An entry that is 0 or NaN, as the way of computing has it: a derivative
# of a row without values, at a limit of the temperature.
FREE = None
ZERO, NOTHING = sized(mpmath.mpf(0)), sized(mpmath.mpf("nan"))


@functools.cache
def distribution(row, mask, T):
    """p, 1 - p and log p of a row; None where there is none."""
    alive = [z for z, m in zip(row, mask, strict=True) if m]
    top = max(alive, default=-INF)
    if any(math.isnan(z) for z in alive) or math.isinf(top):
        return None
    with mpmath.workprec(2000):
        logs = []
        for z, m in zip(row, mask, strict=True):
            if not m or z == -INF or (T == 0 and z < top):
                logs.append(mpmath.mpf("-inf"))
            elif T in (0, INF):
                logs.append(mpmath.mpf(0))
            else:
                logs.append((mpmath.mpf(z) - top) / mpmath.mpf(T))
        weights = [
            mpmath.exp(v) if v > -5000 else mpmath.mpf(0) for v in logs
        ]
        total = mpmath.fsum(weights)
        p = [w / total for w in weights]
        rest = [mpmath.fsum(p[:i] + p[i + 1 :]) for i in range(len(p))]
        return p, rest, [v - mpmath.log(total) for v in logs]


def slope(T):
    return mpmath.mpf(0) if T in (0, INF) else 1 / mpmath.mpf(T)


def true_softmax(row, mask, T):
    known = distribution(row, mask, T)
    if known is None:
        return [NOTHING if m and any(mask) else ZERO for m in mask]
    return [sized(v) for v in known[0]]


def true_log_softmax(row, mask, T):
    known = distribution(row, mask, T)
    minus = sized(mpmath.mpf("-inf"))
    if known is None:
        return [NOTHING if m else minus for m in mask]
    return [sized(v) for v in known[2]]


def true_jvp(row, mask, T, v):
    """p_i sum_j p_j (v_i - v_j) / T, which has no cancelling mean."""
    known = distribution(row, mask, T)
    if known is None:
        return [NOTHING if m else ZERO for m in mask]
    p, found = known[0], []
    for i, m in enumerate(mask):
        terms = [p[j] * (v[i] - v[j]) for j in range(len(p)) if mask[j]]
        factor = p[i] * slope(T) if m else 0
        found.append(
            sized(
                factor * mpmath.fsum(terms),
                factor * mpmath.fsum(map(abs, terms)),
            )
        )
    return found


def true_log_vjp(row, mask, T, v):
    """(v_i (1 - p_i) - p_i sum of the other v) / T."""
    known = distribution(row, mask, T)
    if known is None:
        return [NOTHING if m else ZERO for m in mask]
    p, rest, _ = known
    v, found = [c if m else 0 for c, m in zip(v, mask, strict=True)], []
    for i, m in enumerate(mask):
        terms = [v[i] * rest[i]]
        terms += [-p[i] * v[j] for j in range(len(p)) if j != i]
        factor = slope(T) if m else 0
        found.append(
            sized(
                factor * mpmath.fsum(terms),
                factor * mpmath.fsum(map(abs, terms)),
            )
        )
    return found


def true_lse(row, mask):
    alive = [z for z, m in zip(row, mask, strict=True) if m]
    top = max(alive, default=-INF)
    if any(math.isnan(z) for z in alive):
        return NOTHING
    if math.isinf(top):
        return sized(mpmath.mpf(top))
    p = distribution(row, mask, 1)[0]
    with mpmath.workprec(2000):
        value = top - mpmath.log(max(p))
    return sized(value, max(abs(value), abs(top), math.log(len(row))))


def true_lse_gradient(row, mask, c):
    alive = [z for z, m in zip(row, mask, strict=True) if m]
    if any(math.isnan(z) for z in alive) or max(alive, default=0) == -INF:
        return [NOTHING if m else ZERO for m in mask]
    if max(alive, default=0) == INF:
        pairs = zip(row, mask, strict=True)
        return [NOTHING if m and z == INF else ZERO for z, m in pairs]
    p = distribution(row, mask, 1)
    return [sized(c * v) for v in p[0]] if p else [ZERO for _ in row]


def true_loss(row, q):
    known = distribution(row, (True,) * len(row), 1)
    if known is None:
        return NOTHING
    pairs = zip(q, known[2], strict=True)
    return sized(mpmath.fsum(-a * b for a, b in pairs if a))


def true_loss_gradient(row, q, share):
    if not share:
        return [ZERO for _ in row]
    found = true_log_vjp(row, (True,) * len(row), 1, q)
    return [sized(-share * v, share * scale) for v, scale in found]


def wrong(got, exact, ulps):
    """What of a tensor is not the truth, in words; nothing if it is."""
    values, found = got.detach().flatten().tolist(), []
    if len(values) != len(exact):
        return [f"{len(values)} entries, not {len(exact)}"]
    largest = torch.finfo(got.dtype).max
    for i, (value, truth) in enumerate(zip(values, exact, strict=True)):
        if truth is FREE:
            truth = NOTHING if math.isnan(value) else ZERO
        true, scale = truth
        if mpmath.isnan(true) or mpmath.isnan(value):
            right = mpmath.isnan(true) and mpmath.isnan(value)
        elif math.isinf(value) or mpmath.isinf(true):
            right = (value > 0) == (true > 0) and math.isinf(value)
            right = right and abs(true) > largest
        else:
            unit = spacing(min(scale, largest), got.dtype)
            right = abs(value - true) <= ulps * unit
        if not right:
            found.append(f"[{i}] = {value}, not {mpmath.nstr(true, 9)}")
    return found


# --- the cases -----------------------------------------------------------


@dataclasses.dataclass
class Case:
    """A call, its true value and gradient, and how near they must be.

    The gradient is that in the first tensor, for the cotangent. `wide` is
    the bound for float64, where a mode runs plain operations.
    """

    name: str
    function: Callable
    tensors: tuple
    value: list
    cotangent: torch.Tensor | None = None
    gradient: list | None = None
    ulps: float = 0.51
    gradient_ulps: float = 0.51
    wide: float = 0.0

    @property
    def dtype(self):
        return self.tensors[0].dtype


ROWS = (
    (0.5, -1.25, 2.5, 0.0, 1.0),
    (40.0, 0.0, -1.0, 0.5, 3.0),
    (-150.0, 300.0, 0.0, 1.0, -2.0),
    (2.0, 2.0, 2.0, -1.0, 0.0),
    (0.0, 0.0, 0.0, 0.0, 0.0),
    (1.0, -INF, 2.0, -INF, 0.0),
    (-INF, -INF, 3.0, -INF, -INF),
    (-INF, -INF, -INF, -INF, -INF),
    (1.0, INF, 0.0, 0.0, -INF),
    (INF, 0.0, INF, 1.0, 2.0),
    (1.0, NAN, 0.0, 0.0, -INF),
    (NAN, INF, -INF, 0.0, 0.0),
)
EVERYTHING = (True,) * 5
MASKS = (
    (True, False, True, True, False),
    (False, True, True, True, True),
    (True, True, False, False, True),
    (True, False, True, True, True),
    (False, False, False, False, True),
    (False, True, False, True, False),
    (False, True, False, True, True),
    (False, False, False, False, False),
    (True, False, True, True, True),
    (True, False, False, True, True),
    (True, False, True, True, True),
    (False, False, False, False, False),
)
COTANGENT = (
    (1.0, 0.5, -2.0, 0.25, 0.0),
    (-1.0, 0.0, 0.0, 0.0, 0.0),
    (0.0, -1.0, 0.5, 0.0, 2.0),
) * 4
# The same for all entries of a row, as log-sum-exp has one.
PER_ROW = (1.0, -0.5, 2.0) * 4


def flat(rows):
    return [entry for row in rows for entry in row]


def case_of(function, log, T, masked, dtype):
    x = torch.tensor(ROWS, dtype=dtype)
    c = torch.tensor(COTANGENT, dtype=dtype)
    masks = MASKS if masked else (EVERYTHING,) * len(ROWS)
    truth = true_log_softmax if log else true_softmax
    change = true_log_vjp if log else true_jvp
    rows = list(zip(ROWS, masks, COTANGENT, strict=True))
    gap = 450 / T if 0 < T < INF else 0
    return Case(
        f"{function.__name__}, T = {T}{', masked' * masked}",
        (lambda x, m: function(x, 1, temperature=T, mask=m))
        if masked
        else lambda x: function(x, 1, temperature=T),
        (x, torch.tensor(masks)) if masked else (x,),
        flat(truth(row, m, T) for row, m, _ in rows),
        c,
        [
            FREE if T in (0, INF) and e is NOTHING else e
            for row, m, v in rows
            for e in change(row, m, T, v)
        ],
        # A backward pass starts from probabilities as they were rounded.
        gradient_ulps=0.51 if log else 3.0,
        wide=5 + min(gap, 750),
    )


def values(dtype):
    both = ((s.softmax, False), (s.log_softmax, True))
    temperatures = (0.0, TINY, 0.5, 1.0, 2.0, INF)
    if dtype in (F16, F64):
        temperatures = (0.5, 1.0)
    found = [
        case_of(function, log, T, masked, dtype)
        for function, log in both
        for T in temperatures
        for masked in (False, True)
    ]
    x = torch.tensor(ROWS, dtype=dtype)
    c = torch.tensor(PER_ROW, dtype=dtype)
    for masked in (False, True):
        masks = MASKS if masked else (EVERYTHING,) * len(ROWS)
        rows = list(zip(ROWS, masks, PER_ROW, strict=True))
        found.append(
            Case(
                f"logsumexp{', masked' * masked}",
                (lambda x, m: s.logsumexp(x, 1, mask=m))
                if masked
                else lambda x: s.logsumexp(x, 1),
                (x, torch.tensor(masks)) if masked else (x,),
                [true_lse(row, m) for row, m, _ in rows],
                c,
                flat(true_lse_gradient(*row) for row in rows),
                wide=4 + 450,
            )
        )
    return found


LOGITS = (
    (0.5, -1.0, 2.0, 0.0),
    (40.0, 0.0, -1.0, 3.0),
    (0.0, 30.0, 1.0, -INF),
    (NAN, 0.0, 1.0, 2.0),
    (1.0, INF, 0.0, 0.0),
    (-INF, -INF, -INF, -INF),
    (1.0, 0.0, NAN, INF),
    (-INF, -INF, -INF, -INF),
    (0.0, 1.0, INF, 1.0),
)
# The last class weighs nothing; -100 is ignored.
TARGETS = (2, 0, 1, -100, -100, -100, 3, 3, 3)
WEIGHT = (1.0, 0.5, 2.0, 0.0)
# Whose losses are not numbers, or infinite.
SPECIAL = (
    (NAN, 0.0, 1.0, 2.0),
    (1.0, INF, 0.0, 0.0),
    (-INF, -INF, -INF, -INF),
    (1.0, 0.0, -INF, 2.0),
    (40.0, 0.0, -1.0, 3.0),
)
SPECIAL_TARGETS = (1, 0, 2, 2, 3)
PROBABILITIES = (
    (0.5, 0.25, 0.25, 0.0),
    (1.0, 0.0, 0.0, 0.0),
    (0.0, 1.0, 0.5, 0.0),
)


def one_hot(t, weight, eps):
    """What a row of weighted, smoothed targets is."""
    return tuple(
        w * ((1 - mpmath.mpf(eps)) * (k == t) + mpmath.mpf(eps) / 4)
        for k, w in enumerate(weight)
    )


def loss_case(name, rows, qs, shares, options, targets, dtype, reduction):
    """A loss, whose rows have the targets q and these shares of it."""
    x = torch.tensor(rows, dtype=dtype)
    found = [
        sized(share * true_loss(row, q)[0]) if share else ZERO
        for row, q, share in zip(rows, qs, shares, strict=True)
    ]
    c = torch.ones(len(rows) if reduction == "none" else (), dtype=dtype)
    if reduction != "none":
        found = [sized(mpmath.fsum(v for v, _ in found))]
    gradient = flat(map(true_loss_gradient, rows, qs, shares))
    options = {"reduction": reduction, **options}

    def loss(x, t, weight=None):
        return s.cross_entropy(x, t, weight=weight, **options)

    def closed(x, t, weight=None):
        return s.cross_entropy_gradient(x, t, weight=weight, **options)

    title, rest = f"{name}, {reduction}", {"wide": 900}
    tensors = (x, *targets)
    return [
        Case(title, loss, tensors, found, c, gradient, **rest),
        Case(f"gradient of {title}", closed, tensors, gradient, **rest),
    ]


def losses(dtype):
    weight, found = torch.tensor(WEIGHT), []
    for reduction in ("mean", "sum", "none"):
        # Rows that do not count for what they are, or weigh nothing.
        t = torch.tensor(TARGETS)
        qs = [one_hot(k, WEIGHT, 0) for k in TARGETS]
        w = [0 if k < 0 else WEIGHT[k] for k in TARGETS]
        shares = [bool(v) / (3.5 if reduction == "mean" else 1) for v in w]
        shares = [
            mpmath.mpf(2) / 7 if v not in (0, 1) else v for v in shares
        ]
        found += loss_case(
            "silent rows",
            LOGITS,
            qs,
            shares,
            {},
            (t, weight),
            dtype,
            reduction,
        )
        # Ignored ones only, with smoothing, which gives each class a part.
        n = 6
        shares = [1, 1, 1, 0, 0, 0]
        if reduction == "mean":
            shares = [mpmath.mpf(v) / 3 for v in shares]
        logits = LOGITS[:2] + ((0.0, 30.0, 1.0, 2.0),) + LOGITS[3:6]
        found += loss_case(
            "smooth",
            logits,
            [one_hot(k, (1,) * 4, 0.25) for k in TARGETS[:n]],
            shares,
            {"label_smoothing": 0.25},
            (t[:n],),
            dtype,
            reduction,
        )
        # Probabilities, with weights.
        third = mpmath.mpf(1) / 3 if reduction == "mean" else 1
        found += loss_case(
            "probabilities",
            LOGITS[:3],
            [
                tuple(a * b for a, b in zip(y, WEIGHT, strict=True))
                for y in PROBABILITIES
            ],
            [third] * 3,
            {},
            (torch.tensor(PROBABILITIES, dtype=dtype), weight),
            dtype,
            reduction,
        )
    found += loss_case(
        "special rows",
        SPECIAL,
        [one_hot(k, (1,) * 4, 0) for k in SPECIAL_TARGETS],
        [1] * 5,
        {},
        (torch.tensor(SPECIAL_TARGETS),),
        dtype,
        "none",
    )
    return found + soft_losses(dtype)


def soft_losses(dtype):
    # Targets that sum to 2, too, and that are 0 at -inf.
    y = (*PROBABILITIES[:2], (0.5, 1.0, 0.5, 0.0), PROBABILITIES[0])
    rows, third = list(LOGITS[:4]), mpmath.mpf(1) / 4
    if dtype == F64:
        # There, a compiled derivative in the target stops at the largest
        # number, short of infinity.
        rows[2] = (0.0, 30.0, 1.0, 2.0)
    x, t = torch.tensor(rows, dtype=dtype), torch.tensor(y, dtype=dtype)
    loss = [true_loss(*pair) for pair in zip(rows, y, strict=True)]
    gradient = flat(map(true_loss_gradient, rows, y, (1,) * 4))
    mean = flat(map(true_loss_gradient, rows, y, (third,) * 4))
    in_target = flat(true_log_softmax(row, (True,) * 4, 1) for row in rows)
    none = {"reduction": "none"}
    one = torch.ones(4, dtype=dtype)
    return [
        Case(
            "soft_cross_entropy",
            lambda x, y: s.soft_cross_entropy(x, y, **none),
            (x, t),
            loss,
            one,
            gradient,
            wide=900,
        ),
        Case(
            "soft_cross_entropy_gradient",
            s.soft_cross_entropy_gradient,
            (x, t),
            mean,
            wide=900,
        ),
        Case(
            "soft_cross_entropy in the target",
            lambda y, x: s.soft_cross_entropy(x, y, **none),
            (t, x),
            loss,
            one,
            [sized(-v) for v, _ in in_target],
            wide=900,
        ),
    ]


POINTS = (
    (0.5, -1.0, 2.0, 0.0),
    (40.0, 0.0, -1.0, 3.0),
    (1.0, -INF, 2.0, -INF),
    (-INF, -INF, -INF, -INF),
    (1.0, INF, 0.0, 0.0),
    (1.0, NAN, 0.0, 0.0),
)
TANGENT = ((1.0, 0.5, -2.0, 0.25), (0.0, 2.0, 1.0, 0.0)) * 3
OTHER = ((0.0, 1.0, 0.5, -1.0), (1.0, -2.0, 0.0, 0.5)) * 3
FOUR = (True,) * 4


def unit(k):
    return tuple(float(i == k) for i in range(4))


def true_hvp(row, T, u, v):
    """p_i (the third cumulant of u, v and the class i) / T^2."""
    known = distribution(row, FOUR, T)
    if known is None:
        return [NOTHING] * 4
    p, _rest, _ = known

    def apart(w, i):  # w_i minus its mean: sum_j p_j (w_i - w_j)
        return mpmath.fsum(p[j] * (w[i] - w[j]) for j in range(4))

    with mpmath.workprec(2000):
        a = [apart(u, i) for i in range(4)]
        b = [apart(v, i) for i in range(4)]
        both = [x * y for x, y in zip(a, b, strict=True)]
        size = max(map(abs, u)) * max(map(abs, v))
        scale = slope(T) ** 2
        return [
            sized(p[i] * apart(both, i) * scale, p[i] * size * scale)
            for i in range(4)
        ]


def derivatives(dtype):
    x = torch.tensor(POINTS, dtype=dtype)
    u, v = (torch.tensor(t, dtype=dtype) for t in (OTHER, TANGENT))
    found = []
    for T in (0.0, 0.5, 1.0, INF):
        t = {"temperature": T}
        jacobian, log_jacobian, hessian = [], [], []
        for row in POINTS:
            for i in range(4):
                jacobian += true_jvp(row, FOUR, T, unit(i))
                # d log p_i: row i of the transposed vector products.
                log_jacobian += true_log_vjp(row, FOUR, T, unit(i))
                for j in range(4):
                    hessian += true_hvp_at(row, T, i, j)
        pairs = zip(POINTS, TANGENT, strict=True)
        product = flat(true_jvp(row, FOUR, T, w) for row, w in pairs)
        triples = zip(POINTS, OTHER, TANGENT, strict=True)
        second = flat(true_hvp(row, T, a, b) for row, a, b in triples)
        bound = {"wide": 1000, "ulps": 2.0 if dtype == F32 else 0.51}
        loose = {"wide": 1000, "ulps": 90.0 if dtype == F32 else 0.51}
        found += [
            Case(f"{f.__name__}, T = {T}", partial(f, **k), a, e, **b)
            for f, a, e, k, b in (
                (s.softmax_jacobian, (x,), jacobian, t, bound),
                (s.log_softmax_jacobian, (x,), log_jacobian, t, bound),
                (s.softmax_hessian, (x,), hessian, t, bound),
                (s.softmax_jvp, (x, v), product, t, bound),
                (s.softmax_vjp, (x, v), product, t, bound),
                (s.softmax_hvp, (x, u, v), second, t, loose),
            )
        ]
        if T == 1:
            found += [
                Case(
                    "logsumexp_hessian",
                    partial(s.logsumexp_hessian),
                    (x,),
                    jacobian,
                    **bound,
                ),
                Case(
                    "logsumexp_hvp",
                    partial(s.logsumexp_hvp),
                    (x, v),
                    product,
                    **bound,
                ),
            ]
    return found


def partial(function, **options):
    """With the class dimension 1."""

    def call(*tensors):
        return function(*tensors, 1, **options)

    return call


def true_hvp_at(row, T, i, j):
    """Entries (i, j, k) of the third cumulant, in products."""
    known = distribution(row, FOUR, T)
    if known is None:
        return [NOTHING] * 4
    p, rest, _ = known
    scale, found = slope(T) ** 2, []
    for k in range(4):
        same = len({i, j, k})
        if same == 3:
            value = 2 * p[i] * p[j] * p[k]
            size = value
        elif same == 2:
            # The class that stands twice, and the other.
            twice = i if i in (j, k) else j
            once = ({i, j, k} - {twice}).pop()
            value = p[once] * p[twice] * (p[twice] - rest[twice])
            size = p[once] * p[twice]
        else:
            value = p[i] * rest[i] * (rest[i] - p[i])
            size = p[i] * rest[i]
        found.append(sized(value * scale, size * scale))
    return found


GROUPS = {
    "values in float32": lambda: values(F32),
    "values in bfloat16": lambda: values(BF16),
    "values in float16": lambda: values(F16),
    "values in float64": lambda: values(F64),
    "losses in float32": lambda: losses(F32),
    "losses in bfloat16": lambda: losses(BF16),
    "losses in float64": lambda: losses(F64),
    "derivatives in float32": lambda: derivatives(F32),
    "derivatives in bfloat16": lambda: derivatives(BF16),
    "derivatives in float64": lambda: derivatives(F64),
}


@functools.cache
def group(name):
    return GROUPS[name]()


# --- the modes -----------------------------------------------------------


class All(torch.nn.Module):
    """All cases of a group in one graph."""

    def __init__(self, cases):
        super().__init__()
        self.functions = [case.function for case in cases]

    def forward(self, arguments):
        pairs = zip(self.functions, arguments, strict=True)
        return [function(*tensors) for function, tensors in pairs]


def leaves(cases):
    """The tensors of the cases, the first of each to be differentiated."""
    return [
        (
            case.tensors[0]
            .clone()
            .requires_grad_(case.cotangent is not None),
            *case.tensors[1:],
        )
        for case in cases
    ]


def gradients(cases, arguments, results):
    """Each in the first tensor; None where none is asked for."""
    wanted = [
        i for i, case in enumerate(cases) if case.cotangent is not None
    ]
    if not wanted:
        return [None] * len(cases)
    found = torch.autograd.grad(
        [results[i] for i in wanted],
        [arguments[i][0] for i in wanted],
        [cases[i].cotangent.to(results[i]) for i in wanted],
    )
    found = dict(zip(wanted, found, strict=True))
    return [found.get(i) for i in range(len(cases))]


def eager(cases):
    arguments = leaves(cases)
    results = All(cases)(arguments)
    return results, gradients(cases, arguments, results)


def compiled(cases, **options):
    torch._dynamo.reset()
    arguments = leaves(cases)
    options = options or {"backend": "aot_eager"}
    results = torch.compile(All(cases), fullgraph=True, **options)(
        arguments
    )
    return results, gradients(cases, arguments, results)


def exported(cases):
    arguments = leaves(cases)
    apart = [tuple(t.detach().clone() for t in a) for a in arguments]
    program = torch.export.export(All(cases), (apart,))
    results = program.module()(arguments)
    return results, gradients(cases, arguments, results)


def vmapped(cases):
    """The case and another one, of which the other is thrown away."""
    arguments = leaves(cases)
    results = []
    for case, tensors in zip(cases, arguments, strict=True):
        batch = [torch.stack([t, t.roll(1, 0)]) for t in tensors]
        results.append(torch.vmap(case.function)(*batch)[0])
    return results, gradients(cases, arguments, results)


def autocast(cases):
    arguments = leaves(cases)
    with torch.autocast("cpu", BF16):
        results = All(cases)(arguments)
    return results, gradients(cases, arguments, results)


def threaded(cases):
    """In two threads at once, while this one differentiates forward."""
    found = [None, None]

    def work(i):
        found[i] = eager(cases)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    with forward_ad.dual_level(), torch.no_grad():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for a, b in zip(
        *(itertools.chain(*pair) for pair in found), strict=True
    ):
        assert a is b or torch.equal(a.nan_to_num(9), b.nan_to_num(9))
    return found[0]


MODES = (eager, vmapped, autocast, threaded, compiled, exported)
# Where plain operations run, and float64 is as good as they are.
PLAIN = (compiled, exported)
# The graphs are the same for all formats, and compiling takes its time.
LEFT_OUT = {
    compiled: (
        "values in bfloat16",
        "values in float16",
        "losses in bfloat16",
        "losses in float64",
        "derivatives in bfloat16",
        "derivatives in float64",
    ),
    exported: ("values in float32", "losses in float32"),
}


def compare(cases, results, found, plain):
    """Assert that all results, and gradients, are the truth."""
    bad = []
    for case, result, gradient in zip(cases, results, found, strict=True):
        ulps, gradient_ulps = case.ulps, case.gradient_ulps
        if case.dtype == F64:
            rounded = plain or case.wide > 800
            ulps, gradient_ulps = case.wide if rounded else 5.0, 1000.0
        words = wrong(result, case.value, ulps)
        if gradient is not None:
            assert gradient.dtype == case.dtype
            words += [
                f"gradient {word}"
                for word in wrong(gradient, case.gradient, gradient_ulps)
            ]
        bad += [f"{case.name}: {word}" for word in words]
    assert not bad, "\n".join(bad[:40])


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        pytest.param(mode, name, id=f"{mode.__name__} {name}")
        for mode in MODES
        for name in GROUPS
        if name not in LEFT_OUT.get(mode, ())
    ],
)
def test_truth(mode, name):
    cases = group(name)
    compare(cases, *mode(cases), mode in PLAIN)


@pytest.mark.slow
def test_truth_by_inductor():
    wanted = (
        "softmax, T = 1.0",
        "log_softmax, T = 0.5, masked",
        "logsumexp",
        "silent rows, mean",
        "gradient of silent rows, mean",
        "softmax_jacobian, T = 0.5",
    )
    everything = [c for name in GROUPS for c in group(name)]
    cases = [c for c in everything if c.dtype == F32 and c.name in wanted]
    assert len(cases) == len(wanted)
    # The processor's word on its vector instructions is good enough: to
    # try a program for each kind takes a third of the time.
    options = {"cpp.vec_isa_ok": True}
    compare(cases, *compiled(cases, options=options), True)


@pytest.mark.parametrize("name", GROUPS)
def test_shapes_without_values(name):
    """Shapes, strides and formats on the device "meta", and of fakes."""
    cases = group(name)
    expected = [t for part in eager(cases) for t in part]
    for convert, context in without_values():
        with context:
            arguments = [
                tuple(map(convert, tensors)) for tensors in leaves(cases)
            ]
            results = All(cases)(arguments)
            found = gradients(cases, arguments, results)
        for got, expect in zip((*results, *found), expected, strict=True):
            assert (got is None) == (expect is None)
            if got is not None:
                assert got.shape == expect.shape
                assert got.dtype == expect.dtype
                assert got.is_contiguous()


def without_values():
    """How to take the values of tensors, and where."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    yield to_meta, contextlib.nullcontext()
    yield mode.from_tensor, mode


def to_meta(t):
    return t.detach().to("meta").requires_grad_(t.requires_grad)


# --- softmax regression --------------------------------------------------


def textbook_loss(x, weight, target, bias):
    """In weights and biases alone, for autograd to differentiate."""
    z = x @ weight.mT + bias
    if target.is_floating_point():
        y = target
    else:
        y = torch.nn.functional.one_hot(target, len(weight)).to(x.dtype)
    return -(y * torch.log_softmax(z, -1)).sum(-1).mean()


def randn(*shape, seed=0, dtype=F32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def regression():
    """Functions of tensors, and what they must give."""
    x, weight, bias = randn(7, 3), randn(4, 3, seed=1), randn(4, seed=2)
    v, v_bias = randn(4, 3, seed=3), randn(4, seed=4)
    t = torch.tensor([0, 1, 2, 3, 0, 1, 2])
    y = torch.softmax(randn(7, 4, seed=5), 1)
    wide = [a.double() for a in (x, weight, bias, v, v_bias, y)]
    xd, wd, bd, vd, v_bias_d, yd = wide

    def loss(w, b):
        return textbook_loss(xd, w, t, b)

    def soft(w, b):
        return textbook_loss(xd, w, yd, b)

    both = (0, 1)
    gradient = torch.func.grad(loss, both)
    change = torch.func.jvp(gradient, (wd, bd), (vd, v_bias_d))[1]
    hessian = torch.func.hessian(loss)(wd, bd).reshape(12, 12)
    return [
        (s.weight_gradient, (x, weight, t, bias), gradient(wd, bd)),
        (
            s.weight_gradient,
            (x, weight, y, bias),
            torch.func.grad(soft, both)(wd, bd),
        ),
        (
            lambda x, w, v, b, c: s.weight_hvp(
                x, w, v, b, bias_direction=c
            ),
            (x, weight, v, bias, v_bias),
            change,
        ),
        (s.weight_hessian, (x, weight, bias), hessian),
    ]


def in_one_graph(call, tensors):
    return torch.compile(call, fullgraph=True, backend="aot_eager")(
        *tensors
    )


def as_program(call, tensors):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call(*tensors)

    program = torch.export.export(Module(), tensors)
    return program.module()(*tensors)


def in_a_batch(call, tensors):
    batch = [torch.stack([t, t.roll(1, 0)]) for t in tensors]
    found = torch.vmap(call)(*batch)
    return tuple(f[0] for f in found) if type(found) is tuple else found[0]


def under_autocast(call, tensors):
    with torch.autocast("cpu", BF16):
        return call(*tensors)


def in_a_thread(call, tensors):
    found = []
    thread = threading.Thread(target=lambda: found.append(call(*tensors)))
    thread.start()
    thread.join()
    return found[0]


def directly(call, tensors):
    return call(*tensors)


def on_meta(call, tensors):
    return call(*(t.to("meta") for t in tensors))


def as_fakes(call, tensors):
    with FakeTensorMode() as mode:
        return call(*map(mode.from_tensor, tensors))


WITH_VALUES = (
    directly,
    in_one_graph,
    as_program,
    in_a_batch,
    under_autocast,
    in_a_thread,
)
WITHOUT = (on_meta, as_fakes)


def name_of(way):
    return way.__name__


@pytest.mark.parametrize("way", WITH_VALUES + WITHOUT, ids=name_of)
def test_derivatives_in_weights(way):
    for call, tensors, expected in regression():
        got = way(call, tensors)
        if way in WITHOUT:
            got = torch.utils._pytree.tree_map(torch.zeros_like, got)
            for a, b in zip(tuple(got), tuple(expected), strict=True):
                assert a.shape == b.shape
                assert a.dtype == F32
            continue
        torch.testing.assert_close(
            got, expected, rtol=1e-5, atol=1e-6, check_dtype=False
        )


def linear_losses(x, weight, target, bias):
    """Three reductions, and their gradients in x, weight and bias."""
    found = []
    for reduction in ("mean", "sum", "none"):
        inputs = [v.detach().requires_grad_() for v in (x, weight, bias)]
        loss = s.linear_cross_entropy(
            inputs[0],
            inputs[1],
            target,
            inputs[2],
            reduction=reduction,
            label_smoothing=0.1,
            softcap=4.0,
            z_loss=0.01,
        )
        total = loss.square().sum()
        found += [loss.detach(), *torch.autograd.grad(total, inputs)]
    return found


@pytest.mark.parametrize("way", WITH_VALUES + WITHOUT, ids=name_of)
def test_linear_loss(way):
    x, weight = randn(2, 3, 4), randn(7, 4, seed=1)
    target = torch.tensor([[0, 6, 2], [-100, 1, 1]])
    tensors = x, weight, target, randn(7, seed=2)
    expected = linear_losses(
        *(t.double() if t.is_floating_point() else t for t in tensors)
    )
    if way in (in_one_graph, as_program):
        # No compiler takes gradients inside: only the losses.
        def call(x, weight, target, bias):
            return [
                s.linear_cross_entropy(
                    x,
                    weight,
                    target,
                    bias,
                    reduction=reduction,
                    label_smoothing=0.1,
                    softcap=4.0,
                    z_loss=0.01,
                )
                for reduction in ("mean", "sum", "none")
            ]

        inputs = [v.requires_grad_(v is not target) for v in tensors]
        losses = way(call, tuple(inputs))
        del inputs[2]
        got = []
        for loss in losses:
            total = loss.square().sum()
            parts = torch.autograd.grad(total, inputs, retain_graph=True)
            got += [loss, *parts]
    elif way is in_a_batch:
        with pytest.raises(RuntimeError, match="by backward passes"):
            way(s.linear_cross_entropy, tensors)
        return
    else:
        got = way(linear_losses, tensors)
    for one, expect in zip(got, expected, strict=True):
        assert one.shape == expect.shape
        assert one.dtype == F32
        if way not in WITHOUT:
            torch.testing.assert_close(
                one, expect, rtol=2e-5, atol=1e-5, check_dtype=False
            )


@pytest.mark.parametrize(
    "transform", ["grad", "jvp", "vmap", "target", "class_weight"]
)
def test_linear_loss_transformed_in_a_graph(transform):
    """Our own operation has no such rule, and must not give zeros."""
    weight, target = randn(7, 4, seed=1), torch.tensor([0, 6, 2])
    x, watched = randn(3, 4), torch.ones(7).requires_grad_()

    def loss(x, weight):
        return s.linear_cross_entropy(x, weight, target)

    asked = {
        "grad": lambda x: torch.func.grad(loss, (0, 1))(x, weight),
        "jvp": lambda x: torch.func.jvp(loss, (x, weight), (x, weight)),
        "vmap": lambda x: torch.vmap(loss, (0, None))(x[None], weight),
        "target": lambda x: s.linear_cross_entropy(
            x, weight, watched.expand(3, 7)
        ),
        "class_weight": lambda x: s.linear_cross_entropy(
            x, weight, target, class_weight=watched
        ),
    }
    torch._dynamo.reset()
    with pytest.raises(Exception, match="by backward passes"):
        in_one_graph(asked[transform], (x,))


@pytest.mark.parametrize(
    "way", [directly, under_autocast, in_a_thread], ids=name_of
)
def test_fit(way):
    x, t = randn(30, 3), torch.arange(30) % 4

    def fit(x, t):
        model = s.SoftmaxRegression(3, 4, penalty=0.1).fit(x, t)
        assert model.converged
        return model.weight.detach(), model.bias.detach()

    got = way(fit, (x, t))
    weight, bias = (p.double().requires_grad_() for p in got)
    loss = textbook_loss(x.double(), weight, t, bias)
    loss = loss + 0.05 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-5
    assert got[0].dtype == F32
    assert torch.equal(got[0], fit(x, t)[0])


@pytest.mark.parametrize("way", WITH_VALUES + WITHOUT, ids=name_of)
def test_layers(way):
    x, t = randn(6, 5), torch.tensor([0, 4, 2, -100, 1, 1])
    weight = torch.linspace(0.5, 1.5, 5)
    softmax, log_softmax = s.Softmax(1, temperature=0.5), s.LogSoftmax(-1)
    loss = s.CrossEntropyLoss(weight=weight, label_smoothing=0.1)

    def layers(x, t, weight):
        lost = torch.func.functional_call(loss, {"weight": weight}, (x, t))
        return softmax(x), log_softmax(x), lost

    z = x.double()
    expected = (
        torch.softmax(z / 0.5, 1),
        torch.log_softmax(z, 1),
        torch.nn.functional.cross_entropy(
            z, t, weight=weight.double(), label_smoothing=0.1
        ),
    )
    got = way(layers, (x, t, weight))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == F32
        if way in WITHOUT:
            assert a.shape == b.shape
        else:
            torch.testing.assert_close(a, b.float(), rtol=1e-6, atol=0)


def odd_shapes(z, row, cube, many, none, t, ts, flags):
    """Functions of a scalar, a row, a cube, and of nothing."""
    return (
        s.softmax(z, 0, temperature=0.5),
        s.log_softmax(z, -1),
        s.logsumexp(z, 0),
        s.softmax_jacobian(z, 0),
        s.softmax_jvp(z, z, 0),
        s.cross_entropy(row, t, label_smoothing=0.1),
        s.cross_entropy_gradient(row, t),
        s.logsumexp(cube, (0, 2), keepdim=True),
        s.logsumexp(cube, (), mask=flags),
        s.logsumexp(cube, (2, 1), mask=flags),
        s.softmax(cube, 1, mask=flags),
        s.log_softmax(cube.movedim(0, 2), 0, mask=flags[0, ..., None]),
        s.cross_entropy(cube, ts, reduction="none"),
        s.cross_entropy_gradient(cube, ts),
        s.soft_cross_entropy(cube, cube.square(), 0, reduction="sum"),
        s.log_softmax_jacobian(cube, 1, temperature=2.0),
        s.softmax_hessian(cube.mT, 0),
        s.softmax(many, 1),
        s.log_softmax(none, 1),
        s.logsumexp(none, 1),
        s.logsumexp(many, 1),
        s.softmax_jacobian(none, 1),
        s.softmax_hvp(none, none, none, 1),
        s.soft_cross_entropy(none, none),
        s.soft_cross_entropy_gradient(none, none),
        s.cross_entropy(many, many, reduction="sum"),
    )


@pytest.mark.parametrize("way", [directly, in_one_graph], ids=name_of)
@pytest.mark.parametrize("shape", [(3, 0), (0, 3)])
def test_gradients_of_nothing(way, shape):
    def everything(x):
        return (
            s.softmax(x, 1),
            s.log_softmax(x, 1),
            s.logsumexp(x, 1),
            s.softmax_jvp(x, x, 1),
            s.softmax_hvp(x, x, x, 1),
            s.softmax_jacobian(x, 1),
            s.soft_cross_entropy(x, x.detach(), reduction="sum"),
        )

    x = torch.empty(shape, requires_grad=True)
    results = way(everything, (x,))
    assert all(result.requires_grad for result in results)
    total = sum(result.sum() for result in results)
    assert torch.autograd.grad(total, x)[0].shape == shape


@pytest.mark.parametrize(
    "way", [in_one_graph, as_program, in_a_batch, *WITHOUT], ids=name_of
)
def test_odd_shapes(way):
    tensors = (
        randn(1)[0],
        randn(4),
        randn(2, 3, 5),
        torch.empty(0, 3),
        torch.empty(3, 0),
        torch.tensor(2),
        torch.arange(10).view(2, 5) % 3,
        (torch.arange(15) % 4 > 0).view(1, 3, 5),
    )
    expected = odd_shapes(*tensors)
    if way is in_a_batch:
        batch = [torch.stack([t, t]) for t in tensors]
        results = [r[1] for r in torch.vmap(odd_shapes)(*batch)]
    else:
        results = way(odd_shapes, tensors)
    for got, expect in zip(results, expected, strict=True):
        assert got.shape == expect.shape
        assert got.dtype == expect.dtype
        if way is not in_a_batch:
            assert got.is_contiguous()
        if way not in WITHOUT:
            torch.testing.assert_close(
                got, expect, rtol=3e-7, atol=1e-9, equal_nan=True
            )


# --- the graph of autograd -----------------------------------------------


LAYER = randn(5, 4, seed=10)


def public():
    """Every differentiable function of logits (3, 4), by its name."""
    t, y = torch.tensor([0, 3, -100]), torch.softmax(randn(3, 4, seed=7), 1)
    v, half = randn(3, 4, seed=8), {"temperature": 0.5}
    u = randn(3, 4, seed=9)
    return {
        "softmax": lambda x: s.softmax(x, 1, **half),
        "log_softmax": lambda x: s.log_softmax(x, 1, **half),
        "logsumexp": lambda x: s.logsumexp(x, 1),
        "cross_entropy": lambda x: s.cross_entropy(x, t),
        "cross_entropy_gradient": lambda x: s.cross_entropy_gradient(x, t),
        "linear_cross_entropy": lambda x: s.linear_cross_entropy(
            x, LAYER.to(x.dtype), t
        ),
        "soft_cross_entropy": lambda x: s.soft_cross_entropy(
            x, y.to(x.dtype)
        ),
        "soft_cross_entropy_gradient": lambda x: (
            s.soft_cross_entropy_gradient(x, y.to(x.dtype))
        ),
        "softmax_jacobian": lambda x: s.softmax_jacobian(x, 1, **half),
        "log_softmax_jacobian": lambda x: s.log_softmax_jacobian(x, 1),
        "softmax_hessian": lambda x: s.softmax_hessian(x, 1),
        "logsumexp_hessian": lambda x: s.logsumexp_hessian(x, 1),
        "softmax_jvp": lambda x: s.softmax_jvp(x, v.to(x.dtype), 1),
        "softmax_vjp": lambda x: s.softmax_vjp(x, v.to(x.dtype), 1),
        "softmax_hvp": lambda x: s.softmax_hvp(
            x, u.to(x.dtype), v.to(x.dtype), 1
        ),
        "logsumexp_hvp": lambda x: s.logsumexp_hvp(x, v.to(x.dtype), 1),
    }


def textbook(x):
    """What PyTorch gives for some of these, to differentiate twice."""
    t, z = torch.tensor([0, 3, -100]), x @ LAYER.to(x.dtype).mT
    return {
        "softmax": torch.softmax(x / 0.5, 1),
        "log_softmax": torch.log_softmax(x / 0.5, 1),
        "logsumexp": torch.logsumexp(x, 1),
        "cross_entropy": torch.nn.functional.cross_entropy(x, t),
        "linear_cross_entropy": torch.nn.functional.cross_entropy(z, t),
    }


FUNCTIONS = list(public())
# That of a layer refuses what these are asked for.
TWICE = [name for name in textbook(torch.zeros(3, 4)) if "lin" not in name]


def twice(function, x):
    """The gradient of a square of the gradient of a square."""
    (first,) = torch.autograd.grad(
        function(x).square().sum(), x, create_graph=True
    )
    return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("name", TWICE)
def test_double_backward_is_that_of_the_formula(name):
    x = randn(3, 4, dtype=F64).requires_grad_()
    got = twice(public()[name], x)
    expect = twice(lambda x: textbook(x)[name], x)
    torch.testing.assert_close(got, expect, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "name", ["softmax", "cross_entropy", "linear_cross_entropy"]
)
def test_double_backward_through_a_compiler(name):
    """PyTorch has none, and says so; nor have we."""
    for function in (public()[name], lambda x: textbook(x)[name]):
        torch._dynamo.reset()
        call = torch.compile(function, fullgraph=True, backend="aot_eager")
        x = randn(3, 4).requires_grad_()
        with pytest.raises(RuntimeError, match="double backward"):
            twice(call, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_graph_can_be_walked(name):
    x = randn(3, 4).requires_grad_()
    names, left = [], [public()[name](x).grad_fn]
    while left:
        node = left.pop()
        names.append(node.name())
        left += [after for after, _ in node.next_functions if after]
    assert any("AccumulateGrad" in name for name in names)
    assert all(type(name) is str and name for name in names)


@pytest.mark.parametrize(
    "function", [s.softmax, s.log_softmax, s.logsumexp], ids=name_of
)
def test_out_takes_no_derivative(function):
    theirs = getattr(torch, function.__name__)
    x, shape = randn(3, 4), (3,) if function is s.logsumexp else (3, 4)
    words = "does not support automatic differentiation"

    def into(function, x):
        return function(x, 1, out=torch.empty(shape))

    with pytest.raises(RuntimeError, match=words):
        into(function, x.clone().requires_grad_())
    for call in (function, theirs):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, x)
            with pytest.raises((RuntimeError, NotImplementedError)):
                into(call, dual)
        with pytest.raises((RuntimeError, NotImplementedError)):
            torch.func.jvp(lambda x, c=call: into(c, x), (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=words):
            into(function, dual)
        # Nothing is differentiated here.
        assert torch.equal(into(function, x), function(x, 1))
    with pytest.raises(RuntimeError, match=words):
        torch.func.jvp(lambda x: into(function, x), (x,), (x,))


@pytest.mark.parametrize(
    "function", [s.softmax, s.log_softmax, s.logsumexp], ids=name_of
)
def test_out_in_every_mode(function):
    x = randn(3, 4).mT
    expect = function(x, 1)

    def into(x):
        return function(x, 1, out=x.new_empty(expect.shape))

    def one(x):
        return function(x, 0, out=torch.empty_like(expect[0] * x[0]))

    for way in (in_one_graph, as_program, under_autocast, in_a_thread):
        torch.testing.assert_close(way(into, (x,)), expect)
    for way in WITHOUT:
        got = way(into, (x,))
        assert got.shape == expect.shape
        assert got.is_contiguous()
    if function is not s.logsumexp:
        torch.testing.assert_close(torch.vmap(one)(x), expect)


def test_a_change_in_place_is_noticed():
    """Where a function needs its input again, as log_softmax says."""
    for function in (s.log_softmax, s.logsumexp):
        x = randn(3, 4).requires_grad_()
        z = x * 1
        y = function(z, 1).sum()
        z.zero_()
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.backward()
    # softmax needs its output only.
    x = randn(3, 4).requires_grad_()
    expect = torch.autograd.grad(s.softmax(x, 1)[:, 0].sum(), x)[0]
    z = x * 1
    y = s.softmax(z, 1)
    z.zero_()
    assert torch.equal(torch.autograd.grad(y[:, 0].sum(), x)[0], expect)
    y = s.softmax(x * 1, 1)
    loss = y[:, 0].sum()
    y.zero_()
    with pytest.raises(RuntimeError, match="inplace operation"):
        loss.backward()


# --- compilers -----------------------------------------------------------


class Counter:
    """A compiler that counts what it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, _):
        self.graphs += 1
        return module.forward


def compilations(function, temperatures):
    torch._dynamo.reset()
    counter = Counter()
    call = torch.compile(function, fullgraph=True, backend=counter)
    counts = []
    for T in temperatures:
        call(randn(3, 4), T)
        counts.append(counter.graphs)
    return counts


ORDINARY = (0.5, 2.0, 0.3, 0.7, 3.1, 7.7, 1e-3, 1e-20, 1e20, 1e-290, 1e290)


@pytest.mark.parametrize(
    "function",
    [s.softmax, s.log_softmax, s.softmax_jacobian, s.softmax_hessian],
    ids=name_of,
)
def test_temperatures_do_not_recompile(function):
    def at(x, T):
        return function(x, 1, temperature=T)

    theirs = compilations(lambda x, T: torch.softmax(x / T, 1), ORDINARY)
    assert compilations(at, ORDINARY) == theirs
    assert theirs[-1] == 2
    # One more for each temperature that has a formula of its own.
    more = compilations(at, (*ORDINARY, 1.0, 0.0, INF, 1.0, 0.0, INF, 0.9))
    assert more[len(ORDINARY) - 1] == 2
    assert more[-1] == 5


def test_two_vectors_do_not_recompile_either():
    for function in (s.softmax_jvp, s.softmax_vjp):
        at = functools.partial(_product, function)
        assert compilations(at, ORDINARY)[-1] == 2
    at = functools.partial(_second_product, s.softmax_hvp)
    assert compilations(at, ORDINARY)[-1] == 2


def _product(function, x, T):
    return function(x, x, 1, temperature=T)


def _second_product(function, x, T):
    return function(x, x, x, 1, temperature=T)


def test_one_program_for_all_batch_sizes():
    class Module(torch.nn.Module):
        def forward(self, x, t):
            p = s.softmax(x, 1, temperature=0.5)
            return p, s.log_softmax(x, 1), s.cross_entropy(x, t)

    rows = torch.export.Dim("rows")
    x, t = randn(3, 4), torch.tensor([0, 1, 2])
    program = torch.export.export(
        Module(), (x, t), dynamic_shapes=({0: rows}, {0: rows})
    )
    x, t = randn(11, 4, seed=2), torch.arange(11) % 4
    got = program.module()(x, t)
    for a, b in zip(got, Module()(x, t), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-7, atol=0)


# --- autocast ------------------------------------------------------------


def autocast_pairs():
    t = torch.tensor([0, 3, -100])
    loss = torch.nn.functional.cross_entropy
    return {
        "softmax": (s.softmax, torch.softmax),
        "log_softmax": (s.log_softmax, torch.log_softmax),
        "logsumexp": (s.logsumexp, torch.logsumexp),
        "cross_entropy": (
            lambda x, _: s.cross_entropy(x, t),
            lambda x, _: loss(x, t),
        ),
        "soft_cross_entropy": (
            lambda x, _: s.soft_cross_entropy(x, x.abs()),
            lambda x, _: loss(x, x.abs()),
        ),
    }


@pytest.mark.parametrize("name", autocast_pairs())
def test_autocast_gives_the_formats_of_pytorch(name):
    ours, theirs = autocast_pairs()[name]
    for low, dtype in itertools.product((F16, BF16), (F16, BF16, F32, F64)):
        x = randn(3, 4).to(dtype).requires_grad_()
        with torch.autocast("cpu", low):
            got, expect = ours(x, 1), theirs(x, 1)
        assert got.dtype == expect.dtype
        assert torch.autograd.grad(got.sum(), x)[0].dtype == dtype
    # Not where a format is asked for.
    if name in ("softmax", "log_softmax"):
        with torch.autocast("cpu", BF16):
            x = randn(3, 4)
            assert ours(x, 1, dtype=F16).dtype == F16
            assert ours(x.to("meta"), 1).dtype == F32


def test_autocast_around_a_compiler():
    x = randn(3, 4).bfloat16()
    pairs = list(autocast_pairs().values())
    for index in (0, 1):
        with torch.autocast("cpu", BF16):
            found = in_one_graph(
                lambda x, i=index: [pair[i](x, 1) for pair in pairs], (x,)
            )
            expect = [pair[1](x, 1) for pair in pairs]
        assert [f.dtype for f in found] == [e.dtype for e in expect]
    weight, t = randn(5, 4), torch.tensor([0, 1, 2])

    def derivatives(x, weight, t):
        return (
            s.weight_gradient(x, weight, t)[0],
            s.weight_hvp(x, weight, weight)[0],
            s.weight_hessian(x, weight),
            s.softmax_hvp(x, x, x, 1),
        )

    x = randn(3, 4, seed=1)
    with torch.autocast("cpu", BF16):
        found = in_one_graph(derivatives, (x, weight, t))
    for got, expect in zip(found, derivatives(x, weight, t), strict=True):
        torch.testing.assert_close(got, expect, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_autocast_changes_no_value(name):
    function = public()[name]
    for dtype in (BF16, F32, F64):
        x = randn(3, 4).to(dtype).requires_grad_()
        with torch.autocast("cpu", BF16):
            got = function(x)
            gradient = torch.autograd.grad(got.sum(), x)[0]
            twofold = None if "lin" in name else twice(function, x)
        expect = function(x)
        if "gradient" in name or "cross_entropy" not in name:
            assert got.dtype == dtype
        assert torch.equal(got.to(dtype), expect.to(dtype))
        assert torch.equal(
            gradient, torch.autograd.grad(expect.sum(), x)[0]
        )
        # Losses in bfloat16 are squared in float32.
        if dtype != BF16 and twofold is not None:
            assert torch.equal(twofold, twice(function, x))


# --- sampling ------------------------------------------------------------

DRAWS = (s.sample, s.gumbel_max, s.gumbel_top_k)


@pytest.mark.parametrize("draw", DRAWS, ids=name_of)
def test_draws(draw):
    x = torch.tensor([[0.0, 3.0, -INF, 3.0], [1.0, -INF, 5.0, 2.0]])

    def two(x):
        generator = torch.Generator().manual_seed(3)
        return draw(x, 2, generator=generator)

    expect = two(x)
    assert (x.gather(1, expect) > -INF).all()
    for way in (under_autocast, in_a_thread):
        assert torch.equal(way(two, (x,)), expect)
    assert torch.equal(two(x.clone().requires_grad_()), expect)
    with forward_ad.dual_level():
        assert torch.equal(two(forward_ad.make_dual(x, x)), expect)
    for way in WITHOUT:
        got = way(lambda x: draw(x, 2, 0), (x,))
        assert got.shape == (2, 4)
        assert got.dtype == torch.int64


@pytest.mark.parametrize("draw", DRAWS, ids=name_of)
def test_where_nothing_can_be_drawn(draw):
    x, name = randn(3, 4), rf"{draw.__name__}\(\)"
    for randomness in ("same", "different"):
        many = torch.vmap(lambda x: draw(x, 2), randomness=randomness)
        with pytest.raises(RuntimeError, match=rf"{name}.*vmap.*batch"):
            many(x)
    nested = torch.vmap(torch.func.grad(lambda x: draw(x, 2).sum() * x[0]))
    with pytest.raises(RuntimeError, match=rf"{name}.*vmap"):
        nested(x)
    with pytest.raises(RuntimeError, match=rf"{name}.*torch.export"):
        as_program(lambda x: draw(x, 2), (x,))
    with pytest.raises(RuntimeError, match="torch.jit.trace"):
        torch.jit.trace(lambda x: draw(x, 2), (x,), check_trace=False)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        in_one_graph(lambda x: draw(x, 2), (x,))


# --- what is refused -----------------------------------------------------


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_trace_is_refused(name):
    x = randn(3, 4)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace.*export"):
        torch.jit.trace(public()[name], (x,))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_layouts_are_refused(name):
    function, x = public()[name], randn(3, 4)

    class DTensor(torch.Tensor):
        """By the name of PyTorch's, which needs a process group."""

    parts = [randn(4), randn(3)]
    for value, words in (
        (x.as_subclass(DTensor), "one process.*full_tensor"),
        (x.to_sparse(), "dense.*to_dense"),
        (x.to_sparse_csr(), "dense.*to_dense"),
        (torch.nested.nested_tensor(parts), "nested.*to_padded_tensor"),
        (
            torch.nested.nested_tensor(parts, layout=torch.jagged),
            "nested.*to_padded_tensor",
        ),
    ):
        with pytest.raises(NotImplementedError, match=words):
            function(value)


def test_the_name_of_dtensor():
    tensor = pytest.importorskip("torch.distributed.tensor")
    assert tensor.DTensor.__name__ == "DTensor"
    assert issubclass(tensor.DTensor, torch.Tensor)


X, T3 = torch.zeros(2, 3), torch.tensor([0, 1])
# A call, the error, and the words that every mode says.
ERRORS = {
    "dim": (
        lambda x: s.softmax(x, 2),
        IndexError,
        "softmax(): dim out of range",
    ),
    "dim of logsumexp": (
        lambda x: s.logsumexp(x, (0, -3)),
        IndexError,
        "logsumexp(): dim out of range",
    ),
    "kind of dim": (
        lambda x: s.softmax(x, 1.0),
        TypeError,
        "softmax(): dim must be an int",
    ),
    "temperature": (
        lambda x: s.log_softmax(x, 1, temperature=-1.0),
        ValueError,
        "log_softmax(): temperature must be in [0, inf]",
    ),
    "integers": (
        lambda x: s.softmax(x.long(), 1),
        NotImplementedError,
        "dtype=torch.float32",
    ),
    "complex": (
        lambda x: s.logsumexp(x.to(torch.complex64), 1),
        NotImplementedError,
        "complex",
    ),
    "mask": (
        lambda x: s.softmax(x, 1, mask=x[:, :2] > 0),
        RuntimeError,
        "broadcastable",
    ),
    "kind of mask": (
        lambda x: s.softmax(x, 1, mask=x),
        TypeError,
        "of dtype bool",
    ),
    "tangent": (
        lambda x: s.softmax_jvp(x, x[:1], 1),
        RuntimeError,
        "softmax_jvp(): tangent must be of shape (2, 3)",
    ),
    "target": (
        lambda x: s.cross_entropy(x, x[:1]),
        RuntimeError,
        "class indices",
    ),
    "reduction": (
        lambda x: s.cross_entropy(x, x, reduction="median"),
        ValueError,
        "one of",
    ),
    "smoothing": (
        lambda x: s.cross_entropy(x, x, label_smoothing=2.0),
        RuntimeError,
        "label_smoothing",
    ),
    "weight": (
        lambda x: s.weight_gradient(x, x[:, :1], x),
        RuntimeError,
        "weight",
    ),
    "softcap": (
        lambda x: s.linear_cross_entropy(x, x, x[:, :2], softcap=-1.0),
        ValueError,
        "softcap",
    ),
    "targets of a layer": (
        lambda x: s.linear_cross_entropy(x, x, x),
        RuntimeError,
        "probabilities of the shape",
    ),
}


@pytest.mark.parametrize(
    "way",
    [
        directly,
        as_program,
        in_a_batch,
        under_autocast,
        on_meta,
        as_fakes,
    ],
    ids=name_of,
)
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name, way):
    call, error, words = ERRORS[name]
    with pytest.raises(error, match=re.escape(words)):
        way(call, (X,))


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_a_compiler(name):
    """Which has an error of its own, with our words in it."""
    call, error, words = ERRORS[name]
    if name == "mask":
        # What PyTorch raises in between no compiled code can translate.
        words = "expand"
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException) as caught:
        in_one_graph(call, (X,))
    assert words in str(caught.value)
    # Without fullgraph, the error is that of an eager call.
    torch._dynamo.reset()
    with pytest.raises(error, match=re.escape(words)):
        torch.compile(call, backend="eager")(X)


def test_a_class_out_of_range():
    x, t = randn(2, 3), torch.tensor([0, 3])
    for call in (s.cross_entropy, s.cross_entropy_gradient):
        for way in (directly, under_autocast):
            with pytest.raises(IndexError, match=r"\[0, 2\].*got 3"):
                way(call, (x, t))
        with pytest.raises(IndexError, match=r"\[0, 2\].*got 3"):
            torch.vmap(call)(x[None], t[None])
        # PyTorch's own operations notice where we cannot look.
        for way in (in_one_graph, as_program):
            torch._dynamo.reset()
            with pytest.raises((IndexError, RuntimeError), match="bound"):
                way(call, (x, t))


# --- memory --------------------------------------------------------------

MEASURE = """
import pathlib, resource, sys, torch, softmaxlib

def status(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

def most(_):
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)

def measured():
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        peak, again = status, True
    except OSError:
        peak, again = most, False
    before = peak("VmRSS")
    y = call(x, 0, temperature=0.7)
    return peak("VmHWM") - before - y.nbytes, again

torch.set_num_threads(1)
x = torch.linspace(-9, 9, 12_800_000, dtype=torch.float64)
call = getattr(softmaxlib, {name!r})
call(x[:600_000], 0, temperature=0.7)  # code loads once
taken, again = measured()
if again:  # the system counts its pages roughly
    taken = min(taken, measured()[0], measured()[0])
print(taken)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_memory_of_one_long_row(name):
    """A few blocks above the output, not a copy of the row."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(name=name)],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parent.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert int(result.stdout) < 8 * 2**20
