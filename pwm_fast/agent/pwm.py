"""The PWM agent: learns a world model from replay and a policy by gradients through it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pwm_fast import memory, ops
from pwm_fast.agent.graphs import CapturedUpdate, CudaGraphs, Recorder, Update
from pwm_fast.agent.imagination import frozen, imagine
from pwm_fast.agent.losses import flow_times, pieces, weighted_gradients, weighted_loss
from pwm_fast.agent.normalizers import RunningMeanStd, StartSpread
from pwm_fast.agent.optim import GuardedAdam
from pwm_fast.agent.state import OPTIMIZER_KEYS, check, fits, not_finite
from pwm_fast.config import ActorConfig, AlgConfig, CriticConfig, ModelLearningConfig
from pwm_fast.models import make_actor, make_critic, make_world_model
from pwm_fast.ops import ImaginedRollout, extend
from pwm_fast.parallel import ALONE, Ranks
from pwm_fast.replay import Windows

Metrics = dict[str, Tensor]


class _Imagined(NamedTuple):
    """Imagined rollouts as they are learned from.

    Attributes:
        rollout: rewards are scaled, and higher by what entropy earns.
        returns: ``[B]``.
        entropy: mean over all steps; None where it earns nothing.
    """

    rollout: ImaginedRollout
    returns: Tensor
    entropy: Tensor | None


class PWM:
    """Policy learning with a world model (arXiv 2407.02466), on MLP or flow dynamics.

    No method but :meth:`state_dict` and :meth:`load_state_dict` synchronises with the host: metrics
    are scalars on the device. With ``graphs`` the third call of an update, and the third after one
    with other shapes, records it as a CUDA graph, for which it waits once; further calls replay it.
    Sampling stays outside: it would tie the recordings to the replay's buffers, and while the
    device computes one update the host has time to launch the sampling of the next.

    Args:
        obs_dim: O.
        action_dim: A.
        config: networks and learning.
        can_terminate: the task can end in a terminal state, so the model learns where.
        device: where everything lives.
        graphs: replay the updates from CUDA graphs; None is on CUDA alone.
        precision: of GEMMs, of :data:`pwm_fast.ops.extend.PRECISIONS`.
        recorder: records the graphs, for a device without them.
        action_dims: components of the action, the first ones, that tasks of these numbers read;
            others read all.
        ranks: processes that learn together, each from its part of every batch: gradients and
            running statistics are those of all. All begin with the same weights and make the same
            updates, which are not replayed from graphs.
    """

    def __init__(
        self,
        obs_dim: int,
        action_dim: int,
        config: AlgConfig,
        *,
        can_terminate: bool = False,
        device: torch.device | str = "cpu",
        graphs: bool | None = None,
        precision: str = "auto",
        recorder: Recorder | None = None,
        action_dims: Mapping[int, int] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if graphs and ranks.size > 1:
            raise ValueError(
                "graphs=True is for one process: the ranks' all-reduce is not recorded"
            )
        if precision not in extend.PRECISIONS:
            raise ValueError(
                f"precision must be one of {', '.join(extend.PRECISIONS)}, got {precision!r}"
            )
        self.config = config
        self.device = torch.device(device)
        self.precision = precision
        self._used: set[str] = set()  # precisions that operations took, as far as it was watched
        self.action_dim = action_dim
        self.world_model = make_world_model(
            obs_dim, action_dim, config.world_model, can_terminate
        ).to(self.device)
        cautions = self.world_model.cautions(config.model_learning)
        if not config.world_model.encodes and not config.normalize_obs:
            cautions.append(
                "alg.normalize_obs=false with alg.world_model.encoder=identity: the networks see "
                "observations in whatever units they have"
            )
        for caution in cautions:
            warnings.warn(caution, stacklevel=2)
        latent_dim = self.world_model.latent_dim
        self.actor = make_actor(latent_dim, action_dim, config).to(self.device)
        self.critic = make_critic(latent_dim, action_dim, config).to(self.device)
        self.action_mask = self._masks(action_dims or {})
        self.discounts: Tensor | None = None
        if config.discounts is not None:
            self.discounts = torch.tensor(config.discounts, dtype=torch.float64, device=self.device)
        tasks = config.world_model.num_tasks
        self.obs_rms = RunningMeanStd((obs_dim,), tasks if tasks > 1 else None).to(self.device)
        self.reward_rms = RunningMeanStd().to(self.device)
        self.return_rms = RunningMeanStd().to(self.device)
        self.start_spread: StartSpread | None = None
        if config.model_learning.start_noise == "auto":
            spread = StartSpread(config.window_steps, self.world_model.latent_dim)
            self.start_spread = spread.to(self.device)
        self.optimizers = {
            "wm": _optimizer(
                self.world_model,
                config.model_learning,
                slow=self.world_model.encoder_parameters(),
                slow_scale=config.model_learning.encoder_lr_scale,
            ),
            "actor": _optimizer(self.actor, config.actor),
            "critic": _optimizer(self.critic, config.critic),
        }

        self.ranks = ranks
        for part in (self.obs_rms, self.reward_rms, self.return_rms, self.start_spread):
            if part is not None:
                part.ranks = ranks
        for optimizer in self.optimizers.values():
            optimizer.ranks = ranks

        if graphs is None:
            graphs = self.device.type == "cuda" and ranks.size == 1
        if recorder is None and graphs:
            if self.device.type != "cuda":
                raise ValueError(f"graphs=True needs a CUDA device, the agent is on {self.device}")
            recorder = CudaGraphs(self.device)
        self.recorder = recorder
        self._updates: dict[str, CapturedUpdate] = {}
        if recorder is not None:
            self._updates = {
                "wm": CapturedUpdate(self._model_update, recorder),
                "actor": CapturedUpdate(self._actor_update, recorder),
                "critic": CapturedUpdate(self._critic_update, recorder, in_place=True),
            }

    def _masks(self, action_dims: Mapping[int, int]) -> Tensor | None:
        """Which components of the action each task reads, ``[T, A]``; None where all read all.

        Where all read the same ones, bool ``[A]``, which leaves rollouts one operator.
        """
        widths, num_tasks = set(action_dims.values()), self.config.world_model.num_tasks
        if widths <= {self.action_dim}:
            return None
        if len(widths) == 1 and len(action_dims) == num_tasks:
            return torch.arange(self.action_dim, device=self.device) < widths.pop()
        masks = torch.ones(num_tasks, self.action_dim)
        for number, width in action_dims.items():
            masks[number, width:] = 0.0
        return masks.to(self.device)

    def _modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {
            "world_model": self.world_model,
            "actor": self.actor,
            "critic": self.critic,
            "obs_rms": self.obs_rms,
            "rew_rms": self.reward_rms,
            "ret_rms": self.return_rms,
        }
        if self.start_spread is not None:
            found["start_spread"] = self.start_spread
        return found

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, where this agent alone writes to its networks, their packs are kept on a GPU.

        On a CPU they always are. Its own methods enter it; around several calls it spares packing.
        """
        if self.device.type == "cpu":
            yield
            return
        networks = (self.world_model, self.actor, self.critic)
        with extend.keeping(p for network in networks for p in network.parameters()):
            yield

    # --- acting ---------------------------------------------------------------------------------

    @torch.no_grad()
    def act(
        self, obs: Tensor, *, task: Tensor | None = None, deterministic: bool = False
    ) -> Tensor:
        """Actions ``[N, A]`` for observations ``[N, O]``; sampled unless ``deterministic``.

        Args:
            obs: observations.
            task: int64 ``[N]``, their tasks' numbers, where the model has several.
            deterministic: act with the mean.
        """
        obs = obs.to(self.device)
        with extend.precision(self.precision), self.keeping():
            task = self.task_numbers((obs.shape[0],), task)
            z = self.encode(obs, task)
            noise = None if deterministic else self._noise(obs.shape[0])
            return self._acted(z, task, noise)

    @torch.no_grad()
    def plan(
        self,
        obs: Tensor,
        options: ops.MPPI | None = None,
        *,
        task: Tensor | None = None,
        previous: Tensor | None = None,
        first: Tensor | None = None,
        eval_mode: bool = False,
        noise: ops.PlanNoise | None = None,
        generator: torch.Generator | None = None,
    ) -> ops.Plan:
        """Plan actions for observations ``[N, O]`` in the world model: :func:`pwm_fast.ops.plan`.

        ``task`` is as in :meth:`act`.

        The actor draws its share of the trajectories. What a trajectory ends in is worth the least
        of the critics' values, as in learning; its rewards are without what entropy earns there.
        """
        obs, config = obs.to(self.device), self.config
        with extend.precision(self.precision), self.keeping():
            task = self.task_numbers((obs.shape[0],), task)
            z = self.encode(obs, task)
            return ops.plan(
                z,
                self.actor.policy(),
                self.world_model.dynamics(),
                self.world_model.heads(symlog_rewards=config.symlog_rewards),
                values=self._values(),
                options=options,
                gamma=self._gamma(task),
                previous=previous,
                first=first,
                eval_mode=eval_mode,
                noise=noise,
                generator=generator,
                task=self.world_model.task_input(task, z),
                action_mask=self._mask(task),
            )

    def trajectory_values(
        self, obs: Tensor, actions: Tensor, *, task: Tensor | None = None
    ) -> Tensor:
        """What :meth:`plan` finds action sequences worth: ``[B, N]``, differentiable in them.

        No gradient reaches the networks' parameters.

        Args:
            obs: ``[B, O]``.
            actions: ``[H, B, N, A]`` in [-1, 1], time first: N sequences for each observation.
            task: as in :meth:`act`.

        Raises:
            ValueError: shapes or devices do not fit.
        """
        config = self.config
        networks = (self.world_model, self.actor, self.critic)
        with extend.precision(self.precision), self.keeping(), frozen(*networks):
            task = self.task_numbers((obs.shape[0],), task)
            z = self.encode(obs, task)
            return extend.trajectory_values(
                z,
                actions,
                self.world_model.dynamics(),
                self.world_model.heads(symlog_rewards=config.symlog_rewards),
                values=self._values(),
                policy=self.actor.policy(),
                gamma=self._gamma(task),
                task=self.world_model.task_input(task, z),
                action_mask=self._mask(task),
            )

    @torch.no_grad()
    def why_not_finite(self, obs: Tensor, task: Tensor | None = None) -> str | None:
        """Where numbers stop being finite on the way from ``obs [N, O]`` to actions; else None.

        Waits for the device; no random numbers are drawn.
        """
        states = {k: self._modules()[k].state_dict() for k in ("obs_rms", "world_model", "actor")}
        problems = [p for k, state in states.items() for p in not_finite(k, state)]
        if problems:
            more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
            return ", ".join(problems[:3]) + more
        with extend.precision(self.precision), self.keeping():
            obs = obs.to(self.device)
            task = self.task_numbers((len(obs),), task)
            z = self.encode(obs, task)
            a = self._acted(z, task)
            for name, value in (("observations", obs), ("latents", z), ("actions", a)):
                bad = int((~value.isfinite().all(-1)).sum())
                if bad:
                    sizes = {
                        f"{k}.{p}": float(t.abs().max())
                        for k, state in states.items()
                        for p, t in state.items()
                        if t.numel()
                    }
                    largest = max(sizes, key=lambda k: sizes[k])
                    return (
                        f"the {name} of {bad} of {len(obs)} envs are not finite, while all "
                        f"parameters are (up to {sizes[largest]:.3g} in {largest})"
                    )
        return None

    def observe(
        self, obs: Tensor, reward: Tensor, task: Tensor | None = None, *, same: bool = False
    ) -> None:
        """Update the running statistics with collected ``obs [N, O]`` and ``reward [N]``.

        ``task`` is as in :meth:`act`. Where the world model does not learn, those that it has
        learned with stay. With ``same`` all ranks are given these.
        """
        if self.config.model_learning.updates == 0:
            return
        if self.config.normalize_obs:
            numbers = self.task_numbers((obs.shape[0],), task)
            self.obs_rms.update(obs.to(self.device), self._group(numbers), same=same)
        if self.config.normalize_rewards:
            self.reward_rms.update(reward.to(self.device), same=same)

    # --- learning -------------------------------------------------------------------------------

    def update_world_model(self, windows: Windows) -> Metrics:
        """One world-model update on a batch of windows.

        Raises:
            OutOfMemory: the device's memory is too small for it; the message says what to lower.
        """
        steps, batch = windows.action.shape[:2]
        what = f"the world model's update on {batch} windows of {steps} steps"
        with memory.explained(what, "alg.model_learning.batch_size or alg.horizon", self.device):
            return self._run("wm", self._model_update, *windows).metrics

    @torch.no_grad()
    def world_model_losses(self, windows: Windows) -> Metrics:
        """The losses of :meth:`update_world_model` on windows that nothing is learned from.

        The flow times are the same in every call; the global random numbers are left alone.
        """
        windows = self._prepared(windows)
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            extend.precision(self.precision),
            self.keeping(),
        ):
            torch.manual_seed(0)
            loss = weighted_loss(
                self.world_model,
                *windows[:4],
                self.config.model_learning,
                gamma=self.config.gamma,
                task=windows.task,
                spread=None if self.start_spread is None else self.start_spread.std(),
            )
        return loss.metrics

    @torch.no_grad()
    def measure_start_spread(self, windows: Windows) -> None:
        """For ``start_noise=auto``: note how far an update's rollouts are from what is encoded.

        Until this was called :meth:`update_world_model` adds no noise; with other kinds of noise it
        does nothing.

        Raises:
            OutOfMemory: the device's memory is too small for it; the message says what to lower.
        """
        if self.start_spread is None:
            return
        learning = self.config.model_learning
        what = f"a rollout of {len(windows.action)} steps on {windows.action.shape[1]} windows"
        with (
            memory.explained(what, "alg.model_learning.batch_size", self.device),
            extend.precision(self.precision),
            self.keeping(),
        ):
            task = self.task_numbers((windows.action.shape[1],), windows.task)
            seen = self.normalized(windows.obs, task)
            obs, action = pieces(learning.rollout_steps, seen, windows.action)
            task = self._of_pieces(task, action)
            encoded = self.world_model.encode(obs, task)
            latents = ops.latent_rollout(
                encoded[0],
                action,
                self.world_model.learned_dynamics(learning),
                task=self.world_model.task_input(task, encoded[0]),
            )
            self.start_spread.update((latents - encoded)[:-1])

    def update_policy(self, obs: Tensor, task: Tensor | None = None) -> Metrics:
        """One actor update on rollouts imagined from ``obs [B, O]``, then the critics' updates.

        ``task`` is as in :meth:`act`.

        Raises:
            OutOfMemory: the device's memory is too small for it; the message says what to lower.
        """
        what = (
            f"the policy's update on {obs.shape[0]} rollouts of {self.config.imagined_steps} steps"
        )
        lower = "alg.actor.batch_size or alg.imagination_horizon"
        with memory.explained(what, lower, self.device):
            actor = self._run("actor", self._actor_update, obs, task)
            critic = Update({})
            if self.config.critic.passes:
                critic = self._run("critic", self._critic_update, *actor.handed)
        return {**actor.metrics, **critic.metrics}

    def _run(self, name: str, function: Callable[..., Update], *inputs: Tensor | None) -> Update:
        """An update, from its graph where it is recorded."""
        with extend.precision(self.precision), self.keeping():
            captured = self._updates.get(name)
            if captured is None or self._is_captured():
                return function(*inputs)
            optimizer = self.optimizers[name]
            key = (self.precision, extend.requested(), optimizer.keep_gradients)
            result = captured(*inputs, key=key)
            for p, gradient in zip(optimizer.params, result.gradients, strict=False):
                p.grad = gradient  # a replay does not do what Python did
            return result

    def _is_captured(self) -> bool:
        """The caller records a graph of its own, which an update becomes a part of."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _kept(self, name: str) -> tuple[Tensor, ...]:
        """Gradients that an optimiser keeps."""
        return tuple(p.grad for p in self.optimizers[name].params if p.grad is not None)

    def _model_update(
        self,
        obs: Tensor,
        action: Tensor,
        reward: Tensor,
        end: Tensor,
        task: Tensor | None = None,
    ) -> Update:
        learning, gamma = self.config.model_learning, self.config.gamma
        windows = self._prepared(Windows(obs, action, reward, end, task))
        action, task = windows.action, windows.task
        optimizer = self.optimizers["wm"]
        tau = flow_times(action, learning)
        spread = None if self.start_spread is None else self.start_spread.std()
        found = None
        if task is None:
            found = weighted_gradients(
                self.world_model, *windows[:4], learning, gamma=gamma, tau=tau, spread=spread
            )
        if found is not None:
            loss, grads, precision = found
            self._used.add(precision)
            norm = optimizer.apply(loss.total, [grads.get(id(p)) for p in optimizer.params])
        else:
            with extend.precisions_used(self._used):
                loss = weighted_loss(
                    self.world_model,
                    *windows[:4],
                    learning,
                    gamma=gamma,
                    task=task,
                    tau=tau,
                    spread=spread,
                )
            norm = optimizer.step(loss.total)
        metrics = {**loss.metrics, "wm_grad_norm": norm}
        return Update(metrics, gradients=self._kept("wm"))

    def _actor_update(self, obs: Tensor, task: Tensor | None = None) -> Update:
        task = self.task_numbers((obs.shape[0],), task)
        with frozen(self.world_model, self.critic), extend.precisions_used(self._used):
            rollout, returns, entropy = self._imagine(obs, task)
            self.return_rms.update(returns)
            loss = self._actor_loss(returns)
            norm = self.optimizers["actor"].step(loss)
        metrics = {
            "actor_loss": loss.detach(),
            "actor_grad_norm": norm,
            "imagined_return": returns.detach().mean() / self.config.value_scale,
            "actor_std": self._std(rollout.z[0], task),
        }
        if entropy is not None:
            metrics["entropy"] = entropy
        handed = tuple(None if x is None else x.detach() for x in (*rollout, task))
        return Update(metrics, handed, self._kept("actor"))

    def _critic_update(self, *handed: Tensor) -> Update:
        *rollout, task = handed
        metrics = self._update_critic(ImaginedRollout(*rollout), task)
        return Update(metrics, gradients=self._kept("critic"))

    def actor_esnr(self, obs: Tensor, samples: int, *, task: Tensor | None = None) -> Metrics:
        """Signal-to-noise ratio of the actor's gradient over ``samples`` micro-batches of ``obs``.

        Args:
            obs: ``[B, O]``; the first ``B // samples * samples`` rows are used.
            samples: M, from 2 to B.
            task: as in :meth:`act`.
        """
        result = ops.esnr(self.actor_gradients(obs, samples, task=task))
        metrics = {"esnr": result.ratio, "esnr_db": result.db}
        for (name, _), ratio in zip(
            self.actor.named_parameters(), result.tensor_ratio, strict=True
        ):
            metrics[f"esnr_by_layer/{name}"] = ratio
        return metrics

    def actor_gradients(
        self,
        obs: Tensor,
        samples: int,
        horizon: int | None = None,
        *,
        task: Tensor | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """First-order gradients of the actor's loss, one of each of ``samples`` micro-batches.

        Args:
            obs: ``[B, O]``; the first ``B // samples * samples`` rows are used.
            samples: M, from 1 to B.
            horizon: imagined steps; None is ``config.horizon``.
            task: as in :meth:`act`.

        Returns:
            M tuples in the order of ``actor.parameters()``.
        """
        size = obs.shape[0] // samples
        params = list(self.actor.parameters())
        grads = []
        what = f"the actor's gradients on {samples} times {size} rollouts"
        with (
            memory.explained(what, "alg.actor.batch_size", self.device),
            extend.precision(self.precision),
            self.keeping(),
            frozen(self.world_model, self.critic),
        ):
            for i in range(samples):
                rows = slice(i * size, (i + 1) * size)
                numbers = self.task_numbers((size,), None if task is None else task[rows])
                loss = self._actor_loss(self._imagine(obs[rows], numbers, horizon).returns)
                grads.append(torch.autograd.grad(loss, params))
        return grads

    def set_progress(self, fraction: float) -> dict[str, float]:
        """Decay all learning rates linearly; ``fraction`` in [0, 1] is the part of the run done."""
        rates = {}
        for name, optimizer in self.optimizers.items():
            start, end = optimizer.initial_lr, self.config.final_lr
            rates[f"lr_{name}"] = end + (start - end) * (1.0 - fraction) if start > end else start
            optimizer.set_lr(rates[f"lr_{name}"])
        return rates

    def skipped_updates(self) -> Metrics:
        """Skipped updates so far, in all and in a row at the moment (the worst optimiser's)."""
        total = torch.stack([o.skipped for o in self.optimizers.values()]).sum()
        row = torch.stack([o.skipped_in_a_row for o in self.optimizers.values()]).amax()
        return {"skipped_updates": total, "skipped_in_a_row": row}

    def normalizer_metrics(self) -> Metrics:
        """``obs_rms_*``, ``reward_rms_*`` and ``return_rms_*``: the running statistics in scalars.

        Of those alone that ``alg.normalize_*`` uses; :meth:`RunningMeanStd.summary` has the names.
        """
        used = {
            "obs_rms": (self.obs_rms, self.config.normalize_obs),
            "reward_rms": (self.reward_rms, self.config.normalize_rewards),
            "return_rms": (self.return_rms, self.config.normalize_returns),
        }
        return {
            f"{name}_{key}": value
            for name, (statistics, is_used) in used.items()
            if is_used
            for key, value in statistics.summary().items()
        }

    def fall_back(self) -> str | None:
        """Take a precision with a wider range, if GEMMs ran in fp16; its name, else None.

        It is ``bf16``, or ``exact`` where some operation has no 16-bit form and ran without.
        Skips in a row are counted anew.
        """
        if "fast" not in self._used:
            return None
        self.set_precision("bf16" if self._used == {"fast"} else "exact")
        for optimizer in self.optimizers.values():
            optimizer.skipped_in_a_row.zero_()
        return self.precision

    def set_precision(self, precision: str) -> None:
        """Compute in another precision from now on; graphs are recorded anew."""
        self.precision = precision
        self._used.clear()
        for update in self._updates.values():
            update.forget()

    def gradients(self) -> Metrics:
        """Clipped gradients of the last updates, of optimisers whose ``keep_gradients`` is set."""
        return {
            f"{key}.{name}": p.grad
            for key, module in self._modules().items()
            for name, p in module.named_parameters()
            if p.grad is not None
        }

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Parameters, statistics, optimisers; under published PWM files' keys where these exist."""
        state: dict[str, Any] = {k: m.state_dict() for k, m in self._modules().items()}
        for name, optimizer in self.optimizers.items():
            state[OPTIMIZER_KEYS[name]] = optimizer.state_dict()
        return state

    def load_state_dict(
        self, state: dict[str, Any], *, optimizers: bool = True, policy: bool = True
    ) -> None:
        """Continue from :meth:`state_dict`.

        Without ``policy`` the world model and the statistics that it learned with are taken alone.

        The measured noise of ``start_noise=auto`` begins anew where the state has none, or one of
        other windows: an epoch's measurement makes up for it.

        Raises:
            ValueError: parameters are missing, unknown, of other shapes or not finite, or an
                optimiser's state is not of these parameters; nothing was changed.
        """
        modules = self._modules()
        if not policy:
            modules = {k: modules[k] for k in ("world_model", "obs_rms", "rew_rms")}
        spread = modules.pop("start_spread", None)
        if spread is not None and fits(spread, state.get("start_spread")):
            modules["start_spread"] = spread
        check(state, modules, self.optimizers if optimizers else {})
        for key, module in modules.items():
            module.load_state_dict(state[key])
        if spread is not None and "start_spread" not in modules:
            for value in spread.buffers():
                value.zero_()
        if optimizers:
            for name, optimizer in self.optimizers.items():
                optimizer.load_state_dict(state[OPTIMIZER_KEYS[name]])
        for update in self._updates.values():
            update.forget()  # the moments are other tensors now

    # --- parts ----------------------------------------------------------------------------------

    def task_numbers(self, shape: tuple[int, ...], task: Tensor | None = None) -> Tensor | None:
        """Task numbers as the networks take them.

        Args:
            shape: of the rows that they are of.
            task: int64, the numbers; None where the model knows one task at most.

        Returns:
            Those that were given; zeros of ``shape`` in a model of one task; None in one without
            task embeddings.

        Raises:
            ValueError: there are several tasks, and none is given.
        """
        model = self.config.world_model
        if model.task_dim == 0:
            return None
        if task is not None:
            return task.to(self.device)
        if model.num_tasks > 1:
            raise ValueError(f"task must be the numbers of {model.num_tasks} tasks, got None")
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def normalized(self, obs: Tensor, task: Tensor | None) -> Tensor:
        """Observations ``[..., O]`` of :meth:`task_numbers` as the model takes them."""
        if not self.config.normalize_obs:
            return obs
        return self.obs_rms.normalize(obs, self.config.obs_clip, group=self._group(task))

    @torch.no_grad()
    def _std(self, z: Tensor, task: Tensor | None) -> Tensor:
        """How much the policy's actions vary in latents ``[B, D]``, before the tanh."""
        return self.actor.spread(z, self.world_model.task_input(task, z))

    def _acted(self, z: Tensor, task: Tensor | None, noise: Tensor | None = None) -> Tensor:
        """The policy's actions ``[B, A]`` in latents ``[B, D]``; deterministic without noise."""
        return self.actor(z, noise, self.world_model.task_input(task, z), self._mask(task))

    def _value(self, z: Tensor, task: Tensor | None) -> Tensor:
        """The least of the members' values ``[..., B]`` of latents ``[..., B, D]``.

        Of Q functions, those of the policy's deterministic action.
        """
        embedding = self.world_model.task_input(task, z)
        a = self._acted(z, task) if self.config.critic.kind == "tdmpc2" else None
        return self.critic.minimum(z, a, embedding)

    def _mask(self, task: Tensor | None) -> Tensor | None:
        """Which action components tasks read, ``[B, A]`` or of all ``[A]``; None for all."""
        if self.action_mask is None or self.action_mask.dim() == 1 or task is None:
            return self.action_mask
        return self.action_mask[task]

    def _gamma(self, task: Tensor | None) -> float | Tensor:
        """The discount, or those ``[B]`` of the tasks of rows."""
        if self.config.discounts is None or self.discounts is None:
            return self.config.gamma
        return self.config.discounts[0] if task is None else self.discounts[task]

    def encode(self, obs: Tensor, task: Tensor | None) -> Tensor:
        """Latents ``[..., D]`` of observations ``[..., O]`` of :meth:`task_numbers`."""
        return self.world_model.encode(self.normalized(obs, task), task)

    def _prepared(self, windows: Windows) -> Windows:
        """Windows as the world model learns from them: normalised, and cut to its lengths."""
        obs, action, reward, end, task = windows
        if self.config.normalize_rewards:
            reward = self.reward_rms.normalize(
                reward, self.config.reward_clip, centre=self.config.centre_rewards
            )
        task = self.task_numbers((action.shape[1],), task)
        steps = self.config.model_learning.rollout_steps
        obs = self.normalized(obs, task)
        obs, action, reward, end = pieces(steps, obs, action, reward, end)
        return Windows(obs, action, reward, end, self._of_pieces(task, action))

    def _of_pieces(self, task: Tensor | None, action: Tensor) -> Tensor | None:
        """Task numbers of windows' pieces, which stay side by side."""
        if task is None:
            return None
        return task.repeat_interleave(action.shape[1] // max(1, task.shape[0]))

    def _group(self, task: Tensor | None) -> Tensor | None:
        """The groups of running statistics that rows of such tasks are of."""
        return task if self.config.world_model.num_tasks > 1 else None

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.action_dim, device=self.device)

    def _values(self) -> ops.ValueEnsemble:
        """The critics as a plan takes them: the least value, in the rewards' units."""
        scale = self.config.gamma**self.config.value_delay / self.config.value_scale
        return self.critic.ensemble(scale=scale)

    def _imagine(
        self, obs: Tensor, task: Tensor | None = None, horizon: int | None = None
    ) -> _Imagined:
        steps = self.config.imagined_steps if horizon is None else horizon
        noise = self._noise(steps, obs.shape[0])
        z = self.encode(obs, task)
        mask = self._mask(task)
        rollout = imagine(
            self.world_model,
            self.actor,
            z,
            noise,
            detach=self.config.actor.detach,
            task=task,
            action_mask=mask,
            symlog_rewards=self.config.symlog_rewards,
        )
        reward, entropy = rollout.reward, None
        if self.config.actor.entropy_coef:
            seen = rollout.z[:-1].detach() if self.config.actor.detach else rollout.z[:-1]
            embedding = self.world_model.task_input(task, seen)
            bonus = self.actor.entropy(rollout.action, noise, seen, embedding, mask)
            entropy = bonus.detach().mean()
            reward = reward + self.config.actor.entropy_coef * bonus
        rollout = rollout._replace(reward=reward * self.config.value_scale)
        value = self._value(rollout.z[-1], task)
        if self.config.value_delay:
            value = value * self.config.gamma**self.config.value_delay
        returns = extend.discounted_return(
            rollout.reward, value, self._gamma(task), rollout.continues
        )
        return _Imagined(rollout, returns, entropy)

    def _actor_loss(self, returns: Tensor) -> Tensor:
        loss = -returns.mean()
        if not self.config.normalize_returns:
            return loss
        return loss / self.return_rms.scale(dtype=loss.dtype)

    def _update_critic(self, rollout: ImaginedRollout, task: Tensor | None = None) -> Metrics:
        config = self.config.critic
        with torch.no_grad():
            z = rollout.z.detach()
            continues = rollout.continues
            targets = ops.td_lambda(
                rollout.reward.detach(),
                self._value(z, task),
                gamma=self._gamma(task),
                lam=config.lam,
                continues=None if continues is None else continues.detach(),
            ).flatten()
            states = z[:-1]
            if self.critic.task_dim:
                embedding = self.world_model.task_input(task, states)
                assert embedding is not None
                states = torch.cat((states, embedding), -1)
            states = states.flatten(0, 1)
        size = -(-states.shape[0] // config.minibatches)
        steps: dict[int, extend.RegressionStep | None] = {}  # by rows: the last may have fewer
        losses, norms = [], []
        for _ in range(config.passes):
            rows, wanted = states, targets
            if config.shuffle:
                order = torch.randperm(states.shape[0], device=self.device)
                # All minibatches at once, whose rows then are views.
                rows, wanted = states[order], targets[order]
            for state, target in zip(rows.split(size), wanted.split(size), strict=True):
                if len(state) not in steps:
                    steps[len(state)] = extend.regression(self.critic.layers(), state)
                loss, norm = self._critic_step(state, target, steps[len(state)])
                losses.append(loss)
                norms.append(norm)
        if not losses:
            return {}
        return {
            "value_loss": torch.stack(losses).mean(),
            "critic_grad_norm": torch.stack(norms).mean(),
        }

    def _critic_step(
        self, states: Tensor, targets: Tensor, step: extend.RegressionStep | None
    ) -> tuple[Tensor, Tensor]:
        """One step on the mean squared error, by ``step`` or through autograd.

        Returns:
            The loss, and the norm of its gradient.
        """
        optimizer = self.optimizers["critic"]
        if step is not None:
            loss, grads = step(states, targets)
            return loss, optimizer.apply(loss, grads)
        values = ops.mlp((states,), self.critic.layers(), order="act_norm").squeeze(-1)
        with torch.no_grad():  # the loss's own gradient is written out: 4 launches, not 9
            error = values - targets
            loss = error.square().mean()
            gradient = error * (2.0 / error.numel())
        return loss, optimizer.apply(
            loss, torch.autograd.grad(values, optimizer.params, gradient, allow_unused=True)
        )


def _optimizer(
    net: nn.Module, learning: ModelLearningConfig | ActorConfig | CriticConfig, **slow: Any
) -> GuardedAdam:
    """The optimiser of a network with that part of the configuration."""
    return GuardedAdam(net.parameters(), learning.lr, learning.betas, learning.grad_norm, **slow)
