"""Checkpoints of published codes, as this package's configuration and parameters.

PWM (https://github.com/imgeorgiev/PWM), Flow-MBPO-PWM
(https://github.com/thedannyliu/Flow-MBPO-PWM) and TD-MPC2 (https://github.com/nicklashansen/tdmpc2).
``docs/checkpoints.md`` says what is converted, and how.
"""

from pwm_fast.published.loading import load_published
from pwm_fast.published.reading import FAMILIES, PublishedError, recognise
from pwm_fast.published.result import Published, preset
from pwm_fast.published.tasks import of_tasks, task_numbers
from pwm_fast.published.tdmpc2 import discount

__all__ = [
    "FAMILIES",
    "Published",
    "PublishedError",
    "discount",
    "load_published",
    "of_tasks",
    "preset",
    "recognise",
    "task_numbers",
]
