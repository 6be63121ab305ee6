"""What can come of an input that a target made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


# Good: what was read is what was written; a clear refusal; a change that nothing recorded can tell from a choice.
SAME = "ok, same"
REFUSED = "refused"
UNRECORDED = "accepted, nothing recorded"
# Bad.
DAMAGED = "accepted, damaged"
WRONG_ERROR = "wrong error"
CRASH = "crash"
TIMEOUT = "timeout"
BAD = (DAMAGED, WRONG_ERROR, CRASH, TIMEOUT)


@dataclass(frozen=True)
class Result:
    """The outcome of one input.

    Attributes:
        outcome: one of the constants above.
        what: the kind of input, for a table of counts.
        detail: for a bad outcome, what happened.
    """

    outcome: str
    what: str
    detail: str = ""


def refusal(error: Exception, what: str, named: Any = "") -> Result:
    """A refusal, if it is of the promised kinds and names what it should."""
    if not isinstance(error, (ValueError, OSError)):
        return Result(WRONG_ERROR, what, f"{type(error).__name__}: {error}")
    if str(named) not in str(error):
        return Result(WRONG_ERROR, what, f"does not name {named}: {type(error).__name__}: {error}")
    return Result(REFUSED, what)
