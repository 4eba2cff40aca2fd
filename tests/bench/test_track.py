"""What became slower is told from what is noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import results, track
from bench.results import Row
from tests.bench import synthetic
from tests.bench.synthetic import ROLLOUT, group, result, rollout, row


def verdicts(new: results.Group, base: results.Group) -> dict[str, str]:
    return {c.provider: c.verdict for c in track.compare(result(new), result(base))}


@pytest.mark.parametrize(
    ("published", "fast", "verdict"),
    [
        (1.0, 0.25, "same"),
        (1.0, 0.30, "slower"),
        (1.0, 0.20, "faster"),
        (1.0, 0.26, "same"),
        (2.0, 0.50, "same"),  # a slower machine: the ratio to the published code is what it was
    ],
)
def test_a_change_beyond_the_threshold_is_told(published: float, fast: float, verdict: str) -> None:
    """+20 %, -20 %, +4 %."""
    new = rollout(published=published, fast=fast)
    found = verdicts(new, rollout())
    assert found["fast"] == verdict
    assert published > 1.0 or found["reference"] == "same"
    assert set(found) == {"reference", "fast"}


def test_a_spread_that_meets_the_old_one_is_noise() -> None:
    """+20 % in the median of rounds that differ by more than that."""
    base = group(ROLLOUT, row("published", *[1.0] * 5), row("fast", 0.2, 0.24, 0.25, 0.35, 0.4))
    new = group(ROLLOUT, row("published", *[1.0] * 5), row("fast", 0.2, 0.25, 0.30, 0.35, 0.4))
    assert verdicts(new, base)["fast"] == "same"


def test_a_red_check_is_told_even_of_a_new_row() -> None:
    new = rollout()
    new.rows["compile"] = Row("compile", "failed", "gradient: error 1")
    new.rows["fast"] = Row("fast", "failed", "gradient: error 2")
    changes = {c.provider: c for c in track.compare(result(new), result(rollout()))}
    assert changes["compile"].bad and changes["fast"].bad
    assert "error 2" in changes["fast"].detail


@pytest.mark.parametrize(
    ("status", "reason"), [("absent", "the extension does not load"), ("memory", "2 TiB")]
)
def test_a_row_of_ours_that_is_gone_is_told(status: str, reason: str) -> None:
    new = rollout()
    new.rows["fast"] = Row("fast", status, reason)
    assert verdicts(new, rollout())["fast"] == "lost"


def test_rows_that_were_not_selected_are_not_missed() -> None:
    new = rollout()
    del new.rows["fast"]
    assert verdicts(new, rollout()) == {"reference": "same"}


def test_a_row_alone_is_not_judged() -> None:
    """Nothing of its own run says how fast the machine was."""
    alone = group(ROLLOUT, row("fast", *[9.0] * 5))
    assert verdicts(alone, rollout()) == {}


# --- the command --------------------------------------------------------------------------------


def stored(path: Path, found: results.Result) -> str:
    path.write_text(json.dumps(results.to_json(found)), "utf-8")
    return str(path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "results"
    directory.mkdir()
    monkeypatch.setattr(results, "STORE", directory)
    monkeypatch.setattr(results.stored, "__defaults__", (directory,))
    return directory


def test_the_command_finds_the_newest_of_the_same_kind(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(store / "speed_a.json", result(rollout(fast=0.25), date="2026-01-01"))
    stored(store / "speed_b.json", result(rollout(fast=0.50), date="2026-01-02"))
    stored(store / "speed_c.json", result(rollout(fast=0.10), date="2026-01-03", threads=1))
    new = stored(tmp_path / "new.json", result(rollout(fast=0.50), date="2026-01-04"))
    assert track.main([new]) == 0
    assert "speed_b.json" in capsys.readouterr().out


def test_the_command_fails_where_something_became_slower(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored(store / "speed_a.json", result(rollout()))
    new = stored(tmp_path / "new.json", result(rollout(fast=0.4)))
    assert track.main([new]) == 1
    out = capsys.readouterr().out
    assert "slower" in out and ROLLOUT in out and "+60%" in out
    assert track.main([new, "--threshold", "0.7"]) == 0


def test_what_cannot_be_compared_is_said(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*paths: str) -> str:
        assert track.main(list(paths)) == 2
        return capsys.readouterr().err

    new = stored(tmp_path / "new.json", result(rollout()))
    assert "no stored result" in said(new)
    base = stored(store / "speed_a.json", result(rollout(), threads=1))
    assert "threads: 2 and 1" in said(new)
    assert "another kind of machine: threads: 2 and 1" in said(new, base)
    said(stored(store / "speed_a.json", result(rollout())))  # only itself
    esnr = group("esnr-5M", row("published", 1.0), row("fast", 0.1))
    assert "share no case" in said(stored(tmp_path / "esnr.json", result(esnr)), new)
    assert "missing.json" in said(str(tmp_path / "missing.json"))
    (tmp_path / "other.json").write_text("[1]", "utf-8")
    assert "no result of" in said(str(tmp_path / "other.json"))
    assert synthetic.FACTS["machine"]["threads"] == 2  # the facts were not changed by a test
