"""Compiles Triton kernels ahead of time, without a GPU, and reads what the result uses.

``tests/compile/cases/<module>.py`` lists what a kernel module is launched with, in a function
``cases() -> list[Case]``; :mod:`tests.compile.report` makes the table of ``docs/kernels.md``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Compute capabilities that every kernel must compile for, and their shared memory a block, bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Case:
    """One kernel with the constants that it is launched with.

    Attributes:
        name: unique, for the table: ``"norm_act_fwd mish U512 fp16"``.
        fn: the ``triton.jit`` function.
        signature: every argument's type in order: ``"*fp32"``, ``"*fp16"``, ``"i32"``, ``"fp32"``,
            ``"constexpr"``, or a tuple of these, in which ``"constexpr"`` is None.
        constants: values of the ``"constexpr"`` arguments; also of arguments passed as None.
        unaligned: pointers and integers that are not multiples of 16; all others are taken to be.
        num_warps: warps of a program.
        num_stages: of software pipelining.
        options: further options of the launch, as ``{"launch_cooperative_grid": True}``.
        tensor_cores: the code must hold tensor-core instructions (HGMMA on sm_90 where ``hgmma``).
        hgmma: on sm_90 it must use warpgroup products.
        max_spill: bytes of local memory a thread that are accepted, with the reason beside it.
        archs: compute capabilities that it is meant for.
    """

    name: str
    fn: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constants: Mapping[str, Any] = field(default_factory=dict)
    unaligned: frozenset[str] = frozenset()
    num_warps: int = 4
    num_stages: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    tensor_cores: bool = False
    hgmma: bool = False
    max_spill: int = 0
    archs: tuple[int, ...] = (80, 90, 100)


class Usage(NamedTuple):
    """What a compiled kernel uses.

    Attributes:
        registers: of a thread.
        spill: bytes of local memory a thread.
        shared: bytes of shared memory a program.
        tensor_cores: the instructions of its GEMMs: ``"HMMA"``, or several joined by ``+``.
    """

    registers: int
    spill: int
    shared: int
    tensor_cores: str


def signature(
    fn: Any, types: Mapping[str, str | tuple[str, ...]], constants: Mapping[str, Any]
) -> dict[str, str | tuple[str, ...]]:
    """The signature of a kernel whose arguments are in ``constants`` or of the given types."""
    return {n: "constexpr" if n in constants else types[n] for n in fn.arg_names}


def compile_case(case: Case, arch: int) -> Any:
    """The compiled kernel: ``asm["ptx"]``, ``asm["cubin"]``, ``metadata``.

    Raises:
        ValueError: constants and signature do not fit.
    """
    signature = dict(case.signature)
    missing = [n for n, t in signature.items() if t == "constexpr" and n not in case.constants]
    if missing:
        raise ValueError(f"case {case.name!r} has no value for constexpr {', '.join(missing)}")
    attrs = {
        path: [["tt.divisibility", 16]]
        for i, (name, kinds) in enumerate(signature.items())
        for path, kind in _leaves(i, kinds)
        if (kind.startswith("*") or kind == "i32" or kind == "i64") and name not in case.unaligned
    }
    constants: dict[Any, Any] = dict(case.constants)
    for i, (_, kinds) in enumerate(signature.items()):
        absent = (path for path, kind in _leaves(i, kinds) if kind == "constexpr")
        constants |= {path: None for path in absent if len(path) > 1}
    source = ASTSource(case.fn, signature, constants, attrs)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            **case.options,
        },
    )


def _leaves(i: int, kinds: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Paths and types of argument ``i``, which may be a tuple."""
    if isinstance(kinds, str):
        return [((i,), kinds)]
    return [((i, j), kind) for j, kind in enumerate(kinds)]


#: Instructions of tensor cores: in PTX, and what the assembler makes of each.
_UNITS = {"tcgen05.mma": "UTCHMMA", "wgmma.mma_async": "HGMMA", "mma.sync": "HMMA"}


def usage(compiled: Any) -> Usage:
    """Registers, spills, shared memory and tensor-core instructions of a compiled kernel.

    Instructions are looked for in the PTX: disassembling takes as long as compiling.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = run_tool("cuobjdump", "-res-usage", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", resources)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers:\n{resources}")
    registers, stack, local = (int(x) for x in found.groups())
    ptx = compiled.asm["ptx"]
    units = [unit for name, unit in _UNITS.items() if re.search(rf"\b{re.escape(name)}\b", ptx)]
    return Usage(registers, stack + local, int(compiled.metadata.shared), "+".join(units))


def run_tool(name: str, *args: str) -> str:
    """Output of one of the CUDA tools that come with triton."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([str(program), *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr.strip()}")
    return done.stdout
