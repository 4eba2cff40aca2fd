"""Replay against a plain list of what was recorded: each ring holds the newest T records."""

from __future__ import annotations

import random
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pwm_fast.replay import Episode, Replay, Windows
from tests.agent.no_sync import no_sync

OBS, ACTION = 4, 2
Key = tuple[int, int, int]  # env, episode, first step


class Record(NamedTuple):
    """A row as the docstring of Replay describes it: a transition, or where an episode ended."""

    episode: int
    step: int
    acted: bool


class Recorder:
    """Feeds a replay with episodes whose observations say where they come from.

    An observation is ``[env, episode, step, is_terminal]``; the action, reward and flag of a
    transition are computed from its numbers.
    """

    keep = 0  # rows of a block

    def __init__(self, replay: Replay, seed: int, done: float, *, terminal: float = 0.5) -> None:
        self.replay, self.random = replay, random.Random(seed)
        self.done_probability, self.terminal = done, terminal
        num_envs = replay.num_envs
        self.episode, self.step = [0] * num_envs, [0] * num_envs
        self.logs: list[list[Record]] = [[] for _ in range(num_envs)]
        self.ended_terminal: dict[tuple[int, int], bool] = {}

    def add(self) -> None:
        num_envs = self.replay.num_envs
        obs = torch.tensor(
            [[n, self.episode[n], self.step[n], 0] for n in range(num_envs)], dtype=torch.float32
        )
        final = obs.clone()
        final[:, 2] += 1
        done = torch.zeros(num_envs, dtype=torch.bool)
        terminated = torch.zeros(num_envs, dtype=torch.bool)
        for n in range(num_envs):
            if self.random.random() < self.done_probability:
                done[n] = True
                terminated[n] = self.random.random() < self.terminal
        final[done, 3] = 1
        self.replay.add(obs, action_of(obs), reward_of(obs), terminated, done, final)
        for n in range(num_envs):
            self.logs[n].append(Record(self.episode[n], self.step[n], True))
            self.step[n] += 1
            if done[n]:
                self.logs[n].append(Record(self.episode[n], self.step[n], False))
                self.ended_terminal[n, self.episode[n]] = bool(terminated[n])
                self.episode[n] += 1
                self.step[n] = 0

    def end_episodes(self) -> None:
        self.replay.end_episodes()
        for n, step in enumerate(self.step):
            if step > 0:
                self.logs[n].append(Record(self.episode[n], step, False))
                self.episode[n] += 1
                self.step[n] = 0

    def held(self) -> Iterator[tuple[int, list[Record]]]:
        """Records in each ring, oldest first: the newest T of them."""
        for n, log in enumerate(self.logs):
            records = list(log)
            if records and records[-1].acted:  # the next observation already has its row
                records.append(Record(self.episode[n], self.step[n], False))
            yield n, records[-self.replay.rows :]

    def windows(self) -> set[Key]:
        """Every window of H transitions: H + 1 records of one episode, one after another."""
        h = self.replay.horizon
        found = set()
        for n, records in self.held():
            for i in range(len(records) - h):
                window = records[i : i + h + 1]
                if all(r.episode == window[0].episode for r in window):
                    found.add((n, window[0].episode, window[0].step))
        return found

    def whole(self) -> dict[Key, int]:
        """Steps of what is held from its first step to where it ended; a block's end cuts in two.

        By that first step.
        """
        found: dict[Key, int] = {}
        cut: dict[int, Record] = {}
        for n, records in self.held():
            behind_block, first, begins = cut.get(n), None, True
            for r in records:
                if begins and r.acted:
                    goes_on = behind_block == Record(r.episode, r.step, False)
                    first = r if r.step == 0 or goes_on else None
                begins = not r.acted
                going_on = r == Record(self.episode[n], self.step[n], False)
                full = len(records) == self.keep and r is records[-1] and behind_block is None
                if begins and first is not None and (full or not going_on):
                    found[n, first.episode, first.step] = r.step - first.step
            if records:
                cut[n] = records[-1]
        return found

    def acted_on(self) -> set[Key]:
        return {(n, r.episode, r.step) for n, records in self.held() for r in records if r.acted}


def action_of(obs: Tensor) -> Tensor:
    return torch.stack((obs[..., 0] - obs[..., 2], obs[..., 1] + 0.5 * obs[..., 2]), dim=-1)


def reward_of(obs: Tensor) -> Tensor:
    return 100.0 * obs[..., 0] + 10.0 * obs[..., 1] + obs[..., 2]


