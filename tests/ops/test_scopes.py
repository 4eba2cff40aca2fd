"""Contexts hold for the thread or asyncio task that enters them, whatever the others do."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch

import pwm_fast
from pwm_fast import ops, scopes
from pwm_fast.backends import select
from pwm_fast.fused import algebra
from tests.helpers import random_layer

SETTINGS: dict[
    str, tuple[Callable[[Any], AbstractContextManager[None]], Callable[[], Any], list[Any]]
] = {
    "backend": (pwm_fast.backend, select.requested, ["torch", "reference", "native"]),
    "precision": (pwm_fast.precision, select.requested_precision, ["exact", "bf16", "fast"]),
    "algebra": (
        lambda on: ops.algebra(fold=on, hoist=not on),
        lambda: algebra.in_force().fold,
        [True, False],
    ),
}
names = pytest.mark.parametrize("name", SETTINGS)


def default(name: str) -> Any:
    return None if name == "algebra" else "auto"


@names
def test_threads_with_choices_of_their_own(name: str) -> None:
    enter, read, choices = SETTINGS[name]
    wrong: list[Any] = []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        barrier.wait()
        for _ in range(60):
            outer, inner = draw.choice(choices), draw.choice(choices)
            with enter(outer):
                time.sleep(draw.random() * 1e-3)
                with enter(inner):
                    time.sleep(draw.random() * 1e-3)
                    wrong.extend([read()] if read() != inner else [])
                wrong.extend([read()] if read() != outer else [])
            wrong.extend([read()] if read() != default(name) else [])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_calls_take_the_choice_of_their_thread() -> None:
    """What runs, and what an observer is told, is that of the thread that calls."""
    net = [random_layer(6, 9, "mish"), random_layer(9, 4, norm=False)]
    x = torch.randn(3, 6, dtype=torch.float64)

    def work(choice: str) -> list[tuple[str, str | None]]:
        seen: list[tuple[str, str | None]] = []
        for _ in range(30):
            with (
                pwm_fast.backend(choice),
                select.observed(lambda _, asked, taken, __: seen.append((asked, taken))),
            ):
                ops.mlp([x], net)
                time.sleep(1e-4)
        return seen

    choices = ["torch", "reference", "auto"] * 3
    with ThreadPoolExecutor(9) as pool:
        for choice, seen in zip(choices, pool.map(work, choices), strict=True):
            taken = "reference" if choice == "auto" else choice
            assert seen == [(choice, taken)] * 30


@names
def test_a_new_thread_starts_from_the_default(name: str) -> None:
    enter, read, choices = SETTINGS[name]
    found: list[Any] = []
    with enter(choices[0]):
        thread = threading.Thread(target=lambda: found.append(read()))
        thread.start()
        thread.join()
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(read).result())
            assert pool.submit(contextvars.copy_context().run, read).result() == choices[0]
        assert read() == choices[0]
    assert found == [default(name)] * 2


@names
def test_tasks(name: str) -> None:
    """Tasks that take turns in one thread; they start with what their parent has."""
    enter, read, choices = SETTINGS[name]

    async def work(choice: Any, inherited: Any) -> None:
        assert read() == inherited
        for _ in range(5):
            with enter(choice):
                await asyncio.sleep(random.random() * 1e-3)
                assert read() == choice
                assert await asyncio.to_thread(read) == choice
            await asyncio.sleep(0)
            assert read() == inherited

    async def main() -> None:
        await asyncio.gather(*(work(choice, default(name)) for choice in choices * 3))
        with enter(choices[-1]):
            await asyncio.gather(*(work(choice, choices[-1]) for choice in choices))

    asyncio.run(main())
    assert read() == default(name)


@names
def test_blocks_that_end_in_another_order(name: str) -> None:
    enter, read, choices = SETTINGS[name]
    first, second = enter(choices[0]), enter(choices[1])
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert read() == choices[1]
    second.__exit__(None, None, None)
    assert read() == default(name)
    with pytest.raises(ZeroDivisionError), ExitStack() as stack:
        for choice in choices * 10:
            stack.enter_context(enter(choice))
        assert read() == choices[-1]
        raise ZeroDivisionError
    assert read() == default(name)


@names
def test_a_generator_that_is_closed_late(name: str) -> None:
    """Also from elsewhere than where it was begun: it takes out its own entry alone."""
    enter, read, choices = SETTINGS[name]

    def values() -> Iterator[Any]:
        with enter(choices[0]):
            yield read()
            yield read()

    with enter(choices[1]):
        steps = values()
        assert next(steps) == choices[0]
        steps.close()
        assert read() == choices[1]
        steps = values()
        next(steps)
        thread = threading.Thread(target=steps.close)  # has no such entry
        thread.start()
        thread.join()
        assert read() == choices[1]
        steps = values()
        next(steps)
        contextvars.copy_context().run(steps.close)  # has it as well
        assert read() == choices[1]
    assert read() == default(name)


@names
def test_an_async_generator_that_is_left(name: str) -> None:
    """Asyncio closes it in a task of its own."""
    enter, read, choices = SETTINGS[name]

    async def values() -> AsyncIterator[Any]:
        with enter(choices[0]):
            yield read()
            yield read()

    async def leave() -> None:
        async for value in values():
            assert value == choices[0]
            break
        gc.collect()
        for _ in range(3):
            await asyncio.sleep(0)
        assert read() == default(name)

    asyncio.run(leave())


def test_settings_are_apart() -> None:
    with pwm_fast.backend("torch"), ops.algebra(fold=True), pwm_fast.precision("bf16"):
        assert select.requested() == "torch" and select.requested_precision() == "bf16"
        with ops.algebra(centre=True):
            assert algebra.in_force().fold and algebra.in_force().centre
    with pytest.raises(AttributeError, match="has no attribute 'others'"):
        scopes.others  # noqa: B018


def observers_of(net: list[ops.Layer], x: torch.Tensor) -> list[str | None]:
    seen: list[str | None] = []
    with select.observed(lambda _, __, taken, ___: seen.append(taken)):
        ops.mlp([x], net)
    return seen


def test_explain_in_threads() -> None:
    """One thread's explanations do not hold what others run."""
    net, x = [random_layer(6, 9, "mish", dtype=torch.float32)], torch.randn(3, 6)
    running = True

    def others() -> None:
        while running:
            ops.simnorm(torch.randn(3, 8))

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(20):
            told = pwm_fast.explain(ops.mlp, [x], net)
            assert [s.operation for s in told.selections] == ["mlp"]
            assert len(observers_of(net, x)) == 1
    finally:
        running = False
        thread.join()


