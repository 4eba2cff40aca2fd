"""Operations of flow-matching world models, for anybody's reinforcement-learning code.

All functions are differentiable, take any floating dtype and import nothing but torch::

    from pwm_fast import ops

    z_next = ops.flow_step(z, a, net, substeps=2, method="heun")   # net: a sequence of ops.Layer
"""

from pwm_fast.fused.algebra import algebra
from pwm_fast.fused.weight_cache import invalidate
from pwm_fast.ops.dynamics import Dynamics, LatentMap, LatentMLP, ResidualMLP
from pwm_fast.ops.esnr import EsnrAccumulator, RunningEsnr, esnr
from pwm_fast.ops.flow import Flow, flow_interpolate, flow_step, integrate, velocity_field
from pwm_fast.ops.flow_policy import FlowPolicy, Form
from pwm_fast.ops.imagine import imagine
from pwm_fast.ops.mlp import linear_act_norm, linear_norm_act, mlp
from pwm_fast.ops.norm_act import layer_norm_act
from pwm_fast.ops.plan import MPPI, Plan, PlanNoise, Reduction, ValueEnsemble, plan
from pwm_fast.ops.pointwise import mish, symexp, symlog
from pwm_fast.ops.returns import td_lambda
from pwm_fast.ops.rollout import latent_rollout
from pwm_fast.ops.shortcut import Consistency, Shortcut
from pwm_fast.ops.simnorm import project_simplex, simnorm
from pwm_fast.ops.two_hot import two_hot_cross_entropy, two_hot_decode, two_hot_encode
from pwm_fast.ops.types import (
    ESNR,
    Activation,
    Heads,
    ImaginedRollout,
    Layer,
    Method,
    Order,
    Policy,
)
from pwm_fast.ops.world_model_loss import Start, StartGrad, WindowLoss, world_model_loss

__all__ = [
    "ESNR",
    "MPPI",
    "Activation",
    "Consistency",
    "Dynamics",
    "EsnrAccumulator",
    "Flow",
    "FlowPolicy",
    "Form",
    "Heads",
    "ImaginedRollout",
    "LatentMLP",
    "LatentMap",
    "Layer",
    "Method",
    "Order",
    "Plan",
    "PlanNoise",
    "Policy",
    "Reduction",
    "ResidualMLP",
    "RunningEsnr",
    "Shortcut",
    "Start",
    "StartGrad",
    "ValueEnsemble",
    "WindowLoss",
    "algebra",
    "esnr",
    "flow_interpolate",
    "flow_step",
    "imagine",
    "integrate",
    "invalidate",
    "latent_rollout",
    "layer_norm_act",
    "linear_act_norm",
    "linear_norm_act",
    "mish",
    "mlp",
    "plan",
    "project_simplex",
    "simnorm",
    "symexp",
    "symlog",
    "td_lambda",
    "two_hot_cross_entropy",
    "two_hot_decode",
    "two_hot_encode",
    "velocity_field",
    "world_model_loss",
]
