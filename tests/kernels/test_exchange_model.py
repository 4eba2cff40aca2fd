"""The persistent rollout's exchanges under adversarial timing and weak memory order, as a model.

What is modelled: G programs of a group; each publishes its slice of a board, adds to the counter,
waits for everybody, reads all slices, and goes on to the next board. A store may become visible at
any moment up to its program's next addition (the release), a load may happen at any moment between
the wait (the acquire) and the next addition; a scheduler picks at random whose turn it is. That the
device code publishes in this order, and reads each board only then, is seen in the interpreter.
What is not modelled: the GPU.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

# Boards of an evaluation, in order: statistics and activations of two layers forward; an adjoint
# and statistics of two layers backward, after the size of the first adjoint.
FORWARD = ("slots1", "board1", "slots2", "board2")
BACKWARD = ("board1", "slots2", "board2", "slots1")


def order(direction: str, evaluations: int) -> tuple[str, ...]:
    """The boards of a launch."""
    return FORWARD * evaluations if direction == "fwd" else ("slots1", *BACKWARD * evaluations)


class Group:
    """What the programs share."""

    def __init__(self, programs: int) -> None:
        self.programs = programs
        self.counter = 0
        self.memory: dict[tuple[str, int], int] = {}
        self.stale: list[str] = []


def program(group: Group, me: int, boards: Sequence[str], chance: random.Random) -> Iterator[bool]:
    """One program; yields after each action, False where it waits."""
    target = 0
    reads: list[tuple[str, int, int]] = []
    for number, board in enumerate(boards):
        # The store and the loads of the exchange before are in any order until the release.
        actions = [("store", board, me, number), *(("load", b, i, n) for b, i, n in reads)]
        chance.shuffle(actions)
        for kind, where, who, version in actions:
            if kind == "store":
                group.memory[where, who] = version
            elif group.memory.get((where, who)) != version:
                group.stale.append(f"{where}[{who}] in exchange {version}")
            yield True
        group.counter += 1
        target += group.programs
        while group.counter < target:
            yield False
        reads = [(board, i, number) for i in range(group.programs)]


def simulate(programs: int, boards: Sequence[str], seed: int) -> Group:
    """Run a group to its end under one random schedule.

    Raises:
        RuntimeError: all wait.
    """
    chance = random.Random(seed)
    group = Group(programs)
    running = [program(group, i, boards, chance) for i in range(programs)]
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
                if group.counter >= group.programs * len(boards):
                    waiting.clear()
                    continue
                raise RuntimeError("deadlock")
    return group


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("programs", range(2, 9))
def test_no_deadlock_and_nothing_stale(programs: int, direction: str) -> None:
    boards = order(direction, 4)
    for seed in range(20):
        group = simulate(programs, boards, seed)
        assert group.counter == programs * len(boards)
        assert not group.stale


def test_one_board_for_every_exchange_would_be_overwritten() -> None:
    """The model sees what the boards' alternation is for."""
    assert any(simulate(4, ("board",) * 4, seed).stale for seed in range(20))


def test_two_boards_are_enough() -> None:
    for seed in range(20):
        assert not simulate(5, ("a", "b") * 5, seed).stale


def test_one_program_too_few_is_a_deadlock() -> None:
    chance = random.Random(0)
    group = Group(3)
    running = [program(group, i, FORWARD, chance) for i in range(2)]
    for _ in range(100):
        went_on = [next(r) for r in running]
    assert went_on == [False, False]


# --- what the device code does ------------------------------------------------------------------


class Event(NamedTuple):
    """What one program did with the memory of the exchanges."""

    kind: str  # "store", "load", "add", "barrier"
    board: str = ""
    bypasses: bool = True  # a load that does not look into the multiprocessor's own cache


def record(monkeypatch: pytest.MonkeyPatch, direction: str, method: str) -> list[Event]:
    """The events of a launch of one program, whose group it is alone."""
    from triton._C.libtriton import ir
    from triton.runtime.interpreter import interpreter_builder as builder

    from pwm_fast.kernels import rollout
    from tests.kernels import rollout_truth as truth

    events: list[Event] = []
    where: dict[str, range] = {}
    launch = rollout.launch

    def recording(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        events.clear()
        where.clear()
        for name, x in zip(kernel.arg_names, args, strict=False):
            if name.removesuffix("_ptr") in FORWARD:
                begin = x.data_ptr()
                where[name.removesuffix("_ptr")] = range(begin, begin + x.nbytes)
        launch(kernel, grid, *args, **constants)

    def board_of(pointers: Any) -> str:
        first = int(pointers.data.flat[0])
        return next((name for name, memory in where.items() if first in memory), "")

    def spy(name: str, note: Any) -> None:
        real = getattr(builder, name)

        def noted(*args: Any) -> Any:
            event = note(*args)
            if event is not None:
                events.append(event)
            return real(*args)

        monkeypatch.setattr(builder, name, noted)

    def load(ptrs: Any, mask: Any, other: Any, modifier: Any, *rest: Any) -> Event | None:
        board = board_of(ptrs)
        return Event("load", board, modifier == ir.CACHE_MODIFIER.CG) if board else None

    def store(ptrs: Any, *rest: Any) -> Event | None:
        board = board_of(ptrs)
        return Event("store", board) if board else None

    def add(op: Any, ptr: Any, value: Any, *rest: Any) -> Event | None:
        return Event("add") if value.data.item() else None  # adding 0 is a look at the counter

    monkeypatch.setattr(rollout, "launch", recording)
    spy("create_masked_load", load)
    spy("create_masked_store", store)
    spy("create_atomic_rmw", add)
    spy("create_barrier", lambda: Event("barrier"))
    scheme = rollout.Scheme(method, 2, 50, tf32=False)
    problem = truth.problem(scheme, 5, 2)
    net, layout = truth.network(problem, 64, torch.float16), rollout.Plan(8, 64, 4, 2)
    p, c, g, lp = (truth.pad(x.float(), 64) for x in problem[2:])
    saved, adjoints = truth.buffers(problem, 64, torch.float16)
    rollout.rollout_forward(p, c, net, scheme, layout, saved=saved)
    if direction == "bwd":
        rollout.rollout_backward(g, lp, net, scheme, layout, saved, adjoints=adjoints)
    return events


@pytest.mark.interpreted
@pytest.mark.parametrize("method", ["heun", "euler"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_the_device_code_is_what_is_modelled(
    direction: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    published: list[str] = []
    stored: set[str] = set()
    since: list[str] = []
    for event in record(monkeypatch, direction, method):
        if event.kind == "store":
            stored.add(event.board)
            since.append("store")
        elif event.kind == "load":
            # Only what the exchange just before was about, and never from a cache of its own.
            assert event.board == published[-1] and event.bypasses
            assert event.board not in stored
            since.append("load")
        elif event.kind == "barrier":
            since.clear()
        else:
            assert not since  # all threads are done before one of them says so
            (board,) = stored
            published.append(board)
            stored.clear()
    evaluations = 2 * 2 * (2 if method == "heun" else 1)
    assert tuple(published) == order(direction, evaluations)
