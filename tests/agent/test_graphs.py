"""Recorded updates are the plain updates: emulated on the CPU, and on a GPU with CUDA's graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from pwm_fast.agent import PWM
from pwm_fast.agent.graphs import WARM_UP, CapturedUpdate, CudaGraphs, Update
from pwm_fast.fused.weight_cache import kept
from pwm_fast.memory import OutOfMemory
from tests.agent.agents import (
    AGENTS,
    changed,
    make_agent,
    make_obs,
    make_task,
    make_windows,
    snapshot,
)
from tests.agent.no_sync import HostSyncError
from tests.agent.recorder import make_captured


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Critics go through autograd, as where there are CUDA graphs; a CPU alone has another way."""
    monkeypatch.setattr("pwm_fast.ops.extend.regression", lambda layers, x: None)
    monkeypatch.setattr("pwm_fast.agent.pwm.weighted_gradients", lambda *_, **__: None)


UPDATES = 10  # two are plain, one is poisoned, and four come after it
gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def learn(agent: PWM, updates: int, device: str = "cpu", batch: int = 6) -> list[dict[str, Tensor]]:
    """Updates of everything, on data that changes, with a rate that changes; one is poisoned."""
    torch.manual_seed(5)
    rows = []
    for i in range(updates):
        agent.set_progress(i / updates)
        windows = make_windows(batch, seed=i, device=device)
        if i == WARM_UP + 3:
            windows.reward[0, 0] = float("nan")
        task = make_task(8, device)
        agent.observe(make_obs(8, seed=i, device=device), torch.rand(8, device=device), task)
        row = {**agent.update_world_model(windows)}
        starts = make_obs(batch, seed=100 + i, device=device), make_task(batch, device)
        row.update(agent.update_policy(*starts))
        row.update(agent.skipped_updates())
        row["action"] = agent.act(make_obs(2, seed=i, device=device), task=task[:2])
        rows.append({k: v.clone() for k, v in row.items()})
    return rows


def assert_equal(ours: list[dict[str, Tensor]], plain: list[dict[str, Tensor]]) -> None:
    for i, (a, b) in enumerate(zip(ours, plain, strict=True)):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(
                a[key], b[key], rtol=0, atol=0, equal_nan=True, msg=f"{key} of update {i}"
            )


@pytest.mark.parametrize("name", AGENTS)
def test_recorded_updates_are_plain_updates_to_the_bit(name: str) -> None:
    """Metrics, parameters, moments, statistics and what is drawn, over changing inputs."""
    captured = make_captured(make_agent, **AGENTS[name])
    plain = make_agent(**AGENTS[name])
    assert_equal(learn(captured, UPDATES), learn(plain, UPDATES))
    assert changed(snapshot(captured), snapshot(plain)) == []
    for update in captured._updates.values():
        assert (update.recorded, update.replayed) == (1, UPDATES - WARM_UP)
    assert int(captured.skipped_updates()["skipped_updates"]) == 1


def test_other_shapes_are_recorded_beside_the_first() -> None:
    captured, plain = make_captured(make_agent), make_agent()
    for batch in (6, 4, 6):
        assert_equal(learn(captured, 4, batch=batch), learn(plain, 4, batch=batch))
    assert changed(snapshot(captured), snapshot(plain)) == []
    for update in captured._updates.values():
        assert (update.recorded, update.replayed) == (2, 12 - 2 * WARM_UP)


def test_kept_gradients_are_recorded_anew() -> None:
    """Histograms read them after the update."""
    captured, plain = make_captured(make_agent), make_agent()
    for agent in (captured, plain):
        learn(agent, 4)
        assert agent.gradients() == {}
        for optimizer in agent.optimizers.values():
            optimizer.keep_gradients = True
        learn(agent, 4)
        for module in agent._modules().values():
            module.zero_grad()
        learn(agent, 1)
    ours, theirs = captured.gradients(), plain.gradients()
    assert ours.keys() == theirs.keys() and len(ours) > 20
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_a_copy_of_an_agent_records_its_own() -> None:
    agent, plain = make_captured(make_agent), make_agent()
    learn(agent, 4)
    learn(plain, 4)
    other = copy.deepcopy(agent)
    before = snapshot(agent)
    assert_equal(learn(other, 5), learn(plain, 5))
    assert changed(before, snapshot(agent)) == []
    assert all(u.recorded == 1 for u in other._updates.values())


