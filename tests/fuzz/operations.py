"""Random sequences of what a program does with an optimizer, on compiled kernels and in plain PyTorch side by side."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from hf_lopt import LearnedOptimizer, rules
from hf_lopt.kernels import ops

from .outcomes import DAMAGED, SAME, WRONG_ERROR, Result
from .small_optimizers import groups_of, parameters, settings, tensors, unsound


# Of a sequence.
_LENGTH = 20
# Compiled kernels sum and evaluate in another order than plain ones. Relative to the largest number of a tensor, for
# parameters to the largest change as well.
_STATE_ERROR, _CHANGE_ERROR, _ROUNDINGS = 2e-4, 2e-3, 2.0
_REFUSALS = (ValueError, RuntimeError)


@dataclass
class Side:
    """An optimizer with its parameters, and where its operators run."""

    params: list[nn.Parameter]
    optimizer: LearnedOptimizer
    plain: bool

    def call(self, operation: Callable[[Side, Random], None], seed: int) -> Exception | None:
        """Does something, the same for the same seed; the error that it ended with."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            if self.plain:
                stack.enter_context(ops.plain())
            try:
                operation(self, Random(seed))
            except Exception as error:  # compared with the other side's
                return error
        return None

    def tensors(self) -> dict[str, Tensor]:
        return tensors(self.params, self.optimizer)


def run(random: Random, folder: Path) -> Result:
    """One sequence. After every operation both sides hold the same to within the kernels' tolerance, and go on from
    the same numbers."""
    seed, name = random.randrange(1 << 32), random.choice(sorted(rules.names()))
    fused, plain = _side(Random(seed), name, plain=False), _side(Random(seed), name, plain=True)
    done: list[str] = []
    for _ in range(random.randrange(1, _LENGTH + 1)):
        what = random.choice(WEIGHTED)
        done.append(what)
        before = fused.tensors()
        call = random.randrange(1 << 32)
        errors = [side.call(OPERATIONS[what], call) for side in (fused, plain)]
        story = f"{name}: {', '.join(done)}: "
        if any(error is not None and type(error) not in _REFUSALS for error in errors):
            return Result(WRONG_ERROR, what, story + repr(next(e for e in errors if type(e) not in _REFUSALS)))
        if type(errors[0]) is not type(errors[1]):
            return Result(DAMAGED, what, f"{story}fused {errors[0]!r}, plain {errors[1]!r}")
        after, other = fused.tensors(), plain.tensors()
        if problem := unsound(after) or _difference(before, after, other):
            return Result(DAMAGED, what, story + problem)
        if errors[0] is not None and (changed := _changed(_fixed(before, errors[0]), after)):
            return Result(DAMAGED, what, f"{story}{changed} changed by a call that failed: {errors[0]}")
        _copy(fused, plain)
    return Result(SAME, name)


def _side(random: Random, name: str, plain: bool) -> Side:
    params = parameters(random, random.choice((1, 2, 3, 4)))
    return Side(params, LearnedOptimizer(groups_of(random, params), name, **settings(random, name)), plain)


def _difference(before: dict[str, Tensor], after: dict[str, Tensor], other: dict[str, Tensor]) -> str:
    """What of the two sides does not agree, "" if nothing."""
    if after.keys() != other.keys():
        return f"only one side has {', '.join(sorted(after.keys() ^ other.keys()))}"
    for key, got in after.items():
        want = other[key]
        if got.shape != want.shape or got.dtype != want.dtype:
            return f"{key} is {got.dtype} {tuple(got.shape)}, plain {want.dtype} {tuple(want.shape)}"
        if not got.is_floating_point():
            if not torch.equal(got, want):
                return f"{key} is {got.tolist()}, plain {want.tolist()}"
            continue
        if not got.numel() or torch.equal(got.nan_to_num(), want.nan_to_num()):
            continue
        error = (got.double() - want.double()).abs().max()
        largest = want.double().abs().max()
        if key.startswith("parameter "):
            bound = _ROUNDINGS * torch.finfo(got.dtype).eps * largest
            if key in before and before[key].shape == want.shape:
                bound = bound + _CHANGE_ERROR * (want.double() - before[key].double()).abs().max()
        else:
            bound = _STATE_ERROR * largest + 1e-36
        if error > bound:
            return f"{key} differs by {error:.3g}, more than {bound:.3g} of {largest:.3g}"
    return ""


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> str:
    """What a refused call has changed, "" if nothing."""
    return next((key for key, x in before.items() if key not in after or not _same(x, after[key])), "")


