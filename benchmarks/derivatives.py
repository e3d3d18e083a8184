"""Closed-form derivatives against automatic differentiation.

Run alone: python -m benchmarks.derivatives
"""

import torch
from torch import func

from benchmarks.measure import (
    across_processes,
    digits,
    mebibytes,
    paired,
    peak_memory,
    seconds,
    table,
)
from softmaxlib.derivatives import (
    logsumexp_hvp,
    softmax_hessian,
    softmax_hvp,
    softmax_jacobian,
    softmax_jvp,
    softmax_vjp,
)
from softmaxlib.regression import weight_hvp

OURS = "softmaxlib"


def jacobian(batch: int, classes: int, dtype: str = "float32"):
    """Every way to a (B, K, K) Jacobian."""
    (x,) = _random(1, batch, classes, dtype)

    def each_class():
        z = x.clone().requires_grad_()
        total = torch.softmax(z, -1).sum(0)
        return torch.stack(
            [
                torch.autograd.grad(total[k], z, retain_graph=True)[0]
                for k in range(classes)
            ],
            1,
        )

    def functional():
        return torch.autograd.functional.jacobian(
            lambda z: torch.softmax(z, -1).sum(0), x
        ).movedim(0, 1)

    def softmax(z):
        return torch.softmax(z, -1)

    return {
        OURS: lambda: softmax_jacobian(x, -1),
        "`vmap(jacrev)`": lambda: func.vmap(func.jacrev(softmax))(x),
        "`vmap(jacfwd)`": lambda: func.vmap(func.jacfwd(softmax))(x),
        "`functional.jacobian`": functional,
        "K reverse passes": each_class,
    }


def hessian(classes: int, dtype: str = "float32"):
    """Every way to a (K, K, K) Hessian."""
    x = _random(1, classes, dtype)[0]

    def softmax(z):
        return torch.softmax(z, -1)

    def functional():
        return torch.stack(
            [
                torch.autograd.functional.hessian(
                    lambda z, k=k: softmax(z)[k], x
                )
                for k in range(classes)
            ]
        )

    return {
        OURS: lambda: softmax_hessian(x, -1),
        "`func.hessian`": lambda: func.hessian(softmax)(x),
        "`jacfwd(jacfwd)`": lambda: func.jacfwd(func.jacfwd(softmax))(x),
        "`jacrev(jacrev)`": lambda: func.jacrev(func.jacrev(softmax))(x),
        "K times `functional.hessian`": functional,
    }


def hvp(classes: int, dtype: str = "float32"):
    """Every way to the Hessian of u . softmax, times v."""
    x, u, v = _random(3, classes, dtype)

    def value(z):
        return (u * torch.softmax(z, -1)).sum()

    return {
        OURS: lambda: softmax_hvp(x, u, v, -1),
        **_hessian_products(value, x, v),
    }


def hvp_logsumexp(classes: int, dtype: str = "float32"):
    """Every way to the Hessian of log-sum-exp, times v."""
    x, v = _random(2, classes, dtype)

    def value(z):
        return torch.logsumexp(z, -1)

    return {
        OURS: lambda: logsumexp_hvp(x, v, -1),
        **_hessian_products(value, x, v),
    }


def _hessian_products(value, x, v):
    def twice():
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(value(z), z, create_graph=True)
        return torch.autograd.grad(g, z, v)[0]

    return {
        "`jvp(grad)`": lambda: func.jvp(func.grad(value), (x,), (v,))[1],
        "double backward": twice,
        "`functional.hvp`": lambda: torch.autograd.functional.hvp(
            value, x, v
        )[1],
    }


def vjp(batch: int, classes: int, dtype: str = "float32"):
    """Every way to u J, softmax included."""
    x, u = _random(2, batch, classes, dtype)

    def backward():
        z = x.clone().requires_grad_()
        return torch.autograd.grad(torch.softmax(z, -1), z, u)[0]

    def transform():
        return func.vjp(lambda z: torch.softmax(z, -1), x)[1](u)[0]

    return {
        OURS: lambda: softmax_vjp(x, u, -1),
        "`autograd.grad`": backward,
        "`func.vjp`": transform,
    }


def jvp(batch: int, classes: int, dtype: str = "float32"):
    """Every way to J v, softmax included."""
    x, v = _random(2, batch, classes, dtype)

    def softmax(z):
        return torch.softmax(z, -1)

    return {
        OURS: lambda: softmax_jvp(x, v, -1),
        "`func.jvp`": lambda: func.jvp(softmax, (x,), (v,))[1],
        "`functional.jvp`": lambda: torch.autograd.functional.jvp(
            softmax, x, v
        )[1],
    }


