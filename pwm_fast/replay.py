"""Experience replay: one packed, preallocated ring per env, on the training device."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

OF_ENVS = ("data", "run", "cursor", "length", "block", "random", "task")  # parts of a saved state


class Windows(NamedTuple):
    """A batch of B windows of H consecutive transitions, time first.

    Attributes:
        obs: ``[H+1, B, O]``; the last may be a terminal observation.
        action: ``[H, B, A]``.
        reward: ``[H, B]``.
        terminated: ``[H, B]``, 1.0 where the transition ended in a terminal state.
        task: int64 ``[B]``, the number of each window's task; None in a replay of one task.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    task: Tensor | None = None


class Starts(NamedTuple):
    """Observations to imagine from.

    Attributes:
        obs: ``[B, O]``.
        task: int64 ``[B]``, their tasks' numbers; None in a replay of one task.
    """

    obs: Tensor
    task: Tensor | None = None


class Episode(NamedTuple):
    """An episode of T steps in one env.

    Attributes:
        obs: ``[T+1, O]``; the last is the one after the last step.
        action: ``[T, A]`` in [-1, 1].
        reward: ``[T]``.
        terminated: bool ``[T]``; True at most at the last step.
        task: number of its task.
    """

    obs: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor
    task: int = 0


class Replay:
    """Stores the steps of N envs and samples windows that never cross an episode's end.

    A row is ``[obs, action, reward, terminated]``; each env writes its own ring of T rows. After
    a transition the true next observation (``final_obs``) goes into the following row. If the
    episode goes on, the next transition overwrites that row with the same observation and its
    action; if it ended, the row stays as the terminal observation and the next episode starts
    behind it. A window may therefore end on the observation after any transition, terminal or not,
    and none crosses from one episode into the next. Only ``__len__``, :meth:`num_windows`,
    :meth:`longest`, :meth:`random_share`, :meth:`episodes`, :meth:`add_episodes`,
    :meth:`state_dict` and :meth:`load_state_dict` wait for the device.

    With ``keep`` the first rows that steps are added to are a block of their own, which is written
    once; the other rows of the env are the ring, which goes round without it. An episode that is
    open where the block ends is cut there, as truncated, so that no window leads from one part into
    the other.

    Args:
        capacity: transitions to hold, over all envs.
        num_envs: N.
        obs_dim: O.
        action_dim: A.
        horizon: H, transitions a window.
        device: where the rows live.
        keep: rows of each env's block; 0 for none.
        num_tasks: where there are several, every transition has the number of its task.

    Raises:
        ValueError: the capacity holds no window for each env, or not one in the block and one
            beside it.
    """

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(
        self,
        capacity: int,
        num_envs: int,
        obs_dim: int,
        action_dim: int,
        horizon: int,
        device: torch.device | str = "cpu",
        keep: int = 0,
        num_tasks: int = 1,
    ) -> None:
        rows = capacity // num_envs
        if rows < horizon + 2:
            raise ValueError(
                f"alg.replay_capacity={capacity} leaves {rows} rows for each of {num_envs} envs; "
                f"a window of {horizon} transitions needs {horizon + 2}: at least "
                f"{num_envs * (horizon + 2)}"
            )
        if keep and not horizon + 2 <= keep <= rows - (horizon + 2):
            raise ValueError(
                f"{keep} of {rows} rows of each env cannot be kept: a window of {horizon} "
                f"transitions needs {horizon + 2}, among them and beside them"
            )
        self.num_envs, self.rows, self.horizon = num_envs, rows, horizon
        self._asked, self._keep = keep, keep
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.device = torch.device(device)
        width = obs_dim + action_dim + 2
        self._data = torch.zeros(num_envs, rows, width, device=self.device)
        # Transitions of the same episode that end with this row; 0 marks terminal and unused rows.
        self._run = torch.zeros(num_envs, rows, dtype=torch.int32, device=self.device)
        self._cursor = torch.zeros(num_envs, dtype=torch.int64, device=self.device)
        self._length = torch.zeros(num_envs, dtype=torch.int32, device=self.device)
        self._random: Tensor | None = torch.zeros_like(self._run, dtype=torch.bool)
        self._block = torch.zeros_like(self._cursor)  # where it begins
        self._num_tasks = num_tasks
        self._task: Tensor | None = torch.zeros_like(self._run) if num_tasks > 1 else None
        self._env_index = torch.arange(num_envs, device=self.device)
        self._window_cdf: Tensor | None = None
        self._row_cdf: Tensor | None = None

    def add(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        terminated: Tensor,
        done: Tensor,
        final_obs: Tensor,
        *,
        random: bool = False,
        task: Tensor | None = None,
    ) -> None:
        """Store one step of every env.

        Args:
            obs: ``[N, O]`` that was acted on.
            action: ``[N, A]``.
            reward: ``[N]``.
            terminated: ``[N]`` bool.
            done: ``[N]`` bool, terminated or truncated.
            final_obs: ``[N, O]``, the true next observation.
            random: the actions are no policy's; for :meth:`random_share`.
            task: integers ``[N]``, the numbers of the envs' tasks, where there are several.

        Raises:
            ValueError: there are several tasks, and no numbers are given.
        """
        if task is None and self._task is not None:
            raise ValueError(f"task must be the numbers of {self._num_tasks} tasks, got None")
        # The environment and the policy may live on different devices: each part moves by itself.
        parts = (obs, action, reward.unsqueeze(-1), terminated.unsqueeze(-1))
        row = torch.cat([p.to(self.device, self._data.dtype) for p in parts], dim=-1)
        done = done.to(self.device)
        self._data[self._env_index, self._cursor] = row
        self._length += 1
        self._run[self._env_index, self._cursor] = self._length
        if self._random is not None:
            self._random[self._env_index, self._cursor] = random
        if task is not None and self._task is not None:
            self._task[self._env_index, self._cursor] = task.to(self._task)

        following = self._following(self._cursor)
        tail = torch.zeros_like(row)
        tail[:, : self.obs_dim] = final_obs
        self._data[self._env_index, following] = tail
        self._run[self._env_index, following] = 0

        self._length.masked_fill_(done, 0)
        self._cursor = torch.where(done, self._following(following), following)
        self._cut()
        self._window_cdf = self._row_cdf = None

    def add_episodes(self, episodes: Iterable[Episode]) -> None:
        """Store whole episodes before any step was added; each is held only while it is stored.

        Each goes to the env whose ring is the emptiest then. Like steps that were added, they are
        overwritten, the first ones first, when the ring has come round.

        Args:
            episodes: of any lengths of 1 step or more.

        Raises:
            ValueError: the replay holds something already, not all of it has room, or an episode is
                of a task that the replay has no number for; then it is as empty as before.
        """
        if len(self):
            raise ValueError(f"episodes go into an empty replay; it holds {len(self)} transitions")
        room = self.rows - self._keep
        emptiest = [(0, env) for env in range(self.num_envs)]
        count = transitions = 0
        try:
            for episode in episodes:  # one more row than steps: the last observation
                if not 0 <= episode.task < self._num_tasks:
                    raise ValueError(
                        f"episode {count} is of task {episode.task}, alg.world_model.num_tasks is "
                        f"{self._num_tasks}"
                    )
                used, env = heapq.heappop(emptiest)
                after = used + len(episode.obs)
                if after <= room:
                    self._write(env, used, episode)
                heapq.heappush(emptiest, (after, env))
                count, transitions = count + 1, transitions + len(episode.action)
            most = max(used for used, _ in emptiest)
            if most > room:
                kept = f" beside the {self._keep} rows of alg.keep_random" if self._keep else ""
                raise ValueError(
                    f"{count} episodes with {transitions} transitions do not fit{kept}: "
                    f"alg.replay_capacity must be at least {(most + self._keep) * self.num_envs} "
                    f"for {self.num_envs} envs, got {self.rows * self.num_envs}"
                )
        except BaseException:
            self._data.zero_()
            self._run.zero_()
            raise
        for used, env in emptiest:
            self._cursor[env] = self._block[env] = used % self.rows
        self._window_cdf = self._row_cdf = None

    def _write(self, env: int, start: int, episode: Episode) -> None:
        """Store an episode in rows of an env from ``start`` on."""
        steps = len(episode.action)
        tail = torch.zeros(1, self._data.shape[-1] - self.obs_dim, device="cpu")
        parts = (episode.action, episode.reward[:, None], episode.terminated[:, None])
        rest = torch.cat([torch.cat([p.to(tail) for p in parts], dim=-1), tail])
        rows = torch.cat([episode.obs.to(tail), rest], dim=-1)
        self._data[env, start : start + steps + 1] = rows.to(self.device)
        self._run[env, start : start + steps] = torch.arange(1, steps + 1, device="cpu")
        if self._task is not None:
            self._task[env, start : start + steps + 1] = episode.task

    def keep_at_most(self, rows: int) -> None:
        """Make the blocks smaller, before any step was added; too few rows for a window keep none.

        A run that goes on without its replay has fewer random actions before it, or none.
        """
        kept = min(self._keep, rows)
        self._keep = kept if kept >= self.horizon + 2 else 0

    def end_episodes(self) -> None:
        """End the open episode of every env, as truncated: the next step begins another one.

        The observation after an episode's last step, which is there already, becomes its final one.
        """
        going_on = self._length > 0
        self._cursor = torch.where(going_on, self._following(self._cursor), self._cursor)
        self._length.zero_()
        self._cut()
        self._window_cdf = self._row_cdf = None

    def sample(self, batch_size: int, generator: torch.Generator | None = None) -> Windows:
        """``batch_size`` windows, uniformly among all that the ring holds, with replacement.

        Call it only where :meth:`num_windows` is positive.
        """
        if self._window_cdf is None:
            self._window_cdf = self._window_ends().flatten().cumsum(0)
        index = self._draw(self._window_cdf, batch_size, generator)
        env, end = index // self.rows, index % self.rows
        offsets = torch.arange(1 - self.horizon, 2, device=self.device).unsqueeze(-1)
        # [H+1, B, F]: advanced indexing gathers the windows time first.
        windows = self._data[env, self._moved(env, end, offsets)]
        o, a = self.obs_dim, self.action_dim
        return Windows(
            windows[..., :o],
            windows[:-1, :, o : o + a],
            windows[:-1, :, o + a],
            windows[:-1, :, o + a + 1],
            None if self._task is None else self._task[env, end].long(),
        )

    def sample_starts(self, batch_size: int, generator: torch.Generator | None = None) -> Starts:
        """``batch_size`` observations that were acted on, uniformly, with replacement."""
        if self._row_cdf is None:
            self._row_cdf = (self._run > 0).flatten().cumsum(0)
        index = self._draw(self._row_cdf, batch_size, generator)
        obs = self._data.view(-1, self._data.shape[-1])[index, : self.obs_dim]
        return Starts(obs, None if self._task is None else self._task.view(-1)[index].long())

    def num_windows(self) -> int:
        """Number of windows that :meth:`sample` draws from."""
        return int(self._window_ends().sum())

    def longest(self) -> int:
        """Steps of the longest episode of which the last step is held."""
        return int(self._run.amax())

    def ended(self) -> Tensor:
        """Episodes ``[N]`` of each env that have ended and whose first step is held."""
        ring = self.rows - self._keep
        in_block = self._place(self._cursor[:, None])[:, 0] >= ring
        # And its first step is held, which in the block nothing overwrites.
        going_on = (self._length > 0) & ((self._length < ring) | in_block)
        return (self._run == 1).sum(1) - going_on.long()

    def episodes(self) -> Iterator[Episode]:
        """The episodes that have ended and are held whole, on the CPU, env by env.

        One that was cut where the block of ``keep`` ends is two.
        """
        steps = torch.arange(1, self.longest() + 2, device=self.device)
        o, a = self.obs_dim, self.action_dim
        # Only steps that were acted on have a run, and its first one is overwritten first.
        for env, first in (self._run == 1).nonzero():
            row = self._moved(env, first, steps - 1)
            length = int((self._run[env, row] == steps).cumprod(0).sum())
            if self._length[env] > 0 and row[length] == self._cursor[env]:
                continue  # it goes on
            data = self._data[env, row[: length + 1]].cpu()
            rest = data[:-1]
            task = 0 if self._task is None else int(self._task[env, first])
            yield Episode(
                data[:, :o], rest[:, o : o + a], rest[:, o + a], rest[:, o + a + 1] > 0, task
            )

    def random_share(self) -> float:
        """Share of the transitions held that :meth:`add` was told are of random actions.

        NaN where there are none, and where a checkpoint of an older version did not say.
        """
        held = self._run > 0
        if self._random is None:
            return float("nan")
        return float((self._random & held).sum() / held.sum())

    def __len__(self) -> int:
        """Number of transitions held."""
        return int((self._run > 0).sum())

    def state_dict(self) -> dict[str, Any]:
        """The contents, without the rows that were never written."""
        used = int((self._run.amax(0) > 0).nonzero().amax()) + 2 if len(self) else 0
        used = min(used, self.rows)
        # The observation after the step before a block is on the block's other side.
        before = (self._block - 1) % self.rows
        acted = self._run[self._env_index, before] > 0
        used = max(used, int(torch.where(acted, self._following(before) + 1, 0).amax()))
        return {
            "shape": [self.num_envs, self.rows, self.obs_dim, self.action_dim, self.horizon],
            "data": self._data[:, :used].clone(),
            "run": self._run[:, :used].clone(),
            "cursor": self._cursor.clone(),
            "length": self._length.clone(),
            "block": self._block.clone(),
            "keep": [self._asked, self._keep],
            "random": None if self._random is None else self._random[:, :used].clone(),
            "task": None if self._task is None else self._task[:, :used].clone(),
        }

    @staticmethod
    def joined(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The saved states of replays of some envs each as that of one of all, in their order."""
        used = max(state["data"].shape[1] for state in states)

        def rows(key: str) -> Tensor | None:
            parts = [state[key] for state in states]
            if parts[0] is None:
                return None
            filled = []
            for part in parts:
                if part.dim() > 1:  # [N, used, ...]
                    missing = part.new_zeros((len(part), used - part.shape[1], *part.shape[2:]))
                    part = torch.cat((part, missing), 1)
                filled.append(part)
            return torch.cat(filled)

        first = states[0]
        num_envs = sum(state["shape"][0] for state in states)
        parts = {key: rows(key) for key in OF_ENVS}
        return {"shape": [num_envs, *first["shape"][1:]], "keep": first["keep"], **parts}

    @staticmethod
    def part(state: dict[str, Any], envs: slice) -> dict[str, Any]:
        """Of a saved state that of some envs."""
        num_envs = len(range(*envs.indices(state["shape"][0])))
        parts = {key: state[key][envs] for key in OF_ENVS if state.get(key) is not None}
        return {**state, "shape": [num_envs, *state["shape"][1:]], **parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the contents of :meth:`state_dict`.

        Raises:
            ValueError: they are of other envs, observations, actions, capacity or horizon, or of
                blocks of other sizes.
        """
        shape = [self.num_envs, self.rows, self.obs_dim, self.action_dim, self.horizon]
        if list(state["shape"]) != shape:
            raise ValueError(
                "the saved replay has [envs, rows, obs, action, horizon] = "
                f"{list(state['shape'])}, this run needs {shape}"
            )
        asked, kept = state.get("keep", (0, 0))  # older versions kept none, and did not say
        if asked != self._asked:
            raise ValueError(
                f"the saved replay was made to keep {asked} rows of each env's random transitions, "
                f"alg.keep_random and alg.random_epochs of this run ask for {self._asked}"
            )
        task = state.get("task")
        if (task is None) != (self._task is None):
            raise ValueError(
                f"the saved replay is of {'one task' if task is None else 'several tasks'}, "
                f"alg.world_model.num_tasks of this run is {self._num_tasks}"
            )
        if task is not None and task.numel() and int(task.amax()) >= self._num_tasks:
            raise ValueError(
                f"the saved replay has a task number {int(task.amax())}, "
                f"alg.world_model.num_tasks of this run is {self._num_tasks}"
            )
        self._keep = kept
        used = state["data"].shape[1]
        self._data.zero_()
        self._run.zero_()
        self._data[:, :used] = state["data"].to(self.device)
        self._run[:, :used] = state["run"].to(self.device)
        self._random = None
        random = state.get("random")
        if random is not None:
            self._random = torch.zeros_like(self._run, dtype=torch.bool)
            self._random[:, :used] = random.to(self.device)
        if self._task is not None and task is not None:
            self._task.zero_()
            self._task[:, :used] = task.to(self.device)
        self._block.copy_(state.get("block", torch.zeros_like(self._block)))
        self._cursor.copy_(state["cursor"])
        self._length.copy_(state["length"])
        self._window_cdf = self._row_cdf = None

    def _window_ends(self) -> Tensor:
        """Where a window may end, ``[N, T]``.

        A run of H transitions ends there, and none of them has been overwritten: a new episode that
        wraps around the ring eats the oldest rows from the front.
        """
        ends = self._run >= self.horizon
        row = torch.arange(self.rows, device=self.device)
        ring = self.rows - self._keep
        place, cursor = self._place(row.expand_as(ends)), self._place(self._cursor.unsqueeze(-1))
        # Rows between the cursor and a row, walking backwards. The row at the cursor is the oldest;
        # within an episode it is already overwritten by the tentative next observation.
        age = (cursor - place - 1) % ring
        intact = ring - (self._length > 0).int().unsqueeze(-1)
        whole = age + self.horizon <= intact
        if self._keep:
            # What is in the block stays, and while it is filled the ring does not change.
            whole |= (place >= ring) | (cursor >= ring)
        return ends & whole

    def _place(self, row: Tensor) -> Tensor:
        """Numbers of rows ``[N, n]`` counted from the ring's first; the block's come last."""
        if not self._keep:
            return row
        return (row - self._block.unsqueeze(-1) - self._keep) % self.rows

    def _following(self, row: Tensor) -> Tensor:
        """The row ``[N]`` after each: from the ring's last to its first, past the block."""
        following = (row + 1) % self.rows
        if not self._keep:
            return following
        first = (self._block + self._keep) % self.rows
        return torch.where(following == self._block, first, following)

    def _moved(self, env: Tensor, end: Tensor, offsets: Tensor) -> Tensor:
        """Rows ``[H+1, B]`` of the windows whose last transition is in ``end [B]``."""
        if not self._keep:
            return (end + offsets) % self.rows
        first, ring = self._block[env] + self._keep, self.rows - self._keep
        place = (end - first) % self.rows
        moved = torch.where(place >= ring, place + offsets, (place + offsets) % ring)
        return (moved + first) % self.rows

    def _cut(self) -> None:
        """Where the next step would stand in a block's last row, begin anew behind the block.

        The last row holds the observation after the block's last step, or nothing.
        """
        if not self._keep:
            return
        first = (self._block + self._keep) % self.rows
        cut = self._cursor == (first - 1) % self.rows
        self._cursor = torch.where(cut, first, self._cursor)
        self._length.masked_fill_(cut, 0)

    def _draw(self, cdf: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        """Indices of n set entries of the mask whose running sum is ``cdf``, uniformly."""
        total = cdf[-1]
        # float64: float32 cannot tell the entries of a large ring apart.
        u = torch.rand(n, dtype=torch.float64, device=self.device, generator=generator)
        rank = (u * total).long().clamp_max(total - 1)
        return torch.searchsorted(cdf, rank + 1)
