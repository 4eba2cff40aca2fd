"""Packed copies of weights: kept while the weights stay, made anew when they change."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.fake_cuda import DEVICE, FakeCuda
from pwm_fast import ops
from pwm_fast.fused import weight_cache


@pytest.fixture(autouse=True)
def empty_store() -> None:
    ops.invalidate()


class Counted:
    """Doubles a tensor, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2.0 * x


def double(x: Tensor, make: Counted) -> Tensor:
    return weight_cache.kept(("double",), (x,), make)


def in_place(x: Tensor) -> None:
    with torch.no_grad():
        x.add_(1.0)


def optimiser(kind: type[torch.optim.Optimizer], **options: bool) -> Callable[[Tensor], None]:
    def step(x: Tensor) -> None:
        x.grad = torch.ones_like(x)
        kind([x], lr=0.1, **options).step()  # type: ignore[call-arg]

    return step


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "in place": in_place,
    "copy_": lambda x: x.detach().copy_(torch.randn_like(x)),
    "index": lambda x: x.detach().__setitem__(0, 3.0),
    "SGD": optimiser(torch.optim.SGD),
    "SGD fused": optimiser(torch.optim.SGD, fused=True),
    "Adam": optimiser(torch.optim.Adam),
    "Adam foreach": optimiser(torch.optim.Adam, foreach=True),
    "Adam fused": optimiser(torch.optim.Adam, fused=True),
    "AdamW fused": optimiser(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_makes_a_new_pack(change: Callable[[Tensor], None]) -> None:
    x, make = torch.nn.Parameter(torch.randn(3, 4)), Counted()
    double(x, make)
    assert double(x, make) is double(x, make)
    assert make.calls == 1
    before = x.detach().clone()
    change(x)
    assert not torch.equal(x, before)
    assert torch.equal(double(x, make), 2.0 * x)
    assert make.calls == 2


def test_views_share_their_bases_fate() -> None:
    x, make = torch.randn(4, 6), Counted()
    assert torch.equal(double(x[:, 2:], make), 2.0 * x[:, 2:])
    assert torch.equal(double(x[:, :2], make), 2.0 * x[:, :2])
    double(x[:, 2:], make)
    assert make.calls == 2
    in_place(x)
    assert torch.equal(double(x[:, 2:], make), 2.0 * x[:, 2:])


@pytest.mark.parametrize("what", ["module", "tensors", "everything"])
def test_invalidate(what: str) -> None:
    module, other, make = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4), Counted()
    double(module.weight, make)
    double(other.weight, make)
    given = {"module": module, "tensors": [module.weight], "everything": None}[what]
    ops.invalidate(given)  # type: ignore[arg-type]
    assert torch.equal(double(module.weight, make), 2.0 * module.weight)
    assert make.calls == 3
    double(other.weight, make)
    assert make.calls == (4 if what == "everything" else 3)


def test_invalidate_reaches_packs_of_packs() -> None:
    x, first, second = torch.randn(3), Counted(), Counted()
    double(double(x, first), second)
    x.data.add_(1.0)
    ops.invalidate([x])
    assert torch.equal(double(double(x, first), second), 4.0 * x)


def test_nothing_outlives_the_weights() -> None:
    make = Counted()
    for _ in range(5):
        x = torch.randn(1000)
        assert torch.equal(double(x, make), 2.0 * x)  # the next one may have the same address
        del x
        gc.collect()
    double(torch.randn(3), make)
    assert len(weight_cache._store) == 1


def test_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "LIMIT", 4)
    tensors, make = [torch.randn(3) for _ in range(6)], Counted()
    for x in tensors:
        double(x, make)
    assert len(weight_cache._store) == 4
    double(tensors[-1], make)
    assert make.calls == 6
    double(tensors[0], make)
    assert make.calls == 7


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, make = torch.randn(3), Counted()
    monkeypatch.setenv(weight_cache.VARIABLE, "0")
    double(x, make)
    double(x, make)
    assert make.calls == 2
    monkeypatch.setenv(weight_cache.VARIABLE, "yes")
    with pytest.raises(ValueError, match="PWM_FAST_PACKS must be 0 or 1, got 'yes'"):
        double(x, make)


def test_tensors_without_a_counter_are_kept_by_their_bytes() -> None:
    make = Counted()
    with torch.inference_mode():
        x = torch.randn(3)
        pack = double(x, make)
        double(x, make)
        assert make.calls == 1 and not pack.is_inference()
        x.add_(1.0)
        assert torch.equal(double(x, make), 2.0 * x) and make.calls == 2


def test_packs_of_old_values_go_when_the_first_new_one_comes() -> None:
    x, make = torch.randn(3), Counted()
    for kind in range(5):
        weight_cache.kept((kind,), (x,), make)
    assert len(weight_cache._store) == 5
    x.data.add_(1.0)
    weight_cache.kept((2,), (x,), make)
    assert len(weight_cache._store) == 1


def test_equal_bytes_keep_a_pack() -> None:
    """Whatever was written: what counts is what is there."""
    x, make = torch.randn(3), Counted()
    double(x, make)
    for value in (x.clone(), x.clone()):
        x.copy_(value)
        double(x, make)
    assert make.calls == 1


