"""Runs of one environment, grouped by their configuration over seeds."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pwm_fast import config as configuration
from pwm_fast.analysis.runs import LeftOut, Run
from pwm_fast.run.provenance import NOT_OF_THE_EXPERIMENT, flat, within

# ESNR draws random numbers, but changes nothing that is learnt.
IGNORED = (*NOT_OF_THE_EXPERIMENT, "esnr")
ENVIRONMENT = ("env.name", "env.max_episode_steps", "env.options")
CONFIGS = Path(__file__).parent.parent / "configs"
LONGEST = 34  # characters of a label that fits beside a figure
MOST = 7  # groups that colours tell apart
LISTED = 48  # characters of a list that names of environments and files hold


@dataclass
class Group:
    """Runs that differ by their seed alone.

    Attributes:
        config: what they have in common, with dotted keys.
        runs: in order of their seeds.
        label: unique within the environment: its algorithm and all else that sets it apart.
        mark: a letter that stands for the label, where labels are too long or too many; else "".
    """

    config: dict[str, Any]
    runs: list[Run]
    label: str = ""
    mark: str = ""

    @property
    def name(self) -> str:
        """The mark, or the label where there is none."""
        return self.mark or self.label

    @property
    def alg(self) -> str:
        """Name of its algorithm's configuration, with that of its policy."""
        return self.runs[0].alg

    @property
    def unfinished(self) -> list[Run]:
        """Runs that have not come to their end."""
        return [run for run in self.runs if not run.finished]


@dataclass
class Environment:
    """All that was run in one environment; returns are compared within it alone.

    Attributes:
        name: of the environment.
        slug: for files and options: its name and its options' values.
        label: for people.
        groups: configurations, in order of their first run.
        keys: what the labels name beside the algorithm.
    """

    name: str
    slug: str
    label: str
    groups: list[Group] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @property
    def marked(self) -> bool:
        """Letters stand for the groups' labels."""
        return any(group.mark for group in self.groups)

    @property
    def runs(self) -> list[Run]:
        """Of all groups."""
        return [run for group in self.groups for run in group.runs]

    def named(self, text: str) -> bool:
        """``text`` is its name, or its slug up to some hyphen."""
        return f"{self.slug}-".startswith(f"{text}-")

    def differences(self) -> dict[str, list[Any]]:
        """Keys in which the groups differ, each with every group's value."""
        return _differences(self.groups)


def arrange(runs: Sequence[Run]) -> tuple[list[Environment], list[LeftOut]]:
    """Sort runs into environments and groups.

    Returns:
        The environments, and runs of a seed that its group has already: the one that got further
        stays.
    """
    environments: dict[str, Environment] = {}
    groups: dict[tuple[str, str], Group] = {}
    for run in runs:
        where = {k: v for k, v in run.config.items() if within(k, ENVIRONMENT)}
        config = {k: v for k, v in run.config.items() if not within(k, (*IGNORED, *ENVIRONMENT))}
        given = config.pop("num_envs", None), config.pop("env.num_envs", None)
        config["num_envs"] = given[0] or given[1]
        place, key = repr(sorted(where.items())), repr(sorted(config.items()))
        if place not in environments:
            environments[place] = _environment(where)
        if (place, key) not in groups:
            groups[place, key] = Group(config, [])
            environments[place].groups.append(groups[place, key])
        groups[place, key].runs.append(run)
    left_out = [double for group in groups.values() for double in _drop_doubles(group)]
    arranged = list(environments.values())
    for environment in arranged:
        _label(environment)
    return arranged, left_out


def _environment(where: dict[str, Any]) -> Environment:
    name = str(where["env.name"])
    options = {
        k.removeprefix("env.options."): v
        for k, v in where.items()
        if k.startswith("env.options.") and v not in (None, {}, [])
    }
    if options.get("variant") == "default":  # only another one is worth a word
        del options["variant"]
    limit = where.get("env.max_episode_steps")
    if limit is not None:
        options["max_episode_steps"] = limit
    texts = {k: _listed(v) if isinstance(v, list) else str(v) for k, v in options.items()}
    shown = ", ".join(f"{k}={v}" for k, v in texts.items())
    slug = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "_", v).strip("_") for v in (name, *texts.values()))
    return Environment(name, slug, f"{name} ({shown})" if shown else name)


