"""Whose loss is it? A backward is watched, and its loss goes to the optimizers whose gradients it has changed.

Accumulating a gradient makes ``p.grad`` another tensor or moves the version counter of the one that is there. Both can
be asked for without the device, and without a look at the graph, which in sharded or compiled models is not one of the
optimizer's parameters. :func:`deliver` is what the hooks into Accelerate and Lightning call; :func:`feed_loss` is for
loops that nobody can hook into but torch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from hf_lopt.optimizer import LearnedOptimizer


_Result = TypeVar("_Result")
_lock = threading.RLock()
_watching: set[_Watch] = set()
_feeds: list[LossFeed] = []
_installed: list[Callable[..., None]] = []  # what stands for torch.autograd.backward while there are feeds
_UNSCALED = "_hf_lopt_unscaled"  # of a scaled loss: the loss
_thread = threading.local()  # .handled: optimizers whose loss an outer deliver() of this thread delivers


def unwrap(optimizer: Any) -> LearnedOptimizer | None:
    """The learned optimizer inside the wrappers of Accelerate, Lightning and others; None if it is another kind."""
    while optimizer is not None and not isinstance(optimizer, LearnedOptimizer):
        optimizer = getattr(optimizer, "optimizer", None)
    # Lightning's wrappers are instances of the class that they wrap.
    return None if optimizer is None else optimizer._run_state.owner


# ---- which optimizers a backward concerns --------------------------------------------------------------------------


def _parameters(optimizer: LearnedOptimizer) -> Iterator[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _version(gradient: Tensor) -> tuple[Tensor, int]:
    # FSDP2 accumulates into the local part of a DTensor, whose own counter then stands still.
    return gradient, getattr(gradient, "_local_tensor", gradient)._version


def _unsharded(modules: Iterable[Any]) -> dict[int, Any]:
    """FSDP2's record of each sharded parameter, by the id of that.

    While it does not synchronise, gradients accumulate there and not in the parameter of the optimizer.
    """
    records = {}
    for root in modules:
        for module in root.modules() if isinstance(root, nn.Module) else ():
            state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
            groups = getattr(state, "_fsdp_param_groups", None)
            if groups is None:  # before torch 2.12 there was one at most
                groups = [group for group in [getattr(state, "_fsdp_param_group", None)] if group is not None]
            records |= {id(record.sharded_param): record for group in groups for record in group.fsdp_params}
    return records


class _Watch:
    """The gradients of some optimizers before a backward, to tell afterwards for which of them it was."""

    def __init__(self, optimizers: Iterable[LearnedOptimizer], tensors: Sequence[Tensor], modules: Iterable[Any]):
        self._tensors, self._records = tensors, _unsharded(modules)
        self._overlaps, self._owner = False, threading.get_ident()
        # The gradients themselves are kept: an id could be that of another tensor afterwards.
        self._before = {optimizer: self._marks(optimizer) for optimizer in optimizers}
        with _lock:
            for other in _watching:
                if other._owner != self._owner:
                    other._overlaps = self._overlaps = True
            _watching.add(self)

    def _marks(self, optimizer: LearnedOptimizer) -> list[Any]:
        """A mark of each gradient, None where there is none."""
        found = []
        for p in _parameters(optimizer):
            gradients = [p.grad]
            if self._records and id(p) in self._records:
                record = self._records[id(p)]
                whole = getattr(record, "_unsharded_param", None)
                gradients += [record.unsharded_accumulated_grad, None if whole is None else whole.grad]
            marks = [_version(gradient) for gradient in gradients if gradient is not None]
            found.append(marks or None)
        return found

    def close(self) -> None:
        with _lock:
            _watching.discard(self)

    def had_none(self, optimizer: LearnedOptimizer) -> bool:
        """Whether no parameter had a gradient before."""
        return not any(self._before[optimizer])

    def changed(self) -> list[LearnedOptimizer]:
        """The optimizers of which the backward has changed a gradient."""
        if self._overlaps:  # another thread may have changed gradients meanwhile: ask the graph
            return self._by_graph(self._before)
        found = [o for o, before in self._before.items() if _differ(before, self._marks(o))]
        # Gradients that are views of one bucket share a version counter (DDP's gradient_as_bucket_view).
        if len(found) > 1 and any(p.grad is not None and p.grad._is_view() for o in found for p in _parameters(o)):
            return self._by_graph(found) or found
        return found

    def _by_graph(self, optimizers: Iterable[LearnedOptimizer]) -> list[LearnedOptimizer]:
        leaves = _leaves(self._tensors)
        return [optimizer for optimizer in optimizers if any(id(p) in leaves for p in _parameters(optimizer))]


def _differ(before: list[Any], after: list[Any]) -> bool:
    for old, new in zip(before, after, strict=False):
        if old is None and new is None:
            continue
        if old is None or new is None or len(old) != len(new):
            return True
        if any(x is not y or i != j for (x, i), (y, j) in zip(old, new, strict=True)):
            return True
    return len(before) != len(after)


def _leaves(tensors: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that gradients of ``tensors`` accumulate in."""
    stack = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen, found = set(stack), set()
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def _handled() -> set[LearnedOptimizer]:
    return getattr(_thread, "handled", set())


