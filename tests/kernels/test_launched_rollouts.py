"""Every layout of the persistent rollout takes the path of a GPU: see test_launched_updates.py.

Updates launch the layouts that are planned; a tuned file, and the tuner, may take any other.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("stands in for a GPU where there is none", allow_module_level=True)

from bench.fake_cuda import DEVICE
from bench.tune_rollout import RolloutWorkload
from pwm_fast.kernels.rollout import LAYOUTS, RolloutLayout
from tests.kernels.launched import Watched, needs_launcher

pytestmark = [pytest.mark.slow, needs_launcher]

# Each number of rows, of features and of warps, and each exchange, with most of the others. What
# else differs by the layout, registers and shared memory, has its limits in the table of
# docs/kernels.md for every one. The first, 8x64 with 4 warps, is what updates launch.
SOME = {
    "8x64 w8",
    "16x64 w8",
    "32x64 w8",
    "8x32 w4",
    "16x32 w4",
    "32x32 w8",
    "8x64 w4 words",
    "16x32 w8 words",
}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(
            layout, id=layout.name, marks=() if layout.name in SOME else pytest.mark.repeats
        )
        for layout in LAYOUTS
    ],
)
def test_layouts_are_launched(layout: RolloutLayout) -> None:
    cuda = Watched()
    with cuda:
        batch, padded = (128, 512) if layout.bn == 64 else (32, 1024)
        workload = RolloutWorkload(batch, padded, "16", DEVICE, horizon=2)
        workload._run(layout)
    assert cuda.cooperative == {"rollout_forward_kernel", "rollout_backward_kernel"}
