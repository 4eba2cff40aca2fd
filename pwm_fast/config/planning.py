"""Planning in place of the policy, in evaluations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from pwm_fast.config.checks import (
    COUNT,
    Checked,
    checked,
    finite,
    not_negative,
    one_of,
    positive,
    require,
)


@dataclass
class PlanningConfig(Checked):
    """How actions are planned; :class:`pwm_fast.ops.MPPI` documents the parameters.

    Attributes:
        kind: ``none`` (the policy acts) or ``mppi``.
        horizon: steps that a plan looks ahead.
        iterations: times that trajectories are drawn, valued and averaged.
        samples: trajectories of an iteration, the policy's among them.
        elites: the best of them, which make the next mean and standard deviation.
        policy_trajectories: how many of the samples are the policy's own.
        min_std: least standard deviation of an action.
        max_std: largest one, which every plan starts with.
        temperature: elites have weights in proportion to ``exp(temperature value)``.
    """

    PREFIX: ClassVar[str] = "planning."

    kind: str = checked("none", one_of("none", "mppi"))
    horizon: int = checked(3, positive())
    iterations: int = checked(6, positive())
    samples: int = checked(512, positive())
    elites: int = checked(64, positive())
    policy_trajectories: int = checked(24, not_negative(COUNT))
    min_std: float = checked(0.05, not_negative(), finite)
    max_std: float = checked(2.0, not_negative(), finite)
    temperature: float = checked(0.5, not_negative(), finite)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "none":  # then a parameter would do nothing, and its user not know it
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                expected = f"left at {field.default} without a planner such as planning=mppi"
                require(value == field.default, f"planning.{field.name}", value, expected)
        for name in ("elites", "policy_trajectories"):
            value = getattr(self, name)
            expected = f"at most planning.samples={self.samples}"
            require(value <= self.samples, f"planning.{name}", value, expected)
        expected = f"at least planning.min_std={self.min_std}"
        require(self.max_std >= self.min_std, "planning.max_std", self.max_std, expected)

    def parameters(self) -> dict[str, Any]:
        """All keys but ``kind``."""
        return {name: value for name, value in vars(self).items() if name != "kind"}
