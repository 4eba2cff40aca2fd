"""The CUDA C++ kernels spill nothing, and use what docs/kernels.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.compile import cuda_report
from tests.compile.cuda_report import CudaUsage
from tests.compile.report import stored

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(scope="module")
def used() -> list[CudaUsage]:
    if (reason := cuda_report.why_not()) is not None:
        pytest.skip(reason)
    return cuda_report.examine()


def test_no_kernel_spills(used: list[CudaUsage]) -> None:
    assert {"esnr moments fp32 M16", "esnr update bf16", "probe"} <= {u.kernel for u in used}
    assert cuda_report.faults(used) == []


def test_the_table_has_not_changed(used: list[CudaUsage]) -> None:
    table = stored(PAGE, cuda_report.SECTION)
    if not table.startswith(f"{cuda_report.compiler()}:"):
        pytest.skip(f"the table is not of {cuda_report.compiler()}")
    assert cuda_report.table(used).splitlines() == table.splitlines(), (
        "kernels changed: run python -m tests.compile.cuda_report"
    )


SYMBOL = "_ZN8pwm_fast4esnr53_GLOBAL__N__1b54_7_esnr_cu_6c5e"


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (f"{SYMBOL}6chunksIfNS0_7MomentsILi8EEEEEvNS0_5TableET0_PNS0_4SumsE", "moments fp32 M8"),
        (f"{SYMBOL}6chunksINS0_4HalfENS0_6UpdateEEEvNS0_5TableET0_PNS0_4SumsE", "update fp16"),
        (f"{SYMBOL}6chunksINS0_8Bfloat16ENS0_6ResultEEEvNS0_5TableET0_P", "result bf16"),
        (f"{SYMBOL}7tensorsENS0_5TableEPKNS0_4SumsENS0_4TaskEdPdS6_S6_", "tensors"),
    ],
)
def test_names_of_kernels(symbol: str, name: str) -> None:
    assert cuda_report.readable(symbol) == f"esnr {name}"


def test_a_spill_is_a_fault() -> None:
    used = [CudaUsage("one", "sm_80", 32, 8, 0), CudaUsage("two", "sm_90a", 32, 0, 0)]
    assert cuda_report.faults(used) == ["one spills 8 bytes a thread on sm_80"]
    assert cuda_report.table(used).splitlines()[2:] == [
        "| kernel | sm_80 | sm_90a |",
        "|---|---|---|",
        "| one | 32 / 8 / 0 | - |",
        "| two | - | 32 / 0 / 0 |",
    ]
