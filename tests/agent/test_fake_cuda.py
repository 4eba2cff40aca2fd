"""What the updates would launch on a GPU, and that nothing in them waits for it or copies to it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from bench import launches as command
from bench import pages
from bench.fake_cuda import CHUNK, DEVICE, FakeCuda, HostSyncError
from bench.launches import STEPS, count, count_row, load, rows
from tests.agent.agents import AGENTS, alg_config

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

WAITS: dict[str, Any] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: 1 if x.sum() > 0 else 0,
    "nonzero": lambda x: x.nonzero(),
    "boolean index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "tensor of numbers": lambda x: x.new_tensor([1.0]),
    "host tensor": lambda x: x + torch.zeros(3),
    "backward": lambda x: torch.autograd.grad((x.requires_grad_() ** 2).sum(), x)[0].tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_check_sees(name: str) -> None:
    with FakeCuda():
        x = torch.randn(3, device=DEVICE)
        with pytest.raises((HostSyncError, RuntimeError, NotImplementedError)):
            WAITS[name](x)


def test_counts_launches_and_not_views() -> None:
    with FakeCuda() as cuda:
        x = torch.empty(4, 6, device=DEVICE)
        y = x.t()[1:].view(5, 4).unsqueeze(0).detach().to(torch.float32)
        assert cuda.total == 0 and y.is_cuda and y.device == DEVICE
        (y * 2.0 + 1.0).to(torch.float16)
        assert cuda.launches == {"mul": 1, "add": 1, "_to_copy": 1}
        torch._foreach_mul_([torch.empty(1, device=DEVICE) for _ in range(111)], 2.0)
        assert cuda.launches["_foreach_mul_"] == 2
        torch._foreach_mul_([torch.empty(CHUNK * 321, device=DEVICE)], 2.0)
        assert cuda.launches["_foreach_mul_"] == 4


def test_leaves_nothing_behind() -> None:
    with FakeCuda():
        pass
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")
    assert torch.nn.Linear(2, 2).to(torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("name", AGENTS)
def test_updates_never_wait(name: str) -> None:
    """Forward, backward and optimiser of all updates, on the backend that a GPU would take."""
    options = dict(AGENTS[name])
    can_terminate = options.pop("can_terminate", False)
    dims = options.pop("action_dims", None)
    launches = count(alg_config(**options), can_terminate=can_terminate, action_dims=dims)
    assert all(launches[step].total() > 50 for step in STEPS)


STORED = load()
counted = functools.cache(count_row)  # two tests look at the rows of small agents
SMALL = [provider for alg, provider in rows() if alg == "tests"]
WRITE = "after a change that is meant: python -m bench.launches --write"


@pytest.mark.parametrize("provider", SMALL)
def test_no_more_launches_than_stored(provider: str) -> None:
    """With any PyTorch."""
    launches = counted("tests", provider)
    bounds = STORED["tests"][provider]
    found = {step: launches[step].total() for step in STEPS}
    assert all(found[s] <= bounds[s] for s in STEPS), f"{found} where {bounds} are stored; {WRITE}"


# What plain PyTorch runs does not depend on sizes: it is counted for both kinds of dynamics.
REPEATING = (("pwm_48M_flow", "reference, exact"),)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alg", "provider"),
    [pytest.param(*row, marks=pytest.mark.repeats if row in REPEATING else ()) for row in rows()],
    ids=lambda name: name.replace(", ", "-"),
)
def test_stored_counts_are_the_commands(alg: str, provider: str) -> None:
    """Every row of the file is what ``python -m bench.launches`` prints."""
    if torch.__version__.split("+")[0] != command.counted_with():
        pytest.skip(f"counted with torch {command.counted_with()}, whose operators are others")
    launches = counted(alg, provider)
    assert {step: launches[step].total() for step in STEPS} == STORED[alg][provider], WRITE


def test_the_page_has_the_stored_counts() -> None:
    """All rows that there are, and no number of another run beside them."""
    assert {(alg, p) for alg, counts in STORED.items() for p in counts} == set(rows())
    text = pages.PERFORMANCE.read_text("utf-8")
    assert pages.put(text, "launches", command.section(STORED)) == text, WRITE


def test_kernels_launch_less_than_plain_pytorch() -> None:
    for alg, counts in STORED.items():
        if "triton, exact" in counts:
            kernels, plain = counts["triton, exact"], counts["reference, exact"]
            assert sum(kernels[s] for s in STEPS) < sum(plain[s] for s in STEPS), alg
