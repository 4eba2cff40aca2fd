"""What the Triton kernels use on each GPU generation: the table of ``docs/kernels.md``.

``python -m pwm_fast.kernels.report`` compiles every case of every module here and writes the table;
``--check`` only compares it. No GPU is needed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton

import pwm_fast.kernels
from pwm_fast.kernels.aot import SHARED_LIMIT, Case, Usage, compile_case, usage

SECTION = "report"  # the table stands between <!-- report:begin --> and <!-- report:end -->


class Entry(NamedTuple):
    """One case on one generation of GPUs.

    Attributes:
        module: that lists the case, without its package.
        case: its name.
        arch: compute capability, as 90.
        usage: what the compiled kernel uses; None if it does not compile.
        faults: what is wrong with it, in words.
    """

    module: str
    case: str
    arch: int
    usage: Usage | None
    faults: tuple[str, ...]


def modules() -> list[str]:
    """Names of the modules in this package that list cases."""
    found = []
    for info in pkgutil.iter_modules(pwm_fast.kernels.__path__):
        if info.name != "report" and hasattr(_module(info.name), "cases"):
            found.append(info.name)
    return sorted(found)


def _module(name: str) -> object:
    return importlib.import_module(f"pwm_fast.kernels.{name}")


def cases_of(module: str) -> list[Case]:
    """What a module's kernels are launched with."""
    return _module(module).cases()  # type: ignore[attr-defined]


def faults(case: Case, arch: int, used: Usage) -> tuple[str, ...]:
    """What of a compiled case breaks the rules of :class:`Case`, in words."""
    wrong = []
    if used.spill > case.max_spill:
        wrong.append(f"spills {used.spill} bytes a thread, {case.max_spill} are allowed")
    if used.shared > SHARED_LIMIT[arch]:
        wrong.append(f"takes {used.shared} bytes of shared memory of {SHARED_LIMIT[arch]}")
    if case.tensor_cores and not used.tensor_cores:
        wrong.append("has no tensor-core instruction")
    if case.hgmma and arch == 90 and "HGMMA" not in used.tensor_cores:
        wrong.append("has no HGMMA instruction")
    return tuple(wrong)


def examine(module: str, arch: int, index: int) -> Entry:
    """Compile one case of a module for one generation."""
    case = cases_of(module)[index]
    try:
        used = usage(compile_case(case, arch))
    except Exception as error:  # whatever the compiler raises is the finding
        text = " ".join(str(error).split())[:300]
        return Entry(module, case.name, arch, None, (f"does not compile: {text}",))
    return Entry(module, case.name, arch, used, faults(case, arch, used))


def report(names: Sequence[str] | None = None, workers: int | None = None) -> list[Entry]:
    """Compile all cases of some modules (None: of all), in several processes.

    Raises:
        ValueError: two cases have the same name.
    """
    jobs = []
    seen: set[str] = set()
    for module in names or modules():
        for index, case in enumerate(cases_of(module)):
            if case.name in seen:
                raise ValueError(f"two cases are called {case.name!r}, the second in {module}")
            seen.add(case.name)
            jobs += [(module, arch, index) for arch in case.archs]
    workers = workers or os.cpu_count() or 1
    # Spawned, not forked: the parent may have threads, and triton holds native state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(examine, *zip(*jobs, strict=True), chunksize=3))


def table(entries: Sequence[Entry]) -> str:
    """The report as Markdown: a line a case; of every generation registers, spill, shared, unit."""
    archs = list(SHARED_LIMIT)
    lines = [
        f"Triton {triton.__version__}: registers a thread / bytes spilled a thread / bytes of "
        "shared memory / tensor-core instructions.",
        "",
        "| kernel | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|---|" + "---|" * len(archs),
    ]
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for e in entries:
        rows.setdefault((e.module, e.case), {})[e.arch] = (
            "**does not compile**" if e.usage is None else " / ".join(_cells(e.usage))
        )
    for (_, case), cells in sorted(rows.items()):
        lines.append(f"| {case} | " + " | ".join(cells.get(a, "not built") for a in archs) + " |")
    return "\n".join(lines)


def _cells(used: Usage) -> list[str]:
    cells = [str(used.registers), str(used.spill), str(used.shared)]
    return [*cells, used.tensor_cores] if used.tensor_cores else cells


def stored(page: Path, section: str = SECTION) -> str:
    """The table that a page holds in a section.

    Raises:
        ValueError: it has no place for one.
    """
    begin, end = (f"<!-- {section}:{part} -->" for part in ("begin", "end"))
    found = re.search(f"{begin}\n(.*?)\n?{end}", page.read_text(), re.DOTALL)
    if found is None:
        raise ValueError(f"{page} has no {begin} and {end}")
    return found[1]


def store(page: Path, text: str, section: str = SECTION) -> None:
    """Put a table in the place of the one that a page holds in a section."""
    stored(page, section)
    before, begin, rest = page.read_text().partition(f"<!-- {section}:begin -->\n")
    _, end, after = rest.partition(f"<!-- {section}:end -->")
    page.write_text(f"{before}{begin}{text}\n{end}{after}")


def version_of(text: str) -> str | None:
    """The version of Triton that a table was made with."""
    found = re.match(r"Triton (\S+):", text)
    return found[1] if found else None


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the table; 1 if a kernel is faulty or the table differs."""
    parser = argparse.ArgumentParser(prog="python -m pwm_fast.kernels.report", description=__doc__)
    parser.add_argument("modules", nargs="*", help="only print these modules' table")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--jobs", type=int, default=None, help="processes (all CPUs)")
    parser.add_argument("--page", type=Path, default=Path("docs/kernels.md"))
    args = parser.parse_args(argv)
    entries = report(args.modules or None, args.jobs)
    text = table(entries)
    bad = [f"{e.case} on sm_{e.arch} {fault}" for e in entries for fault in e.faults]
    if args.modules:
        print(text)
    elif not args.check:
        store(args.page, text)
    elif version_of(stored(args.page)) != triton.__version__:
        print(f"not compared: the table is of Triton {version_of(stored(args.page))}")
    elif stored(args.page).rstrip() != text:
        bad.append(f"{args.page} differs: run python -m pwm_fast.kernels.report")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
