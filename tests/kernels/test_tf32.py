"""Operands of tf32 products are rounded before tensor cores, which would cut them off, see them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from tests.compile.aot import compile_case
from tests.compile.report import cases_of


@pytest.mark.parametrize(
    ("module", "name", "rounds"),
    [
        ("linear_norm_act", "linear_norm_act_fwd LayerNorm mish 16x64 of 1792, K 1792, tf32", True),
        ("linear_norm_act", "linear_norm_act_fwd mish 16x64 of 1792, K 1792, fp16", False),
        ("rollout", "rollout_fwd U512 fp32 16x32 w4 weights", True),
        ("rollout", "rollout_bwd U512 fp32 16x32 w8 words weights", True),
    ],
)
def test_rounded_to_the_nearest(module: str, name: str, rounds: bool) -> None:
    case = next(c for c in cases_of(module) if c.name == name)
    ptx = compile_case(case, 90).asm["ptx"]
    assert ("cvt.rna.tf32.f32" in ptx) == rounds == (".tf32.tf32" in ptx)
