"""What a run was made with: ``provenance.json``, to which every process that works on it adds."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pwm_fast
from pwm_fast import config as configuration
from pwm_fast import files
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import build, installation

FORMAT = "pwm_fast.provenance"
VERSION = 1
# Keys (with all below them) that say how a run is carried out, not what is learnt.
HOW_IT_RUNS = (
    "device",
    "precision",
    "graphs",
    "parallel",
    "threads",
    "deterministic",
    "record_host",
    "run_dir",
    "resume",
    "data.manifest",
    "checkpoint",
    "eval",
    "wandb",
    "tensorboard",
    "env.threads",
)
# What runs may differ in and still be repetitions of one experiment.
NOT_OF_THE_EXPERIMENT = ("seed", *HOW_IT_RUNS)
VARIABLES = (
    *installation.VARIABLES,
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
)
PACKAGE = Path(pwm_fast.__file__).resolve().parent
GIT_SECONDS = 20.0

Record = dict[str, Any]


# --- the configuration's hash ---------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII alone: one text for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def config_sha256(config: Mapping[str, Any]) -> str:
    """SHA-256 of a resolved configuration (as :func:`pwm_fast.config.to_dict` gives it)."""
    return hashlib.sha256(canonical_json(config).encode("ascii")).hexdigest()


def experiment_sha256(config: Mapping[str, Any]) -> str:
    """The same without :data:`NOT_OF_THE_EXPERIMENT`: equal for repetitions with other seeds."""
    kept = {k: v for k, v in flat(config).items() if not within(k, NOT_OF_THE_EXPERIMENT)}
    return config_sha256(kept)


def within(key: str, names: Iterable[str]) -> bool:
    """A dotted key is one of ``names`` or lies below one."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, under keys with dots; tuples become lists."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result


# --- what is recorded -----------------------------------------------------------------------------


def describe(config: TrainConfig, device: torch.device) -> Record:
    """What this process works with, as plain JSON.

    No host, user or home directory is in it, unless the command line names one or
    ``config.record_host`` asks for the host's: a run's directory is copied and published, where
    such names say nothing of the result but something of people and their networks.
    """
    values = configuration.to_dict(config)
    engine = build.physics(config, device)
    record: Record = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command_line(),
        "overrides": _overrides(),
        "seed": config.seed,
        "config_sha256": config_sha256(values),
        "experiment_sha256": experiment_sha256(values),
        "git": git_state(),
        "versions": versions(),
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "physics": None if engine is None else engine.name,
        "physics_threads": config.env.threads,
        "device": str(device),
        "deterministic": config.deterministic,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }
    if config.record_host:
        record["host"] = platform.node()
    return record


def command_line() -> str:
    """The command that started this process, as a shell reads it; without its program's folder."""
    words = sys.orig_argv
    if len(words) > 1 and Path(words[1]).name == "pwm-fast":
        words = words[1:]  # a script, before which the system puts Python
    return shlex.join([Path(word).name for word in words[:1]] + words[1:])


