"""Random inputs and their outcomes: ``python -m tests.fuzz --minutes 5``. A target is one file; see `targets`."""
