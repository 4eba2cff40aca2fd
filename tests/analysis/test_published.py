"""Published curves from CSV files: what is read, what is refused, and where it is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pwm_fast import compare as command
from pwm_fast.analysis import comparison, figures
from pwm_fast.analysis.diagnosed import diagnosed
from pwm_fast.analysis.groups import arrange
from pwm_fast.analysis.measures import measure, seconds_of, value_after
from pwm_fast.analysis.published import of_options, read
from pwm_fast.analysis.runs import Run, load
from pwm_fast.config import ConfigError
from tests.analysis.conftest import STEPS, write_run

GOOD = """\ufeff# Figure 3 of a paper

step,name,return,low,high,seconds
# later points first
200,"SAC, tuned",20,15,25,4
100, "SAC, tuned" ,10,5,15,2
50,PWM,-3.5e1,,,
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_read(tmp_path: Path) -> None:
    sac, pwm = read(write(tmp_path / "a.csv", GOOD.replace(', "SAC, tuned" ,', ',"SAC, tuned",')))
    assert (sac.name, sac.label) == ("SAC, tuned", "SAC, tuned (reference)")
    assert sac.steps.tolist() == [100, 200] and sac.values.tolist() == [10, 20]
    assert sac.band is not None and sac.band.tolist() == [[5, 15], [15, 25]]
    assert sac.seconds is not None and sac.seconds.tolist() == [2, 4]
    assert sac.at(150) == 15 and sac.band_at(150) == (10, 20)
    assert math.isnan(sac.at(99)) and sac.band_at(201) is None
    assert pwm.values.tolist() == [-35] and pwm.band is None and pwm.seconds is None
    assert pwm.at(50) == -35 and pwm.band_at(50) is None