def check(windows: Windows, recorder: Recorder) -> Counter[Key]:
    """Every window is H consecutive transitions of one episode; returns how often each came."""
    h = recorder.replay.horizon
    batch = windows.action.shape[1]
    assert windows.obs.shape == (h + 1, batch, OBS)
    assert windows.action.shape == (h, batch, ACTION)
    assert windows.reward.shape == windows.terminated.shape == (h, batch)
    for t in range(1, h + 1):
        assert torch.equal(windows.obs[t, :, :2], windows.obs[0, :, :2]), "crosses an episode's end"
        assert torch.equal(windows.obs[t, :, 2], windows.obs[0, :, 2] + t), "is not consecutive"
    assert windows.obs[:-1, :, 3].eq(0).all(), "a terminal observation is acted upon"
    assert torch.equal(windows.action, action_of(windows.obs[:-1]))
    assert torch.equal(windows.reward, reward_of(windows.obs[:-1]))
    assert windows.terminated[:-1].eq(0).all()
    for b in range(batch):
        env, episode, _, last = windows.obs[-1, b].int().tolist()
        terminal = bool(last) and recorder.ended_terminal[env, episode]
        assert windows.terminated[-1, b].item() == float(terminal)
    return Counter(tuple(row) for row in windows.obs[0, :, :3].int().tolist())


def uniform(counts: Counter[Key], expected: set[Key]) -> None:
    """All of the expected, nothing else, and no choice preferred (chi-square, six deviations)."""
    assert set(counts) == expected
    mean = sum(counts.values()) / len(expected)
    chi2 = sum((n - mean) ** 2 / mean for n in counts.values())
    freedom = len(expected) - 1
    assert chi2 <= freedom + 6 * (2 * freedom) ** 0.5 + 6


CASES = [  # envs, rows, horizon, probability of an episode's end
    (1, 5, 3, 0.0),
    (2, 9, 3, 0.15),
    (3, 20, 4, 0.1),
    (3, 17, 1, 0.5),
    (2, 12, 2, 1.0),
    (2, 31, 6, 0.05),
]


