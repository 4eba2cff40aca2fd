"""Configurations from Hydra, from files and as plain containers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pwm_fast.config.checks import ConfigError, require
from pwm_fast.config.training import OLDEST_ROBOTS, OLDEST_VARIANT, EnvConfig, TrainConfig

Typed = TypeVar("Typed")

# Mappings whose keys are not known beforehand: Hydra wants a + before a key that they lack.
_OPEN = re.compile(r"(env\.kwargs|hydra\.launcher\.additional_parameters)(\.[^=]+)?=")


def open_overrides(overrides: Iterable[str]) -> list[str]:
    """Overrides with Hydra's ``++`` before those within open mappings, such as ``env.kwargs.x=1``.

    Args:
        overrides: as on the command line; other arguments may be among them.
    """
    return [f"++{given}" if _OPEN.match(given) else given for given in overrides]


def check_choices(overrides: Iterable[str]) -> None:
    """Look at the overrides that choose files of ``configs/``, such as ``env=ant``.

    Hydra itself answers ``env=null`` and ``alg=5`` with errors that are not its own.

    Args:
        overrides: as on the command line; other arguments, and what cannot be read, are left alone.

    Raises:
        ConfigError: the value is neither a name nor a list of names; the message names the key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, Glob, QuotedString
    from hydra.errors import HydraException

    files = resources.files("pwm_fast.configs")
    groups = {"hydra", *(entry.name for entry in files.iterdir() if entry.is_dir())}
    parser = OverridesParser.create()
    for given in overrides:
        key = given.partition("=")[0].lstrip("+").partition("@")[0]
        if key not in groups and not key.startswith("hydra/"):
            continue
        try:
            override = parser.parse_override(given)
        except HydraException:  # Hydra says so
            continue
        value: Any = override.value()
        for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
            names = choice if isinstance(choice, list) else [choice]
            ok = all(isinstance(name, str | QuotedString | Glob) for name in names)
            require(ok, key, choice, "a name, or a list of names, of its files")


def hydra_schema() -> Any:
    """The configuration's typed keys and defaults, for Hydra to compose on.

    The environment's keys stay open here, since each brings its own; :func:`from_dict` sorts them.
    """
    from omegaconf import OmegaConf

    typed = OmegaConf.structured(TrainConfig)
    return OmegaConf.create({key: {} if key == "env" else typed._get_node(key) for key in typed})


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain containers, for checkpoints and files."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """A checked configuration from plain containers, as :func:`to_dict` gives them.

    Options of the environment may stand beside its other keys (as in the YAML files).

    Raises:
        ConfigError: unknown keys, wrong types, or values out of range; the message names the key.
    """
    values = dict(values)
    sections = {
        f.name
        for f in dataclasses.fields(TrainConfig)
        if f.default_factory is not dataclasses.MISSING
    }
    for key in ("env", *sections):
        given = values.get(key, {})
        require(given is None or isinstance(given, Mapping), key, given, "a mapping of its keys")
    env = dict(values.get("env") or {})
    known = {f.name for f in dataclasses.fields(EnvConfig)}
    options = env.get("options") or {}
    require(isinstance(options, Mapping), "env.options", options, "a mapping of its keys")
    options = dict(options)
    options.update({k: v for k, v in env.items() if k not in known})
    values["env"] = {**{k: v for k, v in env.items() if k in known}, "options": options}
    return structured(TrainConfig, values)


def from_saved(values: Mapping[str, Any]) -> TrainConfig:
    """A checked configuration from one that was saved, by this version or an older one.

    Raises:
        ConfigError: as of :func:`from_dict`.
    """
    return from_dict(with_variant(values))


def lacks_variant(values: Mapping[str, Any]) -> bool:
    """Whether a saved configuration is of a robot, but older than the choice of its variant."""
    env = values.get("env")
    if not isinstance(env, Mapping) or env.get("name") not in OLDEST_ROBOTS:
        return False
    options = env.get("options") or {}
    return "variant" not in env and isinstance(options, Mapping) and "variant" not in options


def with_variant(values: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration in which the robot's variant is named, also where it is older."""
    if not lacks_variant(values):
        return dict(values)
    env = dict(values["env"])
    return {
        **values,
        "env": {**env, "options": {**(env.get("options") or {}), "variant": OLDEST_VARIANT}},
    }


def structured(kind: type[Typed], values: Any, prefix: str = "") -> Typed:
    """A dataclass with some of its values given, all of them checked.

    Args:
        kind: the dataclass.
        values: a mapping, or OmegaConf's.
        prefix: of the keys in messages.

    Raises:
        ConfigError: unknown keys, wrong types, or values out of range; the message names the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), values)
        config = OmegaConf.to_object(merged)
    except OverflowError as error:
        said = _readable(error, prefix)
        raise ConfigError(f"a number is too large for its key: {said}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error, prefix)) from error
    assert isinstance(config, kind)
    return config


def from_hydra(cfg: Any) -> TrainConfig:
    """A checked configuration from Hydra's; the only place that sees OmegaConf's containers.

    Raises:
        ConfigError: unknown keys, wrong types, or values out of range; the message names the key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(_readable(error)) from error
    assert isinstance(values, dict)
    values.pop("launch", None)  # where a sweep runs is no part of a run
    return from_dict({str(k): v for k, v in values.items()})


def typed(cfg: Any, kind: type[Typed], need: str) -> Typed:
    """Hydra's configuration of a command as the dataclass that checks it.

    Args:
        cfg: Hydra's.
        kind: the dataclass, which ``cfg`` was composed on.
        need: ``key=WHAT is needed: why``, said where that key has no value.

    Raises:
        ConfigError: the key has no value, or one is out of range.
    """
    from omegaconf import OmegaConf

    if OmegaConf.is_missing(cfg, need.partition("=")[0]):
        raise ConfigError(need)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, kind)
    return config


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ConfigError: it is damaged; the message is the second half of a sentence.
        OSError: it cannot be read.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text("utf-8")
        aliases = "*" in text and any(isinstance(e, yaml.AliasEvent) for e in yaml.parse(text))
        values = yaml.safe_load(text)
    except OSError:
        raise
    except Exception as error:  # what a damaged number or date raises, YAML leaves to Python
        said = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"it is no YAML ({said[0]})") from error
    if aliases:  # of itself, perhaps
        raise ConfigError("it refers to parts of itself (*), which no configuration here does")
    return values


def compose(*overrides: str) -> TrainConfig:
    """The configuration that ``python -m pwm_fast.train`` runs with these overrides.

    Raises:
        ConfigError: a value cannot be used; the message names the key.
        HydraException: an override cannot be read, or names a file or key that does not exist.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.config_store import ConfigStore

    check_choices(overrides)
    ConfigStore.instance().store(name="train_schema", node=hydra_schema())
    with initialize_config_module("pwm_fast.configs", version_base="1.3"):
        return from_hydra(hydra_compose("config", overrides=open_overrides(overrides)))


def _readable(error: Exception, prefix: str = "") -> str:
    """OmegaConf's message as ``key: what is wrong``, without its internals."""
    message = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{prefix}{key}: {message}" if key else message
