"""Launch choices: what is kept of what was measured, and in which form."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.tune import Log, Options, Problem
from tests.bench.synthetic import FACTS

CHOICES: dict[str, Options] = {
    "16x64": {"block_m": 16, "block_n": 64},
    "64x128": {"block_m": 64, "block_n": 128},
    "unfused": {"block_m": 0},
}


def problem(key: str = "16 R128 N512 K512", heuristic: str = "64x128", **seconds: Any) -> Problem:
    """A problem whose choices take so long, or raise."""

    def run(options: Options) -> Callable[[], Any]:
        name = next(n for n, o in CHOICES.items() if o == options)
        value = seconds[name]
        if isinstance(value, Exception):
            raise value
        return lambda: value

    return Problem("linear_norm_act_fwd", key, CHOICES, heuristic, run)


def times(a: Any, b: Any, c: Any) -> dict[str, Any]:
    return {"16x64": a, "64x128": b, "unfused": c}


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        (times(1e-6, 2e-6, 3e-6), CHOICES["16x64"]),
        (times(1.99e-6, 2e-6, 3e-6), None),  # within the noise
        (times(3e-6, 2e-6, 1e-6), {"block_m": 0}),
        (times(3e-6, 2e-6, 2.5e-6), None),
        (times(3e-6, RuntimeError("does not compile"), 4e-6), CHOICES["16x64"]),
        (times(tune.Wrong("off"), 2e-6, 3e-6), None),
    ],
)
def test_what_pays_is_kept(seconds: dict[str, Any], kept: Options | None) -> None:
    found = problem(**seconds)
    measured = tune.measure(found, lambda call: call())
    assert tune.entry(found, measured) == kept


def test_a_failed_choice_says_why_and_is_never_the_best() -> None:
    found = problem(**times(tune.Wrong("relative error 1"), 2e-6, 3e-6))
    measured = tune.measure(found, lambda call: call())
    assert measured == {"16x64": "Wrong: relative error 1", "64x128": 2.0, "unfused": 3.0}
    assert "the heuristic stays" in tune.line(found, measured, None)


def test_a_second_run_measures_what_is_missing(tmp_path: Path) -> None:
    first = problem("16 R64 N512 K512", **times(1e-6, 2e-6, 3e-6))
    second = problem("16 R128 N512 K512", **times(2e-6, 1e-6, 3e-6))
    path, said = tmp_path / "tune_x.json", []
    over = iter([False, True])
    log = Log(path, copy.deepcopy(FACTS))
    entries, right = tune.tune([first, second], log, lambda c: c(), lambda: next(over), said.append)
    assert right and len(said) == 1
    assert entries == {"linear_norm_act_fwd": {"16 R64 N512 K512": CHOICES["16x64"]}}

    broken = problem("16 R64 N512 K512", **times(*[RuntimeError("not again")] * 3))
    log = Log(path, copy.deepcopy(FACTS))
    entries, right = tune.tune([broken, second], log, lambda c: c(), lambda: False, said.append)
    assert right and set(log.times) == {first.name, second.name}
    assert entries == {"linear_norm_act_fwd": {"16 R64 N512 K512": CHOICES["16x64"]}}


def test_times_of_another_commit_are_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "tune_x.json"
    log = Log(path, copy.deepcopy(FACTS))
    tune.tune([problem(**times(1e-6, 2e-6, 3e-6))], log, lambda c: c(), lambda: False, str)
    facts = copy.deepcopy(FACTS)
    facts["commit"]["id"] = "fedcba987654"
    assert Log(path, facts).times == {}
    assert {"schema", "commit", "machine", "software", "times"} <= set(json.loads(path.read_text()))


def test_entries_that_were_not_measured_stay() -> None:
    found = [problem("b", **times(1e-6, 2e-6, 3e-6)), problem("c", **times(1e-6, 2e-6, 3e-6))]
    own: dict[str, Options] = {"a": {"block_m": 32}, "b": {"block_m": 16}}
    before = {"linear_norm_act_fwd": own, "other": {"d": {}}}
    measured = {found[0].name: {"64x128": 1.0}}
    assert tune.merged(before, found, measured, {"linear_norm_act_fwd": {}}) == {
        "linear_norm_act_fwd": {"a": {"block_m": 32}},
        "other": {"d": {}},
    }


def test_a_dry_run_lists_the_problems(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pwm_fast.kernels.plan")
    assert tune.main(["--dry", "--rows", "128"]) == 0
    out = capsys.readouterr().out
    assert "linear_norm_act_bwd 16 R128 N1792 K1792" in out
    assert f"{2 * len(tune.SHAPES)} problems" in out and "not measured" in out


def test_the_kernels_take_what_is_written(tmp_path: Path) -> None:
    """Every choice of every problem is an entry that the planning accepts."""
    planning = pytest.importorskip("pwm_fast.kernels.plan")
    tuning = pytest.importorskip("pwm_fast.kernels.tuning")
    for p in tune.problems(None, 132, 227 * 1024, (64, 16384)):
        product, limits = planning.product_of(p.kernel, p.key), planning.Limits(132)
        assert p.heuristic in p.choices
        for name, options in p.choices.items():
            tuning.save("Some GPU", {p.kernel: {p.key: options}}, tmp_path)
            tuned = tuning.load("Some GPU", tmp_path)[p.kernel]
            found = planning.plan(product, limits, tuned)
            assert ("unfused" if found is None else tune._name(found)) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("args", "says"),
    [([], "GPUs here"), (["--device", "cpu"], "--dry"), (["--rows", "0"], "--rows")],
)
def test_what_cannot_run_is_said_in_a_line(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(args) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_every_choice_computes_the_same() -> None:
    pytest.importorskip("pwm_fast.kernels.linear_norm_act")
    properties = torch.cuda.get_device_properties(0)
    shared = properties.shared_memory_per_block_optin
    for p in tune.problems(torch.device("cuda"), properties.multi_processor_count, shared, (128,)):
        for options in p.choices.values():
            p.run(options)  # raises where it is wrong
