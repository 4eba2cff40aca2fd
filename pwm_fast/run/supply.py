"""Whether a run has, and will ever have, windows of experience to learn from."""

from __future__ import annotations

from typing import NamedTuple

from pwm_fast.config import OFFLINE, ConfigError, TrainConfig
from pwm_fast.replay import Replay

ENOUGH = 100  # episodes, none of H steps: fewer than 3 % have as many, with 95 % confidence
# Times H: steps of the untrained policy, whose episodes may last longer than random ones.
PATIENCE = 4


class NothingToLearn(ConfigError):
    """No episode has as many steps as a window; the message says what to set."""


class Shortage(NamedTuple):
    """Replay has no window, though every env has ended an episode.

    Attributes:
        text: what is wrong and what to set.
        hopeless: waiting longer is of no use: as long as nothing is learned, the policy stays.
    """

    text: str
    hopeless: bool


def shortage(
    config: TrainConfig,
    replay: Replay,
    epoch: int,
    *,
    episodes: int = 0,
    diverged: int = 0,
    why: str | None = None,
) -> Shortage | None:
    """What keeps a run from learning once its random actions are over.

    Args:
        config: of the run.
        replay: without a window.
        epoch: epochs completed before the one whose steps were just taken.
        episodes: that ended in the environment; 0 where they were not counted.
        diverged: of these, those that ended since the simulation broke down.
        why: that came to be, if it is known.

    Returns:
        None where an episode that goes on may still get long enough in some env.
    """
    alg = config.alg
    ended = replay.ended()
    if int(ended.min()) == 0:
        return None
    there, longest = int(ended.sum()), replay.longest()
    of_policy = (epoch + 1 - alg.random_epochs) * alg.steps_per_epoch
    hopeless = of_policy >= PATIENCE * alg.horizon and there >= ENOUGH
    window = f"there is nothing to learn from: a window has alg.horizon={alg.horizon} steps, and"
    because = f" ({why})" if why else ""
    if 0 < episodes == diverged:
        return Shortage(
            f"{window} all {episodes} episodes ended as diverged{because}, after {longest} steps "
            "at most; the environment has to be mended, or its actions be made smaller",
            hopeless,
        )
    return Shortage(
        f"{window} the longest of {there} episodes had {longest}; set alg.horizon={longest} or "
        "less, in another run_dir"
        + (f"; {diverged} episodes ended as diverged{because}" if diverged else ""),
        hopeless,
    )


def outlook(config: TrainConfig) -> list[str]:
    """Why a run will not learn anything, as far as its configuration says."""
    alg, found = config.alg, []
    if config.env.name == OFFLINE:  # nothing acts
        return []
    if 0 < config.epochs < alg.random_epochs:
        found.append(
            f"epochs={config.epochs} end before the random actions of "
            f"alg.random_epochs={alg.random_epochs} do: nothing will be learned"
        )
    steps = config.epochs * alg.steps_per_epoch
    if 0 < steps < alg.horizon and config.data.path is None:
        found.append(
            f"epochs={config.epochs} of alg.steps_per_epoch={alg.steps_per_epoch} steps are "
            f"shorter than a window of alg.horizon={alg.horizon}: nothing will be learned"
        )
    return found
