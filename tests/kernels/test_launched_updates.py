"""All that whole updates launch takes the path of a GPU: bound, compiled for sm_90, launched.

Each launch is made by Triton's own driver and C launcher, and checked where it leaves them: grid,
threads, shared memory, the cooperative flag, and the bytes of every parameter
(:class:`tests.kernels.launched.Watched`). With Triton 3.6 and 3.7.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

from bench.launches import STEPS, count
from bench.plain import algorithm
from tests.kernels.launched import PRECISIONS, Watched, needs_launcher

pytestmark = [pytest.mark.slow, needs_launcher]

# Other dynamics and wider networks have kernels of their own, which differ by the compute dtype as
# those of pwm_5M_flow do.
RUNS = [
    *(("pwm_5M_flow", precision) for precision in PRECISIONS),
    *((alg, precision) for alg in ("pwm_5M", "pwm_48M_flow") for precision in ("fast", "exact")),
    *(
        pytest.param(alg, precision, marks=pytest.mark.repeats)
        for alg in ("pwm_5M", "pwm_48M_flow")
        for precision in ("tf32", "bf16")
    ),
]
ROLLOUT = {"rollout_forward_kernel", "rollout_backward_kernel"}


@pytest.mark.parametrize(("alg", "precision"), RUNS)
def test_updates_are_launched(alg: str, precision: str) -> None:
    """Half of them of a task that terminates: the returns are others, and there is a head more."""
    cuda = Watched()
    config, ends = algorithm(alg), precision in ("bf16", "exact")
    config = replace(config, critic=replace(config.critic, passes=1))  # others launch the same
    counted = count(config, "triton", precision, can_terminate=ends, cuda=cuda)
    assert all(counted[step].total() > 50 for step in STEPS)
    assert {"squares_kernel", "adam_kernel", "act_norm_fwd_kernel"} <= cuda.kernels
    if alg == "pwm_5M_flow" and precision in ("fast", "bf16"):
        assert cuda.cooperative >= ROLLOUT
