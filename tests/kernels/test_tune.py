"""What the tuner runs is right where it can be seen without a GPU: in the interpreter."""

from __future__ import annotations

import pytest
import torch

from bench import tune

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["linear_norm_act_fwd", "linear_norm_act_bwd"])
@pytest.mark.parametrize("options", [{"block_m": 16, "block_n": 64}, {"block_m": 0}])
def test_a_choice_is_checked_against_float64(kernel: str, options: dict[str, int]) -> None:
    pytest.importorskip("pwm_fast.kernels.linear_norm_act")
    call = tune._fused_call(kernel, 5, 64, 48, 1, 227 * 1024, CPU, options)
    call()


@pytest.mark.interpreted
def test_a_wrong_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("pwm_fast.kernels.linear_norm_act")
    right = kernels.linear_norm_act_fwd

    def wrong(x, weight, y, *args, **kwargs) -> None:  # type: ignore[no-untyped-def]
        right(x, weight, y, *args, **kwargs)
        y[3, 5] += 1.0

    monkeypatch.setattr(kernels, "linear_norm_act_fwd", wrong)
    options = {"block_m": 16, "block_n": 64}
    with pytest.raises(tune.Wrong, match="relative error"):
        tune._fused_call("linear_norm_act_fwd", 5, 64, 48, 1, 227 * 1024, CPU, options)
