"""The learning algorithm, and planning with what it learnt."""

from pwm_fast.agent.planning import Planner
from pwm_fast.agent.pwm import PWM

__all__ = ["PWM", "Planner"]
