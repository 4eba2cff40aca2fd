"""Launch choices: what is kept of what was measured, and in which form."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import launches, pool, products, tune, tune_compile, tune_problems, tune_report
from bench.tune import Log, Options, Problem
from pwm_fast.kernels import cost, tuning
from pwm_fast.kernels.plan import GemmShape, Limits, gemm_shape, plan
from tests.bench import fake_compiling
from tests.bench.synthetic import FACTS

CHOICES: dict[str, Options] = {
    "16x64": {"block_m": 16, "block_n": 64},
    "64x128": {"block_m": 64, "block_n": 128},
    "unfused": {"block_m": 0},
}
KERNEL, KEYS = "linear_norm_act_fwd", ("16 R64 N512 K512", "16 R128 N512 K512")
FITTING = Limits(132)


def problem(key: str = KEYS[1], heuristic: str = "64x128", **seconds: Any) -> Problem:
    """A problem whose choices take so long, or raise."""

    def make(options: Options) -> Callable[[], Any]:
        name = next(n for n, o in CHOICES.items() if o == options)
        value = seconds[name]
        if isinstance(value, BaseException):
            raise value
        return lambda: value

    model = {"16x64": 2.0, "64x128": 2.0, "unfused": 3.0}
    return Problem(KERNEL, key, CHOICES, heuristic, lambda: make, model)


def times(a: Any, b: Any, c: Any) -> dict[str, Any]:
    return {"16x64": a, "64x128": b, "unfused": c}


def clock(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Sequence[float]]:
    """Three rounds, the third slower for all."""
    return {name: [call(), call(), 2 * call()] for name, call in calls.items()}


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "tune_x.json", copy.deepcopy(FACTS))


@pytest.mark.parametrize(
    ("seconds", "kept"),
    [
        (times(1e-6, 2e-6, 3e-6), CHOICES["16x64"]),
        (times(1.99e-6, 2e-6, 3e-6), None),  # within the noise
        (times(3e-6, 2e-6, 1e-6), {"block_m": 0}),
        (times(3e-6, 2e-6, 2.5e-6), None),
        (times(3e-6, RuntimeError("does not compile"), 4e-6), CHOICES["16x64"]),
        (times(RuntimeError("off"), 2e-6, 3e-6), None),
        (times(*[RuntimeError("off")] * 3), None),
    ],
)
def test_what_pays_is_kept(seconds: dict[str, Any], kept: Options | None, log: Log) -> None:
    found = problem(**seconds)
    assert tune.entry(found, tune.measure(found, clock, log)) == kept


def test_what_is_faster_in_some_rounds_only_is_not_kept() -> None:
    rounds = times([1.0, 1.0, 1.0, 3.0, 3.0], [2.0] * 5, [9.0] * 5)
    assert tune.medians(rounds)["16x64"] == 1.0
    assert tune.entry(problem(), rounds) is None
    rounds["16x64"][3:] = [1.0, 1.0]
    assert tune.entry(problem(), rounds) == CHOICES["16x64"]


def test_a_failed_choice_says_why_and_is_never_the_best(log: Log) -> None:
    found = problem(**times(ValueError("relative error 1"), 2e-6, 3e-6))
    measured = tune.measure(found, clock, log)
    assert measured == {
        "16x64": "ValueError: relative error 1",
        "64x128": [2.0, 2.0, 4.0],
        "unfused": [3.0, 3.0, 6.0],
    }
    said = tune.line(found, measured)
    assert "the heuristic stays" in said and "16x64 failed: ValueError: relative error 1" in said
    assert "2.00x of the heuristic's 64x128" in tune.line(found, times([1.0], [2.0], [3.0]))


def test_a_second_run_measures_what_is_missing(log: Log) -> None:
    first = problem(KEYS[0], **times(1e-6, 2e-6, 3e-6))
    second = problem(KEYS[1], **times(2e-6, 1e-6, 3e-6))
    said: list[str] = []
    over = iter([False, True])
    assert tune.tune([first, second], log, clock, lambda: next(over), said.append)
    assert len(said) == 1 and set(log.times) == {first.name}

    broken = problem(KEYS[0], **times(*[RuntimeError("not again")] * 3))
    again = Log(log.path, copy.deepcopy(FACTS))
    assert tune.tune([broken, second], again, clock, lambda: False, said.append)
    assert set(again.times) == {first.name, second.name}
    assert again.times[first.name] == log.times[first.name]


def test_a_choice_that_ended_the_process_is_left_out(log: Log) -> None:
    deadly = problem(**times(1e-6, SystemExit(), 3e-6))
    with pytest.raises(SystemExit):
        tune.tune([deadly], log, clock, lambda: False, str)
    again = Log(log.path, copy.deepcopy(FACTS))
    assert not tune.tune([deadly], again, clock, lambda: False, str)
    assert again.times[deadly.name] == times([1.0, 1.0, 2.0], tune.ENDED, [3.0, 3.0, 6.0])
    assert tune.entry(deadly, again.times[deadly.name]) == CHOICES["16x64"]


@pytest.mark.parametrize(
    ("where", "what", "value"),
    [("commit", "id", "fedcba987654"), ("software", "triton", "0"), ("machine", "gpu", "another")],
)
def test_other_times_are_measured_anew(where: str, what: str, value: str, log: Log) -> None:
    tune.tune([problem(**times(1e-6, 2e-6, 3e-6))], log, clock, lambda: False, str)
    assert Log(log.path, copy.deepcopy(FACTS)).times
    facts = copy.deepcopy(FACTS)
    facts[where][what] = value
    assert Log(log.path, facts).times == {}
    stored = json.loads(log.path.read_text())
    assert {"schema", "commit", "machine", "software", "times"} <= set(stored)


def test_the_file_says_what_with_and_why(tmp_path: Path) -> None:
    found = [problem(key) for key in KEYS]
    other = {"16 R32 N512 K512": CHOICES["16x64"]}
    tuning.save("Some GPU", {KERNEL: {**other, KEYS[1]: CHOICES["16x64"]}}, tmp_path)
    measured = {
        found[0].name: times([1.0], [2.0], [3.0]),
        found[1].name: times([3.0], [2.0], [3.0]),
    }
    path, kept = tune.save("Some GPU", found, measured, FACTS, tmp_path)
    assert kept == 1
    assert tuning.load("Some GPU", tmp_path) == {KERNEL: {**other, KEYS[0]: CHOICES["16x64"]}}
    content = json.loads(path.read_text())
    assert content["gpu"] == "Some GPU" and content["made"] == FACTS
    assert content["times"][KERNEL][KEYS[0]] == times(1.0, 2.0, 3.0)


def test_a_file_that_cannot_be_read_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning.file_of("Some GPU", tmp_path).write_text("{")
    tune.save("Some GPU", [problem()], {problem().name: times([1.0], [2.0], [3.0])}, {}, tmp_path)
    assert "written anew" in capsys.readouterr().err
    assert tuning.load("Some GPU", tmp_path) == {KERNEL: {KEYS[1]: CHOICES["16x64"]}}


# --- what is measured -----------------------------------------------------------------------------


def test_all_kernels_are_measured_with_the_plain_path_among_their_choices() -> None:
    found = list(tune_problems.problems(None, FITTING))
    assert {p.kernel for p in found} == set(tuning.FORMS)
    assert len({p.name for p in found}) == len(found)
    for p in found:
        plain = p.choices[tune_problems.LAYERS if p.kernel == "rollout" else tune_problems.PLAIN]
        assert plain == {tuning.FORMS[p.kernel].fields[0]: 0}
        assert p.heuristic in p.choices
        assert set(p.model) == (set() if p.kernel == "rollout" else set(p.choices))


def test_the_kernels_take_what_is_written() -> None:
    """Every choice of every problem is an entry that the planning accepts."""
    rollout = pytest.importorskip("pwm_fast.kernels.rollout")
    for p in tune_problems.problems(None, FITTING, ("16", "tf32", "ieee"), (64, 16384)):
        for name, options in p.choices.items():
            tuning.check(p.kernel, p.key, options)
            if p.kernel == "rollout":
                rollout.check_tuned(p.key, options, *FITTING)
                continue
            found = plan(gemm_shape(p.kernel, p.key), FITTING, {p.key: options})
            assert (tune_problems.PLAIN if found is None else found.name) == name


def test_rows_in_place_of_those_that_agents_have() -> None:
    found = [
        p for p in tune_problems.problems(None, FITTING, rows=(500, 512)) if p.kernel != "rollout"
    ]
    assert {p.key.split(" R")[1].split()[0] for p in found} == {"512"}


def test_what_an_agent_asks_for_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most often first, whatever float32 operands would be multiplied in."""
    triton = pytest.importorskip("pwm_fast.backends.triton")
    from pwm_fast.backends.fused_gemm import GemmCall
    from pwm_fast.backends.precision import FAST
    from pwm_fast.kernels import rollout

    def count(*args: object) -> None:
        own = triton.TritonKernels(FAST).gemms
        for rows in (64, 64, 32):
            own.gemm_axpby(GemmCall(rows, 48, 16, torch.float16, torch.device("cpu")))
        own.backward(GemmCall(6, 40, 24, torch.float16, torch.device("cpu"), 3), "act_norm")
        rollout.choose_layout(64, 512, torch.float16, *FITTING, {})

    monkeypatch.setattr(launches, "count", count)
    asked = products.record(launches.small())
    assert asked.products == [
        GemmShape("linear_axpby", 64, 48, 16),
        GemmShape("linear_act_norm_bwd", 2, 40, 24, 3),
        GemmShape("linear_axpby", 32, 48, 16),
    ]
    assert asked.rollouts == [products.Rollout(64, 512)]


