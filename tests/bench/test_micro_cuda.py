"""Microbenchmarks in CUDA C++: they compile to what they mean to measure, and failures are said.

None of them runs here without a GPU. Each checks its own result where it runs.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench import micro, micro_cuda
from bench.micro_cuda import Compiler, Figure
from bench.providers import Absent

Script = Callable[[str, str], str]
GOOD = '{"name": "a", "value": 2.5, "unit": "TB/s"}'


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Writes a shell script that stands in for a program; gives its path."""

    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
        path.chmod(0o755)
        return str(path)

    return write


# --- what a program prints, and how it ends -------------------------------------------------------


def test_figures_are_what_a_program_prints(script: Script) -> None:
    absent = '{"name": "b", "value": null, "unit": "", "reason": "absent: clusters need sm_90"}'
    found = micro_cuda.run("x y", [script("good", f"echo '{GOOD}'; echo '{absent}'")])
    assert found == [
        Figure("a", 2.5, "TB/s"),
        Figure("b", None, "", "absent: clusters need sm_90"),
    ]


@pytest.mark.parametrize(
    ("end", "says"),
    [
        ("exit 1", "failed: status 1: it said nothing"),
        ("echo 'error: l2.cu:7: f(): out of luck' >&2; exit 3", "status 3: error: l2.cu:7: f()"),
        ("kill -ABRT $$", "failed: signal 6"),
        ("echo 'not a figure'", "'not a figure', which is no figure"),
        ('echo \'{"name": "b", "va\'', "which is no figure"),
    ],
)
def test_a_bad_end_keeps_the_figures_before_it(script: Script, end: str, says: str) -> None:
    found = micro_cuda.run("x y", [script("bad", f"echo '{GOOD}'; {end}")])
    assert found[0] == Figure("a", 2.5, "TB/s")
    assert len(found) == 2 and found[1].name == "x y" and found[1].value is None
    assert str(found[1].reason).startswith("failed: ") and says in str(found[1].reason)


def test_a_program_that_hangs_is_stopped(script: Script) -> None:
    command = [script("hangs", f"echo '{GOOD}'; exec sleep 60")]
    found = micro_cuda.run("x y", command, limit=0.5)
    assert found[0] == Figure("a", 2.5, "TB/s")
    assert found[1] == Figure("x y", None, "", "failed: it did not end within 0 s")


def test_a_program_that_says_nothing_has_failed(script: Script) -> None:
    assert micro_cuda.run("x y", [script("mute", "true")])[0].reason == (
        "failed: it printed no figure"
    )
    found = micro_cuda.run("x y", ["/nonexistent/program"])
    assert "it does not start" in str(found[0].reason)


@pytest.mark.parametrize(
    "line",
    [
        "[1, 2]",
        '{"name": "a"}',
        '{"name": "a", "value": "2", "unit": "s"}',
        '{"name": "a", "value": NaN, "unit": "s"}',
        '{"name": "a", "value": Infinity, "unit": "s"}',
        '{"name": "a", "value": true, "unit": "s"}',
        '{"name": "a", "value": null, "unit": "s"}',
        '{"name": "a", "value": null, "unit": "s", "reason": "because"}',
        '{"name": "a", "value": 1.0, "unit": "s", "reason": "failed: yet a value"}',
        '{"name": 7, "value": 1.0, "unit": "s"}',
        '{"name": "a", "value": 1.0, "unit": "s", "more": 1}',
    ],
)
def test_what_is_no_figure_is_not_taken_for_one(line: str) -> None:
    found = micro_cuda.parse("x y", line)
    assert found.name == "x y" and found.value is None
    assert str(found.reason).startswith("failed: it printed ")


def test_every_gpu_is_compiled_for_by_its_own_name() -> None:
    found = [micro_cuda.architecture(*c) for c in ((8, 0), (8, 9), (9, 0), (10, 0), (12, 1))]
    assert found == ["80", "89", "90a", "100a", "121a"]


# --- the compiler ---------------------------------------------------------------------------------

# Compiles by copying: the source is the program. Notes every call.
FAKE_NVCC = """
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
echo x >> "$(dirname "$0")/calls"
while [ $# -gt 1 ]; do [ "$1" = -o ] && out=$2; shift; done
if grep -q broken "$1"; then echo "$1(3): error: it is broken"; exit 2; fi
cp "$1" "$out"; chmod +x "$out"
"""


