"""The fast paths of the kernels, which never form products with factors, against the generic ones of features.h."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_lopt import _load, _ops
from kernel_cases import Case, case, instruction_set, instruction_sets


pytestmark = pytest.mark.skipif(not _load.loaded(), reason="the kernels are not compiled here")
SHAPES = [(1, 7), (33, 70), (300, 9), (6, 5, 3, 3)]


def column(x: Case, units: int, place: int) -> list[Tensor]:
    """One column of features at every element: the output of a network whose units have it with either sign."""
    weights = [torch.zeros(1, *size) for size in ((sum(x.features.widths()), units), (units, units), (units, 2))]
    biases = [torch.zeros(1, size) for size in (units, units, 2)]
    weights[0][0, place, :2] = weights[2][0, :2, 0] = torch.tensor([1.0, -1.0])
    weights[1][0] = torch.eye(units)
    one, out = torch.ones(len(x.params)), [torch.empty(p.shape) for p in x.params]
    y = replace(x, momenta=[m.clone() for m in x.momenta], second_moments=[v.clone() for v in x.second_moments])
    _ops.apply_network(*y.common(x.factors()), weights, biases, one, one, 0.0, torch.tensor(False), out)
    return out


@pytest.mark.parametrize("name", instruction_sets())
def test_fast_paths_follow_the_generic_one(name):
    with instruction_set(name):
        x = case(SHAPES, "small_fc", size=0.3)
        sums = _ops.feature_sums(*x.common(x.factors()))
        for place in range(sums.shape[1]):
            generic, fast = column(x, 32, place), column(x, 4, place)
            for t, (a, b) in enumerate(zip(generic, fast, strict=True)):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6 * float(a.abs().max()))
                torch.testing.assert_close(a.double().square().sum(), sums[t, place], rtol=1e-5, atol=0.0)


# ---- what is not as large as it should be is an error, not a crash --------------------


@pytest.mark.parametrize("name", ["grads", "momenta", "second_moments"])
def test_the_first_pass_compares_sizes(name):
    x = case([(7,), (50, 90)])
    with pytest.raises(RuntimeError, match=rf"{name}\[1\] has another shape than its parameter"):
        replace(x, **{name: [getattr(x, name)[0], getattr(x, name)[1][..., :-1]]}).first_pass(True)


@pytest.mark.parametrize("name", ["grads", "momenta", "second_moments", "rows", "cols", "diagonals"])
@pytest.mark.parametrize("wrong", ["size", "type"])
def test_the_later_passes_compare_sizes_and_types(name, wrong):
    x = case([(50, 90), (70,)])
    f, t = x.factors(), int(name == "diagonals")
    if name in ("rows", "cols"):
        xs = [y.clone() for y in getattr(f, name)]
        xs[t] = xs[t].flatten()[:-1] if wrong == "size" else xs[t].double()
        f = replace(f, **{name: xs}) if hasattr(f, "__dataclass_fields__") else f._replace(**{name: xs})
    else:
        xs = list(getattr(x, name))
        xs[t] = xs[t].flatten()[:-1] if wrong == "size" else xs[t].double()
        x = replace(x, **{name: xs})
    with pytest.raises(RuntimeError, match=rf"{name}\[{t}\] (has another shape|must be)"):
        torch.ops.hf_lopt.feature_sums(*x.common(f))


def test_the_network_and_the_folding_compare_sizes_and_types():
    x = case([(5, 9)], "velo")
    f = x.factors()
    weights, biases = x.network(_ops.feature_sums(*x.common(f)))
    one, no = torch.ones(1), torch.tensor(False)
    for i in range(3):
        wrong = [b[:, :-1] if k == i else b for k, b in enumerate(biases)]
        with pytest.raises(RuntimeError, match=f"layer {i} of the network must be of"):
            _ops.apply_network(*x.common(f), weights, wrong, one, one, 1e-3, no, ())
    sizes, lr, sums = (30, 4, 4, 3), torch.ones(2), torch.ones(2, 30).double()
    flat = torch.ones(1, sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False)))

    def fold(outputs=2, lr=lr, sums=sums, factors=()):
        numel = torch.ones(2).double()
        torch.ops.hf_lopt.fold_network(flat, sizes, outputs, None, sums, numel, 0.0, lr, lr, factors, None, 1.0, -1)

    fold()
    for wrong, message in (
        ({"outputs": 4}, "3 outputs, of which 4"),
        ({"sums": sums.float()}, "sums must be Double"),
        ({"factors": [torch.ones(3)]}, r"factors\[0\] is for 3 tensors, there are 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fold(**wrong)


def test_descend_needs_sizes_with_squares():
    p = torch.ones(3)
    with pytest.raises(RuntimeError, match="squares need the numbers of elements"):
        arguments = (torch.ones(1), torch.ones(1), torch.ones(1).double(), None, 0.0, [], torch.tensor(False))
        torch.ops.hf_lopt.descend([p], [p.clone()], *arguments)
