"""The benchmarks as a user runs them, on the cheapest of their cases."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import conftest, report, results
from bench.environment import ROOT

CASE = "two_hot_encode"


def run(tmp_path: Path, *args: str, **variables: str) -> tuple[subprocess.CompletedProcess, Any]:
    """Run the case; what pytest said, and the result as it was stored."""
    path = tmp_path / "speed_new.json"
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", CASE]
    command += ["--bench-seconds=0.05", "--bench-threads=1", f"--benchmark-json={path}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        # Of pytest-xdist's processes this would pass for one, which measures nothing.
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | variables,
    )
    return done, json.loads(path.read_text("utf-8")) if path.exists() else None


def test_a_run_is_stored_without_names_of_host_or_user(tmp_path: Path) -> None:
    done, data = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = json.dumps(data)
    for name in (platform.node(), str(Path.home()), str(ROOT), f"/{getpass.getuser()}"):
        assert name not in text or len(name) < 4
    assert data["machine"]["threads"] == 1
    assert set(data["commit"]) == {"id", "dirty"}
    assert {"python", "torch", "triton", "cuda"} <= set(data["software"])

    result = results.load(tmp_path / "speed_new.json")
    group = result.groups[f"{CASE}-5M-b4096-forward"]
    assert next(iter(group.rows)) == "published"
    assert all(len(row.seconds) >= 2 for row in group.rows.values() if row.status == "ok")
    assert "ops.two_hot_encode" in report.report(result)


SABOTAGE = """
from pwm_fast import ops
right = ops.two_hot_encode
ops.two_hot_encode = lambda *args: 1.001 * right(*args)
"""


def test_a_wrong_result_gives_a_failed_row_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sabotage.py").write_text(SABOTAGE, "utf-8")
    done, data = run(tmp_path, "-p", "sabotage", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    rows = {row["provider"]: row for row in data["cases"][0]["rows"]}
    assert rows["published"]["status"] == "ok"
    assert rows["reference"]["status"] == "failed"
    assert "output: error" in rows["reference"]["reason"]
    assert "seconds" not in rows["reference"]


def test_wrong_options_are_named(tmp_path: Path) -> None:
    done, _ = run(tmp_path, "--bench-threads=0")
    assert done.returncode == 4
    assert "at least 1" in done.stderr


@pytest.mark.parametrize(
    ("device", "says"), [("tpu0", "--bench-device: "), ("meta", "must be cpu or cuda, got meta")]
)
def test_wrong_devices_are_named(device: str, says: str) -> None:
    """By the same error, of which pytest makes that exit status."""
    config: Any = SimpleNamespace(option=SimpleNamespace(bench_device=device))
    with pytest.raises(pytest.UsageError, match=says):
        conftest.pytest_configure(config)