def sources(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.cu").write_text(text, "utf-8")
    (folder / "common.cuh").write_text("", "utf-8")
    return folder


def test_programs_are_compiled_once_until_a_source_changes(script: Script, tmp_path: Path) -> None:
    folder = sources(tmp_path / "cuda", a="#!/bin/sh\necho 1\n", b="broken")
    compiler = Compiler(script("nvcc", FAKE_NVCC), ["90a"], tmp_path / "kept")
    compiler.compile_all([folder / "a.cu", folder / "b.cu"])
    calls = tmp_path / "calls"
    assert calls.read_text().count("x") == 2
    program = compiler.compile(folder / "a.cu")
    assert calls.read_text().count("x") == 2
    assert [p.name for p in (tmp_path / "kept").iterdir()] == [program.name]
    with pytest.raises(RuntimeError, match=r"does not compile: .*b\.cu\(3\): error: it is broken"):
        compiler.compile(folder / "b.cu")
    (folder / "common.cuh").write_text("// changed", "utf-8")
    assert compiler.compile(folder / "a.cu") != program
    other = Compiler(compiler.nvcc, ["80"], tmp_path / "kept")
    assert other.path(folder / "a.cu") != compiler.path(folder / "a.cu")


def test_the_host_compiler_is_the_one_that_was_asked_for(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(script("nvcc", "echo 1"), ["80"], tmp_path)
    monkeypatch.delenv("CXX", raising=False)
    assert "-ccbin" not in compiler.command(tmp_path / "a.cu", tmp_path / "a")
    monkeypatch.setenv("CXX", "ccache clang++")
    command = compiler.command(tmp_path / "a.cu", tmp_path / "a")
    assert command[command.index("-ccbin") + 1] == "clang++"


def test_a_compiler_that_hangs_is_stopped(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = script("nvcc", 'if [ "$1" = --version ]; then echo 1; else exec sleep 60; fi')
    folder = sources(tmp_path / "cuda", a="")
    compiler = Compiler(nvcc, ["80"], tmp_path / "kept")
    monkeypatch.setattr(micro_cuda, "COMPILE_LIMIT", 0.5)
    with pytest.raises(RuntimeError, match="did not compile within"):
        compiler.compile(folder / "a.cu")


def test_without_a_compiler_all_is_absent(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    with pytest.raises(Absent, match="there is no nvcc"):
        micro_cuda.find_nvcc()
    monkeypatch.setenv("NVCC", script("broken", "exit 1"))
    with pytest.raises(Absent, match="does not run"):
        Compiler(micro_cuda.find_nvcc(), ["80"], tmp_path)


def test_a_stage_on_a_gpu_that_has_no_nvcc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """All the way through the readings; the GPU itself is never touched."""

    def none() -> str:
        raise Absent("there is no nvcc")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(micro_cuda, "find_nvcc", none)
    found = list(micro.read("cuda dsmem", torch.device("cuda")))
    assert found == [
        {"name": "cuda dsmem", "value": None, "unit": "", "reason": "absent: there is no nvcc"}
    ]


def test_readings_stand_beside_what_was_assumed(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = '{"name": "graph node, PDL", "value": 0.8, "unit": "µs"}'
    program = script("graphs", f"[ \"$2\" = plain ] && exit 1; echo '{line}'")
    monkeypatch.setattr(micro_cuda, "_compiled", lambda name, device: Path(program))
    plain, fast = micro.read("cuda graphs", torch.device("cuda"))
    assert plain["name"] == "graphs plain" and plain["reason"].startswith("failed: status 1")
    assert fast["value"] == 0.8 and fast["replaces"]["value"] == 0.7


def test_without_a_gpu_all_is_absent() -> None:
    names = [n for n in micro.BENCHMARKS if n.startswith("cuda ")]
    assert len(names) == len(micro_cuda.PROGRAMS) + 1
    for name in names:
        (found,) = micro.read(name, torch.device("cpu"))
        assert found["value"] is None and found["reason"].startswith("absent: ")


# --- the sanitizer --------------------------------------------------------------------------------


def test_what_the_sanitizer_found_is_counted(script: Script) -> None:
    def found(text: str, wrong: bool) -> Figure:
        return micro_cuda.sanitized("n", [script("sanitizer", text)], wrong)

    clean = "echo '========= ERROR SUMMARY: 0 errors'"
    assert found(clean, False) == Figure("n", 0.0, "errors")
    assert found("echo '========= ERROR SUMMARY: 2 errors'; exit 9", True).value == 2.0
    hazards = "echo '========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)'"
    assert found(hazards, False).value == 3.0
    assert "did not find" in str(found(clean, True).reason)
    crash = found("echo 'Error: no device'; exit 1", False)
    assert crash.value is None and "status 1: Error: no device" in str(crash.reason)


# --- what they compile to -------------------------------------------------------------------------

# Of the kernels whose symbol has this in it: instructions that the timed part must hold, how often.
TIMED = {
    "clusters": {},
    "dsmem": {
        "3hop": {"STAS": 2, "SYNCS.PHASECHK": 1, "LDS": 1},
        "5chase": {"LD.E": 8},
        "gatherIL3Way0ELi8192": {r"STAS.128": 1},
        "gatherIL3Way0ELi65536": {r"STAS.128": 8},
        "gatherIL3Way1": {"UBLKCP.S.S": 1, "FENCE.VIEW.ASYNC": 1},
        "gatherIL3Way2": {"UBLKCP.S.G.MULTICAST": 1, "STG.E.128": 1, "FENCE.VIEW.ASYNC": 1},
        "gatherIL3Way3ELi8192": {"LDG.E.128.STRONG.GPU": 1, "STG.E.128": 1},
        "gatherIL3Way3ELi65536": {"LDG.E.128.STRONG.GPU": 8, "STG.E.128": 1},
    },
    "graphs": {},
    "l2": {"read_loads": {"LDG.E.NA.128": 4}, "read_bulk": {"UBLKCP.S.G": 2, "LDS": 4}},
    "tensor": {"layers": {"HGMMA": 32}, "tilesILi2ELi4": {"HMMA.16816.F32": 32}},
    "mish": {"repeat": {"MUFU.EX2": 4, "MUFU.RCP": 4}},
}
WHOLE = {  # the same of kernels that read no clock
    "clusters": {"exchange": {"STAS": 1, "LD.E": 1, "UCGABAR_WAIT": 2}, "together": {"LDG": 1}},
    "graphs": {"nodeILb1": {"ACQBULK": 1, "PREEXIT": 1}, "nodeILb0": {}},
    "l2": {"4flag": {"STG.E.STRONG.GPU": 1, "LDG.E.STRONG.GPU": 1}},
}


@pytest.fixture(scope="module")
def nvcc() -> str:
    pytest.importorskip("triton")  # for its cuobjdump
    try:
        return micro_cuda.find_nvcc()
    except Absent as error:
        pytest.skip(str(error))


def compile_for(nvcc: str, name: str, arch: str, target: Path) -> str:
    """Compile a program, all of it for Hopper; gives what the compiler had to say."""
    compiler = Compiler(nvcc, [arch], target.parent)
    command = compiler.command(micro_cuda.SOURCES / f"{name}.cu", target)
    if arch != "90a":  # the host's side is the same
        command.append("-cubin")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_they_compile_to_what_is_to_be_measured(nvcc: str, tmp_path: Path) -> None:
    """On A100, Hopper and Blackwell, without a word: a serialised wgmma is a warning, too."""
    jobs = [(name, arch) for arch in ("90a", "80", "100a") for name in micro_cuda.PROGRAMS]
    with ThreadPoolExecutor(2) as pool:
        said = pool.map(lambda job: compile_for(nvcc, *job, tmp_path / "-".join(job)), jobs)
        assert dict(zip(jobs, said, strict=True)) == dict.fromkeys(jobs, "")
    for name in micro_cuda.PROGRAMS:
        code = kernels(tmp_path / f"{name}-90a")
        for whole, wanted in ((False, TIMED[name]), (True, WHOLE.get(name, {}))):
            for symbol, instructions in wanted.items():
                chosen = {k: v for k, v in code.items() if symbol in k}
                assert chosen, symbol
                for kernel, lines in chosen.items():
                    held = lines if whole else timed(lines)
                    for instruction, times in instructions.items():
                        found = [x for x in held if re.search(rf"\b{re.escape(instruction)}", x)]
                        assert len(found) >= times, (kernel, instruction)
        for kernel, lines in code.items():
            assert not [x for x in lines if re.search(r"\b(STL|LDL)\b", x)], f"{kernel} spills"
    code = kernels(tmp_path / "graphs-90a")
    plain = next(lines for kernel, lines in code.items() if "nodeILb0" in kernel)
    assert not [x for x in plain if "ACQBULK" in x or "PREEXIT" in x]
    for kernel, lines in kernels(tmp_path / "tensor-90a").items():
        products = [x for x in lines if "HGMMA" in x]
        assert "layers" not in kernel or len(products) == 32  # one layer, and it is in the loop
        for line in products:  # sums, the slice in registers, the rows in shared memory, sums
            assert re.search(r"HGMMA\.64x\d+x16\.F32 R\d+, R\d+, gdesc\[UR\d+\], R\d+", line), line


def kernels(program: Path) -> dict[str, list[str]]:
    """Instructions of every kernel in a program, by symbol."""
    from tests.compile.aot import run_tool

    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in run_tool("cuobjdump", "-sass", str(program)).splitlines():
        if name := re.search(r"Function : (\S+)", line):
            lines = found.setdefault(name[1], [])
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(code[1])
    return found


def timed(lines: list[str]) -> list[str]:
    """What stands between the first and the last reading of the clock."""
    clocks = [i for i, line in enumerate(lines) if "SR_CLOCKLO" in line]
    return lines[clocks[0] : clocks[-1] + 1]
