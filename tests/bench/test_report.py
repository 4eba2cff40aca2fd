"""Tables, plots and the README's figures are what the stored results say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import pages, report, results
from bench.results import Row, Spread, ratio
from tests.bench.synthetic import ROLLOUT, group, result, rollout, row


def test_ratios_are_taken_round_by_round() -> None:
    """A round in which the machine is slow for both changes neither the ratio nor its spread."""
    found = ratio(row("published", 1.0, 10.0, 2.0), row("fast", 0.5, 5.0, 1.0))
    assert found == Spread(2.0, 2.0, 2.0)


def test_quantiles_interpolate() -> None:
    assert Spread.of([4.0, 0.0, 1.0, 3.0, 2.0]) == pytest.approx(Spread(0.8, 2.0, 3.2))
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2 s"), (0.4567, "457 ms"), (0.0123, "12.3 ms"), (1.5e-6, "1.5 µs"), (123.4, "123 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_a_table_has_ratio_floor_and_memory() -> None:
    lines = report.table(rollout()).splitlines()
    assert "imagined rollout, 5M_flow, batch 128, K 2, forward and backward" in lines[0]
    fast = next(line for line in lines if "pwm_fast fp32" in line)
    assert "4.00x" in fast and "80%" in fast and "64 MiB" in fast
    assert "250 ms" in fast


def test_slower_failed_and_absent_rows_are_shown() -> None:
    found = rollout()
    found.rows["autocast"] = row("autocast", *[4.0] * 5)
    found.rows["compile"] = Row("compile", "failed", "gradient: error 1 | 2")
    found.rows["fast_bf16"] = Row("fast_bf16", "absent", "no backend computes in bf16 yet")
    text = report.table(found)
    assert "0.25x" in text
    assert "| torch.compile fp32 | failed: gradient: error 1 / 2 |" in text
    assert "absent: no backend computes in bf16 yet" in text


def test_the_report_says_what_it_was_measured_on() -> None:
    text = report.report(result(rollout(), dirty=True))
    for fact in ("Some CPU", "AVX2", "2 threads", "torch 2.13.0+cpu", "0123456789ab with unco"):
        assert fact in text


# --- README -------------------------------------------------------------------------------------


def test_the_readme_shows_the_stored_results() -> None:
    """After storing a result: ``python -m bench.report --readme``."""
    text = pages.README.read_text("utf-8")
    assert pages.put(text, "speed", report.readme_section(results.stored())) == text


def test_the_readme_section_holds_the_newest_of_each_machine() -> None:
    old = result(rollout(fast=0.5), date="2026-01-01")
    new = result(rollout(fast=0.25), date="2026-01-02")
    other = result(rollout(fast=0.1), date="2026-01-01", cpu="Other CPU")
    text = report.readme_section([old, other, new])
    assert text.count("imagined rollout, 5M_flow") == 2
    assert "4.00x" in text and "10.00x" in text and "2.00x" not in text
    assert "100 MiB to 64 MiB" in text


def test_a_later_run_of_few_cases_does_not_displace_the_figures() -> None:
    esnr = group("esnr-5M", row("published", 1.0), row("fast", 0.1))
    full = result(rollout(), esnr, date="2026-01-01")
    text = report.readme_section([full, result(esnr, date="2026-01-02")])
    assert "4.00x" in text and "10.00x" in text


def test_the_readme_section_shows_losses_and_failures() -> None:
    slower = rollout(fast=2.0)
    slower.rows["fast_bf16"] = Row("fast_bf16", "failed", "gradient: error 1")
    text = report.readme_section([result(slower)])
    assert "0.50x" in text and "| failed |" in text


def test_results_of_other_cases_do_not_reach_the_readme() -> None:
    text = report.readme_section([result(group("mish-5M-b4096-forward", row("published", 1.0)))])
    assert text.startswith("No measurement is stored yet")


# --- command and plots --------------------------------------------------------------------------


def test_the_command_prints_tables_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = [rollout()]
    for batch in (64, 256):
        name = ROLLOUT.replace("b128", f"b{batch}")
        groups.append(group(name, row("published", 1.0, 1.0), row("fast", 0.5, 0.4), batch=batch))
    path = tmp_path / "speed_x.json"
    path.write_text(json.dumps(results.to_json(result(*groups))), "utf-8")
    assert report.main([str(path), "--plots", str(tmp_path / "plots")]) == 0
    assert "4.00x" in capsys.readouterr().out
    drawn = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert f"speed_x-{ROLLOUT}.png" in drawn
    assert "speed_x-over-batch-rollout-5M_flow-K2-backward.png" in drawn
    assert all((tmp_path / "plots" / n).read_bytes().startswith(b"\x89PNG") for n in drawn)


def test_the_command_names_a_file_that_is_no_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"schema": 99, "cases": []}', "utf-8")
    assert report.main([str(path)]) == 2
    assert "schema 99" in capsys.readouterr().err


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    found = rollout()
    found.rows["compile"] = Row("compile", "failed", "why")
    path = tmp_path / "x.json"
    path.write_text(json.dumps(results.to_json(result(found))), "utf-8")
    again = results.load(path)
    assert results.to_json(again) == results.to_json(result(found))
    assert again.kind() == result(found).kind()
