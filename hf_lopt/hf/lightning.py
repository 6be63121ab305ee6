"""The loss in Lightning: what ``Strategy.backward`` gets is what the optimizer's next step sees.

Automatic optimization, ``manual_backward`` and ``fabric.backward`` all come to ``Strategy.backward``, of Lightning or
of Fabric. The closure that automatic optimization gives to ``optimizer.step`` returns the loss of the last micro-batch
only, divided by ``accumulate_grad_batches``; the others give no loss at all.

With ``accumulate_grad_batches`` the value is the mean over the micro-batches of the window, also of a short last one.
In manual optimization and in Fabric the losses of a window add up, divided as the loop divides them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from hf_lopt.feed import deliver, parts_of, unwrap
from hf_lopt.hf.epochs import steps_per_epoch
from hf_lopt.hf.run_end import wrap_on_train_end
from hf_lopt.hf.wrapping import wrap_once
from hf_lopt.optimizer import LearnedOptimizer


_in_fabric: WeakSet[LearnedOptimizer] = WeakSet()
_micro_batch = itertools.count(1)


def _wrap_trainer_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward(self: Any, closure_loss: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.lightning_module
        optimizers = [optimizer for optimizer in map(unwrap, self.optimizers) if optimizer is not None]
        automatic = module is not None and module.automatic_optimization
        steps = module.trainer.accumulate_grad_batches if automatic else 1
        parts, micro_batch = parts_of(closure_loss), next(_micro_batch)
        loss = closure_loss.detach() * steps
        if module is not None:
            for optimizer in optimizers:
                optimizer._run_state.observe_epoch(lambda: steps_per_epoch(module.trainer.num_training_batches, steps))

        def feed(optimizer: LearnedOptimizer, afresh: bool) -> None:
            if automatic:
                optimizer._pending.feed(loss, afresh=afresh, micro_batch=micro_batch)
            else:
                optimizer._pending.feed(loss, afresh=afresh, parts=parts)

        def run() -> Any:
            return original(self, closure_loss, *args, **kwargs)

        return deliver(optimizers, run, feed, tensors=[closure_loss], modules=[self.model])

    return backward


def _wrap_fabric_backward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def backward(self: Any, tensor: Any, module: Any, *args: Any, **kwargs: Any) -> Any:
        parts = parts_of(tensor)

        def feed(optimizer: LearnedOptimizer, afresh: bool) -> None:
            if tensor.numel() == 1:
                optimizer._pending.feed(tensor, afresh=afresh, parts=parts)

        def run() -> Any:
            return original(self, tensor, module, *args, **kwargs)

        return deliver(list(_in_fabric), run, feed, tensors=[tensor], modules=[module])

    return backward


def _wrap_fabric_optimizer(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        original(self, optimizer, *args, **kwargs)
        learned = unwrap(optimizer)
        if learned is not None:
            _in_fabric.add(learned)

    return __init__


def patch_trainer_strategy(module: Any) -> None:
    """Wrap methods of ``Strategy`` of the imported module ``lightning.pytorch.strategies.strategy``, once."""
    wrap_once(module.Strategy, "backward", _wrap_trainer_backward)
    wrap_once(module.Strategy, "on_train_end", wrap_on_train_end)


def patch_fabric_strategy(module: Any) -> None:
    """Wrap ``Strategy.backward`` of the imported module ``lightning.fabric.strategies.strategy``, once."""
    wrap_once(module.Strategy, "backward", _wrap_fabric_backward)


def patch_fabric_wrappers(module: Any) -> None:
    """Have ``_FabricOptimizer`` of the imported module ``lightning.fabric.wrappers`` say what it wraps, once."""
    wrap_once(module._FabricOptimizer, "__init__", _wrap_fabric_optimizer)


# "lightning" has both of its parts inside; each is a package of its own too.
PATCHES = tuple(
    (f"{package}.{name}", action)
    for packages, name, action in (
        (("lightning.pytorch", "pytorch_lightning"), "strategies.strategy", patch_trainer_strategy),
        (("lightning.fabric", "lightning_fabric"), "strategies.strategy", patch_fabric_strategy),
        (("lightning.fabric", "lightning_fabric"), "wrappers", patch_fabric_wrappers),
    )
    for package in packages
)
