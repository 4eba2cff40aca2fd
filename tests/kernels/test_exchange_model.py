"""The persistent rollout's exchanges under adversarial timing and weak memory order, as a model.

What is modelled: G programs of a group; each publishes its slice of a board, adds to the counter,
waits for everybody, reads all slices, and goes on to the next board. A store may become visible at
any moment up to its program's next addition (the release), a load may happen at any moment between
the wait (the acquire) and the next addition; a scheduler picks at random whose turn it is. What is
not modelled: the kernels' own code, which test_rollout.py runs in processes, and the GPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

# Boards of an evaluation, in order: statistics and activations of two layers (forward), or an
# adjoint and statistics of two (backward).
BOARDS = ("slots1", "board1", "slots2", "board2")


class Group:
    """What the programs share."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.counter = 0
        self.memory: dict[tuple[str, int], int] = {}
        self.stale: list[str] = []


def program(
    group: Group, me: int, boards: Sequence[str], rounds: int, chance: random.Random
) -> Iterator[bool]:
    """One program; yields after each action, False where it waits."""
    target = 0
    reads: list[tuple[str, int, int]] = []
    for number in range(rounds):
        for board in boards:
            # The store and the loads of the exchange before are in any order until the release.
            actions = [("store", board, me, number), *(("load", b, i, n) for b, i, n in reads)]
            chance.shuffle(actions)
            for kind, where, who, version in actions:
                if kind == "store":
                    group.memory[where, who] = version
                elif group.memory.get((where, who)) != version:
                    group.stale.append(f"{where}[{who}] in round {version}")
                yield True
            group.counter += 1
            target += group.programs
            while group.counter < target:
                yield False
            reads = [(board, i, number) for i in range(group.programs)]


def simulate(programs: int, boards: Sequence[str], rounds: int, seed: int) -> Group:
    """Run a group to its end under one random schedule.

    Raises:
        RuntimeError: all wait.
    """
    chance = random.Random(seed)
    group = Group(programs)
    running = [program(group, i, boards, rounds, chance) for i in range(programs)]
    waiting: set[int] = set()
    # Some programs are much slower than others.
    speed = [chance.choice((1, 1, 20)) for _ in range(programs)]
    alive = list(range(programs))
    while alive:
        i = chance.choices(alive, [speed[j] for j in alive])[0]
        try:
            went_on = next(running[i])
        except StopIteration:
            alive.remove(i)
            waiting.clear()
            continue
        if went_on:
            waiting.clear()
        else:
            waiting.add(i)
            if len(waiting) == len(alive):
                # All were asked since anything last happened.
                if group.counter >= group.programs * rounds * len(boards):
                    waiting.clear()
                    continue
                raise RuntimeError("deadlock")
    return group


@pytest.mark.parametrize("programs", range(2, 9))
def test_no_deadlock_and_nothing_stale(programs: int) -> None:
    for seed in range(20):
        group = simulate(programs, BOARDS, 4, seed)
        assert group.counter == programs * 4 * len(BOARDS)
        assert not group.stale


def test_one_board_for_every_exchange_would_be_overwritten() -> None:
    """The model sees what the boards' alternation is for."""
    assert any(simulate(4, ("board",), 4, seed).stale for seed in range(20))


def test_two_boards_are_enough() -> None:
    for seed in range(20):
        assert not simulate(5, ("a", "b"), 5, seed).stale


def test_one_program_too_few_is_a_deadlock() -> None:
    chance = random.Random(0)
    group = Group(3)
    running = [program(group, i, BOARDS, 1, chance) for i in range(2)]
    for _ in range(100):
        went_on = [next(r) for r in running]
    assert went_on == [False, False]
