"""A run's offline data: verified against their manifest, and read into the replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pwm_fast.config import TrainConfig
from pwm_fast.data.contents import Part, together
from pwm_fast.data.episodes import first_true
from pwm_fast.data.errors import DataError
from pwm_fast.data.formats import DataSet, describe
from pwm_fast.data.manifest import verify
from pwm_fast.data.progress import reading_bar
from pwm_fast.envs import VectorEnv, tasks_of
from pwm_fast.files import user_path
from pwm_fast.replay import Episode


class Place(NamedTuple):
    """What a task of the data is in the environment.

    Attributes:
        number: of the task.
        action_dim: components of the action that it reads.
    """

    number: int
    action_dim: int


@dataclass(frozen=True)
class FittedEpisodes:
    """The episodes of a data set as those of an environment; every pass reads the files anew.

    Attributes:
        data: the data set.
        places: what its tasks are in the environment, by their numbers in the data; episodes of
            others are left out.
        obs_dim: O of the environment.
        action_dim: A of the environment.
    """

    data: DataSet
    places: dict[int, Place]
    obs_dim: int
    action_dim: int

    @property
    def part(self) -> Part:
        """How many there are, and how long."""
        return together(self.data.tasks[number] for number in self.places)

    def __len__(self) -> int:
        return self.part.episodes

    def __iter__(self) -> Iterator[Episode]:
        for where, episode in self.data.episodes(self.places):
            number, reads = self.places[episode.task]
            yield episode._replace(
                obs=_of_width(where, "obs", episode.obs, self.obs_dim, self.obs_dim),
                action=_of_width(where, "action", episode.action, self.action_dim, reads),
                task=number,
            )


@dataclass(frozen=True)
class OfflineData:
    """The data set of a run, as registered.

    Attributes:
        path: as the configuration has it.
        manifest_sha256: of its manifest, by which the data are known.
        episodes: in the order of the files' names; one is in memory at a time.
    """

    path: str
    manifest_sha256: str
    episodes: FittedEpisodes

    @property
    def transitions(self) -> int:
        """Steps in all episodes."""
        return self.episodes.part.transitions

    @property
    def left_out(self) -> int:
        """Episodes of tasks that the environment does not have."""
        return self.episodes.data.whole.episodes - len(self.episodes)

    def record(self) -> dict[str, Any]:
        """What checkpoints and the run's record keep."""
        return {
            "path": self.path,
            "manifest_sha256": self.manifest_sha256,
            "episodes": len(self.episodes),
            "transitions": self.transitions,
        }


def load(config: TrainConfig, env: VectorEnv) -> OfflineData | None:
    """The data that ``config.data`` names, verified and looked at; None where it names none.

    What is wrong with an episode shows when it is read.

    Raises:
        DataError: a file changed, is missing or unknown, or does not hold episodes of ``env``, or
            no episode is long enough to learn from.
        OSError: a file cannot be read; it names the file.
    """
    if config.data.path is None:
        return None
    path = user_path(config.data.path)
    manifest = None if config.data.manifest is None else user_path(config.data.manifest)
    with reading_bar(path, manifest, f"verifying {path}") as progress:
        registered = verify(path, manifest, progress=progress)
    data = describe(path, manifest)
    obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    episodes = FittedEpisodes(data, _places(data, env), obs_dim, action_dim)
    longest = episodes.part.longest
    if longest < config.alg.horizon:
        raise DataError(
            f"data.path={path}: no episode has alg.horizon={config.alg.horizon} steps, the longest "
            f"has {longest}: there would be nothing to learn from"
        )
    return OfflineData(config.data.path, registered.sha256, episodes)


def _places(data: DataSet, env: VectorEnv) -> dict[int, Place]:
    """What the tasks of the data are in the environment.

    They are the same where they have the same name or, where nothing says the names of the data's,
    the same number. An environment that says of no tasks has one, and so must the data.
    """
    tasks = tasks_of(env)
    held = ", ".join(map(data.name, data.tasks))
    if tasks is None:
        if len(data.tasks) > 1:
            raise DataError(
                f"data.path={data.path} holds the tasks {held}; this environment has one: "
                "env=dmc_tasks takes its tasks by name"
            )
        _refuse_narrow(data, env)
        return {next(iter(data.tasks)): Place(0, env.single_action_space.shape[0])}
    places = {
        number if not data.names else data.names.index(name): Place(number, reads)
        for name, number, reads in zip(tasks.names, tasks.numbers, tasks.action_dims, strict=True)
        if not data.names or name in data.names
    }
    found = {number: place for number, place in places.items() if number in data.tasks}
    if not found:
        own = ", ".join(f"{k} ({name})" for k, name in zip(tasks.numbers, tasks.names, strict=True))
        raise DataError(
            f"data.path={data.path} holds the tasks {held}, and none of the environment's: {own}"
        )
    return found


def _refuse_narrow(data: DataSet, env: VectorEnv) -> None:
    """Raise DataError where the data have fewer components than the one task of ``env``."""
    spaces = {"obs": env.single_observation_space, "action": env.single_action_space}
    for key, length, width in (("action", "T", data.action_dim), ("obs", "T+1", data.obs_dim)):
        needed = spaces[key].shape[0]
        if width < needed:
            raise DataError(
                f"{data.files[0][0]}: {key} must be [{length}, {needed}] for this environment, it "
                f"has {width} components"
            )


def _of_width(where: str, key: str, value: Tensor, width: int, used: int) -> Tensor:
    """``value [T, W]`` as ``[T, width]``: beyond ``used`` there are zeros, and must have been."""
    beyond = value[:, used:]
    if bool((beyond != 0).any()):
        step, i = first_true(beyond != 0)
        raise DataError(
            f"{where}: component {used + i} of the {key} of step {step} is "
            f"{beyond[step, i].item():.6g}; this environment's task has {used} components, and "
            "only zeros that fill up may follow"
        )
    if value.shape[1] == width:
        return value
    fitted = value.new_zeros(len(value), width)
    kept = min(width, value.shape[1])
    fitted[:, :kept] = value[:, :kept]
    return fitted
