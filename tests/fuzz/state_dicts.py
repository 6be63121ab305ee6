"""State dicts that were changed, taken from another optimizer, or damaged: loaded soundly, or refused untouched."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from hf_lopt import LearnedOptimizer, rules

from .outcomes import DAMAGED, REFUSED, SAME, WRONG_ERROR, Result
from .small_optimizers import (
    SQUARES,
    everything,
    give_gradients,
    groups_of,
    parameters,
    quiet_step,
    settings,
    tensors,
    unsound,
)


State = dict[str, Any]
# Changes a state dict in place. True: it may not be loaded; False: it may; None: nothing was there to change.
Change = Callable[[Random, State], bool | None]
_ODD = (None, "x", "", [], {}, (), float("nan"), float("inf"), -1, -1.0, 1e400, True, 1j, 10**400, b"1", torch.nan)
_ODD += (torch.tensor(float("nan")), torch.tensor(-1.0), torch.ones(2), torch.tensor([]), object)


def run(random: Random, folder: Path) -> Result:
    """Load one state dict into an optimizer."""
    seed, name = random.randrange(1 << 32), random.choice(sorted(rules.names()))
    params, source = _optimizer(Random(seed), name)
    for _ in range(random.choice((0, 1, 1, 2))):
        give_gradients(random, params)
        quiet_step(source, 1.0)
    saved: State = copy.deepcopy(source.state_dict())
    if random.random() < 0.3:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    into, target = _optimizer(Random(seed), name)
    if random.random() < 0.5:
        give_gradients(random, into)
        quiet_step(target, 1.0)

    what, forbidden, extreme = "unchanged", False, False
    changes = random.choice((0, 1, 1, 1, 1, 2, 3))
    for _ in range(changes):
        key = random.choice(sorted(CHANGES))
        try:
            verdict = CHANGES[key](random, saved)
        except (
            KeyError,
            TypeError,
            IndexError,
            AttributeError,
            ValueError,
            RuntimeError,
        ):  # an earlier change left nothing to change here
            verdict = None
        if verdict is not None:
            # A second change may have taken away what the first one put there.
            what, forbidden = key, verdict and changes == 1
            extreme = extreme or key == "tensor, extreme"
    return _load(random, saved, into, target, what, forbidden, extreme, tensors(params, source))


def _load(
    random: Random,
    saved: State,
    params: list[Any],
    optimizer: LearnedOptimizer,
    what: str,
    forbidden: bool,
    extreme: bool,
    wanted: dict[str, Tensor],
) -> Result:
    before = everything(params, optimizer)
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        if everything(params, optimizer) != before:
            return Result(DAMAGED, what, f"refused, and changed: {error}")
        return Result(WRONG_ERROR if what == "unchanged" else REFUSED, what, str(error))
    except Exception as error:  # another kind than the documented one
        changed = ", and changed" if everything(params, optimizer) != before else ""
        return Result(WRONG_ERROR, what, f"{type(error).__name__}{changed}: {error}")
    if forbidden:
        return Result(DAMAGED, what, "was loaded")
    found = tensors(params, optimizer)
    if problem := unsound(found):
        return Result(DAMAGED, what, f"loaded, but {problem}")
    if what == "unchanged":
        other = [k for k in wanted if not k.startswith("parameter ") and not torch.equal(wanted[k], found[k])]
        if other:
            return Result(DAMAGED, what, f"{', '.join(other)} are not those that were saved")
    try:
        for _ in range(2):
            give_gradients(random, params)
            quiet_step(optimizer, 1.0)
    except Exception as error:  # what was loaded does not go on
        if "steps in a row" in str(error):  # numbers so large that every step is skipped, and says so
            return Result(SAME, what)
        return Result(DAMAGED, what, f"loaded, then {type(error).__name__}: {error}")
    # A momentum of 3e38, which no step makes, overflows a float16 parameter; the steps that follow are skipped.
    problem = "" if extreme else unsound(tensors(params, optimizer))
    return Result(DAMAGED, what, f"loaded, after two steps {problem}") if problem else Result(SAME, what)


def _optimizer(random: Random, name: str) -> tuple[list[Any], LearnedOptimizer]:
    """The same for the same random numbers."""
    params = parameters(random, random.choice((1, 2, 3)))
    return params, LearnedOptimizer(groups_of(random, params), name, **settings(random, name))


# --- tensors of the state


def _tensor(change: Callable[[Random, str, Tensor], Any], must: bool = True) -> Change:
    """Puts what ``change`` makes of one tensor in its place; None from it changes nothing."""

    def apply(random: Random, saved: State) -> bool | None:
        states = [(i, key) for i, state in saved["state"].items() for key, x in state.items() if isinstance(x, Tensor)]
        i, key = random.choice(states)
        changed = change(random, key, saved["state"][i][key])
        if changed is None:
            return None
        saved["state"][i][key] = changed
        return must

    return apply


def _shape(random: Random, key: str, x: Tensor) -> Tensor | None:
    shapes = [(), (0,), (1,), (x.numel(),), (*x.shape, 1), (1, *x.shape), (*x.shape[::-1],), (*x.shape[:-1], 1)]
    shape = random.choice([*shapes, (2 * x.numel() + 1,), (1 << 20,)])
    return None if shape == tuple(x.shape) else torch.zeros(shape, dtype=x.dtype)


def _dtype(random: Random, key: str, x: Tensor) -> Tensor:
    others = [torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool, torch.complex64]
    return x.to(random.choice(others))


def _not_finite(random: Random, key: str, x: Tensor) -> Tensor | None:
    if not x.numel() or key == "gradient_sum":  # see `small_optimizers.unsound`
        return None
    x = x.clone(memory_format=torch.contiguous_format)
    values = torch.nan, torch.inf, -torch.inf, -torch.nan
    for _ in range(random.choice((1, 1, 2, x.numel()))):
        x.view(-1)[random.randrange(x.numel())] = random.choice(values)
    return x


def _negative(random: Random, key: str, x: Tensor) -> Tensor | None:
    if key not in SQUARES or not x.numel():
        return None
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[random.randrange(x.numel())] = random.choice((-1.0, -1e-30, -1e-45, -3e38))
    return x


def _extreme(random: Random, key: str, x: Tensor) -> Tensor:
    """Finite numbers whose sum or whose squares no float holds."""
    return torch.full_like(x, random.choice((3e38, 1e20, 1e-45, 1e-38)))


def _layout(random: Random, key: str, x: Tensor) -> Tensor | None:
    """The same numbers otherwise in memory."""
    if x.dim() < 2:
        return torch.stack([x, x], -1).select(-1, 0)
    return random.choice(
        (
            lambda: x.mT.contiguous().mT,
            lambda: torch.cat([x, x], -1).narrow(-1, 0, x.shape[-1]),
            lambda: x.flip(0).flip(0)[:],
            lambda: x.clone().requires_grad_(),
        )
    )()


def _expanded(random: Random, key: str, x: Tensor) -> Tensor | None:
    return torch.full((1,) * x.dim(), 0.25).expand(x.shape) if x.numel() > 1 else None


def _kind(random: Random, key: str, x: Tensor) -> Any:
    """What is no tensor with numbers in memory."""
    return random.choice(
        (
            lambda: torch.empty_like(x, device="meta"),
            lambda: x.to_sparse() if x.dim() else None,
            lambda: x.tolist(),
            lambda: x.numpy().copy(),
            lambda: None,
            lambda: "x",
            lambda: {"a": x},
            lambda: x.new_zeros(x.shape, dtype=torch.int64),
        )
    )()


def _alias(random: Random, saved: State) -> bool | None:
    """One tensor in two places, which both write to."""
    places: dict[Any, list[tuple[Any, str]]] = {}
    for i, state in saved["state"].items():
        for key, x in state.items():
            if isinstance(x, Tensor) and x.numel():
                places.setdefault(x.shape, []).append((i, key))
    (i, key), (j, other) = random.choice([random.sample(x, 2) for x in places.values() if len(x) > 1])
    saved["state"][i][key] = saved["state"][j][other]
    return False


# --- keys


def _state_key(random: Random, saved: State) -> bool | None:
    i = random.choice(list(saved["state"]))
    state = saved["state"][i]
    required = sorted(key for key in state if not key.startswith("gradient"))
    kind = random.randrange(6)
    if kind == 0:
        del state[random.choice(required)]
    elif kind == 1:
        state[random.choice(("exp_avg", "step", "", 7))] = torch.zeros(())
    elif kind == 2:
        key = random.choice(required)
        state[f"{key} "] = state.pop(key)
    elif kind == 3:
        saved["state"][i] = random.choice((None, [], "x", 1, torch.zeros(2), {"momentum": torch.zeros(2)}))
    elif kind == 4:
        saved["state"][random.choice((77, "0", None, -1, (1,)))] = state
    else:
        a, b = random.choice(list(saved["state"])), i
        saved["state"][a], saved["state"][b] = saved["state"][b], saved["state"][a]
        return False if a != b else None
    return True


def _parameter_ids(random: Random, saved: State) -> bool | None:
    group = random.choice(saved["param_groups"])
    ids = list(group["params"])
    kind = random.randrange(7)
    if kind == 0:
        group["params"] = ids[:-1]
    elif kind == 1:
        group["params"] = [*ids, 99]
    elif kind == 2:
        random.shuffle(ids)
        changed = ids != group["params"]
        group["params"] = ids
        return False if changed else None
    elif kind == 3:
        group["params"] = random.choice((None, 1, "x", {}, [None] * len(ids), [[0]] * len(ids), [{}] * len(ids)))
    elif kind == 4:
        del group["params"]
    elif kind == 5:
        group["params"] = [ids[0]] * len(ids)
        return False if len(ids) > 1 else None
    else:
        group["params"] = ids + ids
    return True


def _groups(random: Random, saved: State) -> bool | None:
    groups = saved["param_groups"]
    kind = random.randrange(6)
    if kind == 0:
        groups.pop()
    elif kind == 1:
        groups.append(copy.deepcopy(random.choice(groups)))
    elif kind == 2:
        groups.reverse()
        return False if len(groups) > 1 else None
    elif kind == 3:
        saved["param_groups"] = random.choice((None, {}, "x", 1, [None], [1], ["x"], [[]] * len(groups)))
    elif kind == 4:
        groups[random.randrange(len(groups))] = random.choice((None, [], 1, "x", {}))
    else:
        group = random.choice(groups)
        own = [key for key in group if key not in ("params", "weights_source", "weights_origin")]
        del group[random.choice(own)]
        return False
    return True


def _top(random: Random, saved: State) -> bool | None:
    kind = random.randrange(4)
    if kind == 0:
        del saved[random.choice(("state", "param_groups"))]
    elif kind == 1:
        saved["state"] = random.choice((None, [], "x", 1, torch.zeros(1)))
    elif kind == 2:
        saved["more"] = random.choice(_ODD)
        return False
    else:
        if not saved["state"]:
            return None
        saved["state"] = {}
        return False
    return True


def _foreign(random: Random, saved: State) -> bool | None:
    """The state dict of another optimizer."""
    params = parameters(random, random.choice((1, 2, 3)), torch.float32)
    give_gradients(random, params)
    kinds: list[Callable[[], torch.optim.Optimizer]] = [
        lambda: torch.optim.AdamW(params),
        lambda: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        lambda: torch.optim.RMSprop(params, centered=True),
    ]
    other = random.choice(kinds)()
    if random.random() < 0.8:
        other.step()
    saved.clear()
    saved.update(other.state_dict())
    return True


def _other_rule(random: Random, saved: State) -> bool | None:
    name = random.choice(sorted(rules.names()))
    params, other = _optimizer(random, name)
    give_gradients(random, params)
    quiet_step(other, 1.0)
    same = saved["param_groups"][0]["rule"] == name
    saved.clear()
    saved.update(copy.deepcopy(other.state_dict()))
    return not same


# --- settings and counters


def _setting(random: Random, saved: State) -> bool | None:
    group = random.choice(saved["param_groups"])
    key = random.choice([key for key in sorted(group) if key not in ("params", "weights_source", "weights_origin")])
    group[key] = random.choice(_ODD)
    return False  # whether it fits is asked of what was loaded


def _one_group_only(random: Random, saved: State) -> bool | None:
    """A value of the run that is not the same in all groups."""
    groups = saved["param_groups"]
    if len(groups) < 2:
        return None
    group = random.choice(groups)
    group["step"] = group["step"] + random.choice((1, 5, 1000))
    return False


CHANGES: dict[str, Change] = {
    "tensor, shape": _tensor(_shape),
    "tensor, dtype": _tensor(_dtype),
    "tensor, not finite": _tensor(_not_finite),
    "tensor, negative": _tensor(_negative),
    "tensor, extreme": _tensor(_extreme, must=False),
    "tensor, layout": _tensor(_layout, must=False),
    "tensor, expanded": _tensor(_expanded, must=False),
    "tensor, kind": _tensor(_kind),
    "tensor, twice": _alias,
    "state, key": _state_key,
    "parameter ids": _parameter_ids,
    "groups": _groups,
    "top": _top,
    "foreign": _foreign,
    "other rule": _other_rule,
    "setting": _setting,
    "counter of one group": _one_group_only,
}