def test_loading_a_state_drops_the_recordings() -> None:
    """Their moments are other tensors afterwards."""
    captured, plain = make_captured(make_agent), make_agent()
    learn(captured, 4)
    state = make_agent(3).state_dict()
    for agent in (captured, plain):
        agent.load_state_dict(state, optimizers=False)
    plain.load_state_dict(captured.state_dict())
    captured.load_state_dict(captured.state_dict())
    assert_equal(learn(captured, 5), learn(plain, 5))
    assert all(u.recorded == 2 for u in captured._updates.values())


def test_replays_forget_packed_weights() -> None:
    """A replay changes weights behind PyTorch's back."""
    echo, made = Echo(), []
    update = CapturedUpdate(echo, echo, warm_up=1)
    weight = torch.ones(3, 3)

    def pack() -> None:
        kept(("test",), (weight,), lambda w: made.append(1))

    for calls in (1, 1, 2, 3):  # packed; kept over a call that does not replay; made anew after
        pack()
        assert len(made) == calls
        update(weight)


def test_what_waits_cannot_be_recorded() -> None:
    agent = make_captured(make_agent)
    learn(agent, WARM_UP)
    agent.reward_rms.scale = lambda: 1.0  # type: ignore[assignment]
    original = agent._normalize
    agent._normalize = lambda obs: original(obs) * float(obs.sum() > 0)  # type: ignore[method-assign]
    with pytest.raises(HostSyncError):
        learn(agent, 1)


