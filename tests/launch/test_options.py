"""The keys of configs/launch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pwm_fast.config import ConfigError
from pwm_fast.launch import options
from tests.models.builders import CONFIGS


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("24:00:00", 1440),
        ("0:00:01", 1),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("1-00:00:01", 1441),
    ],
)
def test_times_as_slurm_writes_them(time: str, minutes: int) -> None:
    assert options.minutes(time) == minutes


@pytest.mark.parametrize("time", ["", "soon", "1h", "1:2:3:4", "-5", "0", "0:00:00", "1.5"])
def test_wrong_times(time: str) -> None:
    with pytest.raises(ConfigError, match=r"launch\.time must be"):
        options.minutes(time)


LOCAL, SLURM = options.LocalOptions, options.SlurmOptions


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SLURM, {"gpus": 4}, "launch.gpus must be 1 or 0"),
        (SLURM, {"gpus": 0, "gpu_type": "a100"}, "launch.gpu_type=a100 needs launch.gpus=1"),
        (SLURM, {"cpus": 0}, "launch.cpus must be at least 1, got 0"),
        (SLURM, {"runs_per_job": 0}, "launch.runs_per_job must be at least 1"),
        (SLURM, {"mem_gb": 0}, "launch.mem_gb must be at least 1"),
        (SLURM, {"signal_s": -1}, "launch.signal_s must be at least 0"),
        (SLURM, {"time": "tomorrow"}, "launch.time must be like"),
        (SLURM, {"cpus": "many"}, "launch.cpus: Value 'many'"),
        (SLURM, {"queue": "gpu"}, "launch.queue"),
        (LOCAL, {"jobs": 0}, "launch.jobs must be at least 1"),
        (LOCAL, {"gpus": []}, "launch.gpus must be null"),
    ],
)
def test_wrong_options(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        options.read(kind, OmegaConf.create(values))
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("local", LOCAL), ("slurm", SLURM)])
def test_files_show_every_key_and_the_defaults(name: str, kind: Any) -> None:
    written = OmegaConf.load(Path(CONFIGS) / "launch" / f"{name}.yaml").launch
    assert dict(written) == dataclasses.asdict(kind())
    for field in dataclasses.fields(kind):
        assert f"    {field.name}: " in (kind.__doc__ or ""), "documented"
