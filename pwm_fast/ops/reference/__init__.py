"""The operations in plain PyTorch: the truth that every other backend is tested against.

Differentiable any number of times, for any floating dtype and device, without input checks: the
functions of :mod:`pwm_fast.ops` check, document and then call these.
"""
