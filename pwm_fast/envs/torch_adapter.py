"""Batched torch environments, as those of mjlab and Isaac Lab, behind the protocol."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pwm_fast import seeding
from pwm_fast.envs import _answers, _checks, _factory, _rendering, _spaces
from pwm_fast.envs._batch import EnvBatch
from pwm_fast.envs._divergence import MAX_VALUE
from pwm_fast.envs._generators import Generators
from pwm_fast.envs.protocol import CannotRender, EnvironmentFault, StateNotSupported

FinalObs = Literal["auto", "reset", "extras", "previous"]

GROUPS = ("policy", "actor")  # what Isaac Lab and mjlab call the observations of a policy

_wrapped: weakref.WeakValueDictionary[int, TorchVectorEnv] = weakref.WeakValueDictionary()


class TorchVectorEnv(EnvBatch):
    """A batch of envs that steps torch tensors on its device; implements the protocol.

    For ``ManagerBasedRlEnv`` of mjlab, ``ManagerBasedRLEnv`` and ``DirectRLEnv`` of Isaac Lab and
    whatever has their interface: ``step(action [N, A])`` returns observations (a tensor, or a dict
    of groups), ``reward [N]``, ``terminated [N]``, ``truncated [N]`` and ``extras``;
    ``reset(seed=...)`` returns observations and extras, and may take ``env_ids``. With
    ``cfg.is_finite_horizon`` the end by time is a terminal state, as these libraries have it.

    Nothing is copied to the host. A step waits for the device once, and once more where an episode
    ended, as those libraries' own steps do. Their seeds are those of the process's global
    generators (``random``, NumPy's, torch's); inside their calls these are in a state of their own,
    so that neither side's random numbers depend on the other's.

    An env whose observation or reward is not finite, or beyond 1e10, terminates with its last sound
    observation and reward 0; so does, on a GPU, one whose action is not finite.
    ``info["diverged"]`` marks it, and a warning says so once.

    Args:
        envs: the environment, perhaps within wrappers of Gymnasium's; this environment's from here
            on.
        seed: of all that is random from here on, in [0, 2^63).
        max_episode_steps: time limit that ``envs`` already enforces; its ``max_episode_length`` by
            default.
        obs_group: which group of a dict of observations; by default the one of :data:`GROUPS`.
        action_bound: where an entry of the action space has no bounds, [-1, 1] is stretched to plus
            and minus this. Entries with bounds are stretched to them.
        final_obs: where the observation after an episode's last step is, before the reset.
            ``reset``: ``envs`` does not reset by itself, so a step returns it, and this environment
            calls ``reset(env_ids=...)``. ``extras``: in ``extras["final_obs"]``, of all N envs.
            ``previous``: nowhere; the one before that step stands in for it. ``auto`` is
            ``reset`` if ``envs.cfg.auto_reset`` is False and ``extras`` if
            ``envs.cfg.compute_final_obs`` is True.

    Raises:
        ValueError: unsupported spaces or options, no time limit, or final observations that
            ``auto`` cannot find.
        EnvironmentFault: ``envs`` raised something, or gave what is no observation.
    """

    def __init__(
        self,
        envs: Any,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        obs_group: str | None = None,
        action_bound: float = 1.0,
        final_obs: FinalObs = "auto",
    ) -> None:
        base = getattr(envs, "unwrapped", envs)
        self.name = type(base).__name__
        needed = ("num_envs", "single_action_space", "reset", "step")
        lacking = [k for k in needed if not hasattr(base, k)]
        if not lacking and "seed" not in inspect.signature(envs.reset).parameters:
            lacking = ["reset(seed=...)"]
        if lacking:
            raise ValueError(
                f"{type(envs).__name__} has no {' and no '.join(lacking)}: it must be a batched "
                "torch environment itself, without the wrappers of other learning libraries"
            )
        if id(base) in _wrapped:
            raise ValueError(
                f"this {self.name} is in use already: training and evaluation need one each"
            )
        low, high = _action_bounds(self.name, base.single_action_space, action_bound)
        cfg = getattr(base, "cfg", None)
        self._can_restart = "env_ids" in inspect.signature(base.reset).parameters
        self._final_obs = _final_obs(self.name, cfg, final_obs, self._can_restart)
        self._ends_by_time = bool(getattr(cfg, "is_finite_horizon", False))
        self._envs, self._base, self._group = envs, base, obs_group
        self._generators = Generators()
        steps = _time_limit(self.name, base, max_episode_steps)
        answer = self._reset_envs(None, seeding.env_seeds(seed, 1)[0])
        if obs_group is None and isinstance(answer, Mapping):
            self._group = _only_group(self.name, answer)
        self.num_envs = int(base.num_envs)
        obs = self._observations(answer, f"{self.name}, reset", None)
        super().__init__(
            self.num_envs, obs.shape[1], low.size, steps, can_terminate=True, device=obs.device
        )
        centre, half = torch.from_numpy(np.stack(((high + low) / 2, (high - low) / 2)))
        self._centre, self._half = centre.to(self._obs), half.to(self._obs)
        self._check_start(obs)
        self._obs.copy_(obs)
        _wrapped[id(base)] = self

    @classmethod
    def from_factory(
        cls,
        factory: str | None,
        num_envs: int,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        device: torch.device | str = "cpu",
        kwargs: dict[str, Any] | None = None,
        obs_group: str | None = None,
        action_bound: float = 1.0,
        final_obs: FinalObs = "auto",
    ) -> TorchVectorEnv:
        """Make N envs by a function of the user's.

        Args:
            factory: ``"module:function"``; called with ``num_envs``, ``seed`` (31 bits) and
                ``device`` (a string), which it must take by these names, and ``kwargs``. It returns
                the environment.
            num_envs: N.
            seed: of all that is random, in [0, 2^63).
            max_episode_steps: as of the class.
            device: the agent's.
            kwargs: the factory's own arguments.
            obs_group: as of the class.
            action_bound: as of the class.
            final_obs: as of the class.

        Raises:
            ValueError: no such function, or one with other arguments; a wrong number of envs; or as
                of the class.
            ImportError: the module cannot be imported.
            EnvironmentFault: as of the class, or the function raised something.
        """
        _checks.positive(num_envs=num_envs)
        make = _factory.named(factory, kwargs or {})
        own = {"num_envs": num_envs, "seed": seeding.env_seeds(seed, 1)[0], "device": str(device)}
        with Generators().inside():
            try:
                envs = make(**own, **(kwargs or {}))
            except Exception as error:
                _answers.blame(f"env.factory={factory} failed", error)
        made = getattr(getattr(envs, "unwrapped", envs), "num_envs", num_envs)
        if made != num_envs:
            _close(envs)
            raise ValueError(f"env.factory={factory} made {made} envs, asked for {num_envs}")
        try:
            return cls(
                envs,
                seed=seed,
                max_episode_steps=max_episode_steps,
                obs_group=obs_group,
                action_bound=action_bound,
                final_obs=final_obs,
            )
        except BaseException:
            _close(envs)
            raise

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Start new episodes in all envs, or where ``options["reset_mask"]`` ``[N]`` is True.

        Raises:
            ValueError: some of the envs, where ``envs`` can only restart all.
        """
        mask = _checks.reset_mask(options, self.num_envs)
        if bool(mask.any()):
            own = None if seed is None else seeding.env_seeds(seed, 1)[0]
            mask = mask.to(self.device)
            self._obs.copy_(self._restarted(self._obs, mask, bool(mask.all()), own))
            self._clear(mask)
        return self._obs.clone(), {}

    @torch.no_grad()
    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one control step; see the protocol for what comes back.

        Raises:
            ValueError: an action of another shape.
            ActionNotFinite: an action that is not finite, on a CPU.
            EnvironmentFault: the environment raised something, or its answer cannot be used.
        """
        if self.device.type == "cpu":
            action = _checks.unit_action(action, self.num_envs, self._half.numel())
        else:
            _checks.action_shape(action, self.num_envs, self._half.numel())
            action = action.detach().to(self._obs)
        usable = torch.isfinite(action).all(-1)
        action = torch.nan_to_num(action, 0.0, 0.0, 0.0).clamp(-1.0, 1.0)
        obs, final_obs, reward, terminated, truncated = self._advance(
            self._centre + action * self._half
        )

        done = terminated | truncated
        unsound = ~(_sound(final_obs).all(-1) & _sound(reward) & usable)
        any_done, any_unsound = torch.stack((done.any(), unsound.any())).tolist()
        if any_unsound:
            self._warn(unsound, final_obs, reward)
            final_obs = torch.where(unsound.unsqueeze(-1), self._obs, final_obs)
            reward = reward.masked_fill(unsound, 0.0)
            terminated = terminated | unsound
        if any_done or any_unsound:
            ended = terminated | truncated
            # Those that the environment did not restart by itself.
            left = ended if self._final_obs == "reset" else ended & ~done
            if self._final_obs == "reset" or (any_unsound and bool(left.any())):
                if not self._can_restart:
                    raise EnvironmentFault(
                        f"{self.name}: an env diverged ({self.divergence}) and cannot be restarted "
                        "alone, since reset takes no env_ids: let the environment end such episodes"
                    )
                obs = self._restarted(obs, left, False, None)
            else:
                self._check_start(obs)
        else:
            ended = done

        self._steps += 1
        self._returns += reward
        info = self._info(final_obs, ended, unsound)
        self._clear(ended)
        self._obs.copy_(obs)
        return obs, reward, terminated, truncated, info

    def get_state(self) -> dict[str, Any]:
        """Raise StateNotSupported: these simulators cannot be saved to the bit."""
        raise StateNotSupported(f"the state of {self.name} cannot be saved")

    def set_state(self, state: dict[str, Any]) -> None:
        """Raise StateNotSupported."""
        raise StateNotSupported(f"the state of {self.name} cannot be restored")

    def viewer(self, width: int, height: int) -> _rendering.OwnViewer:
        """What the environment's ``render()`` gives: one picture, which counts as that of env 0.

        Raises:
            CannotRender: the environment has no ``render``.
        """
        if not callable(getattr(self._envs, "render", None)):
            raise CannotRender(f"{self.name} shows no pictures: it has no render()")
        seconds = getattr(self._base, "step_dt", None) or 1.0 / _rendering.DEFAULT_RATE
        return _rendering.OwnViewer(self._picture, self.name, float(seconds), width, height)

    def _picture(self, env: int) -> Any:
        if env:
            raise CannotRender(f"its pictures are not of one env, so there is none of env {env}")
        with self._generators.inside(), torch.no_grad():
            return self._envs.render()

    def close(self) -> None:
        """Close the environment."""
        if _wrapped.pop(id(self._base), None) is not None:
            _close(self._envs)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Observations to act on, true next ones, rewards and flags, all of them copies."""
        where = f"{self.name}, step"
        with self._generators.inside():
            try:
                answer = self._envs.step(action)
            except Exception as error:
                _answers.blame(where, error)
        if not isinstance(answer, tuple) or len(answer) != 5:
            size = f" of {len(answer)}" if isinstance(answer, tuple) else ""
            raise EnvironmentFault(
                f"{where}: it must return (obs, reward, terminated, truncated, extras), got a "
                f"{type(answer).__name__}{size}"
            )
        rewards, terminated, truncated = answer[1:4]
        obs = self._observations(answer[0], where, self.device)
        reward = self._per_env(rewards, "reward", False, where).to(torch.float32, copy=True)
        ended, cut = (
            self._per_env(flags, what, True, where).clone()
            for what, flags in (("terminated", terminated), ("truncated", truncated))
        )
        if self._ends_by_time:
            ended = ended | cut
        if self._final_obs == "reset":
            final_obs = obs.clone()
        else:
            done = (ended | cut).unsqueeze(-1)
            final_obs = torch.where(done, self._last(answer[4], done, where), obs)
        return obs, final_obs, reward, ended, cut

    def _last(self, extras: Any, done: Tensor, where: str) -> Tensor:
        """Observations ``[N, O]`` before the resets, right where episodes ended."""
        if self._final_obs == "previous":
            return self._obs
        found = extras.get("final_obs") if isinstance(extras, Mapping) else None
        if found is not None:
            return self._observations(found, f"{where}, extras['final_obs']", self.device)
        if bool(done.any()):
            raise EnvironmentFault(f"{where}: an episode ended, but extras has no 'final_obs'")
        return self._obs

    def _restarted(self, obs: Tensor, mask: Tensor, everyone: bool, seed: int | None) -> Tensor:
        """``obs`` with new episodes where ``mask`` ``[N]`` is True, in all envs if ``everyone``."""
        if not everyone and not self._can_restart:
            raise ValueError(
                f"{self.name} cannot restart {int(mask.sum())} of {self.num_envs} envs: its reset "
                "takes no env_ids"
            )
        ids = None if everyone else mask.nonzero().flatten()
        answer = self._reset_envs(ids, seed)
        new = self._observations(answer, f"{self.name}, reset", self.device)
        obs = torch.where(mask.unsqueeze(-1), new, obs)
        self._check_start(obs)
        return obs

    def _reset_envs(self, ids: Tensor | None, seed: int | None) -> Any:
        """What the environment answers to a reset."""
        with self._generators.inside(), torch.no_grad():
            try:
                if ids is None:
                    answer = self._envs.reset(seed=seed)
                else:  # wrappers of Gymnasium's do not know env_ids
                    answer = self._base.reset(seed=seed, env_ids=ids)
            except Exception as error:
                _answers.blame(f"{self.name}, reset", error)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EnvironmentFault(
                f"{self.name}, reset: it must return (obs, extras), got {type(answer).__name__}"
            )
        return answer[0]

    def _observations(self, answer: Any, where: str, device: torch.device | None) -> Tensor:
        """A copy of the policy's observations, float32 ``[N, O]``; ``device`` None takes any."""
        obs = answer
        if self._group is not None:
            if not isinstance(answer, Mapping) or self._group not in answer:
                groups = sorted(answer) if isinstance(answer, Mapping) else _answers.shown(answer)
                raise EnvironmentFault(
                    f"{where}: observations have no group {self._group!r}, got {groups}"
                )
            obs = answer[self._group]
        if isinstance(obs, Mapping):
            raise EnvironmentFault(
                f"{where}: the observations {self._group or ''} are a dict of terms "
                f"{sorted(obs)}; the environment must concatenate them (concatenate_terms=True)"
            )
        good = (
            isinstance(obs, Tensor)
            and obs.dim() == 2
            and obs.shape[0] == self.num_envs
            and obs.shape[1] > 0
            and (device is None or tuple(obs.shape) == tuple(self._obs.shape))
            and not (obs.is_complex() or obs.dtype == torch.bool)
        )
        if not good:
            width = "O" if device is None else self._obs.shape[1]
            raise EnvironmentFault(
                f"{where}: observations must be numbers [{self.num_envs}, {width}], got "
                f"{_shown(obs)}"
            )
        self._check_device(obs, "observations", where, device)
        return obs.detach().to(torch.float32, copy=True)

    def _per_env(self, x: Any, what: str, flags: bool, where: str) -> Tensor:
        """A tensor ``[N]`` of flags or of numbers, the environment's own."""
        good = (
            isinstance(x, Tensor)
            and tuple(x.shape) == (self.num_envs,)
            and (x.dtype == torch.bool) == flags
            and not x.is_complex()
        )
        if not good:
            kind = "bool" if flags else "numbers"
            raise EnvironmentFault(
                f"{where}: {what} must be {kind} [{self.num_envs}], got {_shown(x)}"
            )
        self._check_device(x, what, where, self.device)
        found: Tensor = x.detach()
        return found

    def _check_device(self, x: Tensor, what: str, where: str, device: torch.device | None) -> None:
        if device is not None and x.device != device:
            raise EnvironmentFault(
                f"{where}: {what} must be on {device}, as at the start, got {x.device}"
            )

    def _check_start(self, obs: Tensor) -> None:
        """Raise EnvironmentFault where an episode starts with an observation that is not sound."""
        good = _sound(obs)
        if bool(good.all()):
            return
        env = int((~good.all(-1)).nonzero()[0])
        values, fine = obs[env].cpu().numpy(), good[env].cpu().numpy()
        raise EnvironmentFault(
            f"{self.name}, env {env}: an episode must start with finite numbers below 1e10, "
            f"{_answers.first_unsound(values, fine)} of the observation"
        )

    def _warn(self, unsound: Tensor, obs: Tensor, reward: Tensor) -> None:
        if self.divergence is not None:
            return
        env = int(unsound.nonzero()[0])
        values, fine = obs[env].cpu().numpy(), _sound(obs[env]).cpu().numpy()
        if not bool(_sound(reward[env])):
            reason = f"the reward is {float(reward[env]):g}"
        elif not fine.all():
            reason = f"{_answers.first_unsound(values, fine)} of the observation"
        else:
            reason = "the action is not finite"
        self.divergence = f"{self._when(env)}: {reason}"
        warnings.warn(
            f"{self.name}: {int(unsound.sum())} of {self.num_envs} envs diverged "
            f"({self.divergence}); they were restarted (said once)",
            RuntimeWarning,
            stacklevel=3,
        )