def _overrides() -> str | None:
    """Hydra's overrides of this job, which in a sweep are not those of the command line."""
    hydra_config = sys.modules.get("hydra.core.hydra_config")
    if hydra_config is None or not hydra_config.HydraConfig.initialized():
        return None
    return shlex.join(map(str, hydra_config.HydraConfig.get().overrides.task))


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it uses."""
    rows = {"pwm_fast": pwm_fast.__version__, "python": platform.python_version()}
    rows.update({name: installation.package_version(name) for name in installation.PACKAGES})
    rows["torch"] = str(torch.__version__)  # with its build, which its metadata on PyPI lack
    rows["cuda"] = str(torch.version.cuda or torch.version.hip or "none")
    rows["native_extension"] = installation.native_isa() or "none"
    return rows


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware that the run sees."""
    gpu: dict[str, Any] | None = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return {
        "cpu": installation.cpu_name(),
        "cores": installation.usable_cpus(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def git_state(package: Path = PACKAGE) -> dict[str, Any]:
    """The commit of the checkout that the package's code comes from.

    Returns:
        ``commit``, ``dirty`` (tracked files differ from it, or there are new files that are not
        ignored), ``changed`` (names of the former, at most 50), ``untracked`` (number of the
        latter) and ``diff_sha256`` (of ``git diff HEAD``; None where it is empty). Where the code
        is in no checkout or git cannot say: ``commit`` None (or the one that pip installed from)
        and ``reason``.
    """
    try:
        # A virtual environment may lie in another project's checkout, whose commit is not ours.
        tracked = _git(package, "ls-files", "--error-unmatch", "--", "__init__.py")
        if tracked.returncode != 0:
            return _without_git(_git_reason(tracked))
        status = _git(package, "status", "--porcelain=v1", "--no-renames", "-z")
        head = _git(package, "rev-parse", "--verify", "HEAD")
        diff = _git(package, "diff", "--no-ext-diff", "--binary", "HEAD")
    except FileNotFoundError:
        return _without_git("git is not installed")
    except (OSError, subprocess.SubprocessError) as error:
        return _without_git(f"git failed: {error}")
    for done in (status, head, diff):
        if done.returncode != 0:
            return _without_git(_git_reason(done))
    items = [item for item in status.stdout.decode("utf-8", "replace").split("\0") if item]
    changed = [item[3:] for item in items if not item.startswith("??")]
    return {
        "commit": head.stdout.decode("ascii").strip(),
        "dirty": bool(items),
        "changed": changed[:50],
        "untracked": len(items) - len(changed),
        "diff_sha256": hashlib.sha256(diff.stdout).hexdigest() if diff.stdout else None,
    }


def _git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    # Of a hook, say, GIT_DIR would point to another repository; no locks: others may be committing.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment.update(GIT_OPTIONAL_LOCKS="0", LC_ALL="C")
    return subprocess.run(
        ["git", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=GIT_SECONDS,
        check=False,
    )


def _git_reason(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    said = lines[0] if lines else f"git ended with status {done.returncode}"
    if "not a git repository" in said or "did not match any file" in said:
        return "the code is in no git checkout"
    return f"git failed: {said}"


def _without_git(reason: str) -> dict[str, Any]:
    try:
        source = json.loads(metadata.distribution("pwm-fast").read_text("direct_url.json") or "{}")
        commit = source.get("vcs_info", {}).get("commit_id")
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        commit = None
    if commit is not None:
        return {"commit": commit, "dirty": None, "reason": f"{reason}; pip installed this commit"}
    return {"commit": None, "dirty": None, "reason": reason}


# --- the file -------------------------------------------------------------------------------------


def read(path: Path) -> list[Record]:
    """The records of a run in order; a missing file has none.

    Raises:
        ConfigError: the file is no such record.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise files.naming(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged: {error}; move it away to go on without it"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigError(f"{path} is no record of a run; move it away to go on without it")
    if content.get("version") != VERSION:
        raise ConfigError(
            f"{path} has version {content.get('version')}, this program reads {VERSION}"
        )
    history: list[Record] | None = content.get("history")
    if not isinstance(history, list) or not all(isinstance(record, dict) for record in history):
        raise ConfigError(
            f"{path} is damaged: history is no list of records; move it away to go on without it"
        )
    return history


def append(path: Path, record: Record) -> None:
    """Add a record behind those that ``path`` has, in one step.

    Raises:
        ConfigError: ``path`` is there and no such record.
        OSError: it cannot be written; it names the file.
    """
    content = {"format": FORMAT, "version": VERSION, "history": [*read(path), record]}
    files.write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Keys whose values differ between two configurations, with both."""
    old, new = flat(before), flat(now)
    return {
        key: {"was": old.get(key), "is": new.get(key)}
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    }
