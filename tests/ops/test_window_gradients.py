"""Loss and gradients of a world model without autograd: as right as autograd's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pwm_fast import ops
from pwm_fast.agent import PWM
from pwm_fast.backends import native, select
from pwm_fast.config import compose
from pwm_fast.ops import extend, window_gradients
from pwm_fast.ops.coverage import layer_tensors
from tests.agent.agents import make_windows
from tests.helpers import assert_2x, random_layer, tensors_of, with_tensors

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason="no native kernels")

OBS, A, D, BINS = 5, 2, 24, 13


class Nets(NamedTuple):
    encoder: Sequence[ops.Layer]
    net: Sequence[ops.Layer]
    reward: Sequence[ops.Layer]
    termination: Sequence[ops.Layer] | None

    @property
    def tensors(self) -> list[Tensor]:
        return [x for net in self if net is not None for x in layer_tensors(net)]

    def to(self, dtype: torch.dtype) -> Nets:
        return self.map(lambda x: x.detach().to(dtype).requires_grad_())

    def map(self, change: Callable[[Tensor], Tensor]) -> Nets:
        def layers(net: Sequence[ops.Layer] | None) -> Any:
            if net is None:
                return None
            return [with_tensors(p, [change(x) for x in tensors_of(p)]) for p in net]

        return Nets(*(layers(net) for net in self))


class Case(NamedTuple):
    kind: str = "heun"
    substeps: int = 2
    start: str = "rollout"
    start_grad: str = "rollout"
    start_noise: float | str = 0.0
    target_grad: bool = True
    termination: bool = True
    bins: int = BINS
    horizon: int = 5
    batch: int = 7
    units: tuple[int, ...] = (33, 29)
    draws_tau: bool = False
    simnorm: bool = False
    fold: bool | None = None
    head_bias: bool = True
    share: float = 1.0
    encodes: bool = True

    @property
    def width(self) -> int:
        return D if self.encodes else OBS

    @property
    def drawn(self) -> int:
        return math.ceil(self.share * self.batch)

    @property
    def flow(self) -> bool:
        return self.kind not in ("map", "residual")

    def nets(self, seed: int = 0) -> Nets:
        g = torch.Generator().manual_seed(seed)

        def stack(inputs: int, outputs: int, last: str) -> list[ops.Layer]:
            widths = [inputs, *self.units]
            hidden = [
                random_layer(a, b, "mish", generator=g) for a, b in itertools.pairwise(widths)
            ]
            if last == "simnorm":
                return [*hidden, random_layer(widths[-1], outputs, "simnorm", generator=g)]
            bias = self.head_bias or last != "velocity"
            return [*hidden, random_layer(widths[-1], outputs, norm=False, bias=bias, generator=g)]

        pair = self.width + A
        return Nets(
            stack(OBS, D, "simnorm") if self.encodes else (),
            stack(pair + self.flow, self.width, "simnorm" if self.simnorm else "velocity"),
            stack(pair, self.bins, "linear"),
            stack(pair, 1, "linear") if self.termination else None,
        )

    def data(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed + 100)
        steps = (self.horizon, self.batch)
        tau = torch.rand(*steps, generator=g) if self.flow and not self.draws_tau else None
        found = {
            "obs": torch.randn(self.horizon + 1, self.batch, OBS, generator=g),
            "action": torch.rand(*steps, A, generator=g) * 2 - 1,
            "reward": 3.0 * torch.randn(*steps, generator=g),
            "terminated": (torch.rand(*steps, generator=g) < 0.3).float(),
            "tau": tau,
        }
        return {k: None if x is None else x.to(dtype) for k, x in found.items()}

    def options(self, nets: Nets) -> dict[str, Any]:
        dynamics: ops.Dynamics = ops.LatentMLP(nets.net)
        if self.kind == "residual":
            dynamics = ops.ResidualMLP(nets.net, fold=self.fold)
        noise: float | Tensor
        if isinstance(self.start_noise, str):
            noise = torch.linspace(0.0, 0.2, self.horizon * self.width)
            noise = noise.view(self.horizon, 1, self.width)
            if self.start_noise == "window":
                noise = noise * torch.linspace(0.5, 1.5, self.batch).view(1, -1, 1)
            noise = noise.to(nets.net[0].weight.dtype)
        else:
            noise = self.start_noise
        if self.flow:
            options = (self.substeps, self.kind)
            own = {"fold": self.fold, "share": self.share}
            dynamics = ops.Flow(nets.net, *options, **own)  # type: ignore[arg-type]
        return {
            "encoder": nets.encoder,
            "dynamics": dynamics,
            "heads": ops.Heads(nets.reward, -5.0, 5.0, termination=nets.termination),
            "gamma": 0.9,
            "start": self.start,
            "start_grad": self.start_grad,
            "start_noise": noise,
            "target_grad": self.target_grad,
        }


WEIGHTS = (0.7, 1.3, 0.4)
SHARE = Case(kind="euler", substeps=1, share=0.4)
CASES = {
    "heun": Case(),
    "euler, one evaluation": Case(kind="euler", substeps=1),
    "map": Case(kind="map", simnorm=True),
    "teacher": Case(start="teacher"),
    "teacher with noise": Case(start="teacher", start_noise=0.1),
    "noise": Case(start_noise=0.1, draws_tau=True),
    "noise of each entry": Case(start_noise="tensor"),
    "residual": Case(kind="residual"),
    "residual, folded": Case(kind="residual", fold=True, batch=19),
    "straight to the encoder": Case(start_grad="encoder"),
    "straight to the encoder, folded": Case(start_grad="encoder", fold=True, batch=19),
    "straight to the encoder, one step": Case(start_grad="encoder", horizon=1),
    "no gradient of later starts": Case(start_grad="none", kind="euler", substeps=1),
    "no gradient of later starts, one step": Case(start_grad="none", horizon=1),
    "map, whatever the gradient of starts": Case(kind="map", simnorm=True, start_grad="none"),
    "no gradient through targets": Case(target_grad=False),
    "no termination": Case(termination=False),
    "a scalar reward": Case(bins=1),
    "one step": Case(horizon=1),
    "one step, map": Case(kind="map", simnorm=True, horizon=1),
    "one window": Case(batch=1),
    "several blocks of rows": Case(batch=101, horizon=3),
    "wide": Case(units=(300,), batch=17),
    "folded": Case(fold=True, batch=19),
    "folded, without a bias": Case(fold=True, units=(31,), head_bias=False),
    "folded, from the teacher": Case(fold=True, start="teacher"),
    "some times are drawn": SHARE,
    "some times are drawn, folded": SHARE._replace(fold=True, batch=19),
    "some times are drawn, noise": SHARE._replace(start_noise=0.1, draws_tau=True),
    "some times are drawn, noise of each entry": SHARE._replace(start_noise="tensor"),
    "some times are drawn, noise of each window": SHARE._replace(start_noise="window"),
    "some times are drawn, targets without gradient": SHARE._replace(target_grad=False),
    "some times are drawn, one step": SHARE._replace(horizon=1),
    "some times are drawn, one window": SHARE._replace(batch=1),
    "no time is drawn": SHARE._replace(share=0.0, target_grad=False),
    "observations": Case(encodes=False),
    "observations, folded": Case(encodes=False, fold=True, batch=19),
    "observations, map": Case(encodes=False, kind="map"),
    "observations, residual": Case(encodes=False, kind="residual"),
    "observations, teacher": Case(encodes=False, start="teacher"),
    "observations, straight to the encoder": Case(encodes=False, start_grad="encoder"),
    "observations, noise of each entry": Case(encodes=False, start_noise="tensor"),
    "observations, some times are drawn": SHARE._replace(encodes=False),
    "observations, one step": SHARE._replace(encodes=False, horizon=1),
}
Found = tuple[list[Tensor], list[Tensor]]


def by_autograd(case: Case, dtype: torch.dtype, seed: int = 0) -> Found:
    nets = case.nets(seed).to(dtype)
    torch.manual_seed(3)
    noise = torch.randn(case.horizon, case.drawn, case.width)  # the same numbers in every dtype
    options, data = case.options(nets), case.data(dtype, seed)
    with select.backend("reference"), pytest.MonkeyPatch.context() as patch:
        if case.draws_tau:
            torch.manual_seed(3)
            tau = torch.rand(case.horizon, case.drawn)
            noise = torch.randn(case.horizon, case.drawn, case.width)
            patch.setattr(torch, "rand", lambda *_, **__: tau.to(dtype))
        patch.setattr(torch, "randn_like", lambda *_, **__: noise.to(dtype))
        loss = ops.world_model_loss(**data, **options)
    parts = [x for x in loss[:3] if x is not None]
    total = sum(w * x for w, x in zip(WEIGHTS, parts, strict=False))
    assert isinstance(total, Tensor)
    grads = torch.autograd.grad(total, nets.tensors)
    return [*(x.detach() for x in parts), loss.target, total.detach()], list(grads)


def directly(case: Case, seed: int = 0, nets: Nets | None = None) -> extend.WindowGradients | None:
    nets = case.nets(seed).to(torch.float32) if nets is None else nets
    torch.manual_seed(3)
    return extend.window_gradients(
        **case.data(torch.float32, seed), **case.options(nets), weights=WEIGHTS
    )


def listed(found: extend.WindowGradients | None) -> Found:
    assert found is not None
    parts = [x for x in found.loss[:3] if x is not None]
    return [*parts, found.loss.target, found.total], found.grads


@pytest.mark.parametrize("name", CASES)
def test_errs_at_most_twice_as_much(name: str) -> None:
    case = CASES[name]

    def more(part: int, index: int) -> Iterator[tuple[Tensor, Tensor]]:
        for seed in range(1, 17):
            pair = (by_autograd(case, dtype, seed) for dtype in (torch.float32, torch.float64))
            plain, truth = (found[part][index] for found in pair)
            yield plain, truth

    ours = listed(directly(case))
    plain, truth = by_autograd(case, torch.float32), by_autograd(case, torch.float64)
    for part in (0, 1):
        for i, (x, p, t) in enumerate(zip(ours[part], plain[part], truth[part], strict=True)):
            what = f"{name}: {'gradient' if part else 'result'} {i}"
            assert_2x(x, p, t, what, more(part, i))
            assert x.is_contiguous()


@pytest.mark.parametrize("kind", ["map", "residual", "euler"])
def test_latents_that_are_observations_by_hand(kind: str) -> None:
    """The loss of ``encoder=()``, written as a loop over steps."""
    case = Case(kind=kind, substeps=1, encodes=False)
    nets = case.nets().to(torch.float64)
    options, data = case.options(nets), case.data(torch.float64)
    loss = ops.world_model_loss(**data, **options, backend="reference")
    obs, action, tau = data["obs"], data["action"], data["tau"]
    z, parts = obs[0], torch.zeros(3, dtype=torch.float64)
    for t in range(case.horizon):
        pair = torch.cat([z, action[t]], -1)
        logits = ops.mlp((pair,), nets.reward)
        ends = ops.mlp((pair,), nets.termination or ()).squeeze(-1)
        if case.flow:
            time = tau[t].unsqueeze(-1)
            path = (1 - time) * z + time * obs[t + 1]
            velocity = ops.mlp((path, action[t], time), nets.net)
            error = velocity - (obs[t + 1] - z)
            moved = z + ops.mlp((z, action[t], torch.zeros_like(time)), nets.net)
        else:
            moved = ops.mlp((z, action[t]), nets.net) + (z if kind == "residual" else 0.0)
            error = moved - obs[t + 1]
        reward = ops.two_hot_cross_entropy(logits, data["reward"][t], -5.0, 5.0)
        flags = data["terminated"][t]
        ending = torch.nn.functional.binary_cross_entropy_with_logits(ends, flags)
        parts = parts + 0.9**t * torch.stack([error.square().mean(), reward.mean(), ending])
        z = moved
    found = torch.stack([x for x in loss[:3] if x is not None])
    torch.testing.assert_close(found, parts / case.horizon, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss.target, obs[1:], rtol=0.0, atol=0.0)
    both = (torch.autograd.grad(x.sum(), nets.tensors) for x in (found, parts / case.horizon))
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    case = CASES["several blocks of rows"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = listed(directly(case))
        torch.set_num_threads(threads)
        shared = listed(directly(case))
    finally:
        torch.set_num_threads(before)
    for mine, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))


def test_parameters_are_read_anew() -> None:
    case = Case()
    nets = case.nets().to(torch.float32)
    first = listed(directly(case, nets=nets))
    with torch.no_grad():
        for x in nets.tensors:
            x.mul_(0.5)
    fresh = Nets(*nets).map(lambda x: x.detach().clone().requires_grad_())
    again, other = listed(directly(case, nets=nets)), listed(directly(case, nets=fresh))
    assert not torch.equal(first[0][-1], again[0][-1])
    assert all(torch.equal(a, b) for a, b in zip(again[1], other[1], strict=True))


def test_another_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made inside is of the windows' dtype."""
    case = CASES["noise"]
    nets, data = case.nets().to(torch.float32), case.data(torch.float32)
    expected = listed(directly(case, nets=nets))
    monkeypatch.setattr(window_gradients, "_KNOWN", {})
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(3)
        found = extend.window_gradients(**data, **case.options(nets), weights=WEIGHTS)
    finally:
        torch.set_default_dtype(before)
    for ours, theirs in zip(listed(found), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_depends_on_more_than_sizes_is_told_apart() -> None:
    found = {
        float(listed(directly(case))[0][-1])
        for case in (
            Case(),
            Case(substeps=3),
            Case(kind="euler"),
            Case(start="teacher"),
            Case(start_noise=0.3),
            Case(start_noise="tensor"),
            Case(kind="euler", substeps=1),
            SHARE,
            SHARE._replace(share=0.8),
        )
    }
    assert len(found) == 9


def test_noise_is_read_anew() -> None:
    case = Case(start_noise="tensor")
    nets = case.nets().to(torch.float32)
    first = listed(directly(case, nets=nets))
    options = case.options(nets)
    options["start_noise"] = 2.0 * options["start_noise"]
    torch.manual_seed(3)
    data = case.data(torch.float32)
    other = listed(extend.window_gradients(**data, **options, weights=WEIGHTS))
    assert not torch.equal(first[0][-1], other[0][-1])


def frozen(nets: Nets) -> Nets:
    nets.tensors[3].requires_grad_(False)
    return nets


def hooked(nets: Nets) -> Nets:
    nets.tensors[3].register_hook(lambda g: g)
    return nets


def derived(nets: Nets) -> Nets:
    return nets.map(lambda x: x * 1.0)


@pytest.mark.parametrize(
    "change",
    [frozen, hooked, derived, lambda nets: nets.to(torch.float64)],
    ids=lambda f: f.__name__,
)
def test_parameters_that_autograd_is_for(change: Callable[[Nets], Nets]) -> None:
    case = Case()
    assert directly(case) is not None  # of the same sizes
    assert directly(case, nets=change(case.nets().to(torch.float32))) is None


def test_settings_that_autograd_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    assert directly(case) is not None
    for setting in (
        select.backend("reference"),
        select.backend("torch"),
        ops.algebra(hoist=False),
        ops.algebra(fold=True),
        torch.no_grad(),
        torch.autocast("cpu"),
        FlopCounterMode(display=False),
        extend.precisions_used(set()),
    ):
        with setting:
            assert directly(case) is None
    monkeypatch.setenv("PWM_FAST_GEMM", "torch")
    assert directly(case) is None
    monkeypatch.delenv("PWM_FAST_GEMM")
    assert directly(case) is not None


@pytest.mark.parametrize(
    "case",
    [Case(units=(1100,)), Case(kind="map", simnorm=False, units=())],
    ids=["wide", "no norm in the first layer"],
)
def test_networks_that_autograd_is_for(case: Case) -> None:
    assert directly(case) is None


def test_dynamics_of_the_users_own() -> None:
    class Mine(ops.LatentMLP):
        """A subclass may compute anything."""

    case, nets = Case(kind="map", simnorm=True), Case(kind="map", simnorm=True).nets()
    options = case.options(nets.to(torch.float32)) | {"dynamics": Mine(nets.net)}
    data = case.data(torch.float32)
    assert extend.window_gradients(**data, **options, weights=WEIGHTS) is None


@pytest.mark.parametrize("weights", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0)])
def test_a_weight_of_zero(weights: tuple[float, float, float]) -> None:
    """Autograd leaves out what is not finite there."""
    case = Case()
    options = case.options(case.nets().to(torch.float32))
    data = case.data(torch.float32)
    assert extend.window_gradients(**data, **options, weights=weights) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": torch.zeros(4, 7, A)}, r"obs must be \[5, 7, O\]"),
        ({"reward": torch.zeros(5, 6)}, r"reward must be \[5, 7\]"),
        ({"obs": torch.zeros(6, 7, OBS + 1)}, r"encoder\[0\].weight takes 5 inputs, but 6 arrive"),
        ({"terminated": None}, "terminated is needed to train the termination head"),
        ({"start": "middle"}, "start must be one of"),
        ({"start_grad": "all"}, "start_grad must be one of rollout, encoder, none"),
        ({"start_noise": -1.0}, "start_noise must not be negative"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\]"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    case = Case()
    given = case.data(torch.float32) | case.options(case.nets().to(torch.float32)) | change
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            extend.window_gradients(**given, weights=WEIGHTS)


