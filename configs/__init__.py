"""Hydra configuration of the trainer, installed as ``pwm_fast.configs``."""
