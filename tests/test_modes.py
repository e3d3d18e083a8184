"""What is promised holds however a function is called.

One set of cases, whose values and gradients mpmath knows, runs in every mode:
eager, compiled, exported, under vmap, under autocast, in other threads; and
for its shapes and formats on tensors without values. Below that, what each
mode promises or refuses on its own.
"""

import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable

import mpmath
import pytest
import torch
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


def loss_case(name, rows, qs, shares, options, target, dtype, reduction):
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

    def loss(x, t):
        return s.cross_entropy(x, t, **options)

    def closed(x, t):
        return s.cross_entropy_gradient(x, t, **options)

    title, rest = f"{name}, {reduction}", {"wide": 900}
    return [
        Case(title, loss, (x, target), found, c, gradient, **rest),
        Case(f"gradient of {title}", closed, (x, target), gradient, **rest),
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
            {"weight": weight},
            t,
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
            t[:n],
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
            {"weight": weight},
            torch.tensor(PROBABILITIES, dtype=dtype),
            dtype,
            reduction,
        )
    found += loss_case(
        "special rows",
        SPECIAL,
        [one_hot(k, (1,) * 4, 0) for k in SPECIAL_TARGETS],
        [1] * 5,
        {},
        torch.tensor(SPECIAL_TARGETS),
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
    p, _, _ = known

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
            .requires_grad_(case.gradient is not None),
            *case.tensors[1:],
        )
        for case in cases
    ]


def gradients(cases, arguments, results):
    """Each in the first tensor; None where none is asked for."""
    return [
        None
        if case.gradient is None or case.cotangent is None
        else torch.autograd.grad(
            result, tensors[0], case.cotangent.to(result.dtype)
        )[0]
        for case, tensors, result in zip(
            cases, arguments, results, strict=True
        )
    ]


def eager(cases):
    arguments = leaves(cases)
    results = All(cases)(arguments)
    return results, gradients(cases, arguments, results)


def at_once(cases, arguments, results):
    """Gradients, where a graph is one node that may be freed."""
    wanted = [
        i for i, case in enumerate(cases) if case.cotangent is not None
    ]
    if not wanted:
        return [None] * len(cases)
    found = torch.autograd.grad(
        [results[i] for i in wanted],
        [arguments[i][0] for i in wanted],
        [cases[i].cotangent.to(results[i].dtype) for i in wanted],
    )
    found = dict(zip(wanted, found, strict=True))
    return [found.get(i) for i in range(len(cases))]


def compiled(cases, backend="aot_eager"):
    torch._dynamo.reset()
    arguments = leaves(cases)
    results = torch.compile(All(cases), fullgraph=True, backend=backend)(
        arguments
    )
    return results, at_once(cases, arguments, results)


def exported(cases):
    arguments = leaves(cases)
    apart = [tuple(t.detach().clone() for t in a) for a in arguments]
    program = torch.export.export(All(cases), (apart,))
    results = program.module()(arguments)
    return results, at_once(cases, arguments, results)


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


MODES = (eager, compiled, exported, vmapped, autocast, threaded)
# Where plain operations run, and float64 is as good as they are.
PLAIN = (compiled, exported)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
def test_everything(mode, name):
    cases, found = group(name), []
    for case, result, gradient in zip(cases, *mode(cases), strict=True):
        narrow = case.dtype != F64
        wide = case.wide if mode in PLAIN or case.wide > 800 else 5.0
        ulps = case.ulps if narrow else wide
        bad = wrong(result, case.value, ulps)
        if gradient is not None:
            assert gradient.dtype == case.dtype
            ulps = case.gradient_ulps if narrow else 1000
            bad += [
                f"gradient {b}"
                for b in wrong(gradient, case.gradient, ulps)
            ]
        found += [f"{case.name}: {b}" for b in bad]
    assert not found, "\n".join(found[:40])
