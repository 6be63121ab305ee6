"""The loss: what ``accelerator.backward`` gets is what the optimizer's next step sees.

A learned optimizer needs the training loss, and neither Trainer nor Accelerate gives an optimizer anything but
gradients. ``Accelerator.backward`` is the one place where every loop of both hands over the scalar as the user
defined it, before it is divided by the accumulation steps or scaled for float16; no hook, plugin or subclass reaches
it, because Trainer builds its Accelerator itself. So methods are wrapped, on the class, once: ``Accelerator.backward``
to record its argument for the optimizers whose gradients it changes (:mod:`hf_lopt.feed`), ``Accelerator.accumulate``
to tell micro-batches apart, and ``AcceleratedOptimizer.step`` and ``zero_grad`` to end a window of accumulation. And
what a learned optimizer has beside the methods of torch is reached through an ``AcceleratedOptimizer`` around it.
``step`` also tells after how many steps the loader that the loop is in begins anew.

For a plain loop the value is the loss. With ``accumulate()`` it is the mean over the micro-batches of the window, also
of a short last one; in a loop that has ``gradient_accumulation_steps`` but not ``accumulate()``, the sum divided by
them, as the gradients are. Losses that a loop divides itself add up; where it divides by one number throughout, a
short last window has the mean over its calls (:class:`hf_lopt.pending.Window`). ``observe_loss`` and ``step(loss)``
have precedence over all of this.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.optim import Optimizer

from hf_lopt.feed import deliver, parts_of, unwrap
from hf_lopt.hf import limits
from hf_lopt.hf.epochs import batches_in, steps_per_epoch
from hf_lopt.hf.run_end import wrap_end_training
from hf_lopt.hf.wrapping import wrap_once
from hf_lopt.optimizer import LearnedOptimizer


_micro_batches: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of each accelerator, entries of accumulate()
_scaled_by_trainer: WeakSet[LearnedOptimizer] = WeakSet()


def set_trainer(optimizer: LearnedOptimizer, driven: bool) -> None:
    """Say whether a Trainer drives ``optimizer``: it divides by the accumulation steps itself, so losses add up."""
    (_scaled_by_trainer.add if driven else _scaled_by_trainer.discard)(optimizer)


def forget(optimizer: LearnedOptimizer) -> None:
    """Drop the losses of an unfinished window."""
    optimizer.discard_loss()


def wrap_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Accelerator.backward`` that also gives its argument to the learned optimizers whose gradients it changes."""

    @functools.wraps(original)
    def backward(self: Any, loss: Any, **kwargs: Any) -> Any:
        optimizers = [optimizer for optimizer in map(unwrap, self._optimizers) if optimizer is not None]
        if not optimizers:
            return original(self, loss, **kwargs)
        for optimizer in optimizers:
            limits.check_accelerator_state(optimizer.rule.class_name, self.state)
        # The argument as it came is the undivided loss. What the graph tells has to be read before it is freed.
        parts, steps = parts_of(loss), self.gradient_accumulation_steps
        micro_batch = (_micro_batches.get(self, 0), self.step)
        accumulates = steps > 1 and micro_batch != (0, 0)

        def feed(optimizer: LearnedOptimizer, afresh: bool) -> None:
            if optimizer in _scaled_by_trainer:
                optimizer._pending.feed(loss, afresh=afresh)
            elif accumulates:
                optimizer._pending.feed(loss, afresh=afresh, micro_batch=micro_batch)
            else:
                optimizer._pending.feed(loss, afresh=afresh, steps=steps, parts=parts)

        models = self._models if getattr(self, "is_fsdp2", False) else ()
        return deliver(optimizers, lambda: original(self, loss, **kwargs), feed, tensors=[loss], modules=models)

    return backward