def weights(samples: int, features: int, classes: int):
    """Every way to the Hessian of the loss in W, times V."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=generator)
    weight = torch.randn(classes, features, generator=generator) * 0.05
    direction = torch.randn(classes, features, generator=generator)
    target = torch.randint(classes, (samples,), generator=generator)

    def value(w):
        return torch.nn.functional.cross_entropy(x @ w.mT, target)

    return {
        OURS: lambda: weight_hvp(x, weight, direction)[0],
        **_hessian_products(value, weight, direction),
    }


def _random(number, *sizes):
    *shape, dtype = sizes
    generator = torch.Generator().manual_seed(0)
    return torch.randn(
        number, *shape, generator=generator, dtype=getattr(torch, dtype)
    )


# What the library promises: factory, sizes, peer, times faster, and at most
# how much memory: a multiple of the result's bytes, or of the peer's. And in
# how many processes that is measured, which is a matter of patience.
PROMISES = [
    (jacobian, (1, 1000), "`vmap(jacrev)`", 10, None, 15),
    (jacobian, (64, 1000), "`vmap(jacrev)`", 3, ("result", 1.1, 256e6), 7),
    (hessian, (100,), "`func.hessian`", 12, None, 15),
    (hessian, (400,), "`func.hessian`", 7, ("result", 1.1, 256e6), 7),
    (hvp, (1000,), "`jvp(grad)`", 40, None, 15),
    (hvp, (100_000,), "`jvp(grad)`", 5, None, 15),
    (
        weights,
        (1024, 256, 10_000),
        "double backward",
        1.7,
        ("peer", 0.4),
        5,
    ),
]

# Title, factory, sizes, and the peers that would take minutes.
TABLES = [
    (
        "Jacobian, B x K",
        jacobian,
        [(1, 10), (1, 100), (1, 1000), (64, 10), (64, 100)],
        (),
    ),
    (
        "Hessian, K x K x K",
        hessian,
        [(10,), (30,), (100,)],
        ("`jacrev(jacrev)`", "K times `functional.hessian`"),
    ),
    (
        "Hessian-vector product of u . softmax, K",
        hvp,
        [(10,), (1000,), (1000, "float64"), (10_000,), (100_000,)],
        (),
    ),
    (
        "Hessian-vector product of log-sum-exp, K",
        hvp_logsumexp,
        [(10,), (1000,), (1000, "float64"), (10_000,), (100_000,)],
        (),
    ),
    ("Vector-Jacobian product, B x K", vjp, [(64, 10), (64, 1000)], ()),
    ("Jacobian-vector product, B x K", jvp, [(64, 10), (64, 1000)], ()),
    (
        "Hessian in the weights times a direction, N x D x K",
        weights,
        [(64, 20, 10), (256, 64, 100), (512, 256, 1000)],
        (),
    ),
]


def report() -> str:
    """All measurements, as Markdown."""
    parts = [
        "## Derivatives\n",
        "CPU time of the peer over that of `softmaxlib`, on one thread: "
        "median [quartiles] of pairs taken in turns. Peak memory is that of "
        "a process of its own, result included. float32 unless said "
        "otherwise.",
    ]
    for title, factory, sizes, slow in TABLES:
        parts += [f"\n### {title}\n", _table(factory, sizes, slow)]
    parts += [
        "\n### What is promised\n",
        "Each line was measured in 5 to 15 processes: the median of their "
        "medians, and the quartiles of these. Processes differ: a result of "
        "some megabytes costs several times as much in pages that are new "
        "to the process as in pages that it had before, and which of the two "
        "the allocator gives to either candidate is settled early.\n",
        table(
            ["what", "peer", "times faster", "needed", "peak", "allowed"],
            [_promise(*promise) for promise in PROMISES],
        ),
    ]
    return "\n".join(parts) + "\n"


def _promise(factory, sizes, peer, needed, memory, processes):
    path = f"benchmarks.derivatives:{factory.__name__}"
    ratio = across_processes(path, OURS, peer, *sizes, processes=processes)
    peak = allowed = ""
    if memory is not None:
        warm = (2, 3, 4)[: len(sizes)]
        ours = peak_memory(path, OURS, *sizes, warm=warm)
        if memory[0] == "result":
            part, of = ours / memory[2], "the result"
        else:
            theirs = peak_memory(path, peer, *sizes, warm=warm)
            part, of = ours / theirs, "the peer's"
        peak = f"{digits(part)} of {of} ({mebibytes(ours)})"
        allowed = str(memory[1])
    what = f"{factory.__name__}, {' x '.join(map(str, sizes))}"
    return what, peer, ratio, needed, peak, allowed


def _table(factory, all_sizes, slow):
    header, rows = None, []
    for sizes in all_sizes:
        candidates = factory(*sizes)
        ours = candidates.pop(OURS)
        header = ["size", OURS, *candidates]
        row = [" x ".join(map(str, sizes))]
        for name, theirs in candidates.items():
            if name in slow and sizes[0] > 30:
                row.append("")
                continue
            ratio = paired(ours, theirs, repeats=7, least=0.004)
            if len(row) == 1:
                row.append(seconds(ratio.ours))
            row.append(ratio)
        rows.append(row)
    return table(header, rows)


if __name__ == "__main__":
    print(report())
