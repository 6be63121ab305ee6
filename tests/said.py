"""What a user is told: warnings, and the texts of the log that short warnings refer to."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from hf_lopt import notices


class _Keep(logging.Handler):
    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self.texts = texts

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """A list that fills, when the context ends, with the texts of warnings and, as they come, those of the log."""
    texts: list[str] = []
    handler, level = _Keep(texts), notices.LOG.level
    notices.LOG.addHandler(handler)
    notices.LOG.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield texts
    finally:
        notices.LOG.removeHandler(handler)
        notices.LOG.setLevel(level)
        texts += [str(w.message) for w in caught]
