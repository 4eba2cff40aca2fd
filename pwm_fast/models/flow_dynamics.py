"""Flow dynamics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pwm_fast import ops
from pwm_fast.config import ModelLearningConfig
from pwm_fast.models.layers import MLP, known_layers, mlp
from pwm_fast.models.world_model import LatentModel, register

#: Share of the windows whose flow times are drawn, for ``flow_share=auto`` (docs/results.md).
AUTO_SHARE = 0.25


@register("flow")
class FlowWorldModel(LatentModel):
    """Flow dynamics: the latent moves along a velocity field ``v(z, a, tau, task)``, tau in [0, 1].

    The head ``config.head`` is ``"linear"``, or ``"simnorm"``, which cannot represent the
    flow-matching target (``docs/simnorm_head.md``) and is kept to read published checkpoints.
    """

    def _build_transition(self, pair_dim: int) -> None:
        last = None if self.config.head == "linear" else "simnorm"
        self._velocity = mlp(
            pair_dim + 1,
            self.config.units,
            self.latent_dim,
            last=last,  # type: ignore[arg-type]
        )

    def _init_transition(self) -> None:
        if self.config.zero_velocity and self.config.head == "linear":
            nn.init.zeros_(self._last_weight(self._velocity))

    def _transition(self) -> MLP:
        return self._velocity

    def _dynamics_of(self, layers: Sequence[ops.Layer]) -> ops.Flow:
        return ops.Flow(
            layers,
            self.config.substeps,
            self.config.integrator,  # type: ignore[arg-type]
            self.config.project,
        )

    def learned_dynamics(self, learning: ModelLearningConfig) -> ops.Flow:
        """As it is learned: the integrator of updates' rollouts may differ from imagination's."""
        found = self._dynamics_of(self._transition().layers())
        return found._replace(
            substeps=learning.substeps or found.substeps,
            method=learning.integrator or found.method,  # type: ignore[arg-type]
            share=self._share(learning),
        )

    def _share(self, learning: ModelLearningConfig) -> float:
        if learning.flow_share != "auto":
            return float(learning.flow_share)
        plain = learning.start_noise == 0.0 and learning.tau_sampling == "uniform"
        return AUTO_SHARE if plain and self.config.at_zero(learning) else 1.0

    def cautions(self, learning: ModelLearningConfig) -> list[str]:
        """What to warn of where the model is trained in that way."""
        found = super().cautions(learning)
        if learning.tau_sampling == "midpoint":
            found.append(
                "alg.model_learning.tau_sampling=midpoint trains the velocity at tau = 0.5 alone, "
                "but the integrator also evaluates it elsewhere (Heun at 0 and 1): an ablation"
            )
        if learning.start_noise == "auto" and learning.flow_start == "rollout":
            found.append(
                "alg.model_learning.start_noise=auto adds the model's own error to starts that "
                "have it already (flow_start=rollout): it is meant for flow_start=teacher"
            )
        return found

    def velocity(
        self, z: Tensor, a: Tensor, tau: Tensor | float, task: Tensor | None = None
    ) -> Tensor:
        """Velocities ``[..., D]`` at latents ``[..., D]`` and flow times in [0, 1].

        Args:
            z: latents.
            a: actions ``[..., A]``.
            tau: a scalar, ``[...]`` or ``[..., 1]``.
            task: task numbers, or None.
        """
        if not isinstance(tau, Tensor):
            tau = torch.full((), tau, dtype=z.dtype, device=z.device)
        layers = known_layers(self._velocity, "norm_act", root=True)
        if layers is None:
            return self._velocity(z, a, self._column(tau, z), *self.embed(task, z))
        return ops.velocity_field(z, a, tau, layers, task=self.task_input(task, z))

    @staticmethod
    def _column(tau: Tensor | float, z: Tensor) -> Tensor:
        """Flow times as the input ``[..., 1]`` beside latents ``[..., D]``."""
        if not isinstance(tau, Tensor) or tau.dim() == 0:
            return z.new_ones((*z.shape[:-1], 1)) * tau
        return (tau if tau.dim() == z.dim() else tau.unsqueeze(-1)).to(z.dtype)

    def next(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor:
        """Next latents ``[..., D]``: the velocity field integrated from tau = 0 to 1."""
        layers = known_layers(self._velocity, "norm_act", root=True)
        if layers is None:
            return super().next(z, a, task)
        z = ops.flow_step(
            z,
            a,
            layers,
            self.config.substeps,
            self.config.integrator,  # type: ignore[arg-type]
            task=self.task_input(task, z),
        )
        return ops.project_simplex(z) if self.config.project else z
