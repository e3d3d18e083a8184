"""Run every benchmark, or the parts that are named: python -m benchmarks
sampling. Writes the report and the tables of the README."""

import importlib
import pathlib
import platform
import re
import sys
import time

import torch

from benchmarks.measure import SUMMARY

PARTS = (
    "accuracy",
    "functional",
    "derivatives",
    "growth",
    "sampling",
    "regression",
    "linear",
    "distributed",
)
REPORT = pathlib.Path(__file__).with_name("report.md")
README = REPORT.parent.parent / "README.md"

INTRODUCTION = """\
# Benchmarks

<!-- report -->

Written by `make bench`; the numbers of a section are those of one run on one
machine, which its last line names.

Times are CPU seconds of one thread, where nothing else is said. Ours and the
peer's take turns, and each turn gives a ratio. A cell holds the median of the
ratios and, in brackets, their quartiles; the text above each table says which
time is divided by which.
"""


def machine() -> str:
    """Processor and versions."""
    model = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line for line in lines if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        pass
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"{model} ({capability}), {platform.system()}, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    )


def kept() -> dict[str, str]:
    """The sections of the committed report, by the names of their parts."""
    text = REPORT.read_text(encoding="utf-8")
    _, *pieces = re.split(r"<!-- part (\w+) -->\n", text)
    return dict(zip(pieces[::2], pieces[1::2], strict=True))


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    sections = kept() if chosen else {}
    for name in chosen or PARTS:
        start = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        part = importlib.import_module(f"benchmarks.{name}")
        measured = f"Measured on {machine()}."
        sections[name] = f"{part.report().strip()}\n\n{measured}"
        print(f"{time.monotonic() - start:.0f} s")
    pieces = [INTRODUCTION.strip()]
    for name in PARTS:
        if name in sections:  # a new part may not have been measured yet
            pieces.append(f"<!-- part {name} -->\n{sections[name].strip()}")
    REPORT.write_text("\n\n".join(pieces) + "\n", encoding="utf-8")
    readme = README.read_text(encoding="utf-8")
    for name, summary in SUMMARY.items():
        place = rf"(<!-- {name} -->\n).*?(\n<!-- end -->)"
        readme, found = re.subn(
            place,
            lambda m, new=summary: f"{m[1]}\n{new}\n{m[2]}",
            readme,
            flags=re.DOTALL,
        )
        assert found == 1, f"README.md has {found} places for {name}"
    README.write_text(readme, encoding="utf-8")
    print(f"Next: read benchmarks/{REPORT.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
