"""Measurements; run them as modules from the root of the repository, for example ``python -m benchmarks.step``."""
