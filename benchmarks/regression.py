"""Fits of softmax regression beside scikit-learn's.

All minimise the same objective in float64 to a largest gradient entry of at
most 1e-8, from zero; what each really reached stands beside its time.
"""

import warnings

import torch
from sklearn.datasets import load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

from benchmarks.measure import paired, seconds, table
from softmaxlib import SoftmaxRegression

TOLERANCE = 1e-8
SOLVERS = ("lbfgs", "newton-cg")
# scikit-learn's own default, and a penalty a hundred times smaller.
INVERSE_PENALTIES = (1.0, 100.0)


def data():
    """Name, samples (N, D) and labels (N)."""
    x, y = load_digits(return_X_y=True)
    yield "digits", x / 16, y
    x, y = load_wine(return_X_y=True)
    yield "wine, standardised", StandardScaler().fit_transform(x), y


def reached(weight, bias, x, y, penalty):
    """The objective, and the largest entry of its gradient."""
    leaves = [torch.tensor(t, requires_grad=True) for t in (weight, bias)]
    loss = F.cross_entropy(F.linear(torch.tensor(x), *leaves), y)
    loss = loss + penalty / 2 * leaves[0].square().sum()
    slopes = torch.autograd.grad(loss, leaves)
    return loss.item(), max(g.abs().max().item() for g in slopes)


def fits(x, y, C):
    """Ours, and theirs by the name of the solver: each returns (W, b)."""
    samples, labels = torch.tensor(x), torch.tensor(y)
    classes, penalty = int(y.max()) + 1, 1 / (C * len(y))

    def ours():
        model = SoftmaxRegression(
            x.shape[1], classes, penalty=penalty, dtype=torch.float64
        )
        model.fit(samples, labels, tolerance=TOLERANCE)
        return model.weight.detach().numpy(), model.bias.detach().numpy()

    def theirs(solver):
        model = LogisticRegression(
            C=C, solver=solver, tol=TOLERANCE, max_iter=10_000
        )
        model.fit(x, y)
        return model.coef_, model.intercept_

    solvers = {s: (lambda s=s: theirs(s)) for s in SOLVERS}
    return penalty, ours, solvers


@threadpool_limits.wrap(limits=1)
def measured():
    rows, worst = [], 0.0
    for name, x, y in data():
        labels = torch.tensor(y)
        for C in INVERSE_PENALTIES:
            penalty, ours, solvers = fits(x, y, C)
            value, slope = reached(*ours(), x, labels, penalty)
            for solver, theirs in solvers.items():
                other, theirs_slope = reached(*theirs(), x, labels, penalty)
                worst = max(worst, value / other - 1)
                ratio = paired(ours, theirs, least=0.05)
                rows.append(
                    [
                        f"{name}, {x.shape[0]} x {x.shape[1]}, "
                        f"K = {len(set(y))}",
                        f"{C:g}",
                        solver,
                        ratio,
                        seconds(ratio.ours),
                        seconds(ratio.theirs),
                        f"{slope:.0e}, {theirs_slope:.0e}",
                        f"{abs(value / other - 1):.0e}",
                    ]
                )
    return rows, worst


def report() -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        rows, worst = measured()
    # Nobody is to be faster because it stops earlier.
    assert worst < 1e-9
    header = (
        "data",
        "`C`",
        "solver",
        "theirs / ours",
        "ours",
        "theirs",
        "gradients reached",
        "objectives differ by",
    )
    return f"""\
## Softmax regression

`SoftmaxRegression.fit` (Newton's method) beside scikit-learn's
`LogisticRegression`, the same penalty, from zero weights, in float64. Both
are asked for gradients of at most {TOLERANCE:g}; the objectives they reach
agree as the last column says, relatively. `C` is the inverse penalty,
1 / (λ N).

{table(header, rows)}
"""