def wrap_accumulate(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Accelerator.accumulate`` that counts: what lies between two calls is one micro-batch."""

    @functools.wraps(original)
    def accumulate(self: Any, *models: Any) -> Any:
        _micro_batches[self] = _micro_batches.get(self, 0) + 1
        return original(self, *models)

    return accumulate


def _steps_per_epoch(state: Any) -> float:
    """Of the loader that the loop is in; 0.0 where it is in none, or one that does not know its length."""
    loader = state.active_dataloader
    # Of an epoch that a resumed loop is in the middle of, the batches that it has left out.
    left_out = getattr(getattr(loader, "batch_sampler", None), "skip_batches", 0)
    return steps_per_epoch(batches_in(loader) + left_out, state.num_steps)


def wrap_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AcceleratedOptimizer.step`` that ends the learned optimizer's window together with Accelerate's."""

    @functools.wraps(original)
    def step(self: Any, closure: Any = None, **loss: Any) -> Any:
        optimizer = unwrap(self)
        if optimizer is not None:
            optimizer._run_state.observe_epoch(lambda: _steps_per_epoch(self.gradient_state))
        if optimizer is not None and set(loss) == {"loss"} and closure is None:
            closure, loss = loss["loss"], {}
        if loss:  # as without this wrapper
            raise TypeError(f"step() got an unexpected keyword argument {next(iter(loss))!r}")
        if optimizer is None or not self.gradient_state.sync_gradients:
            return original(self, closure)
        try:
            return original(self, closure)
        finally:
            # A float16 step that the scaler skipped never reached the optimizer; its loss must not leak into the next.
            forget(optimizer)

    return step


def wrap_zero_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    """``AcceleratedOptimizer.zero_grad`` that forgets losses together with the gradients they made.

    The learned optimizer does so itself, unless another wrapper between the two clears the gradients without it.
    """

    @functools.wraps(original)
    def zero_grad(self: Any, set_to_none: bool | None = None) -> Any:
        optimizer = unwrap(self)
        if optimizer is not None and self.gradient_state.sync_gradients:
            optimizer._pending.discard(by_zero_grad=True)
        return original(self, set_to_none)

    return zero_grad


class _OfTheOptimizer:
    """An attribute of a wrapper that is the learned optimizer's; of wrappers of other optimizers, an ordinary one."""

    def __init__(self, name: str):
        self._name = name

    def __get__(self, wrapper: Any, cls: type | None = None) -> Any:
        learned = None if wrapper is None else unwrap(wrapper.__dict__.get("optimizer"))
        if learned is not None:
            return getattr(learned, self._name)
        if wrapper is not None and self._name in wrapper.__dict__:
            return wrapper.__dict__[self._name]
        owner = cls if wrapper is None else type(wrapper)
        raise AttributeError(f"{getattr(owner, '__name__', owner)!r} object has no attribute {self._name!r}")

    def __set__(self, wrapper: Any, value: Any) -> None:
        learned = unwrap(wrapper.__dict__.get("optimizer"))
        if learned is None:
            wrapper.__dict__[self._name] = value
        else:
            setattr(learned, self._name, value)


def patch_accelerator(module: Any) -> None:
    """Wrap methods of ``Accelerator`` of the imported module ``accelerate.accelerator``, once."""
    wrap_once(module.Accelerator, "backward", wrap_backward)
    wrap_once(module.Accelerator, "accumulate", wrap_accumulate)
    wrap_once(module.Accelerator, "end_training", wrap_end_training)


def patch_optimizer(module: Any) -> None:
    """Wrap ``AcceleratedOptimizer.step`` and ``zero_grad`` of the imported module ``accelerate.optimizer``, once.

    The other public attributes of learned optimizers, such as ``observe_loss`` and ``num_training_steps``, get there.
    """
    cls = module.AcceleratedOptimizer
    wrap_once(cls, "step", wrap_step)
    wrap_once(cls, "zero_grad", wrap_zero_grad)
    ours = LearnedOptimizer.__mro__[: LearnedOptimizer.__mro__.index(Optimizer)]
    for name in itertools.chain.from_iterable(map(vars, ours)):
        if not name.startswith("_") and not any(name in vars(base) for base in cls.__mro__):
            setattr(cls, name, _OfTheOptimizer(name))
