"""What the caller of an optimizer chose, as opposed to what was left at its default.

An integration that sees the model later may set what nobody chose, and has to leave alone what somebody did. A value
does not tell: ``lr=1.0`` may have been written down or left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lopt import lr_scales, notices, pretrained
from hf_lopt.arguments_given import check_call, check_group
from hf_lopt.live_modules import models_of, pretrained_name
from hf_lopt.rules.base import Rule
from hf_lopt.weights import Weights


_Self = TypeVar("_Self", bound="GivenSettings")
# Below it, the step size of a rule that decides its step size itself is next to nothing on a model that is trained
# from scratch. Fine-tuning goes down to about 0.05.
_SMALL_MULTIPLIER = 0.02
_HARDLY_MOVES = 1e-3  # the same for a pretrained model


class GivenSettings(Optimizer):
    """An optimizer that remembers which settings its caller gave.

    Attributes:
        explicit_settings: names of the keywords that the constructor was called with, positional ones included.
        run_policy: what an integration decided for this run, for reports; None without one.
        lr_is_chosen: whether the lr is somebody's choice, where an integration that sets it knows; None: look.
        is_fine_tuning: whether the lr, unless somebody chose it, is that for a pretrained model.
        state_was_loaded: whether per-parameter state came from ``load_state_dict`` and nobody has reacted to that yet.
    """

    _rule: Rule
    _run_state: Any
    explicit_settings: frozenset[str] = frozenset()
    run_policy: Any = None
    lr_is_chosen: bool | None = None
    is_fine_tuning: bool = False
    state_was_loaded: bool = False
    _lr_by_position: Any = None
    # The checkpoint of the model, where lr counts as for fine-tuning because nobody has chosen one; "" once settled.
    _fine_tunes: str = ""
    _before_fine_tuning: Mapping[str, Any] = {}
    # What lr counts for new layers of a pretrained model, and for what was loaded; (): that is not decided here.
    _counts: tuple[float, ...] = ()
    _has_begun: bool = False
    _checks_length: bool = False  # whether whoever made it compares its run with its horizon in the end
    _has_warned: bool = False
    _has_warned_of_lr: bool = False

    def __new__(cls: type[_Self], *args: Any, **kwargs: Any) -> _Self:
        # Here, because the constructors of subclasses pass all of their arguments on, defaults too.
        self = super().__new__(cls)
        self._given_groups: list[tuple[frozenset[str], Any]] = []  # per group: names of its settings, and its lr
        given = check_call(cls, args, kwargs) if args or kwargs else None
        if given is not None:
            names = {name for name, value in given.items() if not isinstance(value, dict)}
            self.explicit_settings = frozenset(names | set(kwargs)) - {"params", "rule"}
            self._lr_by_position = None if "lr" in kwargs else given.get("lr")
        return self

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and note what it sets for itself. See ``torch.optim.Optimizer.add_param_group``."""
        check_group(type(self).__name__, param_group)
        names = frozenset(param_group) - {"params"}
        super().add_param_group(param_group)
        del self._given_groups[len(self.param_groups) - 1 :]  # of a group that was refused
        *others, group = self.param_groups
        self._given_groups.append((names, group["lr"]))
        is_open = self._counts and not names & {"lr", lr_scales.KEY}
        if is_open and all(lr_scales.KEY in other for other in others):
            known = pretrained.new_among(group["params"], [p for other in others for p in other["params"]])
            if known is not None:
                of_new, of_loaded = self._counts
                of_new *= self._run_state.more_for_new_layers
                pretrained.set_scales([group], known, of_new, of_loaded)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state dict, and note whether it had state. See ``torch.optim.Optimizer.load_state_dict``."""
        super().load_state_dict(state_dict)
        self.state_was_loaded = bool(state_dict["state"])
        if self.state_was_loaded:  # Accelerate loads what it has just read, to move it
            self._fine_tunes = ""

    def _chose_lr(self) -> bool:
        """Whether somebody chose the lr: in the constructor, in a group, or by writing to one before training.

        Of a group with a scheduler counts what that starts from.
        """
        if self.lr_is_chosen is not None:
            return self.lr_is_chosen
        if "lr" in self.explicit_settings or any("lr" in names for names, _ in self._given_groups):
            return True
        rates = [group.get("initial_lr", group["lr"]) for group in self.param_groups]
        return any(isinstance(rate, Tensor) or rate != self._rule.defaults["lr"] for rate in rates)

    def _count_as_fine_tuning(self, rule: Rule, weights: Weights) -> None:
        """Give the tensors of a pretrained model the lr for fine-tuning, as numbers that multiply that of their group.

        So a scheduler, and whoever writes an lr later, need not know. Layers that the checkpoint lacks keep the lr of
        training from scratch. Not with weights that are given as arrays: their steps are wanted as they are.
        """
        groups = self.param_groups
        if weights.source == "mapping" or any(lr_scales.KEY in group for group in groups) or self._chose_lr():
            return
        model = pretrained.model_of([p for group in groups for p in group["params"]])
        if model is None:
            return
        lr, settings = rule.fine_tuning(weights)
        of_new, of_loaded = (x / rule.defaults["lr"] for x in (rule.lr_of_new_layers, lr))
        self._fine_tunes, self._counts = pretrained_name(model) or "", (of_new, of_loaded)
        self.is_fine_tuning = True
        new = pretrained.new_tensors(model)
        pretrained.set_scales(groups, new, of_new, of_loaded)
        short = f"a pretrained model: lr counts {of_loaded:g} times"
        more = f", {of_new:g} times for {len(new)} tensors of new layers and poolers" if new else ""
        why = f"steps for training from scratch wreck pretrained parameters; lr={rule.defaults['lr']:g} overrides"
        notices.note(short, f"{short}{more} ({self._fine_tunes}): {why}")
        open_ones = {key: value for key, value in settings.items() if key not in self.explicit_settings}
        self._before_fine_tuning = {key: groups[0][key] for key in open_ones}
        for group in groups:
            group.update(open_ones)

    def _stretch_new_layers(self, before: float, now: float) -> bool:
        """Have lr count ``now`` times for new layers that had it ``before`` times or once. Whether any changed."""
        of_new, (of_loaded, _) = self._rule.lr_of_new_layers, self._rule.fine_tuning(self._weights)
        return pretrained.stretch(self.param_groups, of_loaded, (of_new, of_new * before), of_new * now)

    def _forget_fine_tuning(self) -> None:
        """Undo what the constructor decided for a pretrained model: somebody else decides."""
        if self._fine_tunes:
            for group in self.param_groups:
                group.pop(lr_scales.KEY, None)
                group.update(self._before_fine_tuning)
            self.is_fine_tuning = False
        self._fine_tunes = ""

    @property
    def length_multiplier(self) -> float:
        """What lr is multiplied with because of the length of the run and its epochs, see
        :class:`hf_lopt.rules.base.RunLength`.

        1.0 where somebody chose an lr or gave the weights as arrays, and for rules and checkpoints that know no such
        thing. Decided at the first step, and again when ``num_training_steps`` changes; before that, what it would be,
        of sharded tensors without the model's reach (:mod:`hf_lopt.reach`).
        """
        return self._run_state.length_multiplier

    @property
    def num_epochs(self) -> float:
        """How often the run sees each sample; 0.0: not known.

        A pretrained model that sees its samples more than four times takes shorter steps, and so do adapters, see
        :class:`hf_lopt.rules.base.RunLength`. Trainer's callback sets it; in a loop of Accelerate or Lightning it
        follows from the loader. Checkpoints keep it; where their ``num_training_steps`` changes, it changes alike,
        unless somebody has set it. What is no number >= 0 is a ValueError.
        """
        return self._run_state.num_epochs

    @num_epochs.setter
    def num_epochs(self, value: float) -> None:
        self._run_state.num_epochs = value

    def explicit_in_group(self, index: int) -> frozenset[str]:
        """Names of the settings that the group of this index brought with it."""
        return self._given_groups[index][0] if index < len(self._given_groups) else frozenset()

    def replace_groups(self, groups: list[dict[str, Any]], explicit: list[frozenset[str]]) -> None:
        """Take ``groups``, which are complete and hold the same parameters, with the settings that count as given."""
        self.param_groups[:] = groups
        self._given_groups = [(names, group["lr"]) for names, group in zip(explicit, groups, strict=True)]

    def _tell_what_begins(self, rule: Rule, constructed: bool = False) -> None:
        """One warning, from the constructor or else the first step, for what is good to know about this run, see
        :mod:`hf_lopt.notices`.

        Among it an ``lr`` that is a usual learning rate, of a rule whose own step size it multiplies. What counts is
        what the groups were made with, and what a scheduler starts from: a warm-up begins at 0. The constructor leaves
        that, and all else, to the first step: until then an integration may set the lr, or say more of it. An lr that
        was given by position is told by both kinds of rules, and at once.

        Args:
            constructed: whether the constructor asks.
        """
        self._has_begun = not constructed
        if self._has_begun:
            if self._chose_lr():  # since then
                self._forget_fine_tuning()
            self._fine_tunes = ""
            self._note_what_is_faster()
        largest = 0.0
        if rule.own_schedule and self.run_policy is None:  # else whoever decided it has told
            largest = self._largest_lr()
        is_small = 0.0 < largest < _SMALL_MULTIPLIER and not self._has_warned_of_lr
        if self._lr_by_position is not None and not self._has_warned_of_lr:
            text = by_position(type(self).__name__, self._lr_by_position, rule)
        elif is_small and constructed:
            return
        elif is_small and self._is_too_small(rule, largest):
            text = f"lr={largest:g} multiplies {rule.class_name}'s own step, the default is lr=1.0"
        else:
            warn_once(self)
            return
        if is_small:
            notices.LOG.info(small_multiplier(rule.class_name, largest))
        notices.tell(text)
        self._has_warned = self._has_warned_of_lr = True

    def _note_what_is_faster(self) -> None:
        """On a GPU the exact Newton-Schulz iteration takes most of a step of Celo2; see benchmarks/results/cuda.md."""
        group = self.param_groups[0] if self.param_groups else {}
        if group.get("ns_dtype") != "float32" or "ns_dtype" in self.explicit_settings:
            return
        if any(p.is_cuda for p in group["params"]):
            short = "ns_dtype=auto is faster here"
            notices.note(short, f"{short}: Newton-Schulz in TF32 or bfloat16, a step in a quarter of the time")

    def _is_too_small(self, rule: Rule, lr: float) -> bool:
        models = models_of(p for group in self.param_groups for p in group["params"])
        return lr < least_multiplier(rule, next(iter(models), None))

    def _largest_lr(self) -> float:
        """0.0 where one lies on an accelerator: reading it would wait."""
        rates = [rate for _, rate in self._given_groups]
        rates += [group[key] for group in self.param_groups for key in ("lr", "initial_lr", "max_lr") if key in group]
        if any(isinstance(rate, Tensor) and rate.device.type != "cpu" for rate in rates):
            return 0.0
        return max(map(float, rates), default=0.0)


def warn_once(optimizer: GivenSettings, *more: str) -> None:
    """:func:`hf_lopt.notices.tell`, unless this optimizer has warned already: what waits is in the log."""
    if optimizer._has_warned:
        notices.discard()
    else:
        optimizer._has_warned = notices.tell(*more)


def least_multiplier(rule: Rule, model: nn.Module | None) -> float:
    """The lr below which the rule's steps do next to nothing; 0 for rules whose lr is a learning rate."""
    if not rule.own_schedule:
        return 0.0
    return _SMALL_MULTIPLIER if pretrained_name(model) is None else _HARDLY_MOVES


def by_position(name: str, lr: Any, rule: Rule) -> str:
    """The words for the call ``name(params, lr)``, which other optimizers take for a learning rate."""
    meaning = f"multiplies {rule.class_name}'s own step, the default is lr=1.0" if rule.own_schedule else "by position"
    return f"{name}(params, {lr!r:.20}): lr={lr!r:.20} {meaning}; write lr=... if it is meant"


def small_multiplier(name: str, lr: float) -> str:
    """The words for an ``lr`` that was meant for another kind of optimizer."""
    return (
        f"lr={lr:g} multiplies {name}'s own step size and is no learning rate as of Adam or SGD: training will hardly "
        f"move. {name} decides its step size itself; lr=1.0, the default, is meant for training from scratch, and "
        "a pretrained model takes 0.05."
    )