@contextlib.contextmanager
def _handling(optimizers: Iterable[LearnedOptimizer]) -> Iterator[None]:
    before = _handled()
    _thread.handled = before | set(optimizers)
    try:
        yield
    finally:
        _thread.handled = before


def deliver(
    optimizers: Iterable[LearnedOptimizer],
    backward: Callable[[], _Result],
    feed: Callable[[LearnedOptimizer, bool], None],
    *,
    tensors: Sequence[Tensor] = (),
    modules: Iterable[Any] = (),
) -> _Result:
    """Run ``backward`` and call ``feed(optimizer, afresh)`` for those ``optimizers`` of which it changed a gradient.

    ``afresh`` says that the optimizer had no gradient before. A backward that fails feeds nobody.

    Args:
        optimizers: those that may be concerned.
        backward: what to run; its result is returned.
        feed: delivers the loss.
        tensors: what is propagated back.
        modules: models that FSDP2 may have sharded.
    """
    optimizers = [optimizer for optimizer in optimizers if optimizer not in _handled()]
    if not optimizers:
        return backward()
    watch = _Watch(optimizers, tensors, modules)
    try:
        with _handling(optimizers):
            result = backward()
    finally:
        watch.close()
    for optimizer in watch.changed():
        feed(optimizer, watch.had_none(optimizer))
    return result


def parts_of(loss: Any) -> int:
    """The whole number that a loop has divided ``loss`` by last, else 1. Read from the graph, before backward."""
    node = getattr(loss, "grad_fn", None)
    if node is None or node.name() != "DivBackward0":
        return 1
    divisor = node._saved_other
    # A tensor on another device would have to be waited for; a number in Python is one on the CPU.
    if divisor is None or divisor.dim() or divisor.device.type != "cpu" or divisor.requires_grad:
        return 1
    number = float(divisor)
    return int(number) if number >= 1 and number.is_integer() else 1


# ---- loops that cannot pass a loss ---------------------------------------------------------------------------------


