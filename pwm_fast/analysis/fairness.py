"""Whether two agents are of one size: their parameters, and what they compute."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from importlib import resources
from typing import NamedTuple

from pwm_fast import config as configuration
from pwm_fast.analysis.accounting import (
    Costs,
    Flops,
    Networks,
    Spaces,
    count_flops,
    world_model_parameters,
)
from pwm_fast.config import ConfigError, TrainConfig, WorldModelConfig
from pwm_fast.run import build

LIMIT = 2.0  # percent
FLOW = "_flow"  # a shipped flow configuration is its baseline's name and this
SAME = ("encoder", "reward")  # what has to be the baseline's own, layer by layer
SUMS = ("world_model", "total")
TRANSITION = ""  # stands for what else a world model has: its dynamics, whatever they are called
LABELS = {
    "encoder": "encoder",
    TRANSITION: "",
    "reward": "reward",
    "task_emb": "task embedding",
    "world_model": "world model",
    "actor": "actor",
    "critics": "critics",
    "total": "total",
}
NOTE = "The termination head is left out on both sides: the published models have none."
RULE = (
    "A multiply-add in a matrix product is 2 FLOPs, counted by running the trainer's losses on\n"
    "tensors without storage. Element-wise work, optimisers, evaluations and the simulator are\n"
    "left out. fwd: forward pass; fwd+bwd: with the gradients that the update uses."
)


class Parity(NamedTuple):
    """Two agents' parameters.

    Attributes:
        alg: name of the configuration in question.
        against: name of the one it is held against.
        counts: parameters per component of ``alg``.
        base: those of ``against``.
        different: components that should be the baseline's own and are not.
    """

    alg: str
    against: str
    counts: dict[str, int]
    base: dict[str, int]
    different: tuple[str, ...]

    def percent(self, component: str) -> float:
        """How much larger the component is than the baseline's."""
        return percent(self.counts[component], self.base[component])

    @property
    def fair(self) -> bool:
        """World model and total are within the limit, encoder and reward head the baseline's."""
        return not self.different and all(abs(self.percent(name)) <= LIMIT for name in SUMS)


class Suggestion(NamedTuple):
    """A hidden width, and how much larger than the baseline it makes the world model, in percent.

    Attributes:
        best: the width that meets the baseline best.
        best_percent: its difference.
        aligned: the multiple of 8 that does, as tensor cores like it.
        aligned_percent: its difference.
    """

    best: int
    best_percent: float
    aligned: int
    aligned_percent: float


def percent(ours: float, base: float) -> float:
    """How much larger ``ours`` is than ``base``, in percent."""
    return 100.0 * (ours - base) / base


def compare_parameters(config: TrainConfig, against: TrainConfig, spaces: Spaces) -> Parity:
    """Count both agents' parameters; nothing of their size is allocated."""
    ours, base = (Networks.build(c.alg, spaces) for c in (config, against))
    shapes = [
        {
            name: tuple(p.shape)
            for name, p in nets.world_model.named_parameters()
            if name.startswith(tuple(f"_{part}." for part in SAME))
        }
        for nets in (ours, base)
    ]
    different = tuple(
        part
        for part in SAME
        if any(
            shapes[0].get(name) != shapes[1].get(name)
            for name in {*shapes[0], *shapes[1]}
            if name.startswith(f"_{part}.")
        )
    )
    return Parity(
        config.alg.full_name, against.alg.full_name, ours.parameters(), base.parameters(), different
    )


def suggest(config: WorldModelConfig, target: int, spaces: Spaces) -> Suggestion:
    """The width of all hidden layers of the transition with which a world model meets ``target``.

    Args:
        config: of the world model; its transition keeps its number of layers.
        target: parameters to meet.
        spaces: of the environment.

    Raises:
        ConfigError: the transition has no hidden layers.
    """
    if not config.units:
        raise ConfigError("alg.world_model.units is empty: there is no width to suggest")

    def count(width: int) -> int:
        units = [width] * len(config.units)
        return world_model_parameters(dataclasses.replace(config, units=units), spaces)

    def nearest(step: int) -> tuple[int, float]:
        """The best multiple of ``step``; the count grows with the width."""
        low, high = 1, 2
        while count(high * step) < target:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if count(middle * step) < target else (low, middle)
        width = min((low * step, high * step), key=lambda w: abs(count(w) - target))
        return width, percent(count(width), target)

    return Suggestion(*nearest(1), *nearest(8))


