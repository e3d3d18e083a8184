"""How this book measures: in pairs, on one thread, by CPU time.

Two candidates take turns, and what counts is the ratio of neighbouring
timings: whatever else the machine does then hits both alike. CPU time does
not count what other processes take. Peak memory is measured in a process of
its own, above what it held before the call.
"""

import dataclasses
import gc
import importlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

# Tables for the README, by the name of their place in it.
SUMMARY = {}

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times longer the second candidate takes.

    Attributes:
        median, lower, upper: of the paired ratios, with their quartiles.
        ours, theirs: median CPU seconds of one call.
        pairs: the number of pairs, or of processes with a median each.
    """

    median: float
    lower: float
    upper: float
    ours: float
    theirs: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"{digits(self.median)} "
            f"[{digits(self.lower)}, {digits(self.upper)}]"
        )


def paired(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    repeats: int = 11,
    *,
    least: float = 0.01,
) -> Ratio:
    """Time two functions in turns on one thread.

    Args:
        ours, theirs: the candidates, called without arguments.
        repeats: how many pairs of timings.
        least: the CPU seconds that a timing must last; a faster function is
            called several times for each.

    Returns:
        The ratio theirs / ours.
    """
    threads, collects = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(1)
    try:
        counts = [_calls(function, least) for function in (ours, theirs)]
        gc.collect()
        gc.disable()
        pairs = []
        for turn in range(repeats):
            # Each goes first every other time.
            order = ((0, 1), (1, 0))[turn % 2]
            times = [0.0, 0.0]
            for which in order:
                function = (ours, theirs)[which]
                times[which] = _time(function, counts[which])
            pairs.append(times)
    finally:
        torch.set_num_threads(threads)
        if collects:
            gc.enable()
    return _summary([b / a for a, b in pairs], zip(*pairs, strict=True))


def across_processes(
    factory: str,
    ours: str,
    theirs: str,
    *sizes,
    processes: int,
    repeats: int = 3,
    least: float = 0.05,
) -> Ratio:
    """Time two candidates in turns, in several processes one by one.

    Whether an allocation finds its pages or has to ask for new ones is
    decided by what a process did before, for all of its life: one process,
    however often it repeats, measures one such state.

    Args:
        factory: ``"package.module:function"``; the function takes the sizes
            and returns a dictionary of candidates to call.
        ours, theirs: which of the candidates.
        sizes: what to pass, numbers or strings.
        processes: how many.
        repeats, least: as in :func:`paired`, in each process.

    Returns:
        The ratio theirs / ours: the median over the processes of each one's
        median, and their quartiles.
    """
    arguments = f"{factory!r}, {ours!r}, {theirs!r}, {sizes!r}"
    found = []
    for _ in range(processes):
        output = _in_process(
            f"_report_pairs({arguments}, {repeats}, {least})"
        )
        found.append([float(number) for number in output.split()[-3:]])
    medians, *columns = zip(*found, strict=True)
    return _summary(medians, columns)


def _report_pairs(factory, ours, theirs, sizes, repeats, least):
    candidates = _built(factory, sizes)
    ratio = paired(
        candidates[ours], candidates[theirs], repeats, least=least
    )
    print(ratio.median, ratio.ours, ratio.theirs)


def _summary(ratios, columns) -> Ratio:
    lower, median, upper = statistics.quantiles(
        ratios, n=4, method="inclusive"
    )
    middles = [statistics.median(column) for column in columns]
    return Ratio(median, lower, upper, *middles, len(ratios))


def _built(factory: str, sizes) -> dict:
    """The candidates that ``"package.module:function"`` makes."""
    module, function = factory.split(":")
    return getattr(importlib.import_module(module), function)(*sizes)


def _in_process(call: str) -> str:
    """What a function of this module prints in a process of its own."""
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from benchmarks import measure; measure.{call}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stdout


def _time(function, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        function()
    return (time.process_time() - start) / calls


def _calls(function, least: float) -> int:
    """How many calls last `least` seconds; warms up as well."""
    calls = 1
    function()
    while (taken := _time(function, calls) * calls) < least:
        calls = max(2 * calls, int(calls * least / max(taken, 1e-6)))
    return calls


def peak_memory(factory: str, name: str, *sizes, warm=()) -> int:
    """Bytes that one call takes at its peak, result included.

    Args:
        factory: ``"package.module:function"``; the function takes the sizes
            and returns a dictionary of candidates to call.
        name: which of the candidates.
        sizes: what to pass, numbers or strings.
        warm: small sizes for a first call, so that loading code does not
            count.
    """
    output = _in_process(
        f"_report_peak({factory!r}, {name!r}, {sizes!r}, {warm!r})"
    )
    return int(output.split()[-1])


def _report_peak(factory, name, sizes, warm):
    torch.set_num_threads(1)
    if warm:
        _built(factory, warm)[name]()
    call = _built(factory, sizes)[name]
    gc.collect()
    try:
        # Linux: forget the peak so far.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        kept = call()
        after = _status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        kept = call()
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del kept
    print(after - before)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(field)


# --- Markdown ------------------------------------------------------------


def digits(value: float) -> str:
    """About three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if 1 <= value < 10 else f"{value:.3g}"


def seconds(value: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if value >= size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value * 1e6)} µs"


def mebibytes(value: float) -> str:
    return f"{digits(value / 2**20)} MiB"


def table(header, rows) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(map(str, line)) + " |" for line in lines
    )