class LossFeed:
    """What :func:`feed_loss` returns: :meth:`remove` ends it, and so does the end of a ``with`` block."""

    def __init__(self, optimizer: LearnedOptimizer, scaler: Any):
        self._optimizer, self.scaler = ref(optimizer), scaler

    @property
    def optimizer(self) -> LearnedOptimizer | None:
        """The optimizer that is fed, while it exists."""
        return self._optimizer()

    def remove(self) -> None:
        """Stop feeding. Again: nothing."""
        with _lock:
            if self in _feeds:
                _feeds.remove(self)
            # What others have put around ours stays, and ours inside of it, which does nothing without a feed.
            if not _feeds and torch.autograd.backward in _installed:
                torch.autograd.backward = torch.autograd.backward._hf_lopt_original
                _installed.clear()

    def __enter__(self) -> LossFeed:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def _watched_backward(original: Callable[..., None]) -> Callable[..., None]:
    """``torch.autograd.backward`` that feeds its scalars to the optimizers of :func:`feed_loss`."""

    @functools.wraps(original)
    def backward(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        def run() -> None:
            original(tensors, grad_tensors, *args, **kwargs)

        with _lock:
            feeds = {feed.optimizer: feed for feed in reversed(_feeds) if feed.optimizer is not None}
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors) if isinstance(tensors, Sequence) else []
        weights = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, Tensor) else list(grad_tensors)
        weights += [None] * (len(roots) - len(weights))
        scalars = [(x, w) for x, w in zip(roots, weights, strict=False) if isinstance(x, Tensor) and x.numel() == 1]
        # Checkpointing runs a backward inside a backward, of its own tensors.
        if not feeds or not scalars or torch._C._current_graph_task_id() != -1:
            return run()
        is_known = all(hasattr(x, _UNSCALED) for x, _ in scalars)  # what the scaler was given
        scalars = [(getattr(x, _UNSCALED, x), w) for x, w in scalars] if is_known else scalars
        parts = parts_of(scalars[0][0]) if len(scalars) == 1 else 1
        losses = [x.detach().float() * (1.0 if w is None else w.detach()) for x, w in scalars]
        loss = sum(x.reshape(()) for x in losses)

        def feed(optimizer: LearnedOptimizer, afresh: bool) -> None:
            scaler = None if is_known else feeds[optimizer].scaler
            value = loss if scaler is None else loss / scaler.scale(torch.ones_like(loss))
            optimizer._pending.feed(value, afresh=afresh, parts=parts)

        return deliver(feeds, run, feed, tensors=roots)

    backward._hf_lopt_original = original
    return backward


def feed_loss(optimizer: Any, scaler: Any = None) -> LossFeed:
    """Give ``optimizer`` the scalars that ``backward`` propagates back, in loops that cannot pass it a loss.

    For training loops that belong to a library and call ``loss.backward()`` and ``optimizer.step()`` themselves. Only
    a scalar whose backward changes a gradient of the optimizer is its loss, and several before a step add up, as their
    gradients do. Losses given by ``observe_loss`` or ``step(loss)`` have precedence. While one of them is active,
    ``torch.autograd.backward`` is wrapped, for all threads::

        with hf_lopt.feed_loss(optimizer):
            trainer.run(loader)

    Where FSDP2 accumulates without synchronising (``set_requires_gradient_sync(False)``) the optimizer's gradients do
    not change, and such micro-batches are not seen: use ``observe_loss`` there.

    Args:
        optimizer: a learned optimizer, or a wrapper with it as ``.optimizer``. It is held weakly.
        scaler: one of another class than ``torch.amp.GradScaler`` that scales the loss, or one whose result is
            changed before its backward; the optimizer sees the loss without the scale. Otherwise it is known.

    Returns:
        a context manager, whose ``remove()`` ends the feeding.

    Raises:
        TypeError: if there is no learned optimizer in ``optimizer``.
    """
    learned = unwrap(optimizer)
    if learned is None:
        raise TypeError(f"feed_loss needs a learned optimizer of hf_lopt, got {type(optimizer).__name__}")
    handle = LossFeed(learned, scaler)
    with _lock:
        _feeds[:] = [feed for feed in _feeds if feed.optimizer is not None]
        _feeds.append(handle)
        if not hasattr(torch.autograd.backward, "_hf_lopt_original"):
            torch.autograd.backward = _watched_backward(torch.autograd.backward)
            _installed[:] = [torch.autograd.backward]
    return handle


# ---- scalers ------------------------------------------------------------------------------------------------------


def watch_scalers() -> None:
    """Wrap methods of ``torch.amp.GradScaler``, once.

    Its ``scale`` leaves on the result what that was made of. Its ``step`` ends a window also when it skips the step of
    a learned optimizer.
    """
    original, original_scale = torch.amp.GradScaler.step, torch.amp.GradScaler.scale
    if hasattr(original, "_hf_lopt_original"):
        return

    @functools.wraps(original)
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, optimizer, *args, **kwargs)
        learned = unwrap(optimizer)
        if learned is not None:
            learned.discard_loss()
        return result

    @functools.wraps(original_scale)
    def scale(self: Any, outputs: Any) -> Any:
        result = original_scale(self, outputs)
        if _feeds and isinstance(outputs, Tensor) and result is not outputs:
            setattr(result, _UNSCALED, outputs)
        return result

    step._hf_lopt_original, scale._hf_lopt_original = original, original_scale
    torch.amp.GradScaler.step, torch.amp.GradScaler.scale = step, scale
