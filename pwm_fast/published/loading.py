"""Loading a published checkpoint."""

from __future__ import annotations

from pathlib import Path

from pwm_fast import files
from pwm_fast.published import pwm, tdmpc2
from pwm_fast.published.reading import PublishedError, family_of, read
from pwm_fast.published.result import Published


def load_published(
    path: str | Path,
    *,
    substeps: int = 2,
    integrator: str = "heun",
    policy_substeps: int = 2,
    policy_integrator: str = "heun",
) -> Published:
    """A checkpoint of PWM, Flow-MBPO-PWM or TD-MPC2 as configuration and parameters.

    Nothing in it is executed. All widths come from the shapes in the file.

    Args:
        path: the file, as the published code saved it.
        substeps: K of a flow, which the file does not hold.
        integrator: ``heun`` or ``euler`` of a flow, likewise.
        policy_substeps: K of a flow policy, likewise.
        policy_integrator: ``heun`` or ``euler`` of a flow policy, likewise.

    Raises:
        PublishedError: the file is damaged, of none of them, or holds what has no place here; the
            message names it.
        ConfigError: a K or an integrator is no such value.
        ImportError: the packages that read configurations are missing.
        OSError: it cannot be read.
    """
    path = files.user_path(path)
    content = read(path)
    family = family_of(path, content)
    try:
        if family == "tdmpc2":
            return tdmpc2.convert(path, content)
        steps = pwm.FlowSteps(substeps, integrator, policy_substeps, policy_integrator)
        return pwm.convert(path, content, family, steps=steps)
    except PublishedError:
        raise
    except RecursionError as error:
        raise PublishedError(f"{path} is nested too deeply to be a checkpoint") from error
