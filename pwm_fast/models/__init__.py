"""World models, policy and critics, with the parameter names of the published models."""

from pwm_fast.models.actor import GaussianActor
from pwm_fast.models.critic import Critic, CriticEnsemble
from pwm_fast.models.flow_dynamics import FlowWorldModel
from pwm_fast.models.layers import MLP, NormedLinear, mlp
from pwm_fast.models.mlp_dynamics import WorldModel
from pwm_fast.models.residual_dynamics import ResidualWorldModel
from pwm_fast.models.shortcut_dynamics import ShortcutWorldModel
from pwm_fast.models.world_model import LatentModel, make_world_model, register

__all__ = [
    "MLP",
    "Critic",
    "CriticEnsemble",
    "FlowWorldModel",
    "GaussianActor",
    "LatentModel",
    "NormedLinear",
    "ResidualWorldModel",
    "ShortcutWorldModel",
    "WorldModel",
    "make_world_model",
    "mlp",
    "register",
]
