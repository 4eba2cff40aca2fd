"""Tasks on mujoco-warp: N envs whose whole control step is one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from pwm_fast.envs import _checks
from pwm_fast.envs._buffers import contacts_and_rows
from pwm_fast.envs._device import Packed, Watch
from pwm_fast.envs._divergence import BEYOND, MAX_COORDINATE
from pwm_fast.envs._robots import RobotBatch
from pwm_fast.envs.engines import import_warp, why_unusable
from pwm_fast.envs.tasks.base import Task
from pwm_fast.recording import recording

_WARM_UP = 2  # eager steps before the capture: they compile and load every kernel


class MujocoWarpEnv(RobotBatch):
    """N envs of one task on a GPU; implements :class:`pwm_fast.envs.protocol.VectorEnv`.

    On CUDA the step, from the actions to the observations after the resets, is captured once and
    replayed: the host never waits for it. Physics is in float32, and its sums have no fixed order:
    repetitions differ in the last bits (``torch.use_deterministic_algorithms`` turns mujoco-warp's
    deterministic mode on, which is experimental there). On the CPU the same code runs eagerly, to
    the bit, and is slow.

    An env whose physics diverges (a non-finite coordinate, or one beyond 1e6) terminates, as in
    the native engine; so does, on CUDA, one whose action is not finite. ``info["diverged"]`` marks
    both. Such envs, and contacts that were dropped for want of room, are counted on the device; a
    warning says so once, on CUDA some steps later.

    Args:
        task: the robot and its task; its functions must not wait for the device.
        num_envs: N, at least 1.
        seed: of the reset states, in [0, 2^63).
        max_episode_steps: time limit; the task's own by default.
        device: a CUDA device, or the CPU.
        graph: replay a CUDA graph; False steps eagerly, which waits for the device.
        max_contacts: room for contacts, N times this many; what the model can have by default.
        max_rows: room for constraint rows of each env; what the model can have by default.

    Raises:
        ImportError: mujoco-warp is missing or cannot run on this device.
        ValueError: a number out of range.
    """

    _engine, _number_bytes = "mujoco_warp", 4

    @torch.inference_mode(False)  # its buffers are written to in any mode
    def __init__(
        self,
        task: Task,
        num_envs: int,
        *,
        seed: int = 0,
        max_episode_steps: int | None = None,
        device: torch.device | str = "cuda",
        graph: bool = True,
        max_contacts: int | None = None,
        max_rows: int | None = None,
    ) -> None:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        reason = why_unusable(device)
        if reason is not None:
            raise ImportError(f"the physics engine mujoco_warp cannot run: {reason}")
        self._wp = import_warp()  # before mujoco_warp imports it
        import mujoco_warp

        self._mjw = mujoco_warp
        super().__init__(task, num_envs, max_episode_steps, device, seed)

        self._cuda_stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            # Everything eager runs on this stream, and the capture: Warp must know the very object.
            self._cuda_stream = torch.cuda.Stream(device)
            self._warp_stream = self._wp.stream_from_torch(self._cuda_stream)
        self._make_physics(max_contacts, max_rows)

        self._action = torch.zeros(num_envs, task.action_dim, device=device)
        # Ever diverged [N], ever got an action that is not finite [N]; and their sums, with the
        # largest of the overflow masks.
        self._diverged = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._unusable = torch.zeros(num_envs, dtype=torch.bool, device=device)
        self._counters = torch.zeros(3, dtype=torch.int64, device=device)
        self._watch = Watch(self._counters)
        self._told: set[str] = set()

        n, o = num_envs, task.obs_dim
        self._has_goal = task.goal(self._obs) is not None
        self._outputs = Packed(
            {
                "obs": ((n, o), torch.float32),
                "final_obs": ((n, o), torch.float32),
                "reward": ((n,), torch.float32),
                "return": ((n,), torch.float32),
                "length": ((n,), torch.int64),
                "terminated": ((n,), torch.bool),
                "truncated": ((n,), torch.bool),
                "done": ((n,), torch.bool),
                "diverged": ((n,), torch.bool),
                "goal": ((n,), torch.bool),
            },
            device,
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warp_graph: Any = None
        self._memory: torch.cuda.MemPool | None = None  # of the graph
        self._closed = False
        self.reset()
        if device.type == "cuda" and graph:
            self._capture()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Advance all envs by one control step; see the protocol for what comes back."""
        if self._closed:
            raise RuntimeError("this environment was closed")
        if self.device.type == "cpu":
            action = _checks.unit_action(action, self.num_envs, self.task.action_dim)
        else:
            _checks.action_shape(action, self.num_envs, self.task.action_dim)
        self._action.copy_(action.detach())
        if self._graph is not None:
            self._graph.replay()
        else:
            with self._on_stream():
                self._control_step()
        self._tell(self._watch.poll())

        out = self._outputs.snapshot()
        info: dict[str, Any] = {
            "final_obs": out["final_obs"],
            "episode": {"return": out["return"], "length": out["length"], "mask": out["done"]},
            "diverged": out["diverged"],
        }
        if self._has_goal:
            info["goal"] = out["goal"]
        return out["obs"], out["reward"], out["terminated"], out["truncated"], info

    def close(self) -> None:
        """Wait for the device, say what is left to say, and release the graph."""
        if not self._closed:
            self._closed = True
            self._tell(self._watch.now())
            self._graph = self._warp_graph = self._memory = None

    # --- the step, all of it work of the device -------------------------------------------------

    def _control_step(self) -> None:
        """From the buffer of actions to those of outputs, as the native engine does it."""
        # Random numbers come first: what torch has to know of a capture, Warp's loops would hide.
        start = self._sample_reset()
        unusable = ~torch.isfinite(self._action).all(-1)
        action = torch.nan_to_num(self._action, 0.0, 0.0, 0.0).clamp(-1.0, 1.0)
        reward = self.task.reward(self._obs, action)
        self._ctrl.copy_(action)
        self._advance()
        self._steps += 1
        self._returns += reward

        final_obs = self._observe()
        size = torch.maximum(self._qpos.abs().amax(-1), self._qvel.abs().amax(-1))
        # NaN compares false, so "not below" catches it too.
        diverged = ~(size < MAX_COORDINATE)
        lost = diverged | unusable
        terminated = self.task.terminated(final_obs) | lost
        final_obs = torch.where(lost.unsqueeze(-1), self._obs, final_obs)
        truncated = self._steps >= self.max_episode_steps
        done = terminated | truncated

        out = self._outputs.parts
        out["final_obs"].copy_(final_obs)
        out["reward"].copy_(reward)
        out["return"].copy_(self._returns)
        out["length"].copy_(self._steps)
        out["terminated"].copy_(terminated)
        out["truncated"].copy_(truncated)
        out["done"].copy_(done)
        out["diverged"].copy_(lost)
        goal = self.task.goal(final_obs)
        if goal is not None:
            out["goal"].copy_(goal)
        self._count(diverged, unusable)
        self._restart(done, *start)
        self._obs.copy_(torch.where(done.unsqueeze(-1), self._observe(), final_obs))
        out["obs"].copy_(self._obs)

    def _advance(self) -> None:
        """The physics of one control step."""
        with self._warp_scope():
            for _ in range(self.task.substeps):
                self._mjw.step(self._model, self._data)

    def _count(self, diverged: Tensor, unusable: Tensor) -> None:
        self._diverged |= diverged
        self._unusable |= unusable
        overflow = (self._overflow & self._room).amax().long()
        counts = torch.stack((self._diverged.sum(), self._unusable.sum(), overflow))
        self._counters.copy_(counts)

    # --- around it ------------------------------------------------------------------------------

    def _make_physics(self, max_contacts: int | None, max_rows: int | None) -> None:
        """Model and envs on the device, and torch's views of what the step reads and writes."""
        import mujoco

        model = self._compiled
        # mujoco-warp never resets an env by itself, and does not know the flag that forbids it.
        model.opt.disableflags &= ~int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        contacts, rows = contacts_and_rows(model)
        contacts = contacts if max_contacts is None else max_contacts
        rows = rows if max_rows is None else max_rows
        with self._on_stream(), self._warp_scope():
            self._model = self._mjw.put_model(model)
            self._model.opt.warn_overflow = 0  # it would print from the device; we count
            self._model.opt.deterministic = torch.are_deterministic_algorithms_enabled()
            # At least one row: without, its solver leaves every acceleration at zero (4.0).
            self._data = self._mjw.make_data(
                model, nworld=self.num_envs, nconmax=contacts, njmax=max(rows, 1)
            )
        if self._cuda_stream is not None:
            torch.cuda.synchronize(self.device)
        self._qpos, self._qvel, self._ctrl, self._warmstart, self._time, self._overflow = (
            self._wp.to_torch(getattr(self._data, name))
            for name in ("qpos", "qvel", "ctrl", "qacc_warmstart", "time", "overflow")
        )
        kinds = self._mjw.OverflowType
        # Not the limits of the solver's iterations, of which the native engine says nothing either.
        self._room = int(kinds.ALL & ~(kinds.ITERATIONS | kinds.LS_ITERATIONS))

    def _physics(self) -> tuple[Tensor, ...]:
        return (self._qpos, self._qvel, self._ctrl, self._warmstart, self._time.unsqueeze(-1))

    def _warp_scope(self) -> AbstractContextManager[Any]:
        """Where Warp works inside: this environment's device and stream."""
        scope: AbstractContextManager[Any]
        if self._cuda_stream is None:
            scope = self._wp.ScopedDevice("cpu")
        else:  # without the synchronisation that Warp would add: torch is on that stream already
            scope = self._wp.ScopedStream(self._warp_stream, sync_enter=False)
        return scope

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Run eager work on the one stream of this environment."""
        if self._cuda_stream is None:
            yield
            return
        caller = torch.cuda.current_stream(self.device)
        self._cuda_stream.wait_stream(caller)
        with torch.cuda.stream(self._cuda_stream):
            yield
        caller.wait_stream(self._cuda_stream)

    def _capture(self) -> None:
        """Record the control step as a CUDA graph; the envs are left as they were."""
        assert self._cuda_stream is not None
        before = self.get_state()
        with self._on_stream():
            for _ in range(_WARM_UP):
                self._control_step()
        torch.cuda.synchronize(self.device)

        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.device(self.device):
            self._memory = torch.cuda.MemPool()
        with (
            recording(graph, self._cuda_stream, without="env.engine=mujoco"),
            # A loop of Warp's ends the capture and begins another on the same graph. Torch would
            # not know that one for its own, and give what is made after the loop memory that
            # anybody may have between replays.
            torch.cuda.use_mem_pool(self._memory, self.device),
        ):
            # Else the solver's loop would wait for the device, not become part of the graph.
            self._wp.capture_begin(stream=self._warp_stream, external=True)
            try:
                self._control_step()
            finally:
                # Warp's record of the capture keeps its kernels loaded.
                self._warp_graph = self._wp.capture_end(stream=self._warp_stream)
        self._graph = graph
        self.set_state(before)
        for buffer in (self._diverged, self._unusable, self._counters, self._overflow):
            buffer.zero_()
        torch.cuda.synchronize(self.device)

    def _tell(self, counters: list[int]) -> None:
        """Warn, once each, of what the counters say."""
        diverged, unusable, overflow = counters
        envs = f"of {self.num_envs} envs"
        if diverged:
            self.divergence = BEYOND
            self._warn(
                "diverged",
                f"the physics of {self.task.name} diverged in {diverged} {envs} ({BEYOND}); they "
                "were restarted (said once)",
            )
        if unusable:
            self.divergence = self.divergence or "the action is not finite"
            self._warn(
                "unusable",
                f"{unusable} {envs} of {self.task.name} got an action that is not finite; they "
                "were restarted (said once)",
            )
        if overflow:
            kinds = self._mjw.OverflowType
            named = [k.name for k in kinds if k and k != kinds.ALL and overflow & k]
            self._warn(
                "overflow",
                f"mujoco-warp's buffers overflowed ({', '.join(named)}): contacts of "
                f"{self.task.name} were dropped, its physics is wrong; make MujocoWarpEnv with "
                "larger max_contacts and max_rows (said once)",
            )

    def _warn(self, key: str, text: str) -> None:
        if key not in self._told:
            self._told.add(key)
            warnings.warn(text, RuntimeWarning, stacklevel=4)
