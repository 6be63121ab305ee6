"""What is kept for as long as the same parameters are trained, and makes the lists of a step. Axes: T tensors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed
from hf_lopt.kernels.held import HeldList
from hf_lopt.step.accumulators import matrix_view, without_view
from hf_lopt.step.held import HeldTensors
from hf_lopt.step.layout import make_layout
from hf_lopt.step.tensors import StepCache, TensorList


class PreparedStep:
    """What a step needs and need not be rebuilt while the list of parameters stays the same. Derived, never saved."""

    def __init__(
        self,
        key: tuple[Hashable, ...],
        held: HeldTensors,
        rule: Any,
        theta: Mapping[str, Tensor],
    ):
        params, groups = held.params, held.groups
        devices = sorted({str(p.device) for p in params})
        if len(devices) > 1:
            raise ValueError(
                f"parameters are on several devices ({', '.join(devices)}): the scheduler couples all of them. "
                "Put the model on one device, or give each device's parameters an optimizer of its own."
            )
        self.key = key
        # From here on a step sees matrices: tensors in the shape that their axis order gives them.
        orders = [group["axis_order"] for group in groups]
        seen = [matrix_view(p, order) for p, order in zip(params, orders, strict=True)]
        self._shapes = {i: distributed.local(x).shape for i, x in enumerate(seen) if x is not params[i]}
        self.layout = make_layout(seen, [without_view(order) for order in orders], numbers=held.numbers)
        self.cache = StepCache()
        self.weights = rule.prepare({name: leaf.to(self.layout.device) for name, leaf in theta.items()}, groups[0])
        self._settings: dict[str, Tensor] = {}
        self._settings_of: dict[str, list[Any]] = {}  # the numbers in them, of each group
        # Of many tensors few are in groups of their own: the groups, the place of each parameter's group among them.
        self._given: Sequence[Mapping[str, Any]] = ()
        self._distinct: list[Mapping[str, Any]] = []
        self._places: list[int] = []
        self._places_there: Tensor | None = None
        self._lr_scales: list[float] | None = None
        self._lr_scales_there: Tensor | None = None

    def in_view(self, tensors: Sequence[Tensor], copy: bool = False) -> Sequence[Tensor]:
        """Local shards in the shapes that the step sees, in their own memory; with ``copy`` in another if need be."""
        if not self._shapes:
            return tensors
        views = list(tensors)
        for i, shape in self._shapes.items():
            views[i] = tensors[i].reshape(shape) if copy else tensors[i].view(shape)
        return views

    def settings(
        self, names: Sequence[str], groups: Sequence[Mapping[str, Any]], lr_factor: float
    ) -> dict[str, Tensor]:
        """The settings of each parameter's group by name, (T,) each, with the lr times ``lr_factor``."""
        return {name: self.setting(name, groups, lr_factor if name == "lr" else 1.0) for name in names}

    def tensors(
        self, held: HeldTensors, grads: Sequence[Tensor], names: Sequence[str], lr_factor: float
    ) -> TensorList:
        """The tensors of a step, with this rank's gradients and the settings ``names``."""
        return TensorList(
            layout=self.layout,
            cache=self.cache,
            root=self.cache,
            params=self.in_view(held.local_params),
            grads=seen if isinstance(seen := self.in_view(grads, copy=True), HeldList) else HeldList(seen),
            state=held.state,
            settings=self._scaled(self.settings(names, held.groups, lr_factor), held.lr_scales),
            labels=held.labels,
        )

    def _scaled(self, settings: dict[str, Tensor], lr_scales: list[float] | None) -> dict[str, Tensor]:
        """The settings with the lr of each parameter times its own number."""
        if lr_scales is None:
            return settings
        if self._lr_scales is not lr_scales:
            self._lr_scales, self._lr_scales_there = lr_scales, to_device(lr_scales, torch.float32, self.layout.device)
        return settings | {"lr": settings["lr"] * self._lr_scales_there}

    def setting(self, name: str, groups: Sequence[Mapping[str, Any]], factor: float = 1.0) -> Tensor:
        """Setting ``name`` of each parameter's group, times ``factor``, as a float32 tensor (T,), copied only when it
        has changed."""
        if groups is not self._given:
            self._given, self._distinct = groups, list({id(group): group for group in groups}.values())
            numbered = {id(group): i for i, group in enumerate(self._distinct)}
            places = [numbered[id(group)] for group in groups]
            if places != self._places:
                self._places, self._places_there = places, None
                self._settings_of.clear()
        # NaN: the tensor has its own, in its state.
        given = [math.nan if group[name] is None else group[name] for group in self._distinct]
        values = given if factor == 1.0 else [value * factor for value in given]
        device = self.layout.device
        self.cache.device_settings.pop(name, None)
        if any(isinstance(value, Tensor) for value in values):
            numbers = [torch.as_tensor(v, dtype=torch.float32, device=device).reshape(1) for v in values]
            joined = numbers[0] if len(numbers) == 1 else torch.cat(numbers)
            if device.type != "cpu":
                # Reading them would wait: like a gradient that is not finite they make the device skip the step.
                looked_at = joined
                if any(value is math.nan for value in values):
                    zipped = zip(numbers, values, strict=True)
                    looked_at = torch.cat([x.new_zeros(1) if value is math.nan else x for x, value in zipped])
                self.cache.device_settings[name] = looked_at.double().unsqueeze(1)
            if len(numbers) == 1:
                return joined.expand(len(groups))
            if self._places_there is None:
                self._places_there = to_device(self._places, torch.int64, device)
            return joined[self._places_there]
        if self._settings_of.get(name) != values:
            self._settings_of[name] = values
            of_all = [values[i] for i in self._places]
            if name not in self._settings:
                self._settings[name] = to_device(of_all, torch.float32, device)
            else:  # in place, where a graph that has been captured reads it
                self._settings[name].copy_(on_host(of_all, torch.float32, device), non_blocking=True)
        return self._settings[name]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which no surrounding autocast is; to enter one takes longer than to see that there is none."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext()


def on_host(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor on the host that can be copied to the device without waiting."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" else host


def to_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number, a list or a tensor on the device, without waiting for it."""
    if isinstance(values, Tensor):
        return values.to(device, dtype, non_blocking=True)
    if isinstance(values, (int, float)):
        return torch.full((), values, dtype=dtype, device=device)
    return on_host(values, dtype, device).to(device, non_blocking=True)
