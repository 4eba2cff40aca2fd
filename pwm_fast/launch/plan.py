"""From the overrides of a sweep to its runs, all of them checked before any of them starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pwm_fast import config as configuration
from pwm_fast import files, parallel
from pwm_fast.config import ConfigError
from pwm_fast.launch.sweep import Run, log_path
from pwm_fast.run.inherit import inherited
from pwm_fast.run.provenance import within

# Of Hydra's own overrides, those that are about the sweep and mean nothing to one of its runs.
OF_THE_SWEEP = ("launch", "hydra.mode", "hydra.launcher", "hydra.sweep", "hydra.sweeper")


def plan(
    config_loader: Any, config: Any, overrides: Sequence[Sequence[str]], first: int
) -> tuple[list[Run], bool]:
    """The runs of a sweep.

    Args:
        config_loader: Hydra's.
        config: of the sweep, with its ``hydra`` node.
        overrides: of each run.
        first: index of the first run.

    Returns:
        The runs, and whether any of them may use a GPU.

    Raises:
        ConfigError: a run's configuration cannot be used, or two runs would write to one directory.
    """
    if parallel.started_together():
        raise ConfigError(
            "a sweep (-m) starts the processes of its runs itself, with parallel=data: leave "
            "torchrun away"
        )
    directory = Path(str(config.hydra.sweep.dir))
    labels = _labels(overrides)
    common = [*_sources(config), *_kept(config.hydra.overrides.hydra)]
    runs: list[Run] = []
    owners: dict[str, str] = {}
    on_gpu = False
    for index, (own, label) in enumerate(zip(overrides, labels, strict=True), start=first):
        try:
            composed = configuration.from_hydra(_composed(config_loader, config, own))
            run = inherited(composed, own)
            if run.device.startswith("cuda:") and len(overrides) > 1:
                raise ConfigError(
                    f"device={run.device} cannot be shared by the runs of a sweep, each of which "
                    "sees the one GPU that it was given: use device=cuda or device=auto"
                )
        except ConfigError as error:
            raise ConfigError(f"run {index} ({label}): {error}; nothing was started") from error
        on_gpu = on_gpu or run.device != "cpu"
        path = os.path.realpath(files.user_path(run.run_dir))
        if path in owners:
            raise ConfigError(
                f"the runs {owners[path]} and {label} have the same run_dir={run.run_dir}; name in "
                "it what differs, as in run_dir='runs/h${alg.horizon}/seed_${seed}'"
            )
        owners[path] = label
        log = log_path(directory, index, label)
        several = run.parallel == "data"
        runs.append(Run(index, label, [*common, *_kept(own)], run.run_dir, log, several))
    if len({run.parallel for run in runs}) > 1:
        raise ConfigError("parallel must be the same in all runs of a sweep; nothing was started")
    return runs, on_gpu


def _composed(config_loader: Any, config: Any, overrides: Sequence[str]) -> Any:
    from omegaconf import open_dict

    composed = config_loader.load_sweep_config(config, list(overrides))
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _labels(overrides: Sequence[Sequence[str]]) -> list[str]:
    """Of each run the overrides that not all runs share; of a single one, its seed."""
    shared = set(overrides[0]).intersection(*overrides[1:])
    if len(overrides) == 1:
        shared -= {text for text in shared if text.startswith("seed=")}
    labels = []
    for own in overrides:
        differing = [text for text in _kept(own) if text not in shared]
        labels.append(" ".join(text.lstrip("+") for text in differing) or "as configured")
    return labels


def _kept(overrides: Sequence[str]) -> list[str]:
    """Those that are about a run."""

    def key(text: str) -> str:
        return text.split("=")[0].lstrip("+~").replace("/", ".")

    return [text for text in overrides if not within(key(text), OF_THE_SWEEP)]


def _sources(config: Any) -> list[str]:
    """The flags that name another configuration or a directory of the user's own."""
    flags = []
    if config.hydra.job.config_name != "config":
        flags.append(f"--config-name={config.hydra.job.config_name}")
    for source in config.hydra.runtime.config_sources:
        if source.provider == "command-line":
            flags.append(f"--config-dir={source.path}")
    return flags
