"""What people study of a world model: prediction error, smoothness, simplex drift, gradients.

Each function takes plain callables and tensors, so that it works on any model;
``python -m pwm_fast.diagnose`` runs them on checkpoints. ``docs/diagnostics.md`` defines each
quantity and its unit.
"""

from pwm_fast.diagnostics.gradients import gradient_esnr
from pwm_fast.diagnostics.prediction import prediction_errors
from pwm_fast.diagnostics.simplex import simplex_drift
from pwm_fast.diagnostics.smoothness import jacobian_smoothness
from pwm_fast.diagnostics.view import ModelView, view_of
from pwm_fast.diagnostics.windows import HeldOut, draw_windows

__all__ = [
    "HeldOut",
    "ModelView",
    "draw_windows",
    "gradient_esnr",
    "jacobian_smoothness",
    "prediction_errors",
    "simplex_drift",
    "view_of",
]
