"""No code of a file runs, and what cannot be converted is refused by name."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pwm_fast import load_published
from pwm_fast.config import ConfigError
from pwm_fast.published import PublishedError, recognise
from tests.published.codes import TDMPC2, FlowActor, pwm_file, statistics


class Foreign:
    """Notes that it was made."""

    made: list[str] = []  # noqa: RUF012

    def __new__(cls) -> Foreign:
        cls.made.append("made")
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        self.made.append("filled")


class Calls:
    """Unpickles by a call."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return note, ("called",)


def note(text: str) -> None:
    Foreign.made.append(text)


@pytest.mark.parametrize("kind", [Foreign, Calls])
@pytest.mark.parametrize("key", ["obs_rms", "extra"])
def test_a_foreign_class_is_named_and_not_loaded(kind: type, key: str, tmp_path: Path) -> None:
    value = kind()
    value.x = 1
    path = pwm_file().save(tmp_path / "x.pt", **{key: value})
    Foreign.made.clear()
    with statistics("pwm"):
        torch.load(path, weights_only=False)
    assert Foreign.made, "a plain load runs it"
    Foreign.made.clear()
    named = "Foreign" if kind is Foreign else "note"
    with pytest.raises(PublishedError, match=rf"it names tests\.published\.test_reading\.{named}"):
        load_published(path)
    assert recognise(path) is None
    assert Foreign.made == []


def test_another_protocol_of_pickles(tmp_path: Path) -> None:
    """In which classes are named otherwise."""
    torch.save({**dict.fromkeys("ab"), "c": Calls()}, tmp_path / "x.pt", pickle_protocol=4)
    Foreign.made.clear()
    with pytest.raises(PublishedError) as caught:
        load_published(tmp_path / "x.pt")
    assert "weights_only" not in str(caught.value), "no advice to load it otherwise"
    assert Foreign.made == []


def test_the_allowed_classes_stay_as_they_were(tmp_path: Path) -> None:
    path = pwm_file().save(tmp_path / "x.pt")
    before = torch.serialization.get_safe_globals()
    load_published(path)
    assert recognise(path) == "PWM"
    (tmp_path / "y.pt").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(PublishedError):
        load_published(tmp_path / "y.pt")
    assert torch.serialization.get_safe_globals() == before
    with pytest.raises(pickle.UnpicklingError, match="RunningMeanStd"):
        torch.load(path, weights_only=True)


def test_statistics_run_nothing(tmp_path: Path) -> None:
    """Attributes of the stand-in are data, also if they have names that Python calls."""
    with statistics("pwm") as make:
        rms = make((1,))
        rms.__dict__["__setstate__"] = rms.__dict__["__reduce__"] = "text"
        path = pwm_file().save(tmp_path / "x.pt")
        content = torch.load(path, weights_only=False)
        torch.save({**content, "rew_rms": rms}, tmp_path / "y.pt")
    assert load_published(tmp_path / "y.pt").rew_rms is not None


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: pwm_file().save(path), "PWM"),
        (lambda path: pwm_file(package="flow_mbpo_pwm").save(path), "Flow-MBPO-PWM"),
        (lambda path: pwm_file(bins=21, flow=True).save(path), "Flow-MBPO-PWM"),
        (lambda path: TDMPC2().save(path), "TD-MPC2"),
        (lambda path: TDMPC2().save(path, old=True), "TD-MPC2"),
        (lambda path: torch.save({"model": {"a.weight": torch.zeros(1)}}, path), None),
        (lambda path: torch.save([1], path), None),
        (lambda path: path.write_bytes(b"PK\x03\x04 no archive"), None),
    ],
)
def test_recognise(make: Callable[[Path], Any], expected: str | None, tmp_path: Path) -> None:
    make(tmp_path / "x.pt")
    assert recognise(tmp_path / "x.pt") == expected


