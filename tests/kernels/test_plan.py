"""Plans fit what they are made for, and tuned entries come before the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pwm_fast.kernels import tuning
from pwm_fast.kernels.plan import candidates, key, plan

SMS, SHARED = 132, 227 * 1024


@pytest.mark.parametrize("n", [17, 256, 512, 768, 1792, 4096])
@pytest.mark.parametrize("rows", [1, 64, 519, 16384])
@pytest.mark.parametrize("element", [2, 4])
def test_plans_fit_the_device(rows: int, n: int, element: int) -> None:
    found = candidates(rows, n, SMS, element=element, shared=SHARED)
    assert found
    for p in found:
        assert p.block_n * (p.tiles_n - 1) < n <= p.block_n * p.tiles_n
        assert p.stages * (p.block_m + p.block_n) * p.block_k * element <= SHARED
        assert not p.synced or p.programs <= SMS
        assert p.synced or p.groups * p.block_m >= rows


def test_the_model_prefers_more_programs_for_few_rows() -> None:
    few, many = plan(64, 512, 512, SMS), plan(16384, 512, 512, SMS)
    assert few is not None and many is not None
    assert few.block_m * few.block_n < many.block_m * many.block_n
    assert few.synced


def test_what_has_too_many_tiles_is_not_fused() -> None:
    assert plan(64, 64 * 1024, 512, SMS) is None
    assert plan(64, 4096, 512, 4) is None


@pytest.mark.parametrize("size", [0, -3])
def test_sizes_must_be_positive(size: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        plan(8, size, 8, SMS)


def test_tuned_entries_come_first() -> None:
    name = key(500, 512, 512, "16")
    assert name == "16 R512 N512 K512"
    made = plan(500, 512, 512, SMS, tuned={name: {"block_m": 64, "block_n": 128, "stages": 2}})
    assert made is not None
    assert (made.block_m, made.block_n, made.stages, made.tiles_n) == (64, 128, 2, 4)
    assert plan(500, 512, 512, SMS, tuned={name: {"block_m": 0}}) is None


@pytest.mark.parametrize(
    "entry",
    [{"block_n": 64}, {"block_m": 64, "block_n": 2}, {"block_m": 16, "block_n": 64, "x": 1}],
)
def test_tuned_entries_that_do_not_fit(entry: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="tuned entry '16 R512 N512 K512'"):
        plan(500, 512, 512, SMS, tuned={key(500, 512, 512, "16"): entry})


def test_tuned_files_are_written_and_read(tmp_path: Path) -> None:
    entries = {"linear_norm_act_fwd": {"16 R64 N512 K512": {"block_m": 16, "block_n": 64}}}
    assert tuning.load("NVIDIA H200", tmp_path) == {}
    path = tuning.save("NVIDIA H200", entries, tmp_path)
    assert path.name == "nvidia-h200.json"
    assert tuning.load("NVIDIA H200", tmp_path) == entries


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", '"kernels"'),
        ('{"kernels": {"a": 1}}', "a must be an object, got 1"),
        ('{"kernels": {"a": {"b": []}}}', "a: b must be an object"),
        ('{"kernels": {"a": {"b": {"warps": "4"}}}}', "warps must be an integer"),
        ('{"kernels": {"a": {"b": {"warps": true}}}}', "warps must be an integer"),
    ],
)
def test_malformed_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tuning.load("gpu", tmp_path)


def test_shipped_files_are_well_formed() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        gpu = json.loads(path.read_text())["gpu"]
        assert tuning.file_of(gpu) == path
        assert tuning.load(gpu)
