"""pwm_fast.accelerate on ensembles whose parameters tensordict itself stacks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.backends import select
from pwm_fast.ops import Order
from tests.acceleration import modules as m
from tests.acceleration.test_accelerate import accelerated, random_parameters

tensordict: Any = pytest.importorskip("tensordict")


class Ensemble(nn.Module):
    """The copy on the meta device has parameters with tensordict 0.14 and newer, else none."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.params = tensordict.from_modules(*members, as_module=True)
        with self.params[0].data.to("meta").to_module(members[0]):
            self.module = copy.deepcopy(members[0])

    def one(self, params: Any, x: Tensor) -> Tensor:
        with params.to_module(self.module):
            return self.module(x)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.one, (0, None), randomness="different")(self.params, x)


class Critics(nn.Module):
    """An ensemble, and copies of it without gradients: their modules have all members' shapes."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.online = Ensemble(members)
        held = self.online.params.data
        with held.to("meta").to_module(self.online.module):
            self.detached, self.target = copy.deepcopy(self.online), copy.deepcopy(self.online)
        for ensemble, params in ((self.detached, held), (self.target, held.clone())):
            ensemble.params = tensordict.TensorDictParams(params, no_convert=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning:tensordict")
def test_ensembles_of_tensordict(order: Order, training: bool) -> None:
    """One operation each, in float64 with the plain ensembles' values and all their gradients."""
    torch.manual_seed(0)
    make = (lambda: m.mlp(10, [9, 8], 5, dropout=0.3), lambda: m.act_norm(10, [9, 8], 5))
    plain = Critics([random_parameters(make[order == "act_norm"]()).double() for _ in range(3)])
    fast = accelerated(plain)
    assert list(fast.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 10, dtype=torch.float64)
    for name in ("online", "detached", "target"):
        results = []
        for critics, operations in ((fast, ["mlp"]), (plain, [])):
            ensemble = getattr(critics, name).train(training)
            leaf = x.clone().requires_grad_()
            calls: list[str] = []
            torch.manual_seed(1)
            with select.observed(lambda operation, *_, calls=calls: calls.append(operation)):
                y = ensemble(leaf)
            assert calls == operations
            total = (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum()
            wanted = [leaf, *(p for p in ensemble.params.parameters() if p.requires_grad)]
            assert (len(wanted) > 1) == (name == "online")
            # With tensordict 0.14.0 to 0.14.2 the plain ensemble's parameters have no gradients.
            results.append([y, *torch.autograd.grad(total, wanted, materialize_grads=True)])
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
    q = fast.online.eval()
    some = ops.mlp([x], q.module.layers(q.params), members=[2, 0], order=order)
    torch.testing.assert_close(some, q(x)[[2, 0]], atol=1e-12, rtol=1e-12)