def test_a_pack_is_looked_for_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []
    original = weight_cache.fingerprint
    monkeypatch.setattr(
        weight_cache, "fingerprint", lambda x: (looks.append(len(x)), original(x))[1]
    )
    x, make = torch.randn(3), Counted()

    @weight_cache.one_call
    def call() -> list[Tensor]:
        weight_cache.keep_each(("double",), [x], lambda *some: [2.0 * t for t in some])
        return [double(x, make) for _ in range(5)]

    first = call()
    assert make.calls == 0 and looks == [1, 1]  # before and after it was made
    assert call()[0] is first[0] and looks == [1, 1, 1]
    monkeypatch.setenv(weight_cache.VARIABLE, "0")
    assert all(y is not first[0] for y in call()) and make.calls == 0 and len(looks) == 3


def test_packs_of_packs_need_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    x, first, second = torch.randn(3), Counted(), Counted()
    pack = double(x, first)
    monkeypatch.setattr(
        weight_cache, "fingerprint", lambda x: () if not x else pytest.fail("a look")
    )
    assert double(pack, second) is double(pack, second) and second.calls == 1


def test_what_is_handed_back_is_nobodys_own() -> None:
    """A pack that is the weight itself changes with it."""
    x = torch.randn(3)
    alias = weight_cache.kept(("float",), (x,), lambda w: w.float())
    assert alias is x
    make = Counted()
    double(alias, make)
    x.data.add_(1.0)
    assert torch.equal(double(alias, make), 2.0 * x)


def test_nothing_is_kept_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay changes weights without bumping counters: it must contain its own packing."""

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(weight_cache, "PLAIN", (*weight_cache.PLAIN, OnCuda))
    x, make = torch.randn(3).as_subclass(OnCuda), Counted()
    double(x, make)
    double(x, make)
    assert make.calls == 2


def flow(weights: list[Tensor], width: int) -> ops.Flow:
    ones, zeros = torch.ones(width), torch.zeros(width)
    first = ops.Layer(weights[0], None, ones, zeros, "mish")
    return ops.Flow(
        [first, ops.Layer(weights[1], None, ones, zeros, "mish"), ops.Layer(weights[2])]
    )


@pytest.mark.parametrize("precision", ["exact", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_rollout_sees_every_optimiser_step(precision: str, fused: bool) -> None:
    """Frozen, folded dynamics whose weights change between rollouts: no stale copy is used."""
    import pwm_fast

    d, a, u = 16, 3, 24
    weights = [torch.randn(u, d + a + 1) / 4, torch.randn(u, u) / 5, torch.randn(d, u) / 5]
    z, action = torch.rand(5, d), torch.rand(2, 5, a)

    def run() -> Tensor:
        with pwm_fast.precision(precision), pwm_fast.backend("torch"), torch.no_grad():
            return ops.latent_rollout(z, action, flow(weights, u))

    before = run()
    parameters = [torch.nn.Parameter(w) for w in weights]
    for p in parameters:
        p.grad = torch.randn_like(p)
    torch.optim.Adam(parameters, lr=0.05, fused=fused).step()
    after = run()
    ops.invalidate()
    assert torch.equal(after, run())
    assert not torch.allclose(after, before, atol=1e-3)


def test_packs_are_made_together_where_they_are_missing() -> None:
    x, y, z = (torch.randn(3) for _ in range(3))
    make = Counted()
    double(y, make)
    made: list[tuple[Tensor, ...]] = []

    def make_all(*some: Tensor) -> list[Tensor]:
        made.append(some)
        return [2.0 * t for t in some]

    weight_cache.keep_each(("double",), [x, y, z], make_all)
    assert len(made) == 1 and made[0][0] is x and made[0][1] is z
    weight_cache.keep_each(("double",), [x, y, z], make_all)
    assert len(made) == 1
    for t in (x, y, z):
        assert torch.equal(double(t, make), 2.0 * t)
    assert make.calls == 1
    in_place(z)
    assert torch.equal(double(z, make), 2.0 * z) and make.calls == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")
def test_a_capture_makes_packs_of_its_own_once() -> None:
    """A graph that took one from outside would compute with weights of then when it is replayed."""
    with FakeCuda():  # where all that is on the device is being captured
        x, make = torch.randn(3, device=DEVICE), Counted()
        for _ in range(2):
            double(x, make)
        assert make.calls == 2
        for n in (3, 4):  # two captures
            with weight_cache.capturing():
                double(x, make)
                weight_cache.keep_each(("double",), [x], lambda *_: pytest.fail("there is one"))
                double(x, make)
                assert make.calls == 2 * n - 3
                ops.invalidate()
                double(x, make)
                assert make.calls == 2 * n - 2
        in_place(x)
        double(x, make)
        assert make.calls == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands in for a GPU where there is none")
def test_on_a_gpu_packs_last_where_the_writer_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere they last as long as a call: no version counter is believed."""
    with FakeCuda():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        x, y, make = (*torch.randn(2, 3, device=DEVICE).unbind(), Counted())
        y = y.clone()
        for _ in range(2):
            double(x, make)
        assert make.calls == 2
        weight_cache.one_call(lambda: [double(x, make) for _ in range(3)])()
        assert make.calls == 3
        with weight_cache.keeping([x]):
            for _ in range(2):
                double(x, make)
            assert make.calls == 4
            double(y, make)
            double(y, make)
            assert make.calls == 6  # nobody named it
            in_place(x)
            double(x, make)
            assert make.calls == 7
            with weight_cache.keeping([x, y]):
                double(y, make)
                double(y, make)
            assert make.calls == 8
            double(x, make)
            double(y, make)
            assert make.calls == 9  # what is named still is kept
            ops.invalidate([x])
            double(x, make)
            assert make.calls == 10
        double(x, make)
        assert make.calls == 11
        pack = double(x, make)
        double(pack, make)
        double(pack, make)
        assert make.calls == 13  # nobody writes to a pack