def test_compiled_code_follows_thread_and_task() -> None:
    """A function that is compiled once and called everywhere; contexts around and inside."""

    def function(x: torch.Tensor) -> torch.Tensor:
        asked = {"torch": 1.0, "reference": 2.0, "auto": 3.0}[select.requested()]
        with pwm_fast.precision("bf16"):
            inner = 10.0 if select.requested_precision() == "bf16" else 0.0
        after = 100.0 if select.requested_precision() == "bf16" else 0.0
        return x + asked + inner + after + (1000.0 if algebra.in_force().fold else 0.0)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    x = torch.zeros(1)

    def check(choice: str) -> None:
        for _ in range(3):
            with pwm_fast.backend(choice):
                assert compiled(x).item() == function(x).item()
        assert compiled(x).item() == 13.0

    for choice in ("torch", "reference", "auto"):
        check(choice)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, ["torch", "reference", "auto"] * 4))
    with ops.algebra(fold=True):
        assert compiled(x).item() == function(x).item() == 1013.0

    async def task(choice: str) -> None:
        with pwm_fast.backend(choice):
            for _ in range(3):
                assert compiled(x).item() == function(x).item()
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(task(c) for c in ("torch", "reference", "auto")))

    asyncio.run(main())


def test_compiled_contexts_around_operations() -> None:
    net = [random_layer(6, 9, "mish"), random_layer(9, 4, norm=False)]
    x = torch.randn(3, 6, dtype=torch.float64)

    def function(x: torch.Tensor) -> torch.Tensor:
        with pwm_fast.backend("torch"), ops.algebra(centre=True):
            y = ops.mlp([x], net)
        return y + ops.mlp([x], net, backend="reference")

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), function(x))
    assert all(not entries for entries in scopes._TRACED.values())


def test_a_backward_pass_keeps_its_choice() -> None:
    """It runs what its forward pass chose, in whatever context and thread it comes."""
    net = [random_layer(6, 9, "mish"), random_layer(9, 4, norm=False)]
    for p in net[0][:4]:
        p.requires_grad_()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    with pwm_fast.backend("torch"), ops.algebra(centre=True):
        y = ops.mlp([x], net).sum()
    (expected,) = torch.autograd.grad(y, x, retain_graph=True)
    found: list[torch.Tensor] = []

    def backward() -> None:
        with pwm_fast.backend("reference"), select.observed(lambda *_: found.append(x)):
            found.extend(torch.autograd.grad(y, x, retain_graph=True))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert len(found) == 1 and torch.equal(found[0], expected)
