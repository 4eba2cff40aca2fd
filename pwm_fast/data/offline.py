"""A run's offline data: verified against their manifest, read, and put into the replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pwm_fast.config import TrainConfig
from pwm_fast.data.episodes import SUFFIXES, read_episode
from pwm_fast.data.errors import DataError
from pwm_fast.data.manifest import data_files, default_manifest, verify
from pwm_fast.data.progress import reading_bar
from pwm_fast.envs import VectorEnv
from pwm_fast.files import user_path
from pwm_fast.replay import Episode


@dataclass(frozen=True)
class OfflineData:
    """The data set of a run, as registered.

    Attributes:
        path: as the configuration has it.
        manifest_sha256: of its manifest, by which the data are known.
        episodes: in the order of their files' names.
    """

    path: str
    manifest_sha256: str
    episodes: tuple[Episode, ...]

    @property
    def transitions(self) -> int:
        """Steps in all episodes."""
        return sum(len(episode.action) for episode in self.episodes)

    def record(self) -> dict[str, Any]:
        """What checkpoints and the run's record keep."""
        return {
            "path": self.path,
            "manifest_sha256": self.manifest_sha256,
            "episodes": len(self.episodes),
            "transitions": self.transitions,
        }


def load(config: TrainConfig, env: VectorEnv) -> OfflineData | None:
    """The data that ``config.data`` names, verified and read; None where it names none.

    Raises:
        DataError: a file changed, is missing or unknown, or does not hold an episode of ``env``,
            or no episode is long enough to learn from.
        OSError: a file cannot be read; it names the file.
    """
    if config.data.path is None:
        return None
    path = user_path(config.data.path)
    manifest = None if config.data.manifest is None else user_path(config.data.manifest)
    with reading_bar(path, manifest, f"verifying {path}") as progress:
        registered = verify(path, manifest, progress=progress)
    found = data_files(path, manifest or default_manifest(path))
    files = [file for file in found.values() if file.suffix in SUFFIXES]
    if not files:
        raise DataError(f"data.path={path} holds no episodes ({' or '.join(SUFFIXES)} files)")
    obs_dim, action_dim = env.single_observation_space.shape[0], env.single_action_space.shape[0]
    episodes = tuple(read_episode(file, obs_dim, action_dim) for file in files)
    longest = max(len(episode.action) for episode in episodes)
    if longest < config.alg.horizon:
        raise DataError(
            f"data.path={path}: no episode has alg.horizon={config.alg.horizon} steps, the longest "
            f"has {longest}: there would be nothing to learn from"
        )
    return OfflineData(config.data.path, registered.sha256, episodes)
