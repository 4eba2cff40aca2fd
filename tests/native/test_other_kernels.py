"""SimNorm, the two-hot heads, axpby and ESNR."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pwm_fast import ops
from pwm_fast.backends.esnr import moments
from tests.native.harness import _C, BATCHES, Rows, Values, activate, check

FP32, BF16 = torch.float32, torch.bfloat16


# ----------------------------------------------------------------------------------- SimNorm


def simnorm(given: Values, group: int, threads: int = 1) -> Values:
    rows, n = given["x"].shape
    x, y = Rows.of(given["x"]), Rows(rows, n, gap=1)
    _C.simnorm_fwd(x=x.tensor, y=y.tensor, group=group, threads=threads)
    dy, dx = Rows.of(given["dy"]), Rows(rows, n, gap=2)
    _C.simnorm_bwd(dy=dy.tensor, y=y.tensor, dx=dx.tensor, group=group, threads=threads)
    return {"y": y.written(), "dx": dx.written()}


def simnorm_reference(group: int):
    def reference(given: Values, dtype: torch.dtype) -> Values:
        x = given["x"].clone().requires_grad_()
        y = activate(x, "simnorm", group)
        (dx,) = torch.autograd.grad(y, x, given["dy"])
        return {"y": y.detach(), "dx": dx}

    return reference


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize(
    ("n", "group"),
    [(1, 1), (7, 7), (8, 8), (24, 3), (64, 8), (48, 16), (20, 4), (60, 20), (510, 6), (1788, 4)],
)
def test_simnorm(n: int, group: int, rows: int) -> None:
    given = {"x": 3.0 * torch.randn(rows, n), "dy": torch.randn(rows, n)}
    check(simnorm(given, group), simnorm_reference(group), given, f"{rows}x{n} by {group}")


@pytest.mark.parametrize("group", [4, 5, 8, 16])
def test_simnorm_of_masked_and_large_logits(group: int) -> None:
    """-inf has no weight, and the largest logit is taken away first."""
    x = torch.full((1, group), -float("inf"))
    x[0, :2] = torch.tensor([1e30, 1e30])
    y = simnorm({"x": x, "dy": torch.ones(1, group)}, group)["y"]
    assert y[0].tolist() == [0.5, 0.5] + [0.0] * (group - 2)


def test_simnorm_keeps_nan_in_its_group() -> None:
    x = torch.randn(1, 24)
    x[0, 9] = float("nan")
    y = simnorm({"x": x, "dy": x}, 8)["y"]
    assert y[0, 8:16].isnan().all()
    assert not y[0, :8].isnan().any() and not y[0, 16:].isnan().any()


# ------------------------------------------------------------------------------------- heads


def two_hot(
    given: Values,
    vmin: float,
    vmax: float,
    transform: bool,
    dtype: torch.dtype = FP32,
    threads: int = 1,
) -> Values:
    """All four kernels, the backward ones from what the forward ones saved."""
    rows, bins = given["logits"].shape
    logits = Rows.of(given["logits"], dtype)
    x, dvalue = Rows.of(given["x"][:, None], gap=0), Rows.of(given["dvalue"][:, None], gap=0)
    value, mean, lse, loss, lse2 = (Rows(rows, 1, gap=0) for _ in range(5))
    d_decode, d_ce = Rows(rows, bins, dtype, 2), Rows(rows, bins, dtype, 2)
    options = {"vmin": vmin, "vmax": vmax, "transform": transform, "threads": threads}
    options["logits"] = logits.tensor
    saved = {"mean": mean.tensor, "lse": lse.tensor}
    _C.two_hot_decode_fwd(value=value.tensor, **saved, **options)
    _C.two_hot_decode_bwd(dvalue=dvalue.tensor, dlogits=d_decode.tensor, **saved, **options)
    target = {"x": x.tensor, "lse": lse2.tensor}
    _C.two_hot_ce_fwd(loss=loss.tensor, **target, **options)
    _C.two_hot_ce_bwd(dloss=dvalue.tensor, dlogits=d_ce.tensor, **target, **options)
    assert torch.equal(lse.written().nan_to_num(), lse2.written().nan_to_num())
    only = Rows(rows, 1, gap=0)
    _C.two_hot_decode_fwd(value=only.tensor, mean=None, lse=None, **options)
    assert torch.equal(only.written().nan_to_num(), value.tensor.nan_to_num())
    return {
        "value": value.written()[:, 0],
        "mean": mean.written()[:, 0],
        "lse": lse.tensor[:, 0],
        "loss": loss.written()[:, 0],
        "d_decode": d_decode.written(),
        "d_ce": d_ce.written(),
    }


def two_hot_reference(vmin: float, vmax: float, transform: bool):
    def reference(given: Values, dtype: torch.dtype) -> Values:
        logits = given["logits"].clone().requires_grad_()
        value = ops.two_hot_decode(logits, vmin, vmax, transform=transform, backend="reference")
        loss = ops.two_hot_cross_entropy(
            logits, given["x"], vmin, vmax, transform=transform, backend="reference"
        )
        (d_decode,) = torch.autograd.grad(value, logits, given["dvalue"])
        (d_ce,) = torch.autograd.grad(loss, logits, given["dvalue"])
        return {
            "value": value.detach(),
            "mean": ops.two_hot_decode(
                logits.detach(), vmin, vmax, transform=False, backend="reference"
            ),
            "lse": torch.logsumexp(logits.detach(), -1),
            "loss": loss.detach(),
            "d_decode": d_decode,
            "d_ce": d_ce,
        }

    return reference


def head_inputs(rows: int, bins: int) -> Values:
    return {
        "logits": 2.0 * torch.randn(rows, bins),
        "x": 4.0 * torch.randn(rows),
        "dvalue": torch.randn(rows),
    }


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("bins", [2, 7, 64, 101, 617])
def test_two_hot(bins: int, rows: int, transform: bool) -> None:
    given = head_inputs(rows, bins)
    ours = two_hot(given, -10.0, 10.0, transform)
    check(ours, two_hot_reference(-10.0, 10.0, transform), given, f"{rows}x{bins}")


@pytest.mark.parametrize("transform", [False, True])
def test_two_hot_of_bf16_logits(transform: bool) -> None:
    given = head_inputs(9, 101)
    given["logits"] = given["logits"].bfloat16().float()
    ours = two_hot(given, -3.0, 5.0, transform, BF16)
    assert ours["d_ce"].dtype == ours["d_decode"].dtype == BF16
    check(ours, two_hot_reference(-3.0, 5.0, transform), given, "bf16")


@pytest.mark.parametrize("transform", [False, True])
def test_two_hot_target_at_and_beyond_the_ends(transform: bool) -> None:
    x = torch.tensor([-1e9, -float("inf"), -2.0, 0.0, 2.0, 1e9, float("inf"), 0.5])
    given = {"logits": torch.randn(8, 5), "x": x, "dvalue": torch.ones(8)}
    ours = two_hot(given, -2.0, 2.0, transform)
    del ours["value"]
    check(ours, two_hot_reference(-2.0, 2.0, transform), given, "ends")


def test_two_hot_of_logits_with_an_offset() -> None:
    """The rounding of the saved lse, 1e-5 here, must not reach the gradients."""
    given = head_inputs(19, 101)
    given["logits"] = (given["logits"] + 300.0).float()
    reference = two_hot_reference(-10.0, 10.0, True)
    check(two_hot(given, -10.0, 10.0, True), reference, given, "offset")


def test_two_hot_nan_target_gives_nan() -> None:
    given = head_inputs(3, 11)
    given["x"][1] = float("nan")
    ours = two_hot(given, -10.0, 10.0, True)
    assert ours["loss"].isnan().tolist() == [False, True, False]
    assert ours["d_ce"].isnan().all(-1).tolist() == [False, True, False]
    assert not ours["d_ce"][[0, 2]].isnan().any()


def test_two_hot_nan_and_masked_logits() -> None:
    given = head_inputs(3, 11)
    given["logits"][0, 10] = float("nan")
    given["logits"][1, 3:] = -float("inf")
    given["x"] = torch.full((3,), -10.0)  # wholly in bin 0
    ours = two_hot(given, -10.0, 10.0, False)
    for name in ("value", "loss", "lse"):
        assert ours[name].isnan().tolist() == [True, False, False]
    assert (ours["d_ce"][1, 3:] == 0.0).all()


# ------------------------------------------------------------------------------------- axpby


def axpby(given: Values, threads: int = 1) -> Tensor:
    rows = {name: Rows.of(value[None], gap=0) for name, value in given.items()}
    out = Rows(1, given["z"].numel(), gap=0)
    tensors = {"k2": None} | {name: row.tensor for name, row in rows.items()}
    _C.axpby(**tensors, out=out.tensor, c1=0.125, c2=0.7, threads=threads)
    return out.written()[0]


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 510, 1024, 1025, 5003])
def test_axpby(n: int, two: bool) -> None:
    given = {name: torch.randn(n) for name in ("z", "k1", *(["k2"] if two else []))}

    def expected(values: Values, dtype: torch.dtype) -> Values:
        out = values["z"] + 0.125 * values["k1"]
        return {"out": out + 0.7 * values["k2"] if two else out}

    check({"out": axpby(given)}, expected, given, f"n={n}")


@pytest.mark.parametrize("target", [0, 1, 2])
def test_axpby_in_place(target: int) -> None:
    tensors = [torch.randn(1000) for _ in range(3)]
    expected = axpby(dict(zip(("z", "k1", "k2"), tensors, strict=True)))
    z, k1, k2 = tensors
    _C.axpby(z=z, k1=k1, k2=k2, out=tensors[target], c1=0.125, c2=0.7, threads=1)
    assert torch.equal(tensors[target], expected)


# -------------------------------------------------------------------------------------- ESNR

SIZES = (1, 7, 4096, 4097, 0, 9999)


def esnr(grads: list[list[Tensor]], threads: int = 1) -> tuple[Tensor, Tensor]:
    rows = [[Rows.of(g[None], gap=0) for g in sample] for sample in grads]
    addresses = torch.tensor([[row.tensor.data_ptr() for row in sample] for sample in rows])
    sizes = torch.tensor([g.numel() for g in grads[0]])
    signal, noise = (Rows(1, len(sizes), torch.float64, 0) for _ in range(2))
    results = {"signal": signal.tensor, "noise": noise.tensor}
    _C.esnr(grads=addresses, sizes=sizes, **results, threads=threads)
    return signal.written()[0], noise.written()[0]


def samples(count: int, deviation: float, sizes: tuple[int, ...] = SIZES) -> list[list[Tensor]]:
    centres = [torch.randn(size) + 1.0 for size in sizes]
    return [[c + deviation * torch.randn(c.shape) for c in centres] for _ in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 15, 16, 17, 32, 33, 64, 100])
@pytest.mark.parametrize("deviation", [1.0, 1e-3])
def test_esnr(count: int, deviation: float) -> None:
    """At a deviation of 1e-3 a difference of totals in fp32 would be all rounding."""
    grads = samples(count, deviation)
    true_signal, true_noise = moments(grads)
    signal, noise = esnr(grads)
    torch.testing.assert_close(signal.sum(), true_signal.sum(), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(noise.sum(), true_noise.sum(), rtol=1e-6, atol=0.0)
    for index in range(len(SIZES)):
        # A single element has the rounding of its mean: relative to mu, not to the deviation.
        loose = 1e-6 if SIZES[index] > 1000 else 1e-5
        torch.testing.assert_close(signal[index], true_signal[index], rtol=loose, atol=1e-12)
        torch.testing.assert_close(noise[index], true_noise[index], rtol=loose, atol=1e-12)


def test_esnr_of_equal_samples_is_all_signal() -> None:
    grad = torch.randn(5000)
    for count in (1, 4, 16, 48):
        signal, noise = esnr([[grad]] * count)
        torch.testing.assert_close(signal[0], grad.double().square().sum(), rtol=1e-6, atol=0.0)
        assert noise[0] <= 1e-12 * signal[0]


def test_esnr_of_nothing() -> None:
    signal, noise = esnr([[torch.empty(0)], [torch.empty(0)]])
    assert signal.tolist() == noise.tolist() == [0.0]


def test_esnr_keeps_nan_in_its_tensor() -> None:
    grads = samples(3, 1.0, (100, 100))
    grads[1][0][99] = float("nan")
    signal, noise = esnr(grads)
    assert signal.isnan().tolist() == noise.isnan().tolist() == [True, False]
