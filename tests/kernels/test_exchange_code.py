"""The exchanges between programs as they are compiled: what Triton makes of their order in memory.

One thread of a program speaks for all: so between their stores and its release, and between its
acquire and their loads, there must be a barrier of the whole program. Each Triton has to be looked
at for that; no interpreter shows it, and on a GPU it would fail once in a long while.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from pwm_fast.kernels.aot import compile_case
from pwm_fast.kernels.report import cases_of

CASES = [
    ("rollout", "rollout_fwd U512 fp16 8x64 w4 weights"),
    ("rollout", "rollout_bwd U512 fp16 8x64 w4 weights"),
    ("linear_norm_act", "linear_norm_act_bwd mish 16x64 of 1792, K 1792, fp16"),
]
RELEASE, ACQUIRE, BARRIER = "release", "acquire", "barrier"
#: In this order: the first that matches names an instruction.
KINDS = {
    r"atom\.\S*\.acq_rel": RELEASE,
    r"ld\.global\.gpu\.acquire|atom\.\S*\.acquire": ACQUIRE,
    r"bar\.sync|barrier\.sync": BARRIER,
    r"ld\.\S*global\S*\.nc|ld\.global\.nc": "cached load",
    r"ld\.(volatile\.global|global\.cg)|ld\.global\.volatile": "fresh load",
    r"ld\.global": "load",
    r"st\.global": "store",
}


def blocks(ptx: str) -> list[list[str]]:
    """The basic blocks, and of each the instructions that matter here."""
    found: list[list[str]] = [[]]
    for line in ptx.splitlines():
        if re.match(r"\$L__BB", line) or re.search(r"\bbra\b", line):
            found.append([])
        kind = next((k for pattern, k in KINDS.items() if re.search(pattern, line)), None)
        if kind is not None:
            found[-1].append(kind)
    return found


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_barriers_stand_around_each_release_and_acquire(module: str, name: str) -> None:
    case = next(c for c in cases_of(module) if c.name == name)
    compiled = compile_case(case, 90)
    found = blocks(compiled.asm["ptx"])
    kinds = [kind for block in found for kind in block]
    assert kinds.count(RELEASE) and kinds.count(RELEASE) == kinds.count(ACQUIRE)
    assert "fresh load" in kinds and "cached load" not in kinds
    for block in found:
        for i, kind in enumerate(block):
            if kind == RELEASE:
                assert block[i - 1 : i] == [BARRIER], block
            if kind in (RELEASE, ACQUIRE):
                assert block[i + 1 : i + 2] == [BARRIER], block
    assert compiled.metadata.launch_cooperative_grid  # all programs are there to be waited for
