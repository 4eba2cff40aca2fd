"""The persistent rollout's exchanges under adversarial timing and weak memory order, as a model.

What is modelled: G programs of a group; each publishes its slice of a board, waits for everybody,
reads all slices, and goes on to the next board. A scheduler picks at random whose turn it is.

With flags a program adds to a counter between its store and its waiting. A store may become visible
at any moment up to the addition (the release), a load may happen at any moment between the wait
(the acquire) and the next addition.

With words nothing orders anything but what a program knows. A store becomes visible at any later
moment, even after stores that follow it; loads happen in any order, and again and again; only that
a program goes on when every word it has loaded carries the epoch of the meeting.

That the device code publishes in this order, and reads each board only then, is seen in the
interpreter. What is not modelled: the GPU.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch

# Boards of an evaluation, in order: statistics and activations of two layers forward; a gradient
# and statistics of two layers backward, after the size of the first gradient.
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
        self.stale: list[str] = []  # what was taken for another meeting's
        self.lost: list[str] = []  # what was overwritten before all had read it


def program(group: Group, me: int, boards: Sequence[str], chance: random.Random) -> Iterator[bool]:
    """One program with flags; yields after each action, False where it waits."""
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


class Words:
    """Programs with words.

    Args:
        begin: meetings of earlier launches.
        epochs: that there are: of meetings so many apart the words look alike.
    """

    def __init__(self, begin: int = 0, epochs: int = 1 << 16) -> None:
        self.begin, self.epochs = begin, epochs

    def __call__(
        self, group: Group, me: int, boards: Sequence[str], chance: random.Random
    ) -> Iterator[bool]:
        """As :func:`program`."""
        on_their_way: list[tuple[tuple[str, int], int]] = []

        def arrive() -> None:
            """One store becomes visible: any, but of those of a place the oldest."""
            places = list(dict.fromkeys(place for place, _ in on_their_way))
            place = chance.choice(places)
            first = next(i for i, (p, _) in enumerate(on_their_way) if p == place)
            group.memory[place] = on_their_way.pop(first)[1]

        for meeting, board in enumerate(boards, self.begin + 1):
            on_their_way.append(((board, me), meeting))
            missing = True
            while missing:
                missing = False
                for i in chance.sample(range(group.programs), group.programs):
                    if on_their_way and chance.random() < 0.3:
                        arrive()
                    found = group.memory.get((board, i), 0)
                    if found > meeting:
                        group.lost.append(f"{board}[{i}] of meeting {meeting}")
                    if (found - meeting) % self.epochs:
                        missing = True
                    elif found != meeting:
                        group.stale.append(f"{board}[{i}] in meeting {meeting}: {found}")
                    yield True
                if missing:
                    if on_their_way:
                        arrive()
                    yield False
        while on_their_way:
            arrive()
            yield True


Way = Callable[[Group, int, Sequence[str], random.Random], Iterator[bool]]


def simulate(programs: int, boards: Sequence[str], seed: int, way: Way = program) -> Group:
    """Run a group to its end under one random schedule.

    Raises:
        RuntimeError: all wait.
    """
    return run(Group(programs), boards, seed, way)


def run(group: Group, boards: Sequence[str], seed: int, way: Way) -> Group:
    """As :func:`simulate`, of a group whose memory holds something."""
    chance = random.Random(seed)
    running = [way(group, i, boards, chance) for i in range(group.programs)]
    waited = [0] * group.programs  # in vain, since anything last happened
    # Some programs are much slower than others.
    speed = [chance.choice((1, 1, 20)) for _ in running]
    alive = list(range(group.programs))
    while alive:
        i = chance.choices(alive, [speed[j] for j in alive])[0]
        before = (group.counter, dict(group.memory))
        try:
            went_on = next(running[i])
        except StopIteration:
            alive.remove(i)
            waited = [0] * group.programs
            continue
        waited[i] += not went_on
        if before != (group.counter, group.memory):
            waited = [0] * group.programs
        # Each has looked at everything twice.
        if alive and all(waited[j] > 1 for j in alive):
            raise RuntimeError("deadlock")
    return group


# --- flags --------------------------------------------------------------------------------------


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


# --- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
@pytest.mark.parametrize("programs", range(2, 9))
def test_words_are_neither_stale_nor_overwritten(programs: int, direction: str) -> None:
    boards = order(direction, 3)
    for seed in range(10):
        group = simulate(programs, boards, seed, Words())
        assert not group.stale and not group.lost


def test_a_single_board_of_words_would_be_overwritten() -> None:
    """Who has not read it yet then waits in vain."""
    for seed in range(20):
        try:
            if simulate(4, ("board",) * 6, seed, Words()).lost:
                break
        except RuntimeError:
            break
    else:
        pytest.fail("nothing was overwritten")


def test_two_boards_of_words_are_enough() -> None:
    for seed in range(20):
        group = simulate(5, ("a", "b") * 5, seed, Words())
        assert not group.stale and not group.lost


@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_epochs_may_wrap(direction: str) -> None:
    """A board's words are of this meeting or the one four before, so that two epochs are enough."""
    boards = order(direction, 6)
    for seed in range(10):
        assert not simulate(4, boards, seed, Words(epochs=8)).stale
    # The model sees what epochs are for.
    assert any(simulate(4, boards, seed, Words(epochs=4)).stale for seed in range(10))


