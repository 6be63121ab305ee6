"""What a user is told: warnings that point at the user's own line, and one short one for all that a first run brings.

What is only good to know (which weights were found, what was chosen, that there are no kernels) waits until a run
begins and then is one warning of at most :data:`LIMIT` characters. Every text goes in full, and at once, to the
logger ``hf_lopt``, level INFO; ``python -m hf_lopt`` tells what the installation has to do with it.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import warnings
from collections.abc import Iterator
from types import FrameType


LOG = logging.getLogger("hf_lopt")
LIMIT = 200
_END = " (more: python -m hf_lopt; log 'hf_lopt')"
# Who calls us on behalf of a user's line.
_LIBRARIES = frozenset(
    "hf_lopt hf_lopt_autoload torch transformers accelerate trl peft sentence_transformers lightning "
    "pytorch_lightning ignite skorch contextlib functools importlib runpy".split()
)
_waiting: list[str] = []


class _Collecting(threading.local):
    depth = 0


_collecting = _Collecting()


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """``warnings.warn`` that names the innermost line outside of this package and the libraries that drive it."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _LIBRARIES and not _is_program(frame):
            break
        frame, level = frame.f_back, level + 1
    else:  # nothing but libraries: whoever called this
        level = 3
    warnings.warn(text, category, stacklevel=level)


def _is_program(frame: FrameType) -> bool:
    """Whether a frame is of a program of this package, such as ``python -m hf_lopt.meta``, whose module is a main."""
    spec = frame.f_globals.get("__spec__")
    return spec is not None and str(spec.name).partition(".")[0] in _LIBRARIES


def note(short: str, full: str = "") -> None:
    """Something good to know: ``short`` waits for :func:`tell`, and ``full`` is logged now."""
    LOG.info(full or short)
    if short not in _waiting:
        _waiting.append(short)


def tell(*more: str) -> bool:
    """One warning about ``more`` and all that waits, the first things first; what is too long for it is in the log.

    Returns:
        Whether there was anything to tell.
    """
    parts = [*more, *_waiting]
    _waiting.clear()
    text = ""
    for part in parts:
        longer = f"{text}; {part}" if text else f"hf_lopt: {part}"
        if len(longer) + len(_END) <= LIMIT:
            text = longer
    if parts:
        warn((text or f"hf_lopt: {parts[0]}"[: LIMIT - len(_END) - 1] + "…") + _END)
    return bool(parts)


def discard() -> None:
    """Forget what waits: another process tells it, or the log is enough."""
    _waiting.clear()


@contextlib.contextmanager
def collecting() -> Iterator[None]:
    """A context, of this thread, in which :func:`is_collecting` is true: a run is being set up and will tell."""
    _collecting.depth += 1
    try:
        yield
    finally:
        _collecting.depth -= 1


def is_collecting() -> bool:
    """Whether a run that is being set up will tell what waits."""
    return _collecting.depth > 0
