"""What the CUDA C++ kernels use on each GPU: the second table of ``docs/kernels.md``.

``python -m tests.compile.cuda_report`` reads it from the built extension and writes the table;
``--check`` only compares it. No GPU is needed, but nvcc was when the extension was built.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from bench.pages import write
from tests.compile.aot import run_tool
from tests.compile.report import stored

SECTION = "cuda"


class CudaUsage(NamedTuple):
    """One kernel on one architecture.

    Attributes:
        kernel: name for people: ``"esnr moments fp32 M16"``.
        arch: as ``"sm_90a"``.
        registers: of a thread.
        spill: bytes of local memory a thread.
        shared: bytes of shared memory a block.
    """

    kernel: str
    arch: str
    registers: int
    spill: int
    shared: int


def why_not() -> str | None:
    """Why there is nothing to read; None if there is."""
    try:
        extension = import_module("pwm_fast._C")
    except ImportError as error:
        return f"the native extension does not load ({error})"
    build = extension.build_info()
    return None if build["cuda"] else f"the extension has no CUDA code: {build['cuda_detail']}"


def examine() -> list[CudaUsage]:
    """What every kernel in the built extension uses, by architecture.

    Raises:
        RuntimeError: cuobjdump does not know the file.
    """
    path = str(import_module("pwm_fast._C").__file__)
    found, arch, function = [], "", ""
    for line in run_tool("cuobjdump", "-res-usage", path).splitlines():
        text = line.strip()
        if text.startswith("arch = "):
            arch = text.removeprefix("arch = ")
        elif text.startswith("Function "):  # its figures stand on the next line
            function = text.removeprefix("Function ").rstrip(":")
        elif text.startswith("REG:"):
            used = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", text)}
            spill = used["STACK"] + used["LOCAL"]
            name = readable(function)
            found.append(CudaUsage(name, arch, used["REG"], spill, used["SHARED"]))
    return sorted(found)


def readable(symbol: str) -> str:
    """A kernel's name for people, made of its symbol; the symbol where it is of another form."""
    found = re.search(r"\d(chunks|tensors|write_words|probe)(I\w+)?", symbol)
    if found is None:
        return symbol
    if found[1] != "chunks":
        return "probe" if found[1] == "probe" else f"esnr {found[1]}"
    dtype = next((d for d, s in (("fp16", "Half"), ("bf16", "Bfloat16")) if s in found[2]), "fp32")
    work = re.search(r"(Moments|Update|Result)(?:ILi(\d+))?", found[2])
    if work is None:
        return symbol
    return f"esnr {work[1].lower()} {dtype}" + (f" M{work[2]}" if work[2] else "")


def faults(used: Sequence[CudaUsage]) -> list[str]:
    """What breaks the rules: a kernel may not spill."""
    return [f"{u.kernel} spills {u.spill} bytes a thread on {u.arch}" for u in used if u.spill]


def table(used: Sequence[CudaUsage]) -> str:
    """The report as Markdown: a line a kernel; of every architecture registers, spill, shared."""
    archs = sorted({u.arch for u in used})
    cells: dict[str, dict[str, str]] = {}
    for u in used:
        cells.setdefault(u.kernel, {})[u.arch] = f"{u.registers} / {u.spill} / {u.shared}"
    lines = [
        f"{compiler()}: registers a thread / bytes spilled a thread / bytes of shared memory.",
        "",
        "| kernel | " + " | ".join(archs) + " |",
        "|---|" + "---|" * len(archs),
    ]
    for kernel, by_arch in cells.items():
        lines.append(f"| {kernel} | " + " | ".join(by_arch.get(a, "-") for a in archs) + " |")
    return "\n".join(lines)


def compiler() -> str:
    """The compiler and the architectures of the built extension."""
    return str(import_module("pwm_fast._C").build_info()["cuda_detail"])


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the table; 1 if a kernel spills, the table differs or there is no CUDA."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.compile.cuda_report", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--page", type=Path, default=Path("docs/kernels.md"))
    args = parser.parse_args(argv)
    if (reason := why_not()) is not None:
        print(reason, file=sys.stderr)
        return 1
    used = examine()
    bad, text = faults(used), table(used)
    if not args.check:
        write(args.page, SECTION, text)
    elif not stored(args.page, SECTION).startswith(f"{compiler()}:"):
        print(f"not compared: the table is of another compiler than {compiler()}")
    elif stored(args.page, SECTION).rstrip() != text:
        bad.append(f"{args.page} differs: run python -m tests.compile.cuda_report")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
