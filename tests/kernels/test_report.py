"""Kernels compile for every GPU generation, within their limits, and as docs/kernels.md says."""

from __future__ import annotations

from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from pwm_fast.kernels import report  # noqa: E402
from pwm_fast.kernels.aot import Case, Usage  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(scope="module")
def entries() -> list[report.Entry]:
    return report.report()


@pytest.mark.slow
def test_kernels_compile_within_their_limits(entries: list[report.Entry]) -> None:
    assert entries
    assert not [f"{e.case} on sm_{e.arch} {fault}" for e in entries for fault in e.faults]


@pytest.mark.slow
def test_the_table_has_not_changed(entries: list[report.Entry]) -> None:
    stored = report.stored(PAGE)
    if report.version_of(stored) != triton.__version__:
        pytest.skip(f"the table is of Triton {report.version_of(stored)}")
    assert report.table(entries).splitlines() == stored.splitlines(), (
        "kernels changed: run python -m pwm_fast.kernels.report"
    )


def test_modules_with_cases_are_found() -> None:
    names = report.modules()
    assert "norm_act" in names
    assert all(report.cases_of(name) for name in names)


def test_every_limit_is_watched() -> None:
    case = Case("some", None, {}, tensor_cores=True, hgmma=True)
    assert report.faults(case, 90, Usage(32, 0, 1024, "HGMMA+HMMA")) == ()
    assert report.faults(case, 80, Usage(32, 0, 1024, "HMMA")) == ()
    for wrong in (
        Usage(32, 8, 1024, "HGMMA"),
        Usage(32, 0, 228 * 1024, "HGMMA"),
        Usage(32, 0, 1024, "HMMA"),
    ):
        assert len(report.faults(case, 90, wrong)) == 1
    assert len(report.faults(case, 90, Usage(32, 0, 1024, ""))) == 2


def test_a_table_is_stored_and_read_again(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- report:begin -->\n<!-- report:end -->\nafter\n")
    made = [
        report.Entry("some", "one", 80, Usage(32, 0, 64, "HMMA"), ()),
        report.Entry("some", "one", 90, None, ("does not compile: why",)),
    ]
    for _ in range(2):
        report.store(page, report.table(made))
    text = page.read_text()
    assert report.stored(page) == report.table(made)
    assert "| one | 32 / 0 / 64 / HMMA | **does not compile** | not built |" in text
    assert text.startswith("before\n") and text.endswith("|\n<!-- report:end -->\nafter\n")
    assert report.version_of(report.stored(page)) == triton.__version__
    with pytest.raises(ValueError, match="report:begin"):
        report.stored(Path(__file__).parent / "conftest.py")
