"""Speed against plain versions of the same: ``python examples/benchmark/run.py``."""
