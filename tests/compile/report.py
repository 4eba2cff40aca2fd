"""What the Triton kernels use on each GPU generation: the table of ``docs/kernels.md``.

``python -m tests.compile.report`` compiles every case of :mod:`tests.compile.cases` and writes the
table; ``--check`` only compares it. No GPU is needed. Triton keeps what it compiled, so a second
run compiles changes alone.

With the table stands a hash of all that it depends on (:func:`fingerprint`). Where that is the
same, so is the table: the tests compile a sample of it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import io
import os
import pkgutil
import re
import sys
import tokenize
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton

import pwm_fast.kernels
from bench.pages import write
from tests.compile.aot import SHARED_LIMIT, Case, Usage, compile_case, usage

CASES = Path(__file__).parent / "cases"
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
    """Names of the kernels' modules, each of which has a file of cases."""
    return sorted(path.stem for path in CASES.glob("*.py"))


def cases_of(module: str) -> list[Case]:
    """What a module's kernels are launched with."""
    found: list[Case] = importlib.import_module(f"tests.compile.cases.{module}").cases()
    return found


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


def jobs(names: Sequence[str] | None = None) -> list[tuple[str, int, int]]:
    """Module, generation and index of all that is compiled of some modules (None: of all).

    Raises:
        ValueError: two cases for one generation have the same name.
    """
    found = []
    seen: set[tuple[str, int]] = set()
    for module in names or modules():
        for index, case in enumerate(cases_of(module)):
            for arch in case.archs:
                if (case.name, arch) in seen:
                    raise ValueError(f"two cases are called {case.name!r}, the second in {module}")
                seen.add((case.name, arch))
                found.append((module, arch, index))
    return found


def report(names: Sequence[str] | None = None, workers: int | None = None) -> list[Entry]:
    """Compile the cases of some modules (None: of all), in several processes.

    Args:
        names: the modules.
        workers: processes; None: one a CPU.

    Raises:
        ValueError: see :func:`jobs`.
    """
    wanted = jobs(names)
    workers = workers or os.cpu_count() or 1
    # Spawned, not forked: the parent may have threads, and triton holds native state.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(examine, *zip(*wanted, strict=True), chunksize=3))


def fingerprint(names: Sequence[str] | None = None) -> str:
    """A hash of all device code and cases of some modules (None: of all).

    Comments and lines do not count, nor does the version of Triton.
    """
    digest = hashlib.sha256()
    for info in sorted(pkgutil.iter_modules(pwm_fast.kernels.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"pwm_fast.kernels.{info.name}")
        for name, fn in sorted(vars(module).items()):
            if isinstance(fn, triton.JITFunction):
                digest.update(f"{name} {_code(fn.src)}".encode())
            elif isinstance(fn, triton.language.constexpr):
                digest.update(f"{name} {fn.value}".encode())
    for module_name in names or modules():
        for c in cases_of(module_name):
            options = (c.num_warps, c.num_stages, c.options, sorted(c.unaligned), c.archs)
            digest.update(repr((c.name, c.signature, c.constants, options)).encode())
    return digest.hexdigest()[:12]


def _code(source: str) -> str:
    """A function's tokens, without comments and docstring."""
    words: list[str] = []
    docstring = False
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if token.type == tokenize.STRING and words[-1] == "INDENT":
            docstring = True
        elif docstring:
            docstring = False  # the end of its line
        elif token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            words.append(tokenize.tok_name[token.type])
        else:
            words.append(token.string)
    return " ".join(words)


def table(entries: Sequence[Entry]) -> str:
    """The report as Markdown: a line a case; of every generation registers, spill, shared, unit."""
    archs = list(SHARED_LIMIT)
    lines = [
        f"Triton {triton.__version__}, kernels {fingerprint()}: registers a thread / bytes spilled "
        "a thread / bytes of shared memory / tensor-core instructions.",
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


def rows_of(text: str) -> dict[tuple[str, int], Usage]:
    """What a table says of each case and generation."""
    found = {}
    for line in text.splitlines():
        case, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for arch, cell in zip(SHARED_LIMIT, cells, strict=False):
            values = re.fullmatch(r"(\d+) / (\d+) / (\d+)(?: / (\S+))?", cell)
            if values:
                registers, spill, shared = (int(v) for v in values.groups()[:3])
                found[case, arch] = Usage(registers, spill, shared, values[4] or "")
    return found


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


def made_with(text: str) -> tuple[str, str] | None:
    """The version of Triton, and the fingerprint, that a table was made with."""
    found = re.match(r"Triton (\S+), kernels (\w+):", text)
    return (found[1], found[2]) if found else None


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the table; 1 if a kernel is faulty or the table differs."""
    parser = argparse.ArgumentParser(prog="python -m tests.compile.report", description=__doc__)
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
        write(args.page, SECTION, text)
    elif (made_with(stored(args.page)) or ("?",))[0] != triton.__version__:
        print("not compared: the table is of another Triton")
    elif stored(args.page).rstrip() != text:
        bad.append(f"{args.page} differs: run python -m tests.compile.report")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
