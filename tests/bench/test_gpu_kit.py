"""What is built before a visit is packed, checked and put in its place."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import (
    environment,
    fake_driver,
    gpu,
    gpu_checks,
    gpu_kit,
    gpu_out,
    gpu_tests,
    prepare,
    worker,
)
from bench.gpu_kit import MANIFEST, NATIVE, TOOLS, TRITON, KitError, load, pack, unpack
from bench.providers import OURS
from bench.stages import Deadline, Outcome

FACTS = {"commit": "0123456789ab", "python": "3.12.1", "triton": "3.6.0", "arch": "sm_90"}
triton = pytest.importorskip("triton")


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    cache = tmp_path / "cache" / "KEY"
    cache.mkdir(parents=True)
    (cache / "k.cubin").write_bytes(b"code")
    (cache / "k.json").write_text("{}")
    paths = {name: str(cache / name) for name in ("k.cubin", "k.json")}
    (cache / "__grp__k.json").write_text(json.dumps({"child_paths": paths}))
    extension = tmp_path / f"_C{gpu_checks.suffix()}"
    extension.write_bytes(b"extension")
    os.utime(extension, (1.0, 1.0))
    tools = tmp_path / "tools"
    (tools / "a_test_tool" / "__pycache__").mkdir(parents=True)
    (tools / "a_test_tool" / "__init__.py").write_text("VALUE = 3\n")
    (tools / "a_test_tool" / "__pycache__" / "x.pyc").write_bytes(b"of another machine")
    manifest = pack(tmp_path / "kit", cache.parent, [extension], tools, FACTS)
    assert manifest == load(tmp_path / "kit")
    return tmp_path / "kit"


def put(kit: Path) -> dict[str, Any]:
    """Unpack it beside itself."""
    return unpack(kit, *(kit.parent / name for name in ("there", "package", "site")))


def change(kit: Path, part: str, key: str, value: str) -> None:
    manifest = json.loads((kit / MANIFEST).read_text())
    assert key in manifest["needs"][part]
    manifest["needs"][part][key] = value
    (kit / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_packed_is_put_in_its_place(kit: Path, tmp_path: Path) -> None:
    said = put(kit)
    assert said == {
        "commit": "0123456789ab",
        TRITON: "3 of 3 files unpacked",
        NATIVE: "1 of 1 files unpacked",
        TOOLS: "1 of 1 files unpacked",
    }
    assert (tmp_path / "site" / "a_test_tool" / "__init__.py").read_text() == "VALUE = 3\n"
    key = tmp_path / "there" / "KEY"
    assert (key / "k.cubin").read_bytes() == b"code"
    group = json.loads((key / "__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(key / name) for name in ("k.cubin", "k.json")}
    extension = tmp_path / "package" / f"_C{gpu_checks.suffix()}"
    assert extension.read_bytes() == b"extension" and extension.stat().st_mtime > 1e9


def test_what_is_there_stays_and_a_killed_run_is_repaired(kit: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    put(kit)
    group = there / "KEY" / "__grp__k.json"
    wanted = group.read_text()
    group.write_text('{"child_paths": {"k.cubin": "/elsewhere", "k.json": "/elsewhere"}}')
    (there / "KEY" / "k.cubin").unlink()
    (there / "KEY" / "k.json").write_text("newer")
    said = put(kit)
    assert said[TRITON] == "1 of 3 files unpacked"
    assert group.read_text() == wanted and (there / "KEY" / "k.json").read_text() == "newer"


@pytest.mark.parametrize(
    ("part", "key", "says"),
    [
        (TRITON, "triton", "triton is .*, the kit's 0.1"),
        (TRITON, "python", "python is .*, the kit's 0.1"),
        (NATIVE, "python", "python is .*, the kit's 0.1"),
        (NATIVE, "sources", "the extension's sources have changed since"),
        (TRITON, None, f"{TRITON} is missing or damaged$"),
    ],
)
def test_a_part_that_does_not_fit_is_left_out(
    part: str, key: str | None, says: str, kit: Path, tmp_path: Path
) -> None:
    if key is None:
        data = (kit / part).read_bytes()
        (kit / part).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        change(kit, part, key, "0.1")
    said = put(kit)
    assert re.match(f"not used: {says}", said[part])
    (other,) = {TRITON, NATIVE} - {part}
    assert said[other].endswith("unpacked")
    assert (tmp_path / "there").exists() == (part != TRITON)


def test_a_kit_too_large_is_refused(kit: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / "KEY" / "noise").write_bytes(os.urandom(2**20))
    with pytest.raises(KitError, match=r"the kit has 1\.0 MiB, at most 1 may be brought along"):
        pack(kit, tmp_path / "cache", [], tmp_path / "none", FACTS, 2**20)
    with pytest.raises(KitError, match="is no kit"):
        load(kit)
    assert gpu_kit.LIMIT == 64 * 2**20


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 2}', '{"schema": 1, "files": {}}'])
def test_what_is_no_manifest_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(KitError, match=str(tmp_path)):
        load(tmp_path)


def test_a_kit_that_was_named_and_is_not_there_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--device=cpu", "--quick", f"--out={tmp_path}", f"--kit={tmp_path / 'none'}"]
    assert gpu.main(args) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'none'} is no kit: No such file or directory\n"
    )


@pytest.fixture
def brought(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kit on a machine whose folders are others; the checkout's own extension stays."""
    change(kit, NATIVE, "sources", "0")
    monkeypatch.setattr(gpu_out, "WORK", tmp_path / "work")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "there"))
    return kit


