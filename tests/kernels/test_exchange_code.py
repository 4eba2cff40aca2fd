"""The exchanges between programs as they are compiled: what Triton makes of their order in memory.

One thread of a program speaks for all: so between their stores and its release, and between its
acquire and their loads, there must be a barrier of the whole program. Each Triton has to be looked
at for that; no interpreter shows it, and on a GPU it would fail once in a long while.

Words that carry their epoch need no order among each other. Of them it is looked at that each is
stored and loaded as one access, not by parts, and past the caches that are not shared.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.compile.aot import Case, compile_case, run_tool
from tests.compile.report import cases_of

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


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_the_compiled_exchange_is_ordered(direction: str) -> None:
    """All threads' stores, a barrier, one release and acquire, a barrier, then loads past L1."""
    name = f"rollout_{direction} U512 fp16 8x64 w4 weights"
    case = next(c for c in cases_of("rollout") if c.name == name)
    lines = compile_case(case, 90).asm["ptx"].splitlines()
    marks = ("st.global", "ld.global.cg", "bar.sync", "atom.global")
    events = [m for line in lines for m in marks if m in line]
    text = " ".join(events)
    exchanges = events.count("atom.global")
    assert exchanges == {"fwd": 4, "bwd": 5}[direction]
    assert sum("atom.global.gpu.acq_rel" in line for line in lines) == exchanges
    assert text.count("st.global bar.sync atom.global bar.sync") == exchanges
    assert "ld.global.gpu.acquire" in "".join(lines)
    after = [part.split() for part in text.split("atom.global")[1:]]
    loads = [part for part in after if "ld.global.cg" in part]
    assert len(loads) >= exchanges - 1  # a block of the code may lie before where it comes from
    assert all(part.index("bar.sync") < part.index("ld.global.cg") for part in loads)


@pytest.mark.parametrize(("name", "times"), [("8x64 w4", 1), ("8x64 w8", 2), ("16x64 w8", 1)])
def test_how_often_a_product_is_computed(name: str, times: int) -> None:
    """Warps without a share of their own repeat another's: so 4 come before 8."""
    case = next(c for c in cases_of("rollout") if c.name == f"rollout_fwd U512 fp16 {name} weights")
    found = set(
        re.findall(
            r"nvidia_mma<.*?warpsPerCTA = \[(\d+), (\d+)\].*?instrShape = \[16, 8\]",
            compile_case(case, 90).asm["ttgir"],
        )
    )
    assert len(found) == 1
    down, across = (int(warps) for warps in found.pop())
    bm, bn = case.constants["BM"], case.constants["BN"]
    tall, wide = (bm, bn) if case.constants["FLIP"] else (bn, bm)
    assert max(down * 16 // tall, 1) * max(across * 8 // wide, 1) == times


# A layout of more rows comes a second time without what the weights' gradients need, as the other
# does: the exchange is the same.
WORDS = [
    pytest.param(case, marks=pytest.mark.repeats if case.name.endswith("16x64 w8 words") else ())
    for case in cases_of("rollout")
    if "words" in case.name and 90 in case.archs
]


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case.name)
def test_words_are_exchanged_by_relaxed_accesses_of_their_size(case: Case, tmp_path: Path) -> None:
    compiled = compile_case(case, 90)
    ptx = compiled.asm["ptx"]
    assert not re.search(r"\b(atom|red|membar|fence)\b", ptx)  # nothing else is waited for
    meetings = {"rollout_fwd": 4, "rollout_bwd": 5}[case.name.split()[0]]
    board = case.signature["board1_ptr"][2:]  # "32" or "64"
    sizes = {board, "64"}
    stores = re.findall(r"st\.relaxed\.gpu\.global\.b(\d+)", ptx)
    loads = re.findall(r"ld\.volatile\.global(?:\.v\d)?\.b(\d+)", ptx)
    assert set(stores) == set(loads) == sizes
    assert len(loads) == ptx.count("ld.volatile") and len(stores) == ptx.count("st.relaxed")
    # Every poll ends in a vote of the whole program.
    assert len(re.findall(r"redux\.sync\.max\.u32", ptx)) == meetings
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    code = run_tool("nvdisasm", "-c", str(cubin))
    # Past L1: a weak load could be answered from there for ever. Of three values a row, in four
    # places, the assembler drops what is masked everywhere.
    dropped = len(loads) - len(re.findall(r"\bLDG\.E\S*\.STRONG\.(?:SYS|GPU)", code))
    assert 0 <= dropped <= loads.count("64") // 4
    assert len(re.findall(r"\bSTG\.E\S*\.STRONG\.GPU", code)) == len(stores)
    assert not re.search(r"\b(MEMBAR|ATOMG?|RED)\b", code)
    assert compiled.metadata.launch_cooperative_grid


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case.name)
def test_every_word_is_read_by_one_thread(case: Case) -> None:
    """Or one of two threads might see it late, and go on with what the other has seen."""
    text = compile_case(case, 90).asm["ttgir"]
    layouts = dict(re.findall(r"^(#blocked\d*) = #ttg\.blocked<\{(.*?)\}>", text, re.MULTILINE))
    polls = re.findall(
        r"tt\.load .*isVolatile = true.* : tensor<(\d+)x(\d+)x!tt\.ptr<i\d+>, (#blocked\d*)>", text
    )
    assert len(polls) == text.count("isVolatile = true") > 0
    for *shape, layout in polls:
        covered = [1, 1]
        for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA"):
            found = re.search(rf"{name} = \[(\d+), (\d+)\]", layouts[layout])
            assert found is not None
            covered = [a * int(b) for a, b in zip(covered, found.groups(), strict=True)]
        assert all(c <= int(s) for c, s in zip(covered, shape, strict=True)), (shape, layout)
