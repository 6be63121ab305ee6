"""Arguments of the operators on small arrays, and one valid call of every operator."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_lopt.kernels.arguments import (
    Advance,
    Arguments,
    Assign,
    LstmStep,
    Orthogonalize,
    Pool,
    SpecializeNetworks,
    ZeroNan,
)
from kernel_cases import case, moved


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def arguments_on(arguments: Arguments, device: str) -> Arguments:
    """The arguments with their tensors on another device."""

    def there(value):
        if isinstance(value, Tensor):
            return moved(value, device)
        return [there(x) for x in value] if isinstance(value, (list, tuple)) else value

    return type(arguments)(**{name: there(value) for name, value in vars(arguments).items()})


def specialize(rows=1, constants=None, outputs=2, sizes=(8, 4, 3), factors=2) -> SpecializeNetworks:
    """Networks of three tensors, or one for all of them."""
    generator = torch.Generator().manual_seed(3)
    sizes = (30 + (11 if constants else 0), *sizes)
    width = sum((a + 1) * b for a, b in zip(sizes, sizes[1:], strict=False))
    lr, decay, factor = (torch.rand(3, generator=generator) for _ in range(3))
    return SpecializeNetworks(
        networks=torch.randn(rows, width, generator=generator),
        sizes=sizes,
        outputs=outputs,
        constants=torch.randn(constants, generator=generator) if constants else None,
        sums=torch.rand(3, 30, generator=generator, dtype=torch.float64) * 10,
        numel=torch.tensor([1.0, 20.0, 300.0], dtype=torch.float64),
        norm_eps=1e-5,
        lr=lr,
        weight_decay=decay,
        factors=[factor, factor[:1].expand(3)][:factors],
        floor=torch.tensor([0.0, 10.0, 0.1]),
        step_mult=0.001,
        p_column=2,
    )


def advance(loss=1.5, nonfinite=0.0, inputs=True) -> Advance:
    generator, rows = torch.Generator().manual_seed(0), 5

    def random(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1

    stats, sums, numel = random(rows, 11), random(rows, 30), random(rows) * 100
    stats[:, 0] = 0.0
    stats[3, 0] = nonfinite
    return Advance(
        stats=[stats],
        sums=[sums],
        nonfinite=None,
        loss=torch.tensor(loss),
        counters=torch.tensor([6, 1, 1]),
        loss_buffer=[torch.zeros(10), torch.full((10,), 999999999999.0)],
        horizon=100.0,
        correction_decays=[0.9, 0.999],
        tensor_inputs=[stats, sums, numel, torch.eye(5)] if inputs else [],
        p_column=2,
        rows=rows,
    )


def lstm(units=64, controls=7, softmax=True, skip=False, rows=4) -> tuple[Pool, LstmStep]:
    generator, weights = torch.Generator().manual_seed(0), 159 if controls else 0

    def random(*shape):
        return torch.randn(shape, generator=generator) * 0.3

    hidden, cell = ([random(units) for _ in range(rows)] for _ in range(2))
    heads, bias, bank = random(units, controls + 1), random(controls + 1), random(controls, weights)
    gates = random(rows, 4 * units)
    step = LstmStep(gates, hidden, cell, heads, bias, bank, softmax, torch.tensor(skip))
    return Pool(random(rows, 2 * units), hidden), step


def samples() -> dict[str, Arguments]:
    """A call of every operator that compiled kernels support, with everything that may be left out given."""
    x, sliced = case([(7,), (5, 9), (3, 4, 5)]), case([(7,), (5, 9), (3, 4, 5)], order="jax", sliced=True)
    pool, lstm_step = lstm()
    factored, descend = x.update_factored(), sliced.descend()
    steps = sliced.slices(descend.steps)
    calls = (
        x.sums(),
        replace(factored, row_means=[factored.row_means[0], torch.rand(3, 1) + 0.5, factored.row_means[2]]),
        x.feature_sums(),
        x.apply_network(into_out=True),
        x.adam_step(),
        replace(
            descend,
            squares=torch.stack([step.double().square().sum() for step in steps]),
            numel=torch.tensor([step.numel() for step in steps], dtype=torch.float64),
            slice_axes=sliced.slice_axes,
        ),
        Orthogonalize(torch.randn(2, 6, 5), torch.float32, COEFFICIENTS, 5, 1e-8, 1e-9),
        replace(advance(), nonfinite=torch.tensor(False)),
        pool,
        lstm_step,
        specialize(rows=3, constants=(3, 11)),
        Assign([m.clone() for m in x.momenta], x.momenta, torch.tensor(False)),
        ZeroNan([torch.ones(7), torch.ones(5, 9)]),
    )
    return {arguments.OPERATOR: arguments for arguments in calls}
