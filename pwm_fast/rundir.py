"""The directory of a run: who may write it, what it holds already, and what may continue it."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

from pwm_fast import checkpoint, files, metrics, provenance
from pwm_fast import config as configuration
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.provenance import HOW_IT_RUNS, flat

# What may differ between a run and the process that continues it.
FREE_KEYS = ("epochs", *HOW_IT_RUNS)


class Source(NamedTuple):
    """A checkpoint to continue from."""

    path: Path
    content: dict[str, Any]


class RunDirectory:
    """Creates a run's directory and locks it for this process, as a context.

    Layout: ``config.yaml``, ``provenance.json``, ``metrics.jsonl``, ``summary.json``,
    ``checkpoints/``, ``plots/``.

    Args:
        path: the directory; made with its parents on entry.

    Raises:
        ConfigError: (on entry) it cannot be made or written, or another process trains in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.expanduser()
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.provenance = path / "provenance.json"
        self.summary = path / "summary.json"
        self._lock: TextIO | None = None

    def __enter__(self) -> RunDirectory:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise ConfigError(
                f"run_dir={self.path} cannot be used: {error.strerror}: {error.filename}"
            ) from error
        try:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows has no flock; there two runs in one directory go unnoticed
            pass
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(
                f"another process is training in run_dir={self.path}; stop it or choose another "
                "run_dir"
            ) from error
        except OSError:  # a file system without locks; there they go unnoticed, too
            pass
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()

    def source(self, config: TrainConfig) -> Source | None:
        """The checkpoint that ``config.resume`` continues, or None to start anew.

        Raises:
            ConfigError: the directory holds a run that ``config`` cannot continue, or the
                checkpoint is past ``config.epochs``.
            CheckpointError: the checkpoint cannot be read.
        """
        provenance.read(self.provenance)  # a damaged record is said before anything is written
        auto = config.resume == "auto"
        if config.resume is None or auto:
            path = self._newest()
            if config.resume is None and self._holds_run():
                raise ConfigError(
                    f"run_dir={self.path} holds a run already: resume=auto continues it, another "
                    "run_dir starts a new one"
                )
            if path is None:  # a run killed before its first checkpoint starts anew
                if metrics.read(self.metrics):
                    refuse_other_config(self._written_config(), config, self.config)
                return None
        else:
            path = self._named(config.resume)
        content = checkpoint.load(path)
        if auto:
            refuse_other_config(content["config"], config, path)
        if content["epoch"] > config.epochs:
            raise ConfigError(
                f"epochs={config.epochs}, but {path} has {content['epoch']} epochs behind it: give "
                "more epochs, or another run_dir to start anew"
            )
        return Source(path, content)

    def finished(self, config: TrainConfig, source: Source | None) -> dict[str, Any] | None:
        """``summary.json`` if ``config`` asks for just the run that is here and finished."""
        if source is None or config.resume != "auto":
            return None
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text("utf-8"))
        except (OSError, ValueError):
            return None
        done = summary.get("status") == "finished" and summary.get("epochs") == config.epochs
        return summary if done and source.content["epoch"] == config.epochs else None

    def begin(
        self, config: TrainConfig, record: dict[str, Any], source: Source | None = None
    ) -> None:
        """Record the configuration of the work that starts now; the last summary is outdated.

        Args:
            config: of the work.
            record: added to ``provenance.json``, with what the work continues.
            source: the checkpoint that it continues.

        Raises:
            ConfigError: ``provenance.json`` is damaged.
            OSError: a file cannot be written; it names the file.
        """
        from omegaconf import OmegaConf

        values = configuration.to_dict(config)
        record = {**record, "continues": None}
        if source is not None:
            before = source.content["config"]
            record["continues"] = {
                "checkpoint": self._shown(source.path),
                "epoch": source.content["epoch"],
                "config_sha256": provenance.config_sha256(before),
                "config_changes": provenance.changes(before, values),
            }
        provenance.append(self.provenance, record)
        files.write_text(self.config, OmegaConf.to_yaml(values))
        self.summary.unlink(missing_ok=True)

    def _shown(self, path: Path) -> str:
        """A path within the run directory relative to it, which may be moved."""
        try:
            return path.resolve().relative_to(self.path.resolve()).as_posix()
        except ValueError:
            return str(path)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        files.write_text(self.summary, json.dumps(metrics.finite(summary), indent=2) + "\n")

    def _newest(self) -> Path | None:
        latest = self.checkpoints / "latest.pt"
        # Without hard links a process can die just after the old checkpoint got its second name.
        for path in (latest, checkpoint.previous_of(latest)):
            if path.exists():
                return path
        return None

    def _named(self, name: str) -> Path:
        path = Path(name).expanduser()
        if not path.exists():
            raise ConfigError(f"resume={name}: there is no such file")
        if self._holds_run() and path.resolve().parent != self.checkpoints.resolve():
            raise ConfigError(
                f"run_dir={self.path} holds a run already, and resume={name} is of another one: "
                "resume=auto continues the run that is here, another run_dir starts one from "
                "that checkpoint"
            )
        return path

    def _holds_run(self) -> bool:
        return self._newest() is not None or bool(metrics.read(self.metrics))

    def _written_config(self) -> dict[str, Any]:
        from omegaconf import OmegaConf

        written = OmegaConf.to_container(OmegaConf.load(self.config))
        return {str(k): v for k, v in written.items()} if isinstance(written, dict) else {}


def refuse_other_config(saved: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError, naming every key, if ``config`` is not the ``saved`` one of ``path``."""
    before, now = flat(_with_defaults(saved)), flat(configuration.to_dict(config))
    different = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if different:
        raise ConfigError(
            f"{path} is of a run with another configuration: {'; '.join(different)}. Give this run "
            "another run_dir, or name a checkpoint (resume=PATH) to continue it with new settings"
        )


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with today's keys: one that a run is older than has its default."""
    try:
        return configuration.to_dict(configuration.from_dict(saved))
    except ConfigError:  # it has keys or values of another version: they differ as they stand
        return saved
