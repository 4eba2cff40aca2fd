"""Sweeps of tiny runs, and the Slurm that some of them run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    import hydra  # noqa: F401
    import mujoco.batch  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]  # the trainer needs pwm-fast[train]
else:
    from tests.run.conftest import launcher, whole_run  # noqa: F401

from tests.launch.slurm import Cluster, NoDevices, why_not


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running Slurm."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    try:
        started = Cluster(tmp_path_factory.mktemp("slurm"))
    except NoDevices as error:
        pytest.skip(str(error))
    yield started
    started.close()


@pytest.fixture
def cluster(one_cluster: Cluster) -> Iterator[Cluster]:
    """The Slurm, with an empty queue."""
    yield one_cluster
    one_cluster.clear()


@pytest.fixture(scope="session")
def no_plots(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for PYTHONPATH in which matplotlib is missing: plots take the longest."""
    package = tmp_path_factory.mktemp("no_plots") / "matplotlib"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('left out by the tests')\n")
    return str(package.parent)
