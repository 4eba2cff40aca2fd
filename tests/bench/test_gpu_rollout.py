"""The first questions to a GPU: the rollout is right and repeatable, its layouts, the profiler."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_checks, gpu_out, gpu_report, gpu_rollout, micro, readings, tune_rollout
from bench.gpu_out import Output
from bench.measure import CpuClock
from bench.stages import Deadline
from pwm_fast.kernels.rollout import LAYOUTS
from tests.kernels.harness import gpu

CPU = torch.device("cpu")


def read(name: str, device: torch.device = CPU) -> dict[str, dict[str, Any]]:
    return {r["name"]: r for r in micro.read(name, device, dry=True)}


def test_a_rollout_is_right_and_repeatable() -> None:
    found = read("first rollout")
    errors = [
        found.pop(f"rollout, relative error of {name}")["value"] for name in ("z", "dz0", "dc")
    ]
    assert all(0.0 < error < 1e-5 for error in errors)
    assert found.pop("rollout, numbers that differ when repeated")["value"] == 0
    assert found["first rollout"]["reason"].startswith("absent: ")


def test_results_that_differ_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    run, calls = tune_rollout.RolloutWorkload._run, []

    def unsteady(self: Any, *args: Any) -> Any:
        calls.append(args)
        found = run(self, *args)
        found[2].view(-1)[0] += 1e-4 * len(calls)
        return found

    monkeypatch.setattr(tune_rollout.RolloutWorkload, "_run", unsteady)
    found = read("first rollout")["rollout, numbers that differ when repeated"]
    assert (found["value"], found["reason"]) == (1, "failed: 1 of them differ")


def test_a_rollout_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_rollout, "ERROR", 1e-9)
    with pytest.raises(tune_rollout.Wrong, match="of z exceeds 1e-09"):
        read("first rollout")


def test_the_profilers_table_is_kept() -> None:
    found = list(micro.read("actor update", CPU, dry=True))
    assert [r["name"] for r in found] == ["actor update, eager", "actor update, eager, operators"]
    assert found[1]["text"].startswith("actor update, eager\n") and "Self CPU" in found[1]["text"]


def test_readings_that_are_shown_are_those_that_are_read() -> None:
    assert set(gpu_report.SHOWN) == {*gpu_rollout.FIRST, *gpu_rollout.PROFILE}


def test_layouts_are_told_apart() -> None:
    titles = {gpu_rollout.title(plan) for plan in LAYOUTS}
    assert len(titles) == len(LAYOUTS) and all("warps" in title for title in titles)


@gpu
@pytest.mark.parametrize("name", [*gpu_rollout.FIRST, *gpu_rollout.PROFILE])
def test_every_reading_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = type(torch.zeros(1, device="cuda")) is not torch.Tensor
    if fake:  # all numbers are 1, and events have no time
        monkeypatch.setattr(tune_rollout, "ERROR", 2.0)
        monkeypatch.setattr(readings, "CudaClock", CpuClock)
    for found in read(name, torch.device("cuda", 0)).values():
        if found["value"] is None or ("reason" in found and not fake):
            pytest.fail(str(found))


@gpu
def test_layouts_of_one_tile_are_launched_for_a_profiler(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gpu_rollout.main()
    lines = capsys.readouterr().out.splitlines()
    if not lines or not all(line.startswith("launches ") and "warps" in line for line in lines):
        pytest.fail(str(lines))


# --- ncu ------------------------------------------------------------------------------------------

NCU = """#!/bin/sh
case "$*" in
*--export*)
    echo "$@"
    while [ "$1" != --export ]; do shift; done
    echo report > "$2"
    exit {status} ;;
*--import*) echo details ;;
esac
"""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    monkeypatch.setattr(gpu_checks, "WORK", tmp_path)
    (tmp_path / "out").mkdir()
    return Output(tmp_path / "out" / "gpu_x.json", tmp_path / "out")


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    program = folder / "ncu"
    program.write_text(text, "utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_ncu_reads_the_persistent_kernels(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, NCU.format(status=0))
    assert gpu_checks.ncu(Deadline(60.0), output, "cuda") == ("ok", "ncu: 0.0 MiB")
    assert output.path(gpu_out.NCU_REPORT).read_text() == "report\n"
    text = output.path(gpu_out.NCU).read_text()
    assert "--set full --kernel-name regex:rollout" in text and text.endswith("details\n")
    monkeypatch.setattr(gpu_out, "BYTES", 3)
    assert gpu_checks.ncu(Deadline(60.0), output, "cuda").detail.endswith("too large to keep")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (NCU.format(status=3), ("failed", "ncu: ")),
        ("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'; exit 1\n", ("ok", "ncu: it may not read")),
        ("#!/bin/sh\nsleep 60\n", ("partial", "ncu did not end within")),
    ],
)
def test_ncu_that_gives_nothing(
    text: str,
    outcome: tuple[str, str],
    tmp_path: Path,
    output: Output,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(tmp_path, monkeypatch, text)
    found = gpu_checks.ncu(Deadline(2.0), output, "cuda")
    assert found.status == outcome[0] and found.detail.startswith(outcome[1])


def test_a_machine_without_ncu_says_so(
    tmp_path: Path, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu_checks.ncu(Deadline(1.0), output, "cuda") == ("ok", "ncu: it is not installed")
    assert not list(output.folder.iterdir())
