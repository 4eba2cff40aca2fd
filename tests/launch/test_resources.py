"""Shares of a machine."""

from __future__ import annotations

import pytest
import torch

from pwm_fast.launch import resources


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("value", "gpus"),
    [
        ("0,2", ["0", "2"]),
        ("", []),
        ("-1", []),
        ("GPU-8932f937, MIG-1", ["GPU-8932f937", "MIG-1"]),
    ],
)
def test_visible_gpus(value: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert resources.visible_gpus() == gpus


def test_all_gpus_where_none_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert resources.visible_gpus() == ["0", "1", "2"]


def test_each_slot_has_a_gpu_and_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "10")
    shares = resources.slots(4, ["0", "1", "2", "3"])
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "2", "3"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"2"}
    # Where pwm_fast.run.build.set_threads looks first.
    assert {share["SLURM_CPUS_PER_TASK"] for share in shares} == {"2"}
    assert resources.describe(shares[2]) == "GPU 2, 2 CPU threads"


def test_shared_gpus() -> None:
    shares = resources.slots(3, ["5", "7"])
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["5", "7", "5"]


def test_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cpus", lambda: 2)
    shares = resources.slots(3, [])
    assert shares == [{"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}] * 3
    assert resources.describe(shares[0]) == "no GPU, 1 CPU thread"


def test_threads_that_the_user_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "cpus", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert resources.slots(2, [])[0]["OMP_NUM_THREADS"] == "3"
    assert resources.slots(8, [])[0]["OMP_NUM_THREADS"] == "2"


def test_processes_of_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "9")
    shares = resources.ranks(resources.slots(4, ["3", "5", "6", "7"]))
    assert [(s["RANK"], s["LOCAL_RANK"]) for s in shares] == [(str(i), str(i)) for i in range(4)]
    for name, value in {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "CUDA_VISIBLE_DEVICES": "3,5,6,7",  # each takes the one of its LOCAL_RANK
        "OMP_NUM_THREADS": "2",
        "SLURM_CPUS_PER_TASK": "8",  # of which each takes a fourth
    }.items():
        assert {share[name] for share in shares} == {value}, name
    assert len({share["MASTER_PORT"] for share in shares}) == 1
    assert "CUDA_VISIBLE_DEVICES" not in resources.ranks(resources.slots(2, []))[0]
