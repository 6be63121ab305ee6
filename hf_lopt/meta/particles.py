"""Many copies of a model, each updated by a rule with weights of its own. Only this module calls a rule's step.

The copies ("particles") are kept as stacks (P, *shape). Rules that treat every tensor by itself take these stacks as
they are, all particles in one call, with network weights for each. VeLO, whose scheduler couples the tensors of a run,
takes views of all particles in one call. The others are called once per particle, on views.

Axes: P particles, N parameters of a model, D decays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_lopt import distributed, rules
from hf_lopt.rules.base import Rule
from hf_lopt.step.networks import Theta
from hf_lopt.step.tensors import StepCache, TensorList, make_layout


# Rules whose step is the sum of what they do to each tensor.
TOGETHER = ("celo2", "celo2_base", "elo", "mulo", "small_fc_lopt")
# What of their weights may differ between particles: the leaves of the network.
NETWORKS = ("ff_mod_stack/~/", "nn/~/")
IN_TURN = ("celo", "celo_adam", "rnn_mlp", "velo", "velo_s")
AT_ONCE = ("velo", "velo_s")  # of these: the rules that have a step for many runs


def supported(name: str) -> Rule:
    """The rule called ``name``.

    Raises:
        ValueError: if there is none, or if it cannot be run for many particles.
    """
    rule = rules.get(name)
    if name not in TOGETHER + IN_TURN:
        raise ValueError(
            f"{name} clips the gradients of a whole model, which particles do not: train celo2, whose network is the "
            f"same, or one of {', '.join(sorted(TOGETHER + IN_TURN))}"
        )
    return rule


class Particles:
    """Models under training: parameters, the state of their optimizer, and how far each of them is.

    Args:
        rule: name of the rule.
        shapes: parameter name -> shape of one copy; matrices are (in, out).
        count: number of particles.
        settings: constructor keywords of the rule that differ from its defaults; "min_param_scale" may be a mapping
            from parameter name to number.
        device: where everything lives.

    Attributes:
        params: parameter name -> (P, *shape), changed in place by :meth:`update`.
        steps: (P,) int64, updates since each particle's start.
        failed: (P,) bool: a loss or gradient was not finite since then. Such a particle is set to zero before every
            step.
        together: whether all particles are stacks in one call, which depends on nothing but tensors.
    """

    def __init__(
        self,
        rule: str,
        shapes: Mapping[str, Sequence[int]],
        count: int,
        settings: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ):
        self.rule, self.count, self.device = supported(rule), count, torch.device(device)
        unknown = sorted(set(settings or {}) - set(self.rule.defaults))
        if unknown:
            raise ValueError(f"{rule} takes no setting {', '.join(unknown)}; it takes {', '.join(self.rule.defaults)}")
        if (settings or {}).get("state_dtype", "float32") != "float32":
            raise ValueError(f"particles keep their state in float32, got state_dtype={settings['state_dtype']!r}")
        # What is left open needs to see models; particles are those of the reference.
        defaults = {key: 0.0 if key == "min_param_scale" else x for key, x in self.rule.defaults.items()}
        self.group = defaults | dict(settings or {}) | {"axis_order": "jax"}
        self.params = {
            n: torch.zeros(count, *shape, device=self.device, dtype=torch.float32) for n, shape in shapes.items()
        }
        self.state: dict[str, dict[str, Tensor]] = {}
        self.run: dict[str, Tensor] = {}
        self.steps = torch.zeros(count, dtype=torch.int64, device=self.device)
        self.failed = torch.zeros(count, dtype=torch.bool, device=self.device)
        self._at_once = rule in AT_ONCE
        self.together = rule in TOGETHER and all(len(shape) in (1, 2) for shape in shapes.values())
        # Accumulators have their decays first; the particles come next where a rule is to see stacks.
        self._axis = int(self.together)
        self._waits = self.device.type == "cpu"  # asking for values costs nothing there
        self._lists: list[TensorList] = []
        self._weights: list[dict[str, Any]] = []

    def set_weights(self, theta: Theta) -> None:
        """Give every particle its weights: leaves (P, *leaf shape).

        Raises:
            ValueError: if learned decays differ between particles of a rule that takes them in one call.
        """
        self._theta = {name: leaf.to(self.device) for name, leaf in theta.items()}
        if self.together:
            self._set_network(self.rule.prepare(_side_by_side(theta), self.group))
        else:
            prepared = [self.rule.prepare(self._theta_of(i), self.group) for i in range(self.count)]
            if self._at_once:
                prepared = [{key: torch.stack([of_one[key] for of_one in prepared]) for key in prepared[0]}]
            self._weights = prepared
        if not self.state:
            self._create_state()

    def _set_network(self, prepared: Mapping[str, Any]) -> None:
        """Tensors stay where they are: graphs of the step read them."""
        if not self._weights:
            self._weights = [{k: x.to(self.device) if isinstance(x, Tensor) else x for k, x in prepared.items()}]
            return
        for key, x in prepared.items():
            if isinstance(x, Tensor):
                self._weights[0][key].copy_(x)
            elif self._weights[0][key] != x:
                raise ValueError(f"{key} of the weights cannot change between truncations: leave them out")

    def _theta_of(self, i: int) -> dict[str, Tensor]:
        return {name: leaf[i] for name, leaf in self._theta.items()}

    def _create_state(self) -> None:
        start = self._fresh_state(0)
        for name, state in start.items():
            self.state[name] = {key: self._stacked(x, self.count).clone() for key, x in state.items()}
        run = self.rule.init_run(self._theta_of(0))
        self.run = {k: x.to(self.device).expand(self.count, *x.shape).clone() for k, x in run.items()}

    def _stacked(self, x: Tensor, count: int) -> Tensor:
        """State of one particle as that of several."""
        return torch.stack([x] * count, self._axis)

    def _fresh_state(self, i: int) -> dict[str, dict[str, Tensor]]:
        theta = self._theta_of(i)
        return {name: self.rule.init_state(p[i], self.group, theta) for name, p in self.params.items()}

    def restart(self, which: Sequence[int], start: Mapping[str, Tensor]) -> None:
        """Begin anew with the particles ``which``, from ``start``: parameter name -> (len(which), *shape)."""
        if not len(which):
            return
        places = torch.as_tensor(which, device=self.device, dtype=torch.int64)
        for name, p in self.params.items():
            p[places] = start[name].to(self.device)
        if self.together:
            for name, state in self._fresh_state(which[0]).items():
                for key, x in state.items():
                    self.state[name][key].index_copy_(1, places, self._stacked(x, len(which)))
        else:
            for i in which:  # state may start at learned values, which are the particle's own
                for name, state in self._fresh_state(i).items():
                    for key, x in state.items():
                        self.state[name][key][i] = x
        for i in which:
            for key, x in self.rule.init_run(self._theta_of(i)).items():
                self.run[key][i] = x
        self.steps[places], self.failed[places] = 0, False

    @torch.no_grad()
    def update(self, grads: Mapping[str, Tensor], losses: Tensor, lr: Tensor, horizons: Tensor) -> None:
        """One step of every particle.

        Args:
            grads: parameter name -> (P, *shape); changed in place where a particle has failed.
            losses: (P,), of the same parameters.
            lr: (P,) float32, learning rate or multiplier.
            horizons: (P,) int64, length of each run in steps.
        """
        self._stop_failed(grads, losses)
        losses = losses.masked_fill(self.failed, 0.0)
        if not self._lists:
            self._lists = self._new_lists()
        with distributed.alone():
            if self.together or self._at_once:
                self._update_all(grads, losses, lr, horizons)
            else:
                self._update_in_turn(grads, losses, lr, horizons)
        self.steps += 1

    def _stop_failed(self, grads: Mapping[str, Tensor], losses: Tensor) -> None:
        """Particles with values that are not finite are zeroed: a rule skips the step of all it is given together."""
        sums = torch.stack([g.flatten(1).sum(1) for g in grads.values()])
        self.failed |= ~(losses.isfinite() & sums.isfinite().all(0))
        state = [x for of_tensor in self.state.values() for x in of_tensor.values()]
        if self._waits:
            places = self.failed.nonzero().flatten()
            for x in (*grads.values(), *self.params.values()) if len(places) else ():
                x.index_fill_(0, places, 0.0)
            for x in state if len(places) else ():
                x.index_fill_(self._axis, places, 0.0)
            return
        for x in (*grads.values(), *self.params.values()):
            x.masked_fill_(self.failed.view(-1, *[1] * (x.dim() - 1)), 0.0)
        for x in state:
            x.movedim(self._axis, -1).masked_fill_(self.failed, 0.0)

    def _tensors(self, params: list[Tensor], states: list[dict[str, Tensor]], replicas: int) -> TensorList:
        """A rule's view of its tensors, whose gradients and learning rates come with each step. ``replicas``: how many
        particles they are of, 0 for one by itself."""
        keys = dict.fromkeys(key for state in states for key in state)
        count, rule = len(params), self.rule
        numbers = ["weight_decay", *(n for n in rule.per_group if n not in rule.words)]
        total = count * max(replicas if self.together else 0, 1)
        settings = {n: self._setting(n, total) for n in numbers}
        cache = StepCache()
        return TensorList(
            layout=make_layout(params, ["jax"] * count, replicas=replicas, stacked=self.together),
            cache=cache,
            root=cache,
            params=params,
            grads=[],
            state={key: [state.get(key) for state in states] for key in keys},
            settings=settings,
            labels={n: [self.group[n]] * count for n in rule.words},
        )

    def _setting(self, name: str, total: int) -> Tensor:
        """A setting that is a number, for ``total`` tensors: those of a model, once for each particle."""
        x = self.group[name]
        of_model = [float(x[key]) for key in self.params] if isinstance(x, Mapping) else [float(x)]
        return torch.tensor(of_model, dtype=torch.float32, device=self.device).repeat(total // len(of_model))

    def _new_lists(self) -> list[TensorList]:
        """One list of all particles' tensors, or one for each particle."""
        names = list(self.params)
        if self.together:
            return [self._tensors(list(self.params.values()), [self.state[name] for name in names], self.count)]
        per_particle = [
            (
                [p[i] for p in self.params.values()],
                [{key: x[i] for key, x in self.state[name].items()} for name in names],
            )
            for i in range(self.count)
        ]
        if not self._at_once:
            return [self._tensors(*pair, 0) for pair in per_particle]
        params = [p for of_particle, _ in per_particle for p in of_particle]
        states = [state for _, of_particle in per_particle for state in of_particle]
        return [self._tensors(params, states, self.count)]

    def _update_all(self, grads: Mapping[str, Tensor], losses: Tensor, lr: Tensor, horizons: Tensor) -> None:
        """One call for all particles."""
        (tensors,) = self._lists
        if self.together:
            rates, run = lr.repeat(len(self.params)), {"step": self.steps}
            ordered = [grads[name] for name in self.params]
            settings = self.group
        else:
            rates, run = lr.repeat_interleave(len(self.params)), {"step": self.steps} | self.run
            by_name = [grads[name].unbind() for name in self.params]
            ordered = [g for of_particle in zip(*by_name, strict=True) for g in of_particle]
            settings = self.group | {"num_training_steps": horizons.tolist()}
        tensors = replace(tensors, grads=ordered, settings={**tensors.settings, "lr": rates})
        self.rule.update(tensors, run, self._weights[0], settings, None if self.together else losses)

    def _update_in_turn(self, grads: Mapping[str, Tensor], losses: Tensor, lr: Tensor, horizons: Tensor) -> None:
        """A call for each particle."""
        for i, (tensors, horizon) in enumerate(zip(self._lists, horizons.tolist(), strict=True)):
            of_particle = [grads[name][i] for name in self.params]
            rates = lr[i].expand(len(of_particle))
            tensors = replace(tensors, grads=of_particle, settings={**tensors.settings, "lr": rates})
            run = {"step": self.steps[i]} | {key: x[i] for key, x in self.run.items()}
            settings = self.group | {"num_training_steps": horizon}
            result = self.rule.update(tensors, run, self._weights[i], settings, losses[i])
            for key, x in result.run.items():
                self.run[key][i] = x

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`update` reads, but for the weights."""
        tensors = {"params": self.params, "state": self.state, "run": self.run}
        return tensors | {"steps": self.steps, "failed": self.failed}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue where ``saved`` stood; weights have been given before."""
        pairs = [(self.params, saved["params"]), (self.run, saved["run"])]
        pairs += [(self.state[name], saved["state"][name]) for name in self.state]
        for ours, theirs in pairs:
            for key, x in ours.items():
                x.copy_(theirs[key])
        self.steps.copy_(saved["steps"])
        self.failed.copy_(saved["failed"])


def _side_by_side(theta: Theta) -> dict[str, Tensor]:
    """Leaves (P, *leaf shape) of the network; the others, which all particles must have in common, without the P."""
    out = {}
    for name, leaf in theta.items():
        differs = name.startswith(NETWORKS)
        if not differs and not (leaf == leaf[:1]).all():
            raise ValueError(
                f"{name} differs between particles, which one call cannot take; leave decays out of what is trained"
            )
        out[name] = leaf if differs else leaf[0]
    return out
