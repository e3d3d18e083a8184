"""softmax, log_softmax and logsumexp against PyTorch: time and memory."""

import torch

import softmaxlib
from benchmarks.measure import (
    SUMMARY,
    digits,
    mebibytes,
    paired,
    peak_memory,
    table,
)

SHAPES = [
    (1, 10),
    (64, 10),
    (1, 1000),
    (64, 1000),
    (1024, 1000),
    (4096, 1000),
    (512, 50_000),
    (128, 131_072),
    (1, 4_194_304),
]
STRIDED = [(1000, 1024), (131_072, 16)]
NAMES = ("softmax", "log_softmax", "logsumexp")


def randn(shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype)


def repeats(x):
    return 15 if x.numel() < 2**22 else 9


def result_like(name, x, dim):
    return torch.empty_like(getattr(torch, name)(x, dim))


def forward(name, x, dim, *, ours_out, peer_out):
    """One ratio; `out` reused or a fresh result, for each side."""
    ours, peer = getattr(softmaxlib, name), getattr(torch, name)
    buffers = [result_like(name, x, dim) for _ in range(2)]
    extra = {"out": buffers[0]} if ours_out else {}
    peer_extra = {"out": buffers[1]} if peer_out else {}
    # In this order the ratio is that of our time to the peer's.
    return paired(
        lambda: peer(x, dim, **peer_extra),
        lambda: ours(x, dim, **extra),
        repeats(x),
    )


def backward(name, x, dim):
    """Forward and backward, fresh results."""
    ours, peer = getattr(softmaxlib, name), getattr(torch, name)
    x = x.clone().requires_grad_()
    v = result_like(name, x.detach(), dim).copy_(
        randn(peer(x.detach(), dim).shape)
    )
    return paired(
        lambda: torch.autograd.grad(peer(x, dim), x, v),
        lambda: torch.autograd.grad(ours(x, dim), x, v),
        repeats(x),
    )


def forward_table():
    rows, short = [], []
    shapes = [(s, 1) for s in SHAPES] + [(s, 0) for s in STRIDED]
    for shape, dim in shapes:
        x = randn(shape)
        ratios = [
            forward(name, x, dim, ours_out=out, peer_out=out)
            for name in NAMES
            for out in (True, False)
        ]
        title = f"{shape[0]:,} × {shape[1]:,}"
        rows.append([title, dim, *ratios])
        short.append([title, dim, *(digits(r.median) for r in ratios)])
    header = ["shape", "dim"]
    header += [f"{n}{o}" for n in NAMES for o in (", `out=`", "")]
    SUMMARY["speed"] = table(header, short)
    return table(header, rows)


def reuse_table():
    rows = []
    for shape in SHAPES[-3:]:
        x = randn(shape)
        rows.append(
            [f"{shape[0]:,} × {shape[1]:,}", f"{4 * x.numel() / 1e6:.0f}"]
            + [
                forward(name, x, 1, ours_out=True, peer_out=False)
                for name in ("softmax", "log_softmax")
            ]
        )
    return table(["shape", "MB", "softmax", "log_softmax"], rows)


def backward_table():
    rows = []
    for shape in ((1, 10), (64, 1000), (1024, 1000), (512, 50_000)):
        x = randn(shape)
        rows.append(
            [f"{shape[0]:,} × {shape[1]:,}"]
            + [backward(name, x, 1) for name in NAMES]
        )
    return table(["shape", *NAMES], rows)


def dtype_table():
    rows = []
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        for shape in ((1024, 1000), (512, 50_000)):
            x = randn(shape, dtype)
            row = [
                str(dtype).removeprefix("torch."),
                f"{shape[0]:,} × {shape[1]:,}",
            ]
            row += [
                forward(name, x, 1, ours_out=True, peer_out=True)
                for name in NAMES
            ]
            rows.append(row)
    return table(["format", "shape", *NAMES], rows)


def compile_table():
    rows = []
    compiled = torch.compile(lambda x: softmaxlib.softmax(x, 1))
    for shape in ((64, 1000), (1024, 1000), (512, 50_000)):
        x = randn(shape)
        ratio = paired(
            lambda x=x: torch.softmax(x, 1),
            lambda x=x: compiled(x),
            repeats(x),
        )
        rows.append([f"{shape[0]:,} × {shape[1]:,}", ratio])
    return table(["shape", "softmax"], rows)


def values_table():
    """log-sum-exp of other rows over log-sum-exp of normal logits."""
    rows = []
    for shape in ((64, 50_000), (4096, 1000)):
        z = randn(shape)
        confident = z.clone()
        confident[:, 0] += 60
        kinds = (
            torch.log_softmax(z, 1),
            confident,
            torch.log_softmax(confident, 1),
        )
        ratios = [
            paired(
                lambda z=z: softmaxlib.logsumexp(z, 1),
                lambda x=x: softmaxlib.logsumexp(x, 1),
                repeats(z),
            )
            for x in kinds
        ]
        rows.append([f"{shape[0]:,} × {shape[1]:,}", *ratios])
    kinds = "log-probabilities", "confident", "log-probabilities of these"
    return table(["shape", *kinds], rows)


def candidates(name, rows, classes):
    """What `peak_memory` calls in a process of its own."""
    x = randn((int(rows), int(classes)))
    return {
        "softmaxlib": lambda: getattr(softmaxlib, name)(x, 1),
        "PyTorch": lambda: getattr(torch, name)(x, 1),
    }


def memory_table():
    rows = []
    for name in NAMES:
        for shape in ((512, 50_000), (1, 25_600_000)):
            use = [
                peak_memory(
                    "benchmarks.functional:candidates",
                    library,
                    name,
                    *shape,
                    warm=(name, 4, 5000),
                )
                for library in ("softmaxlib", "PyTorch")
            ]
            rows.append(
                [name, f"{shape[0]:,} × {shape[1]:,}", *map(mebibytes, use)]
            )
    return table(["function", "shape", "softmaxlib", "PyTorch"], rows)


def report() -> str:
    parts = [
        "## Softmax, log-softmax and log-sum-exp",
        "Our time over PyTorch's, float32, last and first dimension. "
        "`out=` writes into a buffer that is reused; otherwise the result is "
        "fresh memory, whose page faults dominate from about 32 MB on.",
        forward_table(),
        "Our time with `out=` reused over PyTorch's with a fresh result:",
        reuse_table(),
        "Forward and backward, fresh results:",
        backward_table(),
        "Other formats, `out=` reused on both sides:",
        dtype_table(),
        "Under `torch.compile`, computed in float64 by one fused loop, over "
        "PyTorch's eager kernel:",
        compile_table(),
        "Time does not hang on values: log-sum-exp of log-probabilities, "
        "and of rows with 60 added to one logit, over log-sum-exp of normal "
        "logits of the same shape:",
        values_table(),
        "Peak memory above the input (the result of softmax and log-softmax "
        "alone takes 97.7 MiB):",
        memory_table(),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(report())