class Echo:
    """Counts; hands on its input."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def run(self, function: Any) -> Any:
        return function()

    def record(self, function: Any) -> Any:
        function()
        return lambda: None

    def __call__(self, x: Tensor | None) -> Update:
        return Update({}, (x,))


def test_inputs_in_place_are_recorded_by_address() -> None:
    """What another update hands on is read where it is; None stands for what there is not."""
    echo = Echo()
    update = CapturedUpdate(echo, echo, in_place=True, warm_up=1)
    x, y = torch.ones(2), torch.ones(2)
    for value in (x, x, x, y, x):
        (result,) = update(value).handed
        assert result is value
    assert (update.recorded, update.replayed) == (2, 4)
    for _ in range(2):
        assert update(None).handed == (None,)
    copied = CapturedUpdate(echo, echo, warm_up=0)
    assert copied(x).handed[0] is not x and copied(y).handed[0] is copied(x).handed[0]
    assert copied.recorded == 1


def test_warming_up_reads_what_a_recording_reads() -> None:
    """Triton loads other kernels for another layout, and cannot while CUDA records."""
    echo = Echo()
    update = CapturedUpdate(echo, echo, warm_up=1)
    strided = torch.arange(12.0).view(3, 4)[:, 1:3]
    for _ in range(2):
        (result,) = update(strided).handed
        assert result is not None and result.is_contiguous() and torch.equal(result, strided)


def test_old_recordings_are_dropped() -> None:
    echo = Echo()
    update = CapturedUpdate(echo, echo, warm_up=0)
    for n in range(1, 9):
        update(torch.ones(n))
    assert len(update._recordings) == 4
    update.forget()
    assert len(update._recordings) == 0


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match="graphs=True needs a CUDA device, the agent is on cpu"):
        make_agent(graphs=True)
    with pytest.raises(ValueError, match=r"precision must be one of .*, got 'fp8'"):
        make_agent(precision="fp8")
    assert make_agent()._updates == {}


# --- on a GPU -------------------------------------------------------------------------------------


@gpu
@needs_cuda
@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("precision", ["auto", "exact"])
def test_graphs_are_eager_updates_on_the_gpu(name: str, precision: str) -> None:
    """The same numbers are drawn; sums may run in another order, so bits may differ."""
    kwargs: dict[str, Any] = {**AGENTS[name], "device": "cuda", "precision": precision}
    captured, plain = make_agent(**kwargs), make_agent(graphs=False, **kwargs)
    ours, theirs = learn(captured, 8, "cuda"), learn(plain, 8, "cuda")
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        for key in a:
            torch.testing.assert_close(
                a[key], b[key], rtol=2e-2, atol=2e-3, equal_nan=True, msg=f"{key} of update {i}"
            )
    assert all(u.recorded == 1 and u.replayed == 8 - WARM_UP for u in captured._updates.values())
    assert int(captured.skipped_updates()["skipped_updates"]) == 1


@gpu
@needs_cuda
def test_replays_never_wait_and_draw_other_noise() -> None:
    agent = make_agent(device="cuda", actor_lr=1e-30)  # it stays as it is
    obs, windows = make_obs(device="cuda"), make_windows(device="cuda")
    for _ in range(WARM_UP + 1):
        agent.update_world_model(windows)
        agent.update_policy(obs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = []
        for _ in range(3):
            agent.update_world_model(windows)
            losses.append(agent.update_policy(obs)["actor_loss"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len({float(x) for x in losses}) == 3


@gpu
@needs_cuda
def test_inputs_are_copied_in() -> None:
    """The caller may reuse its tensors at once; other data gives another loss."""
    agent = make_agent(device="cuda")
    windows = make_windows(device="cuda")
    for _ in range(WARM_UP + 1):
        agent.update_world_model(windows)
    one = agent.update_world_model(windows)["wm_loss"]
    windows.reward.mul_(100.0)
    two = agent.update_world_model(windows)["wm_loss"]
    assert float(two) > float(one)


@gpu
@needs_cuda
def test_replays_on_the_callers_stream() -> None:
    captured, plain = make_agent(device="cuda"), make_agent(device="cuda", graphs=False)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours = learn(captured, 6, "cuda")
        theirs = learn(plain, 6, "cuda")
    stream.synchronize()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a["wm_loss"], b["wm_loss"], rtol=2e-2, atol=2e-3, equal_nan=True)


@gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_second_device() -> None:
    """While the first one is current."""
    with torch.cuda.device(0):
        captured = make_agent(device="cuda:1")
        plain = make_agent(device="cuda:1", graphs=False)
        ours, theirs = learn(captured, 6, "cuda:1"), learn(plain, 6, "cuda:1")
    for a, b in zip(ours, theirs, strict=True):
        assert a["wm_loss"].device == torch.device("cuda:1")
        torch.testing.assert_close(a["wm_loss"], b["wm_loss"], rtol=2e-2, atol=2e-3, equal_nan=True)


@gpu
@needs_cuda
def test_a_full_gpu_names_the_batch() -> None:
    agent = make_agent(device="cuda")
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(OutOfMemory, match=r"65536 rollouts .*: lower alg\.actor\.batch_size"):
            for _ in range(WARM_UP + 1):
                agent.update_policy(make_obs(65536, device="cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    agent.update_policy(make_obs(device="cuda"))  # it goes on


@gpu
@needs_cuda
def test_a_gpu_that_is_full_when_it_records() -> None:
    agent, obs = make_agent(device="cuda"), make_obs(65536, device="cuda")
    for _ in range(WARM_UP):
        agent.update_policy(obs)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**22) / total)
    try:
        with pytest.raises(OutOfMemory, match=r"65536 rollouts .*: lower alg\.actor\.batch_size"):
            agent.update_policy(obs)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    agent.update_policy(obs)  # it goes on
    assert agent._updates["actor"].recorded == 1


@gpu
@needs_cuda
def test_graphs_have_pools_of_their_own() -> None:
    """A replay of one leaves another's results alone."""
    recorder = CudaGraphs(torch.device("cuda", 0))
    one = CapturedUpdate(lambda x: Update({}, (x * 2.0,)), recorder, warm_up=1)
    two = CapturedUpdate(lambda x: Update({}, ((x + 1.0) * 3.0,)), recorder, warm_up=1)
    x = torch.ones(1000, device="cuda")
    for update in (one, two):
        update(x)
    (a,), (b,) = one(x).handed, two(x).handed
    one(x)
    assert a is not None and b is not None
    assert bool((a == 2.0).all()) and bool((b == 6.0).all())