def test_one_launch_after_another_through_the_same_words() -> None:
    for seed in range(10):
        forward, backward = order("fwd", 2), order("bwd", 2)
        group = simulate(4, forward, seed, Words())
        run(group, forward, seed + 1, Words(begin=len(forward)))
        run(group, backward, seed + 2, Words(begin=2 * len(forward)))
        assert not group.stale and not group.lost


@pytest.mark.parametrize("clear", [True, False])
def test_words_of_another_pass_must_be_cleared(clear: bool) -> None:
    """A graph that is replayed has the same epochs as before, and so has what it left."""
    boards, epochs = order("fwd", 1), 16
    stale = False
    for seed in range(10):
        group = simulate(4, boards, seed, Words())
        left = {place: meeting - epochs for place, meeting in group.memory.items()}
        group.memory = {} if clear else left
        stale |= bool(run(group, boards, seed, Words(epochs=epochs)).stale)
    assert stale == (not clear)


# --- what the device code does ------------------------------------------------------------------


class Event(NamedTuple):
    """What one program did with the memory of the exchanges."""

    kind: str  # "store", "load", "add", "barrier"
    board: str = ""
    bypasses: bool = True  # a load that does not look into the multiprocessor's own cache
    epochs: frozenset[int] = frozenset()  # of the words that are stored


def record(
    monkeypatch: pytest.MonkeyPatch, direction: str, method: str, exchange: str = "flags"
) -> list[Event]:
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

    def load(
        ptrs: Any, mask: Any, other: Any, modifier: Any, eviction: Any, volatile: bool
    ) -> Event | None:
        board = board_of(ptrs)
        bypasses = volatile if exchange == "words" else modifier == ir.CACHE_MODIFIER.CG
        return Event("load", board, bypasses) if board else None

    def store(ptrs: Any, value: Any, *rest: Any) -> Event | None:
        board = board_of(ptrs)
        epochs: frozenset[int] = frozenset()
        if board and exchange == "words":
            words = value.data
            epochs = frozenset((words >> (words.itemsize * 4)).flat)
        return Event("store", board, epochs=epochs) if board else None

    def add(op: Any, ptr: Any, value: Any, *rest: Any) -> Event | None:
        return Event("add") if value.data.item() else None  # adding 0 is a look at the counter

    monkeypatch.setattr(rollout, "launch", recording)
    spy("create_masked_load", load)
    spy("create_masked_store", store)
    spy("create_atomic_rmw", add)
    spy("create_barrier", lambda: Event("barrier"))
    scheme = rollout.Scheme(method, 2, 50, tf32=False)
    problem = truth.problem(scheme, 5, 2)
    net = truth.network(problem, 64, torch.float16)
    layout = rollout.RolloutLayout(8, 64, 4, 2, exchange)
    p, c, g, lp = (truth.pad(x.float(), 64) for x in problem[2:])
    saved, gradients = truth.buffers(problem, 64, torch.float16)
    rollout.rollout_forward(p, c, net, scheme, layout, saved=saved)
    if direction == "bwd":
        rollout.rollout_backward(g, lp, net, scheme, layout, saved, grads=gradients)
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
    assert tuple(published) == order(direction, evaluations_of(method))


def evaluations_of(method: str) -> int:
    """Of two macro steps of two substeps."""
    return 2 * 2 * (2 if method == "heun" else 1)


@pytest.mark.interpreted
@pytest.mark.parametrize("method", ["heun", "euler"])
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_the_device_code_exchanges_words_as_modelled(
    direction: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    meetings: list[str] = []
    read = True
    for event in record(monkeypatch, direction, method, "words"):
        if event.kind == "barrier" and not meetings:
            continue  # while the weights are loaded
        assert event.kind in ("store", "load")  # and no counter, nor a barrier for one
        if event.kind == "load":
            assert event.board == meetings[-1] and event.bypasses
            read = True
            continue
        if read:  # the first store of a meeting: all of the one before have been read
            meetings.append(event.board)
        read = False
        assert event.board == meetings[-1]
        assert event.epochs == {len(meetings)}
    assert read and tuple(meetings) == order(direction, evaluations_of(method))
