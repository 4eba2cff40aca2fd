"""Benchmarks: ``pytest bench --benchmark-only`` measures, ``bench.report`` and ``.track`` read.

docs/performance.md says what is measured and how.
"""
