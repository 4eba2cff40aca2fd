"""A whole comparison: its parts, and what a reader has to mind about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pwm_fast.analysis.groups import Environment, Group, arrange, plural
from pwm_fast.analysis.measures import Comparison, measure
from pwm_fast.analysis.options import Options
from pwm_fast.analysis.published import Published
from pwm_fast.analysis.runs import LeftOut, Run, find, load
from pwm_fast.analysis.scores import Reference, Score, across
from pwm_fast.config import ConfigError


@dataclass
class Report:
    """What there is to show.

    Attributes:
        title: of the page.
        comparisons: one for every environment.
        scores: across environments, where references were given for two or more.
        scored: labels of their environments.
        left_out: runs that are not compared.
        notes: what a reader has to mind.
        options: what was asked for.
    """

    title: str
    comparisons: list[Comparison]
    scores: list[Score]
    scored: list[str]
    left_out: list[LeftOut]
    notes: list[str]
    options: Options


def make(options: Options) -> Report:
    """Read, group and measure the runs.

    Raises:
        ConfigError: a path names nothing, no run can be compared, or an option names an
            environment that no run is of.
    """
    loaded = [load(path) for path in find(options.paths)]
    left_out = [item for item in loaded if isinstance(item, LeftOut)]
    environments, doubles = arrange([item for item in loaded if isinstance(item, Run)])
    left_out += doubles
    if not environments:
        reasons = "; ".join(f"{item.path}: {item.reason}" for item in left_out[:3])
        more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        raise ConfigError(f"there is nothing to compare: {reasons}{more}")
    references = _references(environments, options)
    _check_published(environments, options)
    comparisons = [
        measure(
            environment,
            target=_target(environment, options),
            steps=options.steps,
            resamples=options.resamples,
            published=_published(environment, environments, options),
        )
        for environment in environments
    ]
    _check_targets(environments, options)
    scores = across(comparisons, references, options.resamples) if len(references) > 1 else []
    return Report(
        options.title or f"Comparison: {', '.join(e.label for e in environments)}",
        comparisons,
        scores,
        [e.label for e in environments if e.slug in references] if scores else [],
        left_out,
        _notes(comparisons, left_out, references, scores),
        options,
    )


def _references(environments: Sequence[Environment], options: Options) -> dict[str, Reference]:
    """The references by slug."""
    found = {}
    for name, reference in options.references.items():
        named = [e for e in environments if e.named(name)]
        if not named:
            raise ConfigError(f"--score {name}=...: {_known(environments)}")
        found.update({e.slug: reference for e in named})
    return found


def _target(environment: Environment, options: Options) -> float | None:
    for name, target in options.targets.items():
        if name is not None and environment.named(name):
            return target
    return options.targets.get(None)


def _check_targets(environments: Sequence[Environment], options: Options) -> None:
    for name in options.targets:
        if name is not None and not any(e.named(name) for e in environments):
            raise ConfigError(f"--target {name}=...: {_known(environments)}")


def _published(
    environment: Environment, environments: Sequence[Environment], options: Options
) -> list[Published]:
    """The curves from elsewhere that are of an environment."""
    return [
        curve
        for name, curve in options.published
        if (len(environments) == 1 if name is None else environment.named(name))
    ]


def _check_published(environments: Sequence[Environment], options: Options) -> None:
    for name, curve in options.published:
        if name is None and len(environments) > 1:
            raise ConfigError(
                f"--reference {curve.path} needs its environment, as ENV={curve.path}; there are "
                f"{', '.join(e.slug for e in environments)}"
            )
        if name is not None and not any(e.named(name) for e in environments):
            raise ConfigError(f"--reference {name}=...: {_known(environments)}")
    for environment in environments:
        labels = [curve.label for curve in _published(environment, environments, options)]
        for label in labels:
            if labels.count(label) > 1:
                raise ConfigError(f"--reference: two files have a curve named {label!r}")


def _known(environments: Sequence[Environment]) -> str:
    return f"no run is of that environment; there are {', '.join(e.slug for e in environments)}"


def _notes(
    comparisons: Sequence[Comparison],
    left_out: Sequence[LeftOut],
    references: dict[str, Reference],
    scores: Sequence[Score],
) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{plural('run', len(left_out))} left out; the last table says why.")
    if len(comparisons) > 1:
        notes.append(
            f"The runs are of {len(comparisons)} environments, whose returns have different "
            "scales: each environment is compared by itself."
        )
    for comparison in comparisons:
        where = f"{comparison.environment.label}: " if len(comparisons) > 1 else ""
        notes += [f"{where}{text}" for text in _notes_of(comparison)]
    if len(references) > 1 and not scores:
        notes.append("No configuration was run in all environments with a score, so none is given.")
    return notes


def _notes_of(comparison: Comparison) -> list[str]:
    environment = comparison.environment
    groups, notes = environment.groups, []
    for group in groups:
        if group.unfinished:
            notes.append(
                f"{group.name}: {plural('run', len(group.unfinished))} of {len(group.runs)} not "
                f"finished ({', '.join(_seed_and_progress(run) for run in group.unfinished)}); "
                "compared as far as they are, without a final evaluation."
            )
    notes += [
        f"{run.path}: {note}." for group in groups for run in group.runs for note in run.notes
    ]
    single = [group for group in groups if len(group.runs) == 1]
    if single:
        notes.append(f"A single seed, so no interval: {_names(single, groups)}.")
    few = [g for g in groups if 1 < len(g.runs) < 5]
    if few:
        notes.append(
            f"Fewer than five seeds: {_names(few, groups)}. Bootstrap intervals of so few are too "
            "narrow"
            + (
                ", and the interquartile mean of fewer than four is the mean."
                if any(1 < len(g.runs) < 4 for g in groups)
                else "."
            )
        )
    if len({len(g.runs) for g in groups}) > 1:
        notes.append(
            "Numbers of seeds differ: " + ", ".join(f"{g.name} {len(g.runs)}" for g in groups) + "."
        )
    elif len({tuple(r.seed for r in g.runs) for g in groups}) > 1:
        notes.append(
            "The configurations were run with different seeds: "
            + "; ".join(f"{g.name} {_seeds(g)}" for g in groups)
            + "."
        )
    short = [g for g in groups if all(r.env_steps < comparison.budget for r in g.runs)]
    if short:
        notes.append(
            f"No run has come to the budget of {comparison.budget:,.0f} steps yet: "
            f"{_names(short, groups)}."
        )
    return notes


def _seed_and_progress(run: Run) -> str:
    return f"seed {run.seed} {run.progress()}"


def _names(some: Sequence[Group], groups: Sequence[Group]) -> str:
    if len(some) == len(groups) > 2:
        return "all configurations"
    return ("; " if not some[0].mark else ", ").join(group.name for group in some)


def _seeds(group: Group) -> str:
    return ", ".join(str(run.seed) for run in group.runs)


def outputs(directory: Path) -> dict[str, Path]:
    """Files of a comparison by what they are."""
    return {
        "page": directory / "comparison.html",
        "runs": directory / "runs.csv",
        "groups": directory / "groups.csv",
        "figures": directory / "figures",
    }