def shipped_pairs() -> list[tuple[str, str]]:
    """Names of the shipped flow configurations, each with its baseline's."""
    files = (resources.files("pwm_fast.configs") / "alg").iterdir()
    names = {file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")}
    pairs = [(name, name.removesuffix(FLOW)) for name in sorted(names) if name.endswith(FLOW)]
    return [(flow, base) for flow, base in pairs if base in names]


def spaces_of(config: TrainConfig) -> Spaces:
    """Observation and action widths of a run's environment.

    Raises:
        ConfigError: the environment cannot be made.
    """
    with closing(build.make_env(config, 1, 0)) as env:
        return Spaces.of(env)


def parameter_table(parity: Parity) -> str:
    """One line a component: the baseline's parameters, ours, and the difference in percent."""
    one, two = (max(18, len(name) + 2) for name in (parity.against, parity.alg))
    lines = [f"{'parameters':18}{parity.against:>{one}}{parity.alg:>{two}}{'difference':>14}"]
    for name, label in _components(parity):
        base, ours = _of(parity.base, name), _of(parity.counts, name)
        difference = f"{percent(ours, base):+.2f} %" if base and ours else "-"
        if base == ours:
            difference = "0" if name in SUMS or name not in parity.different else "other layers"
        rule = "-" * (32 + one + two) + "\n" if name in SUMS else ""
        lines.append(f"{rule}{label:18}{base:>{one},}{ours:>{two},}{difference:>14}")
    return "\n".join(lines)


def flops_table(base: Costs, ours: Costs, names: tuple[str, str]) -> str:
    """One line a piece of work: the baseline's FLOPs, ours, and how many times as many ours are."""
    one, two = (max(18, len(name) + 2) for name in names)
    lines = [f"{'FLOPs':36}{names[0]:>{one}}{names[1]:>{two}}{'ratio':>8}"]

    def line(label: str, first: float, second: float) -> None:
        ratio = f"{second / first:.2f}" if first else "-"
        lines.append(f"{label:36}{_si(first):>{one}}{_si(second):>{two}}{ratio:>8}")

    def both(label: str, first: Flops, second: Flops) -> None:
        line(f"{label}, fwd", first.forward, second.forward)
        line(f"{label}, fwd+bwd", first.total, second.total)

    line("macro step of one latent, fwd", base.macro_step.total, ours.macro_step.total)
    both("world-model update", base.world_model_update, ours.world_model_update)
    both("actor update", base.actor_update, ours.actor_update)
    both("its critic updates", base.critic_updates, ours.critic_updates)
    line("environment step: acting", base.act.total, ours.act.total)
    line("environment step: learning", base.learning_per_step, ours.learning_per_step)
    line("environment step: both", base.per_step, ours.per_step)
    return "\n".join(lines)


def verdict(parity: Parity) -> str:
    """One line that says whether the comparison is fair, and if not, why."""
    if parity.fair:
        return (
            f"fair: world model within {LIMIT:g} % ({parity.percent('world_model'):+.2f} %), "
            "encoder and reward head the same"
        )
    reasons = [
        f"{name.replace('_', ' ')} differs by {parity.percent(name):+.2f} % (limit {LIMIT:g} %)"
        for name in SUMS
        if abs(parity.percent(name)) > LIMIT
    ]
    reasons += [f"the {name} has other layers than the baseline's" for name in parity.different]
    return f"not fair: {'; '.join(reasons)}"


def suggestion_line(suggestion: Suggestion, layers: int) -> str:
    """The suggestion as an override of the command line."""

    def override(width: int) -> str:
        return f"alg.world_model.units=[{','.join([str(width)] * layers)}]"

    text = f"suggested: {override(suggestion.best)} ({suggestion.best_percent:+.3f} %)"
    if suggestion.aligned == suggestion.best:
        return f"{text}, a multiple of 8"
    return (
        f"{text}\nor, as a multiple of 8: {override(suggestion.aligned)} "
        f"({suggestion.aligned_percent:+.3f} %)"
    )


def _components(parity: Parity) -> list[tuple[str, str]]:
    """Names and labels in the order of the table; the two transitions share a line."""
    present = {k for counts in (parity.base, parity.counts) for k, n in counts.items() if n}
    labels = {**LABELS, TRANSITION: " / ".join(sorted(present - {*LABELS}))}
    return [(k, v) for k, v in labels.items() if _of(parity.base, k) or _of(parity.counts, k)]


def _of(counts: dict[str, int], name: str) -> int:
    if name == TRANSITION:
        return sum(count for key, count in counts.items() if key not in LABELS)
    return counts.get(name, 0)


def _si(value: float) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3f} {prefix}"
    return f"{value:.0f}"


