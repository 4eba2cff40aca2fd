"""The step of Adam: against float64 in poisoned memory, and what it leaves alone."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.helpers import assert_2x
from tests.native.harness import _C, Rows, Values

# Of a vector, of a block of 4096 and its neighbours, and of several blocks.
SIZES = (1, 0, 7, 510, 617, 4095, 4096, 4097, 12301)
BETAS, EPSILON, LR = (0.7, 0.95), 1e-8, 0.01
LISTS = ("params", "grads", "means", "squares")


class Tensors(NamedTuple):
    """Lists of rows amid NaNs, and what a step was told."""

    rows: dict[str, list[Rows]]
    steps: list[Tensor]
    norm: Tensor
    skipped: Tensor
    in_a_row: Tensor

    def values(self) -> Values:
        """All that a step may write, after a check that it has written nothing else."""
        found = {
            name: torch.cat([x.written().flatten() for x in rows])
            for name, rows in self.rows.items()
        }
        counts = {k: getattr(self, k).clone() for k in ("norm", "skipped", "in_a_row")}
        return found | counts | {"steps": torch.cat(self.steps)}


def inputs(sizes: tuple[int, ...] = SIZES, scale: float = 1.0) -> dict[str, list[Tensor]]:
    """Values as they are in the middle of a run."""
    made: dict[str, list[Tensor]] = {
        name: [torch.randn(size) for size in sizes] for name in ("params", "means")
    }
    made["grads"] = [scale * torch.randn(size) for size in sizes]
    made["squares"] = [torch.rand(size) for size in sizes]
    return made


def step(
    given: dict[str, list[Tensor]],
    limit: float = 1.0,
    *,
    groups: tuple[int, ...] = (),
    loss: float = 1.0,
    before: float = 3.0,
    skips: tuple[int, int] = (2, 1),
    keep: bool = False,
    threads: int = 1,
) -> Values:
    """One call; every group learns half as fast as the one before."""
    groups = groups or (len(given["params"]),)
    made = Tensors(
        {name: [Rows.of(x.view(1, -1), gap=0) for x in given[name]] for name in LISTS},
        [torch.full((count,), before) for count in groups],
        torch.full((), math.nan),
        torch.tensor(skips[0]),
        torch.tensor(skips[1]),
    )
    _C.adam(
        options=torch.tensor([*BETAS, EPSILON, limit], dtype=torch.float64),
        **{name: [x.tensor.view(-1) for x in rows] for name, rows in made.rows.items()},
        steps=made.steps,
        rates=[torch.tensor(LR * 0.5**g, dtype=torch.float64) for g in range(len(groups))],
        loss=torch.tensor(loss),
        norm=made.norm,
        skipped=made.skipped,
        in_a_row=made.in_a_row,
        keep=keep,
        threads=threads,
    )
    return made.values()


def formula(
    given: dict[str, list[Tensor]],
    limit: float,
    dtype: torch.dtype,
    groups: tuple[int, ...] = (),
    before: float = 3.0,
) -> Values:
    """Algorithm 1 of Kingma and Ba in plain PyTorch."""
    lists = {name: [x.to(dtype) for x in given[name]] for name in LISTS}
    norm = torch.cat([g.double() for g in lists["grads"]]).norm()
    grads = [g * (limit / (norm + 1e-6)).clamp(max=1.0).to(dtype) for g in lists["grads"]]
    rates = [LR * 0.5**g for g, count in enumerate(groups or (len(grads),)) for _ in range(count)]
    t = before + 1.0
    params, means, squares = [], [], []
    for rate, p, g, m, v in zip(
        rates, lists["params"], grads, lists["means"], lists["squares"], strict=True
    ):
        means.append(BETAS[0] * m + (1.0 - BETAS[0]) * g)
        squares.append(BETAS[1] * v + (1.0 - BETAS[1]) * g * g)
        mean = means[-1] / (1.0 - BETAS[0] ** t)
        square = squares[-1] / (1.0 - BETAS[1] ** t)
        params.append(p - rate * mean / (square.sqrt() + EPSILON))
    lists = {"params": params, "means": means, "squares": squares, "grads": grads}
    return {name: torch.cat(x) for name, x in lists.items()} | {"norm": norm.to(dtype)}


@pytest.mark.parametrize("limit", [1.0, 1e9])
@pytest.mark.parametrize("groups", [(), (4, 5), (1, 1, 7)])
def test_against_float64(groups: tuple[int, ...], limit: float) -> None:
    given = inputs()
    ours = step(given, limit, groups=groups, keep=True)
    theirs, truth = (formula(given, limit, d, groups) for d in (torch.float32, torch.float64))
    for name in (*LISTS, "norm"):
        assert_2x(ours[name], theirs[name], truth[name], name)
    assert ours["steps"].tolist() == [4.0] * len(SIZES)
    assert (int(ours["skipped"]), int(ours["in_a_row"])) == (2, 0)


@pytest.mark.parametrize("before", [0.0, 1.0, 1e4, 2.0**24 - 2.0])
def test_any_number_of_steps(before: float) -> None:
    """Bias corrections at first are large, and 1 in the end."""
    given = inputs((41, 5))
    if before == 0.0:
        for name in ("means", "squares"):
            given[name] = [torch.zeros_like(x) for x in given[name]]
    ours = step(given, before=before)
    pair = (formula(given, 1.0, d, before=before) for d in (torch.float32, torch.float64))
    theirs, truth = pair
    assert_2x(ours["params"], theirs["params"], truth["params"], "parameters")
    assert ours["steps"].tolist() == [before + 1.0] * 2


def test_step_counts_of_their_own() -> None:
    """A tensor's corrections are those of its own steps, whatever its neighbours' are."""
    given = inputs((9, 9, 9))
    made = {name: [x.clone() for x in given[name]] for name in LISTS}
    counts = torch.tensor([5.0, 5.0, 2.0])
    numbers = {name: torch.zeros(1, dtype=torch.int64) for name in ("skipped", "in_a_row")}
    _C.adam(
        options=torch.tensor([*BETAS, EPSILON, 1e9], dtype=torch.float64),
        **made,
        steps=[counts],
        rates=[torch.tensor(LR)],
        loss=torch.ones(1),
        norm=torch.empty(1),
        keep=False,
        **numbers,
    )
    assert counts.tolist() == [6.0, 6.0, 3.0]
    for i, before in enumerate((5.0, 5.0, 2.0)):
        one = {name: given[name][i : i + 1] for name in LISTS}
        truth = formula(one, 1e9, torch.float64, before=before)["params"]
        torch.testing.assert_close(made["params"][i].double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [(0, 0), (3, 509), (5, 4094), (8, 4096), (8, 12300)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_leaves_everything(bad: float, place: tuple[int, int]) -> None:
    given = inputs()
    given["grads"][place[0]][place[1]] = bad
    ours = step(given)
    for name in LISTS:
        assert torch.equal(
            ours[name].view(torch.int32), torch.cat(given[name]).view(torch.int32)
        ), name
    assert not ours["norm"].isfinite()
    assert ours["steps"].tolist() == [3.0] * len(SIZES)
    assert (int(ours["skipped"]), int(ours["in_a_row"])) == (3, 2)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_bad_loss_leaves_everything(loss: float, keep: bool) -> None:
    """But for the gradients where they are kept: those are clipped all the same."""
    given = inputs()
    ours = step(given, loss=loss, keep=keep)
    for name in ("params", "means", "squares"):
        assert torch.equal(ours[name], torch.cat(given[name])), name
    clipped = formula(given, 1.0 if keep else 1e9, torch.float64)["grads"]
    torch.testing.assert_close(ours["grads"].double(), clipped, rtol=1e-6, atol=1e-7)
    assert ours["norm"].isfinite()
    assert (int(ours["skipped"]), int(ours["in_a_row"])) == (3, 2)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18, 1e20, 3e37])
def test_norms_beyond_float32(scale: float) -> None:
    given = inputs(scale=scale)
    ours = step(given, keep=True)
    truth = formula(given, 1.0, torch.float64)
    torch.testing.assert_close(ours["norm"], truth["norm"].float(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(ours["grads"].double(), truth["grads"], rtol=1e-5, atol=1e-37)
    assert int(ours["in_a_row"]) == 0


@pytest.mark.parametrize("count", [0, 2])
def test_of_nothing(count: int) -> None:
    """No tensors, and tensors without elements: a step of them is one."""
    given = arguments() | {name: [torch.zeros(0)] * count for name in LISTS}
    given |= {"steps": [torch.zeros(count)], "norm": torch.ones(1), "in_a_row": torch.tensor([2])}
    _C.adam(**given)
    assert given["norm"] == 0.0 and given["in_a_row"] == given["skipped"] == 0
    assert given["steps"][0].tolist() == [1.0] * count


def arguments() -> dict[str, Any]:
    return {
        "options": torch.tensor([*BETAS, EPSILON, 1.0], dtype=torch.float64),
        **{name: [torch.zeros(3), torch.zeros(2, 4)] for name in LISTS},
        "steps": [torch.zeros(2)],
        "rates": [torch.zeros(1)],
        "loss": torch.zeros(1),
        "norm": torch.zeros(1),
        "skipped": torch.zeros(1, dtype=torch.int64),
        "in_a_row": torch.zeros(1, dtype=torch.int64),
        "keep": False,
    }


WRONG = {  # argument -> what is given, the error and what it says
    "a tensor for a list": ("params", torch.zeros(3), TypeError, "params must be a list of"),
    "nothing in a list": ("grads", [torch.zeros(3), None], TypeError, "grads must be a tensor"),
    "one tensor less": ("grads", [torch.zeros(3)], ValueError, "grads must be 2 tensors, got 1"),
    "another size": (
        "means",
        [torch.zeros(3), torch.zeros(7)],
        ValueError,
        "means[1] must be 8 numbers, got 7",
    ),
    "another dtype": (
        "squares",
        [torch.zeros(3).double(), torch.zeros(2, 4)],
        ValueError,
        "squares[0] must be float32, got float64",
    ),
    "a strided tensor": (
        "params",
        [torch.zeros(3), torch.zeros(4, 2).t()],
        ValueError,
        "params must be a tensor whose last stride is 1, got 2",
    ),
    "rows with gaps": (
        "grads",
        [torch.zeros(3), torch.zeros(2, 5)[:, :4]],
        ValueError,
        "grads[1] must be contiguous",
    ),
    "too few steps": ("steps", [torch.zeros(1)], ValueError, "must be 2, got 1"),
    "a rate too many": ("rates", [torch.zeros(1)] * 2, ValueError, "must be 1, got 2"),
    "two rates in one": ("rates", [torch.zeros(2)], ValueError, "rates must be 1 numbers, got 2"),
    "half a loss": ("loss", torch.zeros(1).bfloat16(), ValueError, "loss must be float32"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_lists(kind: str) -> None:
    """The message names the list, and nothing is written."""
    name, value, error, message = WRONG[kind]
    given = arguments()
    given["grads"] = [torch.ones(3), torch.ones(2, 4)]
    given[name] = value
    with pytest.raises(error, match=re.escape(message)):
        _C.adam(**given)
    assert given["skipped"] == 0 and given["norm"] == 0.0
    if name != "params":
        assert all(p.eq(0.0).all() for p in given["params"])


def test_tuples_are_lists() -> None:
    given = arguments()
    _C.adam(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    assert given["steps"][0].tolist() == [1.0, 1.0]
