"""The directory of a run: who may write it, what it holds already, and what may continue it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pwm_fast import config as configuration
from pwm_fast import files
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.run import checkpoint, checkpoint_content, metrics, provenance
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.provenance import HOW_IT_RUNS, flat, within

# What may differ between a run and the process that continues it.
FREE_KEYS = ("epochs", *HOW_IT_RUNS)
# Options that say which environment an adapter makes; others set it up.
VARIANT = "env.options.variant"
WHICH_ENVIRONMENT = (
    "env.name",
    "env.options.id",
    "env.options.domain",
    "env.options.task",
    "env.options.tasks",
    "env.options.numbers",
    "env.options.factory",
    VARIANT,
)
UNSAVED = (
    "This run has written no checkpoints/latest.pt yet: if it is killed now, the same command "
    "starts it anew.\n"
)


class Source(NamedTuple):
    """A checkpoint to continue from."""

    path: Path
    content: dict[str, Any]


class RunDirectory:
    """Creates a run's directory and locks it for this process, as a context.

    Layout: ``config.yaml``, ``provenance.json``, ``metrics.jsonl``, ``summary.json``,
    ``checkpoints/``, ``plots/``, ``videos/`` where evaluations are filmed, and
    ``no_checkpoint_yet.txt`` from a run's start to its first ``latest`` checkpoint. Nothing in it
    that is the result of work is replaced by an earlier or another state unless the user names what
    to go on from; then it is kept under a second name.

    Args:
        path: the directory; made with its parents on entry, and removed on an error before
            :meth:`begin` if it was.

    Raises:
        ConfigError: (on entry) it cannot be made or written, or another process trains in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = files.user_path(path)
        self.checkpoints = path / "checkpoints"
        self.videos = path / "videos"
        self.metrics = path / "metrics.jsonl"
        self.config = path / "config.yaml"
        self.provenance = path / "provenance.json"
        self.summary = path / "summary.json"
        self.latest = self.checkpoints / "latest.pt"
        self._unsaved = path / "no_checkpoint_yet.txt"
        self._lock: TextIO | None = None
        self._made: list[Path] = []  # directories that were not there before
        self._begun = False

    def __enter__(self) -> RunDirectory:
        above = [self.checkpoints, *self.checkpoints.parents]
        self._made = [folder for folder in above if not folder.exists()]
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            self._leave()
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

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is not None and not self._begun:
            self._leave()
        elif self._lock is not None:
            self._lock.close()

    def _leave(self) -> None:
        """Unlock, and remove what was made for a run that was refused."""
        if self.path in self._made:
            with suppress(OSError):
                (self.path / ".lock").unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
        for folder in self._made:
            with suppress(OSError):  # one that is not empty stays
                folder.rmdir()

    # --- what is here -----------------------------------------------------------------------------

    def as_begun(self, config: TrainConfig) -> TrainConfig:
        """``config`` on the physics of the run that it continues, if that is older than variants.

        Such a run was begun on what is ``env.variant=dflex`` now, by a command that says nothing of
        a variant. The same command goes on there, however often it is continued.

        Raises:
            ConfigError: a record of the run is damaged.
        """
        if config.resume is None:
            return config
        path = self._newest() if config.resume == "auto" else files.user_path(config.resume)
        saved = self._written_config() if path is None else checkpoint.config_of(path)
        there = flat(saved)
        if there.get("env.name") != config.env.name or not (
            configuration.lacks_variant(saved)
            or (
                there.get(VARIANT) == configuration.OLDEST_VARIANT and self._began_without_variant()
            )
        ):
            return config
        options = {**config.env.options, "variant": configuration.OLDEST_VARIANT}
        return replace(config, env=replace(config.env, options=options))

    def _began_without_variant(self) -> bool:
        """Whether the run that is here went on from a checkpoint that is older than variants."""
        links = [record.get("continues") or {} for record in provenance.read(self.provenance)]
        changes = [link.get("config_changes", {}).get(VARIANT) for link in links]
        return any(change is not None and change["was"] is None for change in changes)

    def source(self, config: TrainConfig) -> Source | None:
        """The checkpoint that ``config.resume`` continues, or None to start anew.

        Raises:
            ConfigError: the directory holds a run that ``config`` cannot continue, or whose latest
                checkpoint is gone, or a file of it is damaged; or the checkpoint is past
                ``config.epochs`` or of another environment.
            CheckpointError: the checkpoint cannot be read.
        """
        self._refuse_damaged_records()
        path = self._to_continue(config)
        if path is None:
            return None
        content = checkpoint.load(path)
        checkpoint_content.check(path, content)
        if config.resume == "auto":
            refuse_other_config(content["config"], config, path)
            if content["replay"] is None and config.env.name != configuration.OFFLINE:
                raise CheckpointError(
                    f"{path} was not written as {path.name}: it has no replay, so another file was "
                    f"given its name. {self._way_on(self.results())}"
                )
        else:
            refuse_other_environment(content["config"], config, path)
        if content["epoch"] > config.epochs:
            raise ConfigError(
                f"epochs={config.epochs}, but {path} has {content['epoch']} epochs behind it: give "
                "more epochs, or another run_dir to start anew"
            )
        return Source(path, content)

    def finished(self, config: TrainConfig, source: Source | None) -> dict[str, Any] | None:
        """``summary.json`` if ``config`` asks for just the run that is here and finished."""
        if config.resume != "auto" or not self._says_finished(config):
            return None
        there = self.config.exists() if source is None else source.content["epoch"] == config.epochs
        return self._read_summary() if there else None

    def results(self) -> list[str]:
        """Names of files, relative to the directory, that hold what a run has come to."""
        found = [*sorted(self.checkpoints.glob("*.pt")), *sorted(self.path.glob("plots/*.png"))]
        found += [p for p in (self.metrics, self.summary) if p.exists() and p.stat().st_size > 0]
        return [path.relative_to(self.path).as_posix() for path in found]

    def _to_continue(self, config: TrainConfig) -> Path | None:
        if config.resume not in (None, "auto"):
            return self._named(str(config.resume))
        left = self.results()
        if config.resume is None and left:
            raise ConfigError(
                f"run_dir={self.path} holds a run already: resume=auto continues it, another "
                "run_dir starts a new one"
            )
        newest = self._newest()
        if newest is not None or not left:
            return newest
        unsaved = self._unsaved.exists() and not self.summary.exists()
        if self.config.exists() and (unsaved or self._says_finished(config)):
            # One killed before its first checkpoint starts anew, one that finished is left alone.
            refuse_other_config(self._written_config(), config, self.config)
            return None
        raise ConfigError(self._without_latest(left))

    def _without_latest(self, left: list[str]) -> str:
        """Why nothing is done in a directory that lost its latest checkpoint, and what to do."""
        shown = ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else "")
        return (
            f"run_dir={self.path} holds a run without its checkpoints/latest.pt ({shown}), which "
            f"would be overwritten: {self._way_on(left)}; another run_dir, or deleting this one, "
            "starts anew"
        )

    def _way_on(self, left: list[str]) -> str:
        """How to go on from what ``results`` are left."""
        saved = [self.path / name for name in left if name.endswith(".pt")]
        best = max(saved, key=lambda p: (_epoch(p), p.name == "final.pt"), default=None)
        if best is None or _epoch(best) < 0:
            return "no checkpoint is left to go on from"
        return (
            f"resume={best} goes on after its epoch {_epoch(best)}, with its replay or, if it has "
            "none, a new one"
        )

    def _says_finished(self, config: TrainConfig) -> bool:
        summary = self._read_summary()
        return summary.get("status") == "finished" and summary.get("epochs") == config.epochs

    def _read_summary(self) -> dict[str, Any]:
        """``summary.json``; empty where there is none.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            summary = json.loads(self.summary.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise ConfigError(_damaged(self.summary, f"it is no JSON ({error})")) from error
        if not isinstance(summary, dict):
            raise ConfigError(_damaged(self.summary, "it holds no summary of a run"))
        return summary

    def _written_config(self) -> dict[str, Any]:
        """``config.yaml``; empty where there is none.

        Raises:
            ConfigError: it is damaged.
        """
        if not self.config.exists():
            return {}
        try:
            values = configuration.read_yaml(self.config)
        except ConfigError as error:
            raise ConfigError(_damaged(self.config, str(error))) from error
        if not (isinstance(values, dict) and all(isinstance(key, str) for key in values)):
            raise ConfigError(_damaged(self.config, "it holds no configuration"))
        return values

    def _refuse_damaged_records(self) -> None:
        """What is damaged is said before anything is written over it."""
        provenance.read(self.provenance)
        self._read_summary()
        self._written_config()

    # --- what is written --------------------------------------------------------------------------

    def keep(self, config: TrainConfig, source: Source | None) -> list[str]:
        """Keep under a second name what would be lost when the run goes on from ``source``.

        That is ``metrics.jsonl`` where a line of it is damaged; and what is of later epochs where
        the run goes back to an earlier checkpoint than it had come to. What a killed run logged
        after its latest checkpoint is just computed again.

        Returns:
            What was done, for people.

        Raises:
            OSError: a file cannot be written; it names the file.
        """
        if source is None:
            return []
        epoch = source.content["epoch"]
        logged = metrics.scan(self.metrics)
        damaged = list(logged.damaged)
        lost = self._lost_rows(logged.rows, epoch)
        if lost and logged.torn is not None:
            damaged.append(logged.torn)  # by no kill: checkpoints come after their rows
        number = next(n for n in range(1, 1 << 30) if not self._kept(n))
        kept = self._ahead(config, source, logged.rows)
        back = bool(kept)
        if damaged and self.metrics not in kept:
            kept.append(self.metrics)
        said: list[str] = []
        names = {path: path.with_name(f"{path.stem}.kept_{number}{path.suffix}") for path in kept}
        for path, name in names.items():
            files.also_named(path, name)
        if damaged:
            said.append(
                f"{self.metrics} is damaged in line {_few(damaged)}, which is left out; as it was, "
                f"it is kept in {names[self.metrics].name}"
            )
        if lost:
            said.append(f"{self.metrics} has no sound row of epoch {_few(lost)}")
        if back:
            shown = ", ".join(self._shown(name) for name in names.values())
            said.append(f"what {self.path} held after epoch {epoch} is kept in {shown}")
        return said

    def _lost_rows(self, rows: Sequence[metrics.Row], epoch: int) -> list[int]:
        """Epochs up to ``epoch`` that were logged here and are not any more."""
        records = provenance.read(self.provenance)
        if not records:
            return []
        began = records[0].get("continues")
        first = began["epoch"] + 1 if isinstance(began, dict) else 1
        return sorted({*range(first, epoch + 1)} - {row["epoch"] for row in rows})

    def _ahead(
        self, config: TrainConfig, source: Source, rows: Sequence[metrics.Row]
    ) -> list[Path]:
        """What is of later epochs than ``source``; nothing after a kill, which leaves some."""
        epoch = source.content["epoch"]
        saved = [self.checkpoints / f"{name}.pt" for name in ("best", "final", "latest")]
        if _epoch(self.latest) < 0:  # there is none, or it is damaged
            saved.append(checkpoint.previous_of(self.latest))
        there = [p for p in saved if p.exists() and not p.samefile(source.path)]
        ahead = [p for p in there if not 0 <= _epoch(p) <= epoch]
        ends = self._read_summary().get("epochs")
        if isinstance(ends, int) and ends > epoch:
            ahead.append(self.summary)
        if rows and rows[-1]["epoch"] > epoch:
            ahead.append(self.metrics)
        went_further = {self.summary, self.checkpoints / "final.pt"} & {*ahead}
        own = config.resume == "auto" and source.path == self.latest
        before = checkpoint.previous_of(self.latest)
        swapped = own and _epoch(before) > epoch and not self._is_kept(before)
        if swapped:
            ahead.append(before)
        return [] if own and not went_further and not swapped else ahead

    def _is_kept(self, path: Path) -> bool:
        """Whether a file has a second name already."""
        return any(path.samefile(kept) for kept in path.parent.glob("*.kept_*"))

    def _kept(self, number: int) -> bool:
        pattern = f"*.kept_{number}.*"
        return any(self.path.glob(pattern)) or any(self.checkpoints.glob(pattern))

    def saved(self) -> None:
        """A ``latest`` checkpoint was written."""
        self._unsaved.unlink(missing_ok=True)

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
        self._begun = True
        if source is None:
            files.write_text(self._unsaved, UNSAVED)
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
        # Without hard links a process can die just after the old checkpoint got its second name.
        for path in (self.latest, checkpoint.previous_of(self.latest)):
            if path.exists():
                return path
        return None

    def _named(self, name: str) -> Path:
        path = files.user_path(name)
        if not path.is_file():
            raise ConfigError(f"resume={name}: there is no such file")
        if self.results() and path.resolve().parent != self.checkpoints.resolve():
            raise ConfigError(
                f"run_dir={self.path} holds a run already, and resume={name} is of another one: "
                "resume=auto continues the run that is here, another run_dir starts one from "
                "that checkpoint"
            )
        return path


def _epoch(path: Path) -> int:
    """Epochs behind a checkpoint; -1 where it cannot be read."""
    epoch = checkpoint.epoch_of(path)
    return -1 if epoch is None else epoch


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _damaged(path: Path, what: str) -> str:
    return f"{path} is damaged: {what}; move it away to go on without it"


def differences(saved: dict[str, Any], config: TrainConfig) -> dict[str, str]:
    """Keys in which ``config`` is not the ``saved`` one, each with both values as a text."""
    before, now = flat(_with_defaults(saved)), flat(configuration.to_dict(config))
    return {
        key: f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not within(key, FREE_KEYS)
    }


def refuse_other_config(saved: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise ConfigError, naming every key, if ``config`` is not the ``saved`` one of ``path``."""
    different = differences(saved, config)
    if different:
        raise ConfigError(
            f"{path} is of a run with another configuration: {'; '.join(different.values())}. Give "
            "this run another run_dir, or name a checkpoint (resume=PATH) to continue it with new "
            "settings"
        )


def refuse_other_environment(saved: dict[str, Any], config: TrainConfig, path: Path) -> None:
    """Raise CheckpointError, naming both, if ``path`` is of another environment than ``config``."""
    different = differences(saved, config)
    if any(key in different for key in WHICH_ENVIRONMENT):
        raise CheckpointError(
            f"{path} is of another environment: {which_environment(saved)}, this run has "
            f"{which_environment(configuration.to_dict(config))}. resume= goes on in the same one; "
            "init= starts a new run with the networks of a checkpoint, if they fit"
        )


def which_environment(values: dict[str, Any]) -> str:
    """The environment that a configuration names, as its keys and their values.

    A robot's variant is among them unless it is the default one.
    """
    there = flat(values)
    if there.get(VARIANT) == "default":
        del there[VARIANT]
    return " ".join(f"{key}={there[key]}" for key in WHICH_ENVIRONMENT if there.get(key))


def _with_defaults(saved: dict[str, Any]) -> dict[str, Any]:
    """A saved configuration with today's keys: one that a run is older than has its default."""
    try:
        return configuration.to_dict(configuration.from_saved(saved))
    except ConfigError:  # it has keys or values of another version: they differ as they stand
        return saved
