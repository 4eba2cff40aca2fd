"""What an epoch has done so far, so that a run can stop and go on within it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pwm_fast.envs import Tasks
from pwm_fast.parallel import Ranks


class EpochProgress:
    """Steps and updates of an epoch, and the sums of their metrics, which stay on the device."""

    def __init__(self) -> None:
        self._done: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}  # of updates on the host, of episodes not
        self._totals: set[str] = set()  # of which the sum is logged, not the mean

    def remaining(self, kind: str, total: int, check: Callable[[], None]) -> Iterator[int]:
        """Numbers of the steps of a kind still to do, each counted as done when the next is drawn.

        Args:
            kind: of step, each of which this yields once an epoch.
            total: steps of that kind in the epoch.
            check: called before each step; what it raises leaves the progress whole.
        """
        while self._done.get(kind, 0) < total:
            check()
            yield self._done.get(kind, 0)
            self._done[kind] = self._done.get(kind, 0) + 1

    @torch.inference_mode(False)  # the sums outlive the mode that this is called in
    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Take up the metrics of an update."""
        known = [name for name in values if name in self._sums]
        for name in known:  # a checkpoint's come from the host
            self._sums[name] = self._sums[name].to(values[name].device)
        if known:  # one kernel for all of them on a GPU
            torch._foreach_add_([self._sums[k] for k in known], [values[k] for k in known])
        for name, value in values.items():
            if name not in self._sums:
                self._sums[name] = value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def add_episodes(self, episode: dict[str, Tensor], tasks: Tasks | None = None) -> None:
        """Take up the training episodes that ended in a step of the environment.

        Of several tasks each has a mean return of its own as well.
        """
        mask = episode["mask"]
        self._add_means(mask, train_reward=episode["return"])
        self._add_means(mask, train_episode_length=episode["length"])
        if tasks is not None and len(tasks.names) > 1:
            for name, number in zip(tasks.names, tasks.numbers, strict=True):
                own = mask & (tasks.of_env == number)
                self._add_means(own, **{f"train_reward/{name}": episode["return"]})

    def _add_means(self, mask: Tensor, **values: Tensor) -> None:
        count = mask.sum().float()
        for name, value in values.items():
            self._add(name, torch.where(mask, value.float(), 0.0).sum(), count)

    def add_step(self, name: str, value: Tensor) -> None:
        """Take up a metric of an environment step, whose mean over the epoch is logged."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def add_total(self, name: str, value: Tensor) -> None:
        """Add to a metric that is a sum over the epoch."""
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = 1
        self._totals.add(name)

    def ended(self) -> dict[str, int]:
        """Training episodes that ended, and those of them that diverged; waits for the device."""
        episodes, diverged = self._counts.get("train_reward", 0), self._sums.get("diverged", 0)
        return {"episodes": int(episodes), "diverged": int(diverged)}

    def means(self) -> dict[str, Tensor]:
        """Mean, or total, of every metric; NaN (logged as null) where nothing was counted."""
        return {name: self._sums[name] / self._counts[name] for name in self._sums}

    def _add(self, name: str, value: Tensor, count: Tensor) -> None:
        if name in self._sums:
            self._sums[name] = self._sums[name] + value
            self._counts[name] = self._counts[name] + count
        else:
            self._sums[name], self._counts[name] = value, count

    def of_all(self, ranks: Ranks) -> EpochProgress:
        """The epoch so far of all ranks, each of which has done the same steps."""
        if ranks.size == 1:
            return self
        whole = EpochProgress()
        whole._done, whole._totals = dict(self._done), set(self._totals)
        for sums, counts in ranks.gather((self._sums, self._counts)):
            for name, value in sums.items():
                known = name in whole._sums
                whole._sums[name] = whole._sums[name] + value if known else value
                if not (known and name in whole._totals):
                    whole._counts[name] = whole._counts.get(name, 0) + counts[name]
        return whole

    def without_sums(self) -> EpochProgress:
        """The same steps done, and nothing counted."""
        bare = EpochProgress()
        bare._done = dict(self._done)
        return bare

    def state_dict(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        return {
            "done": dict(self._done),
            "sums": dict(self._sums),
            "counts": dict(self._counts),
            "totals": sorted(self._totals),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self._done = dict(state["done"])
        self._sums, self._counts = dict(state["sums"]), dict(state["counts"])
        self._totals = set(state.get("totals", ()))  # older versions had one process, and no need