class Request(NamedTuple):
    """What the command line asks for.

    Attributes:
        pair: names of the configuration in question and its baseline; None for all shipped pairs.
        common: overrides for both.
        ours: overrides for the first alone.
        theirs: overrides for the second alone.
        suggest: print the width that meets the baseline best.
    """

    pair: tuple[str, str] | None
    common: tuple[str, ...]
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    suggest: bool

    def configs(self, pair: tuple[str, str]) -> tuple[TrainConfig, TrainConfig]:
        """Both configurations of a pair."""
        return (
            configuration.compose(*self.common, f"alg={pair[0]}", *self.ours),
            configuration.compose(*self.common, f"alg={pair[1]}", *self.theirs),
        )


def check_pair(request: Request, pair: tuple[str, str]) -> int:
    """Print everything about one pair; return the exit status."""
    config, against = request.configs(pair)
    spaces = spaces_of(config)
    parity = compare_parameters(config, against, spaces)
    costs = [count_flops(c.alg, spaces, c.env_count) for c in (against, config)]
    print(
        f"{config.env.name}: observations {spaces.obs_dim}, actions {spaces.action_dim}, "
        f"{config.env_count} envs\n"
    )
    print(f"{parameter_table(parity)}\n{NOTE}\n")
    print(f"{flops_table(costs[0], costs[1], (parity.against, parity.alg))}\n{RULE}\n")
    print(verdict(parity))
    if request.suggest:
        suggestion = suggest(config.alg.world_model, parity.base["world_model"], spaces)
        print(suggestion_line(suggestion, len(config.alg.world_model.units)))
    return 0 if parity.fair else 1


def check_all(request: Request) -> int:
    """Print one line for every shipped pair; return the exit status."""
    spaces: Spaces | None = None
    fair = True
    width = f"{'best width':>12}" if request.suggest else ""
    for pair in shipped_pairs():
        config, against = request.configs(pair)
        if spaces is None:
            spaces = spaces_of(config)
            print(
                f"{config.env.name}: observations {spaces.obs_dim}, actions {spaces.action_dim}\n\n"
                f"{'configuration':16}{'against':12}{'baseline':>14}{'flow':>14}{'difference':>12}"
                f"{'FLOPs':>8}{width}  verdict"
            )
        parity = compare_parameters(config, against, spaces)
        base, ours = (count_flops(c.alg, spaces, c.env_count).per_step for c in (against, config))
        if request.suggest:
            best = suggest(config.alg.world_model, parity.base["world_model"], spaces)
            width = f"{best.best:>12}"
        print(
            f"{parity.alg:16}{parity.against:12}{parity.base['world_model']:>14,}"
            f"{parity.counts['world_model']:>14,}{parity.percent('world_model'):>+10.2f} %"
            f"{ours / base:>7.2f}x{width}  {verdict(parity).split(':')[0]}",
            flush=True,  # each takes a second or two
        )
        fair = fair and parity.fair
    print(
        "\nParameters of the world model; FLOPs: how many times the baseline's an environment\n"
        f"step costs, with the learning that follows it. alg=NAME shows the parts.\n{NOTE}"
    )
    return 0 if fair else 1
