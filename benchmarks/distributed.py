"""The loss over a vocabulary that two processes share, forward and backward.

Here wall time counts, as processes wait for each other: run it on a machine
with two idle cores.
"""

import statistics
import time

import torch
from torch import distributed
from torch.nn.functional import cross_entropy, linear

from benchmarks.measure import digits, seconds, table
from softmaxlib import parallel_linear_cross_entropy
from softmaxlib.processes import Processes

# Rows, features, classes.
SIZES = ((512, 256, 32_768), (1024, 512, 65_536))
WORLD, REPEATS = 2, 9
OURS, ALONE = "ours", "one process"
PARALLEL, GATHERED = "`loss_parallel`", "logits gathered"


class Gather(torch.autograd.Function):
    """The logits of all ranks, for a loss that all of them compute."""

    @staticmethod
    def forward(ctx, part):
        ctx.rank, ctx.width = distributed.get_rank(), part.shape[1]
        parts = [torch.empty_like(part) for _ in range(WORLD)]
        distributed.all_gather(parts, part.contiguous())
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx, c):
        return c.narrow(1, ctx.rank * ctx.width, ctx.width)


def candidates(rank, rows, features, classes):
    """Functions by name that return the loss and the gradient of x."""
    # Some seconds to import, which the main process need not wait for.
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        init_device_mesh,
    )
    from torch.distributed.tensor.parallel import loss_parallel

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, features, generator=generator)
    every = torch.empty(classes, features)
    every.normal_(0, features**-0.5, generator=generator)
    target = torch.randint(classes, (rows,), generator=generator)
    part = every.chunk(WORLD)[rank].clone()
    if rank:
        every = None  # only one process computes alone
    mesh = init_device_mesh("cpu", (WORLD,))

    def gradients(loss, x, weight):
        x, weight = x.detach(), weight.detach()
        value = loss(x.requires_grad_(), weight.requires_grad_())
        value.backward()
        return value, x.grad

    def ours():
        def loss(x, w):
            return parallel_linear_cross_entropy(x, w, target)

        return gradients(loss, x, part)

    def alone():
        if rank:
            return None
        return gradients(
            lambda x, w: cross_entropy(linear(x, w), target), x, every
        )

    def parallel():
        a = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
        b = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        with loss_parallel():
            value, gradient = gradients(
                lambda x, w: cross_entropy(linear(x, w), target), a, b
            )
        whole = gradient.redistribute(placements=[Replicate()])
        return value.to_local(), whole.to_local()

    def gathered():
        value, gradient = gradients(
            lambda x, w: cross_entropy(Gather.apply(linear(x, w)), target),
            x,
            part,
        )
        distributed.all_reduce(gradient)
        return value, gradient

    calls = ours, alone, parallel, gathered
    return dict(zip((OURS, ALONE, PARALLEL, GATHERED), calls, strict=True))


def measure(rank, sizes, repeats):
    """Wall and CPU seconds of rank 0, by name, all candidates in turns."""
    functions = candidates(rank, *sizes)
    names, times = list(functions), []
    value, gradient = functions[OURS]()
    for name in names:
        found = functions[name]()
        if found is not None:  # all compute the same
            torch.testing.assert_close(found[0], value)
            torch.testing.assert_close(found[1], gradient)
    for turn in range(repeats):
        taken = {}
        for name in names[:: (-1) ** turn]:
            distributed.barrier()
            start = time.perf_counter(), time.process_time()
            functions[name]()
            cpu = time.process_time() - start[1]
            distributed.barrier()
            taken[name] = time.perf_counter() - start[0], cpu
        times.append(taken)
    return times


def ratio(times, name, which):
    each = [t[name][which] / t[OURS][which] for t in times]
    quartiles = statistics.quantiles(each, n=4, method="inclusive")
    lower, median, upper = map(digits, quartiles)
    return f"{median} [{lower}, {upper}]"


def tables(sizes=SIZES, repeats=REPEATS):
    """One of wall time, and one of CPU time."""
    with Processes(WORLD, timeout=600) as processes:
        found = {s: processes.run(measure, s, repeats)[0] for s in sizes}
    peers = ALONE, PARALLEL, GATHERED
    for which in (0, 1):
        lines = []
        for (rows, features, classes), times in found.items():
            own = statistics.median(t[OURS][which] for t in times)
            name = f"{rows:,} × {features:,} × {classes:,}"
            cells = [ratio(times, peer, which) for peer in peers]
            lines.append([name, seconds(own), *cells])
        yield table(["N × D × K", OURS, *peers], lines)


def report() -> str:
    """All measurements, as Markdown."""
    wall, cpu = tables()
    return "\n\n".join(
        [
            "## A vocabulary on two processes",
            f"`parallel_linear_cross_entropy` on {WORLD} processes of one "
            "thread each, gloo, on this machine: loss and gradients of N "
            "samples of D features and K classes, in float32. Beside it "
            "`cross_entropy(linear(x, w), target)` in one process of one "
            "thread, the same under DTensor's `loss_parallel`, and with the "
            "logits of the other process gathered first. How many times "
            "longer these take, in turns: median [quartiles]. This is wall "
            "time, as processes wait for each other:",
            wall,
            "And the CPU time of the first process:",
            cpu,
        ]
    )


if __name__ == "__main__":
    print(report())
