"""The configurations that the study of docs/results.md compares."""

from __future__ import annotations

from typing import NamedTuple

WM, LEARN = "alg.world_model", "alg.model_learning"


class Arm(NamedTuple):
    """A configuration of a study.

    Attributes:
        name: of its run directories.
        label: in tables.
        overrides: of the trainer.
    """

    name: str
    label: str
    overrides: tuple[str, ...]


class Study(NamedTuple):
    """Runs that are compared with one another.

    Attributes:
        overrides: that all arms have.
        arms: the configurations.
        success: what a share in ``eval_success`` means; empty where the task has no goal.
        steps, seconds: of training, at which returns are compared; none by default.
        action_repeat: of the environment. Its ``env_steps`` are decisions, ``steps`` are not.
    """

    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    success: str = ""
    steps: tuple[int, ...] = ()
    seconds: tuple[int, ...] = ()
    action_repeat: int = 1


def _tiny(name: str, label: str, *overrides: str) -> Arm:
    kind = "pwm_tiny" if name.startswith(("mlp", "residual")) else "pwm_tiny_flow"
    return Arm(name, label, (f"alg={kind}", *overrides))


# Arms name what defaults may come to differ in; bench.study refuses runs of what an arm was once.
ALL_DRAWN = f"{LEARN}.flow_share=1.0"
HEUN = (ALL_DRAWN, f"{WM}.integrator=heun", f"{WM}.substeps=2")
EULER = (ALL_DRAWN, f"{WM}.integrator=euler", f"{WM}.substeps=1")
WHOLE, CUT4, CUT2, CUT1 = (f"{LEARN}.rollout_steps={n}" for n in ("null", 4, 2, 1))
SHARE = (*EULER[1:], WHOLE, f"{LEARN}.flow_share=0.25")

CARTPOLE = (
    _tiny("mlp", "MLP (baseline), windows of 16", WHOLE),
    _tiny("mlp_n4", "MLP, windows of 4", CUT4),
    _tiny("mlp_n2", "MLP, windows of 2", CUT2),
    _tiny("mlp_n1", "MLP, windows of 1", CUT1),
    _tiny("residual", "residual MLP, windows of 16", f"{WM}.kind=residual", WHOLE),
    _tiny("residual_n1", "residual MLP, windows of 1", f"{WM}.kind=residual", CUT1),
    _tiny("flow_simnorm", "flow, SimNorm head, Heun K = 2", f"{WM}.head=simnorm", *HEUN, WHOLE),
    _tiny("flow_heun", "flow, Heun K = 2", *HEUN, WHOLE),
    _tiny("flow_mixed", "flow, Heun K = 2, learned with Euler K = 1", *HEUN,
          f"{LEARN}.integrator=euler", f"{LEARN}.substeps=1", WHOLE),
    _tiny("flow", "flow, Euler K = 1", *EULER, WHOLE),
    _tiny("flow_share", "flow, Euler K = 1, a quarter of the flow times drawn", *SHARE),
    _tiny("flow_n4", "flow, Euler K = 1, windows of 4", *EULER, CUT4),
    _tiny("flow_n2", "flow, Euler K = 1, windows of 2", *EULER, CUT2),
    _tiny("flow_n1", "flow, Euler K = 1, windows of 1", *EULER, CUT1),
    _tiny("flow_encoder", "flow, Euler K = 1, starts' gradient to the encoder", *EULER, WHOLE,
          f"{LEARN}.start_grad=encoder"),
    _tiny("flow_none", "flow, Euler K = 1, starts without gradient", *EULER, WHOLE,
          f"{LEARN}.start_grad=none"),
    _tiny("flow_auto", "flow, Euler K = 1, encoded starts with measured noise", *EULER, WHOLE,
          f"{LEARN}.flow_start=teacher", f"{LEARN}.start_noise=auto"),
    _tiny("shortcut", "shortcut model, K = 1", f"{WM}.kind=shortcut", f"{WM}.substeps=1", WHOLE),
    _tiny("meanflow", "MeanFlow, K = 1", f"{WM}.kind=shortcut", f"{WM}.substeps=1", WHOLE,
          f"{LEARN}.consistency=meanflow"),
)  # fmt: skip

