"""The state of a run between two steps: what its checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pwm_fast import config as configuration
from pwm_fast import seeding
from pwm_fast.agent import PWM
from pwm_fast.config import ConfigError, TrainConfig
from pwm_fast.data import DataError
from pwm_fast.data.offline import OfflineData
from pwm_fast.envs import OfflineEnv, StateNotSupported, VectorEnv, tasks_of
from pwm_fast.parallel import ALONE, Ranks
from pwm_fast.replay import Episode, Replay
from pwm_fast.run import build, checkpoint, checkpoint_content
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.collection import renew_random_actions
from pwm_fast.run.progress import EpochProgress
from pwm_fast.run.rundir import Source, differences
from pwm_fast.seeding import Purpose

# What taking up a part of a checkpoint raises that is of another run, or damaged.
UNFIT = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, OverflowError)


HELD_OUT = 256  # episodes, at most, but for rounding


class RunState:
    """Everything that a run has come to: in memory, and in its checkpoints.

    Args:
        config: of the run.
        env: envs to collect in.
        agent: learns.
        replay: what it learns from.
        data: offline data, which :meth:`use_data` or :meth:`restore` put into the replay.
        ranks: processes that share the run: ``env`` and ``replay`` are this one's part.

    Attributes:
        epoch: epochs completed.
        bootstrapped: the agent has learned.
        wall_time: seconds of training.
        best: the best evaluation so far.
        latest_eval: figures of the newest one.
        fallen_back: the precision that replaced the configured one.
        ended: episodes of completed epochs; None after a checkpoint of an older version, which
            does not say.
        torn: an environment failed; True where it is the one of training, in the middle of a step.
        skips_seen: skipped updates at the last look.
        progress: of the epoch that runs.
        held_out: episodes of the data that are not learned from.
        obs: observations of all envs.
        tasks: of the environment, where it says of any.
        task: their numbers, env by env.
    """

    def __init__(
        self,
        config: TrainConfig,
        env: VectorEnv,
        agent: PWM,
        replay: Replay,
        data: OfflineData | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.ranks = ranks
        self.env = env
        self.agent = agent
        self.replay = replay
        self.data = data

        self.epoch = 0
        self.bootstrapped = False
        self.wall_time = 0.0
        self.best: dict[str, Any] = {}
        self.latest_eval: dict[str, float] = {}
        self.fallen_back: str | None = None
        self.ended: dict[str, int] | None = {"episodes": 0, "diverged": 0}
        self.torn: bool | None = None
        self.skips_seen = 0
        self.progress = EpochProgress()
        self.held_out: list[Episode] = []
        self.obs, _ = env.reset()
        self.tasks = tasks_of(env)
        self.task = None if self.tasks is None else self.tasks.of_env
        # An environment that acts says by itself whether its episodes end in terminal states.
        self._nothing_ends = isinstance(env, OfflineEnv) and not env.can_terminate
        self._held_action = torch.zeros(env.num_envs, agent.action_dim, device=agent.device)

    @property
    def env_steps(self) -> int:
        """Environment steps taken in completed epochs, over all envs."""
        return self.epoch * self.config.alg.steps_per_epoch * self.config.env_count

    def ended_so_far(self) -> dict[str, int] | None:
        """Training episodes that ended, with those of this epoch."""
        if self.ended is None:
            return None
        return {k: n + self.ended[k] for k, n in self.progress.ended().items()}

    def random_action(self) -> Tensor:
        """Uniform actions ``[N, A]``, each held for ``alg.random_hold`` steps on average."""
        self._held_action = renew_random_actions(self._held_action, self.config.alg.random_hold)
        if self.tasks is None:
            return self._held_action
        return self._held_action * self.tasks.action_mask.to(self._held_action.device)

    def content(self, *, with_replay: bool) -> dict[str, Any]:
        """What a checkpoint holds, as :func:`pwm_fast.run.checkpoint.save` writes it.

        All ranks call this; what the first one returns is the whole run's.
        """
        try:
            env_state = None if self.torn else self.env.get_state()
        except StateNotSupported:
            env_state = None
        own: dict[str, Any] = {
            "env": env_state,
            "rng": checkpoint.rng_state(),
            "replay": self.replay.state_dict() if with_replay else None,
            "obs": self.obs,
            "held_action": self._held_action,
        }
        progress = self.progress.of_all(self.ranks).state_dict()
        whole = own if self.ranks.size == 1 else self._of_all(own)
        return {
            "config": configuration.to_dict(self.config),
            "epoch": self.epoch,
            "bootstrapped": self.bootstrapped,
            "wall_time": self.wall_time,
            "best": self.best,
            "latest_eval": self.latest_eval,
            "progress": progress,
            "agent": self.agent.state_dict(),
            **whole,
            "data": self._data_record(),
            "ended": self.ended,
            "precision": self.fallen_back,
            "seeding": seeding.VERSION,
        }

    def _of_all(self, own: dict[str, Any]) -> dict[str, Any]:
        """On rank 0, the parts of all ranks' envs as those of one process that has them all.

        The states of simulators stay apart: they go on where there are as many ranks.
        """
        parts = self.ranks.gather_first(own)
        if not parts:
            return own
        replays = [part["replay"] for part in parts]
        return {
            "env": None,
            "rng": parts[0]["rng"],
            "replay": None if replays[0] is None else Replay.joined(replays),
            "obs": torch.cat([part["obs"] for part in parts]),
            "held_action": torch.cat([part["held_action"] for part in parts]),
            "ranks": {key: [part[key] for part in parts] for key in ("env", "rng")},
        }

    def use_data(self, *, seen: bool = False) -> None:
        """Begin with the offline data: in the replay, and in the agent's running statistics.

        Args:
            seen: the statistics, of a checkpoint, know the data already.

        Raises:
            ConfigError: they do not fit into the replay.
        """
        if self.data is None:
            return
        try:
            self.replay.add_episodes(self._episodes(self.data, seen))
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"data.path={self.data.path}: {error}") from error

    def _episodes(self, data: OfflineData, seen: bool) -> Iterator[Episode]:
        """The episodes to learn from, each noted on its way; those that are held out are kept.

        Of each task the same share is held out, evenly over its episodes, whatever their order is.
        The tasks begin at different places of that rhythm, so that of many with few episodes each
        some are held out, too.
        """
        self.held_out = []
        tasks = sorted({place.number for place in data.episodes.places.values()})
        due = {number: (i + 0.5) / len(tasks) for i, number in enumerate(tasks)}
        share = min(self.config.data.holdout, HELD_OUT / len(data.episodes))
        for i, episode in enumerate(data.episodes):
            if bool(episode.terminated[-1]) and self._nothing_ends:
                raise DataError(
                    f"data.path={data.path}: episode {i} ends in a terminal state, which the model "
                    "is to learn: give env.can_terminate=true"
                )
            due[episode.task] += share
            if due[episode.task] >= 1.0:
                due[episode.task] -= 1.0
                self.held_out.append(episode)
                continue
            if not seen:
                task = torch.full((len(episode.reward),), episode.task, device="cpu")
                self.agent.observe(episode.obs[:-1], episode.reward, task, same=True)
            if i % self.ranks.size == self.ranks.rank:
                yield episode

    def restore(self, source: Source, *, own_best: bool) -> None:
        """Continue from a checkpoint.

        Args:
            source: the checkpoint.
            own_best: the run directory has the best checkpoint that it names.

        Raises:
            CheckpointError: it is of another architecture or environment.
            ConfigError: its replay was filled with other offline data than this run's.
        """
        path, content = source
        if content["replay"] is not None:
            self._refuse_other_data(path, content.get("data"))
        self._take_up(path, content)
        if content["replay"] is None:
            self.replay.keep_at_most(self._random_left(content) + 1)
            then, now = content.get("data"), self._data_record()
            self.use_data(seen=_manifest_of(then) == _manifest_of(now))
        self.skips_seen = int(self.agent.skipped_updates()["skipped_updates"])
        if content.get("precision"):
            self.fallen_back = content["precision"]
            self.agent.set_precision(self.fallen_back)
        self.epoch = content["epoch"]
        self.bootstrapped = content["bootstrapped"]
        self.wall_time = content["wall_time"]
        self.latest_eval = content["latest_eval"]
        self.ended = content.get("ended")
        if own_best:
            self.best = content["best"]

    def _take_up(self, path: Path, content: dict[str, Any]) -> None:
        """Load the parts that can be of another run; the message names the one that is."""
        part = "agent"
        try:
            self.agent.load_state_dict(content["agent"])
            part = "replay"
            envs = self._own_envs(content)
            if content["replay"] is not None:
                self.replay.load_state_dict(Replay.part(content["replay"], envs))
            part = "env"
            env_state = self._own(content, "env")
            if env_state is None:
                self._begin_anew(content)
            else:
                own = self.env.get_state()
                self.env.set_state(env_state)
                _refuse_unlike(env_state, own, "env")
                _refuse_unlike(content["obs"][envs], self.obs.cpu(), "obs")
                self.obs = content["obs"][envs].to(self.env.device)
            part = "progress"
            self.progress.load_state_dict(content["progress"])
            if not self.ranks.first:  # what all have counted is the first one's from here on
                self.progress = self.progress.without_sums()
            part = "held_action"
            held = content["held_action"][envs]
            _refuse_unlike(held, self._held_action.cpu(), "held_action")
            self._held_action = held.to(self.agent.device)
            part = "rng"
            rng = self._own(content, "rng")
            if rng is None:
                epoch = content["epoch"]
                build.seed_everything(self.config.seed, Purpose.RANK, *self.ranks.numbers, epoch)
            else:
                _refuse_unlike(rng, checkpoint.rng_state(), "rng")
                checkpoint.set_rng_state(rng)
        except KeyError as error:
            raise CheckpointError(
                f"{path} does not fit this run: its {part} lacks {error}"
            ) from error
        except UNFIT as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            changed = list(differences(content["config"], self.config).values())
            raise CheckpointError(
                f"{path} does not fit this run: {reason} (in its {part})"
                + (f"; {'; '.join(changed[:6])}" if changed else "")
            ) from error

    def _own_envs(self, content: dict[str, Any]) -> slice:
        """Which of a checkpoint's envs are this rank's."""
        if self.ranks.size == 1:
            return slice(None)
        each = len(content["obs"]) // self.ranks.size
        return slice(self.ranks.rank * each, (self.ranks.rank + 1) * each)

    def _own(self, content: dict[str, Any], part: str) -> Any:
        """A part that each rank has one of; None where there is none for this one."""
        saved = content.get("ranks")
        if saved is not None and len(saved[part]) == self.ranks.size:
            return saved[part][self.ranks.rank]
        if self.ranks.size == 1 or (part == "rng" and self.ranks.first):
            return content[part]
        return None

    def _random_left(self, content: dict[str, Any]) -> int:
        """Random actions that each env takes after a checkpoint."""
        alg = self.config.alg
        taken = content["epoch"] * alg.steps_per_epoch + content["progress"]["done"].get("steps", 0)
        return max(alg.random_epochs * alg.steps_per_epoch - taken, 0)

    def _begin_anew(self, content: dict[str, Any]) -> None:
        """Start new episodes in all envs, whose state a checkpoint could not save.

        The episodes that were open end here, as truncated, and the new ones do not repeat those
        that the run began with.
        """
        self.replay.end_episodes()
        done = content["progress"]["done"].get("steps", 0)
        place = (content["epoch"], done, *self.ranks.numbers)
        seed = seeding.stream(self.config.seed, Purpose.RESUMED, *place)
        self.obs, _ = self.env.reset(seed=seed)

    def _refuse_other_data(self, path: Path, saved: dict[str, Any] | None) -> None:
        then, now = (_manifest_of(record) for record in (saved, self._data_record()))
        if then != now:
            raise ConfigError(
                f"the replay in {path} was filled with {_data_name(then)}, this run's data.path is "
                f"{_data_name(now)}; give another run_dir to start anew"
            )

    def _data_record(self) -> dict[str, Any] | None:
        return None if self.data is None else self.data.record()


def _refuse_unlike(saved: Any, own: Any, name: str) -> None:
    """Raise ValueError where a saved state is of another kind than this run's."""
    for problem in checkpoint_content.unlike(saved, own, name):
        raise ValueError(problem)


def _manifest_of(record: dict[str, Any] | None) -> str | None:
    return record["manifest_sha256"] if record else None


def _data_name(sha256: str | None) -> str:
    return "no data set" if sha256 is None else f"a data set with the manifest sha256 {sha256}"
