"""The fast paths of the CPU kernels, which never multiply row by column factors, against the generic ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lopt.kernels import dispatch, ops
from kernel_backends import CPU_BACKENDS
from kernel_cases import Case, case


pytestmark = pytest.mark.skipif(not dispatch.loaded(), reason="the kernels are not compiled here")
SHAPES = [(1, 7), (33, 70), (300, 9), (6, 5, 3, 3)]


def column(x: Case, units: int, place: int) -> list[Tensor]:
    """One column of features at every element: the output of a network whose units have it with either sign."""
    weights = [torch.zeros(1, *size) for size in ((sum(x.features.widths()), units), (units, units), (units, 2))]
    biases = [torch.zeros(1, size) for size in (units, units, 2)]
    weights[0][0, place, :2] = weights[2][0, :2, 0] = torch.tensor([1.0, -1.0])
    weights[1][0] = torch.eye(units)
    one = torch.ones(len(x.params))
    arguments = replace(
        x.apply_network(into_out=True),
        momenta=[m.clone() for m in x.momenta],
        second_moments=[v.clone() for v in x.second_moments],
        weights=weights,
        biases=biases,
        scale=one,
        decay=one,
        exp_mult=0.0,
    )
    ops.apply_network(arguments)
    return list(arguments.out)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_fast_paths_follow_the_generic_one(backend):
    """Networks of 32 units take the generic path, those of 4 the fast one."""
    with backend.active():
        x = case(SHAPES, "small_fc", size=0.3)
        sums = ops.feature_sums(x.feature_sums())
        for place in range(sums.shape[1]):
            generic, fast = column(x, 32, place), column(x, 4, place)
            for t, (a, b) in enumerate(zip(generic, fast, strict=True)):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6 * float(a.abs().max()))
                torch.testing.assert_close(a.double().square().sum(), sums[t, place], rtol=1e-5, atol=0.0)