def _fixed(before: dict[str, Tensor], error: Exception) -> dict[str, Tensor]:
    """What of ``before`` a refused call has to leave alone. It may create state.

    A step that is skipped as one too many counts as one, ends what several calls have gathered, and its loss may be
    the first of a run that goes on without its own.
    """
    if "in a row" not in str(error):
        return before
    free = ("nonfinite", "gradient_sum", "gradients_summed", "accumulated", "loss_means")
    return {key: x for key, x in before.items() if not key.startswith(free)}


def _same(x: Tensor, y: Tensor) -> bool:
    """Equal, also where both are NaN: gradients that are added up over several calls may be."""
    return torch.equal(x, y) or (x.shape == y.shape and torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True))


def _copy(source: Side, target: Side) -> None:
    """What rounding has made different becomes equal again."""
    for p, q in zip(source.params, target.params, strict=True):
        q.data.copy_(p.data)
    for p, q in zip(source.params, target.params, strict=True):
        for key, x in source.optimizer.state.get(p, {}).items():
            if isinstance(x, Tensor):
                target.optimizer.state[q][key].copy_(x)
    for ours, theirs in zip(source.optimizer.param_groups, target.optimizer.param_groups, strict=True):
        for key, x in ours.items():
            if isinstance(x, Tensor):
                theirs[key] = x.clone()


# --- operations


def _gradients(side: Side, random: Random, scale: float | None = None) -> None:
    """Gradients of odd sizes and layouts; some parameters have none."""
    generator = torch.Generator().manual_seed(random.randrange(1 << 32))
    scale = random.choice((1.0, 1.0, 1e-3, 1e-8, 1e3, 1e-20)) if scale is None else scale
    without = random.choice((0.0, 0.0, 0.3))
    for p in side.params:
        g = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        kind = random.random()
        if kind < 0.05:
            g = torch.zeros_like(g)
        elif kind < 0.1 and p.dim() >= 2:
            g = g.mT.contiguous().mT
        elif kind < 0.15 and p.dim() >= 1 and p.numel():
            g = g[:1].expand(p.shape)
        p.grad = None if random.random() < without or not p.requires_grad else g


def _loss(random: Random) -> Any:
    value = random.choice((1.0, 2.5, 0.0, -1.0, 1e-6, 1e6))
    return random.choice(
        (value, torch.tensor(value), torch.tensor([value]), torch.tensor(value, dtype=torch.bfloat16))
    )


def _step(side: Side, random: Random) -> None:
    _gradients(side, random)
    side.optimizer.step(_loss(random))


def _observed_step(side: Side, random: Random) -> None:
    _gradients(side, random)
    for _ in range(random.choice((1, 1, 2))):
        side.optimizer.observe_loss(_loss(random))
    side.optimizer.scale_observed_loss(0.5)
    side.optimizer.step()
    side.optimizer.zero_grad(set_to_none=random.random() < 0.5)


def _step_without_loss(side: Side, random: Random) -> None:
    _gradients(side, random)
    side.optimizer.step()


def _closure_step(side: Side, random: Random) -> None:
    kind = random.random()

    def closure() -> Any:
        _gradients(side, random)
        if kind < 0.2:
            raise ValueError("of the closure")
        return _loss(random)

    side.optimizer.step(closure)


def _backward_step(side: Side, random: Random) -> None:
    side.optimizer.zero_grad()
    generator = torch.Generator().manual_seed(random.randrange(1 << 32))
    loss = torch.zeros(())
    for p in side.params:
        if p.numel() and p.requires_grad:
            loss = loss + (p.float() - torch.randn(p.shape, generator=generator)).square().mean()
    if loss.requires_grad:
        loss.backward()
    side.optimizer.step(loss)


def _skipped_step(side: Side, random: Random) -> None:
    """A gradient or a loss that is not finite."""
    _gradients(side, random)
    loss, bad = 1.0, random.choice((torch.nan, torch.inf, -torch.inf))
    found = [p for p in side.params if p.grad is not None and p.numel()]
    if found and random.random() < 0.7:
        p = random.choice(found)
        p.grad = p.grad.clone(memory_format=torch.contiguous_format)
        p.grad.view(-1)[random.randrange(p.numel())] = bad
    else:
        loss = bad
    side.optimizer.step(loss)


def _huge_gradients(side: Side, random: Random) -> None:
    scale = random.choice((1e6, 1e12, 1e18, 1e20, 1e30, 3e37))
    _gradients(side, random, scale)
    side.optimizer.step(1.0)


def _dropped(side: Side, random: Random) -> None:
    """A batch that is dropped."""
    _gradients(side, random)
    side.optimizer.observe_loss(1.0)
    side.optimizer.zero_grad(set_to_none=random.random() < 0.5)


