"""Which numbers of a rule's weights are trained, as one vector, and where training starts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_lopt import rules
from hf_lopt.meta import particles
from hf_lopt.step.networks import Theta


CELO2 = ("ff_mod_stack/~/*",)
# Leaves that are trained unless told otherwise. Decays are left out where all particles share a call.
TRAINED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("celo2", "celo2_base"), CELO2),
    **dict.fromkeys(("elo", "mulo", "small_fc_lopt"), ("nn/~/*",)),
}
# Of leaves whose last axis is that of the outputs: how many of these the rule uses.
OUTPUTS = {
    **dict.fromkeys(("celo2", "celo2_base"), {"ff_mod_stack/~/w2": 1, "ff_mod_stack/~/b2": 1}),
    **dict.fromkeys(particles.IN_TURN[3:] + ("celo",), {"ff_mod_stack/~/w2": 2, "ff_mod_stack/~/b2": 2}),
}


class Vector:
    """The trained numbers of ``theta`` as a vector of length D; the others stay as they are.

    Args:
        rule: name of the rule.
        theta: the weights to start from, float32.
        patterns: leaves to train, as shell patterns; () for the rule's own.

    Raises:
        ValueError: a pattern that fits no leaf.
    """

    def __init__(self, rule: str, theta: Theta, patterns: Sequence[str] = ()):
        patterns = tuple(patterns) or TRAINED.get(rule, ("*",))
        unmatched = [pattern for pattern in patterns if not fnmatch.filter(theta, pattern)]
        if unmatched:
            raise ValueError(f"no leaf of {rule} fits {', '.join(unmatched)}; the leaves are {', '.join(theta)}")
        self.theta = {name: leaf.detach().clone() for name, leaf in theta.items()}
        self._masks: dict[str, Tensor] = {}
        for name, leaf in self.theta.items():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                mask = torch.ones_like(leaf, dtype=torch.bool)
                mask[..., OUTPUTS.get(rule, {}).get(name, leaf.shape[-1]) :] = False
                self._masks[name] = mask

    def start(self) -> Tensor:
        """The vector that gives ``theta`` back, (D,)."""
        return torch.cat([self.theta[name][mask] for name, mask in self._masks.items()])

    def leaves(self, vectors: Tensor) -> dict[str, Tensor]:
        """Weights for vectors (P, D): leaves (P, *leaf shape); without P for one vector (D,)."""
        out = {name: leaf.expand(*vectors.shape[:-1], *leaf.shape) for name, leaf in self.theta.items()}
        pieces = vectors.split([int(mask.sum()) for mask in self._masks.values()], -1)
        for (name, mask), piece in zip(self._masks.items(), pieces, strict=True):
            leaf = out[name].to(vectors.device, copy=True).contiguous()
            leaf[..., mask.to(vectors.device)] = piece
            out[name] = leaf
        return out


def starting_weights(rule: str, start: str) -> dict[str, Tensor]:
    """The weights that meta-training begins with.

    ``start``: "constructed", made by :mod:`hf_lopt.meta.construct`; "bundled", those in the package; or the path of a
    weights file or folder.
    """
    particles.supported(rule)
    if start == "constructed":
        from hf_lopt.meta.construct import BUILDERS

        return dict(BUILDERS[rule]().theta)
    if start != "bundled" and not Path(start).exists():
        raise ValueError(f"start must be constructed, bundled or a path that exists, got {start!r}")
    defaults: Mapping = rules.get(rule).defaults
    return dict(rules.get(rule).load_weights(start, bank_scale=defaults.get("bank_scale", 100.0)).theta)