def test_a_run_says_what_became_of_the_kit(
    brought: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(gpu, "run_stages", lambda *_, **__: True)
    out = tmp_path / "out"
    assert gpu.main(["--device=cpu", "--quick", f"--out={out}", f"--kit={brought}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("commit: 0123456789ab, another than this checkout's: ")
    assert f"; {TRITON}: 3 of 3 files unpacked; {NATIVE}: not used: " in said.splitlines()[0]
    assert (out / "run.log").read_text("utf-8") == said
    assert said.splitlines()[2].startswith("a dry run of tiny stand-ins")
    assert said.splitlines()[3].startswith("headline, ")
    assert (tmp_path / "there" / "KEY" / "k.cubin").exists()


@pytest.mark.parametrize("missing", [True, False])
def test_tools_are_found_where_there_are_none(
    missing: bool, brought: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(gpu, "find_spec", lambda name: None if missing else object())
    monkeypatch.setattr(gpu_tests, "missing", lambda: None)
    assert gpu._unpack(brought)[TOOLS] == "1 of 1 files unpacked"
    command = [sys.executable, "-c", "import a_test_tool; print(a_test_tool.VALUE)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ("3" if missing else "")
    assert (sys.path[-1] == str(tmp_path / "work" / "tools")) is missing


# --- preparing ------------------------------------------------------------------------------------


def test_the_command_to_run_there_is_printed(kit: Path) -> None:
    text = prepare.instructions(load(kit), kit)
    size = sum((kit / name).stat().st_size for name in (TRITON, NATIVE, TOOLS)) / 2**20
    assert f"    {kit}    ({size:.1f} MiB)\n" in text
    command = f"    PWM_FAST_COMMIT=0123456789ab python3 -m bench.gpu --kit {kit}\n"
    assert command in text and "with Python 3.12.1 and Triton 3.6.0" in text
    for line in re.findall("python3 -m bench.gpu (.*)", text):  # the command knows its options
        options = gpu.parser().parse_args(line.split())
        assert options.kit == kit
    inside = prepare.instructions(load(kit), gpu_kit.KIT)
    assert "--kit build/gpu-kit\n" in inside


def test_a_kit_of_uncommitted_changes_says_so(kit: Path) -> None:
    note = "NOTE: files differ from commit 0123456789ab"
    assert note in prepare.instructions({**load(kit), "dirty": True}, kit)
    assert note not in prepare.instructions({**load(kit), "dirty": False}, kit)


def test_what_cannot_be_made_is_said_before_anything_is_compiled(
    kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "compile_all", lambda *_: pytest.fail("it compiles"))
    monkeypatch.setattr(prepare, "why_not", lambda: None)
    assert prepare.main(["--kit", str(kit / MANIFEST)]) == 2
    assert capsys.readouterr().err.startswith("error: [Errno 17] File exists: ")
    monkeypatch.setattr(prepare, "why_not", lambda: "there is no Triton")
    assert prepare.main([]) == 2
    assert capsys.readouterr().err == "error: there is no Triton\n"


def test_a_kit_stays_when_the_next_is_interrupted(
    kit: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it goes on")

    before = load(kit)
    monkeypatch.setattr(prepare, "why_not", lambda: None)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(prepare, "compile_all", interrupted)
    assert prepare.main(["--kit", str(kit)]) == 130
    assert capsys.readouterr().err == "stopped: nothing new was packed\n"
    assert load(kit) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_headline_is_prepared_first_and_in_every_precision() -> None:
    found = prepare.work()
    assert [w.stage for w in found[:4]] == ["headline"] * 4
    assert {w.name.split()[-1] for w in found[:4]} == set(OURS)
    assert len({w.name for w in found}) == len(found)
    assert list(dict.fromkeys(w.stage for w in found)) == list(prepare.STAGES)


@pytest.mark.filterwarnings("ignore:.*midpoint:UserWarning")
def test_what_an_epoch_compares_first_is_prepared_too() -> None:
    """Its gradients are kept, and its windows are no views of a replay's rows."""
    from bench.fake_cuda import FakeCuda
    from pwm_fast.agent.optim import GuardedAdam

    kept = set[bool]()
    step = GuardedAdam.apply

    def apply(optimizer: Any, *args: Any) -> Any:
        kept.add(optimizer.keep_gradients)
        return step(optimizer, *args)

    cuda = FakeCuda()
    (work,) = (w for w in prepare.work() if w.name == "compared fast_fp16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GuardedAdam, "apply", apply)
        work.run(cuda)
    wanted = {f"triton {name}_kernel" for name in ("adam", "to_operand", "scaled_rows")}
    assert work.stage == "epoch" and kept == {True} and wanted <= set(cuda.launches)


def test_what_is_compiled_is_found_where_it_is_unpacked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through Triton's own look-up: the cache lies in another folder, and the first is gone."""
    if (reason := fake_driver.why_not()) is not None:
        pytest.skip(reason)
    (name,) = (w.name for w in prepare.work() if w.stage == "micro")
    built, there = tmp_path / "built", tmp_path / "there"
    wrong = prepare.compile_all([name, "rollout of nothing"], built, 1)
    assert wrong == ["rollout of nothing: KeyError: 'rollout of nothing'"]
    assert f"/2 {name}: 5 compiled\n" in capsys.readouterr().out
    pack(tmp_path / "kit", built, [], tmp_path / "none", FACTS)
    shutil.rmtree(built)
    unpack(tmp_path / "kit", there, tmp_path / "package", tmp_path / "site")
    assert prepare.compile_all([name], there, 1) == []
    assert f"{name}: 0 compiled\n" in capsys.readouterr().out


def test_what_a_measuring_process_compiles_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench.micro import kernels
    from tests.compile import aot

    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    monkeypatch.setattr(triton.runtime.build, "_build", lambda: None)
    counts = worker.Compilations()
    signature = {"out": "*i64", "cycles": "i64"}
    case = aot.Case("clock", kernels.clock, signature, num_warps=1)
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        aot.compile_case(case, 90)
        aot.compile_case(case, 90)
    assert counts.news() == ("compiled", 1, ["clock"])
    triton.runtime.build._build()
    assert counts.news() == ("compiled", 0, ["launcher"])
    assert counts.news() == ("compiled", 0, [])


# --- the extension --------------------------------------------------------------------------------


class Builds:
    """The commands of a build, by their outcome."""

    def __init__(self, *outcomes: tuple[int, str]) -> None:
        self.outcomes, self.ran = list(outcomes), list[str]()

    def __call__(self, command: list[str], left: Deadline, **_: Any) -> gpu_checks.Done:
        self.ran.append("build" if "build_ext" in command else "probe")
        status, text = self.outcomes.pop(0)
        return gpu_checks.Done(status, text, 0.0)


LOADS, MISSING = (0, "avx2 cuda_esnr"), (1, "ImportError: no _C")


@pytest.mark.parametrize(
    ("nvcc", "stale", "outcomes", "ran", "outcome"),
    [
        (True, False, [LOADS], "probe", ("ok", "loads: CPU kernels for avx2; of CUDA: cuda_esnr")),
        (True, True, [LOADS, (0, ""), LOADS], "probe build probe", ("ok", "built: CPU kernels")),
        (True, False, [MISSING, (0, ""), LOADS], "probe build probe", ("ok", "built: CPU")),
        (True, False, [MISSING, (1, "error: x")], "probe build", ("failed", "error: x")),
        (False, False, [MISSING], "probe", ("ok", "not built: there is no nvcc and no x; Import")),
    ],
)
def test_the_extension_is_built_where_it_does_not_load(
    nvcc: bool,
    stale: bool,
    outcomes: list[tuple[int, str]],
    ran: str,
    outcome: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from bench.stages import Record
    from tests.bench.synthetic import FACTS as RUN

    builds = Builds(*outcomes)
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(gpu_checks, "WORK", tmp_path / "gpu")
    monkeypatch.setattr(gpu_checks, "run_command", builds)
    monkeypatch.setattr(gpu_checks, "_stale", lambda: stale)
    monkeypatch.setattr(gpu_checks, "BUILD_TOOLS", ("os" if nvcc else "x",))
    monkeypatch.setattr(gpu_checks, "find_program", lambda name: "nvcc" if nvcc else None)
    found = gpu_checks.build(Deadline(9.0), Record(tmp_path / "x.json", RUN))
    assert found.status == outcome[0] and found.detail.startswith(outcome[1])
    assert " ".join(builds.ran) == ran


def test_processes_that_did_not_find_the_extension_end(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[bool] = []
    process: Any = type("W", (), {"stop": lambda self: stopped.append(True)})()
    for detail in ("loads: x", "built: x"):
        monkeypatch.setattr(gpu_checks, "build", lambda *_, d=detail, **__: Outcome("ok", d))
        gpu.build(Deadline(1.0), None, process, False)  # type: ignore[arg-type]
    assert stopped == [True]
