"""The learning algorithm."""

from pwm_fast.agent.pwm import PWM

__all__ = ["PWM"]
