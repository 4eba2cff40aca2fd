"""Files of tuned entries: written in one step, and wrong ones are never passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pwm_fast.kernels import plan, tuning

KERNEL, KEY = "linear_norm_act_fwd", "16 R64 N512 K512"
ENTRY = {"block_m": 16, "block_n": 64}
LAYOUT = {"bm": 8, "bn": 64, "warps": 4, "chunks": 4}


def test_files_are_written_and_read(tmp_path: Path) -> None:
    entries: dict[str, Any] = {
        KERNEL: {KEY: ENTRY},
        "linear_act_norm_bwd": {"16 E3 R512 N200 K1": {"block_m": 0}},
    }
    rollouts = {"float16 B8 U64": LAYOUT, "float16 B9 U64": {**LAYOUT, "exchange": "words"}}
    entries["rollout"] = rollouts
    times = {KERNEL: {KEY: {"16x64": 3.0, "unfused": 4.5}}}
    assert tuning.load("NVIDIA H200", tmp_path) == {}
    path = tuning.save("NVIDIA H200", entries, tmp_path, made={"date": "today"}, times=times)
    assert path.name == "nvidia-h200.json" and list(tmp_path.iterdir()) == [path]
    assert tuning.load("NVIDIA H200", tmp_path) == entries
    assert json.loads(path.read_text())["times"] == times
    assert tuning.entries("NVIDIA H200", "linear_axpby", lambda key, entry: None, tmp_path) == {}


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"linear": {}}, "linear must be one of linear_norm_act_fwd"),
        ({KERNEL: 1}, "must be an object, got 1"),
        ({KERNEL: {"fp16 R64": ENTRY}}, "form '16 E3 R512 N200 K400'"),
        ({KERNEL: {"16 R0 N512 K512": ENTRY}}, "the key must be of the form"),
        ({"rollout": {KEY: ENTRY}}, "form 'float16 B128 U512'"),
        ({KERNEL: {KEY: []}}, "it must be an object"),
        ({KERNEL: {KEY: {"block_m": "4"}}}, "block_m must be an integer"),
        ({KERNEL: {KEY: {"block_m": True}}}, "block_m must be an integer"),
        ({KERNEL: {KEY: {"block_m": -16, "block_n": 64}}}, "at least 0, got -16"),
        ({KERNEL: {KEY: {"block_m": 16}}}, "must have block_m, block_n"),
        ({KERNEL: {KEY: {**ENTRY, "tile": 3}}}, "must have block_m, block_n"),
        ({KERNEL: {KEY: {"block_m": 0, "block_n": 64}}}, "block_m alone, which is 0"),
        ({KERNEL: {KEY: {"block_m": 16, "block_n": 0}}}, "each at least 1"),
        ({"rollout": {"float16 B8 U64": {"bm": 8}}}, "must have bm, bn, warps, chunks"),
        ({"rollout": {"float16 B8 U64": {**LAYOUT, "exchange": 1}}}, "one of flags, words, got 1"),
        ({"rollout": {"float16 B8 U64": {"bm": 0, "exchange": "words"}}}, "bm alone, which is 0"),
        ({KERNEL: {KEY: {**ENTRY, "exchange": "words"}}}, "exchange must be an integer"),
    ],
)
def test_malformed_entries(kernels: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"gpu": "gpu", "kernels": kernels}))
    with pytest.raises(ValueError, match=message) as error:
        tuning.load("gpu", tmp_path)
    assert str(error.value).startswith(str(path)) and tuning.REMEDY in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", '"kernels"'),
        ('{"gpu": "gpu"}', '"kernels"'),
        ('{"gpu": "GPU", "kernels": {}}', "must be of gpu 'gpu', it is of 'GPU'"),
    ],
)
def test_malformed_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        tuning.load("gpu", tmp_path)


def test_a_malformed_entry_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must have block_m"):
        tuning.save("gpu", {KERNEL: {KEY: {"block_n": 64}}}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_entry_that_does_not_fit_names_its_file(tmp_path: Path) -> None:
    path = tuning.save("gpu", {KERNEL: {KEY: ENTRY}}, tmp_path)

    def fits(key: str, entry: tuning.Options) -> None:
        raise ValueError("too large")

    with pytest.raises(ValueError, match="too large") as error:
        tuning.entries("gpu", KERNEL, fits, tmp_path)
    assert str(error.value).startswith(f"{path}: {KERNEL}: '{KEY}'")


def test_shipped_files_are_well_formed() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        gpu = json.loads(path.read_text())["gpu"]
        assert tuning.file_of(gpu) == path
        for kernel, entries in tuning.load(gpu).items():
            if kernel == "rollout":
                continue
            for key, entry in entries.items():
                plan.entry_plan(entry, plan.gemm_shape(kernel, key), plan.Limits(1 << 10))
