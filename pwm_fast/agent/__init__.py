"""The learning algorithm, planning with what it learnt, and its model for other planners."""

from pwm_fast.agent.cost_model import CostModel
from pwm_fast.agent.planning import Planner
from pwm_fast.agent.pwm import PWM

__all__ = ["PWM", "CostModel", "Planner"]
