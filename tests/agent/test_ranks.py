"""Several processes that share every batch make the updates of one process on all of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.agent import pwm
from pwm_fast.agent.normalizers import RunningMeanStd
from pwm_fast.agent.optim import GuardedAdam
from pwm_fast.launch import resources
from pwm_fast.parallel import ALONE, Group, Ranks
from tests.agent import rank_worker
from tests.agent.agents import make_agent
from tests.helpers import Pair
from tests.run.conftest import ROOT, clean_environment


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes on gloo come to."""
    file = tmp_path_factory.mktemp("ranks") / "two.pt"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.agent.rank_worker", str(file)],
            cwd=ROOT,
            env={**clean_environment(), **variables},
            stderr=subprocess.PIPE,
            text=True,
        )
        for variables in resources.ranks([{}, {}])
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return torch.load(file, weights_only=True)


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors within nested containers, by their places."""
    if isinstance(value, Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else []
    return {k: t for key, v in items for k, t in tensors(v, f"{name}.{key}").items()}


@pytest.mark.parametrize("case", rank_worker.CASES)
def test_updates_are_those_of_one_process(
    case: str, of_two: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pwm, "flow_times", pwm.flow_times)  # put back what the worker changes
    one = rank_worker.updated(case, ALONE)
    two = of_two[case]
    torch.testing.assert_close(two["norms"], one["norms"], rtol=1e-9, atol=1e-12)
    ours, theirs = tensors(one["state"]), tensors(two["state"])
    assert ours.keys() == theirs.keys() and len(ours) > 30
    for name, value in ours.items():
        rtol, atol = (1e-7, 1e-9) if value.dtype == torch.float64 else (1e-5, 1e-6)
        torch.testing.assert_close(theirs[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("groups", [None, 2])
def test_statistics_are_of_all_batches(groups: int | None) -> None:
    batches = [torch.randn(n, 3, dtype=torch.float64) * n + n for n in (4, 7)]
    batches[1][2, 1] = torch.nan  # left out
    numbers = [torch.arange(len(b)) % 2 for b in batches]

    def on(ranks: Ranks) -> RunningMeanStd:
        found = RunningMeanStd((3,), groups)
        found.ranks = ranks
        for _ in range(2):
            group = None if groups is None else numbers[ranks.rank]
            found.update(batches[ranks.rank], group)
        found.update(batches[0][:2], None if groups is None else numbers[0][:2], same=True)
        return found

    whole = RunningMeanStd((3,), groups)
    for _ in range(2):
        whole.update(torch.cat(batches), None if groups is None else torch.cat(numbers))
    whole.update(batches[0][:2], None if groups is None else numbers[0][:2])
    for found in Pair.run(on):
        for name, value in whole.named_buffers():
            torch.testing.assert_close(found.get_buffer(name), value, msg=name)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_what_is_bad_on_one_rank_is_skipped_on_both(bad: str) -> None:
    def on(ranks: Ranks) -> GuardedAdam:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = GuardedAdam([p], 0.1, (0.9, 0.99), 1.0)
        optimizer.ranks = ranks
        for kind in (bad, "nothing"):
            wrong = float("inf") if ranks.rank == 1 else 1.0
            loss = torch.tensor(wrong if kind == "loss" else 1e30, dtype=torch.float64)
            optimizer.apply(loss, [torch.full((3,), wrong if kind == "gradient" else 1.0)])
        return optimizer

    one, two = Pair.run(on)
    for optimizer in (one, two):
        assert int(optimizer.skipped) == 1 and int(optimizer.skipped_in_a_row) == 0
        assert torch.allclose(optimizer.params[0], torch.tensor(0.9))
    assert torch.equal(one.params[0], two.params[0])


def test_one_process_waits_for_nobody() -> None:
    assert ALONE.first and ALONE.part(7) == 7 and ALONE.gather(3) == [3]
    x = torch.ones(2)
    ALONE.average_([x])
    assert x.tolist() == [1.0, 1.0] and ALONE.highest(5) == 5
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError
    with pytest.raises(ValueError, match="graphs=True is for one process"):
        make_agent(graphs=True, ranks=Pair(0, [], None))  # type: ignore[arg-type]


def test_parts_add_up() -> None:
    for size in (2, 3):
        parts = []
        for rank in range(size):
            ranks = Ranks()
            ranks.rank, ranks.size = rank, size
            parts.append(ranks.part(11))
        assert sum(parts) == 11 and max(parts) - min(parts) <= 1


class Odd(Exception):
    """A message of its own."""

    def __init__(self, text: str) -> None:
        super().__init__(f"odd: {text}")


@pytest.mark.parametrize(
    ("raised", "alike", "found"),
    [
        ((None, KeyError("x")), (), ("Followed", "KeyError")),
        ((KeyError("x"), ValueError("y")), (), ("KeyError", "Followed")),
        ((None, Odd("z")), (Odd,), ("Odd odd: z", "Odd odd: z")),
        ((Odd("z"), KeyError("x")), (Odd,), ("Followed", "KeyError")),
        ((None, None), (), ("", "")),
    ],
)
def test_together(raised: tuple[Any, Any], alike: Any, found: tuple[str, str]) -> None:
    def on(ranks: Ranks) -> str:
        try:
            with Group.together(ranks, alike):  # type: ignore[arg-type]
                if raised[ranks.rank] is not None:
                    raise raised[ranks.rank]
        except Odd as error:
            return f"Odd {error}"
        except Exception as error:
            return type(error).__name__
        return ""

    assert tuple(Pair.run(on)) == found