HEAD = "name,step,return\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"a\.csv: expected a header name,step,return\[,low,high\]\[,seconds\], got an empty"),
        (HEAD, "expected at least one point below the header"),
        ("SAC,1,2\n", "line 1: expected a header .* column name is missing"),
        ("# x\nname,step\n", "line 2: expected a header .* column return is missing"),
        ("name,step,return,std\n", "line 1: .* got a column 'std'"),
        ("name,step,return,step\n", "line 1: .* column step is there twice"),
        ("name,step,return,low\n", "line 1: .* low and high come together"),
        (HEAD + "a,1,2\n\na,2\n", r"line 4: expected 3 cells \(name,step,return\), got 2"),
        (HEAD + ",1,2\n", "line 2, column name: expected a name"),
        (HEAD + "a,one,2\n", "line 2, column step: expected a finite number, 0 or more, got 'one'"),
        (HEAD + "a,-1,2\n", "line 2, column step: .*0 or more, got '-1'"),
        (HEAD + "a,1,nan\n", "line 2, column return: expected a finite number, got 'nan'"),
        (HEAD + "a,1,\n", "line 2, column return: expected a finite number, got ''"),
        (HEAD + "a,1,2\na,1.0,3\n", r"line 3, column step: .* got 1 \(also in line 2\)"),
        ("name,step,return,low,high\na,1,2,3,1\n", "line 2, column low: expected at most high=1"),
        ("name,step,return,low,high\na,1,2,3,\n", "line 2, column high: expected a number"),
        (
            "name,step,return,seconds\na,1,2,1\na,2,2,\n",
            "line 3, column seconds: expected a number, as other points of 'a'",
        ),
        (HEAD + 'a,"1,2\n', "line 2: expected comma-separated cells"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(write(tmp_path / "a.csv", text))
    assert str(raised.value).startswith(f"--reference {tmp_path / 'a.csv'}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe,")
    for name, why in (("none.csv", "No such file"), ("b.csv", "no UTF-8"), (".", "directory")):
        with pytest.raises(ConfigError, match=why):
            read(tmp_path / name)


def test_environments_of_options(tmp_path: Path) -> None:
    odd = write(tmp_path / "a=b.csv", HEAD + "x,1,2\n")
    plain = write(tmp_path / "c.csv", HEAD + "y,1,2\nz,1,3\n")
    found = of_options([str(odd), f"ant={plain}"])
    assert [(env, curve.name) for env, curve in found] == [(None, "x"), ("ant", "y"), ("ant", "z")]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for env in ("ant", "hopper"):
        write_run(tmp_path / "runs" / env, env={"name": env}, success=None)
    return tmp_path / "runs"


def test_on_the_page_and_in_the_figures(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the legends, marked; over time only what has times; in the tables of its environment."""
    text = "name,step,return,low,high,seconds\nSAC,0,10,0,20,0\nSAC,4000,30,20,40,9\nold,10,7,,,\n"
    file = write(tmp_path / "ref.csv", text)
    legends: dict[str, list[str]] = {}
    original = figures._picture

    def picture(figure, name, *rest):  # type: ignore[no-untyped-def]
        legends.setdefault(name, []).extend(t.get_text() for t in figure.legends[0].get_texts())
        return original(figure, name, *rest)

    monkeypatch.setattr(figures, "_picture", picture)
    for drawing in ("_final", "_esnr", "_throughput", "_gradients"):
        monkeypatch.setattr(figures, drawing, lambda *arguments: None)
    out = tmp_path / "out"
    assert command.run([str(runs / "ant"), "--out", str(out), "--reference", str(file)]) == 0
    assert legends["return_over_steps"][1:] == ["SAC (reference)", "old (reference)"]
    assert legends["return_over_time"][1:] == ["SAC (reference)"]
    page = (out / "comparison.html").read_text()
    assert "Reference curves" in page and str(file.name) in page
    assert page.count("SAC (reference)") == 2, "sample efficiency, and the curves themselves"
    assert "15.00" in page and "[5.00, 25.00]" in page, "of 0 and 4000 steps a quarter"


def test_references_and_environments(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "draw_all", lambda *arguments: [])
    file = write(tmp_path / "ref.csv", HEAD + "SAC,1,2\n")
    both = [str(runs), "--out", str(tmp_path / "out")]
    for given, message in (
        ([file], "needs its environment, as ENV=.*; there are ant, hopper"),
        ([f"walker={file}"], r"--reference walker=\.\.\.: no run is of that environment"),
        ([f"ant={file}", f"ant={file}"], "two files have a curve named 'SAC"),
    ):
        options = [part for name in given for part in ("--reference", str(name))]
        with pytest.raises(ConfigError, match=message):
            command.run([*both, *options])
    assert command.run([*both, "--reference", f"ant={file}"]) == 0
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert page.index("SAC (reference)") < page.index('<h2 id="env-hopper">')
    assert page.rindex("SAC (reference)") < page.index('<h2 id="env-hopper">')


# --- return after a time, and what was diagnosed --------------------------------------------------


def loaded(path: Path) -> Run:
    run = load(path)
    assert isinstance(run, Run)
    return run


def test_return_after_a_time(tmp_path: Path) -> None:
    """40 epochs of 2 s and of 4 s: quarters of 80 s; the slower one has half of the return then."""
    fast = loaded(write_run(tmp_path / "fast", seed=0, seconds=2.0))
    slow = loaded(write_run(tmp_path / "slow", seed=1, seconds=4.0))
    assert seconds_of([fast, slow]) == [20.0, 40.0, 60.0, 80.0]
    (environment,), _ = arrange([fast, slow])
    found = measure(environment, resamples=50)
    assert found.seconds == [20.0, 40.0, 60.0, 80.0]
    assert found.values[str(fast.path)]["return_after_40_s"] == pytest.approx(20 * STEPS / 10)
    assert found.values[str(slow.path)]["return_after_40_s"] == pytest.approx(10 * STEPS / 10)
    assert found.estimates[0]["return_after_40_s"].iqm == pytest.approx(15 * STEPS / 10)
    assert math.isnan(value_after(fast.evaluations, 81.0))
    untimed = fast.evaluations._replace(seconds=np.full(len(fast.evaluations.values), np.nan))
    assert math.isnan(value_after(untimed, 1.0))


def test_diagnoses_are_read_where_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    folder = run / "checkpoints" / "best.diagnosis"
    folder.mkdir(parents=True)
    (run / "checkpoints" / "best.pt").touch()
    of_run = {
        "checkpoint": str(run / "checkpoints" / "best.pt"),
        "epoch": 7,
        "horizon": 2,
        "prediction": {"latent_per_displacement": [0.9, 0.5]},
        "rewards": {
            "model": [0.8, 0.43],
            "model_low": [0.7, 0.4],
            "model_high": [0.9, 0.5],
            "linear_obs_actions": [0.5, 0.48],
        },
        "sensitivity": {"unavailable": "it cannot"},
    }
    elsewhere = {**of_run, "checkpoint": str(tmp_path / "other" / "best.pt")}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "best.pt").touch()
    content = {"settings": {"policy": "random"}, "checkpoints": [of_run, elsewhere]}
    (folder / "diagnosis.json").write_text(json.dumps(content))
    (found,) = diagnosed(loaded(run))
    assert found[:4] == ("best.pt", 7, "random", 2)
    assert (found.latent_error, found.reward_r2, found.linear_r2) == (0.9, 0.43, 0.48)
    assert found.reward_interval == (0.4, 0.5) and math.isnan(found.cosine)
    del of_run["rewards"]  # of an older version
    (folder / "diagnosis.json").write_text(json.dumps(content))
    assert diagnosed(loaded(run)) == []
    (folder / "diagnosis.json").write_text("{")
    assert diagnosed(loaded(run)) == []


def test_the_length_of_episodes_is_drawn_where_it_differs(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    logged = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for length, there in ((None, False), (lambda _: 240.0, False), (lambda e: 20.0 + e, True)):
        for row in logged:
            if length is not None and "eval_reward" in row:
                row["eval_episode_length"] = length(row["epoch"])
        (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in logged))
        (environment,), _ = arrange([loaded(path)])
        drawn = figures._episode_length(measure(environment, resamples=50), "iqm")
        assert (drawn is not None) == there
    assert drawn is not None and drawn.name == "episode_length"


def test_what_runs_logged_of_their_models_is_drawn(tmp_path: Path) -> None:
    """With a model that is worse than the mean; runs without the figures have no such picture."""
    path = write_run(tmp_path / "run")
    (environment,), _ = arrange([loaded(path)])
    assert figures._world_model(measure(environment, resamples=50), "iqm") is None
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in lines:
        row.update(action_saturation=0.1, random_share=0.5)
        if "eval_reward" in row:
            row.update(eval_reward_r2=-5.0 + row["epoch"], eval_latent_error=None)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (environment,), _ = arrange([loaded(path)])
    drawn = figures._world_model(measure(environment, resamples=50), "iqm")
    assert drawn is not None and drawn.name == "world_model"
    (tmp_path / "world_model.png").write_bytes(drawn.png)
    assert drawn.width > 3 * 300, "three panels: of what was never a number there is none"