@pytest.mark.parametrize(
    "overrides",
    [
        ("alg=pwm_tiny",),
        ("alg=pwm_tiny", "alg.world_model.kind=residual"),
        ("alg=pwm_tiny_flow",),
        ("alg=pwm_tiny_flow", "alg.model_learning.start_grad=encoder"),
        ("alg=pwm_tiny_flow", "alg.model_learning.rollout_steps=2"),
        ("alg=pwm_tiny_flow", "alg.model_learning.flow_share=0.3"),
        ("alg=pwm_tiny_flow", "alg.model_learning.flow_share=0.0"),
        ("alg=pwm_tiny_flow", "alg.model_learning.substeps=3"),
        ("alg=pwm_tiny_flow", "alg.model_learning.start_noise=auto"),
    ],
    ids=lambda x: x[-1],
)
def test_an_agents_update_takes_it(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And changes the parameters as the way through autograd does, but for rounding."""
    seen = []
    real = extend.window_gradients

    def noted(*args: Any, **options: Any) -> Any:
        seen.append(real(*args, **options))
        return seen[-1]

    config = compose(*overrides, "alg.horizon=4").alg
    after = {}
    for way in ("direct", "autograd"):
        monkeypatch.setattr(
            "pwm_fast.agent.losses.window_gradients",
            noted if way == "direct" else lambda *_, **__: None,
        )
        torch.manual_seed(0)
        agent = PWM(5, 2, config, can_terminate=True)
        windows = make_windows(horizon=4)
        agent.measure_start_spread(windows)
        torch.manual_seed(1)
        metrics = agent.update_world_model(windows)
        after[way] = ({**metrics}, [p.detach().clone() for p in agent.world_model.parameters()])
        assert agent._used == {"exact"}
    assert len(seen) == 1 and seen[0] is not None
    assert after["direct"][0].keys() == after["autograd"][0].keys()
    for key, x in after["direct"][0].items():
        torch.testing.assert_close(x, after["autograd"][0][key], rtol=1e-4, atol=1e-6)
