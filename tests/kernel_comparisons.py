"""Comparisons of an operator's kernels: what it returns and what it changes, beside the plain kernel's or float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hf_lopt.features import STAT_NONFINITE, STAT_PAIRS
from hf_lopt.kernels import ops
from hf_lopt.kernels.arguments import AdamStep, ApplyNetwork, Arguments, Descend, FeatureSums, Sums, UpdateFactored
from hf_lopt.kernels.dispatch import Operator
from kernel_backends import Backend
from kernel_cases import Case


OPERATORS = {operator.name: operator for operator in ops.OPERATORS}


@dataclass
class Outcome:
    """What a call returned, and its arguments after it."""

    results: list
    arguments: Arguments

    def tensors(self) -> list[Tensor]:
        found = tree_leaves((self.results, list(vars(self.arguments).values())))
        return [x for x in found if isinstance(x, Tensor)]


def outcome(arguments: Arguments) -> Outcome:
    """Calls the operator with a copy of the arguments, of the same strides."""
    operator: Operator = OPERATORS[arguments.OPERATOR]
    arguments = copy.deepcopy(arguments)
    results = operator(arguments)
    return Outcome([results] if isinstance(results, Tensor) else list(results or ()), arguments)


def plain_outcome(arguments: Arguments) -> Outcome:
    with ops.plain():
        return outcome(arguments)


def close(got: Tensor, want: Tensor, relative: float, what: str, absolute: float = 1e-36) -> None:
    """Equal to within ``relative`` of the largest number of ``want``; what float32 cannot hold may be inf or NaN."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    assert torch.equal(finite.all(), got.isfinite().all()), f"{what}: only one of them is finite"
    if finite.all() and want.numel():
        error, bound = (got - want).abs().max(), relative * want.abs().max() + absolute
        assert error <= bound, f"{what}: {error:.3g} > {bound:.3g}"


