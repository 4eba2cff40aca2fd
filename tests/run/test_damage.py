"""Damaged checkpoints are refused by name, or hold to the bit what was written."""

from __future__ import annotations

import copy
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast.agent import PWM
from pwm_fast.analysis import diagnosis
from pwm_fast.config import ConfigError
from pwm_fast.run import build, checkpoint, evaluation, seal
from pwm_fast.run.checkpoint import CheckpointError
from pwm_fast.run.start import train
from tests.run.conftest import tiny_config

NAMES = ("latest", "latest.previous", "best", "final")


pytestmark = pytest.mark.usefixtures("no_plots")


def same(one: Any, other: Any) -> bool:
    """Equal to the bit, with equal types."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(
            one.contiguous().view(-1).view(torch.uint8),
            other.contiguous().view(-1).view(torch.uint8),
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def changed(data: bytes, draw: random.Random) -> bytes:
    """The bytes with some of them changed at a random place, or at a few."""
    result = bytearray(data)
    for _ in range(draw.choice((1, 1, 3))):
        start = draw.randrange(len(data))
        for i in range(start, min(start + draw.choice((1, 2, 64)), len(data))):
            result[i] ^= draw.randrange(1, 256)
    return bytes(result)


# --- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_changed_bytes(finished: Path, tmp_path: Path, name: str) -> None:
    source = finished / "checkpoints" / f"{name}.pt"
    data, whole = source.read_bytes(), checkpoint.load(source)
    draw, path, refused = random.Random(name), tmp_path / f"{name}.pt", 0
    for _ in range(150):
        path.write_bytes(changed(data, draw))
        try:
            loaded = checkpoint.load(path)
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert same(loaded, whole)
    assert refused > 140


def test_every_byte_of_small_archives(tmp_path: Path) -> None:
    """Also of one without a seal, as older versions wrote them: headers have no checksum."""
    content = {"a": torch.arange(40.0), "b": [torch.arange(3), "text"], "c": {"d": 1.5}}
    path = tmp_path / "a.pt"
    for sealed in (True, False):
        with path.open("wb") as file:
            if sealed:
                writer = seal.SealedWriter(file)
                torch.save(content, writer)  # type: ignore[arg-type]
                digest = writer.seal()
            else:
                torch.save(content, file)
        assert seal.verify(path) == (digest if sealed else None)
        data = path.read_bytes()
        for position in range(len(data)):
            path.write_bytes(
                data[:position] + bytes([data[position] ^ 0x55]) + data[position + 1 :]
            )
            try:
                seal.verify(path)
                loaded = torch.load(path, weights_only=True)
            except Exception:
                continue
            assert not sealed, f"byte {position} of a sealed archive was changed and passed"
            assert same(loaded, content), position


@pytest.mark.parametrize("sizes", [[1, 1, 1], [2], [5, 0, 1, 7], [1, 2, 3, 4]])
def test_seal_in_any_pieces(tmp_path: Path, sizes: list[int]) -> None:
    path, data = tmp_path / "a", random.Random(0).randbytes(sum(sizes))
    with path.open("wb") as file:
        writer, start = seal.SealedWriter(file), 0
        for size in sizes:
            assert writer.write(data[start : start + size]) == size
            start += size
        digest = writer.seal()
    assert seal.verify(path) == digest
    assert path.read_bytes()[: len(data) - 2] == data[:-2]


def test_checkpoint_without_a_seal_goes_on(run_dir: Path) -> None:
    """As one of an older version; a tensor that was changed since is seen all the same."""
    latest = run_dir / "checkpoints" / "latest.pt"
    torch.save(torch.load(latest, weights_only=True), latest)
    assert seal.verify(latest) is None
    good = latest.read_bytes()
    weight = checkpoint.load(latest)["agent"]["actor"]
    part = next(t for t in weight.values() if t.numel() > 30).numpy().tobytes()
    at = good.find(part)
    latest.write_bytes(good[:at] + bytes(64) + good[at + 64 :])
    with pytest.raises(CheckpointError, match=r"latest\.pt is no readable.*by its CRC.*previous"):
        train(tiny_config(run_dir, epochs=7))
    latest.write_bytes(good)
    assert train(tiny_config(run_dir, epochs=7))[0]["epochs"] == 7


def test_every_cut_of_the_seal(tmp_path: Path) -> None:
    """Also exactly before it, where the zip archive only announces a comment."""
    path = tmp_path / "small.pt"
    with path.open("wb") as file:
        sealed = seal.SealedWriter(file)
        torch.save({"x": torch.arange(4)}, sealed)
        sealed.seal()
    whole = path.read_bytes()
    assert seal.verify(path) is not None
    for cut in range(1, 200):
        path.write_bytes(whole[:-cut])
        with pytest.raises(ValueError, match=r"damaged|cut short|not a zip|bad"):
            seal.verify(path)
    for more in (b"\0", b"\0\0", b"x" * 22, b"\0" * 80):
        path.write_bytes(whole + more)
        with pytest.raises(ValueError):
            seal.verify(path)
    torch.save({"x": torch.arange(4)}, path)
    assert seal.verify(path) is None
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="cut short or damaged"):
        seal.verify(path)


def test_every_command_refuses(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    data = bytearray((finished / "checkpoints" / "best.pt").read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"best\.pt is no readable"):
        evaluation.evaluate_checkpoint(evaluation.EvaluateConfig(str(path), device="cpu"))
    with pytest.raises(CheckpointError, match=r"best\.pt is no readable"):
        diagnosis.diagnose(diagnosis.DiagnoseConfig(str(path), device="cpu"))
    with pytest.raises(CheckpointError, match=r"best\.pt is no readable"):
        train(tiny_config(tmp_path / "run", resume=str(path)))


def test_hint_names_a_sound_one(finished: Path, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoints"
    shutil.copytree(finished / "checkpoints", saved)
    (saved / "latest.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"before it is \S+latest\.previous\.pt \(epoch 4\)"):
        checkpoint.load(saved / "latest.pt")
    (saved / "latest.previous.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"beside it is \S+final\.pt \(epoch 6\)"):
        checkpoint.load(saved / "latest.pt")
    for name in ("final", "best"):
        (saved / f"{name}.pt").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"latest\.previous\.pt, is damaged, too"):
        checkpoint.load(saved / "latest.pt")


# --- contents -------------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (None, "text", [], [1, "x"], {}, {"a": None}, -1, True, torch.ones(2, 7))


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands within nested containers."""
    if path:
        yield path
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*path, key))


