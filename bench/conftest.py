"""Options, selection and storing of the benchmarks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import report, results
from bench.cases import Case
from bench.catalogue import all_cases
from bench.session import Session

SESSION: pytest.StashKey[Session] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pwm_fast benchmarks")
    group.addoption(
        "--bench-device", default="cpu", metavar="DEVICE", help="cpu (default), cuda or cuda:N"
    )
    group.addoption(
        "--bench-threads", type=int, metavar="N", help="torch's CPU threads (torch's own choice)"
    )
    group.addoption(
        "--bench-seconds",
        type=float,
        metavar="S",
        help="time to spend on each case, over all its providers (each case's own choice)",
    )
    group.addoption(
        "--bench-large", action="store_true", help="the cases marked large too (an hour and more)"
    )


def pytest_configure(config: pytest.Config) -> None:
    try:
        device = torch.device(config.option.bench_device)
    except RuntimeError as error:
        raise pytest.UsageError(f"--bench-device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--bench-device=cuda: torch sees no usable CUDA GPU here")
    if device.type not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--bench-device must be cpu or cuda, got {device.type}")
    threads = config.option.bench_threads
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--bench-threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    if config.option.benchmark_columns is None:  # ours, below, says more
        config.option.benchmark_columns = ["min", "median", "max", "rounds"]
    config.stash[SESSION] = Session(device, config.option.bench_seconds)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    result = config.stash[SESSION].result()
    if result.groups:
        terminalreporter.section("pwm_fast benchmarks")
        terminalreporter.write_line(report.machine_line(result))
    for group in result.groups.values():
        terminalreporter.write_line("\n" + report.aligned(report.table(group)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "provider"} <= set(metafunc.fixturenames):
        params = []
        for case in all_cases(metafunc.config.stash[SESSION].device):
            marks = [getattr(pytest.mark, mark) for mark in sorted(case.marks)]
            for provider in case.providers:
                own = [*marks, pytest.mark.quick] if provider in case.quick else marks
                name = f"{case.name}-{provider}"
                params.append(pytest.param(case, provider, marks=own, id=name))
        metafunc.parametrize(("case", "provider"), params)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.bench_large or config.option.markexpr:
        return
    large = [item for item in items if item.get_closest_marker("large")]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if not item.get_closest_marker("large")]


@pytest.fixture
def row(request: pytest.FixtureRequest, case: Case, provider: str) -> results.Row:
    """The provider's measured row; its case is measured on the first request for one of them."""
    selected = [
        str(item.callspec.params["provider"])
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and hasattr(item, "callspec")
        and item.callspec.params.get("case") is case
    ]
    return request.config.stash[SESSION].row(case, provider, selected)


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    """In place of pytest-benchmark's own, which holds the host's name."""
    result = config.stash[SESSION].result()
    return {**result.facts["machine"], **result.facts["software"]}


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, Any]:
    return dict(config.stash[SESSION].result().facts["commit"])


def pytest_benchmark_generate_json(config: pytest.Config) -> dict[str, Any]:
    """What ``--benchmark-json`` writes: rows that failed or are absent stand there too."""
    return results.to_json(config.stash[SESSION].result())
