"""The examples of the pages on torch environments and on the cost model run."""

from __future__ import annotations

import functools
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.envs import _factory

DOCS = Path(__file__).parents[2] / "docs"


@functools.cache
def run(page: str) -> dict[str, Any]:
    """The names that a page's blocks of Python leave behind, one after another."""
    path = DOCS / page
    names: dict[str, Any] = {"__name__": "docs"}
    for block in re.findall(r"```python\n(.*?)```", path.read_text("utf-8"), re.DOTALL):
        assert len(block.splitlines()) <= 38
        exec(compile(block, str(path), "exec"), names)
    return names


def test_torch_environments() -> None:
    """The agent learns in the few steps that the page runs."""
    names = run("torch_environments.md")
    assert all(bool(x.isfinite()) for x in names["metrics"].values())
    episodes = names["returns"]
    first, last = torch.cat(episodes[:40]).mean(), torch.cat(episodes[-20:]).mean()
    assert last > first + 5.0
    names["env"].close()


def test_the_factory_of_the_page_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("walking")
    vars(module).update(run("torch_environments.md"))
    monkeypatch.setitem(sys.modules, "walking", module)
    found = _factory.named("walking:velocity", {"terrain": "rough"})
    assert found.__name__ == "velocity"


def test_the_cost_model() -> None:
    names = run("cost_model.md")
    assert names["action"].shape == (names["B"], names["A"])
    assert names["plan"].grad.isfinite().all()
    assert names["solver"].__defaults__ == ("cpu",)
    start = torch.zeros(names["B"], 1, names["H"], names["A"])
    zero = names["cost_model"].get_cost({"state": names["info"]["state"][:, None]}, start)
    assert (names["cost"] < zero).all()