def placed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with ``value`` at a place."""
    result = dict(content) if isinstance(content, dict) else list(content)
    result[path[0]] = value if len(path) == 1 else placed(content[path[0]], path[1:], value)
    return result


def sampled(content: dict[str, Any], count: int) -> list[tuple[Any, ...]]:
    """Every place near the top, and some of those below."""
    found = list(places(content))
    found = [p for p in found if p[0] not in ("format", "version")]
    near = [p for p in found if len(p) <= 2]
    far = [p for p in found if len(p) > 2]
    return near + random.Random(0).sample(far, min(count, len(far)))


def nested(depth: int) -> list[Any]:
    """Lists within one another."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def restores(content: dict[str, Any], path: Path, run_dir: Path, **changes: object) -> None:
    """Continue from a checkpoint with that content, or hear in one line why not."""
    torch.save(content, path)
    try:
        train(tiny_config(run_dir, resume=str(path), **changes))
    except (CheckpointError, ConfigError) as error:
        assert str(path) in str(error) and "\n" not in str(error)
        assert not run_dir.exists(), "refused before anything was written"
    else:
        shutil.rmtree(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["latest", "best"])
def test_wrong_contents(finished: Path, tmp_path: Path, name: str) -> None:
    """Nothing but CheckpointError and ConfigError, and whatever is accepted can be trained with."""
    content = torch.load(finished / "checkpoints" / f"{name}.pt", weights_only=True)
    draw = random.Random(name)
    # One epoch that learns; without a replay two before it fill one.
    epochs = content["epoch"] + (3 if content["replay"] is None else 1)
    cheap = {"epochs": epochs, "esnr.every": 0, "eval.episodes": 1, "eval.final_episodes": 1}
    # What lies deeper is restored from both in the same way: the best one lacks env and replay.
    for place in sampled(content, 40 if name == "latest" else 10):
        wrong = placed(content, place, draw.choice(WRONG))
        restores(wrong, tmp_path / "a.pt", tmp_path / "run", **cheap)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("epoch",), "5", "epoch must be a number of epochs, 0 or more, got '5'"),
        (("epoch",), -1, "epoch must be a number of epochs, 0 or more, got -1"),
        (("epoch",), 2.0, "epoch must be"),
        (("epoch",), True, "epoch must be"),
        (("epoch",), 2**62, "epoch must be"),
        (("config", "own"), nested(100), "config must be the configuration of a run"),
        (("replay", "shape"), [2**70, 1, 1, 1, 1], "replay.shape must be five numbers"),
        (("agent",), None, "agent must be parameters, statistics and optimisers, got None"),
        (("config",), None, "config must be the configuration of a run"),
        (("config", "env"), None, "config must be"),
        (("best",), None, "best must be empty, or reward, epoch and env_steps"),
        (("best", "epoch"), "x", "best must be"),
        (("latest_eval",), [], "latest_eval must be"),
        (("progress",), {"done": {}}, "progress must be done, sums and counts"),
        (("bootstrapped",), 1, "bootstrapped must be true or false, got 1"),
        (("wall_time",), float("nan"), "wall_time must be seconds, 0 or more, got nan"),
        (("obs",), torch.full((4, 5), float("nan")), "obs must be finite observations"),
        (("obs",), torch.zeros(3, 5), "obs is a tensor [3, 5] of float32 instead of"),
        (("held_action",), torch.zeros(4, 2), "held_action is a tensor [4, 2] of float32 instead"),
        (("rng",), {}, "rng must be states of random number generators"),
        (("rng", "torch"), torch.zeros(3, dtype=torch.uint8), "(in its rng)"),
        (("env",), {}, "its env lacks 'physics'"),
        (("env", "steps"), torch.zeros(1, dtype=torch.int64), "env.steps is a tensor [1] of int64"),
        (("replay",), {}, "replay.shape must be five numbers"),
        (("replay", "cursor"), torch.full((4,), 10**6), "replay.cursor must be of 100 rows"),
        (("replay", "block"), torch.full((4,), 100), "replay.block must be of 100 rows"),
        (("replay", "keep"), [3, 7], "replay.keep must be two numbers below 100, the second not"),
        (("replay", "random"), torch.zeros(4, 7), "replay.random must be bool [4, "),
        (("replay", "run"), torch.zeros(4, 7), "replay.run must be int32 [4, "),
        (("seeding",), torch.zeros(2), "seeding must be a version of how seeds are derived"),
        (("precision",), "fp8", "precision must be one of auto, "),
        (("agent", "actor"), {}, "actor.logstd is missing"),
        (("agent", "actor_opt"), {}, "actor_opt.adam is not the state of an Adam optimiser"),
        (("agent", "actor_opt", "skipped"), None, "actor_opt.skipped is no count"),
        (
            ("agent", "actor_opt", "adam", "state", 0, "exp_avg"),
            torch.zeros(3),
            "actor_opt.adam.state.0.exp_avg is [3] instead of",
        ),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_parts_are_named(
    finished: Path, tmp_path: Path, place: tuple[Any, ...], value: Any, said: str
) -> None:
    content = torch.load(finished / "checkpoints" / "latest.pt", weights_only=True)
    path = tmp_path / "a.pt"
    checkpoint.save(path, placed(content, place, value))
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        train(tiny_config(tmp_path / "run", resume=str(path), epochs=7))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "value"),
    [  # networks and statistics each with every value
        ("world_model", float("nan")),
        ("actor", float("inf")),
        ("critic", -float("inf")),
        ("obs_rms", float("nan")),
        ("rew_rms", float("inf")),
        ("ret_rms", -float("inf")),
    ],
)
def test_weights_that_are_not_finite(
    finished: Path, tmp_path: Path, module: str, value: float
) -> None:
    content = torch.load(finished / "checkpoints" / "best.pt", weights_only=True)
    name = list(content["agent"][module])[-1]
    content["agent"][module][name].view(-1)[0] = value
    path = tmp_path / "a.pt"
    checkpoint.save(path, content)
    said = re.escape(f"{module}.{name} has 1 NaN or infinite values")
    uses: tuple[Callable[[], Any], ...] = (
        lambda: evaluation.evaluate_checkpoint(evaluation.EvaluateConfig(str(path), device="cpu")),
        lambda: diagnosis.diagnose(diagnosis.DiagnoseConfig(str(path), device="cpu")),
        lambda: train(tiny_config(tmp_path / "run", resume=str(path))),
        lambda: train(tiny_config(tmp_path / "run", init=str(path))),
    )
    for use in uses:
        with pytest.raises((CheckpointError, ConfigError), match=said) as caught:
            use()
        assert str(path) in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_moments_that_are_not_finite(finished: Path, tmp_path: Path) -> None:
    content = torch.load(finished / "checkpoints" / "final.pt", weights_only=True)
    saved = copy.deepcopy(content)
    saved["agent"]["critic_opt"]["adam"]["state"][1]["exp_avg"].view(-1)[0] = float("nan")
    checkpoint.save(tmp_path / "a.pt", saved)
    said = r"critic_opt\.adam\.state\.1\.exp_avg has NaN or infinite values \(in its agent\)"
    with pytest.raises(CheckpointError, match=said):
        train(tiny_config(tmp_path / "run", resume=str(tmp_path / "a.pt")))
    evaluated = evaluation.evaluate_checkpoint(
        evaluation.EvaluateConfig(str(tmp_path / "a.pt"), device="cpu", episodes=1)
    )
    assert evaluated["episodes"] == 1, "the optimiser does not matter there"


def test_refused_agent_is_unchanged(finished: Path) -> None:
    config = tiny_config(finished)
    env = build.make_env(config, 1, 0)
    agent: PWM = build.make_agent(config, env, torch.device("cpu"))
    before = copy.deepcopy(agent.state_dict())
    content = torch.load(finished / "checkpoints" / "best.pt", weights_only=True)
    content["agent"]["critic_opt"]["skipped"] = -1
    with pytest.raises(ValueError, match=r"critic_opt\.skipped"):
        agent.load_state_dict(content["agent"])
    assert same(before, agent.state_dict())
