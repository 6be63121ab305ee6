"""The loss: what ``accelerator.backward`` gets is what the optimizer's next step sees.

A learned optimizer needs the training loss, and neither Trainer nor Accelerate gives an optimizer anything but
gradients. ``Accelerator.backward`` is the one place where every loop of both hands over the scalar as the user
defined it, before it is divided by the accumulation steps or scaled for float16; no hook, plugin or subclass reaches
it, because Trainer builds its Accelerator itself. So three methods are wrapped, on the class, once:
``Accelerator.backward`` to record its argument, and ``AcceleratedOptimizer.step`` and ``zero_grad``, which know
whether a window of accumulation has ended, to close the window.

For a plain loop the value is the loss, with accumulation the mean over the micro-batches of the window, also of a
short last one. Losses that a loop divides itself, without telling Accelerate, add up. A loop that calls
``accelerator.backward`` must not call ``observe_loss`` as well: that would add to it. ``step(loss)`` replaces it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from hf_lopt.hf import limits
from hf_lopt.optimizer import LearnedOptimizer


_MARK = "_hf_lopt_original"


class _Window:
    """Micro-batches of one optimizer since its last step. Not saved: nor are the gradients of half a window."""

    def __init__(self) -> None:
        self.calls = 0
        self.micro_batches = 0
        self.last: int | None = None
        self.uses_accumulate = False

    def add(self, accelerator_step: int) -> None:
        """Count one ``backward``.

        ``accelerator_step`` moves once per ``accelerator.accumulate``, by which calls for the same micro-batch are
        told from calls for the next one.
        """
        self.calls += 1
        self.uses_accumulate |= accelerator_step != 0
        if accelerator_step != self.last:
            self.micro_batches += 1
        self.last = accelerator_step

    def close(self) -> None:
        self.calls, self.micro_batches, self.last = 0, 0, None

    @property
    def size(self) -> int:
        """Micro-batches in the window.

        ``accelerator.step`` stays 0 in loops that accumulate without ``accumulate()``: every call counts as one there.
        """
        return self.micro_batches if self.uses_accumulate else self.calls


_windows: WeakKeyDictionary[LearnedOptimizer, _Window] = WeakKeyDictionary()
_scaled_by_trainer: WeakSet[LearnedOptimizer] = WeakSet()


def unwrap(optimizer: Any) -> LearnedOptimizer | None:
    """The learned optimizer inside Accelerate's wrappers, None if it is another kind."""
    while optimizer is not None and not isinstance(optimizer, LearnedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer


def set_trainer(optimizer: LearnedOptimizer, driven: bool) -> None:
    """Say whether a Trainer drives ``optimizer``: it divides by the accumulation steps itself, so losses add up."""
    (_scaled_by_trainer.add if driven else _scaled_by_trainer.discard)(optimizer)


def _window(optimizer: LearnedOptimizer) -> _Window:
    return _windows.setdefault(optimizer, _Window())


def forget(optimizer: LearnedOptimizer) -> None:
    """Drop the losses of an unfinished window."""
    optimizer.discard_loss()
    _window(optimizer).close()


def _optimizers(accelerator: Any) -> list[LearnedOptimizer]:
    found = [unwrap(optimizer) for optimizer in accelerator._optimizers]
    return [optimizer for optimizer in found if optimizer is not None]


@functools.cache
def _warn_several() -> None:
    warnings.warn(
        "one Accelerator holds several learned optimizers, and each of them gets every loss given to "
        "accelerator.backward. Where a loss belongs to one of them, call zero_grad() of that optimizer right before "
        "the backward for its step.",
        stacklevel=4,
    )


def wrap_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Accelerator.backward`` that also gives its argument to the learned optimizers of the accelerator."""

    @functools.wraps(original)
    def backward(self: Any, loss: Any, **kwargs: Any) -> Any:
        optimizers = _optimizers(self)
        if len(optimizers) > 1:
            _warn_several()
        for optimizer in optimizers:
            limits.check_accelerator_state(optimizer.rule.class_name, self.state)
            # Before the call, which frees the graph; the argument as it came is the undivided loss.
            optimizer.observe_loss(loss)
            _window(optimizer).add(self.step)
        try:
            return original(self, loss, **kwargs)
        except BaseException:
            # Out of memory, and Trainer starts over with a smaller batch: this loss belongs to no step.
            for optimizer in optimizers:
                forget(optimizer)
            raise

    return backward


def wrap_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AcceleratedOptimizer.step`` that ends the learned optimizer's window together with Accelerate's."""

    @functools.wraps(original)
    def step(self: Any, closure: Any = None) -> Any:
        optimizer = unwrap(self)
        if optimizer is None or not self.gradient_state.sync_gradients:
            return original(self, closure)
        window = _window(optimizer)
        # A raw loop passes micro-batch means, which Accelerate divides by the accumulation steps: their mean is the
        # loss. Trainer passes parts that already add up to it.
        if self.gradient_state.num_steps > 1 and optimizer not in _scaled_by_trainer and window.calls:
            optimizer.scale_observed_loss(1 / window.size)
        try:
            return original(self, closure)
        finally:
            # A float16 step that the scaler skipped never reached the optimizer; its loss must not leak into the next.
            forget(optimizer)

    return step


def wrap_zero_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AcceleratedOptimizer.zero_grad`` that forgets losses together with the gradients they made."""

    @functools.wraps(original)
    def zero_grad(self: Any, set_to_none: bool | None = None) -> Any:
        optimizer = unwrap(self)
        if optimizer is not None and self.gradient_state.sync_gradients:
            forget(optimizer)
        return original(self, set_to_none)

    return zero_grad


def _wrap(cls: type, method: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    original = getattr(cls, method)
    if not hasattr(original, _MARK):
        wrapped = wrapper(original)
        setattr(wrapped, _MARK, original)
        setattr(cls, method, wrapped)


def patch_accelerator(module: Any) -> None:
    """Wrap ``Accelerator.backward`` of the imported module ``accelerate.accelerator``, once."""
    _wrap(module.Accelerator, "backward", wrap_backward)


def patch_optimizer(module: Any) -> None:
    """Wrap ``AcceleratedOptimizer.step`` and ``zero_grad`` of the imported module ``accelerate.optimizer``, once."""
    _wrap(module.AcceleratedOptimizer, "step", wrap_step)
    _wrap(module.AcceleratedOptimizer, "zero_grad", wrap_zero_grad)