# The shipped baseline and flow (mlp_n1 and flow_share above), and policies in their models. Names
# apart from CARTPOLE's: bench.frontier measured no policies.
POLICIES = (
    _tiny("mlp_gaussian", "MLP, Gaussian policy", CUT1),
    _tiny("mlp_flow", "MLP, flow policy", CUT1, "actor=flow"),
    _tiny("flow_gaussian", "flow, Gaussian policy", *SHARE),
    _tiny("flow_flow", "flow, flow policy", *SHARE, "actor=flow"),
    _tiny("flow_flow_g", "flow, gated flow policy", *SHARE, "actor=flow_g"),
    _tiny("flow_meanflow", "flow, MeanFlow policy", *SHARE, "actor=meanflow"),
)


def _of_observations(windows: str, suffix: str, cut: str) -> tuple[Arm, ...]:
    """The three kinds on latents that are observations."""
    return (
        Arm(f"mlp_of_obs{suffix}", f"MLP of observations, windows of {windows}",
            ("alg=pwm_small", cut)),
        Arm(f"residual_of_obs{suffix}", f"residual MLP of observations, windows of {windows}",
            ("alg=pwm_small", f"{WM}.kind=residual", cut)),
        Arm(f"flow_of_obs{suffix}", f"flow of observations, windows of {windows}",
            ("alg=pwm_small_flow", cut)),
    )  # fmt: skip


OBSERVATIONS = (
    *_of_observations("1", "", CUT1),
    *_of_observations("4", "_n4", CUT4),
    *_of_observations("16", "_n16", WHOLE),
)
# The published encoder, and what its small latents are multiplied by. Names apart from CARTPOLE's:
# bench.frontier measured what those cost, at another size.
ENCODED = (CUT1, f"{WM}.encoder=mlp", "alg.actor.input_gain=4.0", "alg.critic.input_gain=4.0")
SMALL = (
    Arm("small_mlp", "MLP (baseline)", ("alg=pwm_small", *ENCODED)),
    Arm("small_residual", "residual MLP", ("alg=pwm_small", f"{WM}.kind=residual", *ENCODED)),
    Arm("small_flow", "flow", ("alg=pwm_small_flow", *ENCODED)),
)


def _robot(*env: str) -> Study:
    """A robot with contacts, for 200 epochs on one thread."""
    common = ("device=cpu", "threads=1", "epochs=200", "eval.every=10", "esnr.every=0")
    steps, seconds = (50_000, 100_000, 150_000, 200_000), (100, 200, 300, 500)
    return Study((*env, *common), (*SMALL, *OBSERVATIONS), steps=steps, seconds=seconds)


def _dm_control(domain: str, task: str) -> Study:
    """A task of the dm_control suite for 200,000 steps of the simulator, two a decision."""
    overrides = (
        "env=dmc",
        f"env.domain={domain}",
        f"env.task={task}",
        "device=cpu",
        "threads=1",
        "epochs=782",
        "eval.every=39",
        "esnr.every=0",
        "alg.random_epochs=40",
        "alg.actor.entropy_coef=0.02",
    )
    steps = (50_000, 100_000, 150_000, 200_000)
    return Study(overrides, OBSERVATIONS, steps=steps, action_repeat=2)


HANGING = ("env=cartpole", "device=cpu", "threads=1")
UPRIGHT = "held upright for the last second"

STUDIES = {
    "cartpole": Study(HANGING, CARTPOLE, UPRIGHT),
    "cartpole-policies": Study(HANGING, POLICIES, UPRIGHT, steps=(102_400, 204_800, 307_200)),
    "hopper": _robot("env=hopper"),
    "ant": _robot("env=ant", "env.num_envs=64"),
    "cheetah-run": _dm_control("cheetah", "run"),
    "walker-walk": _dm_control("walker", "walk"),
    "cartpole-swingup": _dm_control("cartpole", "swingup"),
}