def _listed(values: list[Any]) -> str:
    """The values, or so many of them, the first, and a hash that tells them from others."""
    text = ", ".join(map(str, values))
    if len(text) <= LISTED:
        return f"[{text}]"
    digest = hashlib.sha256(text.encode()).hexdigest()[:6]
    return f"{len(values)} such as {values[0]} ({digest})"


def _drop_doubles(group: Group) -> list[LeftOut]:
    best: dict[int, Run] = {}
    dropped = []
    for run in group.runs:
        other = best.get(run.seed)
        if other is None or run.env_steps > other.env_steps:
            best[run.seed] = run
            loser = other
        else:
            loser = run
        if loser is not None:
            dropped.append((loser, run.seed))
    group.runs = [best[seed] for seed in sorted(best)]
    return [
        LeftOut(
            run.path,
            f"seed {seed} of this configuration is also in {best[seed].path}, which got "
            f"{'further' if best[seed].env_steps > run.env_steps else 'as far'}; two runs of one "
            "seed are not independent",
        )
        for run, seed in dropped
    ]


def _label(environment: Environment) -> None:
    """Name every group by its algorithm, and by all else that sets it apart.

    That is what differs from its namesakes, and from any group in what an algorithm's name does not
    say: another key, or a value that is not that of the algorithm's shipped configuration.
    """
    groups = environment.groups
    named: set[str] = set()
    differing = _differences(groups)
    for group in groups:
        beside = {k for k in differing if not within(k, ("alg",)) or k in _changed(group)}
        keys = sorted(beside.union(_differences([g for g in groups if g.alg == group.alg])))
        named.update(keys)
        parts = [f"{short_key(k)}={shown(group.config.get(k))}" for k in keys]
        group.label = ", ".join([group.alg, *parts])
    environment.keys = sorted(named)
    seen: dict[str, int] = {}
    for group in groups:  # values that read alike, as 1 and "1"
        seen[group.label] = seen.get(group.label, 0) + 1
        if seen[group.label] > 1:
            group.label += f" ({seen[group.label]})"
    long = any(len(group.label) > LONGEST for group in groups)
    if len(groups) > MOST or (long and len(groups) > 1):
        for index, group in enumerate(groups):
            group.mark = _letters(index)


def _changed(group: Group) -> set[str]:
    """Keys of the algorithm with other values than its shipped configuration has."""
    shipped = _shipped(group.config["alg.name"], group.config["alg.actor.suffix"])
    return {k for k, v in group.config.items() if k in shipped and shipped[k] != v}


@lru_cache
def _shipped(alg: str, suffix: str) -> dict[str, Any]:
    """An algorithm's and policy's configuration with dotted keys; empty if it is not shipped."""
    chosen = {"alg": alg, "actor": suffix.removeprefix("_actor_") or "gaussian"}
    if not all((CONFIGS / group / f"{name}.yaml").is_file() for group, name in chosen.items()):
        return {}
    overrides = (f"{group}={name}" for group, name in chosen.items())
    values = configuration.to_dict(configuration.compose(*overrides))
    return {k: v for k, v in flat(values).items() if within(k, ("alg",))}


def _letters(index: int) -> str:
    """A to Z, then AA, AB and so on."""
    more, last = divmod(index, 26)
    return (_letters(more - 1) if more else "") + chr(ord("A") + last)


def _differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    keys = sorted({key for group in groups for key in group.config})
    values = {key: [group.config.get(key) for group in groups] for key in keys}
    return {k: v for k, v in values.items() if any(x != v[0] for x in v)}


def short_key(key: str) -> str:
    """A key for people, without what all of an algorithm's begin with."""
    return key.removeprefix("alg.")


def shown(value: Any) -> str:
    """A value for people."""
    return "null" if value is None else str(value).replace(" ", "")


def plural(noun: str, count: int) -> str:
    """So many of a noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