def without(state: dict[str, Any], start: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if not k.startswith(start)}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (
            lambda f: {"actor": without(FlowActor(16, 3, [8]).state_dict(), "init_logstd")},
            "init_logstd is missing",
        ),
        (
            lambda f: {"actor": FlowActor(12, 3, [8]).state_dict()},
            "it takes 16 numbers and gives 3, in place of the latent's 16 and 3 actions and a flow",
        ),
        (
            lambda f: {"world_model": {**f.world.state_dict(), "_ensemble.0.w": torch.ones(1)}},
            "world_model cannot be converted: _ensemble.0.w have no counterpart here",
        ),
        (
            lambda f: {"world_model": without(f.world.state_dict(), "_dynamics.")},
            "_dynamics.0.weight is missing",
        ),
        (
            lambda f: {"world_model": without(f.world.state_dict(), "_reward.1.ln.bias")},
            "_reward.1.ln.bias is missing",
        ),
        (
            lambda f: {"world_model": {**f.world.state_dict(), "_encoder.0.bias": torch.zeros(12)}},
            "_encoder.0.bias is [12] of float32 instead of [11] of floating numbers",
        ),
        (
            lambda f: {
                "world_model": {
                    **without(f.world.state_dict(), "_dynamics.2.ln"),
                }
            },
            "_dynamics does not end in a SimNorm layer of the latent's 16",
        ),
        (
            lambda f: {"world_model": {**f.world.state_dict(), "_encoder.0.weight": "text"}},
            "_encoder.0.weight is a str instead of a tensor",
        ),
        (
            lambda f: {"critic": pwm_file(latent=24).critic.state_dict()},
            "critic cannot be converted: it takes 24 numbers and gives 1, in place of the latent's",
        ),
        (
            lambda f: {"actor": without(f.actor.state_dict(), "mu_net.2.")},
            "a hidden layer has no LayerNorm",
        ),
        (lambda f: {"actor": without(f.actor.state_dict(), "logstd")}, "logstd is missing"),
        (
            lambda f: {"rew_rms": {"mean": 1.0}},
            "rew_rms cannot be converted: its mean is missing instead of [] finite numbers",
        ),
    ],
)
def test_what_has_no_place_in_a_pwm_file(
    entries: Callable[[Any], dict[str, Any]], said: str, tmp_path: Path
) -> None:
    file = pwm_file()
    path = file.save(tmp_path / "x.pt", **entries(file))
    with pytest.raises(PublishedError) as caught:
        load_published(path)
    assert said in str(caught.value) and str(caught.value).startswith(f"{path}")
    assert "\n" not in str(caught.value)


def test_a_baseline_that_was_fed_zeros(tmp_path: Path) -> None:
    """That code cannot run one: only its flow pads."""
    path = pwm_file(bins=21, task_dim=96).save(tmp_path / "x.pt")
    with pytest.raises(PublishedError, match="101, 115 and 115 columns of _encoder, _dynamics"):
        load_published(path)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (
            {"_encoder.rgb.2.weight": torch.zeros(32, 9, 7, 7)},
            "_encoder.rgb.* is an encoder of images",
        ),
        ({"_V.0.weight": torch.zeros(1)}, "_V.0.weight have no counterpart here"),
        ({"_pi.2.bias": torch.zeros(5)}, "_pi.2.bias is [5] of float32 instead of [6]"),
        ({"_Qs.params.1.bias": torch.zeros(5, 3)}, "params.5 is [5, 3] of float32 instead of"),
        ({"log_std_dif": torch.tensor(-1.0)}, "log_std_min or log_std_dif is no number"),
        (
            {"_action_masks": torch.ones(4, 3).tril()},
            "_action_masks are not 1 rows of ones and then zeros",
        ),
    ],
)
def test_what_has_no_place_in_a_tdmpc2_file(
    entries: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = TDMPC2().save(tmp_path / "x.pt", **entries)
    with pytest.raises(PublishedError) as caught:
        load_published(path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_one_reward_output_of_tdmpc2(tmp_path: Path) -> None:
    path = TDMPC2(bins=1).save(tmp_path / "x.pt")
    with pytest.raises(PublishedError, match="does not say whether it is in symlog space"):
        load_published(path)


def damaged(path: Path) -> None:
    data = bytearray(pwm_file().save(path).read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "there is no checkpoint file"),
        (lambda path: path.mkdir(), "there is no checkpoint file"),
        (lambda path: path.write_bytes(b""), "is no readable checkpoint (0 bytes"),
        (lambda path: path.write_bytes(b"text" * 99), "is no readable checkpoint (396 bytes"),
        (damaged, "is not what was written (by its CRC)"),
        (lambda path: torch.save([1, 2], path), "it holds a list"),
        (
            lambda path: torch.save(collections.OrderedDict(a=1, b=2), path),
            "is no checkpoint of PWM, Flow-MBPO-PWM, TD-MPC2: it holds the keys a, b",
        ),
        (
            lambda path: torch.save({"format": "pwm_fast.checkpoint"}, path),
            "is a checkpoint of pwm_fast already",
        ),
    ],
)
def test_other_files(write: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    write(path)
    with pytest.raises(PublishedError) as caught:
        load_published(path)
    assert said in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("options", [{"substeps": 0}, {"integrator": "rk4"}])
def test_wrong_options(options: dict[str, Any], tmp_path: Path) -> None:
    path = pwm_file(bins=21, flow=True).save(tmp_path / "x.pt")
    key, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=rf"alg\.world_model\.{key} must be .*, got {value!r}"):
        load_published(path, **options)
