"""World models, policy and critics, with the parameter names of the published models."""

from pwm_fast.models.actor import Actor, FlowActor, GaussianActor, TDMPC2Actor, make_actor
from pwm_fast.models.critic import (
    Critic,
    CriticEnsemble,
    QEnsemble,
    ValueFunctions,
    make_critic,
)
from pwm_fast.models.flow_dynamics import FlowWorldModel
from pwm_fast.models.layers import MLP, NormedLinear, mlp
from pwm_fast.models.mlp_dynamics import WorldModel
from pwm_fast.models.residual_dynamics import ResidualWorldModel
from pwm_fast.models.shortcut_dynamics import ShortcutWorldModel
from pwm_fast.models.world_model import LatentModel, make_world_model, register

__all__ = [
    "MLP",
    "Actor",
    "Critic",
    "CriticEnsemble",
    "FlowActor",
    "FlowWorldModel",
    "GaussianActor",
    "LatentModel",
    "NormedLinear",
    "QEnsemble",
    "ResidualWorldModel",
    "ShortcutWorldModel",
    "TDMPC2Actor",
    "ValueFunctions",
    "WorldModel",
    "make_actor",
    "make_critic",
    "make_world_model",
    "mlp",
    "register",
]
