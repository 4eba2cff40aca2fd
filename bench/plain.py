"""The shipped configurations without Hydra and OmegaConf, for machines that have neither.

Reads the part of YAML that ``configs/alg`` uses: mappings indented by spaces, scalars, lists in one
line, comments, and a ``defaults`` list of files of the same folder.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pwm_fast import config
from pwm_fast.config import ConfigError

CONFIGS = Path(config.__file__).parents[1] / "configs"
T = TypeVar("T")


def parse(text: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Raises:
        ConfigError: a line is of another kind; the message holds it.
    """
    root: dict[str, Any] = {}
    open_ones: list[tuple[int, Any]] = [(-1, root)]  # indentation and container, innermost last
    for line in text.splitlines():
        content = re.sub(r"(^|\s)#.*", "", line).rstrip()
        if not content:
            continue
        indent = len(content) - len(content.lstrip())
        while indent <= open_ones[-1][0]:
            open_ones.pop()
        container = open_ones[-1][1]
        item = re.fullmatch(r"\s*- (\S.*)", content)
        pair = re.fullmatch(r"\s*(\w+):(?: (\S.*))?", content)
        if item and container.setdefault("", []) is not None:
            container[""].append(_value(item[1]))
        elif pair and pair[2] is not None:
            container[pair[1]] = _value(pair[2])
        elif pair:
            container[pair[1]] = {}
            open_ones.append((indent, container[pair[1]]))
        else:
            raise ConfigError(f"cannot read the line {line!r}")
    return {key: _lists(value) for key, value in root.items()}


def _lists(value: Any) -> Any:
    """Items of a list were gathered under an empty key."""
    if not isinstance(value, dict):
        return value
    return value[""] if set(value) == {""} else {k: _lists(v) for k, v in value.items()}


def _value(text: str) -> Any:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_value(part) for part in text[1:-1].split(",") if part.strip()]
    if text in ("null", "~", "true", "false"):
        return {"null": None, "~": None, "true": True, "false": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def load(group: str, name: str) -> dict[str, Any]:
    """A file of ``configs/<group>`` with its defaults merged in.

    Raises:
        ConfigError: there is none of that name, or it cannot be read.
    """
    path = CONFIGS / group / f"{name}.yaml"
    try:
        values = parse(path.read_text("utf-8"))
    except FileNotFoundError as error:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise ConfigError(f"{group} must be one of {known}, got {name!r}") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    own = {key: value for key, value in values.items() if key != "defaults"}
    merged: dict[str, Any] = {}
    for item in values.get("defaults", ["_self_"]):
        merged = _merge(merged, own if item == "_self_" else load(group, item))
    return merged


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        before = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        merged[key] = _merge(before, value) if both else value  # type: ignore[arg-type]
    return merged


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """A configuration's dataclass, whose own checks see the values.

    Raises:
        ConfigError: a key is unknown or a value cannot be used.
    """
    fields = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ConfigError(f"{cls.__name__} has no key {', '.join(unknown)}")
    types = typing.get_type_hints(cls)
    made = {
        key: build(types[key], value) if dataclasses.is_dataclass(types[key]) else value
        for key, value in values.items()
    }
    return cls(**made)


def algorithm(name: str) -> config.AlgConfig:
    """The configuration ``alg=<name>``.

    Raises:
        ConfigError: there is none of that name, or it cannot be used.
    """
    return build(config.AlgConfig, load("alg", name))
