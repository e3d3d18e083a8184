"""The loss of a linear layer: time, memory, and how both grow."""

import pathlib
import statistics
import time

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.functional import linear_cross_entropy as native
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import (
    digits,
    mebibytes,
    peak_memory,
    seconds,
    table,
)
from softmaxlib import linear_cross_entropy

PICTURE = pathlib.Path(__file__).with_name("linear.svg")
ROWS, FEATURES, LARGE = 2048, 512, (32_768, 131_072)
GROWTH = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
REFERENCE = "cross_entropy(linear(…))"
MEMORY, SPEED = "ours, `memory`", "ours, `speed`"
GROWING = REFERENCE, MEMORY, SPEED


def reference(x, weight, target):
    return cross_entropy(linear(x, weight), target)


def chunked(rows):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return lambda x, w, t: native(x, w, t, options=options)


def by_checkpoints(x, weight, target, rows=256):
    def part(x, weight, target):
        return cross_entropy(linear(x, weight), target, reduction="sum")

    parts = zip(x.split(rows), target.split(rows), strict=True)
    losses = [
        checkpoint(part, some, weight, t, use_reentrant=False)
        for some, t in parts
    ]
    return torch.stack(losses).sum() / len(x)


def ours(prefer):
    return lambda x, w, t: linear_cross_entropy(x, w, t, prefer=prefer)


LOSSES = {
    REFERENCE: reference,
    "PyTorch's, automatic chunks": chunked(None),
    "PyTorch's, chunks of 512 rows": chunked(512),
    "checkpoint for 256 rows": by_checkpoints,
    MEMORY: ours("memory"),
    SPEED: ours("speed"),
}


def candidates(classes, rows=ROWS, features=FEATURES, gradients=True):
    """Functions by name that return the loss, or two gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    weight = torch.empty(classes, features)
    weight.normal_(0, features**-0.5, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)

    def call(loss):
        if not gradients:
            with torch.no_grad():
                return loss(x, weight, target)
        tensors = [t.detach().requires_grad_() for t in (x, weight)]
        loss(*tensors, target).backward()
        return [t.grad for t in tensors]

    return {name: lambda f=f: call(f) for name, f in LOSSES.items()}


def ratios(functions, repeats):
    """By name the CPU seconds, and how many times those of the first.

    All take turns, in an order that turns round: what a neighbour does to
    the machine then hits all of them.
    """
    names, times = list(functions), []
    for turn in range(repeats):
        taken = {}
        for name in names[:: (-1) ** turn]:
            start = time.process_time()
            functions[name]()
            taken[name] = time.process_time() - start
        times.append(taken)
    found = {}
    for name in names:
        each = [t[name] / t[names[0]] for t in times]
        if repeats > 1:
            each = statistics.quantiles(each, n=4, method="inclusive")
        quartiles = each if repeats > 1 else each * 3
        found[name] = statistics.median(t[name] for t in times), quartiles
    return found


def memory(name, classes, gradients=True):
    where, small = "benchmarks.linear:candidates", (600, 300, 8, gradients)
    sizes = classes, ROWS, FEATURES, gradients
    return peak_memory(where, name, *sizes, warm=small)


def own(classes):
    """The bytes of the two gradients."""
    return (classes + ROWS) * FEATURES * 4


def ratio(found):
    lower, median, upper = found[1]
    return f"{digits(median)} [{digits(lower)}, {digits(upper)}]"


def rows_of(classes, repeats, gradients=True):
    times = ratios(candidates(classes, gradients=gradients), repeats)
    most = memory(REFERENCE, classes, gradients)
    for name in LOSSES:
        peak = memory(name, classes, gradients)
        yield [
            f"{classes:,}",
            name,
            seconds(times[name][0]),
            ratio(times[name]),
            mebibytes(peak),
            digits(peak / own(classes)) if gradients else "",
            digits(most / peak),
        ]


def growth():
    """(Time, memory) by name and number of classes."""
    found = {name: {} for name in GROWING}
    for classes in GROWTH:
        functions = candidates(classes)
        times = ratios({name: functions[name] for name in GROWING}, 1)
        for name in GROWING:
            peak = memory(name, classes)
            found[name][classes] = times[name][0], peak
    return found


def draw(found):
    import matplotlib.pyplot as plt

    from softmaxlib import plotting

    plotting.use_style()
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    labels = "CPU seconds", "peak memory, MiB"
    for which, (ax, label) in enumerate(zip(axes, labels, strict=True)):
        for (name, points), color in zip(
            found.items(), plotting.CYCLE, strict=False
        ):
            unit = (1, 2**20)[which]
            ax.plot(
                list(points),
                [point[which] / unit for point in points.values()],
                "o-",
                color=color,
                label=name.replace("`", ""),
                markersize=4,
            )
        ax.set(xscale="log", yscale="log", xlabel="classes K", title=label)
    axes[1].legend(fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def report() -> str:
    head = ["classes", "loss", "time", "over the reference's"]
    head += ["peak memory", "over the gradients", "less than the reference"]
    both = [
        row
        for classes, repeats in zip(LARGE, (4, 2), strict=True)
        for row in rows_of(classes, repeats)
    ]
    alone = list(rows_of(LARGE[1], 1, gradients=False))
    found = growth()
    draw(found)
    lines = [
        [f"{k:,}", name, seconds(taken), mebibytes(peak)]
        for name, points in found.items()
        for k, (taken, peak) in points.items()
    ]
    return "\n\n".join(
        [
            "## The loss of a linear layer",
            f"Rows: {ROWS}, features: {FEATURES}, float32. Loss and "
            "gradients; memory is what a call takes at its peak, above its "
            "arguments. The gradients alone are "
            + " and ".join(mebibytes(own(k)) for k in LARGE)
            + ".",
            table(head, both),
            "The loss alone:",
            table([*head[:5], "", head[6]], alone),
            "Growth with the number of classes, from `benchmarks/linear.svg`:",
            table(["classes", "loss", "time", "peak memory"], lines),
        ]
    )
