"""Whether parameters, gradients, state and settings of a step fit each other, found out before anything is changed.

Between two steps a caller may put other data into a parameter, convert the model, assign state by hand or set a
learning rate that is not a number. Passes write as they go, so a step that would fail in the middle is refused at its
beginning.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.rules.base import Rule
from hf_lopt.saved_state import wanted_state
from hf_lopt.settings import DTYPES, check_gradient, is_rate
from hf_lopt.state_formats import stored_words
from hf_lopt.step.held import HeldTensors
from hf_lopt.step.networks import Theta


Groups = Sequence[dict[str, Any]]
State = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class _Expected:
    """What was worked out for a parameter. ``labels``: words of its group, which decide about its state."""

    parameter: Tensor
    shape: torch.Size
    labels: tuple[Any, ...]
    state: dict[str, tuple[torch.Size, torch.dtype]]


class StepInputs:
    """Checks what enters a step, for as long as an optimizer lives. What a parameter needs is worked out once.

    Attributes:
        words: settings of a group that are words, such as axis_order.
        numbers: those that are numbers.
    """

    def __init__(self, rule: Rule, theta: Theta):
        self._rule, self._theta = rule, theta
        self.words = rule.words
        self.numbers = ("lr", "weight_decay", *(name for name in rule.per_group if name not in rule.words))
        self._known: dict[int, _Expected] = {}
        self._held: HeldTensors | None = None
        self._held_open: list[bool] = []  # of its groups: whether they leave min_param_scale open

    def use(self, theta: Theta) -> None:
        """Other weights from now on."""
        self._theta = theta
        self._known.clear()
        self.forget()

    def forget(self) -> None:
        """Look at everything anew in the next step."""
        self._held = None

    def __enter__(self) -> None:
        """A step begins; at its end gradients and parameters are let go of."""

    def __exit__(self, *_: object) -> None:
        if self._held is not None:
            self._held.release()

    def unchanged(self, groups: Groups, state: State) -> HeldTensors | None:
        """What the last step was taken with, if everything is as it was then; see :meth:`active`."""
        if self._held is None or not self._held.unchanged(groups, state):
            return None
        if _left_open(self._held) != self._held_open:  # their tensors may have no least size yet
            return None
        for group in self._held.own_groups:
            self._check_numbers(group)
        return self._held

    def active(self, groups: Groups, state: State) -> HeldTensors:
        """What takes part in a step, checked as in :meth:`check`: parameters with a gradient, and their state."""
        found = self.unchanged(groups, state)
        if found is None:
            trainable = ((p, group) for group in groups for p in group["params"] if p.requires_grad)
            pairs = [(p, group) for p, group in trainable if p.grad is not None and p.numel()]
            self.check(pairs, state)
            found = self._held = HeldTensors(pairs, groups, state, self.words)
            self._held_open = _left_open(found)
        return found

    def check(self, active: Sequence[tuple[Tensor, Mapping[str, Any]]], state: State) -> None:
        """Look at all parameters with a gradient, each with its group, and at their state. Waits for no device.

        A gradient that is expanded from fewer numbers gets memory of its own: rules may clip it in place.

        Raises:
            RuntimeError: for a sparse gradient; for dtypes, shapes, devices or state that do not fit.
            ValueError: for a setting of a group that the constructor would refuse.
        """
        for group in {id(group): group for _, group in active}.values():
            self._check_numbers(group)
        for p, group in active:
            check_gradient(p, self._rule.class_name)
            self._check_parameter(p, group, state[p])

    def key(self, held: HeldTensors) -> tuple[Hashable, ...]:
        """What a prepared step depends on. A parameter that is given other data stays the same object."""
        if held.key is None:
            held.key = tuple(
                (id(p), p.device, p.shape, p.dtype, *(group[word] for word in self.words)) for p, group in held.pairs
            )
        return held.key

    def _check_numbers(self, group: Mapping[str, Any]) -> None:
        for name in self.numbers:
            value = group[name]
            # A step whose settings lie on an accelerator is skipped there, see `PreparedStep.setting`.
            if value is None or (isinstance(value, Tensor) and value.device.type != "cpu"):
                continue
            if not is_rate(value):
                raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")

    def _check_parameter(self, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        # Every step comes here for every tensor: texts are made only for what is refused.
        grad, shape, device = p.grad, p.shape, p.device
        assert grad is not None
        if p.dtype not in DTYPES or grad.dtype not in DTYPES:
            self._refuse(f"{_name(p)} is {p.dtype} with a gradient of {grad.dtype}, which was not so before")
        if grad.shape != shape or grad.device != device or distributed.is_dtensor(p) != distributed.is_dtensor(grad):
            self._refuse(f"{_name(p)} on {device} has a gradient of shape {tuple(grad.shape)} on {grad.device}")
        strides = grad.stride()
        if 0 in strides and any(stride == 0 and n > 1 for stride, n in zip(strides, shape, strict=True)):
            p.grad = grad.clone(memory_format=torch.contiguous_format)
        labels = tuple(group[word] for word in self.words)
        expected = self._known.get(id(p))
        if expected is None or expected.parameter is not p or expected.shape != shape or expected.labels != labels:
            words = stored_words(p, group)
            wanted = wanted_state(self._rule, self._theta, tuple(shape), p.dtype, {**group, **words})
            expected = _Expected(p, shape, labels, {key: (x.shape, x.dtype) for key, x in wanted.items()})
            self._known[id(p)] = expected
        for key, (size, dtype) in expected.state.items():
            self._check_state(p, key, state.get(key), size, dtype, device)
        if "min_param_scale" in state:
            self._check_state(p, "min_param_scale", state["min_param_scale"], torch.Size(), torch.float32, device)
        if "gradient_sum" in state:
            self._check_state(p, "gradient_sum", state["gradient_sum"], shape, torch.float32, device)

    def _check_state(
        self, p: Tensor, key: str, value: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        if not isinstance(value, Tensor):
            self._refuse(f"{_name(p)}: its {key} is {value!r:.40}, not a tensor")
        if value.shape != shape or value.dtype != dtype or value.device != device:
            name = f"{_name(p)}: its {key}"
            got = f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"
            wanted = str(dtype).removeprefix("torch.")
            self._refuse(f"{name} is {got}, wanted {wanted} of shape {tuple(shape)} on {device}")

    def _refuse(self, problem: str) -> None:
        raise RuntimeError(
            f"{problem}. Nothing was changed. Build a new {self._rule.class_name} after changing shapes, dtypes or "
            "devices of a model, or undo the change."
        )


def _left_open(held: HeldTensors) -> list[bool]:
    return [group.get("min_param_scale", 0.0) is None for group in held.own_groups]


def _name(p: Tensor) -> str:
    return f"a parameter of shape {tuple(p.shape)}"
