"""All that whole updates launch takes the path of a GPU: bound, compiled for sm_90, launched.

Each launch is made by Triton's own driver and C launcher, and checked where it leaves them: grid,
threads, shared memory, the cooperative flag, and the bytes of every parameter
(:class:`tests.kernels.launched.Watched`). With Triton 3.6 and 3.7.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

from bench.launches import STEPS, count
from pwm_fast.config import compose
from tests.kernels.launched import PRECISIONS, Watched, needs_launcher

pytestmark = [pytest.mark.slow, needs_launcher]

ALGS = ("pwm_5M_flow", "pwm_5M", "pwm_48M_flow")
ROLLOUT = {"rollout_forward_kernel", "rollout_backward_kernel"}


UPDATES = [(alg, precision, False) for alg in ALGS for precision in PRECISIONS]
UPDATES += [("pwm_5M_flow", "fast", True), ("pwm_5M", "exact", True)]


@pytest.mark.parametrize(("alg", "precision", "can_terminate"), UPDATES)
def test_updates_are_launched(alg: str, precision: str, can_terminate: bool) -> None:
    cuda = Watched()
    config = compose(f"alg={alg}").alg
    counted = count(config, "triton", precision, can_terminate=can_terminate, cuda=cuda)
    assert all(counted[step].total() > 50 for step in STEPS)
    assert {"squares_kernel", "adam_kernel", "act_norm_fwd_kernel"} <= cuda.kernels
    if alg == "pwm_5M_flow" and precision in ("fast", "bf16"):
        assert cuda.cooperative >= ROLLOUT
