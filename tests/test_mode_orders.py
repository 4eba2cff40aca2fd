"""What is kept between calls serves every mode of autograd, in whatever order they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, nn

import pwm_fast
from pwm_fast import ops
from pwm_fast.agent.normalizers import RunningMeanStd
from pwm_fast.backends import native
from pwm_fast.fused import gemm
from pwm_fast.replay import Replay
from pwm_fast.run.progress import EpochProgress
from tests.ops.test_stale_weights import (
    OPERATIONS,
    PRECISIONS,
    B,
    D,
    case_of,
    replaced,
    tensors,
    without_packs,
)

MODES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "grad": torch.enable_grad,
}
ORDERS = list(itertools.permutations(MODES))
orders = pytest.mark.parametrize("order", ORDERS, ids=[" ".join(order) for order in ORDERS])
needs_native = pytest.mark.skipif(
    native.why_missing() is not None, reason="the native extension is not built"
)


@pytest.fixture(autouse=True)
def empty_store() -> None:
    ops.invalidate()


def inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.detach().clone()


TRUTHS: dict[tuple[str, ...], list[Tensor]] = {}


@needs_native
@orders
@pytest.mark.parametrize("weights", ["frozen", "trained", "inference", "mixed"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(
    name: str,
    precision: str,
    weights: str,
    order: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Values and gradients are those of a first call in that mode without packs."""
    if gemm._onednn_works():
        monkeypatch.setenv(gemm.VARIABLE, "onednn")
    torch.manual_seed(0)
    net, call = case_of(name)
    plain = [x.requires_grad_(weights == "trained") for x in tensors(net)]
    if weights == "inference":
        net = replaced(net, [inference(x) for x in plain])
    elif weights == "mixed":  # some are, some are trained
        mixed = [inference(x) if i % 3 else x.requires_grad_() for i, x in enumerate(plain)]
        net = replaced(net, mixed)
    z = torch.rand(B, D)

    def run(mode: str, inputs: str) -> list[Tensor]:
        with MODES[mode]():
            x = inference(z) if inputs == "inference" else z.clone()
            if inputs == "plain" and mode == "grad":
                x.requires_grad_()
            y = call(net, x)
            wanted = [t for t in (x, *tensors(net)) if t.requires_grad]
            if mode != "grad" or not wanted:
                return [y]
            grads = torch.autograd.grad(y.sum(), wanted, allow_unused=True)
            return [y.detach(), *(g for g in grads if g is not None)]

    def truth(mode: str, inputs: str) -> list[Tensor]:
        """The same in any order, as all of it is drawn from one seed: made once for all orders."""
        key = (name, precision, weights, mode, inputs)
        if key not in TRUTHS:
            with without_packs():
                TRUTHS[key] = run(mode, inputs)
        return TRUTHS[key]

    with pwm_fast.precision(precision):
        for inputs in ("plain", "inference"):
            for mode in (*order, *order):
                found = run(mode, inputs)
                for got, expected in zip(found, truth(mode, inputs), strict=True):
                    assert torch.equal(got, expected), (mode, inputs)


@orders
def test_row_operations(order: tuple[str, ...]) -> None:
    logits, x = torch.randn(B, 21), torch.randn(B)
    weight, bias = torch.randn(24), torch.randn(24)
    rows = torch.randn(B, 24)
    for inner in MODES:  # the mode that constants are made in
        with MODES[inner]():
            target, beta = x.clone(), bias.clone()
        for mode in order:
            with MODES[mode]():
                wish = mode == "grad"
                leaf = [t.clone().requires_grad_(wish) for t in (logits, weight, rows, x)]
                total = ops.two_hot_cross_entropy(leaf[0], target).sum()
                total = total + ops.layer_norm_act(rows, leaf[1], beta, act="mish").sum()
                total = total + ops.simnorm(leaf[2]).square().sum()
                total = total + ops.two_hot_decode(leaf[0]).sum()
                returns = ops.td_lambda(target.view(4, -1)[:3], leaf[3].view(4, -1))
                total = total + returns.sum()
                if wish:
                    total.backward()
                    assert all(t.grad is not None for t in leaf)


@orders
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_esnr(order: tuple[str, ...], backend: str) -> None:
    samples = [[torch.randn(7, 3), torch.randn(4)] for _ in range(6)]
    expected = ops.esnr(samples)
    for reset in (False, True):
        streamed, running = ops.EsnrAccumulator(backend=backend), ops.RunningEsnr()
        if reset:
            with MODES[order[0]]():
                streamed.reset()
        for sample, mode in zip(samples, (*order, *order), strict=True):
            with MODES[mode]():
                streamed.update([x.clone() for x in sample])
                running.update(ops.esnr([sample, sample[::1]]))
        torch.testing.assert_close(streamed.result().ratio, expected.ratio)
        torch.testing.assert_close(streamed.mean()[0], torch.stack([s[0] for s in samples]).mean(0))


