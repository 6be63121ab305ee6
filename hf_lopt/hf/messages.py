"""Lines of ``python -m hf_lopt.launch`` for the user."""

from __future__ import annotations

import os
import sys


def say(text: str) -> None:
    """Write one line, from one process."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"hf_lopt.launch: {text}\n")
