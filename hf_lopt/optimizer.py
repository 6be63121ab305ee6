"""The optimizer class: the only owner of state, parameter groups and checkpoints. The arithmetic is in the rules."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lopt import distributed, rules
from hf_lopt._checks import Watch, check_ranks, check_settings, positive_int
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import ZeroNan
from hf_lopt.rules.base import Rule
from hf_lopt.step.tensors import PreparedStep, TensorList, to_device
from hf_lopt.weights import Weights, push_to_hub


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Settings that identify a run: a checkpoint of another value continues something else.
_IDENTITY = ("rule", "weights_sha256")
_COUNTERS = ("step", "nonfinite_steps", "nonfinite_in_a_row")


class LearnedOptimizer(Optimizer):
    """A learned optimizer for any rule of :mod:`hf_lopt.rules`.

    State and arithmetic are float32 whatever the dtype of a parameter, and the parameter is rounded once when it is
    stored. State is created for all trainable parameters at the first step. Parameters without a gradient are left out
    of that step, as in ``torch.optim``; tensors without elements always are.

    Args:
        params: parameters or parameter groups, float32, bfloat16 or float16.
        rule: name of the rule.
        hyperparameters: the rule's own keywords; ``lr``, ``weight_decay`` and those in ``rule.per_group`` may be set
            per group.

    Raises:
        ValueError: for an empty parameter list, a keyword or value that the rule does not take, parameters of
            other dtypes, and weights that cannot be loaded.
    """

    def __init__(self, params: Any, rule: str, **hyperparameters: Any):
        rule_ = rules.get(rule)
        unknown = sorted(set(hyperparameters) - set(rule_.defaults))
        if unknown:
            raise ValueError(
                f"{rule_.class_name} takes no argument {', '.join(unknown)}; it takes {', '.join(rule_.defaults)}"
            )
        settings = dict(rule_.defaults) | hyperparameters
        if settings.get("num_training_steps") is None and rule_.needs_horizon:
            settings["num_training_steps"] = 0  # "not set", with a type that a checkpoint can hold
        elif rule_.needs_horizon:
            settings["num_training_steps"] = positive_int("num_training_steps", settings["num_training_steps"])
        spec = settings.pop("weights")
        check_settings(settings)
        weights = rule_.load_weights(spec, **settings)
        self._attach(rule_, weights)
        defaults = settings | {"rule": rule_.name, "weights_source": weights.source}
        defaults |= {"weights_sha256": weights.sha256, "weights_origin": weights.origin}
        if "max_training_steps" in settings:
            defaults |= {"accumulated": 0, "accumulated_loss": torch.zeros(())}
        defaults |= {name: torch.zeros((), dtype=torch.int64) for name in _COUNTERS} | rule_.init_run(weights.theta)
        super().__init__(params, defaults)

    def _attach(self, rule: Rule, weights: Weights) -> None:
        self._rule, self._weights = rule, weights
        # Everything below is derived or transient; what has to survive lives in state and param_groups.
        self._plan: PreparedStep | None = None
        self._pending: Tensor | float | None = None
        self._report: dict[str, Any] = {}
        self._counters: tuple[Tensor, tuple[Tensor, ...]] | None = None  # in one tensor, and its elements
        self._agreed: set[int] = set()
        self._watch = Watch(rule.class_name)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_rule": self._rule.name, "_weights": self._weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        if "_rule" in state:
            self._attach(rules.get(state.pop("_rule")), state.pop("_weights"))
        super().__setstate__(state)

    @property
    def rule(self) -> Rule:
        """The update rule."""
        return self._rule

    @property
    def weights(self) -> Weights:
        """The meta-trained weights in use."""
        return self._weights

    # ---- parameter groups -------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it joins the run where the run stands. See ``torch.optim.Optimizer.add_param_group``.

        Settings of the run as a whole belong to the constructor; a group that brings its own is told so.
        """
        # A copy: torch fills the dict in place, and a caller may build another optimizer from it.
        own = {key: value for key, value in param_group.items() if key not in self._run_keys()}
        dropped = [key for key in self._rule.defaults if key in param_group and key not in own]
        dropped = [key for key in dropped if param_group[key] != self.defaults[key]]
        super().add_param_group(own)
        group = self.param_groups[-1]
        try:
            check_settings(group)
            for p in group["params"]:
                distributed.sharding_of(p)  # refuses what cannot be updated
                if p.dtype not in _DTYPES:
                    raise ValueError(
                        f"parameters must be float32, bfloat16 or float16, got {p.dtype} of shape {tuple(p.shape)}; "
                        "convert the model first, or leave this parameter to another optimizer"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        group.update({key: self.param_groups[0][key] for key in self._run_keys()})
        if dropped:
            warnings.warn(
                f"{', '.join(dropped)} of a parameter group is one setting for all groups: dropped", stacklevel=2
            )

    def _run_keys(self) -> tuple[str, ...]:
        """Keys that have one value for the whole run, kept the same in all groups."""
        # torch adds "differentiable" to the defaults, not to the groups, when a state is loaded.
        per_group = {"lr", "weight_decay", "differentiable", *self._rule.per_group}
        return tuple(key for key in self.defaults if key not in per_group)

    def _run_start(self) -> dict[str, Tensor]:
        return self._rule.init_run(self._weights.theta)

    def _set_run(self, values: Mapping[str, Any]) -> None:
        for group in self.param_groups:
            group.update(values)

    @property
    def num_training_steps(self) -> int:
        """Length of the run in optimizer steps, 0 while it is not set."""
        return self.param_groups[0]["num_training_steps"]

    @num_training_steps.setter
    def num_training_steps(self, value: int) -> None:
        self._set_run({"num_training_steps": positive_int("num_training_steps", value)})
        self._watch.warned_horizon = False

    @property
    def steps_done(self) -> int:
        """Steps taken so far, skipped ones left out. Reading it waits for the device."""
        return int(self.param_groups[0]["step"])

    @steps_done.setter
    def steps_done(self, value: int) -> None:
        self._set_run({"step": torch.full_like(self.param_groups[0]["step"], operator.index(value))})

    def reset_state(self) -> None:
        """Forget all accumulators, counters and observed losses, as if no step had been taken; settings stay."""
        self.state.clear()
        self._set_run({name: torch.zeros((), dtype=torch.int64) for name in _COUNTERS} | self._run_start())
        self._attach(self._rule, self._weights)

    # ---- the loss ---------------------------------------------------------------------------------------------------

    def observe_loss(self, loss: Tensor | float) -> None:
        """Give the next step its loss; several calls before a step add up.

        ``loss`` is a scalar tensor, kept on its device and detached, or a number: what was back-propagated on this
        rank. The mean over ranks is taken in the step.

        Raises:
            ValueError: if it holds more than one number.
        """
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss must be one number, got a tensor of shape {tuple(loss.shape)}; reduce it first"
                )
            loss = loss.detach().reshape(()).float()
        else:
            loss = float(loss)
        self._pending = loss if self._pending is None else self._pending + loss

    @property
    def has_observed_loss(self) -> bool:
        """Whether a loss waits for the next step."""
        return self._pending is not None

    def scale_observed_loss(self, factor: float) -> None:
        """Multiply the waiting loss, if there is one: a sum over micro-batches becomes their mean."""
        if self._pending is not None:
            self._pending = self._pending * factor

    def discard_loss(self) -> None:
        """Forget the waiting loss."""
        self._pending = None

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | Tensor | float | None = None) -> Any:
        """One update of all parameters that have a gradient.

        Args:
            closure: as in ``torch.optim``, a function that evaluates the model and returns the loss, called once with
                gradients enabled; or the loss itself, a 0-d tensor or a number. A loss given here replaces those given
                to :meth:`observe_loss`.

        Returns:
            the loss that ``closure`` returned or was, None without one.

        Raises:
            RuntimeError: without a loss or a horizon (unless every lr is 0: then state is allocated and nothing else
                happens, which is how checkpoints are loaded), for sparse gradients, and after ``max_nonfinite_steps``
                steps in a row with a non-finite loss, gradient or parameter. Such steps change nothing.
        """
        result = closure
        if callable(closure):
            with torch.enable_grad():
                result = closure()
        if result is not None:
            self.discard_loss()
            self.observe_loss(result)

        fresh = self._create_state()
        if self._idle(fresh):
            return result
        active = self._active()
        self._check_ranks([p for p, _ in active])
        loss, self._pending = self._pending, None
        if self._interval() > 1:
            loss = self._accumulate([p for p, _ in active], loss)
            if loss is None:
                return result
            active = self._active()
        if active:
            # A surrounding autocast would run the meta-network in half precision.
            with torch.autocast(active[0][0].device.type, enabled=False):
                self._update([p for p, _ in active], [group for _, group in active], loss)
        return result

    def _idle(self, fresh: bool) -> bool:
        """Whether this is a step of checkpoint loading, and an error if it is a real one that lacks something.

        Such a step comes with an lr of 0, no loss and zero gradients. With a rule that needs no loss it has to be told
        from the first step of a warm-up, by the gradients, and all ranks have to see it alike.
        """
        rule, group = self._rule, self.param_groups[0]
        if self._pending is None and (rule.needs_loss or fresh):
            still = all(float(g["lr"]) == 0.0 for g in self.param_groups)
            if still and (rule.needs_loss or distributed.all_zero([p.grad for p, _ in self._active()])):
                return True
        if rule.needs_loss and self._pending is None:
            raise RuntimeError(
                f"{rule.class_name} needs the training loss: call optimizer.observe_loss(loss) before "
                "optimizer.step(), or optimizer.step(loss). Under Trainer and Accelerate `import hf_lopt` delivers it "
                "from accelerator.backward(loss)."
            )
        if rule.needs_horizon and not group["num_training_steps"]:
            raise RuntimeError(
                f"{rule.class_name} needs the length of the run: pass num_training_steps=... or set "
                "optimizer.num_training_steps before the first step. Trainer's callback does it by itself."
            )
        return False

    def _trainable(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"] if p.requires_grad)

    def _create_state(self) -> bool:
        """State for every trainable parameter, with a gradient or not, so that it is the same on every rank. Whether
        there was none before."""
        fresh = not self.state
        for p, group in self._trainable():
            if p.numel() and not self.state[p]:
                self.state[p] = self._rule.init_state(p, group, self._weights.theta)
            if p.numel() and group.get("max_training_steps", 0) and "gradient_sum" not in self.state[p]:
                # Also where the run is short: the horizon may come later, and a checkpoint fills what it finds.
                self.state[p] |= {"gradient_sum": distributed.zeros(p, None), "gradients_summed": 0}
        return fresh

    def _check_ranks(self, active: list[Tensor]) -> None:
        """Have all ranks compare what they train, at the first step and for every new selection of parameters."""
        selection = {id(p) for p in active}
        if distributed.world_size() == 1 or (key := hash(frozenset(selection))) in self._agreed:
            return
        run = {name: self.param_groups[0][name] for name in self._run_keys()}
        check_ranks(run, list(self._trainable()), selection, ("lr", "weight_decay", *self._rule.per_group))
        self._agreed.add(key)

    def _active(self) -> list[tuple[Tensor, dict[str, Any]]]:
        """Parameters that take part in this step, with their groups."""
        pairs = [(p, group) for p, group in self._trainable() if p.grad is not None and p.numel()]
        for p, _ in pairs:
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"{self._rule.class_name} does not support sparse gradients (parameter of shape "
                    f"{tuple(p.shape)}); create the embedding with sparse=False"
                )
        return pairs

    def _interval(self) -> int:
        """Calls of step() for one update: more than 1 where the run is longer than the weights were trained for."""
        group = self.param_groups[0]
        longest = group.get("max_training_steps", 0)
        return math.ceil(group["num_training_steps"] / longest) if longest else 1

    def _horizon(self) -> int:
        """Length of the run in updates."""
        return self.param_groups[0].get("num_training_steps", 0) // self._interval()

    def _accumulate(self, params: list[Tensor], loss: Tensor | float) -> Tensor | float | None:
        """Sum gradients and losses over calls. After ``_interval()`` of them the means become the gradients, in place,
        and the mean loss is returned; until then None."""
        for p in params:
            distributed.local(self.state[p]["gradient_sum"]).add_(self._gradient(p))
            self.state[p]["gradients_summed"] += 1
        interval, first = self._interval(), self.param_groups[0]
        count = first["accumulated"] + 1
        total = first["accumulated_loss"].to(params[0].device if params else "cpu") + loss
        if count < interval:
            self._set_run({"accumulated": count, "accumulated_loss": total})
            return None
        self._set_run({"accumulated": 0, "accumulated_loss": torch.zeros_like(total)})
        for p, _ in self._trainable():
            if self.state[p].get("gradients_summed"):
                gradient_sum, self.state[p]["gradients_summed"] = self.state[p]["gradient_sum"], 0
                p.grad = (gradient_sum / interval).to(p.dtype)
                distributed.local(gradient_sum).zero_()
        return total / interval

    def _update(self, params: list[Tensor], groups: list[dict[str, Any]], loss: Tensor | float | None) -> None:
        first = self.param_groups[0]
        words = self._words()
        pairs = zip(params, groups, strict=True)
        key = tuple((id(p), p.device, *(group[name] for name in words)) for p, group in pairs)
        if self._plan is None or self._plan.key != key:
            self._plan = PreparedStep(key, params, groups, self._rule, self._weights.theta)
        plan, device = self._plan, params[0].device
        run = self._run(device)
        self._watch.start(run["nonfinite_steps"])
        states = [{key: distributed.local(value) for key, value in self.state[p].items()} for p in params]
        names = dict.fromkeys(name for state in states for name in state)
        tensors = TensorList(
            layout=plan.layout,
            cache=plan.cache,
            root=plan.cache,
            params=[distributed.local(p) for p in params],
            grads=self._gradients(params),
            state={name: [state.get(name) for state in states] for name in names},
            settings={name: plan.setting(name, groups) for name in self._numbers()},
            labels={name: [group[name] for group in groups] for name in words},
        )
        loss = None if loss is None else to_device(loss, torch.float32, device)
        settings = dict(first)
        if "num_training_steps" in settings:
            settings["num_training_steps"] = self._horizon()
        outcome = self._rule.update(tensors, run, plan.weights, settings, loss)
        self._set_run(outcome.run)
        self._report = outcome.report
        self._watch.look(run["counters"], first["max_nonfinite_steps"], self._horizon())

    def _run(self, device: torch.device) -> dict[str, Tensor]:
        """The state of the run on the device, which the step changes in place; ``counters`` holds all of them.

        On an accelerator it stays where it is, so that a graph that has been captured goes on with it. On the CPU each
        step has new tensors, and what a caller holds keeps its values.
        """
        group = self.param_groups[0]
        fresh = device.type == "cpu"
        if (
            fresh
            or self._counters is None
            or any(group[n] is not x for n, x in zip(_COUNTERS, self._counters[1], strict=True))
        ):
            counters = torch.stack([group[name].to(device, non_blocking=True) for name in _COUNTERS])
            self._counters = counters, counters.unbind()
            self._set_run(dict(zip(_COUNTERS, self._counters[1], strict=True)))
        values = {name: group[name].to(device, non_blocking=True, copy=fresh) for name in self._run_start()}
        self._set_run(values)
        return values | {name: group[name] for name in _COUNTERS} | {"counters": self._counters[0]}

    def _gradients(self, params: list[Tensor]) -> list[Tensor]:
        """The gradients, without NaN where the rule counts it as 0, clipped in place where a global norm is set."""
        if self._rule.nan_to_zero:
            ops.zero_nan(ZeroNan([distributed.local(p.grad) for p in params]))
        max_norm = self.param_groups[0].get("max_grad_norm", 0.0)
        gradients = [self._gradient(p) for p in params]
        if max_norm:
            distributed.clip_grad_norm_(gradients, [distributed.sharding_of(p) for p in params], max_norm)
        return gradients

    @staticmethod
    def _gradient(p: Tensor) -> Tensor:
        """The local gradient, cut as the parameter is."""
        return distributed.local(p.grad, like=distributed.sharding_of(p))

    def _numbers(self) -> list[str]:
        return ["lr", "weight_decay", *(n for n in self._rule.per_group if isinstance(self._rule.defaults[n], float))]

    def _words(self) -> list[str]:
        return [name for name in self._rule.per_group if isinstance(self._rule.defaults[name], str)]

    @property
    def report(self) -> dict[str, Tensor]:
        """Internals of the last step, device tensors by name (``lr_mult`` (T,), …); {} before the first. Not saved."""
        return {name: value() if callable(value) else value for name, value in self._report.items()}

    def metrics(self) -> dict[str, float]:
        """Numbers of the last step for a logger; {} before the first. Waits for the device.

        ``lr_mult_mean``, ``lr_mult_min``, ``lr_mult_max`` over tensors, ``update_rms`` of the network's step over all
        elements, ``nonfinite_steps`` so far.
        """
        if not self._report:
            return {}
        out = {}
        if "lr_mult" in self._report:
            lr_mult = self._report["lr_mult"]
            out = {f"lr_mult_{name}": getattr(lr_mult, name)().item() for name in ("mean", "min", "max")}
        out["update_rms"] = self._report["update_rms"]().item()
        out["nonfinite_steps"] = float(self.param_groups[0]["nonfinite_steps"])
        return out

    def push_to_hub(self, repo_id: str, **options: Any) -> dict[str, str]:
        """Publish the weights in use, see :func:`hf_lopt.weights.push_to_hub`; the commit of each repository."""
        return push_to_hub(self, repo_id, **options)

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict. See ``torch.optim.Optimizer.load_state_dict``; state keeps its float32.

        Raises:
            ValueError: if it is of another optimizer, another rule or other weights than this one.
        """
        ours = {key: self.param_groups[0][key] for key in _IDENTITY}
        for group in state_dict["param_groups"]:
            theirs = {key: group.get(key) for key in _IDENTITY}
            if theirs["rule"] != ours["rule"]:
                got = f"the rule {theirs['rule']!r}" if theirs["rule"] else "another optimizer, which names no rule"
                raise ValueError(f"this checkpoint is of {got}; this optimizer is {ours['rule']!r}. Use the same one.")
            if theirs["weights_sha256"] != ours["weights_sha256"]:
                raise ValueError(
                    f"this checkpoint was made with the weights {group.get('weights_source')!r} (sha256 "
                    f"{str(theirs['weights_sha256'])[:12]}), but {self._weights.source!r} (sha256 "
                    f"{self._weights.sha256[:12]}) are loaded. Pass weights=... of the checkpoint, or start afresh."
                )
        saved = state_dict["state"]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the dtype of the parameter.
        for i, p in zip(ids, (p for group in self.param_groups for p in group["params"]), strict=True):
            if p.dtype != torch.float32 and i in saved:
                for key, value in saved[i].items():
                    if isinstance(value, Tensor) and value.is_floating_point():
                        self.state[p][key] = value.to(device=p.device, copy=True)
        self._attach(self._rule, self._weights)


def _public_class(rule: Rule, base: type[LearnedOptimizer]) -> type[LearnedOptimizer]:
    """The class of one rule: a name, a signature and a docstring over :class:`LearnedOptimizer`."""
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, keyword, default=value) for name, value in rule.defaults.items()]
    signature = inspect.Signature([inspect.Parameter("params", keyword), *parameters])

    def __init__(self: LearnedOptimizer, *args: Any, **kwargs: Any) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        LearnedOptimizer.__init__(self, arguments.pop("params"), rule.name, **arguments)

    __init__.__signature__ = inspect.Signature([inspect.Parameter("self", keyword), *signature.parameters.values()])
    __init__.__doc__ = LearnedOptimizer.__doc__
    body = {"__init__": __init__, "__doc__": rule.summary, "__module__": __name__, "__signature__": signature}
    return type(rule.class_name, (base,), body)


class _Variants:
    """Holds the classes of rules that share a public class with another, where pickle can find them."""


PUBLIC_CLASSES: dict[str, type[LearnedOptimizer]] = {}


def _make_public_classes() -> None:
    """One class per rule. Rules of one class name are variants: the one named by class comes first and is its base."""
    for rule in map(rules.get, rules.names()):
        first = globals().get(rule.class_name)
        PUBLIC_CLASSES[rule.name] = cls = _public_class(rule, first or LearnedOptimizer)
        if first is None:
            globals()[rule.class_name] = cls
        else:
            cls.__qualname__ = f"{_Variants.__name__}.{rule.name}"
            setattr(_Variants, rule.name, cls)


_make_public_classes()