@orders
def test_running_statistics(order: tuple[str, ...]) -> None:
    statistics, data = RunningMeanStd((3,)), torch.randn(6, 10, 3)
    for x, mode in zip(data, (*order, *order), strict=True):
        with MODES[mode]():
            statistics.update(x.clone())
            y = statistics.normalize(x.clone().requires_grad_(mode == "grad"))
            if mode == "grad":
                y.sum().backward()
    torch.testing.assert_close(statistics.mean, data.flatten(0, 1).double().mean(0))


@orders
@pytest.mark.parametrize("made", MODES)
def test_replay(made: str, order: tuple[str, ...]) -> None:
    with MODES[made]():
        replay = Replay(400, 2, 3, 2, horizon=3)
    for mode in (*order, *order):
        with MODES[mode]():
            for step in range(7):
                done = torch.tensor([step == 6, False])
                obs = torch.randn(2, 3)
                replay.add(obs, torch.rand(2, 2), torch.ones(2), done & False, done, obs)
            windows = replay.sample(5)
            assert (
                replay.sample_starts(5).obs.shape == (5, 3) and len(replay) and replay.num_windows()
            )
        (windows.obs.clone().sum() * torch.ones((), requires_grad=True)).backward()


@orders
@pytest.mark.parametrize("made", MODES)
@pytest.mark.parametrize("name", ["cartpole", "gym"])
def test_environments(name: str, made: str, order: tuple[str, ...]) -> None:
    from pwm_fast import envs

    options = {}
    if name == "gym":
        pytest.importorskip("gymnasium")
        options["id"] = "InvertedPendulum-v5"
    with MODES[made]():
        env = envs.make(name, 2, max_episode_steps=3, **options)
        env.reset()
    actions = torch.zeros(2, *env.single_action_space.shape)
    for mode in (*order, *order):
        with MODES[mode]():
            for _ in range(2):
                env.step(actions)
            env.set_state(env.get_state())


@orders
def test_progress(order: tuple[str, ...]) -> None:
    progress = EpochProgress()
    for i, mode in enumerate((*order, *order)):
        with MODES[mode]():
            progress.add({"loss": torch.tensor(float(i))})
            mask = torch.tensor([True])
            progress.add_episodes({"mask": mask, "return": torch.ones(1), "length": torch.ones(1)})
    assert progress.means()["loss"] == 2.5 and progress.means()["train_reward"] == 1.0


@needs_native
@orders
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["flow", "mlp"])
def test_agent(kind: str, precision: str, order: tuple[str, ...]) -> None:
    """Acting in any mode, learning between."""
    from pwm_fast import config
    from pwm_fast.agent.pwm import PWM
    from pwm_fast.replay import Windows

    torch.manual_seed(0)
    alg = config.AlgConfig(
        world_model=config.WorldModelConfig(
            kind=kind, latent_dim=16, units=[14], encoder_units=[12], reward_units=[10], num_bins=11
        ),
        model_learning=config.ModelLearningConfig(batch_size=6),
        actor=config.ActorConfig(units=[12], batch_size=6),
        critic=config.CriticConfig(units=[11], passes=1, minibatches=1),
        horizon=3,
    )
    agent = PWM(4, 2, alg, precision=precision)
    for mode in (*order, *order):
        obs = torch.randn(6, 4)
        with MODES[mode]():
            action = agent.act(obs, deterministic=True)
            agent.observe(obs, torch.randn(6))
            with without_packs():
                assert torch.equal(action, agent.act(obs, deterministic=True))
        windows = Windows(
            torch.randn(4, 6, 4), torch.rand(3, 6, 2), torch.randn(3, 6), torch.zeros(3, 6)
        )
        assert torch.isfinite(agent.update_world_model(windows)["wm_loss"])
        assert torch.isfinite(agent.update_policy(obs)["actor_loss"])


@orders
@pytest.mark.parametrize("made", MODES)
def test_accelerated(made: str, order: tuple[str, ...]) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Mish(), nn.Linear(8, 3))
    with MODES[made]():
        fast = pwm_fast.accelerate(model)
    for mode in order:
        with MODES[mode]():
            x = torch.randn(9, 5, requires_grad=mode == "grad")
            y = fast(x)
            torch.testing.assert_close(y, model(x))
            if mode == "grad":
                y.sum().backward()