def equal(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def rounding(p: Tensor, bound: float) -> float:
    """A relative bound; wider for a few elements, where an accumulator may be a difference of larger numbers."""
    return bound if p.numel() > 64 else 100 * bound


def _check_sums(x: Case, arguments: Sums, got: Outcome, want: Outcome) -> None:
    for name, ours, plain in zip(("row sums", "column sums"), got.results[:2], want.results[:2], strict=True):
        for a, b in zip(ours, plain, strict=True):
            assert a.shape == b.shape and a.dtype == torch.float32
            close(a, b, 1e-5, name)
    stats, plain = got.results[2], want.results[2]
    assert stats.shape == plain.shape and stats.dtype == torch.float64
    assert torch.equal(stats[:, STAT_NONFINITE], plain[:, STAT_NONFINITE])
    for t, p in enumerate(arguments.params):
        # Squares of 16-bit numbers are round ones, whose sums in float32 err to one side.
        relative = 1e-6 if p.dtype == arguments.grads[t].dtype == torch.float32 else 4e-6
        close(stats[t, 1:STAT_PAIRS], plain[t, 1:STAT_PAIRS], relative, "statistics")
        if not arguments.moments:
            continue
        # A sum may be a small difference of large numbers.
        squares, size = plain[t, STAT_PAIRS + 1 :: 2], p.numel()
        spread = float((squares / max(size, 1)).sqrt().max() * size)
        absolute = 1e-6 * (float(plain[t, STAT_NONFINITE]) + spread) + 1e-36
        close(stats[t, STAT_PAIRS::2], plain[t, STAT_PAIRS::2], 1e-6, "sums", absolute)
        close(stats[t, STAT_PAIRS + 1 :: 2], squares, 1e-6, "sums of squares")


def _check_update_factored(x: Case, arguments: UpdateFactored, got: Outcome, want: Outcome) -> None:
    for t, axis in enumerate(arguments.row_axes):
        ours, plain = ([part[t] for part in parts.results] for parts in (got, want))
        assert all(a.shape == b.shape and a.dtype == torch.float32 for a, b in zip(ours, plain, strict=True))
        if axis < 0:
            assert all(a.numel() == 0 for a in ours)
            continue
        for a, b in zip(ours[:2], plain[:2], strict=True):
            close(a, b, 2e-6, "accumulators")
        if all(b.isfinite().all() for b in plain[:2]):  # otherwise the step is skipped
            for a, b in zip(ours[2:], plain[2:], strict=True):
                close(a, b, 1e-5, "factors")


def _check_feature_sums(x: Case, arguments: FeatureSums, got: Outcome, want: Outcome) -> None:
    sums, plain = got.results[0], want.results[0]
    assert sums.shape == plain.shape and sums.dtype == torch.float64
    for t, p in enumerate(x.slices(x.params)):
        assert not plain[t].isfinite().all() or sums[t].isfinite().all()
        # The sums matter as mean squares beside the normaliser's epsilon.
        size = plain[t] + max(p.numel(), 1) * x.features.norm_eps
        # The portable kernel adds up rows in float32, which errs by 1e-5 where thousands of numbers are equal.
        both = sums[t].isfinite() & plain[t].isfinite()
        error = ((sums[t] - plain[t]) / size)[both].abs()
        assert error.numel() == 0 or error.max() < rounding(p, 2e-5), (p.shape, error)


def _check_apply_network(x: Case, arguments: ApplyNetwork, got: Outcome, want: Outcome) -> None:
    (sums, stats), (plain_sums, plain_stats) = got.results, want.results
    after, plain = got.arguments, want.arguments
    for t, p in enumerate(x.slices(x.params)):
        close(sums[t], plain_sums[t], rounding(p, 1e-4), "Σ step²")
        close(stats[t, :4], plain_stats[t, :4], 1e-5, "new statistics")
    for t, before in enumerate(arguments.params):
        for name in ("momenta", "second_moments", "diagonals"):
            close(getattr(after, name)[t], getattr(plain, name)[t], 1e-6, name)
        if arguments.out:
            close(after.out[t], plain.out[t], rounding(before, 3e-5), f"step of {tuple(before.shape)}")
            assert torch.equal(after.params[t], before)
        else:
            unit, end = torch.finfo(before.dtype).eps, plain.params[t]
            largest = float((end.double() - before.double()).abs().max()) if before.numel() else 0.0
            close(after.params[t], end, unit, "parameters", rounding(end, 3e-5) * largest)


def _check_adam_step(x: Case, arguments: AdamStep, got: Outcome, want: Outcome) -> None:
    close(got.results[0], want.results[0], 1e-5, "Σ step²")
    after, plain = got.arguments, want.arguments
    for t, p in enumerate(arguments.params):
        units = 2 if p.is_cuda else 1  # seen on an H200: 1.1
        close(after.params[t], plain.params[t], units * torch.finfo(p.dtype).eps, "parameters")
        close(after.momenta[t], plain.momenta[t], 2e-6, "momenta")
        close(after.second_moments[t], plain.second_moments[t], 2e-6, "second moments")


def _check_descend(x: Case, arguments: Descend, got: Outcome, want: Outcome) -> None:
    lr, decay = arguments.lr.double(), arguments.weight_decay.double()
    for t, (p, step) in enumerate(zip(arguments.params, arguments.steps, strict=True)):
        exact = p.double() * (1 - lr[t] * decay[t]) - step.double() * lr[t]
        for after in (got, want):
            moved = after.arguments.params[t].double()
            torch.testing.assert_close(moved, exact, rtol=torch.finfo(p.dtype).eps, atol=1e-6)


def _applications(x: Case) -> list[ApplyNetwork]:
    """None for sums that are not finite: such a step is skipped."""
    finite = bool(x.sums_of_squares.isfinite().all())
    return [x.apply_network(into_out=into_out) for into_out in (True, False)] if finite else []


# Operator -> its calls for a list of tensors, and what must hold of one.
COMPARISONS: dict[str, tuple[Callable[[Case], list], Callable[..., None]]] = {
    "sums": (lambda x: [x.sums(moments=True), x.sums(moments=False)], _check_sums),
    "update_factored": (lambda x: [x.update_factored()], _check_update_factored),
    "feature_sums": (lambda x: [x.feature_sums()], _check_feature_sums),
    "apply_network": (_applications, _check_apply_network),
    "adam_step": (lambda x: [x.adam_step()], _check_adam_step),
    "descend": (lambda x: [x.descend()], _check_descend),
}
PASSES = ("sums", "update_factored", "feature_sums", "apply_network")


def compare(backend: Backend, x: Case, *operators: str) -> None:
    """The kernels of the active backend beside the plain ones, with the same inputs; of all passes unless some
    ``operators`` are named."""
    x = x.to(backend.device)
    for name in operators or PASSES:
        calls, check = COMPARISONS[name]
        if name not in x.compared:  # the same for all backends that share the case
            x.compared[name] = [(arguments, plain_outcome(arguments)) for arguments in calls(x)]
        for arguments, want in x.compared[name]:
            assert backend.supports(arguments), name
            check(x, arguments, outcome(arguments), want)
