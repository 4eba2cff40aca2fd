"""Comparing runs: reading them, grouping them over seeds, statistics, figures and the page.

``python -m pwm_fast.compare`` is the command; it needs the run directories alone.
"""