def test_what_agents_ask_for_is_stored() -> None:
    stored = products.load()
    assert list(stored) == [n if b is None else f"{n}, batch {b}" for n, b in products.AGENTS]
    assert {p.kernel for p in stored["5M_flow"].products} == set(tuning.FORMS) - {"rollout"}
    # The published agents' critics: 3 members, minibatches of 512 states, 400 and 200 features.
    critics = [p for p in stored["5M_flow"].products if p.members == 3 and p.rows == 512]
    assert ("linear_act_norm_bwd", 400, 200) in {(p.kernel, p.n, p.k) for p in critics}
    assert stored["5M_flow"].rollouts == [(128, 512)]


# --- the report -----------------------------------------------------------------------------------


def test_the_report_says_how_far_model_and_heuristic_are_off() -> None:
    found = [problem(key) for key in KEYS]
    measured = {
        found[0].name: times([1.0], [2.0], [6.0]),
        found[1].name: times([4.0], [2.0], "Wrong: off"),
    }
    lost = tune_report.heuristic(found, measured)[1].split()
    assert lost == [KERNEL, "2", "1", "1.41", "2.00"]
    ratios = {text[:52].strip(): text[52:].split() for text in tune_report.model(found, measured)}
    assert ratios[f"{KERNEL}, plain GEMM"] == ["1", "2.00", "2.00", "2.00"]
    assert ratios[f"{KERNEL}, fewer rows, shared rows"] == ["2", "0.80", "1.25", "1.70"]
    assert ratios[f"{KERNEL}, 64 rows or more, shared rows"] == ["2", "1.00", "1.00", "1.00"]


