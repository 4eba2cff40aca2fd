"""The directory of a run: who may write it, and what it holds already."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pwm_fast import config as configuration
from pwm_fast.config import ConfigError, TrainConfig


class RunDirectory:
    """Creates a run's directory and locks it for this process, as a context.

    Layout: ``config.yaml``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``, ``plots/``.

    Args:
        path: the directory; made with its parents on entry.

    Raises:
        ConfigError: (on entry) it cannot be made, or another process trains in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    def __enter__(self) -> RunDirectory:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(f"run_dir={self.path} cannot be used: {error.strerror}") from error
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; there two runs in one directory go unnoticed
            pass
        except OSError as error:
            self._lock.close()
            raise ConfigError(
                f"another process is training in run_dir={self.path}; stop it or choose another "
                "run_dir"
            ) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def checkpoint_to_resume(self, resume: str | None) -> Path | None:
        """The checkpoint to continue from, or None to start anew.

        Args:
            resume: ``"auto"``, a path, or None.

        Raises:
            ConfigError: ``resume`` is None and the directory holds a run already.
        """
        latest = self.path / "checkpoints" / "latest.pt"
        if resume == "auto":
            return latest if latest.exists() else None
        if resume is not None:
            return Path(resume)
        if latest.exists() or (self.path / "metrics.jsonl").exists():
            raise ConfigError(
                f"run_dir={self.path} holds a run already: resume=auto continues it, another "
                "run_dir starts a new one"
            )
        return None

    def finished_summary(self, config: TrainConfig) -> dict[str, Any] | None:
        """``summary.json`` of this very run, if it is finished and no further epochs are asked for."""
        try:
            summary = json.loads((self.path / "summary.json").read_text("utf-8"))
        except (OSError, ValueError):
            return None
        done = summary.get("status") == "finished" and summary.get("epochs") == config.epochs
        return summary if done else None

    def write_config(self, config: TrainConfig) -> None:
        """Write the resolved configuration to ``config.yaml``."""
        from omegaconf import OmegaConf

        path = self.path / "config.yaml"
        temporary = path.with_name(".config.yaml.tmp")
        temporary.write_text(OmegaConf.to_yaml(configuration.to_dict(config)), "utf-8")
        os.replace(temporary, path)
