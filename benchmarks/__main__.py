"""Run every benchmark; write the report and the tables of the README."""

import importlib
import pathlib
import platform
import re
import sys
import time

import torch

from benchmarks.measure import SUMMARY

PARTS = ("accuracy", "functional", "derivatives", "growth", "sampling")
REPORT = pathlib.Path(__file__).with_name("report.md")
README = REPORT.parent.parent / "README.md"

INTRODUCTION = """\
# Benchmarks

<!-- report -->

Written by `make bench`; the numbers are those of one run on one machine:
{machine}.

Times are CPU seconds of one thread. Ours and the peer's take turns, and each
turn gives a ratio. A cell holds the median of the ratios and, in brackets,
their quartiles; the text above each table says which time is divided by
which.
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


def main(chosen: list[str]) -> None:
    torch.set_num_threads(1)
    parts = [INTRODUCTION.format(machine=machine())]
    for name in chosen or PARTS:
        start = time.monotonic()
        print(f"{name} ...", end=" ", flush=True)
        parts.append(importlib.import_module(f"benchmarks.{name}").report())
        print(f"{time.monotonic() - start:.0f} s")
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    if chosen:
        print(text)
        return
    REPORT.write_text(text, encoding="utf-8")
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
