"""What a constructor was called with: arguments that it does not take, by name and with the reason, and odd ones."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from hf_lopt import notices


_LEARNED = "what it stands for is learned and belongs to the weights"
_ALL_AT_ONCE = "every step takes all tensors at once, in compiled kernels where there are any"
# Arguments of the optimizers of torch that have no meaning here.
REFUSED = {
    "maximize": "a learned optimizer minimises, and needs the loss that it minimises: negate the loss",
    "foreach": _ALL_AT_ONCE,
    "fused": _ALL_AT_ONCE,
    "capturable": "a step never waits for the device, and can be captured in a CUDA graph as it is",
    "differentiable": "steps write in place and are not recorded by autograd",
    **dict.fromkeys(("betas", "eps", "momentum", "dampening", "nesterov", "amsgrad", "alpha"), _LEARNED),
}


class UnknownSettingError(TypeError, ValueError):
    """An argument that a class does not take: a TypeError as of any call, and a mistake in a setting."""


def unknown_settings(name: str, unknown: Iterable[str], valid: Iterable[str]) -> UnknownSettingError:
    """The error for arguments that the class ``name`` does not take, the nearest of the valid ones first."""
    unknown, valid = list(unknown), list(valid)
    near = [match for key in unknown for match in difflib.get_close_matches(key, valid, n=2, cutoff=0.6)]
    ordered = list(dict.fromkeys([*near, *valid]))
    reasons = [f"{key}: {REFUSED[key]}" for key in unknown if key in REFUSED]
    why = f" ({'; '.join(reasons)})" if reasons else ""
    meant = f"did you mean {near[0]}? " if near and not reasons else ""
    return UnknownSettingError(
        f"{name} takes no argument {', '.join(unknown)}{why}; {meant}it takes {', '.join(ordered)}"
    )


def check_call(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call of ``cls``, by name; None where its constructor is about to raise a TypeError.

    Raises:
        UnknownSettingError: for keywords that the constructor does not take.
    """
    signature = inspect.signature(cls.__init__)
    parameters = list(signature.parameters.values())[1:]
    if not any(x.kind is x.VAR_KEYWORD for x in parameters):
        valid = [x.name for x in parameters]
        if unknown := [key for key in kwargs if key not in valid]:
            raise unknown_settings(cls.__name__, unknown, [x for x in valid if x != "params"])
    try:
        given = signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:
        return None
    return dict(list(given.items())[1:])


def check_group(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a parameter group that maximises; what else it has of torch's optimizers is dropped, with a warning.

    Raises:
        UnknownSettingError: for ``maximize`` that is not False.
    """
    found = [key for key in REFUSED if group.get(key) is not None and group[key] is not False]
    if "maximize" in found:
        raise UnknownSettingError(f"{name} takes no maximize in a parameter group: {REFUSED['maximize']}")
    if found:
        notices.warn(f"{', '.join(found)} of a parameter group: dropped, {name} takes no such setting")
