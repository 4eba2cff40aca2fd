"""norm_act of centred, zero-padded rows: LayerNorm without a mean, over the true width."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pwm_fast.backends.native import NativeKernels, why_missing
from pwm_fast.backends.torch import TorchKernels
from tests.helpers import assert_2x

if why_missing() is not None:
    pytest.skip(f"no native kernels: {why_missing()}", allow_module_level=True)

NAN = float("nan")


def centred_rows(rows: int, n: int, width: int) -> Tensor:
    x = torch.randn(rows, n, dtype=torch.float64)
    x[:, width:] = 0.0
    x[:, :width] -= x[:, :width].mean(1, keepdim=True)
    return x


def run(kernels: TorchKernels | NativeKernels, x: Tensor, dy: Tensor, width: int) -> list[Tensor]:
    rows, n = x.shape
    g = torch.Generator().manual_seed(3)
    gamma = (1.0 + 0.3 * torch.randn(n, generator=g, dtype=torch.float64)).to(x.dtype)
    beta = torch.randn(n, generator=g, dtype=torch.float64).to(x.dtype)
    gamma[width:] = beta[width:] = 0.0
    y, xhat, dx = (torch.full_like(x, NAN) for _ in range(3))
    rstd = x.new_full((rows,), NAN)
    sums = {k: torch.zeros(n, dtype=torch.float64) for k in ("dgamma", "dbeta", "dbias")}
    options = {"gamma": gamma, "beta": beta, "act": "mish", "group": 8, "width": width}
    kernels.norm_act_fwd(x, y, xhat, rstd, eps=1e-5, **options)
    kernels.norm_act_bwd(dy, dx, xhat, rstd, y=None, **options, **sums)
    return [y, xhat, rstd, dx, *(s.to(x.dtype) for s in sums.values())]


@pytest.mark.parametrize(("n", "width"), [(64, 64), (64, 33), (512, 510), (1792, 1788), (7, 7)])
@pytest.mark.parametrize("rows", [1, 37])
def test_width(n: int, width: int, rows: int) -> None:
    x, dy = centred_rows(rows, n, width), torch.randn(rows, n, dtype=torch.float64)
    x, dy = x.float(), dy.float()
    truth = run(TorchKernels(), x.double(), dy.double(), width)
    found, own = run(NativeKernels(), x, dy, width), run(TorchKernels(), x, dy, width)
    for i, expected in enumerate(truth):
        if i < 4:
            assert_2x(found[i], own[i], expected, f"{n} {width}")
        else:  # sums over rows, in float32 within blocks of rows; TorchKernels adds in float64
            torch.testing.assert_close(found[i].double(), expected, rtol=1e-5, atol=1e-5)
    for padded in (truth[0], truth[1], truth[3]):
        assert not padded[:, width:].any()


def test_without_it_the_result_is_another() -> None:
    x, dy = centred_rows(5, 64, 33).float(), torch.randn(5, 64)
    with_width = run(NativeKernels(), x, dy, 33)[0]
    assert not torch.allclose(with_width, run(NativeKernels(), x, dy, 64)[0], atol=1e-2)


def test_a_width_beyond_the_row() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="width must be from 0 to n = 8, got 9"):
        run(NativeKernels(), x, x, 9)
