"""Figures of a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pwm_fast.run import charts, metrics
from pwm_fast.run.charts import PANELS, _running_mean, plot_run

image = pytest.importorskip("matplotlib.image")
NAMES = {f"{name}.png" for name in (*PANELS, "summary")}


def write(run_dir: Path, rows: list[metrics.Row]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(epoch: int, **values: float | None) -> metrics.Row:
    return {"epoch": epoch, "env_steps": 10 * epoch, **values}


ROWS = {
    "one row": [row(0, eval_reward=1.0, eval_reward_std=0.5)],
    "nothing to draw": [row(e) for e in range(3)],
    "nulls": [row(0), row(1, wm_loss=None, eval_reward=None), row(2, wm_loss=1.0, esnr_db=-3.0)],
    "zero on a log axis": [row(e, wm_loss=float(e), actor_grad_norm=0.0) for e in range(5)],
    "many": [
        row(e, wm_loss=1 / (e + 1), train_reward=-e, eval_reward=-e / 2, esnr_db=e)
        for e in range(99)
    ],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ROWS)
def test_draws_whatever_there_is(name: str, tmp_path: Path) -> None:
    write(tmp_path, ROWS[name])
    written = plot_run(tmp_path, "a title")
    assert {p.name for p in written} == {p.name for p in (tmp_path / "plots").iterdir()} == NAMES
    for path in written:
        pixels = image.imread(path)
        assert pixels.shape[0] > 300 and pixels.shape[1] > 500
        assert pixels[..., :3].std() > 0.02, "a blank figure"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [2, 7, 30])
def test_several_tasks(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes for each, whatever of it was logged; a run of one task has no such figure."""
    names = [f"domain-task-{k}" for k in range(count)]
    logged = [
        row(
            e,
            eval_reward=1.0,
            **{f"eval_reward/{name}": float(k * e) for k, name in enumerate(names) if e % 2 == 0},
            **{f"train_reward/{name}": None if e < 3 else 1.0 for name in names[1:]},
        )
        for e in range(9)
    ]
    drawn = []
    made = charts._task_returns
    monkeypatch.setattr(
        charts, "_task_returns", lambda *given: drawn.append(made(*given)) or drawn[-1]
    )
    write(tmp_path, logged)
    written = plot_run(tmp_path, "a title")
    assert {p.name for p in written} == NAMES | {"task_returns.png"}
    (figure,) = drawn
    assert [axes.get_title() for axes in figure.axes] == names
    assert [len(axes.lines) for axes in figure.axes] == [1] + [2] * (count - 1)
    for k, axes in enumerate(figure.axes):
        assert axes.lines[-1].get_ydata().tolist() == [k * e for e in (0, 2, 4, 6, 8)]
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert not any(
        a.shrunk(0.98, 0.98).overlaps(b.shrunk(0.98, 0.98))
        for i, a in enumerate(boxes)
        for b in boxes[:i]
    )


def test_nothing_logged(tmp_path: Path) -> None:
    assert plot_run(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_running_mean() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    assert _running_mean(values, 3).tolist() == [0.5, 1.0, 2.0, 5.0, 6.5]
    assert _running_mean(np.ones(7), 0).tolist() == [1.0] * 7
