"""The parity of shipped and of changed configurations, and the command."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pwm_fast import cli, parity
from pwm_fast import config as configuration
from pwm_fast.analysis import fairness
from pwm_fast.analysis.accounting import Flops, Networks, Spaces, world_model_parameters
from pwm_fast.analysis.fairness import Parity, compare_parameters, shipped_pairs, suggest
from pwm_fast.config import ConfigError

pytest.importorskip("hydra")
ANT = Spaces(37, 8, True)


@pytest.fixture
def ant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ant's widths, without its simulator; the FLOPs, which take longest, have their own test."""
    monkeypatch.setattr(fairness, "spaces_of", lambda config: ANT)
    fixed = fairness.Costs(*[Flops(10**6, 3 * 10**6)] * 5, learning_per_step=2e9)
    monkeypatch.setattr(fairness, "count_flops", lambda *args: fixed)


def test_pairs_are_those_of_the_directory() -> None:
    assert (
        dict(shipped_pairs()).items()
        >= {
            "pwm_flow": "pwm",
            "pwm_5M_flow": "pwm_5M",
            "pwm_19M_flow": "pwm_19M",
            "pwm_48M_flow": "pwm_48M",
            "pwm_317M_flow": "pwm_317M",
            "pwm_tiny_flow": "pwm_tiny",
        }.items()
    )


@pytest.mark.parametrize("spaces", [ANT, Spaces(5, 1, False)], ids=["ant", "cart-pole"])
@pytest.mark.parametrize(("flow", "base"), shipped_pairs())
def test_every_shipped_flow_is_fair(flow: str, base: str, spaces: Spaces) -> None:
    result = compare_parameters(
        configuration.compose(f"alg={flow}"), configuration.compose(f"alg={base}"), spaces
    )
    assert result.fair
    assert result.different == ()
    assert abs(result.percent("world_model")) <= 2.0
    assert result.counts.get("encoder") == result.base.get("encoder") != 0  # None of observations
    for name in ("reward", "actor", "critics"):
        assert result.counts[name] == result.base[name] > 0
    assert result.counts["velocity"] != 0 != result.base["dynamics"]


def result(**counts: int) -> Parity:
    base = {"encoder": 10, "dynamics": 50, "reward": 40, "world_model": 100, "total": 200}
    ours = {"encoder": 10, "velocity": 50, "reward": 40, "world_model": 100, "total": 200}
    return Parity("ours", "base", {**ours, **counts}, base, ())


def test_limit() -> None:
    assert result(world_model=102).fair and result(world_model=98).fair
    assert not result(world_model=103).fair and not result(world_model=97).fair
    assert not result(total=205).fair, "the policy counts, too"
    assert not result()._replace(different=("encoder",)).fair
    assert "world model differs by -3.00 %" in fairness.verdict(result(world_model=97))
    assert "the reward has other layers" in fairness.verdict(
        result()._replace(different=("reward",))
    )


def test_dynamics_of_any_name_have_a_line() -> None:
    ours = result()._replace(counts={"encoder": 10, "field": 70, "world_model": 120, "total": 200})
    lines = fairness.parameter_table(ours).splitlines()
    table = {line.split("  ")[0]: line.split() for line in lines}
    assert table["dynamics / field"][3:] == ["50", "70", "+40.00", "%"]
    both = ours._replace(base=ours.counts)
    assert "\nfield " in fairness.parameter_table(both)


def test_same_size_of_other_layers_is_seen() -> None:
    """An encoder with two layers swapped has other shapes, whatever its count."""
    ours = configuration.compose("alg=pwm_5M_flow", "alg.world_model.encoder_units=[256,300]")
    base = configuration.compose("alg=pwm_5M", "alg.world_model.encoder_units=[300,256]")
    assert compare_parameters(ours, base, ANT).different == ("encoder",)


@pytest.mark.parametrize("target", [100_000, 1_521_253, 20_000_000])
def test_suggestion_is_the_best_width(target: int) -> None:
    config = configuration.compose("alg=pwm_5M_flow").alg.world_model
    found = suggest(config, target, ANT)

    def distance(width: int) -> int:
        config.units = [width, width]
        return abs(world_model_parameters(config, ANT) - target)

    assert distance(found.best) == min(map(distance, range(max(found.best - 3, 1), found.best + 4)))
    neighbours = [w for w in (found.aligned - 8, found.aligned, found.aligned + 8) if w > 0]
    assert found.aligned % 8 == 0
    assert distance(found.aligned) == min(map(distance, neighbours))
    config.units = [found.best] * 2
    ours = world_model_parameters(config, ANT)
    assert found.best_percent == pytest.approx(100 * (ours - target) / target)