def test_constants_stand_beside_their_readings() -> None:
    text = "\n".join(tune_report.constants({"L2 read by one SM": 71.0}))
    assert "85 GB/s" in text and "71 GB/s" in text and "not measured" in text
    assert tune_report.readings("a GPU that nobody has") == {}
    table = tune_report.table(tune_report.readings())
    assert len(table.splitlines()) == 2 + len(cost.CONSTANTS)
    assert table in tune_report.PERFORMANCE.read_text(), "run python -m bench.tune_report"


# --- the command ----------------------------------------------------------------------------------


def test_a_dry_run_lists_the_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["--dry-run", "--rows", "128", "--only", "linear_norm_act_bwd"]) == 0
    out = capsys.readouterr().out
    assert "linear_norm_act_bwd 16 R128 N1792 K1792: " in out and "unfused; heuristic" in out
    assert "rollout" not in out and "not measured" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "GPUs here"),
        (["--device", "cpu"], "--dry-run"),
        (["--rows", "0"], "--rows"),
        (["--dry-run", "--only", "nothing"], "no problem"),
    ],
)
def test_what_cannot_run_is_said_in_a_line(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(args) == 2
    err = capsys.readouterr().err
    assert says in err and len(err.splitlines()) == 1


def test_a_run_but_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that the command does, on a made-up device."""
    products_ = pytest.importorskip("bench.tune_products")
    compiled: list[Sequence[str]] = []
    measured: list[str] = []

    class Workload:
        def __init__(self, product: GemmShape, device: torch.device) -> None:
            self.product = product

        def call(self, chosen: Any) -> Callable[[], float]:
            measured.append(self.product.key)
            slow = 1.0 if chosen is None else chosen.block_m
            return lambda: 1e-6 * slow

    monkeypatch.setattr(tune, "_device", lambda name: torch.device("cpu"))
    monkeypatch.setattr(
        tune_problems.planning, "device_limits", lambda device: ("Some GPU", FITTING)
    )
    monkeypatch.setattr(tune, "on_gpu", clock)
    monkeypatch.setattr(tune.tune_compile, "ahead", lambda names, *args: compiled.append(names))
    monkeypatch.setattr(products_, "WORKLOADS", dict.fromkeys(products_.WORKLOADS, Workload))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(tune.results, "STORE", tmp_path)
    arguments = ["--only", "linear_norm_act_fwd 16 R128 N512", "--precision", "16"]
    assert tune.main([*arguments, "--minutes", "0"]) == 0
    assert not measured and "0 of 2 problems, 0 entries" in capsys.readouterr().out
    for _ in range(2):
        assert tune.main(arguments) == 0
    assert [len(names) for names in compiled] == [2, 2, 0]
    entries = tuning.load("Some GPU")[KERNEL]
    assert entries == {key: {"block_m": 0} for key in measured} and len(entries) == 2
    assert len(measured) == 2 * 8, "measured again"
    out = capsys.readouterr().out
    assert "unfused 1 µs, 16.00x of the heuristic's 16x64 16 µs: kept" in out
    assert "heuristic / best choice" in out and "measured / model" in out and "85 GB/s" in out


def test_choices_are_compiled_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ahead(names: list[str], seconds: float) -> None:
        tune_compile.ahead(names, partial(fake_compiling.mark, folder=str(tmp_path)), seconds)

    monkeypatch.setattr(tune_compile, "jobs", lambda: 2)
    ahead(["alone"], 100.0)
    assert list(tmp_path.iterdir()) == []
    ahead(["a", "b", "c"], 100.0)
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c"}
    ahead(["hang", "hang"], 0.1)  # comes back


def test_a_process_that_dies_costs_its_own_item(tmp_path: Path) -> None:
    work = partial(fake_compiling.mark, folder=str(tmp_path))
    found = dict(pool.each(work, ["die", "aa", "raise", "bbb"], 2))
    assert found["aa"] == 2 and found["bbb"] == 3
    assert str(found["die"]) == "its process died" and str(found["raise"]) == "of the test"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_run_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tune.results, "STORE", tmp_path)
    assert tune.main(["--minutes", "1", "--only", "16 R128 N512 K512"]) == 0
    assert tune.main(["--minutes", "1", "--only", "float16 B128"]) == 0
    assert len(list(tmp_path.glob("*.json"))) == 2
