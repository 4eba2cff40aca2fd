"""No operation computes with packs of weights as they were, whoever wrote to them since."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pwm_fast
from pwm_fast import ops
from pwm_fast.backends import native
from pwm_fast.fused import fingerprint, gemm, weight_cache
from tests.helpers import random_layer, tensors_of, with_tensors
from tests.ops.writers import WRITERS, Writer, from_another_process, mapped

D, A, B, H = 32, 5, 40, 3
PRECISIONS = ("exact", "bf16")
Net = list[ops.Layer]

pytestmark = pytest.mark.skipif(
    native.why_missing() is not None, reason="the native extension is not built"
)


@pytest.fixture(autouse=True)
def prepacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """All products take packs, on any CPU."""
    ops.invalidate()
    if gemm._onednn_works():
        monkeypatch.setenv(gemm.VARIABLE, "onednn")


def layer(n: int, k: int, act: str = "none", **options: object) -> ops.Layer:
    return random_layer(k, n, act, dtype=torch.float32, **options)  # type: ignore[arg-type]


def flow(hidden: int) -> Net:
    return [
        layer(hidden, D + A + 1, "mish"),
        layer(hidden, hidden, "mish"),
        layer(D, hidden, norm=False),
    ]


def case_of(name: str) -> tuple[Net, Callable[[Net, Tensor], Tensor]]:
    """Layers, and an operation on them and a tensor ``[B, D]``."""
    generator = torch.Generator().manual_seed(1)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    a, noise = uniform(B, A), uniform(H, B, A)
    task = uniform(B, 3)
    if name in ("flow_step", "flow_step folded"):
        net = flow(80 if name == "flow_step" else 24)
        return net, lambda n, z: ops.flow_step(z, a, n, substeps=2)
    if name == "flow_step folded by wish":
        return flow(80), lambda n, z: ops.flow_step(z, a, n, fold=True)
    if name == "flow_step with a task":
        net = flow(24)
        net[0] = layer(24, D + A + 4, "mish")
        return net, lambda n, z: ops.flow_step(z, a, n, task=task)
    if name == "latent_rollout":
        return flow(24), lambda n, z: ops.latent_rollout(z, noise, ops.Flow(n, substeps=2))
    if name == "latent_rollout of a map":
        net = [layer(40, D + A, "mish"), layer(D, 40, "simnorm")]
        return net, lambda n, z: ops.latent_rollout(z, noise, ops.LatentMap(n))
    if name == "imagine":
        net = [*flow(24), layer(30, D), layer(A, 30, norm=False), layer(9, D + A, norm=False)]

        def imagine(n: Net, z: Tensor) -> Tensor:
            policy = ops.Policy(n[3:5], torch.full((A,), 0.3))
            heads = ops.Heads(n[5:6], value=[n[5]._replace(weight=n[5].weight[:, :D])])
            found = ops.imagine(z, policy, ops.Flow(n[:3]), heads, noise=noise)
            return found.z.sum() + found.action.sum() + found.reward.sum() + found.value.sum()

        return net, imagine
    if name == "mlp":
        net = [layer(40, D + A, "mish"), layer(24, 40, "simnorm"), layer(7, 24, norm=False)]
        return net, lambda n, z: ops.mlp([z, a], n)
    if name == "mlp, act_norm":
        net = [layer(40, D, "mish"), layer(7, 40, norm=False)]
        return net, lambda n, z: ops.mlp([z], n, order="act_norm")
    if name == "ensemble":
        net = [layer(40, D, "mish", members=(3,)), layer(1, 40, norm=False, members=(3,))]
        return net, lambda n, z: ops.mlp([z], n, order="act_norm")
    assert name == "linear_norm_act"
    return [layer(40, D, "mish")], lambda n, z: ops.linear_norm_act(z, n[0])


OPERATIONS = (
    "flow_step",
    "flow_step folded",
    "flow_step folded by wish",
    "flow_step with a task",
    "latent_rollout",
    "latent_rollout of a map",
    "imagine",
    "mlp",
    "mlp, act_norm",
    "ensemble",
    "linear_norm_act",
)


def tensors(net: Net) -> list[Tensor]:
    return [x for p in net for x in tensors_of(p)]


def replaced(net: Net, new: list[Tensor]) -> Net:
    rest = list(new)
    return [with_tensors(p, [rest.pop(0) for _ in tensors_of(p)]) for p in net]


def result(call: Callable[[Net, Tensor], Tensor], net: Net, z: Tensor) -> list[Tensor]:
    """Values, the gradient towards ``z``, and those of the weights that want one."""
    z = z.detach().requires_grad_()
    y = call(net, z)
    wanted = [x for x in tensors(net) if x.requires_grad]
    grads = torch.autograd.grad(y.sum(), [z, *wanted], allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


@contextmanager
def without_packs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(weight_cache.VARIABLE, "0")
        yield


def check_writer(
    name: str,
    write: Writer,
    precision: str,
    trained: bool,
    place: Callable[[list[Tensor]], list[Tensor]] = lambda x: x,
) -> None:
    torch.manual_seed(0)
    net, call = case_of(name)
    net = replaced(net, [x.requires_grad_(trained) for x in place(tensors(net))])
    z = torch.rand(B, D)
    with pwm_fast.precision(precision):
        before = result(call, net, z)
        for got, expected in zip(result(call, net, z), before, strict=True):
            assert torch.equal(got, expected)
        write(
            tensors(net), [x + 0.3 * torch.randn_like(x) for x in map(Tensor.detach, tensors(net))]
        )
        after = result(call, net, z)
        with without_packs():
            truth = result(call, net, z)
        for got, expected in zip(after, truth, strict=True):
            assert torch.equal(got, expected)
        assert not torch.equal(after[0], before[0])


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("writer", WRITERS)
def test_every_writer(writer: str, precision: str, trained: bool) -> None:
    for name in ("flow_step", "flow_step folded"):
        check_writer(name, WRITERS[writer], precision, trained)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation(name: str, precision: str, trained: bool) -> None:
    for writer in ("data.lerp_", "numpy"):
        check_writer(name, WRITERS[writer], precision, trained)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("choice", ["auto", "torch", "onednn"])
def test_every_product(choice: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gemm.VARIABLE, choice)
    for backend in ("native", "torch"):
        with pwm_fast.backend(backend):
            for name in ("flow_step", "flow_step folded", "mlp"):
                check_writer(name, WRITERS["data.lerp_"], precision, False)


@pytest.mark.parametrize("name", ["flow_step", "flow_step folded", "mlp"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_writer_in_another_process(name: str, precision: str, tmp_path: Path) -> None:
    """As rollout workers are given weights: in shared memory."""
    file = tmp_path / "weights"
    check_writer(name, from_another_process, precision, False, lambda x: mapped(x, str(file)))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_shared_memory(precision: str) -> None:
    def shared(weights: list[Tensor]) -> list[Tensor]:
        return [x.share_memory_() for x in weights]

    for writer in ("data.copy_", "numpy", "memory"):
        check_writer("flow_step folded", WRITERS[writer], precision, False, shared)


@pytest.mark.parametrize("layout", ["transposed", "slice", "every other", "expanded"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layout(layout: str, precision: str) -> None:
    def place(weights: list[Tensor]) -> list[Tensor]:
        made = []
        for x in weights:
            if x.dim() == 1:
                made.append(x)
            elif layout == "transposed":
                made.append(x.t().contiguous().t())
            elif layout == "slice":
                made.append(torch.cat([x, x, x], 1)[:, x.shape[1] - 1 : -x.shape[1] - 1])
            elif layout == "every other":
                made.append(x.repeat_interleave(2, 1)[:, ::2])
            else:
                made.append(x[:1].clone().expand_as(x))
        return made

    def write(weights: list[Tensor], new: list[Tensor]) -> None:
        for p, x in zip(weights, new, strict=True):
            if layout == "expanded" and p.dim() == 2:
                p.data[0].copy_(x[0])
            else:
                p.data[-1:].copy_(x[-1:])

    for name in ("flow_step", "flow_step folded", "mlp"):
        check_writer(name, write, precision, False, place)


@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(assign: bool) -> None:
    from tests.models.builders import OBS, small_model

    torch.manual_seed(0)
    model, other = small_model(kind="flow"), small_model(kind="flow")
    for m in (model, other):
        m.float()
        for p in m.parameters():
            p.data.normal_(0.0, 0.3)
    obs = torch.randn(B, OBS)
    with torch.no_grad():
        model.encode(obs, None)
        model.load_state_dict(other.state_dict(), assign=assign)
        assert torch.equal(model.encode(obs, None), other.encode(obs, None))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["flow", "mlp"])
def test_world_model_loss(kind: str, precision: str) -> None:
    """A target network's loss: all of it is of the weights as they are."""
    from pwm_fast.agent.losses import weighted_loss
    from pwm_fast.config import ModelLearningConfig
    from tests.models.builders import ACTION, OBS, small_model

    torch.manual_seed(0)
    model = small_model(kind=kind).float()
    for p in model.parameters():
        p.data.normal_(0.0, 0.3)
    windows = (torch.randn(H + 1, B, OBS), torch.rand(H, B, ACTION), torch.randn(H, B))

    def loss() -> list[Tensor]:
        torch.manual_seed(1)
        found = weighted_loss(model, *windows, torch.zeros(H, B), ModelLearningConfig(), gamma=0.9)
        grads = torch.autograd.grad(found.total, list(model.parameters()), allow_unused=True)
        return [found.total.detach(), *(g for g in grads if g is not None)]

    with pwm_fast.precision(precision):
        before = loss()
        for p in model.parameters():
            p.data.lerp_(torch.randn_like(p), 0.2)
        after = loss()
        with without_packs():
            truth = loss()
    assert not torch.equal(before[0], after[0])
    for got, expected in zip(after, truth, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_between_forward_and_backward(name: str, trained: bool, precision: str) -> None:
    """No pack mixes two states of the weights: a backward pass is that of a call without packs."""

    def run(warm: bool) -> list[Tensor]:
        torch.manual_seed(0)
        net, call = case_of(name)
        for x in tensors(net):
            x.requires_grad_(trained)
        z = torch.rand(B, D, requires_grad=True)
        wanted = [z, *(x for x in tensors(net) if trained)]
        if warm:
            result(call, net, z)
        y = call(net, z)
        for x in tensors(net):
            x.data.mul_(1.5)
        grads = torch.autograd.grad(y.sum(), wanted, allow_unused=True)
        return [g for g in grads if g is not None]

    with pwm_fast.precision(precision):
        ours = run(True)
        with without_packs():
            truth = run(False)
    for got, expected in zip(ours, truth, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", ["flow_step folded", "flow_step folded by wish", "latent_rollout"])
def test_a_fold_is_of_one_state(name: str, trained: bool, precision: str) -> None:
    """What is folded is made of weights at the forward pass: so is all that its backward takes."""
    torch.manual_seed(0)
    net, call = case_of(name)
    if trained and name != "flow_step folded by wish":
        pytest.skip("trained weights are folded by wish alone")
    for x in tensors(net):
        x.requires_grad_(trained)
    z = torch.rand(B, D)
    with pwm_fast.precision(precision):
        expected = result(call, net, z)
        z.requires_grad_()
        y = call(net, z)
        for x in tensors(net):
            x.data.mul_(1.5)
        wanted = [z, *(x for x in tensors(net) if trained)]
        for got, want in zip(torch.autograd.grad(y.sum(), wanted), expected[1:], strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_change_that_autograd_sees_is_an_error(precision: str) -> None:
    net, call = case_of("flow_step")
    for x in tensors(net):
        x.requires_grad_()
    with pwm_fast.precision(precision):
        y = call(net, torch.rand(B, D))
        with torch.no_grad():
            net[1].weight.mul_(2.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["flow_step", "flow_step folded", "mlp"])
def test_threads(name: str, precision: str) -> None:
    """Several threads compute; between their calls one writes through ``.data``."""
    torch.manual_seed(0)
    net, call = case_of(name)
    z, states = torch.rand(B, D), [[torch.randn_like(x) for x in tensors(net)] for _ in range(4)]
    with pwm_fast.precision(precision), without_packs(), torch.no_grad():
        truths = [call(replaced(net, state), z) for state in states]
    turn, workers, wrong = 0, 4, []
    barrier = threading.Barrier(workers, timeout=120)

    def work(number: int) -> None:
        nonlocal turn
        for i in range(20):
            if number == 0:
                turn = i % len(states)
                for p, x in zip(tensors(net), states[turn], strict=True):
                    p.data.copy_(x)
            barrier.wait()
            with pwm_fast.precision(precision), torch.no_grad():
                if not torch.equal(call(net, z), truths[turn]):
                    wrong.append((number, i))
            barrier.wait()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_pack_made_while_somebody_writes_is_not_kept() -> None:
    """Not even where the old values are back before anybody looks."""
    x = torch.randn(8, 8)
    old = x.clone()

    def disturbed(w: Tensor) -> Tensor:
        w.data.mul_(3.0)
        return w + 1.0

    weight_cache.kept(("test",), (x,), disturbed)
    x.data.copy_(old)
    assert torch.equal(weight_cache.kept(("test",), (x,), lambda w: w + 1.0), old + 1.0)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_fingerprints(dtype: torch.dtype, missing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes of any layout, with the extension and without it."""
    if missing:
        monkeypatch.setattr(native, "why_missing", lambda: "it is not built")
    x = torch.randn(6, 5, 8).to(dtype)
    views = {
        "whole": x,
        "rows": x[1:4],
        "columns": x[..., 2:5],
        "every other": x[:, ::2, ::2],
        "permuted": x.permute(2, 0, 1),
        "transposed slice": x[0, :, 1:4].t(),
        "expanded": x[:, :1].expand(6, 5, 8),
        "one": x[0, 0, 0],
        "empty": x[:0],
        "column": x[0, :, 3],
    }
    for name, view in views.items():
        before = fingerprint.fingerprint((view,))
        assert fingerprint.fingerprint((view,)) == before, name
        outside = torch.ones_like(x, dtype=torch.bool)
        for place in range(view.numel()):
            kept = x.clone()
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), view.shape)]
            element = view[tuple(index)] if index else view
            element.data.neg_()
            outside &= x.view(-1).eq(kept.view(-1)).view_as(x)
            assert fingerprint.fingerprint((view,)) != before, (name, index)
            x.copy_(kept)
        kept = x.clone()
        x[outside] += 1.0
        assert fingerprint.fingerprint((view,)) == before, name
        x.copy_(kept)
    pair = fingerprint.fingerprint((x[0], x[1]))
    assert pair != fingerprint.fingerprint((x[1], x[0]))
    x[0, 0, 0] = float("nan")
    assert fingerprint.fingerprint((x,)) == fingerprint.fingerprint((x,))
    x.fill_(0.0)
    zero = fingerprint.fingerprint((x,))
    x.neg_()
    assert fingerprint.fingerprint((x,)) != zero