def test_no_width_to_suggest() -> None:
    config = configuration.compose("alg=pwm_5M_flow", "alg.world_model.units=[]").alg.world_model
    with pytest.raises(ConfigError, match="no width to suggest"):
        suggest(config, 10**6, ANT)


@pytest.mark.usefixtures("ant")
def test_table_of_a_pair(capsys: pytest.CaptureFixture) -> None:
    arguments = ["alg=pwm_48M_flow", "against=pwm_48M", "env=ant", "--suggest"]
    assert parity.run(arguments) == 0
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["world model"][2:] == ["18,668,389", "18,648,121", "-0.11", "%"]
    assert lines["encoder"][1:] == ["7,883,520", "7,883,520", "0"]
    assert lines["dynamics / velocity"][3:] == ["5,991,168", "5,970,900", "-0.34", "%"]
    for name in ("reward", "actor", "critics", "total", "parameters", "FLOPs"):
        assert name in lines
    text = "\n".join(lines)
    assert "termination head is left out on both sides" in text
    assert "multiply-add in a matrix product is 2 FLOPs" in text
    assert "suggested: alg.world_model.units=[1792,1792] (+0.001 %)" in text
    updates = [k for k in lines if k.startswith(("world-model update", "actor update"))]
    assert len(updates) == 4
    assert lines["environment step: both"][-5:] == ["2.003", "G", "2.003", "G", "1.00"]


@pytest.mark.usefixtures("ant")
def test_policies_of_a_pair(ant: None, capsys: pytest.CaptureFixture) -> None:
    """Each side has its own; long names push the columns apart."""
    request = parity.parse(
        ["alg=pwm_tiny", "against=pwm_tiny", "actor=flow_g", "against.actor=meanflow"]
    )
    assert request.ours == ("actor=flow_g",) and request.theirs == ("actor=meanflow",)
    assert fairness.check_pair(request, ("pwm_tiny", "pwm_tiny")) == 0
    out = capsys.readouterr().out
    for table in ("parameters", "FLOPs"):
        (head,) = (x for x in out.splitlines() if x.startswith(table))
        assert head.split()[1:3] == ["pwm_tiny_actor_meanflow", "pwm_tiny_actor_flow_g"]


def test_status_of_an_unfair_pair(capsys: pytest.CaptureFixture) -> None:
    assert parity.run(["alg=pwm_5M_flow", "alg.world_model.units=[600,600]"]) == 1
    assert "not fair: world model differs by +12." in capsys.readouterr().out
    assert parity.run(["alg=pwm_5M_flow", "against=pwm_19M"]) == 1
    assert "the encoder has other layers" in capsys.readouterr().out
    changed = "against.world_model.units=[600,600]"
    assert parity.run(["alg=pwm_5M_flow", "alg.world_model.units=[600,600]", changed]) == 0


@pytest.mark.usefixtures("ant")
def test_all_pairs(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parity.run([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{flow} " in shown for flow, _ in shipped_pairs())
    assert shown.count(" fair\n") == len(shipped_pairs())
    monkeypatch.setattr(fairness, "shipped_pairs", lambda: [("pwm_19M_flow", "pwm_5M")])
    assert parity.run([]) == 1
    assert " not fair\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["foo"], "'foo' is neither key=value nor --suggest"),
        (["--foo=1"], "'--foo=1' is neither key=value nor --suggest"),
        (["alg=pwm_5M"], "against=NAME is needed: alg=pwm_5M has no shipped baseline"),
        (["against=pwm_5M"], "alg=NAME is needed"),
        (["alg.horizon=4"], "alg=NAME is needed"),
        (["alg=moon", "against=pwm"], "Could not find 'alg/moon'"),
        (["env=moon"], "Could not find 'env/moon'"),
        (["alg=pwm_5M_flow", "alg.foo=1"], "alg.foo: there is no such key"),
        (["alg=pwm_5M_flow", "alg.horizon=0"], "alg.horizon must be positive, got 0"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.plain(lambda: parity.run(arguments))
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1 and message in shown.err, shown.err
    assert "provider" not in shown.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_largest_size_takes_little_memory() -> None:
    """Parameters and FLOPs of 317M, whose weights alone would take 0.4 GB and training 2 GB."""
    pytest.importorskip("mujoco.batch")
    code = (
        "import resource, sys\n"
        "from pwm_fast import parity\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert parity.run(['alg=pwm_317M_flow']) == 0\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 300, "MiB more than after the imports"
    assert "107,167,909" in done.stdout


def test_networks_without_actor_layers() -> None:
    config = configuration.compose("alg=pwm_5M_flow", "alg.actor.units=[]").alg
    assert Networks.build(config, ANT).parameters()["actor"] == 512 * 8 + 8 + 8