def _without_gradients(side: Side, random: Random) -> None:
    for p in side.params:
        p.grad = None
    side.optimizer.step(1.0)


def _add_group(side: Side, random: Random) -> None:
    if len(side.params) > 6:
        return
    new = parameters(random, 1, random.choice((torch.float32, torch.bfloat16)))
    group: dict[str, Any] = {"params": new}
    if random.random() < 0.3:
        group |= random.choice(({"lr": 0.5}, {"weight_decay": 0.1}, {"axis_order": "jax"}, {"lr": float("nan")}))
    side.optimizer.add_param_group(group)
    side.params += new


def _set_rate(side: Side, random: Random) -> None:
    value = random.choice((0.0, 1e-3, 0.05, 1.0, torch.tensor(0.1), float("nan"), -1.0))
    groups = side.optimizer.param_groups
    old = [(group["lr"], group["weight_decay"]) for group in groups]
    random.choice(groups)[random.choice(("lr", "lr", "weight_decay"))] = value
    try:
        _step(side, random)
    finally:  # so that the numbers that are compared are the optimizer's own
        for group, (lr, decay) in zip(groups, old, strict=True):
            group["lr"], group["weight_decay"] = lr, decay


def _convert(side: Side, random: Random) -> None:
    """Other data in a parameter: another dtype, another shape of as many elements, other strides."""
    p = random.choice(side.params)
    kind, before = random.randrange(4), p.data
    p.grad = None
    if kind == 0:
        p.data = p.data.to(random.choice((torch.float32, torch.bfloat16, torch.float16)))
        return _step(side, random)
    if kind == 1:
        p.data = p.data.double()
    elif kind == 2:
        p.data = p.data.reshape(-1, 1) if p.dim() != 2 else p.data.mT.contiguous()
    else:
        p.data = p.data.mT.contiguous().mT if p.dim() >= 2 else p.data.clone()
        return _step(side, random)
    try:
        _step(side, random)
    finally:
        p.data, p.grad = before, None


def _freeze(side: Side, random: Random) -> None:
    p = random.choice(side.params)
    p.requires_grad_(not p.requires_grad)
    p.grad = None


def _save_and_load(side: Side, random: Random) -> None:
    buffer = io.BytesIO()
    torch.save(side.optimizer.state_dict(), buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    side.optimizer.load_state_dict(saved)  # refused where a parameter has another shape since: nothing may change
    if random.random() < 0.3:
        side.optimizer.reset_state()
        side.optimizer.load_state_dict(saved)


def _load_something_else(side: Side, random: Random) -> None:
    saved = copy.deepcopy(side.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = random.choice((float("nan"), -1.0, None))
    side.optimizer.load_state_dict(saved)


def _copy_all(side: Side, random: Random) -> None:
    both = side.params, side.optimizer
    side.params, side.optimizer = copy.deepcopy(both) if random.random() < 0.5 else pickle.loads(pickle.dumps(both))


def _reset(side: Side, random: Random) -> None:
    side.optimizer.reset_state()


def _set_length(side: Side, random: Random) -> None:
    if side.optimizer.rule.needs_horizon:
        side.optimizer.num_training_steps = random.choice((2, 10, 25, 0, -3, 1.5))


def _set_steps_done(side: Side, random: Random) -> None:
    side.optimizer.steps_done = random.choice((0, 1, 7, 10_000))


def _look(side: Side, random: Random) -> None:
    """Numbers for a logger, which are finite too; but a step that was skipped may have had no multipliers."""
    skipped = int(side.optimizer.param_groups[0]["nonfinite_in_a_row"]) > 0
    for key, value in side.optimizer.metrics().items():
        if not abs(value) < float("inf") and not (skipped and key.startswith("lr_mult")):
            raise AssertionError(f"{key} is {value}")
    assert side.optimizer.steps_done >= 0 and repr(side.optimizer)


OPERATIONS: dict[str, Callable[[Side, Random], None]] = {
    "step": _step,
    "observed step": _observed_step,
    "step without loss": _step_without_loss,
    "step, closure": _closure_step,
    "step, backward": _backward_step,
    "step, skipped": _skipped_step,
    "step, huge": _huge_gradients,
    "dropped batch": _dropped,
    "step, no gradients": _without_gradients,
    "add_param_group": _add_group,
    "lr": _set_rate,
    "convert": _convert,
    "freeze": _freeze,
    "save, load": _save_and_load,
    "load, refused": _load_something_else,
    "copy": _copy_all,
    "reset_state": _reset,
    "num_training_steps": _set_length,
    "steps_done": _set_steps_done,
    "look": _look,
}
WEIGHTED = [*OPERATIONS, *["step"] * 8, *["step, backward"] * 4]
