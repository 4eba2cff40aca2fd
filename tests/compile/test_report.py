"""Kernels compile for every GPU generation, within their limits, and as docs/kernels.md says."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import pwm_fast.kernels  # noqa: E402
from tests.compile import report  # noqa: E402
from tests.compile.aot import SHARED_LIMIT, Case, Usage, compile_case, run_tool, usage  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


# Every so manieth job is done here, and one of each module: the fingerprint vouches for the others.
# It has no factor in common with the 3 generations of a case, so that each generation has its turn.
SHARE = 25


def test_the_table_is_of_these_kernels() -> None:
    """Then all that it says holds: whoever changes a kernel or a case makes it anew."""
    version, fingerprint = report.made_with(report.stored(PAGE)) or ("", "")
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}")
    assert fingerprint == report.fingerprint(), "run python -m tests.compile.report"


def test_the_table_has_every_case_within_its_limits() -> None:
    found = report.rows_of(report.stored(PAGE))
    wanted = {
        (case.name, arch): case
        for module in report.modules()
        for case in report.cases_of(module)
        for arch in case.archs
    }
    assert found.keys() == wanted.keys(), "run python -m tests.compile.report"
    faults = {key: report.faults(wanted[key], key[1], used) for key, used in found.items()}
    assert not {key: found for key, found in faults.items() if found}


@pytest.mark.slow
def test_a_sample_compiles_to_what_the_table_says() -> None:
    stored = report.stored(PAGE)
    jobs = report.jobs()
    sample = jobs[::SHARE]
    of_modules = {job[0]: job for job in [*jobs, *sample]}  # of a module not in it, the last job
    wanted = sorted({*sample, *of_modules.values()})
    entries = [report.examine(*job) for job in wanted]  # in this process: others cost imports
    assert {e.arch for e in entries} == set(SHARED_LIMIT)
    assert {e.module for e in entries} == set(report.modules())
    assert not [f"{e.case} on sm_{e.arch} {fault}" for e in entries for fault in e.faults]
    if (report.made_with(stored) or ("",))[0] != triton.__version__:
        pytest.skip("the table is of another Triton")
    rows = report.rows_of(stored)
    assert {(e.case, e.arch): e.usage for e in entries} == {
        (e.case, e.arch): rows.get((e.case, e.arch)) for e in entries
    }


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "unit"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_the_assembler_makes_of_ptx_what_the_table_says(
    arch: int, unit: str, tmp_path: Path
) -> None:
    case = next(c for c in report.cases_of("linear_norm_act") if c.constants["BLOCK_M"] >= 64)
    compiled = compile_case(case, arch)
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    code = run_tool("nvdisasm", "-c", str(tmp_path / "kernel.cubin"))
    assert usage(compiled).tensor_cores == unit
    assert re.search(rf"\b{unit}\b", code)


def innermost_product_loop(code: str) -> str:
    """The shortest loop with tensor-core instructions, of disassembled code."""
    lines = code.splitlines()
    labels = {m[1]: i for i, text in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", text))}
    loops = []
    for i, text in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", text)
        if jump and labels[jump[1]] < i:
            loops.append("\n".join(lines[labels[jump[1]] : i + 1]))
    return min((loop for loop in loops if re.search("HMMA|HGMMA|UTCHMMA", loop)), key=len)


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_products_spill_outside_their_loop(arch: int, tmp_path: Path) -> None:
    """That is why their cases may; here the one that spills most."""
    used = report.rows_of(report.stored(PAGE))
    products = [c for c in report.cases_of("linear_norm_act") if arch in c.archs]
    case = max(products, key=lambda c: used[c.name, arch].spill)
    (tmp_path / "kernel.cubin").write_bytes(compile_case(case, arch).asm["cubin"])
    code = run_tool("nvdisasm", "-c", str(tmp_path / "kernel.cubin"))
    assert re.search(r"\b(STL|LDL)\b", code), "nothing is spilled: lower the bound"
    assert not re.search(r"\b(STL|LDL)\b", innermost_product_loop(code))


def test_a_fingerprint_is_of_code_and_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = "def f(x):\n    return x + 1\n"
    remarked = 'def f(x):\n    """Adds."""\n    # One.\n    return x + 1\n'
    assert report._code(plain) == report._code(remarked)
    assert report._code(plain) != report._code(plain.replace("1", "2"))
    before = report.fingerprint(["simnorm"])
    cases = report.cases_of("simnorm")
    monkeypatch.setattr(report, "cases_of", lambda module: cases[:-1])
    assert report.fingerprint(["simnorm"]) != before


def test_every_kernel_has_cases_in_the_file_of_its_module() -> None:
    """So whoever adds a kernel and no case for it hears of that here."""
    found = {
        (fn.fn.__module__.rpartition(".")[2], name)
        for info in pkgutil.iter_modules(pwm_fast.kernels.__path__)
        for name, fn in vars(importlib.import_module(f"pwm_fast.kernels.{info.name}")).items()
        if isinstance(fn, triton.JITFunction) and name.endswith("_kernel")
    }
    own = {"rollout_device": "rollout", "rollout_backward": "rollout"}
    assert {(own.get(module, module), name) for module, name in found} == {
        (module, case.fn.fn.__name__)
        for module in report.modules()
        for case in report.cases_of(module)
    }


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
        report.write(page, report.SECTION, report.table(made))
    text = page.read_text()
    assert report.stored(page) == report.table(made)
    assert "| one | 32 / 0 / 64 / HMMA | **does not compile** | not built |" in text
    assert text.startswith("before\n") and text.endswith("|\n<!-- report:end -->\nafter\n")
    assert report.made_with(report.stored(page)) == (triton.__version__, report.fingerprint())
    assert report.rows_of(report.stored(page)) == {("one", 80): Usage(32, 0, 64, "HMMA")}
    with pytest.raises(ValueError, match="report:begin"):
        report.stored(Path(__file__).parents[1] / "conftest.py")
