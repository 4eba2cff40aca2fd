"""What is timed as the call without its comparison takes the packs that are there."""

from __future__ import annotations

import json

import pytest
import torch

from bench import packs
from bench.measure import Effort, settled
from bench.pages import OPS
from pwm_fast import ops
from pwm_fast.backends import native, select
from pwm_fast.fused import weight_cache as store
from pwm_fast.fused.fingerprint import fingerprint

pytestmark = pytest.mark.skipif(native.why_missing() is not None, reason="not built")


def test_without_comparing_old_packs_are_taken() -> None:
    net = packs.field(16, 12)
    z, a = torch.rand(3, 16), torch.rand(3, packs.ACTION)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return ops.flow_step(z, a, net, fold=True)

    ops.invalidate()
    blind = packs.asking(packs.believing(), call)
    before = blind()
    net[0].weight.data.mul_(2.0)
    assert torch.equal(blind(), before)
    assert vars(store)["fingerprint"] is fingerprint
    assert not torch.equal(packs.asking(fingerprint, call)(), before)
    ops.invalidate()


def test_a_row_for_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "SIZES", ((8, 8),))
    monkeypatch.setattr(packs, "BATCHES", (1, 2))
    monkeypatch.setattr(packs, "STEPS", 2)
    with settled():  # once: each race would have the collector look at all objects of all tests
        rows = packs.measure(Effort(seconds=0.0, min_rounds=1, max_rounds=1, sample=0.0))
    assert len(rows) == len(packs.PRECISIONS) * 2 * 4
    assert all(row["ratio"] > 0.0 for row in rows)
    assert packs.table(rows).count("\n") == 1 + len(packs.PRECISIONS) * 4
    assert select.requested_precision() == "auto"


def test_the_page_has_the_stored_table() -> None:
    stored = json.loads(packs.RESULT.read_text("utf-8"))
    assert packs.table(stored["rows"]) in OPS.read_text("utf-8")
