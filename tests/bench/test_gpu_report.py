"""What was predicted stands beside what was measured, and neither in the other's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu_report, pages, report, results
from bench.readings import ASSUMED
from bench.results import Group, Result, Row
from tests.bench.synthetic import group, result, row

QUICK = "rollout-5M_flow-b128-K4-backward"


def measured() -> Result:
    found = result(
        group(
            QUICK,
            row("published", 0.03),
            row("compile_tf32", 0.009),
            row("compile_bf16", 0.008),
            Row("compile_max", "failed", "why"),
            row("fast_fp16", 0.0031),
            row("fast_fp16_graph", 0.002),
            Row("fast_bf16", "memory", "2 TiB"),
            row("floor_bf16", 0.001),
            batch=128,
            K=4,
        ),
        group("esnr-5M-M16", row("published", 0.001), row("fast", 8e-5), row("floor", 7e-5)),
        gpu="Some GPU",
        device="cuda",
    )
    found.gpu = {
        "stages": {"tests": {"status": "failed", "detail": "1 failed", "seconds": 3.0}},
        "tests": {"tests/test_x.py": {"failed": 1, "messages": ["a: error 3 exceeds 2"]}},
        "micro": {
            "products": [{"name": "small product", "value": 1.51, "unit": "µs"}],
            "bandwidth": [
                {"name": "HBM read", "value": None, "unit": "", "reason": "failed: 3 are wrong"},
                {"name": "bandwidth", "value": None, "unit": "", "reason": "failed: signal 9"},
            ],
        },
    }
    return found


def lines_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {start}"))


def test_without_a_result_nothing_is_measured() -> None:
    text = gpu_report.comparison(None)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    heads = [line for line in rows if "measured |" in line and gpu_report.NOT_MEASURED not in line]
    assert len(heads) == 3
    for line in set(rows) - set(heads):
        assert gpu_report.NOT_MEASURED in line
    assert "| 5M, batch 128, K 4 | 30.8 | not measured | 9.5 | not measured | 8.7 |" in text


def test_measured_figures_stand_beside_the_models() -> None:
    text = gpu_report.comparison(measured())
    line = lines_of(text, "5M, batch 128, K 4")
    assert line == "| 5M, batch 128, K 4 | 30.8 | 30.0 | 9.5 | 9 | 8.7 | 8 | 1.6 | 2 |"
    assert "not measured" in lines_of(text, "5M, batch 512, K 4")
    assert lines_of(text, "5M, M 16") == "| 5M, M 16 | 0.07 | 0.077 | 0.08 | 0.07 |"


def test_predictions_are_not_mistaken_for_results() -> None:
    """The constants that were assumed say so, and none of the figures has a stored result."""
    assert {a.source for a in ASSUMED.values()} <= {
        "assumed",
        "literature",
        "other code",
    }
    assert gpu_report.headline(result()) == []


@pytest.mark.parametrize(
    ("status", "text"), [("memory", "out of memory"), ("failed", "failed"), ("absent", "absent")]
)
def test_what_has_no_time_says_why(status: str, text: str) -> None:
    assert gpu_report.milliseconds(Row("fast", status, "why")) == text
    only = Group("c", {}, {"fast": Row("fast", status, "why")})
    found = gpu_report.best(only, ("fast", "floor"))
    assert found is not None and found.status == status


def test_figures_have_three_digits() -> None:
    found = [gpu_report.figure(x) for x in (5940.4, 123.4, 12.34, 1.234, 0.01234, 0.3)]
    assert found == ["5940", "123", "12.3", "1.23", "0.0123", "0.3"]


def test_the_end_of_a_run_is_a_short_table() -> None:
    text = gpu_report.short(measured())
    line = next(line for line in text.splitlines() if line.startswith(QUICK))
    assert line.split() == [QUICK, "30.0", "8", "2", "1", "4.00x", "fast_fp16_graph"]
    assert "small product: 1.51 µs (model: 1.6 µs)" in text
    assert "HBM read: failed (model: 4.3 TB/s)" in text
    assert "failed: HBM read: failed: 3 are wrong" not in text  # once is enough
    assert "failed: HBM read: 3 are wrong" in text and "failed: bandwidth: signal 9" in text
    assert "failed: tests/test_x.py: a: error 3 exceeds 2" in text
    assert f"failed: {QUICK}, compile_max: why" in text


def test_the_summary_begins_with_the_headline() -> None:
    found = measured()
    found.gpu["micro"]["products"][0]["replaces"] = {}
    found.gpu["compiled"] = {"cached": 40, "names": {"launcher": 2, "adam_kernel": 1}}
    first, second, third, fourth, *_ = gpu_report.short(found).splitlines()
    assert first == (
        "headline, actor's loss and gradient, 5M_flow, batch 128, K 4, H 16: fast_fp16_graph 2 ms; "
        "torch.compile and a CUDA graph in 16 bit 8 ms, 4.00x; torch.compile in fp32 not measured; "
        "eager as published 30.0 ms, 15.00x"
    )
    count = len(ASSUMED)
    assert second.startswith(
        "measured: 9 times on Some GPU, torch 2.13.0+cpu, Triton 3.7.1, and 1 "
    )
    assert third.startswith(f"assumed: {count - 1} constants: L2 read by one SM; ")
    assert fourth == (
        "Triton's cache: 40 kernels taken from it; compiled where it was measured: 3: launcher 2, "
        "adam_kernel 1"
    )
    nothing = gpu_report.short(result()).splitlines()
    assert nothing[0].endswith(": not measured") and nothing[3] == ""


def test_readme_and_docs_show_the_stored_runs() -> None:
    """After storing a run: ``python -m bench.report --readme --docs``."""
    found = report.stored_gpu()
    made = {pages.README: report.gpu_readme(found), pages.PERFORMANCE: report.gpu_docs(found)}
    for path, section in made.items():
        text = path.read_text("utf-8")
        assert pages.put(text, "gpu", section) == text, path.name


def test_the_readme_says_not_measured_or_shows_a_run() -> None:
    assert "not measured" in report.gpu_readme(None)
    text = report.gpu_readme(measured())
    assert "Some GPU" in text and "| 30.0 | 8 | 2 | 4.00x |" in text


def test_dry_runs_and_cpus_are_never_shown() -> None:
    dry, cpu = measured(), measured()
    dry.gpu["dry"] = True
    cpu.facts["machine"]["gpu"] = None
    assert gpu_report.newest([dry, cpu]) is None
    full = measured()
    assert gpu_report.newest([dry, full, result(gpu="Some GPU")]) is full


def test_a_gpu_result_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu_x.json"
    path.write_text(json.dumps(results.to_json(measured())), "utf-8")
    found = results.stored(tmp_path, pattern=results.GPU_PATTERN)
    assert len(found) == 1 and found[0].gpu == measured().gpu
    assert "out of memory: 2 TiB" in report.report(found[0])