def _sound(x: Tensor) -> Tensor:
    """Where numbers are finite and below :data:`MAX_VALUE` in size."""
    return x.abs() < MAX_VALUE  # NaN compares false


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"a tensor {tuple(x.shape)} of {x.dtype}"
    return _answers.shown(x)


def _close(envs: Any) -> None:
    if hasattr(envs, "close"):
        envs.close()


def _only_group(name: str, obs: Mapping[str, Any]) -> str:
    found = [group for group in GROUPS if group in obs]
    if len(found) != 1:
        raise ValueError(
            f"{name}: give obs_group, which of the groups of observations {sorted(obs)} the policy "
            "sees"
        )
    return found[0]


def _action_bounds(name: str, space: Any, bound: float) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest actions ``[A]``; entries without bounds get ``bound``."""
    if not 0.0 < bound < _spaces.MAX_BOUND:
        raise ValueError(
            f"action_bound must be above 0 and below {_spaces.MAX_BOUND:g}, got {bound}"
        )
    shape = tuple(getattr(space, "shape", None) or ())
    if len(shape) != 1 or not hasattr(space, "low"):
        raise ValueError(f"{name}: the action space must be a Box of vectors, got {space}")
    low, high = (
        np.broadcast_to(np.asarray(b, dtype=np.float64), shape).copy()
        for b in (space.low, space.high)
    )
    free = (low == -np.inf) & (high == np.inf)
    low[free], high[free] = -bound, bound
    _spaces.check_actions(name, low, high)
    return low, high


def _final_obs(name: str, cfg: Any, asked: str, can_restart: bool) -> str:
    if asked not in get_args(FinalObs):
        raise ValueError(f"final_obs must be one of {', '.join(get_args(FinalObs))}, got {asked!r}")
    manual = getattr(cfg, "auto_reset", True) is False
    found = asked
    if asked == "auto":
        if not manual and getattr(cfg, "compute_final_obs", False) is not True:
            raise ValueError(
                f"{name} resets within a step and does not say what it saw before: make it with "
                "cfg.auto_reset=False (mjlab) or cfg.compute_final_obs=True (Isaac Lab), or give "
                "final_obs=previous, which takes the observation one step earlier"
            )
        found = "reset" if manual else "extras"
    if manual != (found == "reset"):
        has = "False" if manual else "not False"
        raise ValueError(f"final_obs={asked} does not fit {name}, whose cfg.auto_reset is {has}")
    if found == "reset" and not can_restart:
        raise ValueError(f"{name} does not restart envs by itself, and its reset takes no env_ids")
    return found


def _time_limit(name: str, base: Any, asked: int | None) -> int:
    own = getattr(base, "max_episode_length", None)
    limit = own if asked is None else asked
    if limit is None:
        raise ValueError(f"{name} has no max_episode_length: give max_episode_steps")
    limit = int(limit)
    _checks.positive(max_episode_steps=limit)
    if own is not None and limit != int(own):
        raise ValueError(
            f"max_episode_steps={limit} is not the limit of {name}, which ends episodes after "
            f"{int(own)} steps: set it where the environment is made"
        )
    return limit