@pytest.mark.parametrize(("num_envs", "rows", "horizon", "done"), CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_windows_are_exactly_those_held(
    num_envs: int, rows: int, horizon: int, done: float, seed: int
) -> None:
    """Five times round the ring: the count is exact, and no sampled window is a wrong one."""
    replay = Replay(num_envs * rows, num_envs, OBS, ACTION, horizon)
    recorder = Recorder(replay, seed, done)
    seen_terminal = 0
    for _ in range(5 * rows):
        recorder.add()
        expected = recorder.windows()
        assert replay.num_windows() == len(expected)
        assert len(replay) == len(recorder.acted_on())
        if expected:
            windows = replay.sample(16)
            assert set(check(windows, recorder)) <= expected
            seen_terminal += int(windows.obs[-1, :, 3].sum())
    assert (seen_terminal > 0) == (done > 0 and (done < 1 or horizon == 1))


@pytest.mark.parametrize(("num_envs", "rows", "horizon", "done"), CASES)
def test_episodes_that_are_ended_from_outside(
    num_envs: int, rows: int, horizon: int, done: float
) -> None:
    """At any step: windows stay those of single episodes, and no step that was held is lost."""
    replay = Replay(num_envs * rows, num_envs, OBS, ACTION, horizon)
    recorder = Recorder(replay, 7, done)
    for _ in range(4 * rows):
        if recorder.random.random() < 0.2:
            before = recorder.windows(), len(replay)
            recorder.end_episodes()
            assert before[0] <= recorder.windows() and before[1] == len(replay)
        else:
            recorder.add()
        expected = recorder.windows()
        assert replay.num_windows() == len(expected)
        if expected:
            assert set(check(replay.sample(16), recorder)) <= expected
        held = {n: records for n, records in recorder.held()}
        acted = [r.step + 1 for records in held.values() for r in records if r.acted]
        assert replay.longest() == max(acted, default=0)
        begun = [{r.episode for r in held[n] if r.acted and r.step == 0} for n in held]
        ended = [len(begun[n] - {recorder.episode[n]}) for n in held]
        assert replay.ended().tolist() == ended


@pytest.mark.parametrize(("num_envs", "rows", "horizon", "done"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_episodes_are_those_that_ended_and_are_held_whole(
    num_envs: int, rows: int, horizon: int, done: float, seed: int
) -> None:
    """Five times round the ring, some ended from outside."""
    replay = Replay(num_envs * rows, num_envs, OBS, ACTION, horizon)
    recorder = Recorder(replay, seed, done)
    found = 0
    for step in range(5 * rows):
        recorder.end_episodes() if step % 4 == 3 else recorder.add()
        found += check_episodes(replay, recorder)
    assert found > 0


def check_episodes(replay: Replay, recorder: Recorder) -> int:
    """All that are held whole and no other, here and after a checkpoint; how many they are."""
    expected = recorder.whole()
    episodes = list(replay.episodes())
    first = {check_episode(e, recorder): len(e.action) for e in episodes}
    assert first == expected and len(episodes) == len(expected)
    restored = Replay(
        replay.num_envs * replay.rows,
        replay.num_envs,
        OBS,
        ACTION,
        replay.horizon,
        keep=recorder.keep,
    )
    restored.load_state_dict(replay.state_dict())
    for ours, theirs in zip(restored.episodes(), episodes, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(ours[:4], theirs[:4], strict=True))
    return len(episodes)


def check_episode(episode: Episode, recorder: Recorder) -> Key:
    """Steps of one episode, one after another, as they were added; the first one."""
    steps = len(episode.action)
    first, before = episode.obs[0], episode.obs[:-1]
    assert episode.obs.shape == (steps + 1, OBS)
    assert torch.equal(episode.obs[:, :2], first[:2].expand(steps + 1, 2))
    assert torch.equal(episode.obs[:, 2], first[2] + torch.arange(steps + 1.0))
    assert torch.equal(episode.action, action_of(before))
    assert torch.equal(episode.reward, reward_of(before))
    env, number, step = first[:3].int().tolist()
    terminal = bool(episode.obs[-1, 3]) and recorder.ended_terminal[env, number]
    assert episode.terminated.dtype == torch.bool
    assert episode.terminated.tolist() == [False] * (steps - 1) + [terminal]
    return env, number, step


@pytest.mark.parametrize("added", [9, 40, 111])
def test_every_window_is_sampled_and_uniformly(added: int) -> None:
    """Before, at and long after the first time round the ring."""
    replay = Replay(3 * 30, 3, OBS, ACTION, 4)
    recorder = Recorder(replay, added, 0.12)
    for _ in range(added):
        recorder.add()
    expected = recorder.windows()
    assert len(expected) > 5
    uniform(check(replay.sample(300 * len(expected)), recorder), expected)


@pytest.mark.parametrize("added", [1, 9, 111])
def test_starts_are_every_row_acted_upon_and_uniformly(added: int) -> None:
    """Terminal observations, and the tentative next one, are no starts for imagination."""
    replay = Replay(3 * 30, 3, OBS, ACTION, 4)
    recorder = Recorder(replay, added, 0.2)
    for _ in range(added):
        recorder.add()
    expected = recorder.acted_on()
    obs = replay.sample_starts(300 * len(expected)).obs
    assert obs[:, 3].eq(0).all()
    uniform(Counter(tuple(row) for row in obs[:, :3].int().tolist()), expected)


def test_terminal_observation_ends_a_window() -> None:
    """One episode of exactly H steps: its only window ends on its ``final_obs``."""
    replay = Replay(20, 1, OBS, ACTION, 3)
    for t in range(3):
        obs = torch.full((1, OBS), float(t))
        done = torch.tensor([t == 2])
        final = torch.full((1, OBS), 77.0 if t == 2 else t + 1.0)
        replay.add(obs, torch.zeros(1, ACTION), torch.zeros(1), done, done, final)
    replay.add(  # the next episode starts elsewhere
        torch.full((1, OBS), -5.0),
        torch.zeros(1, ACTION),
        torch.zeros(1),
        torch.tensor([False]),
        torch.tensor([False]),
        torch.full((1, OBS), -6.0),
    )
    assert replay.num_windows() == 1
    windows = replay.sample(5)
    assert windows.obs[:, :, 0].tolist() == [[0.0] * 5, [1.0] * 5, [2.0] * 5, [77.0] * 5]
    assert windows.terminated.tolist() == [[0.0] * 5, [0.0] * 5, [1.0] * 5]


def test_truncation_ends_a_window_without_a_terminal_flag() -> None:
    replay = Replay(20, 1, OBS, ACTION, 1)
    recorder = Recorder(replay, 0, 1.0, terminal=0.0)
    recorder.add()
    windows = replay.sample(4)
    assert windows.obs[-1, :, 3].eq(1).all()
    assert windows.terminated.eq(0).all()


def test_generator_decides_what_is_sampled() -> None:
    replay = Replay(200, 2, OBS, ACTION, 3)
    recorder = Recorder(replay, 0, 0.1)
    for _ in range(60):
        recorder.add()

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return replay.sample(20, generator).obs, replay.sample_starts(20, generator).obs

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_too_small_a_capacity_is_refused() -> None:
    """H + 2 rows for each env are the least; the message names the key and what would do."""
    Replay(4 * 6, 4, OBS, ACTION, 4)
    message = r"alg.replay_capacity=23 leaves 5 rows for each of 4 envs.* needs 6: at least 24"
    with pytest.raises(ValueError, match=message):
        Replay(23, 4, OBS, ACTION, 4)


def follow(replay: Replay, other: Replay) -> None:
    """From now on the other one gets what this one gets."""
    original = replay.add

    def add_to_both(*args: Tensor, **options: bool) -> None:
        original(*args, **options)
        other.add(*args, **options)

    replay.add = add_to_both  # type: ignore[method-assign]


def same_contents(a: Replay, b: Replay) -> None:
    for name in ("_data", "_run", "_cursor", "_length", "_random"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("added", [0, 1, 7, 14, 15, 16, 60])
@pytest.mark.parametrize("done", [0.0, 0.3, 1.0])
def test_restored_replay_continues_to_the_bit(added: int, done: float, tmp_path: Path) -> None:
    """Through a file; partly filled, just full, and wrapped; then the same steps and samples."""
    replay = Replay(2 * 16, 2, OBS, ACTION, 2)
    recorder = Recorder(replay, added, done)
    for _ in range(added):
        recorder.add()
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    state = torch.load(tmp_path / "replay.pt", weights_only=True)
    restored = Replay(2 * 16, 2, OBS, ACTION, 2)
    Recorder(restored, 99, 0.2).add()  # what it held before is gone
    restored.load_state_dict(state)
    same_contents(restored, replay)
    # The restored one gets what the first one gets.
    follow(replay, restored)
    for _ in range(20):
        recorder.add()
        same_contents(restored, replay)
    if replay.num_windows():
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        a, b = replay.sample(30, generators[0]), restored.sample(30, generators[1])
        assert all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))


def test_saved_state_holds_only_rows_that_were_written() -> None:
    """A checkpoint early in a run does not hold a million empty rows."""
    replay = Replay(2 * 1000, 2, OBS, ACTION, 2)
    recorder = Recorder(replay, 0, 0.0)
    for _ in range(10):
        recorder.add()
    assert replay.state_dict()["data"].shape == (2, 11, OBS + ACTION + 2)


def test_saved_state_is_independent_of_the_replay() -> None:
    """Neither going on nor loading changes a state; two replays may load the same one."""
    replay = Replay(40, 2, OBS, ACTION, 2)
    recorder = Recorder(replay, 0, 0.2)
    for _ in range(12):
        recorder.add()
    state = replay.state_dict()
    copies = [Replay(40, 2, OBS, ACTION, 2) for _ in range(2)]
    copies[0].load_state_dict(state)
    recorder.add()
    recorder.replay = copies[0]
    recorder.add()
    copies[1].load_state_dict(state)
    assert copies[1].num_windows() > 0
    assert torch.equal(copies[1]._cursor, state["cursor"])
    assert not torch.equal(copies[0]._cursor, copies[1]._cursor)
    assert not torch.equal(copies[0]._length, copies[1]._length)


def test_state_of_another_run_is_refused() -> None:
    state = Replay(40, 2, OBS, ACTION, 3).state_dict()
    for other in (
        Replay(44, 2, OBS, ACTION, 3),
        Replay(40, 1, OBS, ACTION, 3),
        Replay(40, 2, OBS + 1, ACTION, 3),
        Replay(40, 2, OBS, ACTION, 4),
    ):
        with pytest.raises(ValueError, match=r"\[2, 20, 4, 2, 3\], this run needs \["):
            other.load_state_dict(state)


def run_without_sync(device: str, keep: int = 0) -> None:
    replay = Replay(40, 2, OBS, ACTION, 3, device, keep=keep)
    generator = torch.Generator(device)

    def tensors(on: str) -> list[Tensor]:
        values = [torch.rand(2, n, device=on) for n in (OBS, ACTION, 1)]
        flag = torch.zeros(2, dtype=torch.bool, device=on)
        return [values[0], values[1], values[2][:, 0], flag, flag, torch.rand(2, OBS, device=on)]

    steps = [tensors(device) for _ in range(30)]
    with no_sync(device) as mode:
        for step in steps:
            replay.add(*step)
        windows = replay.sample(64, generator)
        obs = replay.sample_starts(64, generator).obs
    assert mode.operators > 100
    assert windows.obs.device.type == obs.device.type == torch.device(device).type


@pytest.mark.parametrize("keep", [0, 6])
def test_adding_and_sampling_never_wait_for_the_device(keep: int) -> None:
    run_without_sync("cpu", keep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_adding_and_sampling_never_wait_for_the_gpu() -> None:
    for keep in (0, 6):
        run_without_sync("cuda", keep)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_envs_on_the_cpu_and_policy_and_replay_on_the_gpu() -> None:
    """Observations come from the environment's device, actions from the policy's."""
    replay = Replay(40, 2, OBS, ACTION, 1, "cuda")
    flag = torch.zeros(2, dtype=torch.bool)
    for _ in range(3):
        obs = torch.rand(2, OBS)
        replay.add(obs, torch.rand(2, ACTION, device="cuda"), obs[:, 0], flag, flag, obs)
    assert replay.sample(4).obs.device.type == "cuda"


# Whole episodes


def load(recorder: Recorder, lengths: list[int]) -> list[Episode]:
    """Whole episodes of these lengths, in the replay and in the recorder's logs."""
    replay, used = recorder.replay, [0] * recorder.replay.num_envs
    episodes = []
    for length in lengths:
        n = min(range(len(used)), key=lambda env: (used[env], env))
        used[n] += length + 1
        episode = recorder.episode[n]
        obs = torch.tensor([[n, episode, t, 0] for t in range(length + 1)], dtype=torch.float32)
        obs[-1, 3] = 1
        terminated = torch.zeros(length, dtype=torch.bool)
        terminated[-1] = recorder.random.random() < recorder.terminal
        before = obs[:-1]
        episodes.append(Episode(obs, action_of(before), reward_of(before), terminated))
        recorder.logs[n] += [Record(episode, t, t < length) for t in range(length + 1)]
        recorder.ended_terminal[n, episode] = bool(terminated[-1])
        recorder.episode[n] += 1
    replay.add_episodes(episodes)
    return episodes


@pytest.mark.parametrize(
    ("num_envs", "rows", "lengths", "steps"),
    [
        (1, 12, [3, 5], 0),
        (1, 12, [11], 0),  # the ring is just full
        (1, 12, [11], 40),
        (1, 12, [3, 3, 3], 7),
        (3, 15, [1, 2, 3, 4, 5, 6, 7], 0),
        (3, 15, [1, 2, 3, 4, 5, 6, 7], 5),
        (3, 15, [1, 2, 3, 4, 5, 6, 7], 60),  # the ring comes round and overwrites them
        (4, 30, [9], 13),
        (2, 9, [], 11),
    ],
)
@pytest.mark.parametrize("horizon", [1, 3])
def test_whole_episodes(
    num_envs: int, rows: int, lengths: list[int], steps: int, horizon: int
) -> None:
    replay = Replay(rows * num_envs, num_envs, OBS, ACTION, horizon)
    recorder = Recorder(replay, seed=0, done=0.2)
    load(recorder, lengths)
    for step in range(steps + 1):
        assert replay.num_windows() == len(recorder.windows())
        assert len(replay) == len(recorder.acted_on())
        if step < steps:
            recorder.add()
    if recorder.windows():
        counts = Counter[Key]()
        for _ in range(20):
            counts += check(replay.sample(200), recorder)
        uniform(counts, recorder.windows())
    drawn = replay.sample_starts(500).obs if len(replay) else torch.zeros(0, OBS)
    assert set(map(tuple, drawn[:, :3].int().tolist())) == recorder.acted_on()
    # And through a checkpoint.
    other = Replay(rows * num_envs, num_envs, OBS, ACTION, horizon)
    other.load_state_dict(replay.state_dict())
    assert other.num_windows() == replay.num_windows() and len(other) == len(replay)


def test_whole_episodes_are_those_that_steps_would_have_left() -> None:
    stepwise, whole = (Replay(40, 1, OBS, ACTION, 2) for _ in range(2))
    episodes = load(Recorder(whole, seed=1, done=0.0), [4, 1, 6])
    for episode in episodes:
        steps = len(episode.action)
        for t in range(steps):
            stepwise.add(
                episode.obs[t : t + 1],
                episode.action[t : t + 1],
                episode.reward[t : t + 1],
                episode.terminated[t : t + 1],
                torch.tensor([t == steps - 1]),
                episode.obs[t + 1 : t + 2],
            )
    ours, theirs = whole.state_dict(), stepwise.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in ("data", "run", "cursor", "length"))


def test_episodes_that_do_not_fit() -> None:
    replay = Replay(24, 2, OBS, ACTION, 2)
    recorder = Recorder(replay, seed=0, done=0.0)
    with pytest.raises(ValueError, match=r"3 episodes with 21 transitions.* at least 32 .* got 24"):
        load(recorder, [7, 7, 7])
    assert len(replay) == 0, "nothing of them is stored"
    load(Recorder(replay, seed=0, done=0.0), [7, 7])
    with pytest.raises(ValueError, match="into an empty replay; it holds 14 transitions"):
        replay.add_episodes([])


# A block that is kept


class KeepingRecorder(Recorder):
    """Two plain lists an env: the first ``keep`` rows of steps, and the newest of all others."""

    def __init__(self, replay: Replay, keep: int, seed: int, done: float) -> None:
        super().__init__(replay, seed, done)
        self.keep = keep
        self.loaded = [0] * replay.num_envs  # records of episodes that were there before

    def held(self) -> Iterator[tuple[int, list[Record]]]:
        for n, log in enumerate(self.logs):
            before, log = log[: self.loaded[n]], log[self.loaded[n] :]
            block: list[Record] = []
            end = 0
            for i, record in enumerate(log):
                if len(block) >= self.keep - 1:
                    break
                block.append(record)
                end = i + 1
                if len(block) == self.keep - 1 and record.acted:
                    # The last row has the observation behind it, whether the episode ends or not.
                    block.append(Record(record.episode, record.step + 1, False))
                    end += i + 1 < len(log) and not log[i + 1].acted
            ring, open_block = before + log[end:], len(block) < self.keep - 1
            for part in (block, ring) if not open_block else (block,):
                if part and part[-1].acted:
                    part.append(Record(self.episode[n], self.step[n], False))
            yield n, block
            yield n, ring[-(self.replay.rows - self.keep) :]


KEPT = [  # envs, rows, rows kept, horizon, probability of an episode's end
    (1, 12, 5, 3, 0.0),
    (2, 12, 5, 3, 0.3),
    (3, 20, 7, 2, 0.15),
    (2, 12, 6, 1, 1.0),
    (3, 17, 4, 1, 0.5),
]


@pytest.mark.parametrize(("num_envs", "rows", "keep", "horizon", "done"), KEPT)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_rows_are_kept(
    num_envs: int, rows: int, keep: int, horizon: int, done: float, seed: int
) -> None:
    """Five times round the ring: the block stays whole, and no window leads out of it."""
    replay = Replay(num_envs * rows, num_envs, OBS, ACTION, horizon, keep=keep)
    recorder = KeepingRecorder(replay, keep, seed, done)
    whole = 0
    for _ in range(5 * rows):
        recorder.add()
        expected = recorder.windows()
        assert replay.num_windows() == len(expected)
        assert len(replay) == len(recorder.acted_on())
        if expected:
            assert set(check(replay.sample(16), recorder)) <= expected
        whole += check_episodes(replay, recorder)
    assert whole > 0
    uniform(check(replay.sample(300 * len(expected)), recorder), expected)
    acted = recorder.acted_on()
    drawn = replay.sample_starts(300 * len(acted)).obs
    uniform(Counter(tuple(row) for row in drawn[:, :3].int().tolist()), acted)
    first = {(n, 0, step) for n in range(num_envs) for step in range(keep - 1)}
    assert done > 0 or first <= acted, "the first steps are there to the end"


@pytest.mark.parametrize("lengths", [[3], [2, 2, 1], [1, 2, 3, 1]])
def test_episodes_before_the_block_are_overwritten_as_ever(lengths: list[int]) -> None:
    replay = Replay(2 * 18, 2, OBS, ACTION, 2, keep=6)
    recorder = KeepingRecorder(replay, 6, 3, 0.2)
    load(recorder, lengths)
    recorder.loaded = [len(log) for log in recorder.logs]
    for _ in range(70):
        check_episodes(replay, recorder)
        expected = recorder.windows()
        assert replay.num_windows() == len(expected)
        assert len(replay) == len(recorder.acted_on())
        if expected:
            assert set(check(replay.sample(16), recorder)) <= expected
        recorder.add()
    assert any(episode < 4 for _, episode, _ in recorder.windows()), "the block"


def test_episodes_that_leave_no_room_for_the_block() -> None:
    replay = Replay(2 * 12, 2, OBS, ACTION, 2, keep=6)
    with pytest.raises(ValueError, match=r"beside the 6 rows of alg.keep_random.* at least 28 "):
        load(Recorder(replay, 0, 0.0), [7, 7])


def test_episodes_that_end_from_outside_beside_a_block() -> None:
    """As where a resumed run's envs begin anew."""
    replay = Replay(2 * 14, 2, OBS, ACTION, 2, keep=6)
    recorder = KeepingRecorder(replay, 6, 5, 0.1)
    for _ in range(60):
        if recorder.random.random() < 0.3:
            recorder.end_episodes()
        else:
            recorder.add()
        check_episodes(replay, recorder)
        expected = recorder.windows()
        assert replay.num_windows() == len(expected)
        if expected:
            assert set(check(replay.sample(16), recorder)) <= expected


def test_an_observation_behind_the_block_is_saved() -> None:
    """Where an episode ends in the row before the block, and nothing was acted on behind it."""
    replay = Replay(6, 1, OBS, ACTION, 1, keep=3)
    recorder = KeepingRecorder(replay, 3, 0, done=1.0)
    load(recorder, [1])
    recorder.loaded = [len(log) for log in recorder.logs]
    for _ in range(6):
        recorder.add()
        check_episodes(replay, recorder)


def test_an_open_episode_of_a_block_longer_than_the_ring_has_not_ended() -> None:
    replay = Replay(12, 1, OBS, ACTION, 1, keep=9)
    recorder = KeepingRecorder(replay, 9, 0, done=0.0)
    for _ in range(8):
        assert replay.ended().tolist() == [0]
        recorder.add()
    assert replay.ended().tolist() == [1], "the block's end"


@pytest.mark.parametrize("added", [0, 2, 5, 6, 14, 60])
def test_a_block_continues_to_the_bit(added: int, tmp_path: Path) -> None:
    replay, other = (Replay(2 * 14, 2, OBS, ACTION, 2, keep=6) for _ in range(2))
    recorder = KeepingRecorder(replay, 6, added, 0.2)
    for _ in range(added):
        recorder.add()
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    follow(replay, other)
    for _ in range(20):
        recorder.add()
        same_contents(other, replay)
        assert other.num_windows() == replay.num_windows() == len(recorder.windows())


def test_without_a_block_nothing_is_different() -> None:
    """A block that a run gave up is none: the same rows, windows and draws."""
    plain, given_up = Replay(40, 2, OBS, ACTION, 3), Replay(40, 2, OBS, ACTION, 3, keep=8)
    given_up.keep_at_most(4)  # no window of 3 steps
    recorders = [Recorder(replay, 4, 0.1) for replay in (plain, given_up)]
    for _ in range(50):
        for recorder in recorders:
            recorder.add()
        same_contents(plain, given_up)
    draws = [r.sample(30, torch.Generator().manual_seed(1))[:4] for r in (plain, given_up)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True))


def test_a_smaller_block() -> None:
    replay = Replay(40, 2, OBS, ACTION, 3, keep=9)
    replay.keep_at_most(6)
    recorder = KeepingRecorder(replay, 6, 4, 0.1)
    for _ in range(50):
        recorder.add()
        assert replay.num_windows() == len(recorder.windows())


def test_a_block_of_another_size_is_refused() -> None:
    state = Replay(40, 2, OBS, ACTION, 3, keep=8).state_dict()
    with pytest.raises(ValueError, match=r"made to keep 8 rows .* of this run ask for 0"):
        Replay(40, 2, OBS, ACTION, 3).load_state_dict(state)
    old = Replay(40, 2, OBS, ACTION, 3).state_dict()
    for key in ("keep", "block", "random"):
        del old[key]
    with pytest.raises(ValueError, match=r"made to keep 0 rows .* of this run ask for 8"):
        Replay(40, 2, OBS, ACTION, 3, keep=8).load_state_dict(old)


@pytest.mark.parametrize("keep", [1, 4, 16, 20])
def test_a_block_needs_a_window_in_it_and_beside_it(keep: int) -> None:
    with pytest.raises(ValueError, match=rf"{keep} of 20 rows .* cannot be kept: .* needs 5"):
        Replay(40, 2, OBS, ACTION, 3, keep=keep)


def steps_of(replay: Replay, count: int, *, random: bool) -> None:
    flag, obs = torch.zeros(2, dtype=torch.bool), torch.zeros(2, OBS)
    for _ in range(count):
        replay.add(obs, torch.zeros(2, ACTION), obs[:, 0], flag, flag, obs, random=random)


def test_the_share_of_random_transitions() -> None:
    """5 of 5, 5 of 9; in a ring of 10 rows the newest 9 steps and an observation are held."""
    replay = Replay(20, 2, OBS, ACTION, 2)
    assert replay.random_share() != replay.random_share(), "there are none: NaN"
    for count, is_random, share in ((5, True, 1.0), (4, False, 5 / 9), (3, False, 2 / 9)):
        steps_of(replay, count, random=is_random)
        assert replay.random_share() == pytest.approx(share)
    other = Replay(20, 2, OBS, ACTION, 2)
    state = replay.state_dict()
    other.load_state_dict(state)
    assert other.random_share() == pytest.approx(2 / 9)
    del state["random"]
    other.load_state_dict(state)  # of an older version
    steps_of(other, 1, random=False)
    assert other.random_share() != other.random_share() and other.state_dict()["random"] is None


def test_the_share_that_a_block_keeps() -> None:
    """5 steps and an observation are kept of 20 rows; 13 and an observation fit beside them."""
    replay = Replay(40, 2, OBS, ACTION, 2, keep=6)
    steps_of(replay, 8, random=True)
    steps_of(replay, 100, random=False)
    assert len(replay) == 2 * (5 + 13) and replay.random_share() == pytest.approx(5 / 18)


# Several tasks


def tasks_of_rows(obs: Tensor) -> Tensor:
    """The task's number, which :func:`several` writes into the first component."""
    return obs[..., 0].long()


def several(capacity: int = 60, num_envs: int = 3, keep: int = 0, steps: int = 40) -> Replay:
    """A replay of envs of which each changes its task with every episode of 4 steps."""
    replay = Replay(capacity, num_envs, 2, 1, 2, keep=keep, num_tasks=4)
    generator = torch.Generator().manual_seed(0)
    task = torch.zeros(num_envs, dtype=torch.int64)
    for t in range(steps):
        if t % 4 == 0:
            task = torch.randint(4, (num_envs,), generator=generator)
        obs = torch.stack((task.float(), torch.full((num_envs,), float(t))), -1)
        after = torch.stack((task.float(), torch.full((num_envs,), t + 1.0)), -1)
        none = torch.zeros(num_envs, dtype=torch.bool)
        done = torch.full((num_envs,), t % 4 == 3)
        replay.add(obs, obs[:, :1], obs[:, 0], none, done, after, task=task)
    return replay


@pytest.mark.parametrize("keep", [0, 7])
def test_the_task_goes_with_what_is_sampled(keep: int) -> None:
    """Also where rings have come round, and out of a kept block; and through a checkpoint."""
    replay = several(keep=keep)
    other = Replay(60, 3, 2, 1, 2, keep=keep, num_tasks=4)
    other.load_state_dict(replay.state_dict())
    for source in (replay, other):
        windows = source.sample(500)
        assert windows.task is not None and windows.task.dtype == torch.int64
        assert torch.equal(windows.task.expand(3, -1), tasks_of_rows(windows.obs))
        starts = source.sample_starts(500)
        assert starts.task is not None and torch.equal(starts.task, tasks_of_rows(starts.obs))
        assert len(starts.task.unique()) > 2
        episodes = list(source.episodes())
        assert all((tasks_of_rows(e.obs) == e.task).all() for e in episodes)
        assert len({e.task for e in episodes}) > 2


def test_one_task_has_no_numbers() -> None:
    replay = Replay(60, 3, OBS, ACTION, 2)
    recorder = Recorder(replay, seed=0, done=0.2)
    for _ in range(9):
        recorder.add()
    assert replay.sample(5).task is None and replay.sample_starts(5).task is None
    assert replay.state_dict()["task"] is None


def test_steps_of_several_tasks_want_their_numbers() -> None:
    replay, none = Replay(60, 3, 2, 1, 2, num_tasks=4), torch.zeros(3, dtype=torch.bool)
    with pytest.raises(ValueError, match="task must be the numbers of 4 tasks, got None"):
        replay.add(torch.ones(3, 2), torch.ones(3, 1), torch.ones(3), none, none, torch.ones(3, 2))
    assert len(replay) == 0


def test_episodes_of_several_tasks_are_streamed() -> None:
    """One at a time is asked for; each is where its task's number says."""
    replay = Replay(60, 2, 2, 1, 2, num_tasks=4)
    references: list[Any] = []

    def episodes() -> Iterator[Episode]:
        for task in (3, 1, 2, 3):
            assert sum(1 for ref in references if ref() is not None) <= 1
            obs = torch.stack((torch.full((6,), float(task)), torch.arange(6.0)), -1)
            references.append(weakref.ref(obs))
            yield Episode(obs, obs[:5, :1], obs[:5, 0], torch.zeros(5, dtype=torch.bool), task)
            del obs

    replay.add_episodes(episodes())
    assert len(references) == 4 and len(replay) == 20
    windows = replay.sample(300)
    assert windows.task is not None
    assert torch.equal(windows.task.expand(3, -1), tasks_of_rows(windows.obs))
    assert set(windows.task.tolist()) == {1, 2, 3}


@pytest.mark.parametrize("task", [-1, 4])
def test_episodes_of_unknown_tasks_are_refused(task: int) -> None:
    replay = Replay(60, 2, 2, 1, 2, num_tasks=4)
    obs = torch.ones(6, 2)
    episode = Episode(obs, obs[:5, :1], obs[:5, 0], torch.zeros(5, dtype=torch.bool))
    with pytest.raises(ValueError, match=f"episode 1 is of task {task}, .*num_tasks is 4"):
        replay.add_episodes([episode, episode._replace(task=task)])
    assert len(replay) == 0 and replay.num_windows() == 0


def test_a_step_of_several_tasks_needs_their_numbers() -> None:
    replay, flags = Replay(60, 2, 2, 1, 2, num_tasks=4), torch.zeros(2, dtype=torch.bool)
    obs = torch.ones(2, 2)
    with pytest.raises(ValueError, match="task must be the numbers of 4 tasks, got None"):
        replay.add(obs, obs[:, :1], obs[:, 0], flags, flags, obs)
    assert len(replay) == 0


def test_a_saved_replay_of_other_tasks_is_refused() -> None:
    replay = several()
    with pytest.raises(ValueError, match=r"is of several tasks, .*num_tasks of this run is 1"):
        Replay(60, 3, 2, 1, 2).load_state_dict(replay.state_dict())
    with pytest.raises(ValueError, match=r"has a task number 3, .*num_tasks of this run is 2"):
        Replay(60, 3, 2, 1, 2, num_tasks=2).load_state_dict(replay.state_dict())
    one = Replay(60, 3, 2, 1, 2)
    with pytest.raises(ValueError, match=r"is of one task, .*num_tasks of this run is 4"):
        several().load_state_dict(one.state_dict())


@pytest.mark.parametrize("keep", [0, 8])
def test_parts_of_a_saved_state_and_their_whole(keep: int) -> None:
    def filled(num_envs: int, steps: int) -> Replay:
        replay = Replay(20 * num_envs, num_envs, OBS, ACTION, 3, keep=keep)
        recorder = Recorder(replay, steps, 0.2)
        for _ in range(steps):
            recorder.add()
        return replay

    replays = [filled(2, 5), filled(1, 30)]  # the first has fewer rows that were written
    whole = Replay.joined([replay.state_dict() for replay in replays])
    taken = Replay(60, 3, OBS, ACTION, 3, keep=keep)
    taken.load_state_dict(whole)
    assert len(taken) == sum(map(len, replays)) and taken.ended().tolist() == [
        n for replay in replays for n in replay.ended().tolist()
    ]
    for envs, replay in ((slice(0, 2), replays[0]), (slice(2, 3), replays[1])):
        own = Replay(20 * replay.num_envs, replay.num_envs, OBS, ACTION, 3, keep=keep)
        own.load_state_dict(Replay.part(whole, envs))
        ours, theirs = own.state_dict(), replay.state_dict()
        for key in ("data", "run", "cursor", "length", "block", "random"):
            assert torch.equal(ours[key], theirs[key]), key
        draws = [r.sample(9, torch.Generator().manual_seed(0)).obs for r in (own, replay)]
        assert torch.equal(*draws)
