"""The agent's configuration: its networks and its updates."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pwm_fast.config.checks import (
    FLOAT,
    LOGSTD,
    SIZE,
    WIDTH,
    Check,
    Checked,
    adam_betas,
    at_least,
    checked,
    finite,
    limit,
    not_negative,
    number,
    one_of,
    or_null,
    positive,
    require,
    widths,
)


def multiple_of_8(key: str, value: int) -> None:
    """Whole SimNorm groups."""
    require(value % 8 == 0, key, value, "a multiple of 8 (SimNorm)")


#: Kinds of world models that were registered (:func:`pwm_fast.models.register`).
WORLD_MODELS: set[str] = set()


def world_model_kinds() -> tuple[str, ...]:
    """Kinds of world models: those registered, and a file ``models/<kind>_dynamics.py`` each."""
    folder = Path(__file__).parents[1] / "models"
    shipped = {path.name.removesuffix("_dynamics.py") for path in folder.glob("*_dynamics.py")}
    return tuple(sorted(shipped | WORLD_MODELS))


def world_model_kind(key: str, value: str) -> None:
    """One of :func:`world_model_kinds`."""
    one_of(*world_model_kinds())(key, value)


def or_auto(*checks: Check) -> Check:
    """A number that passes the checks, or ``auto``."""

    def check(key: str, value: Any) -> None:
        if value == "auto":
            return
        number_given = isinstance(value, (int, float)) and not isinstance(value, bool)
        require(number_given, key, value, "a number, or auto")
        for each in checks:
            each(key, value)

    return check


COUNT_OR_NULL = or_null(number(lambda value: value >= 0, "0 or more, or null"))
POSITIVE_OR_NULL = or_null(number(lambda value: value > 0, "positive, or null", FLOAT))
IN_UNIT = number(lambda value: 0.0 <= value <= 1.0, "in [0, 1]")
SHARE = number(lambda value: 0.0 <= value < 1.0, "in [0, 1)")
DISCOUNT = number(lambda value: 0.0 < value <= 1.0, "in (0, 1]")


def discounts(key: str, values: Any) -> None:
    """A list of discounts."""
    for value in values:
        DISCOUNT(key, value)


@dataclass
class WorldModelConfig(Checked):
    """Networks of the world model.

    Attributes:
        kind: ``mlp`` (PWM's baseline), ``flow``, ``residual`` (the flow's network as a plain
            residual MLP), ``shortcut`` (a flow that is told its step's size), or another of
            :func:`world_model_kinds`.
        encoder: ``mlp`` (PWM's, learned, ends in SimNorm), or ``identity``: latents are
            observations, so D is their width and nothing of them can be lost. It wants
            ``alg.normalize_obs``, and takes dynamics with a linear last layer.
        latent_dim: D, a multiple of 8 (the SimNorm groups); of ``encoder=mlp``.
        units: hidden widths of the dynamics, or of the velocity field.
        encoder_units: hidden widths of the encoder; of ``encoder=mlp``.
        reward_units: hidden widths of the reward and termination heads.
        num_bins: two-hot bins of the reward head; 1 is a scalar head.
        vmin: first bin centre, in symlog space.
        vmax: last bin centre, in symlog space.
        task_dim: width E of the task embedding; 0 is a single-task model.
        num_tasks: number of tasks with an embedding. A training run has 1
            (:func:`pwm_fast.config.check_tasks`).
        zero_velocity: start with a zero last weight of a linear velocity head, so that the model
            starts as the identity, which is close to the truth, and not as a random drift.
        head: last layer of the velocity field, ``linear`` or ``simnorm`` (cannot fit its target).
        integrator: ``heun`` or ``euler``, of a flow.
        substeps: K, integrator steps a macro step.
        project: put latents back on the simplices after every macro step.
    """

    PREFIX: ClassVar[str] = "alg.world_model."

    kind: str = checked("flow", world_model_kind)
    encoder: str = checked("mlp", one_of("mlp", "identity"))
    latent_dim: int = checked(512, positive(WIDTH), multiple_of_8)
    units: list[int] = checked([512, 512], widths)
    encoder_units: list[int] = checked([256], widths)
    reward_units: list[int] = checked([512, 512], widths)
    num_bins: int = checked(101, positive(2**16))
    vmin: float = checked(-10.0, finite)
    vmax: float = checked(10.0, finite)
    task_dim: int = checked(0, not_negative(WIDTH))
    num_tasks: int = checked(1, positive(WIDTH))
    head: str = checked("linear", one_of("linear", "simnorm"))
    zero_velocity: bool = False
    integrator: str = checked("heun", one_of("heun", "euler"))
    substeps: int = checked(2, positive(1024))
    project: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, other in (("head", "linear"), ("project", False)):  # these are of simplices
            value = getattr(self, key)
            fits = self.encodes or value == other
            require(fits, self.PREFIX + key, value, f"{other} where encoder is identity")
        ok = self.task_dim > 0 or self.num_tasks == 1
        require(ok, f"{self.PREFIX}num_tasks", self.num_tasks, "1 where task_dim is 0")
        below = f"below vmax ({self.vmax})"
        require(self.vmin < self.vmax, f"{self.PREFIX}vmin", self.vmin, below)

    @property
    def encodes(self) -> bool:
        """Latents are made from observations by a network, and lie on simplices."""
        return self.encoder != "identity"

    def latent_width(self, obs_dim: int) -> int:
        """D, where observations have O numbers."""
        return self.latent_dim if self.encodes else obs_dim

    def at_zero(self, learning: ModelLearningConfig) -> bool:
        """Whether a flow's updates roll out single steps, each of the velocity at tau = 0."""
        method = learning.integrator or self.integrator, learning.substeps or self.substeps
        own = (learning.flow_start, learning.start_grad) == ("rollout", "rollout")
        return method == ("euler", 1) and not self.project and own


@dataclass
class ModelLearningConfig(Checked):
    """World-model updates.

    Attributes:
        updates: updates an epoch. 0 leaves the model, and the statistics that it learned with, as
            they are: there is no bootstrap either.
        bootstrap_updates: updates before the first policy update; null is one episode's length.
        batch_size: windows a batch.
        lr: Adam's learning rate at the start; it decays linearly to ``alg.final_lr``.
        encoder_lr_scale: the encoder learns at this times the rate. Below 1 the latents that the
            dynamics chase move more slowly (TD-MPC2 has 0.3).
        betas: Adam's betas. PWM's world model has torch's own, 0.9 and 0.999.
        grad_norm: the gradient's norm is clipped to this.
        dynamics_coef: weight of the dynamics (or flow-matching) loss. 20 and 0.1 are TD-MPC2's
            weights for a cross-entropy reward.
        reward_coef: weight of the reward loss.
        mean_reward_loss: the reward loss is the mean over a window's H steps where the other losses
            are sums over them, so it weighs 1/H as much: PWM's code divides it by H twice.
        termination_coef: weight of the termination loss.
        integrator: of the rollouts in world-model updates, where it differs from imagination's
            ``alg.world_model.integrator``; of the kind ``flow``.
        substeps: K of these rollouts, where it differs from ``alg.world_model.substeps``; of the
            kinds ``flow`` and ``shortcut``.
        consistency: how the kind ``shortcut`` learns what a step of some size does: ``shortcut``
            (as two of half its size) or ``meanflow`` (:class:`pwm_fast.ops.Shortcut`).
        consistency_share: share of the windows that teach it so.
        rollout_steps: n, a divisor of ``alg.horizon``: windows are cut into pieces of n steps,
            which start at encoded observations; null is the horizon. So a world-model update has
            rollouts of n steps from every n-th observation, all batched. A flow whose flow times
            are all drawn leaves out the last step. Weights ``gamma^t`` begin anew in each piece,
            and ``mean_reward_loss`` divides by n.
        flow_share: share of the windows whose flow times are drawn, rounded up; of the kind
            ``flow``. The others learn at tau = 0, where a rollout of single Euler steps has
            evaluated the velocity already, so that a smaller share costs less (but with
            ``rollout_steps=1``, where nothing else is rolled out). Below 1 for such rollouts as
            starts alone. ``auto`` is a quarter there, and 1 elsewhere, with ``start_noise``, which
            is for drawn flow times, and with other times than ``uniform``.
        tau_sampling: flow times of the flow-matching loss, ``uniform``, or ``midpoint`` (0.5 alone,
            an ablation: Heun also evaluates 0 and 1).
        flow_start: where a flow-matching path starts: ``rollout`` (the model's own latent) or
            ``teacher`` (the encoded observation; no rollout is computed).
        start_grad: where the gradient towards a rolled-out start goes: ``rollout`` (back through
            the rollout, as published), ``encoder`` (straight to the encoded observation of that
            step) or ``none``. The latter two spare the pass back through the rollout.
        start_noise: standard deviation of noise on the path's start. The target still is the
            encoded successor, so the field learns to lead stray latents back, as ``rollout`` starts
            teach it, without computing a rollout. ``auto``: at every step of the window, and for
            every entry of the latent, the model's own error there. A rollout on one batch measures
            it once an epoch (in the bootstrap once every ``updates`` updates), and a moving average
            of the squares is kept; the first step has none.
        target_grad: let the gradient reach the start latent through the velocity target too.
    """

    PREFIX: ClassVar[str] = "alg.model_learning."

    updates: int = checked(8, not_negative())
    bootstrap_updates: int | None = checked(None, COUNT_OR_NULL)
    batch_size: int = checked(256, positive(SIZE))
    lr: float = checked(3e-4, positive(), finite)
    encoder_lr_scale: float = checked(1.0, positive(SIZE), finite)
    betas: list[float] = checked([0.7, 0.95], adam_betas)
    grad_norm: float = checked(20.0, positive())
    dynamics_coef: float = checked(20.0, not_negative(), finite)
    reward_coef: float = checked(0.1, not_negative(), finite)
    mean_reward_loss: bool = False
    termination_coef: float = checked(0.1, not_negative(), finite)
    integrator: str | None = checked(None, or_null(one_of("heun", "euler")))
    substeps: int | None = checked(None, or_null(positive(1024)))
    consistency: str = checked("shortcut", one_of("shortcut", "meanflow"))
    consistency_share: float = checked(0.25, IN_UNIT)
    rollout_steps: int | None = checked(None, or_null(positive()))
    # Of a union, such as a number or "auto", OmegaConf would not convert what is given.
    flow_share: Any = checked(1.0, or_auto(IN_UNIT))
    tau_sampling: str = checked("uniform", one_of("uniform", "midpoint"))
    flow_start: str = checked("rollout", one_of("rollout", "teacher"))
    start_grad: str = checked("rollout", one_of("rollout", "encoder", "none"))
    start_noise: Any = checked(0.0, or_auto(not_negative(), finite))
    target_grad: bool = True


@dataclass
class ActorConfig(Checked):
    """Policy network and updates.

    Attributes:
        kind: ``pwm`` (a standard deviation that is learned and the same in all states; layers are
            Linear, Mish, LayerNorm), ``tdmpc2`` (one that the network gives for each state;
            layers are Linear, LayerNorm, Mish) or ``flow`` (a velocity network that leads noise to
            actions: docs/flow_policy.md).
        suffix: what stands behind ``alg.name`` in run directories and tables, so that they tell
            policies apart; a file of ``configs/actor`` sets it.
        task_input: the network also sees the task's embedding; null is where there are several
            tasks.
        units: hidden widths.
        init_logstd: log standard deviation at the start; of the kinds ``pwm`` and ``flow`` (there
            of the noise that the flow starts from).
        min_logstd: its lower bound.
        max_logstd: its upper bound; of the kind ``tdmpc2``.
        form: what the network of a ``flow`` gives: ``ode`` (the velocity), ``gated`` (a candidate
            and the gate that lets it in: Flow-G) or ``meanflow`` (the average velocity over a step
            of a size that it is told): :class:`pwm_fast.ops.FlowPolicy`.
        integrator: ``euler`` or ``heun``, of a ``flow``; ``meanflow`` has Euler steps alone.
        substeps: K, integrator steps from noise to action, of a ``flow``.
        order: layers of a ``flow``: ``norm_act`` (Linear, LayerNorm, Mish) or ``act_norm`` (Linear,
            Mish, LayerNorm), which takes longer: each evaluation is then an operation of its own.
        input_gain: factor on the first layer's initial weights. Encoded latents vary by about 0.1
            around 1/8: at a gain of 1 small networks start, and long stay, in Mish's linear range.
            Of a ``flow`` it is on the latents' weights alone.
        init: initial weights and biases: ``orthogonal`` (gain 1, biases 0) or ``torch`` (as
            ``torch.nn.Linear`` draws both, PWM's; its weights are 0.58 times as large).
        updates: updates an epoch, each on freshly imagined rollouts.
        batch_size: imagined rollouts a update, started from replayed observations.
        lr: Adam's learning rate at the start; it decays linearly to ``alg.final_lr``.
        betas: Adam's betas.
        grad_norm: the gradient's norm is clipped to this.
        detach: the policy sees latents without their gradient (the dynamics still carry it).
        entropy_coef: imagined rewards are higher by this times ``-log pi(a|z)``, of the actions
            that were drawn (SAC, arXiv 1801.01290; through a model: SAPO, arXiv 2412.12089), so the
            critics' values are higher, too, and ``imagined_return``. In the units of imagined
            rewards, before ``alg.value_scale``. 0 is none, as it must be for a ``flow``, of which
            pi is not known.
    """

    PREFIX: ClassVar[str] = "alg.actor."

    kind: str = checked("pwm", one_of("pwm", "tdmpc2", "flow"))
    suffix: str = ""
    task_input: bool | None = None
    units: list[int] = checked([400, 200, 100], widths)
    init_logstd: float = checked(-1.0, finite, limit(LOGSTD))
    min_logstd: float = checked(-1.427, finite, limit(LOGSTD))
    max_logstd: float = checked(2.0, finite, limit(LOGSTD))
    form: str = checked("ode", one_of("ode", "gated", "meanflow"))
    integrator: str = checked("euler", one_of("euler", "heun"))
    substeps: int = checked(4, positive(1024))
    order: str = checked("norm_act", one_of("norm_act", "act_norm"))
    input_gain: float = checked(1.0, positive(SIZE), finite)
    init: str = checked("orthogonal", one_of("orthogonal", "torch"))
    updates: int = checked(1, not_negative())
    batch_size: int = checked(128, positive(SIZE))
    lr: float = checked(5e-4, positive(), finite)
    betas: list[float] = checked([0.7, 0.95], adam_betas)
    grad_norm: float = checked(1.0, positive())
    detach: bool = True
    entropy_coef: float = checked(0.0, not_negative(), finite)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "flow":
            return
        require(
            self.entropy_coef == 0.0,
            f"{self.PREFIX}entropy_coef",
            self.entropy_coef,
            "0 for a flow policy (kind=flow), the density of whose actions is not known",
        )
        require(
            self.form != "meanflow" or self.integrator == "euler",
            f"{self.PREFIX}integrator",
            self.integrator,
            "euler for form=meanflow, whose network gives average velocities",
        )


@dataclass
class CriticConfig(Checked):
    """Value functions and their updates, which follow every actor update.

    Attributes:
        kind: ``pwm`` (values of latents) or ``tdmpc2`` (Q functions of latents and actions with the
            reward head's bins: to evaluate and plan with; they are not trained).
        task_input: the networks also see the task's embedding; null is where there are several
            tasks.
        units: hidden widths.
        members: size of the ensemble; the value is its minimum.
        input_gain: as the actor's.
        passes: passes over the imagined states an actor update leaves.
        minibatches: minibatches a pass.
        shuffle: deal the imagined states out to minibatches at random, anew in every pass; false
            takes them in order of time, as PWM's code does.
        lr: Adam's learning rate at the start; it decays linearly to ``alg.final_lr``.
        betas: Adam's betas.
        grad_norm: the gradient's norm is clipped to this.
        lam: lambda of the TD(lambda) targets. PWM's code has 0.95 while it steps an environment;
            offline its targets are those of 0 whatever it is set to.
    """

    PREFIX: ClassVar[str] = "alg.critic."

    kind: str = checked("pwm", one_of("pwm", "tdmpc2"))
    task_input: bool | None = None
    units: list[int] = checked([400, 200], widths)
    members: int = checked(3, positive(1024))
    input_gain: float = checked(1.0, positive(2**16), finite)
    passes: int = checked(8, not_negative())
    minibatches: int = checked(4, positive(2**16))
    shuffle: bool = True
    lr: float = checked(5e-4, positive(), finite)
    betas: list[float] = checked([0.7, 0.95], adam_betas)
    grad_norm: float = checked(100.0, positive())
    lam: float = checked(0.95, IN_UNIT)


@dataclass
class AlgConfig(Checked):
    """The PWM agent.

    Attributes:
        name: of the configuration, for run directories and tables.
        world_model: networks of the world model.
        model_learning: its updates.
        actor: policy.
        critic: value functions.
        horizon: H, macro steps of replay windows and imagined rollouts.
        imagination_horizon: macro steps of imagined rollouts where they differ from ``horizon``.
        gamma: discount a step.
        discounts: one for each task, in place of ``gamma`` in returns and values; null for none.
            The world model's loss keeps ``gamma``.
        steps_per_epoch: environment steps every env takes an epoch.
        random_epochs: epochs of uniform random actions before any update.
        random_hold: steps that a random action is held for on average. Actions drawn anew at every
            step of 1/60 s hardly move a robot.
        replay_capacity: transitions that replay holds, over all envs.
        keep_random: share of the replay that the first transitions, of random actions, keep for
            good; newer ones go round in the rest. 0 lets the newest push out all others. A model
            that no longer sees random actions forgets what actions do.
        normalize_obs: encode observations less their running mean, divided by their running
            standard deviation.
        obs_clip: normalised observations are clipped to plus and minus this; null clips nothing.
        normalize_rewards: train a scalar reward head on rewards divided by theirs.
        centre_rewards: normalised rewards are less their running mean, too. In a task that can
            terminate this changes what is best: a living bonus is gone.
        reward_clip: normalised rewards are clipped to plus and minus this; null clips nothing.
        normalize_returns: divide the actor's loss by the returns' running standard deviation.
        value_scale: imagined rewards are multiplied by this before returns and values are formed
            from them. A critic whose targets are in the hundreds takes thousands of updates to
            reach them.
        value_delay: discount the last state's value in the actor's loss by so many steps more:
            ``gamma^(H + value_delay) V(z_H)``. 0 is the definition, 1 what PWM's code computes.
        symlog_rewards: leave a two-hot head's imagined rewards in symlog space, as PWM's published
            actor loss does: large penalties then weigh less.
        final_lr: what all learning rates decay to, linearly, over the run.
        max_skipped_updates: stop after this many updates in a row were skipped as non-finite.
    """

    PREFIX: ClassVar[str] = "alg."

    name: str = "pwm"
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    model_learning: ModelLearningConfig = field(default_factory=ModelLearningConfig)
    actor: ActorConfig = field(default_factory=ActorConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    horizon: int = checked(16, positive())
    imagination_horizon: int | None = checked(None, or_null(positive()))
    gamma: float = checked(0.99, DISCOUNT)
    discounts: list[float] | None = checked(None, or_null(discounts))
    steps_per_epoch: int = checked(16, positive())
    random_epochs: int = checked(2, at_least(1))
    random_hold: int = checked(1, at_least(1))
    replay_capacity: int = checked(1_000_000, positive(SIZE))
    keep_random: float = checked(0.0, SHARE)
    normalize_obs: bool = False
    obs_clip: float | None = checked(10.0, POSITIVE_OR_NULL)
    normalize_rewards: bool = False
    centre_rewards: bool = False
    reward_clip: float | None = checked(None, POSITIVE_OR_NULL)
    normalize_returns: bool = True
    value_scale: float = checked(1.0, positive(), finite)
    value_delay: int = checked(0, not_negative())
    symlog_rewards: bool = False
    final_lr: float = checked(1e-5, not_negative(), finite)
    max_skipped_updates: int = checked(20, positive(SIZE))

    def __post_init__(self) -> None:
        super().__post_init__()
        two_hot = self.world_model.num_bins > 1
        require(
            not (self.normalize_rewards and two_hot),
            "alg.normalize_rewards",
            self.normalize_rewards,
            "false for a two-hot reward head (num_bins > 1), whose bins are in symlog units",
        )
        require(
            two_hot or not self.symlog_rewards,
            "alg.symlog_rewards",
            self.symlog_rewards,
            "false for a scalar reward head (num_bins = 1)",
        )
        steps = self.model_learning.rollout_steps
        require(
            steps is None or self.horizon % steps == 0,
            "alg.model_learning.rollout_steps",
            steps,
            f"a divisor of alg.horizon ({self.horizon}), or null",
        )
        measured = self.model_learning.start_noise == "auto"
        require(
            not measured or self.window_steps > 1,
            "alg.model_learning.start_noise",
            "auto",
            "a number where windows have one step (rollout_steps=1), whose starts have no error",
        )
        require(
            not measured or self.world_model.kind not in ("mlp", "residual"),
            "alg.model_learning.start_noise",
            "auto",
            f"a number for dynamics of kind {self.world_model.kind}, which learn without noise",
        )

        require(
            self.discounts is None or self.value_delay == 0,
            "alg.discounts",
            self.discounts,
            f"null with alg.value_delay={self.value_delay}, which is a power of one discount",
        )
        actor = self.actor
        require(
            actor.kind != "tdmpc2" or actor.min_logstd <= actor.max_logstd,
            "alg.actor.min_logstd",
            actor.min_logstd,
            f"at most alg.actor.max_logstd={actor.max_logstd}",
        )
        model, share = self.world_model, self.model_learning.flow_share
        require(
            share in ("auto", 1.0) or model.kind != "flow" or model.at_zero(self.model_learning),
            "alg.model_learning.flow_share",
            share,
            "1 or auto but for updates' rollouts of single Euler steps (integrator=euler "
            "substeps=1) without projection, which paths start from (flow_start=rollout "
            "start_grad=rollout)",
        )

    @property
    def full_name(self) -> str:
        """The name, and what tells its policy from others, for run directories and tables."""
        return self.name + self.actor.suffix

    @property
    def window_steps(self) -> int:
        """Macro steps of the windows that a world-model update learns from."""
        return self.model_learning.rollout_steps or self.horizon

    @property
    def imagined_steps(self) -> int:
        """Macro steps of imagined rollouts."""
        return self.imagination_horizon or self.horizon
