"""What a result was measured on. No host name, user name or path."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pwm_fast
from pwm_fast.run.installation import cpu_name, native_isa, usable_cpus

ROOT = Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """Commit, date, machine and software of a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "software": software(),
    }


def made(facts: Mapping[str, Any]) -> str:
    """The day and the commit of :func:`describe`'s facts, in words."""
    commit = facts["commit"]
    state = " with uncommitted changes" if commit["dirty"] else ""
    return f"{facts['date'][:10]}, commit {commit['id'] or 'unknown'}{state}"


def check_gpu(device: torch.device) -> None:
    """See that there is this GPU.

    Raises:
        ValueError: there is not.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (device.index or 0) >= count:
        raise ValueError(f"--device={device}, but torch {torch.__version__} sees {count} GPUs here")


def commit() -> dict[str, Any]:
    """The commit, and whether tracked files differ from it.

    Outside of git, as in a copy on another machine, ``id`` is PWM_FAST_COMMIT's value or None.
    """

    def git(*args: str) -> str:
        done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"id": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"id": os.environ.get("PWM_FAST_COMMIT"), "dirty": None}


def machine(device: torch.device) -> dict[str, Any]:
    """Kind of machine: what must be equal for two runs to be comparable."""
    return {
        "device": device.type,
        "system": platform.system(),
        "arch": platform.machine(),
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "native_isa": native_isa(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def slug(device: torch.device) -> str:
    """The card's name for a file, as ``h100_80gb_hbm3``; ``cpu`` where it is none."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("nvidia", "")).strip("_")


def software() -> dict[str, Any]:
    """Versions."""
    found: dict[str, Any] = {
        "pwm_fast": pwm_fast.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in (
        "torch",
        "triton",
        "numpy",
        "mujoco",
        "mujoco-warp",
        "warp-lang",
        "jax",
        "diffrax",
    ):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    found["torch"] = str(torch.__version__)  # with its build, which its metadata on PyPI lack
    return found
