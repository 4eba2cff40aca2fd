"""Running a command on a configuration that Hydra composes, and telling a user what is wrong."""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from pwm_fast import launch, optional, parallel
from pwm_fast.config import ConfigError, check_choices, open_overrides
from pwm_fast.envs import CannotRender, EnvironmentFault
from pwm_fast.memory import OutOfMemory
from pwm_fast.parallel import Followed, RankLost
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.trainer import TrainingDiverged

# What a user can mend: shown as one line, without a traceback.
USER_ERRORS = (
    ConfigError,
    CheckpointError,
    EnvironmentFault,
    CannotRender,
    TrainingDiverged,
    OutOfMemory,
    RankLost,
    OSError,
)
NEEDS_TRAIN = "this command needs more packages: pip install 'pwm-fast[train]'"


def main(
    command: Callable[[Any], int], name: str, schema: Callable[[], Any], config_name: str
) -> NoReturn:
    """Compose ``configs/<config_name>.yaml`` with the command line, run ``command`` on it and exit.

    The status is that of ``command``; 2 with one line on stderr for what a user can mend; 130 after
    a KeyboardInterrupt. In a sweep a failed job does not stop the others, a signal does; the status
    is the first failure's.
    PWM_FAST_TRACEBACK=1 shows the traceback of everything.

    Args:
        command: takes Hydra's configuration, returns an exit status.
        name: of the command.
        schema: makes the typed keys that the YAML file calls ``<name>_schema`` in its defaults.
        config_name: of the primary configuration.
    """
    try:
        import hydra
        from hydra.core.config_store import ConfigStore
        from hydra.core.hydra_config import HydraConfig
        from hydra.types import RunMode
    except ImportError as error:
        _fail(optional.reason(error, "hydra", NEEDS_TRAIN))

    launch.register()
    # `launch` has a default, so that Hydra would refuse the + of a group without one.
    sys.argv[1:] = [re.sub(r"^\+launch=", "launch=", argument) for argument in sys.argv[1:]]
    if name in ("train", "pretrain", "export", "import_checkpoint"):
        sys.argv[1:] = open_overrides(sys.argv[1:])
    ConfigStore.instance().store(name=f"{name}_schema", node=schema())
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions on: they are reported here
    status, composed = 0, False

    @hydra.main(version_base="1.3", config_path="pkg://pwm_fast.configs", config_name=config_name)
    def job(cfg: Any) -> None:
        nonlocal status, composed
        composed = True
        try:
            status = command(cfg)
        except Exception as error:
            status = _reported(error)
        if status > 128:
            raise SystemExit(status)
        if status and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise launch.JobFailed(status)

    def jobs() -> int:
        check_choices(sys.argv[1:])
        try:
            job()
        except launch.JobFailed as error:
            return error.status
        except Exception as error:
            if composed or _mendable(error) or not _of_hydra(error):
                raise
            own = " ".join(arg for arg in sys.argv[1:] if arg.lstrip("+~").startswith("hydra"))
            said = " ".join([type(error).__name__, *str(error).split()])
            raise ConfigError(f"Hydra cannot use {own or 'this command line'}: {said}") from error
        return status

    raise SystemExit(exit_status(jobs))


class Arguments(argparse.ArgumentParser):
    """Arguments of a command that takes no configuration; what is wrong is said in one line."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and exit with status 2."""
        _fail(f"{message}; --help shows what there is")


def plain(command: Callable[[], int]) -> NoReturn:
    """Run a command that composes no configuration of its own, and exit with its status.

    The status is that of :func:`exit_status`.
    """
    try:
        import hydra  # noqa: F401
    except ImportError as error:
        _fail(optional.reason(error, "hydra", NEEDS_TRAIN))
    raise SystemExit(exit_status(command))


def exit_status(command: Callable[[], int]) -> int:
    """The status of ``command``; 2, with one line on stderr, for what a user can mend.

    130 after a KeyboardInterrupt. PWM_FAST_TRACEBACK=1 shows the traceback of everything.
    """
    try:
        return command()
    except KeyboardInterrupt:
        print("error: stopped at once by SIGINT", file=sys.stderr)
        return 130
    except Exception as error:
        return _reported(error)


def _reported(error: Exception) -> int:
    """Print what a user can mend, and return 2; raise anything else."""
    if isinstance(error, Followed) or (parallel.repeats() and _mendable(error)):
        return 2  # another process prints it
    text = None if os.environ.get("PWM_FAST_TRACEBACK") else _mendable(error)
    if text is None:
        raise error
    print(f"error: {text}", file=sys.stderr)
    return 2


def _mendable(error: Exception) -> str | None:
    """One line on what a user can mend; None for a bug."""
    try:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException
    except ImportError:  # then neither raised it
        pass
    else:
        if isinstance(error, (HydraException, OmegaConfBaseException)):  # may be an OSError, too
            return composition_message(error)
    return message(error) if isinstance(error, USER_ERRORS) else None


def message(error: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    return " ".join(str(error).split()) or type(error).__name__


def composition_message(error: BaseException) -> str:
    """What Hydra says of a configuration, in one line and without its internals."""
    override = getattr(error, "override", None)  # of an OverrideParseException
    if override:
        hint = "unusual characters need quotes, as in key='\"value\"'"
        return f"{override!r} cannot be read as key=value; {hint}"
    unknown = re.match(r"Could not (?:override|append) '(\S+)'", str(error))
    if unknown:
        return f"{unknown[1]}: there is no such key; --cfg job shows them all"
    if "hydra/launcher/submitit_slurm" in str(error):
        return "launch=slurm needs more packages: pip install 'pwm-fast[slurm]'"
    text = "\n".join(map(str, filter(None, (error, error.__cause__)))).split("Config search path")[
        0
    ]
    internal = ("full_key:", "object_type", "reference_type", "See http")
    lines = [
        line.rstrip(".") for line in text.splitlines() if not line.strip().startswith(internal)
    ]
    # What Hydra lists, it indents.
    listed = ", ".join(line.strip() for line in lines if line.startswith("\t"))
    said = "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith("\t")))
    return f"{said} {listed}".strip()


def _of_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised it, and not what they called."""
    frames = list(traceback.walk_tb(error.__traceback__))
    name = str(frames[-1][0].f_globals.get("__name__")) if frames else ""
    return name.partition(".")[0] in ("hydra", "omegaconf")


def _fail(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2)
